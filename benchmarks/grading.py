"""How fast answers are graded: by a judge with several calls at a time, from its saved replies, by the local graders.

The judge is a stand-in service in a process of its own that answers after a fixed time, like a model behind a network.
With P calls at a time, P / latency answers per second are possible; the difference is our own cost. Every answer is
graded once, then all are graded again from the saved replies. Run ``python -m benchmarks.grading``.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stand_in import stand_in_process
from seal_nb.grading.base import Answered
from seal_nb.grading.choose import GRADERS, make_grader
from seal_nb.passages import load_passages
from seal_nb.storage import write_json

OUT = Path(__file__).resolve().with_name("grading.json")
PARALLEL = (1, 4, 16, 64)
LATENCY_S = 0.2  # of the stand-in; GPT-4.1 takes about half a second for one word
SECONDS = 5.0  # of a row at the possible speed


def answers(n: int) -> list[Answered]:
    """Different answers to the shipped questions: sentences with the gold answers of other questions."""
    asked = [
        (p.title, q) for split in ("shipped:train", "shipped:val") for p in load_passages(split) for q in p.questions
    ]
    return [
        Answered(
            title=asked[at % len(asked)][0],
            question=asked[at % len(asked)][1].question,
            gold=asked[at % len(asked)][1].answer,
            answer=f"As far as is known, in year {at} it was {asked[(7 * at) % len(asked)][1].answer}.",
        )
        for at in range(n)
    ]


def judge_row(base_url: str, max_parallel: int, *, latency_s: float, seconds: float) -> dict[str, Any]:
    """Answers per second with ``max_parallel`` calls at a time, and again from the saved replies."""
    asked = answers(max(8, int(seconds * max_parallel / latency_s)))
    with tempfile.TemporaryDirectory() as folder:
        name = f"judge:stand-in?base_url={base_url}&api_key_env=&max_parallel={max_parallel}&cache_dir={folder}"
        grader = make_grader(name)
        asked_s, cpu_s = _timed(grader.grade, asked)
        cached_s, _ = _timed(make_grader(name).grade, asked)
    return {
        "calls_at_a_time": max_parallel,
        "answers": len(asked),
        "answers_per_s": len(asked) / asked_s,
        "possible_per_s": max_parallel / latency_s,
        "cpu_s_per_answer": cpu_s / len(asked),
        "cached_answers_per_s": len(asked) / cached_s,
    }


def local_row(name: str, n: int = 4000) -> dict[str, Any]:
    asked, grader = answers(n), make_grader(name)
    took_s, _ = _timed(grader.grade, asked)
    return {"grader": name, "answers_per_s": n / took_s}


def _timed(grade: Any, asked: Sequence[Answered]) -> tuple[float, float]:
    """Wall and processor seconds. Every answer must get a verdict."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    verdicts = grade(asked)
    assert "UNGRADED" not in verdicts
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def measure(*, parallel: Sequence[int], latency_s: float, seconds: float) -> dict[str, Any]:
    with stand_in_process("yes", service_time_s=latency_s, lanes=max(parallel)) as base_url:
        rows = [judge_row(base_url, n, latency_s=latency_s, seconds=seconds) for n in parallel]
    return {
        "latency_s": latency_s,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "processor": platform.machine()},
        "judge": rows,
        "local": [local_row(name) for name in GRADERS],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of docs/graders.md."""
    lines = [
        f"| calls at a time | answers/s | possible at {result['latency_s']:g} s a call | CPU-ms an answer "
        "| from the cache, answers/s |",
        "|---|---|---|---|---|",
    ]
    for row in result["judge"]:
        lines.append(
            f"| {row['calls_at_a_time']} | {row['answers_per_s']:,.0f} | {row['possible_per_s']:,.0f} "
            f"| {1e3 * row['cpu_s_per_answer']:.1f} | {row['cached_answers_per_s']:,.0f} |"
        )
    lines += ["", "| grader | answers/s on one core |", "|---|---|"]
    lines += [f"| {row['grader']} | {row['answers_per_s']:,.0f} |" for row in result["local"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grading", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one call at a time and two, a tenth of a second")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        result = measure(parallel=(1, 2), latency_s=0.01, seconds=0.1)
    else:
        result = measure(parallel=PARALLEL, latency_s=LATENCY_S, seconds=SECONDS)
    write_json(arguments.out, result)
    print(markdown(result))


if __name__ == "__main__":
    main()

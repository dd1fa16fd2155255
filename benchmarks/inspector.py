"""Times the passage inspector on runs of the published sizes: open, show, go to another passage, filter.

The runs are artificial: the shipped passages, repeated, with gold answers in sentences, half of them right. Sizes are
the published ones (SEAL, arXiv 2506.10943): a ReST-EM round of 50 passages × 5 self-edits × 3 adapters, and an
evaluation of 200 passages. The times do not include the browser. Run it with ``python -m benchmarks.inspector``.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seal_nb.inspector.inspection import Inspection, open_run
from seal_nb.inspector.live import VIEWS, PassageInspector
from seal_nb.passages import Passage, load_passages
from seal_nb.storage import write_json

OUT = Path(__file__).resolve().with_name("inspector.json")
SIZES = {"ReST-EM round, 50 × 5 × 3": (50, 5, 3), "evaluation, 200 × 1 × 1": (200, 1, 1)}
QUICK = {"quick, 3 × 2 × 2": (3, 2, 2)}
MEANING = {
    "open_s": "open the file, list the passages",
    "show_s": "show the widget",
    "next_s": "go to another passage, median",
    "slowest_next_s": "the slowest of them",
    "view_s": "another view of it, slowest",
    "sort_s": "sort by gain",
    "disagree_s": "filter where graders disagree, first time",
    "again_s": "the same again",
}


def run_of_size(n_passages: int, n_self_edits: int, n_repeats: int) -> dict[str, Any]:
    """A run file of the published form; the same each time."""
    shipped = [one for split in ("shipped:train", "shipped:val") for one in load_passages(split)]
    drawn = random.Random(0)
    return {
        "overall": {},
        "model": "made up",
        "eval_times": n_repeats,
        "articles": [
            {
                "title": f"{one.title} {at}",
                "context": one.context,
                "completions": [
                    {"text": one.hand_written, "questions": _answers(one, n_repeats, drawn)}
                    for _ in range(n_self_edits)
                ],
            }
            for at, one in ((at, shipped[at % len(shipped)]) for at in range(n_passages))
        ],
    }


def _answers(passage: Passage, n_repeats: int, drawn: random.Random) -> list[dict[str, Any]]:
    golds = [question.answer for question in passage.questions]
    rows = []
    for repeat in range(n_repeats):
        for question in passage.questions:
            said = drawn.choice([question.answer, drawn.choice(golds)])
            rows.append(
                {
                    "rep": repeat,
                    "question": question.question,
                    "answer": question.answer,
                    "baseline_answer": f"I do not know, in {drawn.randrange(3000)} perhaps.",
                    "adapter_answer": f"As far as is known, in {drawn.randrange(3000)} it was {said}.",
                    "baseline_correct": False,
                    "adapter_correct": said == question.answer,
                }
            )
    return rows


def measure(size: tuple[int, int, int]) -> dict[str, Any]:
    """Seconds of each step, in the order of use."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_json(Path(folder) / "run_made_up.json", run_of_size(*size))
        row: dict[str, Any] = {"megabytes": path.stat().st_size / 1e6}
        row["open_s"], inspection = _timed(lambda: _opened(path))
    inspector = PassageInspector(inspection)
    row["show_s"], _ = _timed(lambda: inspector.box)
    nexts = [_timed(_set, inspector.ui.passages, n)[0] for n in inspection.passages["n"].tolist()[1:]]
    row |= {"next_s": statistics.median(nexts), "slowest_next_s": max(nexts)}
    row["view_s"] = max(_timed(_set, inspector.ui.view, view)[0] for view in (*VIEWS[1:], VIEWS[0]))
    row["sort_s"], _ = _timed(_set, inspector.ui.sort, "largest gain")
    row["disagree_s"], _ = _timed(_set, inspector.ui.show, "graders disagree")
    _set(inspector.ui.show, "all")
    row["again_s"], _ = _timed(_set, inspector.ui.show, "graders disagree")
    return row


def _opened(path: Path) -> Inspection:
    inspection = Inspection(open_run(path))
    inspection.select()
    return inspection


def _set(control: Any, value: Any) -> None:
    control.value = value


def _timed(work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    began_at = time.perf_counter()
    made = work(*given)
    return time.perf_counter() - began_at, made


def markdown(result: Mapping[str, Any]) -> str:
    """The table of docs/lab.md."""
    rows = result["rows"]
    head = [f"{name} ({row['megabytes']:.1f} MB)" for name, row in rows.items()]
    lines = [f"| milliseconds | {' | '.join(head)} |", "|---|" + "---|" * len(rows)]
    for key, what in MEANING.items():
        lines.append(f"| {what} | {' | '.join(f'{1e3 * row[key]:,.0f}' for row in rows.values())} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspector", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a run of three passages")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "processor": platform.machine()}
    rows = {name: measure(size) for name, size in (QUICK if arguments.quick else SIZES).items()}
    result = {"machine": machine, "rows": rows}
    write_json(arguments.out, result)
    print(markdown(json.loads(arguments.out.read_text())))


if __name__ == "__main__":
    main()

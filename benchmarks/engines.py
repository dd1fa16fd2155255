"""How the speed of stage 1 depends on the number of requests at a time.

Each row writes the same self-edits with another ``max_parallel`` and counts texts per second. Two engines are measured:
a stand-in service on loopback with a fixed number of texts at a time and a fixed time for each, so that the possible
speed is known; and, if an environment with vLLM is found (`make vllm-env`), a real vLLM server with the small model on
the same processor. Writes ``benchmarks/engines.json`` and ``docs/images/engines.png``.

    python -m benchmarks.engines      (five minutes on two cores with vLLM, half a minute without)
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_plots import engine_throughput
from benchmarks.stand_in import stand_in_process
from seal_nb.engines.api import ApiSettings, OpenAIEngine
from seal_nb.engines.base import Engine, Sampling
from seal_nb.engines.vllm import VllmEngine, VllmServer, vllm_python
from seal_nb.errors import SettingsError
from seal_nb.passages import load_passages
from seal_nb.prompts import find_prompts
from seal_nb.self_edits import write_self_edits
from seal_nb.storage import Journal, write_json

OUT = Path(__file__).with_name("engines.json")
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "engines.png"
PARALLEL = (1, 2, 4, 8, 16, 32, 64)
SERVICE_TIME_S = 0.2
LANES = 32
VLLM_PARALLEL = (1, 2, 4, 8, 16, 32)
MAX_TOKENS = 24
VLLM_LANES = 16  # requests in one batch; more of them wait


def stage_1(engine: Engine, *, n_texts: int, max_tokens: int) -> dict[str, float]:
    """Texts per second of one run with an empty journal."""
    passages = load_passages("shipped:train")[:8]
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.jsonl") as journal:
        started_s = time.perf_counter()
        write_self_edits(
            engine,
            passages,
            prompts=find_prompts("implications"),
            k_completions=max(1, n_texts // len(passages)),
            sampling=Sampling(max_tokens=max_tokens),
            seed=1,
            journal=journal,
        )
        took_s = time.perf_counter() - started_s
        n_tokens = sum(journal.get(key)["n_tokens"] for key in journal)
        return {"texts_per_s": len(journal) / took_s, "tokens_per_s": n_tokens / took_s}


def service_rows(parallel: Sequence[int], *, service_time_s: float, lanes: int) -> list[dict[str, Any]]:
    """The stand-in: ``lanes`` texts at a time, ``service_time_s`` each."""
    rows = []
    with stand_in_process("It is so.", service_time_s=service_time_s, lanes=lanes) as url:
        for n in parallel:
            settings = ApiSettings(base_url=url, api_key_env="", max_parallel=n)
            engine = OpenAIEngine(settings, model="stand-in")
            speed = stage_1(engine, n_texts=max(16, 8 * n), max_tokens=16)
            rows.append({"parallel": n, "possible": min(n, lanes) / service_time_s, **speed})
    return rows


def vllm_rows(parallel: Sequence[int], *, lanes: int, max_tokens: int) -> list[dict[str, Any]]:
    """A real server on this machine's processor, one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    arguments = ("--max-model-len=1024", "--enforce-eager", f"--max-num-seqs={lanes}", "--no-enable-prefix-caching")
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        VllmServer("embedded", run_dir=Path(folder), dtype="float32", arguments=arguments) as server,
    ):
        stage_1(VllmEngine.of(server), n_texts=8, max_tokens=4)  # the first call is slow
        for n in parallel:
            engine = VllmEngine.of(server, max_parallel=n)
            rows.append({"parallel": n, **stage_1(engine, n_texts=max(8, 2 * n), max_tokens=max_tokens)})
    return rows


def measure(*, quick: bool) -> dict[str, Any]:
    parallel = (1, 4) if quick else PARALLEL
    result: dict[str, Any] = {
        "quick": quick,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "load_before": round(os.getloadavg()[0], 1),
        "service": {
            "service_time_s": SERVICE_TIME_S,
            "lanes": LANES,
            "rows": service_rows(parallel, service_time_s=SERVICE_TIME_S, lanes=LANES),
        },
        "vllm": None,
    }
    try:
        vllm_python()
    except SettingsError:
        return result
    if not quick:
        rows = vllm_rows(VLLM_PARALLEL, lanes=VLLM_LANES, max_tokens=MAX_TOKENS)
        result["vllm"] = {"lanes": VLLM_LANES, "max_tokens": MAX_TOKENS, "rows": rows}
    return result


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/engines.md."""
    service = result["service"]
    lines = [
        f"| requests at a time | stand-in: {service['lanes']} at a time, {service['service_time_s']:g} s each"
        " | possible |",
        "|---|---|---|",
    ]
    for row in service["rows"]:
        lines.append(f"| {row['parallel']} | {row['texts_per_s']:.1f} texts/s | {row['possible']:.0f} |")
    if result["vllm"]:
        lines += ["", "| requests at a time | vLLM on this CPU | |", "|---|---|---|"]
        for row in result["vllm"]["rows"]:
            lines.append(
                f"| {row['parallel']} | {row['texts_per_s']:.2f} texts/s | {row['tokens_per_s']:.0f} tokens/s |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rows of the stand-in only")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args(argv)
    result = measure(quick=arguments.quick)
    write_json(arguments.out, result)
    engine_throughput(result).save(arguments.figure.with_suffix(""))
    print(markdown(result))


if __name__ == "__main__":
    main()

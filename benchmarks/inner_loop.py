"""How fast whole requests are: the published way, a careful user's way, and slots.

One run on this machine's CPU prints a table and writes `benchmarks/inner_loop.json`. A whole request is the
training of an adapter and the answers to its questions without and with it. All ways use the same model,
dtype, requests and cores, in one process a core.

    make bench                                   (17 minutes on two quiet cores)
    python -m benchmarks.inner_loop --quick      (a tiny random model: shows that it runs, says nothing)
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.parallel_grading import LATENCY_S, measure_grading
from benchmarks.peft_alone import measure_alone
from benchmarks.processes import run_together
from benchmarks.slots import measure_growth, measure_slots
from benchmarks.speed_table import by_source, rounded, table
from benchmarks.workload import Workload, load_workload
from seal_nb.models import resolve_model
from seal_nb.protocol import TTTRequest
from seal_nb.storage import package_versions, read_json, write_json

OUT = Path(__file__).with_name("inner_loop.json")
MOST_PROCESSES = 4  # a padded step alone holds gigabytes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured. Requests are counted for each process."""

    n_slots: tuple[int, ...] = (1, 16)
    least_requests: int = 2
    alone_requests: int = 2
    pad_to: int = 2048  # tokens; published
    padded_steps: int = 3
    lengths: tuple[int, ...] = (32, 128, 512)  # tokens
    n_jobs: tuple[int, ...] = (1, 4, 16)
    epochs: int = 10  # published
    max_new_tokens: int = 64  # published
    judge_latency_s: float = LATENCY_S


QUICK = Settings(
    n_slots=(1, 4),
    least_requests=1,
    alone_requests=1,
    pad_to=256,
    lengths=(16, 32),
    n_jobs=(1, 2),
    epochs=1,
    max_new_tokens=4,
    judge_latency_s=0.05,
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One machine, one model, one dtype, one workload."""

    model: str
    dtype: str
    workload: Workload
    settings: Settings
    n_cores: int

    @property
    def spread(self) -> tuple[int, int]:
        """(processes, threads of each): as many processes as is sensible."""
        n = min(self.n_cores, MOST_PROCESSES)
        return n, self.n_cores // n

    def requests(self, share: int, n_shares: int, n: int) -> list[TTTRequest]:
        change = {"finetune_epochs": self.settings.epochs, "max_new_tokens": self.settings.max_new_tokens}
        return [r.model_copy(update=change) for r in self.workload.requests(share, n_shares, n)]

    def alone(self, n_processes: int, n_threads: int) -> list[dict[str, Any]]:
        """Two rows: the published way (extrapolated) and the careful one."""
        s = self.settings
        n = s.alone_requests
        shares = [
            (self.requests(k, n_processes, n), self.model, self.dtype, s.pad_to, s.padded_steps)
            for k in range(n_processes)
        ]
        parts = run_together(measure_alone, shares, n_threads=n_threads)
        return [
            row | {"processes": n_processes, "threads": n_threads}
            for row in (_published_row(parts), _careful_row(parts))
        ]

    def slots(self, n_processes: int, n_threads: int, n_slots: int) -> dict[str, Any]:
        n = max(n_slots, self.settings.least_requests)
        shares = [(self.requests(k, n_processes, n), self.model, self.dtype, n_slots) for k in range(n_processes)]
        parts = run_together(measure_slots, shares, n_threads=n_threads)
        return {
            "way": "slots",
            "processes": n_processes,
            "threads": n_threads,
            "slots": n_slots,
            "requests_per_minute": sum(60 * p["requests"] / p["seconds"] for p in parts),
            "requests_timed": sum(p["requests"] for p in parts),
            "train_tokens_per_s": sum(p["train_tokens_per_s"] for p in parts),
            **_means(parts, "train_s", "answer_s", "steps", "tokens", "baseline_share", "adapter_accuracy"),
            "peak_rss_mb": max(p["peak_rss_mb"] for p in parts),
        }

    def grading(self) -> dict[str, Any]:
        (request,) = self.requests(0, 1, 1)
        return measure_grading(len(request.eval_questions), latency_s=self.settings.judge_latency_s)

    def growth(self) -> dict[str, Any]:
        s, (request,) = self.settings, self.requests(0, 1, 1)
        arguments = (request, self.model, self.dtype, s.lengths, s.n_jobs)
        return run_together(measure_growth, [arguments], n_threads=1)[0]


def _means(parts: Sequence[dict[str, Any]], *names: str) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) / len(parts) for name in names}


def _careful_row(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "way": "careful",
        "requests_per_minute": sum(60 * p["requests"] / p["seconds"] for p in parts),
        "requests_timed": sum(p["requests"] for p in parts),
        **_means(parts, "train_s", "baseline_s", "answer_s", "steps", "adapter_accuracy"),
    }


def _published_row(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Training from timed steps; answers are those of the careful way, which generates alike."""
    seconds = [p["steps"] * p["padded_step_s"] + p["baseline_s"] + p["answer_s"] for p in parts]
    return {
        "way": "published",
        "requests_per_minute": sum(60 / s for s in seconds),
        "extrapolated_from_steps": sum(p["padded_steps_timed"] for p in parts),
        "train_s": sum(p["steps"] * p["padded_step_s"] for p in parts) / len(parts),
        **_means(parts, "padded_step_s", "baseline_s", "answer_s", "steps"),
        "peak_rss_mb": max(p["peak_rss_mb"] for p in parts),
    }


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Rows of the table, each printed when it is there."""
    rows: list[dict[str, Any]] = []
    rows += _said(bench.alone(*bench.spread))
    for n_slots in bench.settings.n_slots:
        rows += _said([bench.slots(*bench.spread, n_slots)])
    return rows


def _said(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        print(f"  measured: {row['way']:9}  {row['requests_per_minute']:.3g} requests/min", flush=True)
    return rows


def fastest(rows: Sequence[dict[str, Any]], way: str) -> dict[str, Any]:
    return max((r for r in rows if r["way"] == way), key=lambda r: r["requests_per_minute"])


def report(bench: Bench, rows: list[dict[str, Any]], growth: dict[str, Any], grading: dict[str, Any]) -> dict[str, Any]:
    ours, published, careful = (fastest(rows, way) for way in ("slots", "published", "careful"))
    rate = ours["requests_per_minute"]
    layout = (ours["processes"], ours["threads"])
    alone = [r for r in rows if (r["processes"], r["threads"]) == layout]
    cached_s = careful["train_s"] + careful["answer_s"] + careful["baseline_s"] * ours["baseline_share"]
    return {
        "ratio_published": rate / published["requests_per_minute"],
        "ratio_unpadded": rate / careful["requests_per_minute"],
        "ratio_unpadded_baseline_kept": rate * cached_s / (60 * careful["processes"]),
        "published_is_extrapolated": True,
        "dtype": bench.dtype,
        "machine": {"cpu": _cpu(), "cores": bench.n_cores},
        "settings": {"lora_rank": 32, "lora_alpha": 64, "target_modules": "PEFT's default"} | vars(bench.settings),
        "workload": {
            "source": bench.workload.source,
            "steps_per_request": ours["steps"],
            "train_tokens_per_request": ours["tokens"],
        },
        "ways": rows,
        "gain_by_source": by_source(fastest(alone, "published"), fastest(alone, "careful"), ours),
        "parallel_grading": grading,
        "growth": growth,
        "versions": package_versions(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _dtype() -> str:
    """The faster of both on this processor, for every way."""
    import torch

    from seal_nb.ttt.device import default_dtype

    return str(default_dtype(torch.device("cpu"))).removeprefix("torch.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_loop", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model, in seconds")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the faster one here")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/{OUT.name}; with --quick: nothing")
    parser.add_argument("--grading-only", action="store_true", help="measure the judge's rows anew, keep the rest")
    arguments = parser.parse_args(argv)
    if arguments.grading_only:
        _grading_again(arguments.out or OUT)
        return
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            model=_tiny(Path(folder)) if arguments.quick else resolve_model(arguments.model),
            dtype=arguments.dtype or _dtype(),
            workload=load_workload(),
            settings=QUICK if arguments.quick else Settings(),
            n_cores=len(os.sched_getaffinity(0)),
        )
        rows = measure(bench)
        result = report(bench, rows, bench.growth(), bench.grading())
    result |= {"quick": arguments.quick, "minutes": (time.monotonic() - started_s) / 60}
    out = arguments.out or (None if arguments.quick else OUT)
    if out:
        write_json(out, rounded(result))
    print(table(result))


def _grading_again(out: Path) -> None:
    result = read_json(out)
    (request,) = load_workload().requests(0, 1, 1)
    result["parallel_grading"] = rounded(measure_grading(len(request.eval_questions)))
    write_json(out, result)
    print(table(result))


def _tiny(folder: Path) -> str:
    from tests.ttt.tiny import save_tiny_model

    return str(save_tiny_model(folder))


if __name__ == "__main__":
    main()

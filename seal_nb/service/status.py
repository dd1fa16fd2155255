"""What a server says about itself: counters, rates, workers; plain records, for a table, a plot or a test.

The front end fills a ``Meter`` and answers ``{"cmd": "status"}`` with one JSON object; ``read_status``
makes it a record again, and ``status_rows`` a table of two columns. Rates are over the last minute; no wall
clock is involved.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from seal_nb.wording import counted

WINDOW_S = 60.0


class Meter:
    """Counts since the start, and what was answered in the last minute; of bounded size."""

    def __init__(self, now: float) -> None:
        self.started_at = now
        self.counts: Counter[str] = Counter()
        self._seconds: deque[tuple[int, int, int]] = deque(maxlen=int(WINDOW_S) + 1)  # second, jobs, tokens

    def count(self, what: str, n: int = 1) -> None:
        self.counts[what] += n

    def answered(self, now: float, *, tokens: int) -> None:
        self.count("answered")
        self.count("train_tokens", tokens)
        second = int(now)
        jobs_before, tokens_before = 0, 0
        if self._seconds and self._seconds[-1][0] == second:
            _, jobs_before, tokens_before = self._seconds.pop()
        self._seconds.append((second, jobs_before + 1, tokens_before + tokens))

    def failed(self, error: str) -> None:
        """``error`` begins with the type, which is counted; the rest may be private."""
        self.count("failed")
        self.count(f"failed.{error.partition(':')[0][:60]}")

    def rates(self, now: float) -> dict[str, float]:
        """jobs_per_min and tokens_per_s over the last minute (or since the start, if that is shorter)."""
        recent = [(jobs, tokens) for second, jobs, tokens in self._seconds if now - second <= WINDOW_S]
        span_s = max(1.0, min(WINDOW_S, now - self.started_at))
        return {
            "jobs_per_min": round(60 * sum(jobs for jobs, _ in recent) / span_s, 2),
            "tokens_per_s": round(sum(tokens for _, tokens in recent) / span_s, 2),
        }


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """One worker process, as the front end knows it."""

    worker_id: str
    host: str
    pid: int
    n_running: int
    capacity: int
    silent_s: float  # since its last sign of life
    no_step_s: float = 0.0  # since its work last moved on; 0 without work
    model_id: str = ""
    stats: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    """One server at one moment."""

    server_id: str
    model_id: str
    pid: int
    uptime_s: float
    draining: bool
    n_queued: int
    n_running: int
    n_slots: int
    n_results: int
    n_unsaved: int
    queued_bytes: int
    jobs_per_min: float
    tokens_per_s: float
    rss_bytes: int
    counts: Mapping[str, int]
    workers: tuple[WorkerStatus, ...]
    trouble: str = ""


def read_status(fields: Mapping[str, Any]) -> ServerStatus:
    """The record of a status reply; what this version does not know is left out."""
    workers = tuple(_known(WorkerStatus, worker) for worker in fields.get("workers", ()))
    return _known(ServerStatus, {**fields, "workers": workers})


def status_rows(status: ServerStatus) -> list[tuple[str, str]]:
    """The table that `seal-nb status` shows on a terminal."""
    counts = status.counts
    rows = [
        ("server", f"{status.server_id}, up {status.uptime_s:.0f} s" + ", draining" * status.draining),
        ("model", status.model_id or "(no worker is ready yet)"),
        ("queue", f"{status.n_queued} waiting, {status.n_running} running of {status.n_slots} at once"),
        ("throughput", f"{status.jobs_per_min:g} jobs/min, {status.tokens_per_s:g} trained tokens/s"),
        ("answered", f"{counts.get('answered', 0)}, and {counts.get('from_journal', 0)} again from journal"),
        ("failures", f"{counts.get('failed', 0)} failed, {counts.get('requeued', 0)} requeued, "
                     f"{counts.get('refused', 0)} refused, {counts.get('cancelled', 0)} cancelled"),
        ("memory", _memory(status)),
    ]  # fmt: skip
    rows += [(f"worker {worker.worker_id}", _worker_line(worker)) for worker in status.workers]
    return [*rows, ("trouble", status.trouble)] if status.trouble else rows


def at_work(status: ServerStatus) -> str:
    """What is in training at this moment, in a line; empty where nothing is."""
    jobs = [job for worker in status.workers for job in worker.stats.get("training", {}).values()]
    step, n_steps = (sum(job[name] for job in jobs) for name in ("step", "n_steps"))
    return f"{counted(len(jobs), 'adapters')} in training, step {step:,} of {n_steps:,}" if jobs else ""


def rss_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _memory(status: ServerStatus) -> str:
    workers = sum(worker.stats.get("rss_bytes", 0) for worker in status.workers)
    text = f"front end {_mib(status.rss_bytes)}, workers {_mib(workers)}"
    on_gpu = [worker.stats["gpu_bytes"] for worker in status.workers if "gpu_bytes" in worker.stats]
    return f"{text}, on GPUs {_mib(sum(on_gpu))}" if on_gpu else text


def _worker_line(worker: WorkerStatus) -> str:
    memory = _mib(worker.stats.get("rss_bytes", 0))
    if "gpu_bytes" in worker.stats:
        now, most = worker.stats["gpu_bytes"], worker.stats["gpu_peak_bytes"]
        memory += f", GPU {_mib(now)} (at most {_mib(most)})"
    return (
        f"ready on {worker.host} (process {worker.pid}): {worker.n_running}/{worker.capacity} "
        f"requests, {memory}, heard {worker.silent_s:.1f} s ago, "
        f"{worker.no_step_s:.0f} s into its current step"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB"


def _known(kind: type, fields: Mapping[str, Any]) -> Any:
    names = {f.name for f in dataclass_fields(kind)}
    return kind(**{name: value for name, value in fields.items() if name in names})

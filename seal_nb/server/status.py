"""What a server says about itself: counters, rates, workers; plain records, for a table, a plot or a test.

The front end fills a ``Meter`` and answers ``{"cmd": "status"}`` with one JSON object; ``read_status``
makes it a record again, and ``status_rows`` a table of two columns. Rates are over the last minute; no wall
clock is involved.

A server watched from outside: its status once a second, until it ends; of bounded size.

For the server notebook and whoever else looks on for long. Each look is one question on a socket of its own,
without a ping: a server that ends when nobody needs it (``idle_timeout_s``) is not kept up by being looked
at. Shows nothing (``views`` does), starts and ends no server.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Self

import zmq

from seal_nb.errors import DataError, SettingsError
from seal_nb.metrics import counted
from seal_nb.server.endpoint import ask, find_endpoint

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


EVERY_S = 1.0
ANSWER_S = 2.0  # the front end answers at once, whatever its workers do
PATIENCE_S = 15.0  # a server without a process that we know has ended after so long a silence
MOST_SAMPLES = 600


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one status said, in numbers. ``at_s``: seconds since the watching began."""

    at_s: float
    queued: int
    running: int
    slots_in_use: int  # adapters in training
    slots: int
    jobs_per_min: float
    tokens_per_s: float
    memory_bytes: int  # resident, of front end and workers together
    gpu_bytes: int  # held by all workers on their GPUs; 0 without any
    answered: int
    failed: int
    requeued: int
    workers: int


def sample_of(status: ServerStatus, at_s: float) -> Sample:
    """Slots are the inner loop's, once a worker has told of any; a loop without slots counts by requests."""
    workers = status.workers
    told = [worker for worker in workers if worker.stats]
    return Sample(
        at_s=at_s,
        queued=status.n_queued,
        running=status.n_running,
        slots_in_use=sum(worker.stats.get("slots_in_use", worker.n_running) for worker in told),
        slots=sum(worker.stats.get("slots", worker.capacity) for worker in told),
        jobs_per_min=status.jobs_per_min,
        tokens_per_s=status.tokens_per_s,
        memory_bytes=status.rss_bytes + sum(worker.stats.get("rss_bytes", 0) for worker in workers),
        gpu_bytes=sum(worker.stats.get("gpu_bytes", 0) for worker in workers),
        answered=status.counts.get("answered", 0),
        failed=status.counts.get("failed", 0),
        requeued=status.counts.get("requeued", 0),
        workers=len(workers),
    )


def look(where: str) -> ServerStatus | None:
    """The status of the server at ``where`` (endpoint file or address); None if nobody answers."""
    try:
        reply = ask(find_endpoint(where), {"cmd": "status"}, timeout_s=ANSWER_S)
    except (DataError, SettingsError, zmq.ZMQError):  # no endpoint file or keys (any more), no sockets left
        return None
    return read_status(reply) if isinstance(reply, dict) and "error" not in reply else None


def samples(
    where: str,
    *,
    alive: Callable[[], bool] | None = None,
    wait: Callable[[float], object] = time.sleep,
    every_s: float = EVERY_S,
    patience_s: float = PATIENCE_S,
) -> Iterator[Sample]:
    """A sample every ``every_s`` until the server ends.

    ``alive``: whether its process runs, where that is known; else it has ended when it is silent for
    ``patience_s`` (one that is restarted in time, under its endpoint file, is the same to us).
    """
    began_at = heard_at = time.monotonic()
    while alive is None or alive():
        status, now = look(where), time.monotonic()
        if status is not None:
            heard_at = now
            yield sample_of(status, now - began_at)
        elif alive is None and now - heard_at > patience_s:
            return
        wait(every_s)


class History:
    """Samples over time, at most ``most``: when it is full, every other one goes and half as many come."""

    def __init__(self, most: int = MOST_SAMPLES) -> None:
        self.most = most
        self.kept: list[Sample] = []
        self.last: Sample | None = None
        self._every, self._n = 1, 0

    def add(self, sample: Sample) -> None:
        if self._n % self._every == 0:
            self.kept.append(sample)
        if len(self.kept) >= self.most:
            self.kept, self._every = self.kept[::2], 2 * self._every
        self._n += 1
        self.last = sample

    def samples(self) -> list[Sample]:
        """In order of time, the newest always among them."""
        kept, last = list(self.kept), self.last  # another thread may add
        return kept if last is None or (kept and kept[-1].at_s >= last.at_s) else [*kept, last]


class Watch:
    """``with Watch(where) as watch``: samples are taken beside whatever the block does, into ``history``."""

    def __init__(self, where: str, **how: Any) -> None:
        self.history = History()
        self._stopped, self._changed = threading.Event(), threading.Condition()
        how.setdefault("wait", self._stopped.wait)
        self._source = samples(where, **how)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def follow(self, for_s: float = float("inf")) -> Iterator[Sample]:
        """The newest sample, then each new one, until the server ends or ``for_s`` are over.

        Raises what ended the watching, if that was not the server's end.
        """
        deadline, seen = time.monotonic() + for_s, None
        while True:
            newest = self._newer_than(seen, deadline)
            if newest is None and self._error is not None:
                raise self._error
            if newest is None:
                return
            seen = newest
            yield newest

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for sample in self._source:
                with self._changed:
                    self.history.add(sample)
                    self._changed.notify_all()
                if self._stopped.is_set():
                    return
        except Exception as error:  # noqa: BLE001 - raised in follow, in the thread of whoever looks on
            self._error = error

    def _newer_than(self, seen: Sample | None, deadline: float) -> Sample | None:
        """None when there will be none, or none in time; the first one is waited for in any case."""
        with self._changed:
            while self.history.last is seen:
                late = seen is not None and time.monotonic() >= deadline
                if late or not self._thread.is_alive():
                    return None
                self._changed.wait(0.1)
            return self.history.last

"""What a server reports about itself: counts, rates, workers; and watching a server over time.

The front end fills a `Meter` and answers `{"cmd": "status"}` with one JSON object. `read_status` makes it a record
again, `status_rows` a table for a terminal. `Watch` takes a sample each second until the server ends. A status request
does not keep an idle server running (`idle_timeout_s`).
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import zmq

from seal_nb.errors import DataError, SettingsError
from seal_nb.server.endpoint import ask, find_endpoint

WINDOW_S = 60.0
ANSWER_S = 2.0  # the front end answers at once, even while its workers train
MOST_SAMPLES = 600


class Meter:
    """Counts since the start, and what was answered in the last minute."""

    def __init__(self, now: float) -> None:
        self.started_at = now
        self.counts: Counter[str] = Counter()
        self._seconds: deque[tuple[int, int, int]] = deque(maxlen=int(WINDOW_S) + 1)  # second, jobs, tokens

    def count(self, what: str, n: int = 1) -> None:
        self.counts[what] += n

    def answered(self, now: float, *, tokens: int) -> None:
        self.count("answered")
        self.count("train_tokens", tokens)
        second, jobs_before, tokens_before = int(now), 0, 0
        if self._seconds and self._seconds[-1][0] == second:
            _, jobs_before, tokens_before = self._seconds.pop()
        self._seconds.append((second, jobs_before + 1, tokens_before + tokens))

    def failed(self, error: str) -> None:
        """`error`: its type only, because a message may contain private text."""
        self.count("failed")
        self.count(f"failed.{error[:60]}")

    def rates(self, now: float) -> dict[str, float]:
        """jobs_per_min and tokens_per_s over the last minute, or since the start if that is shorter."""
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
    silent_s: float  # since its last heartbeat
    no_step_s: float = 0.0  # since its last step; 0 without work
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


def read_status(reply: Mapping[str, Any]) -> ServerStatus:
    """The record of a status reply. Fields of a newer server are ignored."""
    workers = tuple(_known(WorkerStatus, worker) for worker in reply.get("workers", ()))
    return _known(ServerStatus, {**reply, "workers": workers})


def _known(kind: type, values: Mapping[str, Any]) -> Any:
    return kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values})


def look(where: str) -> ServerStatus | None:
    """The status of the server at `where` (endpoint file or address); None if there is no answer."""
    try:
        reply = ask(find_endpoint(where), {"cmd": "status"}, timeout_s=ANSWER_S)
    except (DataError, SettingsError, zmq.ZMQError):  # no endpoint file, no keys, no sockets left
        return None
    return read_status(reply) if isinstance(reply, dict) and "error" not in reply else None


def status_rows(status: ServerStatus) -> list[tuple[str, str]]:
    """The table that `seal-nb status` shows on a terminal."""
    counts: Counter[str] = Counter(status.counts)
    rows = [
        ("server", f"{status.server_id}, up {status.uptime_s:.0f} s" + ", draining" * status.draining),
        ("model", status.model_id or "(no worker is ready yet)"),
        ("queue", f"{status.n_queued} waiting, {status.n_running} running of {status.n_slots} at once"),
        ("throughput", f"{status.jobs_per_min:g} jobs/min, {status.tokens_per_s:g} trained tokens/s"),
        ("answered", f"{counts['answered']}, and {counts['from_journal']} again from journal"),
        ("failures", f"{counts['failed']} failed, {counts['requeued']} requeued, {counts['refused']} refused, "
                     f"{counts['cancelled']} cancelled"),
        ("memory", f"front end {_mib(status.rss_bytes)}, workers {_mib(_total(status, 'rss_bytes'))}"
                   + (f", on GPUs {_mib(_total(status, 'gpu_bytes'))}" if _total(status, "gpu_bytes") else "")),
    ]  # fmt: skip
    rows += [(f"worker {worker.worker_id}", _worker_line(worker)) for worker in status.workers]
    return [*rows, ("trouble", status.trouble)] if status.trouble else rows


def at_work(status: ServerStatus) -> str:
    """What is in training now, in one line; empty if nothing is."""
    from seal_nb.metrics import counted  # brings numpy, which front end and workers do not need

    jobs = [job for worker in status.workers for job in worker.stats.get("training", {}).values()]
    step, n_steps = (sum(job[name] for job in jobs) for name in ("step", "n_steps"))
    return f"{counted(len(jobs), 'adapters')} in training, step {step:,} of {n_steps:,}" if jobs else ""


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _total(status: ServerStatus, name: str) -> int:
    return sum(worker.stats.get(name, 0) for worker in status.workers)


def _worker_line(worker: WorkerStatus) -> str:
    stats = worker.stats
    gpu = f", GPU {_mib(stats['gpu_bytes'])} (at most {_mib(stats['gpu_peak_bytes'])})" if "gpu_bytes" in stats else ""
    return (
        f"ready on {worker.host} (process {worker.pid}): {worker.n_running}/{worker.capacity} requests, "
        f"{_mib(stats.get('rss_bytes', 0))}{gpu}, heard {worker.silent_s:.1f} s ago, "
        f"{worker.no_step_s:.0f} s into its current step"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The numbers of one status. `at_s`: seconds since the watch began."""

    at_s: float
    queued: int
    running: int
    slots_in_use: int  # adapters in training
    slots: int
    jobs_per_min: float
    tokens_per_s: float
    memory_bytes: int  # resident, front end and workers together
    gpu_bytes: int  # held by all workers on their GPUs
    answered: int
    failed: int
    requeued: int
    workers: int


def sample_of(status: ServerStatus, at_s: float) -> Sample:
    """Slots are those that workers report; for an inner loop without slots, requests count instead."""
    reported = [worker for worker in status.workers if worker.stats]
    return Sample(
        at_s=at_s,
        queued=status.n_queued,
        running=status.n_running,
        slots_in_use=sum(worker.stats.get("slots_in_use", worker.n_running) for worker in reported),
        slots=sum(worker.stats.get("slots", worker.capacity) for worker in reported),
        jobs_per_min=status.jobs_per_min,
        tokens_per_s=status.tokens_per_s,
        memory_bytes=status.rss_bytes + _total(status, "rss_bytes"),
        gpu_bytes=_total(status, "gpu_bytes"),
        answered=status.counts.get("answered", 0),
        failed=status.counts.get("failed", 0),
        requeued=status.counts.get("requeued", 0),
        workers=len(status.workers),
    )


class History:
    """At most `most` samples. When it is full, every second one is removed and half as many are added from then on."""

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
        """In order of time, with the newest one."""
        kept, last = list(self.kept), self.last  # another thread may add
        return kept if last is None or (kept and kept[-1].at_s >= last.at_s) else [*kept, last]


class Watch:
    """`with Watch(where) as watch`: a thread takes samples into `watch.history` until the server or the block ends.

    Args:
        where: Endpoint file or address of the server.
        alive: Whether the server's process runs, if that is known. Without it, the server has ended after
            `patience_s` of silence.
        every_s: Seconds between samples.
        patience_s: Seconds of silence; a server that restarts within this time counts as the same one.
    """

    def __init__(
        self, where: str, *, alive: Callable[[], bool] | None = None, every_s: float = 1.0, patience_s: float = 15.0
    ) -> None:
        self.where, self.alive, self.every_s, self.patience_s = where, alive, every_s, patience_s
        self.history = History()
        self._stopped, self._changed = threading.Event(), threading.Condition()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def follow(self, for_s: float = float("inf")) -> Iterator[Sample]:
        """The newest sample, then each new one, until the server ends or `for_s` seconds are over.

        Raises:
            Exception: what ended the watch, if that was not the end of the server.
        """
        deadline, seen = time.monotonic() + for_s, None
        while (newest := self._newer_than(seen, deadline)) is not None:
            seen = newest
            yield newest
        if self._error is not None:
            raise self._error

    def start(self) -> Self:
        """Begin to take samples, if that has not begun."""
        if self._thread.ident is None:
            self._thread.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            began_at = heard_at = time.monotonic()
            while not self._stopped.is_set() and (self.alive is None or self.alive()):
                status, now = look(self.where), time.monotonic()
                if status is not None:
                    heard_at = now
                    with self._changed:
                        self.history.add(sample_of(status, now - began_at))
                        self._changed.notify_all()
                elif self.alive is None and now - heard_at > self.patience_s:
                    return
                self._stopped.wait(self.every_s)
        except Exception as error:  # noqa: BLE001 - raised in follow, in the caller's thread
            self._error = error

    def _newer_than(self, seen: Sample | None, deadline: float) -> Sample | None:
        """None if there will be none, or none before the deadline. The first sample is waited for in any case."""
        with self._changed:
            while self.history.last is seen:
                late = seen is not None and time.monotonic() >= deadline
                if late or not self._thread.is_alive():
                    return None
                self._changed.wait(0.1)
            return self.history.last

"""A server watched from outside: its status once a second, until it ends; of bounded size.

For the server notebook and whoever else looks on for long. Each look is one question on a socket of its own,
without a ping: a server that ends when nobody needs it (``idle_timeout_s``) is not kept up by being looked
at. Shows nothing (``views`` does), starts and ends no server.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import zmq

from seal_nb.errors import DataError, SettingsError
from seal_nb.service.endpoint import find_endpoint
from seal_nb.service.ping import ask
from seal_nb.service.status import ServerStatus, read_status

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

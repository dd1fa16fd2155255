"""A server from outside: start it (`TTTServer`), look at it (`look`, the table of `seal-nb status`), `Watch` it.

Looking does not keep an idle server running (`idle_timeout_s`)."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from typing import Any, Self

import zmq

from seal_nb.errors import SealError, SettingsError
from seal_nb.processes import DaemonThreads, LoggedProcess
from seal_nb.protocol import ServerStatus, WorkerStatus
from seal_nb.server.client import TTTClient
from seal_nb.server.endpoint import Endpoint, read_endpoint
from seal_nb.server.settings import ServeSettings, command

ANSWER_S = 2.0  # the front end answers at once, even while its workers train
MOST_SAMPLES = 600
MIB = 2**20
Sample = dict[str, float]


class ServerFailed(SealError, RuntimeError):
    """The server process ended, or was not ready in time. The message has the end of its log."""


class TTTServer:
    """A server for a block: `with TTTServer(model=…, run_dir=…) as server: TTTClient(server.endpoint)`.

    It is the server that a cluster runs, as a child process with its own log. It ends with the block, and also when
    this process is killed. `settings` are fields of ServeSettings (`seal-nb serve --help` lists them). It must be ready
    within `start_timeout_s`, as loading a model may take minutes. Raises SettingsError; ServerFailed at the start."""

    def __init__(self, *, start_timeout_s: float = 900.0, log_level: str = "INFO", **settings: Any) -> None:
        names = {field.name for field in fields(ServeSettings)}
        if unknown := set(settings) - names:
            raise SettingsError(f"TTTServer does not know {sorted(unknown)}; it takes {sorted(names)}")
        self.settings = ServeSettings(**{**settings, "parent_pid": os.getpid()})
        self.start_timeout_s, self.log_level = start_timeout_s, log_level
        self.endpoint = str(self.settings.endpoint_path)  # for TTTClient; it also leads to a server that was restarted
        self.log_path = self.settings.run_dir / "server.log"
        self.process: LoggedProcess | None = None

    @property
    def info(self) -> Endpoint:
        return read_endpoint(self.endpoint)

    def is_up(self) -> bool:
        """Whether the server process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> Self:
        """Start the server if it does not run. Raises ServerFailed."""
        if self.is_up():
            return self
        env = {**os.environ, "SEAL_NB_LOG_LEVEL": self.log_level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = LoggedProcess(command(self.settings), self.log_path, env=env)
        try:
            self._wait_until_ready(self.process)
        except BaseException:
            self.stop(timeout_s=0)
            raise
        return self

    def stop(self, timeout_s: float | None = None) -> int:
        """End the server with SIGTERM, or kill it after `timeout_s` seconds. Returns its exit code."""
        if self.process is None:
            return 0
        self.process.terminate()
        try:
            return self.process.wait(self.settings.drain_s + 30 if timeout_s is None else timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its workers notice and end
            return self.process.wait()

    __enter__ = start

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait_until_ready(self, process: LoggedProcess) -> None:
        """The endpoint file is this process's, the server answers, and a worker is ready if it starts any."""
        deadline, failure = time.monotonic() + self.start_timeout_s, ""
        while not failure:
            if self.settings.endpoint_path.exists() and self.info.pid == process.pid:
                status = look(self.endpoint)
                if status and (status.workers or not self.settings.n_workers):
                    return
            if process.poll() is not None:
                failure = f"ended at its start (exit code {process.returncode})"
            elif time.monotonic() > deadline:
                failure = f"was not ready within {self.start_timeout_s:g} s"
            time.sleep(0.05)
        errors = [f": {line.partition(' ERROR ')[2]}" for line in process.lines() if " ERROR " in line]
        raise ServerFailed(f"the server {failure}{''.join(errors[-1:])}; {process.ending()}")


def look(where: str) -> ServerStatus | None:
    """The status of the server at `where` (endpoint file or address); None if there is no answer."""
    try:
        with TTTClient(where, wait_s=ANSWER_S) as client:
            return client.status(timeout_s=ANSWER_S)
    except (SealError, zmq.ZMQError):  # no endpoint file, no keys, no sockets left
        return None


def status_rows(status: ServerStatus) -> list[tuple[str, str]]:
    """The table that `seal-nb status` shows on a terminal."""
    counts, now = Counter(status.counts), sample_of(status, status.uptime_s)
    failures = [f"{counts[name]} {name}" for name in ("failed", "requeued", "refused", "cancelled")]
    workers = f"workers {(now['memory_bytes'] - status.rss_bytes) / MIB:.0f} MiB"
    workers += f", on GPUs {now['gpu_bytes'] / MIB:.0f} MiB" if now["gpu_bytes"] else ""
    rows = [
        ("server", f"{status.server_id}, up {status.uptime_s:.0f} s" + ", draining" * status.draining),
        ("model", status.model_id or "(no worker is ready yet)"),
        ("queue", f"{status.n_queued} waiting, {status.n_running} running of {status.n_slots} at once"),
        ("throughput", f"{status.jobs_per_min:g} jobs/min, {status.tokens_per_s:g} trained tokens/s"),
        ("answered", f"{counts['answered']}, and {counts['from_journal']} again from journal"),
        ("failures", ", ".join(failures)),
        ("memory", f"front end {status.rss_bytes / MIB:.0f} MiB, {workers}"),
        *((f"worker {worker.worker_id}", _worker_line(worker)) for worker in status.workers),
    ]
    return [*rows, ("trouble", status.trouble)] if status.trouble else rows


def _worker_line(worker: WorkerStatus) -> str:
    gpu_bytes, peak_bytes = (worker.number(name) for name in ("gpu_bytes", "gpu_peak_bytes"))
    gpu = f", GPU {gpu_bytes / MIB:.0f} MiB (at most {peak_bytes / MIB:.0f} MiB)" if peak_bytes else ""
    return (
        f"ready on {worker.host} (process {worker.pid}): {worker.n_running}/{worker.capacity} requests, "
        f"{worker.number('rss_bytes') / MIB:.0f} MiB{gpu}, heard {worker.silent_s:.1f} s ago, "
        f"{worker.no_step_s:.0f} s into its current step"
    )


def sample_of(status: ServerStatus, at_s: float) -> Sample:
    """The numbers of one status. Where an inner loop reports no slots (adapters in training), its requests count."""
    reported = [worker for worker in status.workers if worker.stats]
    counts = Counter(status.counts)
    return {
        "at_s": at_s,
        "queued": status.n_queued,
        "running": status.n_running,
        "slots_in_use": sum(worker.number("slots_in_use", worker.n_running) for worker in reported),
        "slots": sum(worker.number("slots", worker.capacity) for worker in reported),
        "jobs_per_min": status.jobs_per_min,
        "tokens_per_s": status.tokens_per_s,
        "memory_bytes": status.rss_bytes + sum(worker.number("rss_bytes") for worker in reported),
        "gpu_bytes": sum(worker.number("gpu_bytes") for worker in reported),
        **{name: counts[name] for name in ("answered", "failed", "requeued")},
        "workers": len(status.workers),
    }


@dataclass(eq=False)
class Watch:
    """`with Watch(where) as watch`: a thread takes samples until the server or the block ends."""

    where: str
    _: KW_ONLY
    alive: Callable[[], bool] | None = None  # whether its process runs; None: it ends with a silence of `patience_s`
    every_s: float = 1.0
    patience_s: float = 15.0  # a server that restarts within this time counts as the same one

    def __post_init__(self) -> None:
        self.last: Sample | None = None
        self._kept: list[Sample] = []
        self._every, self._n, self._asked_at = 1, 0, 0.0
        self._stopped = threading.Event()

    def samples(self) -> list[Sample]:
        """At most `MOST_SAMPLES` over the whole time, and the newest one."""
        return list(self._kept)  # the thread may add

    def follow(self, for_s: float = float("inf")) -> Iterator[Sample]:
        """Each sample that is asked for after the call, until the server ends or `for_s` seconds are over; the first is
        waited for while the server lives. Raises what ended the watch, if that was not the server's end."""
        called_at, seen = time.monotonic(), None
        while True:
            if self.last is not seen and self.last is not None and self._asked_at >= called_at:
                seen = self.last
                yield seen
            elif self._end.done():
                return self._end.result()
            elif seen is not None and time.monotonic() >= called_at + for_s:
                return
            else:
                wait([self._end], min(0.1, self.every_s))

    @cached_property
    def _end(self) -> Future[None]:
        return DaemonThreads(1).submit(self._run)

    def start(self) -> Self:
        """Begin to take samples, if that has not begun."""
        _ = self._end
        return self

    def add(self, sample: Sample) -> None:
        """Keep a sample. When the list is full, every second one goes, and half as many stay from then on."""
        self._kept = [*self._kept[: -(-self._n // self._every)], sample]  # the newest one stays until the next one
        if len(self._kept) > MOST_SAMPLES:
            self._kept, self._every = [*self._kept[:-1:2], sample], 2 * self._every
        self._n += 1
        self.last = sample

    __enter__ = start

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        wait([self._end])

    def _run(self) -> None:
        began_at = heard_at = time.monotonic()
        while not self._stopped.is_set() and (self.alive is None or self.alive()):
            asked_at, status, now = time.monotonic(), look(self.where), time.monotonic()
            if status is not None:
                heard_at = now
                self.add(sample_of(status, now - began_at))
                self._asked_at = asked_at  # after `last`: until then it is that of an earlier sample
            elif self.alive is None and now - heard_at > self.patience_s:
                return
            self._stopped.wait(self.every_s)

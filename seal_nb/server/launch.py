"""A TTT server for as long as a ``with`` block lasts: ``seal-nb serve`` as a child process.

The child is the same server that a cluster runs, with its own log (``server.log`` in the run folder). It
ends with the block, and also when this process is killed outright.

The worker processes that a server starts on its own machine: started, watched, started again, ended.

Each is ``python -m seal_nb.server.worker`` in a process of its own with its own device. One that dies is
replaced, later and later the more often it happens; where the very first ones cannot even load, that is
told, since no waiting will help.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from seal_nb.errors import SealError, SettingsError
from seal_nb.server.endpoint import Endpoint, ask, read_endpoint
from seal_nb.server.settings import ServeSettings

LOG_TAIL_LINES = 15


class ServerFailed(SealError, RuntimeError):
    """The server process ended, or did not become ready in time; the message has the end of its log."""


class TTTServer:
    """``with TTTServer(model=…, n_workers=2, run_dir=…) as server: TTTClient(server.endpoint)``.

    Takes the fields of ServeSettings. Waits for a worker that is ready (a model may take long to load),
    unless ``wait_for_worker`` is false; requests may be sent before that, they wait.
    """

    def __init__(
        self, *, start_timeout_s: float = 900.0, wait_for_worker: bool = True, log_level: str = "INFO", **settings: Any
    ) -> None:
        _known({field.name for field in fields(ServeSettings)}, settings)
        self.settings = replace(ServeSettings(**settings), parent_pid=os.getpid())
        self.start_timeout_s, self.log_level = start_timeout_s, log_level
        self.wait_for_worker = wait_for_worker and self.settings.n_workers > 0
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # of this start, in a log that others may have begun

    @property
    def endpoint(self) -> str:
        """What TTTClient takes: the endpoint file, by which a client also finds a server that was
        restarted.
        """
        return str(self.settings.endpoint_path)

    @property
    def info(self) -> Endpoint:
        return read_endpoint(self.settings.endpoint_path)

    @property
    def log_path(self) -> Path:
        return self.settings.run_dir / "server.log"

    def is_up(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> Self:
        """Nothing if it runs already. Raises ServerFailed."""
        if self.is_up():
            return self
        self.settings.run_dir.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "SEAL_NB_LOG_LEVEL": self.log_level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                command(self.settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                start_new_session=True,  # a Ctrl-C in the notebook is not the server's
            )  # fmt: skip
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop(timeout_s=0)
            raise
        return self

    def stop(self, timeout_s: float | None = None) -> int:
        """End it in good order (SIGTERM), or by force after ``timeout_s``; its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(self.settings.drain_s + 30 if timeout_s is None else timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its workers see that and end
            return self.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while not self._ready():
            assert self.process is not None
            if not self.is_up():
                raise ServerFailed(f"the server ended at its start (exit code {self.process.returncode}){self._tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server was not ready within {self.start_timeout_s:g} s{self._tail()}")
            time.sleep(0.05)

    def _ready(self) -> bool:
        """The endpoint file is this process's, it answers, and (if wanted) a worker is there."""
        assert self.process is not None
        if not self.settings.endpoint_path.exists() or self.info.pid != self.process.pid:
            return False
        status = ask(self.info, {"cmd": "status"}, timeout_s=5.0)
        return status is not None and (bool(status["workers"]) or not self.wait_for_worker)

    def _tail(self) -> str:
        """The last error of this start's part of the log, then its end."""
        lines = self.log_path.read_bytes()[self._log_start :].decode(errors="replace").splitlines()
        errors = [line.partition(" ERROR ")[2] for line in lines if " ERROR " in line]
        why = f": {errors[-1]}" if errors else ""
        return f"{why}; the end of its log:\n" + "\n".join(lines[-LOG_TAIL_LINES:])


def command(settings: ServeSettings) -> list[str]:
    """The command line that serves ``settings``."""
    given = {name: value for name, value in asdict(settings).items() if name != "limits" and value is not None}
    given |= asdict(settings.limits)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return [sys.executable, "-m", "seal_nb.server.main", *options]


def _known(names: set[str], given: dict[str, Any]) -> None:
    unknown = set(given) - names
    if unknown:
        raise SettingsError(f"TTTServer does not know {sorted(unknown)}; it takes {sorted(names)}")


log = logging.getLogger(__name__)

STEADY_S = 60.0  # a worker that lived so long did not die of its start


@dataclass(kw_only=True)
class Place:
    """One worker of this machine: its process, and what happens when that ends."""

    index: int
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    n_early_deaths: int = 0


class Pool:
    """See the module. ``exited(pid, why)`` is called for each process that ended by itself."""

    def __init__(self, settings: ServeSettings, connect: str, exited: Callable[[int, str], None]) -> None:
        self.settings, self.connect, self.exited = settings, connect, exited
        self.places = [Place(index=index) for index in range(settings.n_workers)]
        self._gpus = visible_gpus()

    @property
    def pids(self) -> list[int]:
        return [place.process.pid for place in self.places if place.process is not None]

    def most_early_deaths(self) -> int:
        return max((place.n_early_deaths for place in self.places), default=0)

    def watch(self, now: float) -> None:
        """Notice who ended; start who is due."""
        for place in self.places:
            if place.process is not None and place.process.poll() is not None:
                self._ended(place, now)
            if place.process is None and now >= place.start_at:
                place.process = self._start(place.index)
                place.started_at = now

    def kill(self, pids: list[int]) -> None:
        """Those of them that are ours; they are replaced as any that died."""
        for place in self.places:
            if place.process is not None and place.process.pid in pids:
                log.warning("worker process %d is killed: it got nowhere", place.process.pid)
                place.process.kill()

    def end(self, told: set[int], timeout_s: float = 10.0) -> None:
        """Those in ``told`` know that they are to stop. Who is late, or still loading, is killed."""
        deadline = time.monotonic() + timeout_s
        for place in self.places:
            if place.process is None:
                continue
            if place.process.pid not in told:
                place.process.kill()
            try:
                place.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                place.process.kill()
                place.process.wait()
            place.process = None

    def _ended(self, place: Place, now: float) -> None:
        assert place.process is not None
        code = place.process.returncode
        early = now - place.started_at < STEADY_S
        place.n_early_deaths = place.n_early_deaths + 1 if early else 0
        place.start_at = now + min(30.0, 0.1 * 2**place.n_early_deaths)
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        log.warning("worker process %d ended (%s)", place.process.pid, why)
        self.exited(place.process.pid, why)
        place.process = None

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        threads = str(self.settings.n_threads)
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._gpus and self.settings.n_workers > 1 and self.settings.device in ("auto", "cuda"):
            env["CUDA_VISIBLE_DEVICES"] = self._gpus[index % len(self._gpus)]
        return subprocess.Popen(self._command(), env=env, stdin=subprocess.DEVNULL)

    def _command(self) -> list[str]:
        s = self.settings
        options = {
            "connect": self.connect, "model": s.model, "n-slots": s.n_slots, "n-threads": s.n_threads,
            "device": s.device, "dtype": s.dtype, "max-seq-length": s.max_seq_length, "grader": s.grader,
            "deterministic": s.deterministic,
            "adapters-dir": s.adapters_dir.resolve(), "inner-loop": s.inner_loop, "lease-s": s.lease_s,
            "beat-s": min(1.0, s.lease_s / 5), "parent-pid": os.getpid(),
        }  # fmt: skip
        if not self.connect:
            options |= {"endpoint-file": s.endpoint_path}
        return [sys.executable, "-m", "seal_nb.server.worker", *(f"--{k}={v}" for k, v in options.items())]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lets this process see, or all GPUs of the machine; asks no library."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    cards = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(cards.iterdir())] if cards.is_dir() else []

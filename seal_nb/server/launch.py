"""Processes: `TTTServer` runs a server for a `with` block, a `LocalWorker` is a worker that a server starts."""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from seal_nb.errors import SealError, SettingsError
from seal_nb.processes import started
from seal_nb.server.endpoint import Endpoint, read_endpoint
from seal_nb.server.settings import ServeSettings, SharedSettings, WorkerSettings, command
from seal_nb.server.status import look

log = logging.getLogger(__name__)

LOG_TAIL_LINES = 15
STEADY_S = 60.0  # a worker that lives so long has started well


class ServerFailed(SealError, RuntimeError):
    """The server process ended, or was not ready in time. The message has the end of its log."""


class TTTServer:
    """A server for a block: `with TTTServer(model=…, run_dir=…) as server: TTTClient(server.endpoint)`.

    It is the server that a cluster runs, as a child process with its own log. It ends with the block, and also when
    this process is killed. `settings` are fields of ServeSettings (`seal-nb serve --help` lists them). It must be ready
    within `start_timeout_s`, as loading a model may take minutes. Raises SettingsError; ServerFailed at the start.
    """

    def __init__(self, *, start_timeout_s: float = 900.0, log_level: str = "INFO", **settings: Any) -> None:
        names = {field.name for field in fields(ServeSettings)}
        if unknown := set(settings) - names:
            raise SettingsError(f"TTTServer does not know {sorted(unknown)}; it takes {sorted(names)}")
        self.settings = ServeSettings(**{**settings, "parent_pid": os.getpid()})
        self.start_timeout_s, self.log_level = start_timeout_s, log_level
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # where this start begins in the log

    @property
    def endpoint(self) -> str:
        """The endpoint file, for TTTClient: it also leads to a server that was restarted."""
        return str(self.settings.endpoint_path)

    @property
    def info(self) -> Endpoint:
        return read_endpoint(self.settings.endpoint_path)

    @property
    def log_path(self) -> Path:
        return self.settings.run_dir / "server.log"

    def is_up(self) -> bool:
        """Whether the server process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> Self:
        """Start the server if it does not run. Raises ServerFailed."""
        if self.is_up():
            return self
        env = {**os.environ, "SEAL_NB_LOG_LEVEL": self.log_level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.process = started(command(self.settings), self.log_path, env=env)
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

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]") -> None:
        """The endpoint file is this process's, the server answers, and a worker is ready if it starts any."""
        deadline = time.monotonic() + self.start_timeout_s
        while True:
            if self.settings.endpoint_path.exists() and self.info.pid == process.pid:
                status = look(self.endpoint)
                if status and (status.workers or not self.settings.n_workers):
                    return
            if process.poll() is not None:
                raise ServerFailed(f"the server ended at its start (exit code {process.returncode}){self._tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server was not ready within {self.start_timeout_s:g} s{self._tail()}")
            time.sleep(0.05)

    def _tail(self) -> str:
        """The last error of this start, then the end of its log."""
        lines = self.log_path.read_bytes()[self._log_start :].decode(errors="replace").splitlines()
        errors = [line.partition(" ERROR ")[2] for line in lines if " ERROR " in line]
        why = f": {errors[-1]}" if errors else ""
        return f"{why}; the end of its log:\n" + "\n".join(lines[-LOG_TAIL_LINES:])


class LocalWorker:
    """A worker that a server starts on its machine, and again after each end, which calls `exited(pid, why)`."""

    def __init__(self, settings: ServeSettings, index: int, exited: Callable[[int, str], None]) -> None:
        shared = {one.name: getattr(settings, one.name) for one in fields(SharedSettings)}
        shared |= {"parent_pid": os.getpid(), "endpoint_file": settings.endpoint_path}
        self.command, self.env = command(WorkerSettings(**shared)), dict(os.environ)
        if settings.n_workers > 1 and settings.device in ("auto", "cuda") and (gpus := visible_gpus()):
            self.env["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        self.exited, self.stall_s = exited, settings.stall_s
        self.process: subprocess.Popen[bytes] | None = None
        self.n_early_ends = 0
        self._started_at = self._start_at = 0.0
        self._ready_at = 0.0  # when it was last among the server's workers; 0: not yet

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def watch(self, now: float, *, is_ready: bool) -> None:
        """Start it if it is due. Kill it if it was ready and does not come back."""
        if self.process is None:
            if now >= self._start_at:
                self.process = subprocess.Popen(self.command, env=self.env, stdin=subprocess.DEVNULL)
                self._started_at, self._ready_at = now, 0.0
        elif (code := self.process.poll()) is not None:
            self.n_early_ends = self.n_early_ends + 1 if now - self._started_at < STEADY_S else 0
            self._start_at = now + min(30.0, 0.1 * 2**self.n_early_ends)
            why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            log.warning("worker process %d ended (%s)", self.pid, why)
            self.exited(self.pid, why)
            self.process = None
        elif is_ready:
            self._ready_at = now
        elif self._ready_at and 0 < self.stall_s < now - self._ready_at:
            log.warning("worker process %d is killed: it made no progress", self.pid)
            self.process.kill()

    def end(self, deadline: float) -> None:
        """Wait for it until the deadline, then kill it."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.0, deadline - time.monotonic()))
            self.process.kill()
            self.process.wait()


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES, or all GPUs of the machine, without the help of a library."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    cards = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(cards.iterdir())] if cards.is_dir() else []

"""Processes: `TTTServer` runs a server for a `with` block, `LocalWorkers` are the workers that a server starts.

The server is the same that a cluster runs, as a child process with its own log (`server.log` in the run folder). It
ends with the block, and also when this process is killed.
"""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from seal_nb.errors import SealError, SettingsError
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

    Args:
        start_timeout_s: Seconds until the server must be ready; loading a model may take minutes.
        log_level: Of the server's log.
        **settings: Fields of `seal_nb.server.settings.ServeSettings`; `seal-nb serve --help` lists them.

    Raises:
        SettingsError: a setting is unknown or out of range.
        ServerFailed: the server does not start.
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
        self.settings.run_dir.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "SEAL_NB_LOG_LEVEL": self.log_level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with self.log_path.open("ab") as file:
            self._log_start = file.tell()
            self.process = subprocess.Popen(
                command(self.settings), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env,
                start_new_session=True,  # Ctrl-C in a notebook does not reach the server
            )  # fmt: skip
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


@dataclass(kw_only=True)
class WorkerProcess:
    """One of the server's own workers, and when it starts again."""

    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    start_at: float = 0.0
    seen_at: float = 0.0  # when it was among the server's workers; 0: not ready yet
    n_early_ends: int = 0


class LocalWorkers:
    """The workers that a server starts on its machine, again after each end. Calls `exited(pid, why)` at the end."""

    def __init__(self, settings: ServeSettings, exited: Callable[[int, str], None]) -> None:
        self.settings, self.exited = settings, exited
        shared = {one.name: getattr(settings, one.name) for one in fields(SharedSettings)}
        shared |= {"parent_pid": os.getpid(), "endpoint_file": settings.endpoint_path}
        self.command = command(WorkerSettings(**shared))
        self.workers = [WorkerProcess() for _ in range(settings.n_workers)]
        self._gpus = visible_gpus()

    @property
    def pids(self) -> set[int]:
        return {worker.process.pid for worker in self.workers if worker.process is not None}

    def watch(self, now: float, ready: Collection[int]) -> None:
        """Start workers that are due, kill those that were in `ready` (processes) and did not come back to it."""
        for index, worker in enumerate(self.workers):
            process = worker.process
            if process is not None and (code := process.poll()) is not None:
                worker.n_early_ends = worker.n_early_ends + 1 if now - worker.started_at < STEADY_S else 0
                worker.start_at = now + min(30.0, 0.1 * 2**worker.n_early_ends)
                why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                log.warning("worker process %d ended (%s)", process.pid, why)
                self.exited(process.pid, why)
                worker.process = None
            elif process is not None and process.pid in ready:
                worker.seen_at = now
            elif process is not None and worker.seen_at and 0 < self.settings.stall_s < now - worker.seen_at:
                log.warning("worker process %d is killed: it made no progress", process.pid)
                process.kill()
            if worker.process is None and now >= worker.start_at:
                worker.process, worker.started_at, worker.seen_at = self._start(index), now, 0.0

    def end(self, told: Collection[int], timeout_s: float = 10.0) -> None:
        """Wait for the workers in `told`, which know that they must stop. Kill the others, and those that are late."""
        deadline = time.monotonic() + timeout_s
        for worker in self.workers:
            if worker.process is None:
                continue
            if worker.process.pid not in told:
                worker.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.wait()
            worker.process = None

    def _start(self, index: int) -> "subprocess.Popen[bytes]":
        env = dict(os.environ)
        if self._gpus and self.settings.n_workers > 1 and self.settings.device in ("auto", "cuda"):
            env["CUDA_VISIBLE_DEVICES"] = self._gpus[index % len(self._gpus)]
        return subprocess.Popen(self.command, env=env, stdin=subprocess.DEVNULL)


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES, or all GPUs of the machine, without the help of a library."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    cards = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(cards.iterdir())] if cards.is_dir() else []

"""A TTT server for as long as a ``with`` block lasts: ``seal-nb serve`` as a child process.

The child is the same server that a cluster runs, with its own log (``server.log`` in the run folder). It
ends with the block, and also when this process is killed outright.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Self

from seal_nb.errors import SealError, SettingsError
from seal_nb.service.endpoint import Endpoint, read_endpoint
from seal_nb.service.ping import ask
from seal_nb.service.settings import ServeSettings

LOG_TAIL_LINES = 15


class ServerFailed(SealError, RuntimeError):
    """The server process ended, or did not become ready in time; the message has the end of its log."""


class TTTServer:
    """``with TTTServer(model=…, n_workers=2, run_dir=…) as server: TTTClient(server.endpoint)``.

    Takes the fields of ServeSettings. Waits for a worker that is ready (a model may take long to load),
    unless ``wait_for_worker`` is false; requests may be sent before that, they wait.
    """

    def __init__(
        self,
        *,
        start_timeout_s: float = 900.0,
        wait_for_worker: bool = True,
        log_level: str = "INFO",
        **settings: Any,
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
        env = {
            **os.environ,
            "SEAL_NB_LOG_LEVEL": self.log_level,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
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
                raise ServerFailed(
                    f"the server ended at its start (exit code {self.process.returncode}){self._tail()}"
                )
            if time.monotonic() > deadline:
                raise ServerFailed(
                    f"the server was not ready within {self.start_timeout_s:g} s{self._tail()}"
                )
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
    given = {
        name: value for name, value in asdict(settings).items() if name != "limits" and value is not None
    }
    given |= asdict(settings.limits)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return [sys.executable, "-m", "seal_nb.service.serve", *options]


def _known(names: set[str], given: dict[str, Any]) -> None:
    unknown = set(given) - names
    if unknown:
        raise SettingsError(f"TTTServer does not know {sorted(unknown)}; it takes {sorted(names)}")

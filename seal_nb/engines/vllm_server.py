"""A vLLM server of our own: started, watched, put to sleep, given another base, stopped.

The server is vLLM's, in a process and, if need be, an environment of its own; its log is ``vllm.log`` in the
run folder. It listens on loopback, asks for a key that only this process knows, and ends with this process.
When it is gone, every call says so with its exit code and the end of its log.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from seal_nb.engines.api import ApiClient
from seal_nb.engines.api_records import ApiSettings, Refused, Unavailable
from seal_nb.engines.vllm_options import VllmOptions
from seal_nb.errors import EngineError, SettingsError
from seal_nb.lifeline import end_tree
from seal_nb.models import model_identity, resolve_model

LOG_TAIL_LINES = 15
HEALTH_TIMEOUT_S = 5.0
STOP_GRACE_S = 20.0
POLL_S = 0.2


class VllmFailed(EngineError):
    """The server ended, or was not ready in time; the message has its exit code and the end of its log."""


class VllmServer:
    """``with VllmServer(VllmOptions(model=…), run_dir=…) as server``; see ``engines.vllm`` for the engine."""

    def __init__(self, options: VllmOptions, *, run_dir: Path) -> None:
        self.options, self.run_dir = options, run_dir
        self.key = secrets.token_hex(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.n_bases = 0  # starts and changes of the base: each time, what was loaded before is gone
        self._folder = self._identity = ""

    @property
    def url(self) -> str:
        return f"http://{self.options.host}:{self.port}/v1"

    @property
    def log_path(self) -> Path:
        return self.run_dir / "vllm.log"

    @property
    def model_id(self) -> str:
        """Names the weights that are served, or were at last, and how they are computed with."""
        return f"vllm-{self.options.dtype}-{self._identity}"

    def start(self) -> Self:
        """Nothing if it runs already. Raises: VllmFailed."""
        if self.process is not None and self.process.poll() is None:
            return self
        self.stop(grace_s=0.0)  # what a server that died may have left behind
        self._serves(resolve_model(self.options.model))
        # The same after a restart, for clients that know it.
        self.port = self.port or self.options.port or _free_port(self.options.host)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.options.command(folder=self._folder, port=self.port),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self.options.environment(key=self.key, around=os.environ),
                start_new_session=True,  # a Ctrl-C in the notebook is not the server's
            )  # fmt: skip
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop(grace_s=0.0)
            raise
        self.n_bases += 1
        return self

    def stop(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """End it and all its processes, by force after ``grace_s``."""
        if self.process is None:
            return
        end_tree(self.process.pid, grace_s=grace_s)
        with contextlib.suppress(ProcessLookupError):  # an engine that outlived a killed server
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raises: VllmFailed where the server is not running."""
        if self.process is None:
            raise VllmFailed("the vLLM server is not running; start it")
        if (code := self.process.poll()) is not None:
            raise VllmFailed(f"the vLLM server ended ({_ending(code)}); {self._tail()}")

    def client(self, *, max_parallel: int = 64, timeout_s: float = 600.0, max_attempts: int = 3) -> ApiClient:
        """A client of it that notices at once when it is gone."""
        settings = ApiSettings(
            base_url=self.url, max_parallel=max_parallel, timeout_s=timeout_s, max_attempts=max_attempts
        )
        return ApiClient(settings, key=self.key, check=self.check)

    def serve(self, model: str) -> None:
        """Serve other weights from now on: in place where hot_reload allows, the shape is the same and the
        server can, else by a restart. Adapters that were loaded are gone."""
        folder = resolve_model(model)
        fits = self.options.hot_reload and _shape(folder) == _shape(self._folder)
        self.options = replace(self.options, model=model)
        if not (fits and self._reloaded(folder)):
            self.stop()
            self.start()

    def _reloaded(self, folder: str) -> bool:
        """Whether the running server took these weights in the place of its own."""
        control = self.client(timeout_s=self.options.start_timeout_s).control
        try:
            control("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
            control("/reset_prefix_cache", {})  # what it knows of prompts is of the old weights
        except EngineError:
            return False
        self._serves(folder)
        self.n_bases += 1
        return True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The device is somebody else's for a block: asleep where sleep_mode is on, else stopped."""
        if not self.options.sleep_mode:
            self.stop()
            yield
            self.start()
            return
        control = self.client(timeout_s=self.options.start_timeout_s).control
        control("/sleep?level=1", {})
        try:
            yield
        finally:
            control("/wake_up", {})

    def _serves(self, folder: str) -> None:
        self._folder, self._identity = folder, model_identity(folder)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.options.start_timeout_s
        client = self.client(timeout_s=HEALTH_TIMEOUT_S)
        while True:
            self.check()
            with contextlib.suppress(Refused, Unavailable):
                client.control("/health")
                return
            if time.monotonic() > deadline:
                raise VllmFailed(
                    f"the vLLM server was not ready within start_timeout_s={self.options.start_timeout_s:g}; "
                    f"{self._tail()}"
                )
            time.sleep(POLL_S)

    def _tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"the end of {self.log_path.name}:\n" + "\n".join(lines)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f"exit code {code}: {signal.Signals(-code).name}{hint}"


def _shape(folder: str) -> Mapping[str, Any]:
    """A model's configuration without its name: what must be equal for weights to fit in place."""
    try:
        config = dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # a hub name
        return {"folder": folder}
    return {
        name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")
    }


def _free_port(host: str) -> int:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise SettingsError(f"host={host!r}: cannot be listened on here ({error})") from error

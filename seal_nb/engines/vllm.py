"""The vLLM engine: texts of a base and of many adapters at once, from a server of our own or an existing one.

    with VllmServer(VllmOptions(model="Qwen/Qwen2.5-7B"), run_dir=folder) as server:
        engine = VllmEngine.of(server)

Greedy texts in float32 equal those of the grouped decoding of this package, token for token (tests/vllm).
Sampled ones come from vLLM's own random numbers: same seed, same text, but another text than the local
engine's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from seal_nb.engines.api import ApiClient
from seal_nb.engines.api_records import ApiSettings, Ask, Refused
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
from seal_nb.engines.openai import completed
from seal_nb.engines.vllm_adapters import AdapterShelf
from seal_nb.engines.vllm_options import SERVED_NAME
from seal_nb.engines.vllm_server import VllmServer
from seal_nb.errors import EngineError, SettingsError
from seal_nb.runs import content_id

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
        cls,
        settings: ApiSettings,
        *,
        model: str = "",
        max_adapters: int = EXISTING_SERVER_ADAPTERS,
        mixed: bool = True,
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
        turn_of: dict[Path | None, int] = {
            folder: at // self.shelf.max_loaded for at, folder in enumerate(distinct)
        }
        turn_of[None] = 0 if self.mixed or not distinct else -1
        turns: dict[int, list[int]] = {}
        for index, folder in enumerate(folders):
            turns.setdefault(turn_of[folder], []).append(index)
        return [turns[at] for at in sorted(turns)]

    def _take(
        self,
        asked: Sequence["_Asked"],
        sampling: Sampling,
        came: dict[int, Completion],
        on_text: OnText | None,
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

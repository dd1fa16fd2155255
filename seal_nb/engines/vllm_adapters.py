"""Adapters on a vLLM server at run time: loaded under names that are never used twice, unloaded for room.

A name that comes back would meet the prefix cache of the adapter that had it before (vllm issue 42125).
PEFT's format, ours or anybody's. The server reads the folder itself: it must be able to.
"""

import json
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

from seal_nb.engines.api import ApiClient
from seal_nb.engines.api_records import Refused
from seal_nb.errors import EngineError, SettingsError

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
        raise SettingsError(
            f"adapter {folder.name!r} has rank {rank}; start vLLM with max_lora_rank of it or more"
        )
    return str(folder.resolve()), written_ns

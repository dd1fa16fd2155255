"""Adapters kept by name, in PEFT's format."""

from collections.abc import Callable
from pathlib import Path

from seal_nb.errors import SettingsError
from seal_nb.peft_files import save_adapter
from seal_nb.ttt.lora import Adapter

BYTES_IN_MEMORY = 4 * 2**30


class KeptAdapters:
    """Adapters in `folder`, each kept under its name; those used last stay in memory. Other workers write to the same
    folder, so an adapter's identity is its name and the time it was written. load: reads a folder"""

    def __init__(self, folder: Path, load: Callable[[Path], Adapter], base_model: str):
        self.folder, self.load, self.base_model = folder, load, base_model
        self._loaded: dict[str, Adapter] = {}  # by identity, those used last at the end

    def get(self, name: str) -> tuple[str, Adapter]:
        """Identity and adapter. Raises SettingsError if there is none of this name, or it does not fit the model."""
        identity = self._identity(name)
        return identity, self._remember(identity, self._loaded.get(identity) or self.load(self.folder / name))

    def keep(self, name: str, adapter: Adapter) -> Path:
        """Write it; returns its folder. Raises OSError if the disk is full."""
        save_adapter(adapter, self.folder / name, base_model=self.base_model)
        self._remember(self._identity(name), adapter)
        return self.folder / name

    def _remember(self, identity: str, adapter: Adapter) -> Adapter:
        self._loaded.pop(identity, None)
        self._loaded[identity] = adapter
        while len(self._loaded) > 1 and sum(a.n_bytes for a in self._loaded.values()) > BYTES_IN_MEMORY:
            del self._loaded[next(iter(self._loaded))]
        return adapter

    def _identity(self, name: str) -> str:
        """Retraining under the same name creates a new identity."""
        weights = self.folder / name / "adapter_model.safetensors"
        if not weights.is_file():
            raise SettingsError(f"adapter_stack names {name!r}, which this server has not kept; train it first")
        return f"{name}@{weights.stat().st_mtime_ns}"

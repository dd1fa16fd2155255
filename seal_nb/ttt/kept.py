"""Adapters kept by name, as folders in PEFT's format; those used last stay in memory.

Other workers write to the same folder, so an adapter is known by its name and the time it was written.
"""

from collections import OrderedDict
from pathlib import Path

from seal_nb.errors import SettingsError
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import Adapter, save_adapter

BYTES_IN_MEMORY = 4 * 2**30


class KeptAdapters:
    """The adapters in `folder` that were trained on `base`."""

    def __init__(self, base: FrozenBase, folder: Path):
        self.base, self.folder = base, folder
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()  # by identity

    def get(self, name: str) -> tuple[str, Adapter]:
        """Identity and adapter. Raises SettingsError where none of this name is kept, or it does not fit."""
        folder = self.folder / name
        identity = _identity(folder)
        return identity, self._remember(
            identity, self._loaded.get(identity) or self.base.load_adapter(folder)
        )

    def keep(self, name: str, adapter: Adapter) -> Path:
        """Write it; its folder. Raises OSError where the disk is full."""
        folder = self.folder / name
        save_adapter(adapter, folder, base_model=self.base.name)
        self._remember(_identity(folder), adapter)
        return folder

    def _remember(self, identity: str, adapter: Adapter) -> Adapter:
        self._loaded[identity] = adapter
        self._loaded.move_to_end(identity)
        while len(self._loaded) > 1 and sum(a.n_bytes for a in self._loaded.values()) > BYTES_IN_MEMORY:
            self._loaded.popitem(last=False)
        return adapter


def _identity(folder: Path) -> str:
    """One that is made anew under its old name is another one."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise SettingsError(
            f"adapter_stack names {folder.name!r}, which this server has not kept; train it first"
        )
    return f"{folder.name}@{weights.stat().st_mtime_ns}"

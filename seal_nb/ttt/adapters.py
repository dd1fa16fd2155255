"""Adapters merged into the weights: a stack of LoRA adapters as an ordinary model folder.

A stack of frozen adapters beside the base gives the same outputs without any copy of the model; a folder is
for whoever wants one file to load anywhere. W + Σ scale · B A (LoRA, arXiv 2106.09685, section 4.1), added in
float32 and rounded once, to the dtype that the base is stored in.

Adapters kept by name, as folders in PEFT's format; those used last stay in memory.

Other workers write to the same folder, so an adapter is known by its name and the time it was written.
"""

import shutil
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seal_nb.errors import SettingsError
from seal_nb.models import resolve_model
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import Adapter, load_adapter, save_adapter


def merge_stack(model: str, adapters: Sequence[Path], out: Path) -> Path:
    """Write `model` with `adapters` (folders in PEFT's format, in the order of training) to `out`.

    Raises SettingsError for a folder that holds no adapter or one of another model; then `out` is not there.
    """
    folder = resolve_model(model)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = merged.get_output_embeddings()
    linears = {n: m for n, m in merged.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for path in adapters:
        adapter = load_adapter(
            path, linears, merged.config.model_type, compute_dtype=torch.float32, device=merged.device
        )
        for target in adapter.layout.targets:
            linears[target.name].weight.data += adapter.delta(target.name)
    write_model_folder(merged.to(stored_dtype(folder)), AutoTokenizer.from_pretrained(folder), out)
    return out


def stored_dtype(folder: str) -> torch.dtype:
    """The dtype of the weights on disk, of a folder or a hub name; float32 where its config does not say."""
    return AutoConfig.from_pretrained(folder).dtype or torch.float32


def write_model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Model and tokenizer as a folder that appears whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


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
        return identity, self._remember(identity, self._loaded.get(identity) or self.base.load_adapter(folder))

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
        raise SettingsError(f"adapter_stack names {folder.name!r}, which this server has not kept; train it first")
    return f"{folder.name}@{weights.stat().st_mtime_ns}"

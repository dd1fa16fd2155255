"""Model folders: written whole, or with adapters merged into the weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seal_nb.models import pretrained, resolve_model
from seal_nb.peft_files import load_adapter
from seal_nb.storage import whole_folder
from seal_nb.ttt.lora import linears_of


def merge_stack(model: str, adapters: Sequence[Path], out: Path) -> Path:
    """Write a model with adapters, folders in PEFT's format in the order of training, merged into its weights as an
    ordinary model folder. W + Σ scale · B A (LoRA, arXiv 2106.09685, section 4.1) is added in float32 and rounded once,
    to the dtype of the stored model. Raises SettingsError, and writes nothing, if an adapter does not fit, or `out` is
    neither new nor empty (`storage.new_place`)."""
    folder = resolve_model(model)
    with whole_folder(out, apart_from=[folder, *adapters]) as partial:
        merged = pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
        linears = linears_of(merged)
        for path in adapters:
            adapter = load_adapter(path, linears, compute_dtype=torch.float32, device=merged.device)
            for name in adapter.layout.by_name:
                linears[name].weight.data += adapter.delta(name)
        write_model(merged.to(stored_dtype(folder)), pretrained(AutoTokenizer, folder), partial)
    return out


def stored_dtype(folder: str) -> torch.dtype:
    """Dtype of the weights on disk, of a folder or a hub name; float32 if its configuration does not say."""
    return pretrained(AutoConfig, folder).dtype or torch.float32


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

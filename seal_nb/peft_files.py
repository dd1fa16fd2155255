"""Adapters in PEFT's format: written so that PEFT and vLLM load them, read as PEFT reads them, kept, and merged.

Format: https://huggingface.co/docs/peft, adapter_config.json and adapter_model.safetensors."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from seal_nb.errors import SettingsError
from seal_nb.models import pretrained, resolve_model
from seal_nb.protocol import PEFT_FIELDS
from seal_nb.storage import open_regular, read_json, whole_folder
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.device import wide
from seal_nb.ttt.lora import Adapter, Linears, LoraSettings, features, linears_of, make_layout, peft_weights

# A weight in PEFT's files, with the name of the adapter, as in `.lora_A.default.weight`, or without it.
PEFT_WEIGHT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
# Parts of module names that differ between a model, its text model alone, and the wrappers of torch.
WRAPPER = re.compile(r"(?<![^.])(base_model|model|language_model|transformer|module|_orig_mod|_fsdp_wrapped_module)\.")
# Fields of adapter_config.json: what a scale is made of, and what names the targets or is of use before a training.
SCALE_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
TARGET_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "eva_config",
                 "corda_config", "lora_ga_config", "loftq_config")  # fmt: skip
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")  # others, such as PiSSA, change the base, too
BYTES_IN_MEMORY = 4 * 2**30  # of kept adapters
Factors = dict[str, tuple[str, dict[str, Tensor]]]  # of Linear layers: the name in a file, the weights "A" and "B"


def save_adapter(adapter: Adapter, folder: Path, *, base_model: str) -> None:
    """Write an adapter in PEFT's format, as `whole_folder`. Raises: SettingsError if there is a folder which
    `save_adapter` did not write."""
    from peft import LoraConfig

    config = LoraConfig(
        r=adapter.settings.rank,
        lora_alpha=adapter.settings.alpha,  # PEFT divides by r; a float is kept
        lora_dropout=adapter.settings.dropout,
        target_modules=list(adapter.layout.by_name),
        fan_in_fan_out=any(t.transposed for t in adapter.layout.targets),
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    weights = peft_weights(adapter.layout, adapter.flat.cpu())
    with whole_folder(folder, replace_own=True) as partial:
        save_file(weights, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(partial))


def adapter_for(base: FrozenBase, folder: Path) -> Adapter:
    """An adapter in PEFT's format for this base. Raises SettingsError as `load_adapter`."""
    return load_adapter(folder, base.linears, compute_dtype=base.adapter_dtype, device=base.device)


def load_adapter(folder: Path, linears: Linears, *, compute_dtype: torch.dtype, device: torch.device) -> Adapter:
    """Read a plain LoRA adapter in PEFT's format. The weights in the file say which layers it adapts. Raises
    SettingsError if there is none, if it is one of another model, or if PEFT would do more than that with it."""
    from peft.utils.other import get_pattern_key

    config, factors = _read_peft(folder, linears)
    ranks, alphas, shapes = config["rank_pattern"], config["alpha_pattern"], {}
    for name, (path, pair) in factors.items():
        try:
            rank = operator.index(ranks.get(get_pattern_key(ranks, path), config["r"]))
            alpha = alphas.get(get_pattern_key(alphas, path), config["lora_alpha"])
            shapes[name] = rank, alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        except (TypeError, ValueError, ZeroDivisionError, AttributeError, re.error) as error:
            fields = ", ".join(f"{field} {config[field]!r}" for field in SCALE_FIELDS)
            raise SettingsError(f"adapter {folder}: adapter_config.json has {fields}; correct them: {error}") from error
        n_in, n_out = features(linears[name])
        for factor, wanted in {"A": (rank, n_in), "B": (n_out, rank)}.items():
            if (shape := tuple(pair[factor].shape) if factor in pair else "missing") != wanted:
                what = f"lora_{factor} of {path!r} is {shape}, but r {rank} and this model need {wanted}"
                raise SettingsError(f"adapter {folder}: {what}; use the model and the files of its training")
    rank, largest = (max(column, key=abs) for column in zip(*shapes.values(), strict=True))
    settings = LoraSettings(rank=rank, alpha=(largest or 1) * rank, target_modules=tuple(factors))
    layout = make_layout(linears, factors, rank)
    flat = torch.zeros(layout.size, dtype=wide(compute_dtype))
    for t in layout.targets:  # smaller ranks are filled up with zeros, another scale becomes part of B
        (rank, scale), (_, pair) = shapes[t.name], factors[t.name]
        layout.a(flat, t)[:rank] = pair["A"]
        layout.b(flat, t)[:, :rank] = pair["B"].to(flat.dtype) * (scale / settings.scaling)
    if not flat.isfinite().all():
        raise SettingsError(f"adapter {folder}: a weight or lora_alpha is not finite; train it again")
    return Adapter(layout, settings, flat.to(device), compute_dtype)


def _read_peft(folder: Path, linears: Linears) -> tuple[dict[str, Any], Factors]:
    """The fields of adapter_config.json, and the weights of each adapted Linear, in the model's order."""
    from peft import LoraConfig

    file, how, defaults = folder / "adapter_config.json", "check the name, or save it again", LoraConfig().to_dict()
    try:
        config = {"peft_type": ""} | read_json(file)
        file = folder / "adapter_model.safetensors"
        open_regular(file).close()
        weights = load_file(file)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        if (folder / "adapter_model.bin").is_file():
            how = "adapter_model.bin is a pickle, which may run code; if you trust it, read and save it with PEFT"
        raise SettingsError(f"no adapter at {folder}: {file.name} cannot be read ({error}); {how}") from error
    for field, value in config.items():
        unknown = field not in defaults or (field in PEFT_FIELDS and field not in (*SCALE_FIELDS, *TARGET_FIELDS))
        off = value in (None, False, [], defaults.get(field)) or (field == "init_lora_weights" and value in PLAIN_INITS)
        if unknown and not off:
            what = f"adapter_config.json has {field} {value!r}, but only plain LoRA is supported"
            remedy = f"train it without {field}, or merge it into its model with PEFT (merge_and_unload)"
            raise SettingsError(f"adapter {folder}: {what}; {remedy}")
    factors: Factors = {}
    for key, weight in weights.items():
        path, factor = found.groups() if (found := PEFT_WEIGHT.fullmatch(key)) else (key, "")
        owners = [path] if path in linears else [n for n in linears if WRAPPER.sub("", n) == WRAPPER.sub("", path)]
        if not found or len(owners) != 1 or factor in factors.setdefault(owners[0], (path, {}))[1]:
            fits = f"fits {' and '.join(owners) or 'no linear layer of this model'}"
            known = "only one lora_A and one lora_B of a linear layer are supported"
            raise SettingsError(f"adapter {folder}: its weight {key!r} {fits}; {known}")
        factors[owners[0]][1][factor] = weight
    if not factors:
        raise SettingsError(f"adapter {folder}: {file.name} has no weight; save it again")
    config = defaults | {field: value for field, value in config.items() if value is not None}
    return config, {name: factors[name] for name in linears if name in factors}


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
        write_model(merged, folder, partial)
    return out


def write_model(model: PreTrainedModel, base: str, folder: Path) -> None:
    """Write a model that was made from `base`, in its dtype (float32 if its configuration has none)."""
    model.to(pretrained(AutoConfig, base).dtype or torch.float32).save_pretrained(folder)
    pretrained(AutoTokenizer, base).save_pretrained(folder)

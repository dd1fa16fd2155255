"""LoRA adapters as flat vectors: layout, initial values, PEFT's file format.

An adapter is one contiguous vector (so that clipping, AdamW and copies are single operations) with a view A
(rank, in) and B (out, rank) for each target Linear (Hu et al., arXiv 2106.09685). Initial values and file
format are PEFT's (https://github.com/huggingface/peft): the same seed gives the weights that
`get_peft_model` gives, and what is saved here loads there and in vLLM. Does not run models; `branches` does
that."""

import contextlib
import json
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULT_TARGETS
from safetensors.torch import load_file, save_file
from torch import nn

from seal_nb.errors import SettingsError
from seal_nb.ttt.jobs import LoraSettings

ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Target:
    """A Linear that gets a low-rank branch: its module name, its sizes, and where its A and B lie in the
    flat vector."""

    name: str
    in_features: int
    out_features: int
    offset_a: int
    offset_b: int


@dataclass(frozen=True)
class Layout:
    """Where each target's A and B lie in an adapter's flat vector. Equal for adapters of the same shape."""

    rank: int
    targets: tuple[Target, ...]

    @cached_property
    def size(self) -> int:
        return sum(self.rank * (t.in_features + t.out_features) for t in self.targets)

    @cached_property
    def by_name(self) -> Mapping[str, Target]:
        return {t.name: t for t in self.targets}

    def a(self, flat: torch.Tensor, t: Target) -> torch.Tensor:
        """View (..., rank, in) of flat (..., size)."""
        return flat[..., t.offset_a : t.offset_b].unflatten(-1, (self.rank, t.in_features))

    def b(self, flat: torch.Tensor, t: Target) -> torch.Tensor:
        """View (..., out, rank) of flat (..., size)."""
        return flat[..., t.offset_b : t.offset_b + self.rank * t.out_features].unflatten(
            -1, (t.out_features, self.rank)
        )


def make_layout(linears: Mapping[str, nn.Linear], settings: LoraSettings, model_type: str) -> Layout:
    """Layout over `linears` (name → Linear, in the model's own order, without the head).

    Raises SettingsError where a target matches nothing or the architecture has no default.
    """
    chosen, offset = [], 0
    for name in _matching(list(linears), settings.target_modules, model_type):
        n_in, n_out = linears[name].in_features, linears[name].out_features
        offset_b = offset + settings.rank * n_in
        chosen.append(Target(name=name, in_features=n_in, out_features=n_out, offset_a=offset, offset_b=offset_b))
        offset = offset_b + settings.rank * n_out
    return Layout(settings.rank, tuple(chosen))


def _matching(names: Sequence[str], targets: Sequence[str], model_type: str) -> list[str]:
    if tuple(targets) == (ALL_LINEAR,):
        return list(names)
    wanted = list(targets) or list(PEFT_DEFAULT_TARGETS.get(model_type, ()))
    if not wanted:
        raise SettingsError(
            f"target_modules is empty and PEFT has no default for {model_type!r}; name them, or 'all-linear'"
        )
    matched = [n for n in names if any(n == w or n.endswith("." + w) for w in wanted)]
    missing = [w for w in wanted if not any(n == w or n.endswith("." + w) for n in names)]
    if missing:
        known = sorted({n.rsplit(".", 1)[-1] for n in names})
        raise SettingsError(
            f"target_modules has {missing[0]!r}, which is no Linear of this model; it has {', '.join(known)}"
        )
    return matched


def initial_weights(layout: Layout, seed: int) -> torch.Tensor:
    """Flat float32 vector as PEFT draws it after `torch.manual_seed(seed)`: A uniform (Kaiming), B zero.

    PEFT makes two nn.Linear for each target, which draw values that are then thrown away, before it draws
    A. The same stream is walked here."""
    flat = torch.zeros(layout.size)
    stream = torch.Generator().manual_seed(seed)
    discarded = torch.empty(layout.rank * max((max(t.in_features, t.out_features) for t in layout.targets), default=0))
    for t in layout.targets:
        for n in (layout.rank * t.in_features, layout.rank * t.out_features):
            discarded[:n].uniform_(generator=stream)
        nn.init.kaiming_uniform_(layout.a(flat, t), a=math.sqrt(5), generator=stream)
    return flat


class Adapter:
    """A LoRA adapter whose training is over. flat: (layout.size,), float32 as a rule; compute: the same in
    the base's dtype."""

    def __init__(self, layout: Layout, settings: LoraSettings, flat: torch.Tensor, compute_dtype: torch.dtype):
        self.layout, self.settings, self.flat = layout, settings, flat
        self.scaling = settings.scaling
        self.compute = flat.to(compute_dtype)

    @property
    def n_bytes(self) -> int:
        """Memory of the weights and of their copy in the base's dtype."""
        own = 0 if self.compute is self.flat else self.compute.nbytes
        return self.flat.nbytes + own

    def delta(self, name: str) -> torch.Tensor:
        """What the adapter adds to the weight of `name`: (out, in), the adapter's dtype."""
        t = self.layout.by_name[name]
        return self.scaling * self.layout.b(self.flat, t) @ self.layout.a(self.flat, t)


def save_adapter(adapter: Adapter, folder: Path, *, base_model: str) -> None:
    """Write PEFT's `adapter_model.safetensors` and `adapter_config.json`; the folder appears whole or not
    at all."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for t in adapter.layout.targets:
        tensors[f"{PEFT_PREFIX}{t.name}.lora_A.weight"] = adapter.layout.a(adapter.flat, t).detach().cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{t.name}.lora_B.weight"] = adapter.layout.b(adapter.flat, t).detach().cpu().contiguous()
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=adapter.settings.rank,
        lora_alpha=adapter.settings.alpha,  # PEFT divides by r; a float is kept
        lora_dropout=adapter.settings.dropout,
        target_modules=sorted({t.name.rsplit(".", 1)[-1] for t in adapter.layout.targets}),
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(partial))
    _swap(partial, folder)


def _swap(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`. Of several processes that do so at once, the last one stays."""
    for _ in range(10):
        try:
            partial.rename(folder)
        except OSError:  # one is there
            old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        else:
            return
    raise OSError(f"adapter {folder.name!r} could not be put in place: other processes keep writing it")


def load_adapter(
    folder: Path, linears: Mapping[str, nn.Linear], model_type: str, *, compute_dtype: torch.dtype, device: torch.device
) -> Adapter:
    """Read an adapter in PEFT's format, ours or anybody's (plain LoRA on Linear layers).

    Raises SettingsError where the folder holds none or it does not fit the model.
    """
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise SettingsError(f"no adapter at {folder}: adapter_config.json is missing; check the name")
    config = json.loads(config_file.read_text())
    targets = config["target_modules"]
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    settings = LoraSettings(rank=config["r"], alpha=config["lora_alpha"], target_modules=targets)
    layout = make_layout(linears, settings, model_type)
    tensors = load_file(folder / "adapter_model.safetensors")
    flat = torch.zeros(layout.size)
    for t in layout.targets:
        layout.a(flat, t).copy_(_tensor(tensors, f"{PEFT_PREFIX}{t.name}.lora_A.weight", folder))
        layout.b(flat, t).copy_(_tensor(tensors, f"{PEFT_PREFIX}{t.name}.lora_B.weight", folder))
    return Adapter(layout, settings, flat.to(device), compute_dtype)


def _tensor(tensors: Mapping[str, torch.Tensor], key: str, folder: Path) -> torch.Tensor:
    if key not in tensors:
        raise SettingsError(f"adapter {folder} has no weight {key!r}; it was not made for this model")
    return tensors[key]

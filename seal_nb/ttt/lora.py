"""LoRA adapters: memory layout, initial values, PEFT files, adapters kept by name, merging into a model folder.

An adapter is one flat vector with a view A (rank, in) and B (out, rank) for each target Linear (Hu et al., arXiv
2106.09685). Initial values and files are PEFT's (https://github.com/huggingface/peft), so PEFT and vLLM load them.
"""

import contextlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seal_nb.errors import SettingsError
from seal_nb.models import resolve_model
from seal_nb.ttt.jobs import LoraSettings

BYTES_IN_MEMORY = 4 * 2**30  # of kept adapters
ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."


class Target(NamedTuple):
    """A Linear that gets a low-rank branch: module name, sizes, and offsets of its A and B in the flat vector."""

    name: str
    in_features: int
    out_features: int
    offset_a: int
    offset_b: int


@dataclass(frozen=True)
class Layout:
    """Memory layout of an adapter's flat vector. Adapters of the same shape have equal layouts."""

    rank: int
    targets: tuple[Target, ...]

    @cached_property
    def size(self) -> int:
        return sum(self.rank * (t.in_features + t.out_features) for t in self.targets)

    @cached_property
    def by_name(self) -> Mapping[str, Target]:
        return {t.name: t for t in self.targets}

    def a(self, flat: Tensor, t: Target) -> Tensor:
        """View (..., rank, in) of flat (..., size)."""
        return flat[..., t.offset_a : t.offset_b].unflatten(-1, (self.rank, t.in_features))

    def b(self, flat: Tensor, t: Target) -> Tensor:
        """View (..., out, rank) of flat (..., size)."""
        end = t.offset_b + self.rank * t.out_features
        return flat[..., t.offset_b : end].unflatten(-1, (t.out_features, self.rank))

    def b_transposed(self, flat: Tensor, t: Target) -> Tensor:
        """View (..., rank, out) of flat (..., size)."""
        return self.b(flat, t).transpose(-1, -2)


def make_layout(linears: Mapping[str, nn.Linear], settings: LoraSettings, model_type: str) -> Layout:
    """Layout over a model's Linear layers. Raises SettingsError if a target matches none, or PEFT has no default."""
    names = list(linears)
    if settings.target_modules != (ALL_LINEAR,):
        wanted = settings.target_modules or _peft_targets(model_type)
        if not wanted:
            raise SettingsError(f"target_modules: PEFT has no default for {model_type!r}; name them, or 'all-linear'")
        for target in wanted:
            if not any(f".{n}".endswith(f".{target}") for n in linears):
                known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears}))
                raise SettingsError(f"target_modules has {target!r}, which is no Linear of this model; it has {known}")
        names = [n for n in linears if f".{n}".endswith(tuple(f".{target}" for target in wanted))]
    chosen, offset = [], 0
    for name in names:
        n_in, n_out = linears[name].in_features, linears[name].out_features
        offset_b = offset + settings.rank * n_in
        chosen.append(Target(name, n_in, n_out, offset_a=offset, offset_b=offset_b))
        offset = offset_b + settings.rank * n_out
    return Layout(settings.rank, tuple(chosen))


def _peft_targets(model_type: str) -> tuple[str, ...]:
    # Here and below PEFT is imported when it is needed: with bitsandbytes its import takes a fifth of a worker's start.
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

    return tuple(DEFAULT_TARGETS.get(model_type, ()))


def initial_weights(layout: Layout, seed: int) -> Tensor:
    """Flat float32 vector as PEFT draws it after `torch.manual_seed(seed)`: A uniform (Kaiming), B zero. For each
    target PEFT first makes two nn.Linear, whose values it discards, and then draws A."""
    flat = torch.zeros(layout.size)
    stream = torch.Generator().manual_seed(seed)
    discarded = torch.empty(layout.rank * max((max(t.in_features, t.out_features) for t in layout.targets), default=0))
    for t in layout.targets:
        for n in (layout.rank * t.in_features, layout.rank * t.out_features):
            discarded[:n].uniform_(generator=stream)
        nn.init.kaiming_uniform_(layout.a(flat, t), a=math.sqrt(5), generator=stream)
    return flat


class Adapter:
    """A trained LoRA adapter. flat: (layout.size,) weights, float32 as a rule; compute: a copy in the base's dtype."""

    def __init__(self, layout: Layout, settings: LoraSettings, flat: Tensor, compute_dtype: torch.dtype):
        self.layout, self.settings, self.flat = layout, settings, flat
        self.compute = flat.to(compute_dtype)
        self.n_bytes = self.flat.nbytes + self.compute.nbytes

    def delta(self, name: str) -> Tensor:
        """Change of the weight of `name`, scale · B A: (out, in), the adapter's dtype."""
        t = self.layout.by_name[name]
        return self.settings.scaling * self.layout.b(self.flat, t) @ self.layout.a(self.flat, t)


def peft_weights(layout: Layout, flat: Tensor) -> dict[str, Tensor]:
    """Views of a flat vector by the names of PEFT's files."""
    names = {f"{PEFT_PREFIX}{t.name}.lora_A.weight": layout.a(flat, t) for t in layout.targets}
    return names | {f"{PEFT_PREFIX}{t.name}.lora_B.weight": layout.b(flat, t) for t in layout.targets}


def save_adapter(adapter: Adapter, folder: Path, *, base_model: str) -> None:
    """Write an adapter in PEFT's format, as `whole_folder`."""
    from peft import LoraConfig

    config = LoraConfig(
        r=adapter.settings.rank,
        lora_alpha=adapter.settings.alpha,  # PEFT divides by r; a float is kept
        lora_dropout=adapter.settings.dropout,
        target_modules=sorted({t.name.rsplit(".", 1)[-1] for t in adapter.layout.targets}),
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    weights = peft_weights(adapter.layout, adapter.flat.detach().cpu())
    tensors = {name: weight.contiguous() for name, weight in weights.items()}
    with whole_folder(folder) as partial:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(partial))


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to. At the end it replaces `folder`; if the block fails, `folder` stays as it was. If
    several processes write the same folder at once, the last one wins."""
    partial, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{kind}") for kind in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        for _ in range(10):
            with contextlib.suppress(OSError):  # one is there
                partial.rename(folder)
                return
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        raise OSError(f"{folder.name!r} could not be written: other processes keep writing it")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_adapter(
    folder: Path, linears: Mapping[str, nn.Linear], model_type: str, *, compute_dtype: torch.dtype, device: torch.device
) -> Adapter:
    """Read a plain LoRA adapter in PEFT's format. Raises SettingsError if there is none, or one of another model."""
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise SettingsError(f"no adapter at {folder}: adapter_config.json is missing; check the name")
    config = json.loads(config_file.read_text())
    targets = config["target_modules"]
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    settings = LoraSettings(rank=config["r"], alpha=config["lora_alpha"], target_modules=targets)
    layout = make_layout(linears, settings, model_type)
    tensors, flat = load_file(folder / "adapter_model.safetensors"), torch.zeros(layout.size)
    for name, weight in peft_weights(layout, flat).items():
        if name not in tensors:
            raise SettingsError(f"adapter {folder} has no weight {name!r}; it was not made for this model")
        weight.copy_(tensors[name])
    return Adapter(layout, settings, flat.to(device), compute_dtype)


class KeptAdapters:
    """Adapters in `folder`, each kept under its name; those used last stay in memory. Other workers write to the same
    folder, so an adapter's identity is its name and the time it was written. load: `FrozenBase.load_adapter`"""

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
    to the dtype of the stored model. Raises SettingsError, and writes nothing, if an adapter does not fit."""
    folder = resolve_model(model)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears, kind = linears_of(merged), merged.config.model_type
    for path in adapters:
        adapter = load_adapter(path, linears, kind, compute_dtype=torch.float32, device=merged.device)
        for name in adapter.layout.by_name:
            linears[name].weight.data += adapter.delta(name)
    write_model_folder(merged.to(stored_dtype(folder)), AutoTokenizer.from_pretrained(folder), out)
    return out


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The Linear layers of a model but its head, by name, in the model's order."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def stored_dtype(folder: str) -> torch.dtype:
    """Dtype of the weights on disk, of a folder or a hub name; float32 if its configuration does not say."""
    return AutoConfig.from_pretrained(folder).dtype or torch.float32


def write_model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write model and tokenizer, as `whole_folder`."""
    with whole_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

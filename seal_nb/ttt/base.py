"""The frozen base: a transformers decoder whose Linear layers take branches and whose attention takes rows.

Works for decoders whose logits are `head(hidden)` and whose layers all attend fully (Llama, Qwen2, Qwen3,
Mistral, …); this is checked numerically when the model is loaded, not assumed. Weights are never changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seal_nb.errors import SettingsError
from seal_nb.models import FOUR_BIT
from seal_nb.ttt.attention import ATTENTION, Attend, make_rows
from seal_nb.ttt.branches import Bank, BranchedLinear, Current, Plan, Segment, make_plan
from seal_nb.ttt.device import free_cached_memory, sent
from seal_nb.ttt.fused import make_regions
from seal_nb.ttt.jobs import LoraSettings
from seal_nb.ttt.lora import Adapter, Layout, load_adapter, make_layout
from seal_nb.ttt.quantized import keep_as_stored, quantized

PROBES = ((0, 8), (5, 21))  # first token and length of the rows that check a model when it is loaded


@dataclass(frozen=True, kw_only=True)
class RowTokens:
    """Tokens of one row on the host, and which adapters act on them (none: the base alone)."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    n_real: int

    @classmethod
    def plain(cls, token_ids: Sequence[int], start: int = 0) -> "RowTokens":
        ids = torch.tensor(token_ids)
        return cls(token_ids=ids, positions=torch.arange(start, start + len(ids)), n_real=len(ids))


class HoldsMemory(Protocol):
    """Something that keeps memory for later, and can do without."""

    def drop_idle(self) -> None: ...


class FrozenBase:
    """A model folder loaded once, run in passes over many rows, each with its own adapters."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = ""):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.device, self.dtype = model.device, model.dtype
        _refuse_unsupported(model)
        probes = [torch.arange(i, i + n, device=self.device) % model.config.vocab_size for i, n in PROBES]
        with torch.no_grad():
            expected = [model(input_ids=probe[None], use_cache=False).logits[0] for probe in probes]
        self.current = Current()
        self.trainers: WeakSet[HoldsMemory] = WeakSet()
        self.linears = _branch_out(model, self.current)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events and streams are made on the current device
            make_regions(model)
        model.config._attn_implementation = ATTENTION
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self._check(probes, torch.cat(expected))

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> "FrozenBase":
        """Load a model folder or hub name. No code of the model's repository is ever run.

        device "auto": CUDA where there is one; dtype "auto": bfloat16 where the device multiplies it natively
        (CUDA, CPUs with AMX or AVX512-BF16), else float32; "4bit": that, with Linear weights in NF4.

        Raises SettingsError where "4bit" is asked for without bitsandbytes.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        in_four_bits, dtype = dtype == FOUR_BIT, "auto" if dtype == FOUR_BIT else dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") or cpu_multiplies_bfloat16() else "float32"
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        how = quantized(getattr(torch, dtype), device) if in_four_bits else {}
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), attn_implementation="sdpa", **how
        )
        if in_four_bits:
            keep_as_stored(model)
        return cls(model if in_four_bits else model.to(device), tokenizer, name=str(folder))

    @property
    def model_type(self) -> str:
        return self.model.config.model_type

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the generation config's, else the tokenizer's."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return frozenset(eos if isinstance(eos, list) else [eos] if eos is not None else [])

    def layout(self, settings: LoraSettings) -> Layout:
        return make_layout(self.linears, settings, self.model_type)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """float32; float64 on a float64 base."""
        return torch.promote_types(torch.float32, self.dtype)

    def new_bank(self, layout: Layout, n: int) -> Bank:
        """Room for n adapters of one layout in training."""
        return Bank(layout, n, device=self.device, dtype=self.adapter_dtype, compute_dtype=self.dtype)

    def make_room(self) -> None:
        """After running out of memory: let trainers of this base drop what they hold and do not need now."""
        for trainer in list(self.trainers):
            trainer.drop_idle()
        free_cached_memory(self.device)

    def bank_row_bytes(self, layout: Layout) -> int:
        """Memory of one adapter in training: weights, gradient, two moments, and the passes' copy."""
        own = 4 * self.adapter_dtype.itemsize
        return layout.size * (own + self.dtype.itemsize * (self.dtype != self.adapter_dtype))

    def load_adapter(self, folder: Path) -> Adapter:
        return load_adapter(folder, self.linears, self.model_type, compute_dtype=self.dtype, device=self.device)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
        return ids

    def hidden(
        self, rows: Sequence[RowTokens], segments: Sequence[Segment], *, attend: Attend | None = None
    ) -> torch.Tensor:
        """Last hidden states (T, d) of all rows' tokens, end to end. Segments say which adapters act on
        which tokens.

        `attend` replaces attention within rows (decoding attends to a cache)."""
        ids = sent(torch.cat([r.token_ids for r in rows]), self.device)
        positions = sent(torch.cat([r.positions for r in rows]), self.device)
        if attend is None:
            attend = make_rows([len(r.token_ids) for r in rows], self.device, n_real=[r.n_real for r in rows]).attend
        return self.run(ids, positions, make_plan(segments), attend)

    def run(self, ids: torch.Tensor, positions: torch.Tensor, plan: Plan, attend: Attend) -> torch.Tensor:
        """As `hidden`, from token ids and positions (T,) that are on the device already."""
        self.current.plan = plan
        try:
            return self.decoder(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, attend=attend
            ).last_hidden_state[0]
        finally:
            self.current.plan = Plan()

    def _check(self, probes: Sequence[torch.Tensor], expected: torch.Tensor) -> None:
        """Compare the logits of two packed rows with those that the model gave to each alone."""
        name = self.name or self.model_type
        try:
            with torch.no_grad():
                found = self.head(self.hidden([RowTokens.plain(probe.tolist()) for probe in probes], ()))
        except RuntimeError as reason:
            raise SettingsError(f"model {name!r} cannot run packed rows: {reason}") from reason
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        if not error < (1e-3 if self.dtype in (torch.float32, torch.float64) else 0.2):
            raise SettingsError(
                f"model {name!r}: packed logits differ from its own by {error:.2g} of their size; this"
                " architecture does something between rows, or between hidden states and logits, that slots"
                " do not know"
            )


def cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _refuse_unsupported(model: PreTrainedModel) -> None:
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise SettingsError(
            f"model type {config.model_type!r} has {sorted(kinds)} layers; only full attention is supported"
        )
    if model.get_output_embeddings() is None:
        raise SettingsError(
            f"model type {config.model_type!r} has no language-model head; give a causal language model"
        )


def _branch_out(model: PreTrainedModel, current: Current) -> dict[str, nn.Linear]:
    """Put a BranchedLinear in place of each Linear but the head; return the Linears by name, in the model's
    order."""
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, BranchedLinear(linear, name, current))
    return linears

"""The frozen base: a transformers decoder that runs packed rows, with the adapters of each row.

Works for decoders whose attention comes from transformers' attention interface and whose other layers treat each token
by itself. This is checked numerically when a model is loaded; docs/models.md lists families. The weights never change.
"""

import contextlib
import functools
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seal_nb.errors import SettingsError
from seal_nb.models import FOUR_BIT, context_of, pretrained, tokenize
from seal_nb.ttt.attention import ATTEND, ATTENTION, HALF, Attend, Cache, Rows
from seal_nb.ttt.branches import PLAN, BranchedLinear, Plan
from seal_nb.ttt.device import default_dtype, free_cached_memory, is_out_of_memory, region, sent
from seal_nb.ttt.lora import Adapter, Layout, LoraSettings, linears_of, make_layout, target_names

ATTENTION_KINDS = {"full_attention", "sliding_attention"}
# All names in the code of a forward that is `down_proj(act_fn(gate_proj(x)) * up_proj(x))`.
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ROTARY = "apply_rotary_pos_emb"
# Rows that check a model (first token, length), and its windows meanwhile, which these rows exceed.
CHECK_ROWS, CHECK_WINDOW = ((0, 8), (5, 21)), 6


class FrozenBase:
    """A model, loaded once and run in passes over many rows, each row with its own adapters. The model's Linear layers
    and its attention are replaced. Of a multimodal model, the text part is used. Raises SettingsError, which names the
    cause, if its architecture is not supported."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = ""):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.config = config = model.config.get_text_config(decoder=True)
        self.device, self.dtype, self.model_type = model.device, model.dtype, config.model_type
        # Weights of adapters in passes. Float16 has too few exponents for them and for their gradients.
        self.adapter_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        self.gradient_scale = 2.0**10 if self.dtype == torch.float16 else 1.0
        kinds, window = set(getattr(config, "layer_types", None) or []), getattr(config, "sliding_window", None)
        self.window: int | None = window if not kinds or "sliding_attention" in kinds else None
        if unknown := sorted(kinds - ATTENTION_KINDS):
            raise unsupported(self, f"it has layers of type {unknown[0]!r}")
        if model.get_output_embeddings() is None:
            raise unsupported(self, "it has no language-model head; give a causal model")
        # What follows the head: logits are scaled, then tanh keeps them between -softcap and softcap.
        scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        self.logit_scale = float(scale or 1) / float(divisor or 1)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.linears = linears_of(model)
        self.trainers: WeakSet[Any] = WeakSet()  # SlotTrainers, which hold memory that they can free
        with checked(self):
            for linear_name, linear in self.linears.items():
                model.set_submodule(linear_name, BranchedLinear(linear, linear_name))
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # events and streams are made on the current device
                _make_regions(model)
            self.decoder.config._attn_implementation = ATTENTION
        self.target_names = functools.lru_cache(functools.partial(target_names, model, self.linears))

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> "FrozenBase":
        """Load a model (folder or hub name); no code of its repository is ever run. The dtype "auto" is that of
        `device.default_dtype`; "4bit" is "auto" with the weights of Linear layers in NF4 (QLoRA, arXiv 2305.14314).
        Raises SettingsError if that lacks bitsandbytes, or the model cannot be read."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        stored = getattr(pretrained(AutoConfig, folder), "quantization_config", None) or {}
        if stored and not stored.get("load_in_4bit"):
            how = f"is quantised ({stored.get('quant_method', 'in a way that it does not name')})"
            raise SettingsError(f"model {str(folder)!r} {how}; give the unquantised model, with dtype=4bit")
        kind = default_dtype(torch.device(device)) if dtype in ("auto", FOUR_BIT) else getattr(torch, dtype)
        four_bit = _four_bit_options(kind, device) if dtype == FOUR_BIT or stored else {}
        tokenizer = pretrained(AutoTokenizer, folder)
        model = pretrained(AutoModelForCausalLM, folder, dtype=kind, **four_bit)
        for module in model.modules():
            # bitsandbytes 0.50 (nn.modules.Linear4bit.forward) repacks a weight at its first product on CPUs with
            # AVX512-BF16, and `dense_weight` could not read it.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return cls(model if four_bit else model.to(device), tokenizer, name=str(folder))

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the generation config's, else the tokenizer's."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return frozenset(eos if isinstance(eos, list) else [eos] if eos is not None else [])

    def layout(self, settings: LoraSettings) -> Layout:
        """Layout of an adapter with these targets. Raises SettingsError as `lora.target_names`."""
        return make_layout(self.linears, self.target_names(settings.target_modules), settings.rank)

    def make_room(self) -> None:
        """Free what is cached on the device, by trainers of this base and by torch."""
        for trainer in list(self.trainers):
            trainer.drop_idle()
        free_cached_memory(self.device)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return tokenize(self.tokenizer, text, special_tokens=special_tokens)[0]

    def room_after(self, ids: Sequence[int], what: str, *, n_new: int = 0) -> int:
        """Number of tokens that fit into the context after these. Raises SettingsError if the model cannot run them, or
        if fewer than `n_new` fit: on a GPU, an id or a position without an embedding would end the process."""
        n_rows, context = len(self.model.get_input_embeddings().weight), context_of(self.model.config)
        if not ids:
            raise SettingsError(f"{what} has no token; give a text")
        if max(ids) >= n_rows:
            problem = f"{what} has {len(ids)} tokens, one with the id {max(ids)}, and the model has {n_rows} embeddings"
            raise SettingsError(f"{problem}; use the tokenizer that belongs to the model")
        if len(ids) + n_new > context:
            problem = f"{what} has {len(ids)} tokens and the model's context {context}"
            raise SettingsError(f"{problem}; shorten it (train sequences: lower max_seq_length, or pad_to of padding)")
        return context - len(ids)

    def hidden(
        self, rows: Sequence[Sequence[int]], adapters: Sequence[Sequence[Adapter]] = (), *, attend: Attend | None = None
    ) -> Tensor:
        """Last hidden states (T, d) of rows of token ids, end to end. attend: replaces attention within rows"""
        lengths = [len(row) for row in rows]
        ids = sent(torch.tensor([token for row in rows for token in row]), self.device)
        positions = sent(torch.cat([torch.arange(n) for n in lengths]), self.device)
        attend = attend or Rows(lengths, self.device).attend
        return self.run(ids, positions, Plan(list(zip(lengths, adapters, strict=False))), attend)

    def run(self, ids: Tensor, positions: Tensor, plan: Plan, attend: Attend) -> Tensor:
        """As `hidden`, from token ids and positions (T,) on the device."""
        plan_before, attend_before = PLAN.set(plan), ATTEND.set(attend)
        try:
            return self.decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
        finally:
            PLAN.reset(plan_before)
            ATTEND.reset(attend_before)

    def shape_logits(self, logits: Tensor) -> Tensor:
        """What the model does to the logits (…, vocabulary) of its head."""
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _four_bit_options(compute_dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Options of `pretrained` for NF4 weights. Products run in the compute dtype."""
    if find_spec("bitsandbytes") is None:
        raise SettingsError("dtype is '4bit', which needs bitsandbytes: pip install -e '.[4bit]', or take bfloat16")
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute_dtype}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": device}}


def _make_regions(model: nn.Module) -> None:
    """Turn the model's norms, gated activations and rotary embedding into regions (see `device.region`). They are
    compiled from the model's own code, so each family keeps its arithmetic. Values between two operations of a region
    stay in float32, where separate kernels round."""
    for module in model.modules():
        kind: Any = type(module)
        names = getattr(getattr(kind.forward, "__code__", None), "co_names", ())
        if kind.__name__.endswith("RMSNorm"):
            module.forward = functools.partial(region(kind.forward), module)
        elif set(names) == GATED:
            module.forward = functools.partial(_gated_mlp, module)
        code = sys.modules[kind.__module__]
        rotary = getattr(code, ROTARY, None)
        if rotary is not None and not hasattr(rotary, "is_region"):
            setattr(code, ROTARY, region(rotary))


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_gate(module.act_fn, module.gate_proj(x), module.up_proj(x)))


@region
def _gate(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def unsupported(base: Any, cause: str | Exception) -> SettingsError:
    """The error for a model. cause: in words, or what its code raised; raised itself if it is no fault of the model"""
    if isinstance(cause, Exception):
        if isinstance(cause, SettingsError | torch.AcceleratorError) or is_out_of_memory(cause):
            raise cause
        cause = f"its code does not run here: {cause}"
    name = f"model {base.name!r} of type {base.model_type!r}" if base.name else f"model type {base.model_type!r}"
    return SettingsError(f"{name} is not supported: {cause}")


@contextlib.contextmanager
def checked(base: Any) -> Iterator[None]:
    """For a block that changes the model of `base`, a FrozenBase that is being made. Two packed rows, one of them with
    an adapter, must give what the unchanged model, with eager attention, gave to each alone: whole, and with their last
    tokens in a step of decoding. Raises SettingsError."""
    rows = [[i % base.config.vocab_size for i in range(first, first + n)] for first, n in CHECK_ROWS]
    lengths, calls, cache = [n - 1 for _, n in CHECK_ROWS], Counter[str](), Cache(base.device, base.dtype)

    def count(name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        whole = inputs[0].numel() == len(rows[0]) * inputs[0].shape[-1]
        calls[name] += 1 if whole else 2

    def adapted(name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        t, flat = layout.by_name[name], adapter.compute
        return output + (inputs[0].to(flat.dtype) @ layout.a(flat, t).t() @ layout.b(flat, t).t()).to(output.dtype)

    try:
        base.decoder.config._attn_implementation = "eager"  # transformers' sdpa leaves out Gemma-2's soft cap
        with torch.no_grad(), _small(base):
            first, second = (torch.tensor([row], device=base.device) for row in rows)
            with _hooks(base.linears, count):
                alone = base.decoder(input_ids=first, use_cache=False).last_hidden_state[0]
            logits = base.model(input_ids=first, use_cache=False).logits[0]
            # Adapters need all tokens, once. Experts get some of them, and some routers are called twice.
            odd = {_kind(name) for name, n in calls.items() if n > 1}
            base.linears = {name: m for name, m in base.linears.items() if _kind(name) not in odd}
            layout = make_layout(base.linears, base.linears, rank=4)
            flat = torch.empty(layout.size).normal_(std=0.1, generator=torch.Generator().manual_seed(0))
            adapter = Adapter(layout, LoraSettings(rank=4, alpha=4), flat.to(base.device), base.adapter_dtype)
            with _hooks(base.linears, adapted):
                expected = torch.cat([alone, base.decoder(input_ids=second, use_cache=False).last_hidden_state[0]])
            error = _distance(base.shape_logits(base.head(alone)), logits)
        if not error < (2e-3 if base.dtype in HALF else 1e-4):
            raise unsupported(base, "something unknown happens between its hidden states and its logits")
        yield
        with torch.no_grad(), _small(base):
            stacks: list[tuple[Adapter, ...]] = [(), (adapter,)]
            whole = base.hidden(rows, stacks)
            cache.arrange([None, None], lengths)
            begun = base.hidden([row[:-1] for row in rows], stacks, attend=cache.prefill(lengths, [0, 1]))
            cache.arrange([0, 1], lengths)
            cache.advance()
            last = torch.tensor([row[-1] for row in rows], device=base.device)
            last = base.run(last, cache.positions, Plan([(1, stack) for stack in stacks]), cache.attend)
    except Exception as reason:  # whatever it is, the model does not work here
        raise unsupported(base, reason) from reason
    if not cache.keys:
        raise unsupported(base, "its attention does not come from transformers' attention interface")
    parts = zip(begun.split(lengths), last[:, None], strict=True)
    for found in (whole, torch.cat([part for row in parts for part in row])):
        error = _distance(found, expected)
        if not error < (0.05 if base.dtype in HALF else 1e-3):
            what = f"hidden states of packed rows differ by {error:.2g} of their size from those of single rows"
            narrow = f", or {base.dtype} is too narrow for it" if base.dtype in HALF else ""
            raise unsupported(base, f"{what}, so it does something between tokens that is not known here{narrow}")


def _kind(name: str) -> str:
    """The same for a module in every layer, and for every expert."""
    return re.sub(r"\d+", "", name)


def _hooks(linears: Mapping[str, nn.Module], hook: Callable[..., Tensor | None]) -> contextlib.ExitStack:
    """For a block, `hook` gets name, module, inputs and output of each Linear; what it returns replaces the output."""
    hooks = contextlib.ExitStack()
    for name, m in linears.items():
        hooks.enter_context(m.register_forward_hook(functools.partial(hook, name)))
    return hooks


def _distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|"""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@contextlib.contextmanager
def _small(base: Any) -> Iterator[None]:
    """The model with sliding windows of CHECK_WINDOW tokens and only its first layers, as many as show each kind of
    layer: short rows exceed these windows, and in half precision the rounding of many layers would hide an error."""
    holders: list[Any] = [base.decoder.config, *base.decoder.modules()]
    wide = [(holder, holder.sliding_window) for holder in holders if getattr(holder, "sliding_window", None)]
    n, types = base.config.num_hidden_layers, getattr(base.config, "layer_types", None) or itertools.repeat("")
    lists = [(name, m) for name, m in base.decoder.named_children() if isinstance(m, nn.ModuleList) and len(m) == n]
    try:
        for name, layers in lists:
            kinds = [(kind, re.sub(r"\(.*?\)", "", str(layer))) for layer, kind in zip(layers, types, strict=False)]
            setattr(base.decoder, name, layers[: max(2, *(kinds.index(kind) + 1 for kind in kinds))])
        for holder, _ in wide:
            holder.sliding_window = CHECK_WINDOW
        yield
    finally:
        for holder, window in wide:
            holder.sliding_window = window
        for name, layers in lists:
            setattr(base.decoder, name, layers)

"""What is checked when a model is loaded: packed rows with an adapter give what each row alone gives, also in decoding.

The reference is the model's own forward with its eager attention, before anything of it is replaced.
"""

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seal_nb.errors import SettingsError
from seal_nb.ttt.attention import HALF, Cache
from seal_nb.ttt.branches import Plan
from seal_nb.ttt.device import is_out_of_memory
from seal_nb.ttt.jobs import LoraSettings
from seal_nb.ttt.lora import Adapter, make_layout

# Rows that check a model (first token, length), and its windows meanwhile, which these rows exceed.
CHECK_ROWS, CHECK_WINDOW = ((0, 8), (5, 21)), 6


def unsupported(base: Any, cause: str | Exception) -> SettingsError:
    """The error for a model. cause: in words, or what its code raised; raised itself if it is no fault of the model"""
    if isinstance(cause, torch.AcceleratorError) or (isinstance(cause, Exception) and is_out_of_memory(cause)):
        raise cause
    if isinstance(cause, Exception):
        cause = f"its code does not run here: {cause}"
    name = f"model {base.name!r} of type {base.model_type!r}" if base.name else f"model type {base.model_type!r}"
    return SettingsError(f"{name} is not supported: {cause}")


class Check:
    """Compares two packed rows, one of them with an adapter, with what the unchanged model gave to each alone. Made
    before the model is changed. base: the FrozenBase that is being made. Raises SettingsError as FrozenBase."""

    def __init__(self, base: Any):
        self.base, model = base, base.model
        rows = [[i % base.config.vocab_size for i in range(first, first + n)] for first, n in CHECK_ROWS]
        self.rows, calls = rows, Counter[str]()

        def count(name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            whole = inputs[0].numel() == len(rows[0]) * inputs[0].shape[-1]
            calls[name] += 1 if whole else 2

        base.decoder.config._attn_implementation = "eager"  # transformers' sdpa leaves out Gemma-2's soft cap
        with torch.no_grad(), _small(base):
            ids = [torch.tensor([row], device=base.device) for row in rows]
            with _hooks(base.linears, count):
                alone = base.decoder(input_ids=ids[0], use_cache=False).last_hidden_state
            logits = model(input_ids=ids[0], use_cache=False).logits
            # Adapters need all tokens, once. Experts get some of them, and some routers are called twice.
            odd = {_kind(name) for name, n in calls.items() if n > 1}
            base.linears = {name: m for name, m in base.linears.items() if _kind(name) not in odd}
            layout = make_layout(base.linears, base.linears, rank=4)
            flat = torch.empty(layout.size).normal_(std=0.1, generator=torch.Generator().manual_seed(0))
            self.adapter = Adapter(layout, LoraSettings(rank=4, alpha=4), flat.to(base.device), base.adapter_dtype)
            with _hooks(base.linears, self._adapted):
                adapted = base.decoder(input_ids=ids[1], use_cache=False).last_hidden_state
            error = _distance(base.shape_logits(base.head(alone)), logits)
        if not error < (2e-3 if base.dtype in HALF else 1e-4):
            raise unsupported(base, "something unknown happens between its hidden states and its logits")
        self.expected = torch.cat([alone[0], adapted[0]])

    def _adapted(self, name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The output of a Linear with the adapter."""
        layout, flat = self.adapter.layout, self.adapter.compute
        t = layout.by_name[name]
        return output + (inputs[0].to(flat.dtype) @ layout.a(flat, t).t() @ layout.b(flat, t).t()).to(output.dtype)

    def run(self) -> None:
        """To be called when the model is changed. The rows are passed whole, then all but their last tokens, and these
        in a step of decoding."""
        base, lengths = self.base, [len(row) - 1 for row in self.rows]
        stacks: list[tuple[Adapter, ...]] = [(), (self.adapter,)]
        cache = Cache(base.device, base.dtype)
        try:
            with torch.no_grad(), _small(base):
                whole = base.hidden(self.rows, stacks)
                cache.arrange([None, None], lengths)
                begun = base.hidden([row[:-1] for row in self.rows], stacks, attend=cache.prefill(lengths, [0, 1]))
                cache.arrange([0, 1], lengths)
                cache.advance()
                last = torch.tensor([row[-1] for row in self.rows], device=base.device)
                last = base.run(last, cache.positions, Plan([(1, stack) for stack in stacks]), cache.attend)
        except Exception as reason:  # whatever it is, the model does not work here
            raise unsupported(base, reason) from reason
        if not cache.keys:
            raise unsupported(base, "its attention does not come from transformers' attention interface")
        parts = zip(begun.split(lengths), last[:, None], strict=True)
        for found in (whole, torch.cat([part for row in parts for part in row])):
            error = _distance(found, self.expected)
            if not error < (0.05 if base.dtype in HALF else 1e-3):
                what = f"hidden states of packed rows differ by {error:.2g} of their size from those of single rows"
                narrow = f", or {base.dtype} is too narrow for it" if base.dtype in HALF else ""
                raise unsupported(base, f"{what}, so it does something between tokens that is not known here{narrow}")


def _kind(name: str) -> str:
    """The same for a module in every layer, and for every expert."""
    return re.sub(r"\d+", "", name)


@contextlib.contextmanager
def _hooks(linears: Mapping[str, nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Call `hook` with name, module, inputs and output of each Linear; what it returns replaces the output."""
    handles = [m.register_forward_hook(functools.partial(hook, name)) for name, m in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

"""Low-rank branches on the Linear layers of the frozen base: y = x Wᵀ + scale (x Aᵀ) Bᵀ (LoRA, arXiv 2106.09685).

The frozen product runs once over all tokens of a pass. Neighbouring adapters of one layout are a `Group`, whose members
multiply their own tokens, without padding: on CUDA in one kernel (`kernels.py`), elsewhere in a loop.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from seal_nb.ttt.device import tensor_on, wide
from seal_nb.ttt.jobs import LoraSettings
from seal_nb.ttt.lora import Adapter, Layout, Target

# Triton is a part of torch's CUDA packages on Linux; a CPU machine may lack it.
kernels: Any = importlib.import_module("seal_nb.ttt.kernels") if find_spec("triton") else None
Weights = Tensor | list[Tensor]  # (n, layout.size), or n vectors of layout.size


class Bank:
    """Memory of n adapters of one layout in training, (n, layout.size) each, and the rows that are taken."""

    def __init__(self, layout: Layout, n: int, *, device: torch.device, compute_dtype: torch.dtype):
        self.layout, self.n, dtype = layout, n, wide(compute_dtype)
        # Not filled: a row is set when a job enters, and a CPU allocates memory when it is written to.
        self.weights, self.gradient, self.mean, self.square = (
            torch.empty(n, layout.size, device=device, dtype=dtype) for _ in range(4)
        )
        same = dtype == compute_dtype
        # The copy of the weights for passes.
        self.compute = self.weights if same else torch.empty_like(self.weights, dtype=compute_dtype)
        self.rows: dict[int, BankRow] = {}

    @property
    def adds_to_gradient(self) -> list[bool]:
        """Of each row whether the next gradient is added to the old one, in an open accumulation window."""
        return [i in self.rows and self.rows[i].n_passed > 0 for i in range(self.n)]


def bank_row_bytes(layout: Layout, compute_dtype: torch.dtype) -> int:
    dtype = wide(compute_dtype)
    return layout.size * (4 * dtype.itemsize + compute_dtype.itemsize * (dtype != compute_dtype))


class BankRow(Adapter):
    """One adapter in training: the first free row of a bank."""

    def __init__(self, bank: Bank, settings: LoraSettings, initial: Tensor, *, dropout_seed: int):
        self.index = index = next(i for i in range(bank.n) if i not in bank.rows)
        self.bank, self.layout, self.settings = bank, bank.layout, settings
        self.flat, self.compute, self.gradient = bank.weights[index], bank.compute[index], bank.gradient[index]
        self.mean, self.square = bank.mean[index], bank.square[index]
        self.flat.copy_(initial, non_blocking=True)
        for left_over in (self.gradient, self.mean, self.square):
            left_over.zero_()
        self.steps = torch.zeros((), device=bank.weights.device)
        self.n_passed = 0  # passes of the open accumulation window; the gradient of the first replaces the old one
        self.draws = torch.Generator(bank.weights.device).manual_seed(dropout_seed)
        self.refresh()
        bank.rows[index] = self  # last: where something above fails, the row stays free

    def refresh(self) -> None:
        """Update the passes' copy after the weights have changed."""
        if self.bank.compute is not self.bank.weights:
            self.compute.copy_(self.flat)

    def adapter(self) -> Adapter:
        return Adapter(self.layout, self.settings, self.flat.clone(), self.compute.dtype)


Part = tuple[int, Sequence[Adapter]]  # a number of tokens and the adapters that act on them


class Group:
    """Adapters of one layout (members) on neighbouring parts, and their tokens, end to end from `start`.
    All rows of a bank are members, in their order; those that are not in this pass have no tokens."""

    def __init__(self, run: Sequence[tuple[int, int, Any]]):
        """run: first token, number of tokens and adapter of each part"""
        self.start, _, first = run[0]
        self.layout, with_kernels = first.layout, has_kernels(first.layout, first.compute)
        self.weights: Weights  # compute dtype; one matrix if kernels are used
        bank = first.bank if isinstance(first, BankRow) else None
        if bank is not None:
            lengths, self.weights = [0] * bank.n, bank.compute
            for _, n, row in run:
                lengths[row.index] = n
        else:  # neighbours with the same adapter are one member
            members = [list(same) for _, same in groupby(run, key=lambda part: id(part[2]))]
            lengths = [sum(n for _, n, _ in same) for same in members]
            weights = [same[0][2].compute for same in members]
            self.weights = torch.stack(weights) if with_kernels else weights
        device, dtype = first.compute.device, wide(first.compute.dtype)
        scales = [adapter.settings.scaling for _, n, adapter in run for _ in range(n)]
        self.scales = tensor_on(device, scales, dtype)[:, None]  # (tokens, 1)
        self.ends = tensor_on(device, list(accumulate(lengths)), torch.int32)  # (n,) of each member, from `start`
        self.tiles = tensor_on(device, kernels.tiles_of(lengths), torch.int32) if with_kernels else None
        adds = bank.adds_to_gradient if bank else []
        self.gradient = bank.gradient if bank else None
        # (n,), 1 where the new gradient is added to the old one; None if it replaces every old one.
        self.keep = tensor_on(device, adds, dtype) if any(adds) else None
        self.dropouts = [
            (slice(at - self.start, at - self.start + n), row) for at, n, row in run if bank and row.settings.dropout
        ]

    @cached_property
    def tokens(self) -> slice:
        return slice(self.start, self.start + len(self.scales))

    @cached_property
    def members(self) -> list[tuple[int, slice]]:
        """Members with tokens, and the tokens' places in the group. Waits for the device."""
        ends = [0, *self.ends.tolist()]
        return [(i, slice(a, b)) for i, (a, b) in enumerate(pairwise(ends)) if a < b]

    @cached_property
    def kept(self) -> list[bool]:
        return [False] * len(self.ends) if self.keep is None else self.keep.bool().tolist()

    def narrow(self, x: Tensor, view: "View", target: Target) -> Tensor:
        """scale · x Wᵀ of each member: x (tokens, wide), view(weights) (n, rank, wide) → (tokens, rank)."""
        if self.tiles is not None:
            return kernels.narrow(x, view(self.weights, target), self.scales, self.tiles)
        parts = [x[own] @ view(self.weights[i], target).t() for i, own in self.members]
        return torch.cat(parts).mul_(self.scales)

    def widen(self, h: Tensor, view: "View", target: Target, y: Tensor) -> None:
        """y (tokens, wide) += h W of each member, in place: h (tokens, rank), view(weights) (n, rank, wide)."""
        if self.tiles is not None:
            kernels.widen(h, view(self.weights, target), y, self.tiles)
            return
        for i, own in self.members:
            y[own].addmm_(h[own], view(self.weights[i], target))

    def outer(self, h: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Write hᵀ x of each member with tokens to its place in gradient (n, rank, wide), or add it (see `keep`)."""
        if self.tiles is not None:
            kernels.outer(h, x, gradient, self.ends, self.keep)
            return
        for i, own in self.members:
            new = h[own].t() @ x[own]
            if self.kept[i]:
                gradient[i].add_(new)
            else:
                gradient[i].copy_(new)


View = Callable[..., Tensor]  # Layout.a or Layout.b_transposed: (..., layout.size) → (..., rank, wide)


def has_kernels(layout: Layout, weights: Tensor) -> bool:
    """Whether the kernels take these weights."""
    if kernels is None or not weights.is_cuda or weights.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    return kernels.fits(layout.rank, weights.itemsize) and kernels.works(weights.dtype)


class Plan:
    """The groups of a pass over these parts, end to end. Rows of one bank must be in their order."""

    def __init__(self, parts: Sequence[Part]):
        stops = accumulate(n for n, _ in parts)
        spans = [(stop - n, n, adapters) for (n, adapters), stop in zip(parts, stops, strict=True)]
        self.groups: list[Group] = []
        for depth in range(max((len(adapters) for _, adapters in parts), default=0)):
            layer = [(start, n, adapters[depth] if depth < len(adapters) else None) for start, n, adapters in spans]
            self.groups += [Group(list(run)) for kind, run in groupby(layer, key=_kind) if kind is not None]
        self.names = {target.name for group in self.groups for target in group.layout.targets}
        self.trains = any(group.gradient is not None for group in self.groups)
        self.anchor = torch.zeros((), requires_grad=True)

    def active(self, name: str) -> Iterator[tuple[Group, Target]]:
        """Groups with an adapter on the Linear of this name."""
        return ((g, g.layout.by_name[name]) for g in self.groups if name in g.layout.by_name)


def _kind(part: tuple[int, int, Adapter | None]) -> object:
    """Neighbours of one kind are a group: adapters in training by their bank, others by their layout."""
    adapter = part[2]
    return adapter.bank if isinstance(adapter, BankRow) else adapter and adapter.layout


NO_PLAN = Plan(())
PLAN: ContextVar[Plan] = ContextVar("PLAN", default=NO_PLAN)  # of the pass that is running


class BranchedLinear(nn.Module):
    """A frozen Linear and the branches that the current plan adds to it: (1, T, in) → (1, T, out)."""

    def __init__(self, base: nn.Linear, name: str):
        super().__init__()
        self.base, self.name = base, name

    def forward(self, x: Tensor) -> Tensor:
        plan = PLAN.get()
        if self.name not in plan.names:
            return self.base(x)
        if plan.trains and torch.is_grad_enabled():
            return _Branches.apply(x, plan.anchor, self, plan)
        y = self.base(x)
        _add_branches(y[0], x[0].contiguous(), self.name, plan)
        return y


# For the backward pass of each group: scaled h (tokens, rank), and the dropout mask, if any.
Kept = list[tuple[Tensor, Tensor | None]]


def _add_branches(y: Tensor, x: Tensor, name: str, plan: Plan, *, training: bool = False) -> Kept:
    """y (T, out) += branches of x (T, in), in place."""
    kept: Kept = []
    for group, target in plan.active(name):
        own = x[group.tokens]
        mask = _dropout_mask(group, own) if training and group.dropouts else None
        if mask is not None:
            own = own * mask
        h = group.narrow(own, group.layout.a, target)
        group.widen(h, group.layout.b_transposed, target, y[group.tokens])
        kept.append((h, mask))
    return kept


def _dropout_mask(group: Group, x: Tensor) -> Tensor:
    """Ones, or 0 and 1 / (1 - p) for a member with dropout p, drawn from the member's own random stream."""
    mask = torch.ones_like(x)
    for tokens, row in group.dropouts:
        share = 1 - row.settings.dropout
        mask[tokens].bernoulli_(share, generator=row.draws).div_(share)
    return mask


class _Branches(torch.autograd.Function):
    """Linear and branches; the backward pass writes the gradients of A and B to the bank."""

    @staticmethod
    def forward(ctx, x, anchor, layer, plan):  # type: ignore[no-untyped-def]  # torch's signature
        x = x.contiguous()  # the kernels read rows
        y = layer.base(x)
        ctx.layer, ctx.plan = layer, plan
        ctx.kept = _add_branches(y[0], x[0], layer.name, plan, training=True)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        g = grad_y[0].contiguous()
        grad_x = g @ dense_weight(ctx.layer.base) if ctx.needs_input_grad[0] else None  # (T, in)
        for (group, target), (h, mask) in zip(ctx.plan.active(ctx.layer.name), ctx.kept, strict=True):
            layout, gg, xg = group.layout, g[group.tokens], x[0][group.tokens]
            grad_h = group.narrow(gg, layout.b_transposed, target)  # (tokens, rank)
            if group.gradient is not None:
                group.outer(grad_h, xg if mask is None else xg * mask, layout.a(group.gradient, target))
                group.outer(h, gg, layout.b_transposed(group.gradient, target))
            if grad_x is not None and mask is None:
                group.widen(grad_h, layout.a, target, grad_x[group.tokens])
            elif grad_x is not None:
                share = torch.zeros_like(xg)
                group.widen(grad_h, layout.a, target, share)
                grad_x[group.tokens] += share.mul_(mask)
        return (grad_x[None] if grad_x is not None else None), None, None, None


def dense_weight(linear: nn.Linear) -> Tensor:
    """(out, in) weight as the forward pass multiplies with it, also of a layer in 4 bits."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, state)

"""Each row its own low-rank branch: the Linear layers of the frozen base, extended.

`y = x Wᵀ + scale (x Aᵀ) Bᵀ` (LoRA, arXiv 2106.09685). The tokens of a pass lie end to end in one (T, d)
matrix, segment by segment, and each segment has its own adapters. The frozen product runs once over all
tokens. Adapters of one layout on neighbouring segments form a group, whose products are segmented: each
member multiplies its own tokens with its own weights, without padding. On CUDA one kernel does all members
(`kernels`); elsewhere a loop does. Gradients of A and B go straight into the slots' flat gradients, so
adapters are no autograd leaves. Knows nothing of rows, loss or optimiser.

Room for adapters in training: weights, gradients and AdamW's moments of n adapters of one shape, as (n,
size) matrices.

A slot is one row. All rows of a bank are one operand, which is what makes a step over many adapters cheap.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate, groupby, pairwise
from types import ModuleType

import torch
from torch import nn

from seal_nb.errors import SettingsError
from seal_nb.ttt.device import tensor_on
from seal_nb.ttt.jobs import LoraSettings
from seal_nb.ttt.lora import Adapter, Layout, Target
from seal_nb.ttt.quantized import dense_weight


class Bank:
    """n rows for adapters of one layout. weights and gradients are in `dtype`, the passes' copy in
    `compute_dtype`."""

    def __init__(self, layout: Layout, n: int, *, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype):
        self.layout, self.n = layout, n
        # Not filled: a row is set when a job enters, and a CPU gives memory to rows that were touched only.
        self.weights, self.gradient, self.mean, self.square = (
            torch.empty(n, layout.size, device=device, dtype=dtype) for _ in range(4)
        )
        same = dtype == compute_dtype
        self.compute = self.weights if same else torch.empty_like(self.weights, dtype=compute_dtype)
        self.rows: dict[int, BankRow] = {}

    @property
    def full(self) -> bool:
        return len(self.rows) == self.n

    @property
    def kept_gradients(self) -> list[bool]:
        """For each row whether its gradient is of an open accumulation window, to be added to."""
        return [i in self.rows and not self.rows[i].opens_window for i in range(self.n)]

    @property
    def all_void(self) -> bool:
        return not any(self.kept_gradients)

    def enter(self, settings: LoraSettings, initial: torch.Tensor, dropout_seed: int) -> "BankRow":
        """Take the first free row."""
        if self.full:
            raise SettingsError(f"the bank's {self.n} rows are all in use")
        index = next(i for i in range(self.n) if i not in self.rows)
        self.rows[index] = BankRow(self, index, settings, initial, dropout_seed)
        return self.rows[index]


class BankRow:
    """One adapter in training: row `index` of a bank."""

    def __init__(self, bank: Bank, index: int, settings: LoraSettings, initial: torch.Tensor, dropout_seed: int):
        self.bank, self.index, self.settings = bank, index, settings
        self.weights, self.gradient = bank.weights[index], bank.gradient[index]
        self.mean, self.square = bank.mean[index], bank.square[index]
        self.weights.copy_(initial, non_blocking=True)
        for left_over in (self.gradient, self.mean, self.square):
            left_over.zero_()
        self.steps = torch.zeros((), device=bank.weights.device)
        self.opens_window = True  # the next gradient replaces the old one
        self.draws = torch.Generator(bank.weights.device).manual_seed(dropout_seed)
        self.refresh()

    def refresh(self) -> None:
        """Bring the passes' copy up to date after the weights have changed."""
        if self.bank.compute is not self.bank.weights:
            self.bank.compute[self.index].copy_(self.weights)

    def adapter(self) -> Adapter:
        """A copy of the weights, of its own."""
        return Adapter(self.bank.layout, self.settings, self.weights.clone(), self.bank.compute.dtype)

    def leave(self) -> None:
        del self.bank.rows[self.index]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens start..stop of a pass, the frozen adapters that act on them, and the one in training, if any."""

    start: int
    stop: int
    adapters: tuple[Adapter, ...] = ()
    trained: BankRow | None = None


TRITON = find_spec("triton") is not None
Weights = torch.Tensor | list[torch.Tensor]  # (n, rank, wide), or n matrices (rank, wide)


@dataclass(kw_only=True)
class Group:
    """n adapters of one layout, and the tokens that each acts on: end to end from `start`.

    weights: (n, layout.size), compute dtype, or n vectors where there are no kernels
    scales: (tokens, 1), at least float32: the factor of each token
    ends: (n,) int32: where each member's tokens end, counted from `start`; tiles: the same for the kernels
    gradient: (n, layout.size) for members in training, else None; keep: None where every old gradient is
    void, else (n,), 1 where the new gradient is added to the old one"""

    layout: Layout
    weights: Weights
    scales: torch.Tensor
    start: int
    ends: torch.Tensor
    tiles: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    dropouts: tuple[tuple[slice, BankRow], ...] = ()

    @cached_property
    def tokens(self) -> slice:
        return slice(self.start, self.start + len(self.scales))

    @cached_property
    def members(self) -> list[tuple[int, slice]]:
        """Members with tokens, and where their tokens lie in the group; waits for the device."""
        ends = [0, *self.ends.tolist()]
        return [(i, slice(a, b)) for i, (a, b) in enumerate(pairwise(ends)) if a < b]

    @cached_property
    def kept(self) -> list[bool]:
        return [False] * len(self.ends) if self.keep is None else self.keep.bool().tolist()

    def a(self, target: Target) -> Weights:
        """Each member's A, (rank, in)."""
        if isinstance(self.weights, list):
            return [self.layout.a(w, target) for w in self.weights]
        return self.layout.a(self.weights, target)

    def b(self, target: Target) -> Weights:
        """Each member's B, transposed: (rank, out)."""
        if isinstance(self.weights, list):
            return [self.layout.b(w, target).t() for w in self.weights]
        return self.layout.b(self.weights, target).transpose(1, 2)

    def narrow(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """scale · x Wᵀ of each member: x (tokens, wide), weights (n, rank, wide) → (tokens, rank)."""
        if self.tiles is not None:
            return kernels().narrow(x, weights, self.scales, self.tiles)
        parts = [x[own] @ weights[i].t() for i, own in self.members]
        return torch.cat(parts).mul_(self.scales)

    def widen(self, h: torch.Tensor, weights: Weights, y: torch.Tensor) -> None:
        """y (tokens, wide) += h W of each member, in place: h (tokens, rank), weights (n, rank, wide)."""
        if self.tiles is not None:
            kernels().widen(h, weights, y, self.tiles)
            return
        for i, own in self.members:
            y[own].addmm_(h[own], weights[i])

    def outer(self, h: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Write hᵀ x of each member to its place in gradient (n, rank, wide), or add it (see `keep`).

        Members without tokens: nothing is written."""
        if self.tiles is not None:
            kernels().outer(h, x, gradient, self.ends, self.keep)
            return
        for i, own in self.members:
            new = h[own].t() @ x[own]
            _ = gradient[i].add_(new) if self.kept[i] else gradient[i].copy_(new)


def has_kernels(layout: Layout, weights: torch.Tensor) -> bool:
    """Whether the kernels take these weights. Triton is a part of torch's CUDA packages on Linux."""
    if not TRITON or not weights.is_cuda or weights.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    return kernels().fits(layout.rank, weights.itemsize) and kernels().works(weights.dtype)


def kernels() -> ModuleType:
    return importlib.import_module("seal_nb.ttt.kernels")  # needs Triton, which a CPU machine may lack


def tiles_for(lengths: Sequence[int], layout: Layout, weights: torch.Tensor, most: int = 0) -> torch.Tensor | None:
    """Tiles for the kernels, filled up to `most`, on the device; None where there are no kernels."""
    if not has_kernels(layout, weights):
        return None
    return tensor_on(weights.device, kernels().tiles_of(lengths, most), torch.int32)


class Plan:
    """The groups of one pass."""

    def __init__(self, groups: Sequence[Group] = ()):
        self.groups = tuple(groups)
        self.names = frozenset(t.name for layout in {g.layout for g in groups} for t in layout.targets)
        self.trains = any(g.gradient is not None for g in groups)
        self.anchor = torch.zeros((), requires_grad=True)

    def active(self, name: str) -> Iterator[tuple[Group, Target]]:
        """Groups with an adapter on the Linear of this name."""
        return ((g, g.layout.by_name[name]) for g in self.groups if name in g.layout.by_name)


def make_plan(segments: Sequence[Segment]) -> Plan:
    """Groups of all adapters. Slots of one bank must lie in the order of their rows."""
    depth = max((len(s.adapters) for s in segments), default=0)
    frozen = [_frozen_group(run, k) for k in range(depth) for run in _runs(segments, _layout_at(k))]
    trained = [_trained_group(run) for run in _runs(segments, lambda s: s.trained and id(s.trained.bank))]
    return Plan(frozen + trained)


def _layout_at(depth: int) -> Callable[[Segment], Layout | None]:
    return lambda s: s.adapters[depth].layout if len(s.adapters) > depth else None


def _runs(segments: Sequence[Segment], key: Callable[[Segment], object]) -> Iterator[list[Segment]]:
    """Runs of neighbouring segments (no token between them) of one key; None is left out."""
    gaps, last, numbered = 0, None, []
    for s in segments:
        gaps += last is not None and s.start != last
        last = s.stop
        numbered.append((gaps, s))
    for (_, value), members in groupby(numbered, key=lambda pair: (pair[0], key(pair[1]))):
        if value is not None:
            yield [s for _, s in members]


def _frozen_group(run: Sequence[Segment], depth: int) -> Group:
    """Neighbours with the same adapter are one member, so that its weights are there once."""
    adapters, lengths = [], []
    for _, members in groupby(run, key=lambda s: id(s.adapters[depth])):
        alike = list(members)
        adapters.append(alike[0].adapters[depth])
        lengths.append(alike[-1].stop - alike[0].start)
    compute = [a.compute for a in adapters]
    tiles = tiles_for(lengths, adapters[0].layout, compute[0])
    return Group(
        layout=adapters[0].layout,
        weights=compute if tiles is None else torch.stack(compute),
        scales=token_scales([a.scaling for a in adapters], lengths, compute[0]),
        start=run[0].start,
        ends=tensor_on(compute[0].device, list(accumulate(lengths)), torch.int32),
        tiles=tiles,
    )


def _trained_group(run: Sequence[Segment]) -> Group:
    """All rows of a bank as one operand; rows that are not in this pass are members without tokens."""
    pairs = trained_segments(run)
    bank: Bank = pairs[0][1].bank
    lengths, factors = [0] * bank.n, [0.0] * bank.n
    for s, row in pairs:
        lengths[row.index], factors[row.index] = s.stop - s.start, row.settings.scaling
    start, device = run[0].start, bank.compute.device
    return Group(
        layout=bank.layout,
        weights=bank.compute,
        scales=token_scales(factors, lengths, bank.compute),
        start=start,
        ends=tensor_on(device, list(accumulate(lengths)), torch.int32),
        tiles=tiles_for(lengths, bank.layout, bank.compute),
        gradient=bank.gradient,
        keep=None if bank.all_void else tensor_on(device, bank.kept_gradients, bank.gradient.dtype),
        dropouts=tuple((slice(s.start - start, s.stop - start), row) for s, row in pairs if row.settings.dropout),
    )


def trained_segments(segments: Sequence[Segment]) -> list[tuple[Segment, BankRow]]:
    return [(s, s.trained) for s in segments if s.trained is not None]


def token_scales(factors: Sequence[float], lengths: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
    """The factor of each token, (tokens, 1), at least float32."""
    values = [f for f, n in zip(factors, lengths, strict=True) for _ in range(n)]
    dtype = torch.promote_types(torch.float32, weights.dtype)
    return tensor_on(weights.device, values, dtype)[:, None]


class Current:
    """The plan of the pass that is running, shared by all layers of one base."""

    def __init__(self) -> None:
        self.plan = Plan()


class BranchedLinear(nn.Module):
    """A frozen Linear and the branches that the current plan adds to it. Input (1, T, in), output (1, T,
    out)."""

    def __init__(self, base: nn.Linear, name: str, current: Current):
        super().__init__()
        self.base, self.name, self.current = base, name, current

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self.current.plan
        if self.name not in plan.names:
            return self.base(x)
        if plan.trains and torch.is_grad_enabled():
            return _Branches.apply(x, plan.anchor, self, plan)
        y = self.base(x)
        _add_branches(y[0], x[0].contiguous(), self.name, plan)
        return y


@dataclass
class _Kept:
    """What the backward pass of one group needs: scaled h (tokens, rank) and the dropout mask, if any."""

    h: torch.Tensor
    mask: torch.Tensor | None = None


def _add_branches(y: torch.Tensor, x: torch.Tensor, name: str, plan: Plan, *, training: bool = False) -> list[_Kept]:
    """y (T, out) += branches of x (T, in), in place."""
    kept = []
    for group, target in plan.active(name):
        own = x[group.tokens]
        mask = _dropout_mask(group, own) if training and group.dropouts else None
        if mask is not None:
            own = own * mask
        h = group.narrow(own, group.a(target))
        group.widen(h, group.b(target), y[group.tokens])
        kept.append(_Kept(h, mask))
    return kept


def _dropout_mask(group: Group, x: torch.Tensor) -> torch.Tensor:
    """Ones, or 0 and 1 / (1 - p) where a member has dropout p, drawn from the member's own stream."""
    mask = torch.ones_like(x)
    for tokens, row in group.dropouts:
        share = 1 - row.settings.dropout
        mask[tokens].bernoulli_(share, generator=row.draws).div_(share)
    return mask


class _Branches(torch.autograd.Function):
    """Linear + branches; the backward pass writes the gradients of A and B to their slots."""

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
        _branch_gradients(g, x[0], grad_x, ctx.layer.name, ctx.plan, ctx.kept)
        return (grad_x[None] if grad_x is not None else None), None, None, None


def _branch_gradients(
    g: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor | None, name: str, plan: Plan, kept: list[_Kept]
) -> None:
    """Write dA and dB of trained members; add the branches' share to grad_x (T, in), in place, where it is
    wanted."""
    for (group, target), own in zip(plan.active(name), kept, strict=True):
        layout, gg, a = group.layout, g[group.tokens], group.a(target)
        grad_h = group.narrow(gg, group.b(target))  # (tokens, rank)
        if group.gradient is not None:
            xg = x[group.tokens] if own.mask is None else x[group.tokens] * own.mask
            group.outer(grad_h, xg, layout.a(group.gradient, target))
            group.outer(own.h, gg, layout.b(group.gradient, target).transpose(1, 2))
        if grad_x is not None and own.mask is None:
            group.widen(grad_h, a, grad_x[group.tokens])
        elif grad_x is not None and own.mask is not None:
            share = torch.zeros_like(grad_x[group.tokens])
            group.widen(grad_h, a, share)
            grad_x[group.tokens] += share.mul_(own.mask)

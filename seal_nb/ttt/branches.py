"""Each row its own low-rank branch: the frozen base's Linear layers, extended.

`y = x Wᵀ + Σ scale (x Aᵀ) Bᵀ`. The tokens of a pass lie segment by segment in one (T, d) matrix, and each
segment has its own adapters. The frozen product runs once over all tokens. The branches of neighbouring
segments with adapters of one shape form a group: their tokens are padded to (n, longest, d), so that one
batched product serves all of them. Gradients of A and B go straight into the slots' flat gradients:
adapters are no autograd leaves and cost no graph. Knows nothing of rows, loss or optimiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from seal_nb.ttt.bank import BankRow
from seal_nb.ttt.lora import Adapter, Layout, Target
from seal_nb.ttt.quantized import dense_weight


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens start..stop of a pass, the frozen adapters that act on them, and the one in training, if any."""

    start: int
    stop: int
    adapters: tuple[Adapter, ...] = ()
    trained: BankRow | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Branches of one shape over neighbouring segments: n members.

    weights: (n, layout.size), compute dtype; scaling: (n, 1, 1); member i has lengths[i] tokens, end to end
    from `start`
    gradient: (n, layout.size) or None for frozen members; overwrite: the gradient's old content is void"""

    layout: Layout
    weights: torch.Tensor
    scaling: torch.Tensor
    start: int
    lengths: tuple[int, ...]
    gradient: torch.Tensor | None = None
    overwrite: bool = True
    dropouts: tuple[tuple[int, BankRow], ...] = ()

    @cached_property
    def tokens(self) -> slice:
        return slice(self.start, self.start + sum(self.lengths))

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def places(self) -> torch.Tensor | None:
        """Where each token lies in the padded (n * longest) rows; None where all members are equally long."""
        if len(set(self.lengths)) == 1:
            return None
        places = [torch.arange(n) + i * self.longest for i, n in enumerate(self.lengths)]
        return torch.cat(places).to(self.weights.device, non_blocking=True)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """(T, d) → (n, longest, d), zeros where a member is shorter."""
        own, shape = x[self.tokens], (len(self.lengths), self.longest, x.shape[-1])
        if self.places is None:
            return own.reshape(shape)
        return own.new_zeros(shape[0] * shape[1], shape[2]).index_copy_(0, self.places, own).view(shape)

    def add_to(self, y: torch.Tensor, padded: torch.Tensor) -> None:
        """y (T, d) += padded (n, longest, d), in place."""
        flat = padded.flatten(0, 1)
        y[self.tokens] += flat if self.places is None else flat.index_select(0, self.places)


class Plan:
    """The groups of one pass. Padded inputs are kept for the next layer that reads the same ones (q, k,
    v)."""

    def __init__(self, groups: Sequence[Group] = ()):
        self.groups = tuple(groups)
        self.names = frozenset(t.name for layout in {g.layout for g in groups} for t in layout.targets)
        self.trains = any(g.gradient is not None for g in groups)
        self.anchor = torch.zeros((), requires_grad=True)
        self._last: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def padded(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x (1, T, d) padded for each group."""
        if self._last is None or self._last[0].data_ptr() != x.data_ptr() or self._last[0].shape != x.shape:
            self._last = (x, [g.padded(x[0]) for g in self.groups])
        return self._last[1]

    def active(self, name: str) -> list[tuple[int, Group, Target]]:
        return [(i, g, t) for i, g in enumerate(self.groups) if (t := g.layout.by_name.get(name))]


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
        _add_branches(y[0], x, self.name, plan)
        return y


@dataclass
class _Kept:
    """What the backward pass of one group needs: scaled h (n, longest, rank) and the dropout mask, if any."""

    h: torch.Tensor
    mask: torch.Tensor | None = None


def _add_branches(
    y: torch.Tensor, x: torch.Tensor, name: str, plan: Plan, *, training: bool = False
) -> list[_Kept]:
    """y (T, out) += branches of x (1, T, in), in place."""
    kept, padded = [], plan.padded(x)
    for i, group, target in plan.active(name):
        xg = padded[i]
        mask = _dropout_mask(group, xg) if training and group.dropouts else None
        if mask is not None:
            xg = xg * mask
        h = torch.bmm(xg, group.layout.a(group.weights, target).transpose(1, 2)).mul_(group.scaling)
        group.add_to(y, torch.bmm(h, group.layout.b(group.weights, target).transpose(1, 2)))
        kept.append(_Kept(h, mask))
    return kept


def _dropout_mask(group: Group, xg: torch.Tensor) -> torch.Tensor:
    """Ones, or 0 and 1 / (1 - p) where a member has dropout p, drawn from the member's own stream."""
    mask = torch.ones_like(xg)
    for i, row in group.dropouts:
        share = 1 - row.dropout
        own = mask[i, : group.lengths[i]]
        own.bernoulli_(share, generator=row.draws).div_(share)
    return mask


class _Branches(torch.autograd.Function):
    """Linear + branches; the backward pass writes the gradients of A and B to their slots."""

    @staticmethod
    def forward(ctx, x, anchor, layer, plan):  # type: ignore[no-untyped-def]  # torch's signature
        y = layer.base(x)
        ctx.layer, ctx.plan = layer, plan
        ctx.kept = _add_branches(y[0], x, layer.name, plan, training=True)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        g = grad_y[0]
        grad_x = g @ dense_weight(ctx.layer.base) if ctx.needs_input_grad[0] else None  # (T, in)
        _branch_gradients(g, x, grad_x, ctx.layer.name, ctx.plan, ctx.kept)
        return (grad_x[None] if grad_x is not None else None), None, None, None


def _branch_gradients(
    g: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor | None, name: str, plan: Plan, kept: list[_Kept]
) -> None:
    """Write dA and dB of trained members; add the branches' share to grad_x (T, in), in place, where it is
    wanted."""
    padded = plan.padded(x)
    for (i, group, target), own in zip(plan.active(name), kept, strict=True):
        gg = group.padded(g)
        a, b = group.layout.a(group.weights, target), group.layout.b(group.weights, target)
        grad_h = torch.bmm(gg, b).mul_(group.scaling)  # (n, longest, rank)
        if group.gradient is not None:
            xg = padded[i] if own.mask is None else padded[i] * own.mask
            _write(group, group.layout.a(group.gradient, target), torch.bmm(grad_h.transpose(1, 2), xg))
            _write(group, group.layout.b(group.gradient, target), torch.bmm(gg.transpose(1, 2), own.h))
        if grad_x is not None:
            share = torch.bmm(grad_h, a)
            group.add_to(grad_x, share if own.mask is None else share.mul_(own.mask))


def _write(group: Group, view: torch.Tensor, grad: torch.Tensor) -> None:
    if group.overwrite:
        view.copy_(grad)
    else:
        view.add_(grad)

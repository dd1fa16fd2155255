"""Each row its own low-rank branch: the frozen base's Linear layers, extended.

`y = x Wᵀ + Σ scale (x Aᵀ) Bᵀ`, where the tokens of a pass lie slot by slot in one (T, d) matrix and each slot (segment) has
its own list of adapters, the last of which may be in training. The frozen product runs once over all tokens; gradients of
A and B are written straight into the slot's flat gradient, so adapters are no autograd leaves and cost no graph.
Two ways for the branches: a loop over segments (CPU: products are small and launches free), or, with `grouped`, one
batched product per layer over padded groups (CUDA: launches are what costs). Knows nothing of rows, loss or optimiser.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from seal_nb.ttt.lora import Adapter


class Gradient:
    """Where the gradient of one adapter in training goes: `flat` (layout.size,), in the adapter's dtype.

    The first pass of an accumulation window overwrites, later ones add: no clearing pass over memory.
    """

    def __init__(self, adapter: Adapter, dropout_seed: int):
        self.flat = torch.zeros_like(adapter.flat)
        layout = adapter.layout
        self.pairs = {t.name: (layout.a(self.flat, t), layout.b(self.flat, t)) for t in layout.targets}
        self.overwrite = True
        self.dropout = adapter.settings.dropout
        self.draws = torch.Generator(adapter.flat.device).manual_seed(dropout_seed)

    def write(self, name: str, grad_a: torch.Tensor, grad_b: torch.Tensor) -> None:
        for view, grad in zip(self.pairs[name], (grad_a, grad_b), strict=True):
            view.copy_(grad) if self.overwrite else view.add_(grad)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens start..stop of a pass and the adapters that act on them; `gradient` belongs to the last one if it is trained."""

    start: int
    stop: int
    adapters: tuple[Adapter, ...] = ()
    gradient: Gradient | None = None


@dataclass
class Plan:
    """What the branches of one pass are. Without segments the base runs alone."""

    segments: Sequence[Segment] = ()
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))

    @property
    def trains(self) -> bool:
        return any(s.gradient is not None for s in self.segments)


class BranchedLinear(nn.Module):
    """A frozen Linear and the branches that the current plan adds to it."""

    def __init__(self, base: nn.Linear, name: str, current: "Current"):
        super().__init__()
        self.base, self.name, self.current = base, name, current

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self.current.plan
        if not any(self.name in a.pairs for s in plan.segments for a in s.adapters):
            return self.base(x)
        if plan.trains and torch.is_grad_enabled():
            return _Branches.apply(x, plan.anchor, self, plan)
        y = self.base(x)
        _add_branches(y[0], x[0], self.name, plan.segments, kept=None)
        return y


class Current:
    """The plan of the pass that is running, shared by all layers of one base."""

    def __init__(self) -> None:
        self.plan = Plan()


def _add_branches(
    y: torch.Tensor, x: torch.Tensor, name: str, segments: Sequence[Segment], kept: list[tuple] | None
) -> None:
    """y (T, out) += branches of x (T, in), in place. `kept` receives (dropped input or None, its keep mask, h) of trained ones."""
    for s in segments:
        for adapter in s.adapters:
            if name not in adapter.pairs:
                continue
            a, b = adapter.pairs[name]
            xs, keep = x[s.start : s.stop], None
            trained = s.gradient is not None and adapter is s.adapters[-1]
            if trained and s.gradient is not None and s.gradient.dropout and kept is not None:
                share = 1 - s.gradient.dropout
                keep = torch.empty_like(xs).bernoulli_(share, generator=s.gradient.draws).div_(share)
                xs = xs * keep
            h = xs @ a.T  # (tokens, rank)
            y[s.start : s.stop].addmm_(h, b.T, alpha=adapter.scaling)
            if trained and kept is not None:
                kept.append((xs if keep is not None else None, keep, h))


class _Branches(torch.autograd.Function):
    """Linear + branches with gradients of the trained A and B written to their slots."""

    @staticmethod
    def forward(ctx, x, anchor, layer, plan):  # type: ignore[no-untyped-def]  # torch's signature
        y = F.linear(x, layer.base.weight, layer.base.bias)
        kept: list[tuple] = []
        _add_branches(y[0], x[0], layer.name, plan.segments, kept)
        ctx.save_for_backward(x)
        ctx.layer, ctx.plan, ctx.kept = layer, plan, kept
        return y

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        layer, g = ctx.layer, grad_y[0].contiguous()
        wanted = ctx.needs_input_grad[0]
        grad_x = g @ layer.base.weight if wanted else None  # (T, in)
        _branch_gradients(g, x[0], grad_x, layer.name, ctx.plan.segments, iter(ctx.kept))
        return (grad_x[None] if grad_x is not None else None), None, None, None


def _branch_gradients(g, x, grad_x, name, segments, kept) -> None:  # type: ignore[no-untyped-def]
    """Write each slot's dA, dB; add the branches' share to grad_x (T, in) in place where it is wanted."""
    for s in segments:
        gs = g[s.start : s.stop]
        for adapter in s.adapters:
            if name not in adapter.pairs:
                continue
            a, b = adapter.pairs[name]
            grad_h = (gs @ b).mul_(adapter.scaling)  # (tokens, rank)
            keep = None
            if s.gradient is not None and adapter is s.adapters[-1]:
                dropped, keep, h = next(kept)
                xs = x[s.start : s.stop] if dropped is None else dropped
                s.gradient.write(name, grad_h.T @ xs, (gs.T @ h).mul_(adapter.scaling))
            if grad_x is not None and keep is None:
                grad_x[s.start : s.stop].addmm_(grad_h, a)
            elif grad_x is not None:
                grad_x[s.start : s.stop].add_((grad_h @ a).mul_(keep))

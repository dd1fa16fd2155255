"""Low-rank branches on the Linear layers of the frozen base: y = x Wᵀ + scale (x Aᵀ) Bᵀ (LoRA, arXiv 2106.09685).

A pass is one run of the model over the tokens of many jobs, end to end. The frozen product runs once over all of them.
Neighbouring tokens whose adapters have one layout are a `Group`, in which each adapter multiplies its own tokens,
without padding: on CUDA in one kernel (`kernels.py`), elsewhere in a loop."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from seal_nb.ttt.device import has_bfloat16, tensor_on, wide
from seal_nb.ttt.lora import Adapter, Layout, LoraSettings, Target

# Triton is a part of torch's CUDA packages on Linux; a CPU machine may lack it.
kernels: Any = importlib.import_module("seal_nb.ttt.kernels") if find_spec("triton") else None
Part = tuple[int, Sequence[Adapter]]  # a number of tokens, and the adapters whose branches are all added to them
Span = tuple[int, int, Any]  # first token, number of tokens and one adapter (or None) of a part
View = Callable[..., Tensor]  # Layout.a or Layout.b_transposed: (..., layout.size) → (..., rank, wide)


def has_kernels(layout: Layout, weights: Tensor) -> bool:
    """Whether the kernels take these weights. Cards without bfloat16 have float16 bases, which the kernels do not."""
    if kernels is None or not weights.is_cuda or weights.dtype not in (torch.bfloat16, torch.float32):
        return False
    fits = kernels.fits(layout.rank, weights.itemsize)
    return fits and has_bfloat16(weights.device) and kernels.works(weights.dtype)


class Bank:
    """Memory for n adapters of one layout in training: weights, gradients and AdamW's two means, (n, layout.size)."""

    def __init__(self, layout: Layout, n: int, *, device: torch.device, compute_dtype: torch.dtype):
        self.layout, self.n = layout, n
        # Not filled: a row is filled when a job enters, and until then it costs no memory on a CPU.
        tensors = [torch.empty(n, layout.size, device=device, dtype=wide(compute_dtype)) for _ in range(4)]
        self.weights, self.gradient, self.mean, self.square = tensors
        # Passes read the weights in the compute dtype: a copy, unless that is their own.
        same = self.weights.dtype == compute_dtype
        self.compute = self.weights if same else torch.empty_like(self.weights, dtype=compute_dtype)
        self.rows: dict[int, BankRow] = {}  # the rows that are taken

    @property
    def adds_to_gradient(self) -> list[bool]:
        """For each row, whether the next gradient is added to the stored one, not written over it."""
        return [i in self.rows and self.rows[i].n_passed > 0 for i in range(self.n)]


class BankRow(Adapter):
    """One adapter in training: the first free row of a bank."""

    def __init__(self, bank: Bank, settings: LoraSettings, initial: Tensor, *, dropout_seed: int):
        self.index = index = next(i for i in range(bank.n) if i not in bank.rows)
        self.bank = self.kind = bank
        self.layout, self.settings = bank.layout, settings
        self.flat, self.compute, self.gradient = bank.weights[index], bank.compute[index], bank.gradient[index]
        self.mean, self.square = bank.mean[index], bank.square[index]
        self.flat.copy_(initial, non_blocking=True)
        for left_over in (self.gradient, self.mean, self.square):
            left_over.zero_()
        self.steps = torch.zeros((), device=bank.weights.device)  # of AdamW
        self.n_passed = 0  # passes since the last optimiser step, as the trainer counts; the first overwrites gradients
        self.draws = torch.Generator(bank.weights.device).manual_seed(dropout_seed)
        self.refresh()
        bank.rows[index] = self  # last: where something above fails, the row stays free

    def refresh(self) -> None:
        """Copy the weights to `compute`, after they have changed."""
        if self.bank.compute is not self.bank.weights:
            self.compute.copy_(self.flat)


class Group:
    """Neighbouring spans whose adapters are rows of one bank, or frozen adapters of one layout. A member is an adapter
    with its tokens, which follow those of the member before. Every row of a bank is a member, in the bank's order, so
    that nothing is gathered; rows that are not in this pass have no tokens. A frozen adapter and all its neighbouring
    spans are one member. lasting: whether many passes will follow"""

    def __init__(self, run: Sequence[Span], *, lasting: bool):
        start, _, first = run[0]
        self.layout, with_kernels = first.layout, has_kernels(first.layout, first.compute)
        device, dtype = first.compute.device, wide(first.compute.dtype)
        bank = first.bank if isinstance(first, BankRow) else None
        self.weights: Tensor | list[Tensor]  # of the members, in the compute dtype: (n, layout.size), or n vectors
        self.gradient: Tensor | None = None  # (n, layout.size), in training
        self.keep: Tensor | None = None  # (n,), 1 to add to the stored gradient and 0 to overwrite it; None: all 0
        self.dropouts: list[tuple[slice, BankRow]] = []  # members with dropout, and their tokens in the group
        if bank is None:
            members = [list(same) for _, same in groupby(run, key=lambda part: id(part[2]))]
            lengths = [sum(n for _, n, _ in same) for same in members]
            self.weights = [same[0][2].compute for same in members]
            if with_kernels and lasting:
                self.weights = torch.stack(self.weights)
        else:
            lengths, self.weights, self.gradient = [0] * bank.n, bank.compute, bank.gradient
            for at, n_tokens, row in run:
                lengths[row.index] = n_tokens
                if row.settings.dropout:
                    self.dropouts.append((slice(at - start, at - start + n_tokens), row))
            if any(bank.adds_to_gradient):
                self.keep = tensor_on(device, bank.adds_to_gradient, dtype)
        scales = [adapter.settings.scaling for _, n, adapter in run for _ in range(n)]
        self.tokens = slice(start, start + len(scales))  # of all members, in the pass
        self.scales = tensor_on(device, scales, dtype)[:, None]  # (tokens, 1)
        self.ends = tensor_on(device, list(accumulate(lengths)), torch.int32)  # (n,) end of each member in the group
        # (tiles, 3) member, first and last token of what a kernel takes at a time; None: a loop.
        self.tiles = tensor_on(device, kernels.tiles_of(lengths), torch.int32) if with_kernels else None

    @cached_property
    def members(self) -> list[tuple[int, slice]]:
        """Members with tokens, and the tokens' places in the group. Read from the device, since a captured pass is
        filled with other lengths; that waits for it."""
        ends = [0, *self.ends.tolist()]
        return [(i, slice(a, b)) for i, (a, b) in enumerate(pairwise(ends)) if a < b]

    @cached_property
    def kept(self) -> list[bool]:
        return [False] * len(self.ends) if self.keep is None else self.keep.bool().tolist()

    def _matrices(self, view: View, target: Target) -> Tensor:
        """view(weights) of all members, (n, rank, d). If not lasting, frozen weights are stacked for one target at a
        time: whole copies of a stack of 13 under each of 8 slots would take 17 GB at 7B."""
        if isinstance(self.weights, Tensor):
            return view(self.weights, target)
        matrices = [view(one, target) for one in self.weights]
        return torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]

    def narrow(self, x: Tensor, view: View, target: Target) -> Tensor:
        """scale · x Mᵀ of each member, where M (rank, d) is its A or Bᵀ: x (tokens, d) → (tokens, rank)."""
        if self.tiles is not None:
            return kernels.narrow(x, self._matrices(view, target), self.scales, self.tiles)
        weights = [(own, view(self.weights[i], target)) for i, own in self.members]
        return torch.cat([x[own].to(w.dtype) @ w.t() for own, w in weights]).mul_(self.scales)

    def widen(self, h: Tensor, view: View, target: Target, y: Tensor) -> None:
        """y (tokens, d) += h M of each member, in place, where M (rank, d) is its A or Bᵀ: h (tokens, rank)."""
        if self.tiles is not None:
            kernels.widen(h, self._matrices(view, target), y, self.tiles)
            return
        for i, own in self.members:
            if y.dtype == h.dtype:
                y[own].addmm_(h[own], view(self.weights[i], target))
            else:  # the base is in float16, the adapters and h in float32
                y[own] += h[own] @ view(self.weights[i], target)

    def outer(self, h: Tensor, x: Tensor, gradient: Tensor) -> None:
        """gradient (n, rank, d) = hᵀ x of each member with tokens, or += where `keep` says so: h (tokens, rank), and x
        (tokens, d) the input of the branch or the gradient of its output."""
        if self.tiles is not None:
            kernels.outer(h, x, gradient, self.ends, self.keep)
            return
        for i, own in self.members:
            new = h[own].t() @ x[own].to(h.dtype)
            if self.kept[i]:
                gradient[i].add_(new)
            else:
                gradient[i].copy_(new)


class Plan:
    """The groups of a pass over these parts, end to end. Rows of one bank come by rising index, each once. lasting:
    whether many passes follow, as in decoding; a plan that trains serves one pass, or replays of it"""

    def __init__(self, parts: Sequence[Part], *, lasting: bool = False):
        stops = accumulate(n for n, _ in parts)
        spans = [(stop - n, n, adapters) for (n, adapters), stop in zip(parts, stops, strict=True)]
        self.groups: list[Group] = []
        for depth in range(max((len(adapters) for _, adapters in parts), default=0)):
            layer = [(start, n, adapters[depth] if depth < len(adapters) else None) for start, n, adapters in spans]
            runs = groupby(layer, key=lambda span: span[2] and span[2].kind)
            self.groups += [Group(list(run), lasting=lasting) for kind, run in runs if kind is not None]
        self.n_tokens = spans[-1][0] + spans[-1][1] if spans else 0
        self.names = {target.name for group in self.groups for target in group.layout.targets}
        self.anchor = torch.zeros((), requires_grad=True)  # so that backward runs where x needs no gradient

    def active(self, name: str) -> Iterator[tuple[Group, Target]]:
        """Groups with an adapter on the Linear of this name."""
        return ((g, g.layout.by_name[name]) for g in self.groups if name in g.layout.by_name)


NO_PLAN = Plan(())
PLAN: ContextVar[Plan] = ContextVar("PLAN", default=NO_PLAN)  # of the pass that is running


class BranchedLinear(nn.Module):
    """A frozen Linear and the branches that the current plan adds to it: (…, in) → (…, out), T tokens in all."""

    def __init__(self, base: nn.Module, name: str):
        super().__init__()
        self.base, self.name = base, name

    @property
    def weight(self) -> Any:
        return self.base.weight  # some models read it

    def forward(self, x: Tensor) -> Tensor:
        plan = PLAN.get()
        if self.name not in plan.names:
            return self.base(x)
        tokens = x.reshape(-1, x.shape[-1]).contiguous()  # the kernels need contiguous rows
        if len(tokens) != plan.n_tokens:
            found = f"{self.name} gets {len(tokens)} tokens where the pass has {plan.n_tokens}"
            raise RuntimeError(f"{found}; a Linear with adapters must get every token once")
        return _Branches.apply(tokens, plan.anchor, self, plan).view(*x.shape[:-1], -1)


def _dropout_mask(group: Group, x: Tensor) -> Tensor:
    """Ones, or 0 and 1 / (1 - p) for a member with dropout p, drawn from the member's own random stream."""
    mask = torch.ones_like(x)
    for tokens, row in group.dropouts:
        keeps = 1 - row.settings.dropout
        mask[tokens].bernoulli_(keeps, generator=row.draws).div_(keeps)
    return mask


class _Branches(torch.autograd.Function):
    """Linear and branches; the backward pass writes or adds the gradients of A and B to the bank (see `Group.keep`)."""

    @staticmethod
    def forward(ctx, x, anchor, layer, plan):  # type: ignore[no-untyped-def]  # torch's signature
        y = layer.base(x)
        ctx.layer, ctx.plan, ctx.saved = layer, plan, []  # of each group: scaled h (tokens, rank), the dropout mask
        for group, target in plan.active(layer.name):
            own = x[group.tokens]
            mask = _dropout_mask(group, own) if group.dropouts else None
            h = group.narrow(own if mask is None else own * mask, group.layout.a, target)
            group.widen(h, group.layout.b_transposed, target, y[group.tokens])
            ctx.saved.append((h, mask))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        g = grad_y.contiguous()
        grad_x = g @ dense_weight(ctx.layer.base) if ctx.needs_input_grad[0] else None  # (T, in)
        for (group, target), (h, mask) in zip(ctx.plan.active(ctx.layer.name), ctx.saved, strict=True):
            layout, gg, xg = group.layout, g[group.tokens], x[group.tokens]
            grad_h = group.narrow(gg, layout.b_transposed, target)  # (tokens, rank)
            if group.gradient is not None:
                group.outer(grad_h, xg if mask is None else xg * mask, layout.a(group.gradient, target))
                group.outer(h, gg, layout.b_transposed(group.gradient, target))
            if grad_x is not None and mask is None:
                group.widen(grad_h, layout.a, target, grad_x[group.tokens])
            elif grad_x is not None:
                of_branch = torch.zeros_like(xg)
                group.widen(grad_h, layout.a, target, of_branch)
                grad_x[group.tokens] += of_branch.mul_(mask)
        return grad_x, None, None, None


def dense_weight(linear: nn.Module) -> Tensor:
    """(out, in) weight as the forward pass multiplies with it, also of a Conv1D and of a layer in 4 bits."""
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.t() if isinstance(linear, Conv1D) else weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)

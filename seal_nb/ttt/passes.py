"""One training pass: forward, loss and backward over the micro-batches of many slots.

On any device a pass runs kernel by kernel. On CUDA it is filled up to one of a few static shapes, recorded once as a
CUDA graph and then launched as a whole: at 7B, launching its 4,500 kernels one by one costs the host 120 ms."""

import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seal_nb.ttt.attention import Rows
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import Bank, Plan, has_kernels
from seal_nb.ttt.device import cuda_graph, free_cached_memory, fused, has_varlen, is_out_of_memory, region, sent, wide
from seal_nb.ttt.lora import Adapter, TrainRow

MOST_GRAPHS = 32
PASSES_WITHOUT = 50  # eager passes after running out of memory in a capture
TOKEN_STEP, ROW_STEP, SHORTEST = 128, 64, 512
CHUNK = 1024  # labels whose logits are made at a time
log = logging.getLogger(__name__)


@region
def _nll_and_grad(
    logits: Tensor, targets: Tensor, weights: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """nll (labels,), and the gradient of weights · nll by the logits (labels, vocabulary) of the head, in their dtype.
    scale, softcap: as in `FrozenBase.shape_logits`. In float32, the logits are overwritten."""
    exact, targets, weights = logits.to(wide(logits.dtype)), targets[:, None], weights[:, None]
    slope: Any = scale
    if softcap is not None:
        exact = softcap * torch.tanh(exact * (scale / softcap))
        slope = scale * (1 - (exact / softcap).square())
    elif scale != 1:
        exact = exact * scale
    own, largest = exact.gather(1, targets), exact.amax(-1, keepdim=True)
    total = exact.sub_(largest).exp_().sum(-1, keepdim=True)
    nll = total.log() + largest - own
    factor = weights / total * slope
    grad = exact.mul_(factor).to(logits.dtype)
    # Of the target itself, p - 1 is rounded once.
    own_slope = slope if softcap is None else slope.gather(1, targets)
    return nll[:, 0], grad.scatter_(1, targets, ((-nll).expm1() * weights * own_slope).to(grad.dtype))


class _WeightedNll(torch.autograd.Function):
    """(Σ weights · nll, nll) of hidden (M, d), base, targets (M,), weights (M,). Only hidden gets a gradient, times the
    base's gradient scale."""

    @staticmethod
    def forward(ctx, hidden, base, targets, weights):  # type: ignore[no-untyped-def]  # torch's signature
        parts, grad, head = [], torch.empty_like(hidden), base.head
        buffer = hidden.new_empty(min(CHUNK, len(targets)), len(head.weight))  # of the logits, for all chunks
        for i in range(0, len(targets), CHUNK):
            part = slice(i, i + CHUNK)
            logits = torch.mm(hidden[part], head.weight.t(), out=buffer[: len(targets[part])])
            if head.bias is not None:
                logits += head.bias
            factors = weights[part] * base.gradient_scale
            nll, grad_logits = _nll_and_grad(logits, targets[part], factors, base.logit_scale, base.softcap)
            torch.mm(grad_logits, head.weight, out=grad[part])
            parts.append(nll)
        ctx.save_for_backward(grad)
        nll = torch.cat(parts) if parts else weights.new_zeros(0)
        ctx.mark_non_differentiable(nll)
        return (nll * weights.to(nll.dtype)).sum(), nll

    @staticmethod
    def backward(ctx, grad_total, _):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None


class MicroBatch(NamedTuple):
    """What a slot brings to a pass."""

    adapters: Sequence[Adapter]  # the last one is in training
    rows: Sequence[TrainRow]
    n_labels: int  # of the slot's window, the divisor of its loss


class Shape(NamedTuple):
    """Static sizes of a pass."""

    n_slots: int
    n_tokens: int
    n_rows: int
    longest: int  # tokens of a row, at most
    adds: bool  # whether a gradient is added to an old one


class Pass:
    """Micro-batches of many slots on the device, and the CUDA graph of the pass if it was captured. In a static shape,
    the tokens that fill it up are one more row of the last slot. They have no label and no other token attends to them,
    so they add exactly nothing to any gradient."""

    def __init__(self, base: FrozenBase, batches: Sequence[MicroBatch], shape: Shape | None = None):
        rows = [row for batch in batches for row in batch.rows]
        lengths, n_real = [len(row) for row in rows], [row.n_real for row in rows]
        parts = [(sum(map(len, batch.rows)), batch.adapters) for batch in batches]
        ids, positions = [row.token_ids for row in rows], [torch.arange(n) for n in lengths]
        tokens = torch.stack([torch.cat(ids), torch.cat(positions)])  # (2, T)
        starts = accumulate(lengths, initial=0)
        sources = torch.cat([row.sources + start for row, start in zip(rows, starts, strict=False)])
        counts = torch.tensor([sum(len(row.sources) for row in batch.rows) for batch in batches])
        slots = torch.arange(len(batches)).repeat_interleave(counts)
        # (3, labels): the place of the token that predicts it, its id, its slot; and the factor of its loss.
        labels = torch.stack([sources, torch.cat([row.targets for row in rows]), slots])
        weights = 1 / torch.tensor([batch.n_labels for batch in batches]).clamp(min=1).double()[slots]
        if shape is not None:
            missing = shape.n_tokens - sum(lengths)
            parts[-1] = parts[-1][0] + missing, parts[-1][1]
            n_real = lengths = [*lengths, missing] + [0] * (shape.n_rows - len(lengths) - 1)
            tokens = F.pad(tokens, (0, missing))
            labels, weights = (F.pad(t, (0, shape.n_tokens - len(weights))) for t in (labels, weights))
        self.base, self.n_slots = base, shape.n_slots if shape else len(batches)
        self.tokens, self.labels = sent(tokens, base.device), sent(labels, base.device)
        self.weights = sent(weights.to(wide(base.dtype)), base.device)
        self.rows = Rows(lengths, base.device, n_real=n_real, longest=shape.longest if shape else 0)
        self.plan = Plan(parts)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.losses = torch.empty(0)

    def run(self) -> Tensor:
        """Loss of each slot, (slots,) float64. Gradients go to the slots' rows of their banks."""
        hidden = self.base.run(self.tokens[0], self.tokens[1], self.plan, self.rows.attend)
        sources, targets, slots = self.labels
        total, nll = _WeightedNll.apply(hidden.index_select(0, sources), self.base, targets, self.weights)
        total.backward()
        losses = torch.zeros(self.n_slots, dtype=torch.float64, device=self.weights.device)
        return losses.index_add_(0, slots, (nll * self.weights).double())

    def fill(self, other: "Pass") -> None:
        """Copy another pass of the same shape to the addresses of this one."""
        for own, new in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(new)

    def _tensors(self) -> list[Tensor]:
        (group,) = self.plan.groups
        read = (self.tokens, self.labels, self.weights, self.rows.ends, group.scales, group.ends)
        return [*read, *(t for t in (group.tiles, group.keep) if t is not None)]

    def run_fused(self) -> Tensor:
        """As `run`, with compiled regions. The first call compiles them."""
        with fused(self.base.device):
            return self.run()


class CapturedPasses:
    """The captured passes of one base, for the shapes used last."""

    def __init__(self, base: FrozenBase):
        config, self.base = base.config, base
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        packed = has_varlen(base.device, base.dtype, head_size) and not getattr(config, "attn_logit_softcapping", None)
        self.works = packed and base.dtype == torch.bfloat16
        self.statics: dict[tuple[int, Shape], Pass] = {}
        self.n_without = 0  # eager passes until the next capture
        self.largest = 0  # tokens of the pass whose memory all captures share

    def run(self, batches: Sequence[MicroBatch]) -> Tensor:
        """As `Pass.run`. A shape is warmed up at its first pass and captured at its second."""
        bank = self._only_bank(batches)
        if bank is None or self.n_without:
            self.n_without = max(0, self.n_without - 1)
            return Pass(self.base, batches).run()
        shape = _shape(batches, bank)
        new = Pass(self.base, batches, shape)
        static = self.statics.pop((id(bank), shape), None)
        self.statics[id(bank), shape] = static or new  # at the end
        while len(self.statics) > MOST_GRAPHS:
            self.statics.pop(next(iter(self.statics)))
        if static is None:
            return new.run_fused()
        static.fill(new)
        if static.graph is None:
            self._capture(static)
        if static.graph is None:
            return Pass(self.base, batches).run()
        static.graph.replay()
        return static.losses.clone()  # the next replay of any graph may write here

    def _only_bank(self, batches: Sequence[MicroBatch]) -> Bank | None:
        """The bank of a pass that can be captured. While captures work, its slots must be of one kind (`Slot.kind`)."""
        adapters = batches[0].adapters
        row: Any = adapters[-1]
        padded = any(len(one) > one.n_real for batch in batches for one in batch.rows)
        plain = len(adapters) == 1 and not row.settings.dropout and not padded
        return row.bank if self.works and plain and has_kernels(row.layout, row.compute) else None

    def _capture(self, static: Pass) -> None:
        """Capture a pass that has run. If memory runs out, all captures are freed and the next passes are eager. If the
        model cannot be captured, all later passes are eager."""
        before = self._graph_to_share_memory_with(static)
        try:
            static.graph, static.losses = cuda_graph(static.run_fused, before)
        except RuntimeError as error:
            if is_out_of_memory(error):
                self.n_without = PASSES_WITHOUT
            else:
                log.warning("this model's passes cannot be captured and are launched kernel by kernel: %s", error)
                self.works = False
        if static.graph is None:
            self.statics.clear()
            free_cached_memory(self.base.device)

    def _graph_to_share_memory_with(self, static: Pass) -> torch.cuda.CUDAGraph | None:
        """Any graph, since all share one pool; None if this pass is the largest so far. It would not fit into the pool
        of smaller passes, so their graphs are freed; they are captured again at their next pass."""
        n_tokens = static.tokens.shape[1]
        captured = [s for s in self.statics.values() if s.graph is not None]
        if captured and n_tokens <= self.largest:
            return captured[0].graph
        for smaller in captured:
            smaller.graph, smaller.losses = None, torch.empty(0)
        free_cached_memory(self.base.device)  # a capture cannot take it
        self.largest = n_tokens
        return None


def _shape(batches: Sequence[MicroBatch], bank: Bank) -> Shape:
    """The smallest static shape that holds the pass and one row of the tokens that fill it up."""
    lengths = [len(row) for batch in batches for row in batch.rows]
    step = TOKEN_STEP if sum(lengths) <= 8 * TOKEN_STEP else 2 * TOKEN_STEP
    n_tokens, n_rows = -(-sum(lengths) // step) * step, -(-(len(lengths) + 1) // ROW_STEP) * ROW_STEP
    longest = max(SHORTEST, 2 ** (max(lengths) - 1).bit_length())
    return Shape(bank.n, n_tokens, n_rows, longest, any(bank.adds_to_gradient))

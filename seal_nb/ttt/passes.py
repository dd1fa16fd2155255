"""One training pass: forward and backward over the micro-batches of many slots.

On the host a pass is a `Pass`: tokens, rows and labels. It runs in one of two ways, which compute the same:

- *Eager* (`run_eager`): kernel by kernel. Works for every pass on every device.
- *Captured* (`CapturedPasses`): a CUDA graph of a pass of static shape, recorded once and then launched as a whole. At
  7B a pass has about 4,500 kernels, and launching them one by one costs the host 120 ms, however few tokens there are.
  A pass is filled up to one of a few shapes with tokens that have no label: no other token attends to them, and they
  add exactly nothing to any gradient.

The loss is in `loss.py`; `trainer.py` chooses the slots of a pass and steps their optimisers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from seal_nb.ttt.attention import Attend, Rows, make_rows
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import Bank, Group, Plan, Segment, has_kernels, make_plan, tiles_for, trained_segments
from seal_nb.ttt.device import TILE, cuda_graph, free_cached_memory, fused, has_varlen, pinned, sent
from seal_nb.ttt.jobs import TrainRow
from seal_nb.ttt.loss import weighted_nll

MOST_GRAPHS = 32
PASSES_WITHOUT = 50  # eager passes after running out of memory in a capture
TOKEN_STEP, ROW_STEP, SHORTEST = 128, 64, 512
log = logging.getLogger(__name__)


class Pass:
    """Micro-batches of many slots, on the host.

    segments, rows_S: the segment and the rows of each slot; n_labels_S: labels of its window, the divisor of its loss
    tokens: (2, T) token ids, positions
    labels: (3, labels) place of the token that predicts it, the label's token id, its slot
    weights: (labels,) float64, factor of each label's loss
    """

    def __init__(self, segments: Sequence[Segment], rows_S: Sequence[Sequence[TrainRow]], n_labels_S: Sequence[int]):
        self.segments, self.rows = segments, [row for rows in rows_S for row in rows]
        self.lengths = [len(row) for row in self.rows]
        ids, positions = [row.token_ids for row in self.rows], [torch.arange(n) for n in self.lengths]
        self.tokens = torch.stack([torch.cat(ids), torch.cat(positions)])
        starts = accumulate(self.lengths, initial=0)
        sources = torch.cat([row.sources + start for row, start in zip(self.rows, starts, strict=False)])
        targets = torch.cat([row.targets for row in self.rows])
        counts = torch.tensor([sum(len(row.sources) for row in rows) for rows in rows_S])
        slots = torch.arange(len(rows_S)).repeat_interleave(counts)
        self.labels = torch.stack([sources, targets, slots])
        self.weights = 1 / torch.tensor(n_labels_S).clamp(min=1).double()[slots]


def run_eager(base: FrozenBase, pass_: Pass) -> Tensor:
    """Loss of each slot, (slots,) float64. Gradients go to the slots' rows of their banks."""
    rows = make_rows(pass_.lengths, base.device, n_real=[row.n_real for row in pass_.rows])
    tokens, labels = sent(pass_.tokens, base.device), sent(pass_.labels, base.device)
    weights = sent(pass_.weights.to(base.adapter_dtype), base.device)
    return _run(base, tokens, labels, weights, make_plan(pass_.segments), rows.attend, len(pass_.segments))


def _run(
    base: FrozenBase, tokens: Tensor, labels: Tensor, weights: Tensor, plan: Plan, attend: Attend, n_slots: int
) -> Tensor:
    hidden = base.run(tokens[0], tokens[1], plan, attend)
    total, nll = weighted_nll(hidden.index_select(0, labels[0]), base.head, labels[1], weights)
    total.backward()
    losses = torch.zeros(n_slots, dtype=torch.float64, device=weights.device)
    return losses.index_add_(0, labels[2], (nll * weights).double())


@dataclass(frozen=True)
class Shape:
    """Static sizes of a pass: tokens, rows, longest row; adds: whether a gradient is added to an old one."""

    n_tokens: int
    n_rows: int
    longest: int
    adds: bool


class CapturedPasses:
    """The captured passes of one base, for the shapes used last.

    n_without: eager passes until the next capture; largest: tokens of the pass whose memory all captures share
    """

    def __init__(self, base: FrozenBase):
        self.base = base
        self.works = base.dtype == torch.bfloat16 and has_varlen(base.device, base.dtype, _head_size(base))
        self.statics: dict[tuple[int, Shape], StaticPass] = {}
        self.n_without = self.largest = 0

    def run(self, pass_: Pass) -> Tensor:
        """As `run_eager`. A shape is warmed up at its first pass and captured at its second."""
        bank = self._only_bank(pass_)
        if bank is None or self.n_without:
            self.n_without = max(0, self.n_without - 1)
            return run_eager(self.base, pass_)
        shape = _shape(pass_, bank)
        static = self.statics.pop((id(bank), shape), None) or StaticPass(self.base, bank, shape)
        self.statics[id(bank), shape] = static  # moves it to the end
        while len(self.statics) > MOST_GRAPHS:
            self.statics.pop(next(iter(self.statics)))
        static.fill(pass_)
        static.n_runs += 1
        if static.n_runs == 1:
            return static.warm_up()
        if static.graph is None:
            self._capture(static)
        return static.replay() if static.graph is not None else run_eager(self.base, pass_)

    def forget(self) -> None:
        """Free all captured passes."""
        self.statics.clear()

    def _only_bank(self, pass_: Pass) -> Bank | None:
        """The bank of all slots if the pass can be captured, else None."""
        rows = [row for _, row in trained_segments(pass_.segments)]
        bank = rows[0].bank
        other = any(row.bank is not bank or row.settings.dropout for row in rows)
        stacked = any(s.adapters for s in pass_.segments)
        padded = any(row.n_real < len(row) for row in pass_.rows)
        static = self.works and not (other or stacked or padded)
        return bank if static and has_kernels(bank.layout, bank.compute) else None

    def _capture(self, static: "StaticPass") -> None:
        """Capture a pass that has run. If memory runs out, all captures are freed and the next passes are eager. If the
        model cannot be captured, all later passes are eager."""
        before = self._graph_to_share_memory_with(static)
        try:
            static.graph, static.losses = cuda_graph(static.warm_up, before)
        except torch.OutOfMemoryError:
            self.n_without = PASSES_WITHOUT
        except RuntimeError as error:
            log.warning("this model's passes cannot be captured and are launched kernel by kernel: %s", error)
            self.works = False
        if static.graph is None:
            self.forget()
            free_cached_memory(self.base.device)

    def _graph_to_share_memory_with(self, static: "StaticPass") -> "torch.cuda.CUDAGraph | None":
        """Any graph, since all share one pool; None if this pass is the largest so far. It would not fit into the pool
        of smaller passes, so their graphs are freed; they are captured again at their next pass."""
        captured = [s for s in self.statics.values() if s.graph is not None]
        if captured and static.shape.n_tokens <= self.largest:
            return captured[0].graph
        for smaller in captured:
            smaller.graph, smaller.losses = None, torch.empty(0)
        free_cached_memory(self.base.device)  # a capture cannot take it
        self.largest = static.shape.n_tokens
        return None


def _head_size(base: FrozenBase) -> int:
    config = base.model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shape(pass_: Pass, bank: Bank) -> Shape:
    """The smallest static shape that holds the pass and one row of the tokens that fill it up."""
    n = sum(pass_.lengths)
    step = TOKEN_STEP if n <= 8 * TOKEN_STEP else 2 * TOKEN_STEP
    longest = SHORTEST
    while longest < max(pass_.lengths):
        longest *= 2
    return Shape(_up(n, step), _up(len(pass_.rows) + 1, ROW_STEP), longest, any(bank.adds_to_gradient))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


class StaticPass:
    """Inputs of one shape at fixed addresses, and the graph that reads them."""

    def __init__(self, base: FrozenBase, bank: Bank, shape: Shape):
        self.base, self.bank, self.shape = base, bank, shape
        device = base.device
        self.tokens = torch.zeros(2, shape.n_tokens, dtype=torch.long, device=device)
        self.labels = torch.zeros(3, shape.n_tokens, dtype=torch.long, device=device)
        self.floats = torch.zeros(2, shape.n_tokens, dtype=base.adapter_dtype, device=device)
        self.row_ends = torch.zeros(shape.n_rows + 1, dtype=torch.int32, device=device)
        self.member_ends = torch.zeros(bank.n, dtype=torch.int32, device=device)
        self.tiles = self._tiles([])
        self.keep = torch.zeros(bank.n, dtype=base.adapter_dtype, device=device)
        self.losses = torch.empty(0)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.n_runs = 0
        group = Group(
            layout=bank.layout,
            weights=bank.compute,
            scales=self.floats[1][:, None],
            start=0,
            ends=self.member_ends,
            tiles=self.tiles,
            gradient=bank.gradient,
            keep=self.keep if shape.adds else None,
        )
        rows = Rows(ends=self.row_ends, longest=shape.longest)
        self.plan, self.attend = Plan([group]), rows.attend

    def fill(self, pass_: Pass) -> None:
        """Copy a pass in. The tokens that fill it up are one more row of the last slot."""
        n, n_tokens, n_rows = self.shape.n_tokens, sum(pass_.lengths), len(pass_.rows)
        lengths, factors = [0] * self.bank.n, torch.zeros(n, dtype=self.floats.dtype)
        for s, row in trained_segments(pass_.segments):
            lengths[row.index] = s.stop - s.start
            factors[s.start : s.stop] = row.settings.scaling
        lengths[row.index] += n - n_tokens
        ends = [0, *accumulate(pass_.lengths)] + [n] * (self.shape.n_rows - n_rows)
        weights = F.pad(pass_.weights.to(factors), (0, n - len(pass_.weights)))
        for static, host in (
            (self.tokens, F.pad(pass_.tokens, (0, n - n_tokens))),
            (self.labels, F.pad(pass_.labels, (0, n - pass_.labels.shape[1]))),
            (self.floats, torch.stack([weights, factors])),
            (self.row_ends, torch.tensor(ends, dtype=torch.int32)),
            (self.member_ends, torch.tensor(lengths).cumsum(0).int()),
            (self.keep, torch.tensor(self.bank.adds_to_gradient).to(self.keep.dtype)),
        ):
            static.copy_(pinned(host, static.device), non_blocking=True)
        if self.tiles is not None and (tiles := self._tiles(lengths)) is not None:
            self.tiles.copy_(tiles)

    def _tiles(self, lengths: Sequence[int]) -> Tensor | None:
        """Tiles of members with these numbers of tokens, filled up to the most that this shape can have."""
        most = -(-self.shape.n_tokens // TILE) + self.bank.n
        return tiles_for(lengths, self.bank.layout, self.bank.compute, most)

    def warm_up(self) -> Tensor:
        """Run the pass kernel by kernel. The first call compiles the regions."""
        with fused():
            return _run(self.base, self.tokens, self.labels, self.floats[0], self.plan, self.attend, self.bank.n)

    def replay(self) -> Tensor:
        assert self.graph is not None
        self.graph.replay()
        return self.losses.clone()  # the next replay of any graph may write here

"""From segments to groups: which branches of a pass can share a batched product."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch

from seal_nb.ttt.bank import BankRow
from seal_nb.ttt.branches import Group, Plan, Segment
from seal_nb.ttt.lora import Adapter

STACKS_KEPT = 8


class Stacks:
    """Weights of frozen adapters side by side, (n, size); the last few are kept, since decoding asks again
    and again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], tuple[tuple[Adapter, ...], torch.Tensor]] = OrderedDict()

    def __call__(self, adapters: tuple[Adapter, ...]) -> torch.Tensor:
        if len(adapters) == 1:
            return adapters[0].compute[None]
        key = tuple(map(id, adapters))  # valid as long as the adapters, which are kept beside it
        if key not in self._kept:
            self._kept[key] = (adapters, torch.stack([a.compute for a in adapters]))
        self._kept.move_to_end(key)
        while len(self._kept) > STACKS_KEPT:
            self._kept.popitem(last=False)
        return self._kept[key][1]


def make_plan(segments: Sequence[Segment], stacks: Stacks) -> Plan:
    """Groups of all branches. Slots of one bank must lie in the order of their rows."""
    depth = max((len(s.adapters) for s in segments), default=0)
    groups = [g for k in range(depth) for g in _frozen_groups(segments, k, stacks)]
    return Plan(groups + list(_trained_groups(segments)))


def _runs(segments: Sequence[Segment], key: Callable[[Segment], object]) -> Iterator[list[Segment]]:
    """Runs of neighbouring segments (no token between them) of one key; None is left out."""
    for value, members in groupby(_numbered(segments), key=lambda pair: (pair[0], key(pair[1]))):
        if value[1] is not None:
            yield [s for _, s in members]


def _numbered(segments: Sequence[Segment]) -> Iterator[tuple[int, Segment]]:
    """Segments with the number of gaps before them."""
    gaps, last = 0, None
    for s in segments:
        gaps += last is not None and s.start != last
        last = s.stop
        yield gaps, s


def _frozen_groups(segments: Sequence[Segment], k: int, stacks: Stacks) -> Iterator[Group]:
    for run in _runs(segments, lambda s: s.adapters[k].layout if len(s.adapters) > k else None):
        adapters = tuple(s.adapters[k] for s in run)
        weights = stacks(adapters)
        scaling = torch.tensor([a.scaling for a in adapters], device=weights.device, dtype=weights.dtype)
        yield Group(
            layout=adapters[0].layout,
            weights=weights,
            scaling=scaling[:, None, None],
            start=run[0].start,
            lengths=tuple(s.stop - s.start for s in run),
        )


def _trained_groups(segments: Sequence[Segment]) -> Iterator[Group]:
    """Rows first..last of a bank as one operand; rows between that are not in this pass are members without
    tokens."""
    for run in _runs(segments, lambda s: s.trained and id(s.trained.bank)):
        rows = [s.trained for s in run if s.trained is not None]
        bank, first, last = rows[0].bank, rows[0].index, rows[-1].index + 1
        lengths = [0] * (last - first)
        for s, row in zip(run, rows, strict=True):
            lengths[row.index - first] = s.stop - s.start
        yield Group(
            layout=bank.layout,
            weights=bank.compute[first:last],
            scaling=bank.scaling[first:last],
            start=run[0].start,
            lengths=tuple(lengths),
            gradient=bank.gradient[first:last],
            overwrite=_overwritable(rows),
            dropouts=tuple((row.index - first, row) for row in rows if row.dropout),
        )


def _overwritable(rows: Sequence[BankRow]) -> bool:
    """Whether one copy may replace the gradients of all rows from first to last; else those that begin anew
    are cleared."""
    neighbours = len(rows) == rows[-1].index + 1 - rows[0].index
    if neighbours and all(row.opens_window for row in rows):
        return True
    for row in rows:
        if row.opens_window:
            row.gradient.zero_()
    return False

"""What each kernel gives and what a loop over the members gives. Triton must interpret: TRITON_INTERPRET=1."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from seal_nb.ttt import kernels

LENGTHS = (5, 0, 33, 64, 1, 0)  # of members: ragged, empty, whole tiles, the last one empty
WIDE = 80


def narrow(rank: int) -> tuple[Any, Any]:
    x, weights, scales = _draw(sum(LENGTHS), WIDE), _draw(len(LENGTHS), WIDE, rank).mT, _draw(sum(LENGTHS), 1)
    expected = torch.cat([x[own] @ weights[i].t() for i, own in _members()]) * scales
    return kernels.narrow(x, weights, scales, tiles()).numpy(), expected.numpy()


def widen(rank: int) -> tuple[Any, Any]:
    h, weights, y = _draw(sum(LENGTHS), rank), _draw(len(LENGTHS), rank, WIDE), _draw(sum(LENGTHS), WIDE)
    expected = y + torch.cat([h[own] @ weights[i] for i, own in _members()])
    kernels.widen(h, weights, y, tiles())
    return y.numpy(), expected.numpy()


def outer(rank: int, kept: Sequence[float] | None = None) -> tuple[Any, Any]:
    """Members without tokens keep what they had."""
    h, x, out = _draw(sum(LENGTHS), rank), _draw(sum(LENGTHS), WIDE), _draw(len(LENGTHS), WIDE, rank).mT
    expected = out.clone()
    for i, own in _members():
        if LENGTHS[i]:
            expected[i] = h[own].t() @ x[own] + (kept[i] * out[i] if kept else 0)
    ends = torch.tensor(list(accumulate(LENGTHS)), dtype=torch.int32)
    kernels.outer(h, x, out, ends, None if kept is None else torch.tensor(kept))
    return out.numpy(), expected.numpy()


def outer_kept(rank: int) -> tuple[Any, Any]:
    return outer(rank, (1.0, 1.0, 0.0, 1.0, 0.0, 0.0))


def tiles() -> Tensor:
    return torch.tensor(kernels.tiles_of(LENGTHS), dtype=torch.int32)


def _members() -> list[tuple[int, slice]]:
    return [(i, slice(a, b)) for i, (a, b) in enumerate(pairwise(accumulate(LENGTHS, initial=0)))]


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

"""Triton kernels of the low-rank branches, for CUDA: each member of a group multiplies its own tokens.

The idea is that of segmented gather products (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285), here with the
backward pass and sums in float32. benchmarks/gpu_log.md has the times of these and of torch's grouped_mm."""

import functools
import logging
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

TILE = 32  # tokens that a kernel takes at a time
SMALLEST_DOT = 16
SHARED_BYTES = 90_000  # shared memory that a tile may take; cards of capability 8.6 and 8.9 have 99 KiB
log = logging.getLogger(__name__)


@triton.jit
def _narrow(x, w, scales, h, tiles, n_wide, rank, x_row, w_member, w_rank, w_wide, h_row,  # type: ignore[no-untyped-def]
            TILE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    tile = tiles + 3 * tl.program_id(0)
    member, start, stop = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if start >= stop:
        return
    rows = start + tl.arange(0, TILE)
    r, wide = tl.arange(0, RANK), tl.arange(0, BLOCK)
    here = rows < stop
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    total = tl.zeros((TILE, RANK), tl.float32)
    for first in range(0, n_wide, BLOCK):
        k = first + wide
        xs = tl.load(x_rows + k[None, :], mask=here[:, None] & (k < n_wide)[None, :], other=0.0)
        ws = tl.load(w + member * w_member + r[None, :] * w_rank + k[:, None] * w_wide,
                     mask=(k < n_wide)[:, None] & (r < rank)[None, :], other=0.0)  # fmt: skip
        total += tl.dot(xs, ws, input_precision="ieee")
    scale = tl.load(scales + rows, mask=here, other=0.0)
    out = h + rows[:, None] * h_row + r[None, :]
    tl.store(out, (total * scale[:, None]).to(h.dtype.element_ty), mask=here[:, None] & (r < rank)[None, :])


@triton.jit
def _widen(h, w, y, tiles, n_wide, rank, h_row, w_member, w_rank, w_wide, y_row,  # type: ignore[no-untyped-def]
           TILE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    tile = tiles + 3 * tl.program_id(0)
    member, start, stop = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if start >= stop:
        return
    rows = start + tl.arange(0, TILE)
    r, k = tl.arange(0, RANK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = rows < stop
    hs = tl.load(h + rows[:, None] * h_row + r[None, :], mask=here[:, None] & (r < rank)[None, :], other=0.0)
    ws = tl.load(w + member * w_member + r[:, None] * w_rank + k[None, :] * w_wide,
                 mask=(r < rank)[:, None] & (k < n_wide)[None, :], other=0.0)  # fmt: skip
    out = y + rows.to(tl.int64)[:, None] * y_row + k[None, :]
    inside = here[:, None] & (k < n_wide)[None, :]
    total = tl.dot(hs, ws, input_precision="ieee") + tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _outer(h, x, out, ends, keep, n_wide, rank, h_row, x_row, out_member, out_rank, out_wide,  # type: ignore[no-untyped-def]
           KEEP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    member = tl.program_id(0)
    start = tl.load(ends + member - 1, mask=member > 0, other=0)
    stop = tl.load(ends + member)
    if start >= stop:
        return
    r, k = tl.arange(0, RANK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((RANK, BLOCK), tl.float32)
    for first in range(start, stop, TILE):
        rows = first + tl.arange(0, TILE)
        here = rows < stop
        hs = tl.load(h + rows[:, None] * h_row + r[None, :], mask=here[:, None] & (r < rank)[None, :], other=0.0)
        xs = tl.load(x + rows.to(tl.int64)[:, None] * x_row + k[None, :],
                     mask=here[:, None] & (k < n_wide)[None, :], other=0.0)  # fmt: skip
        total += tl.dot(tl.trans(hs), xs, input_precision="ieee")
    place = out + member.to(tl.int64) * out_member + r[:, None] * out_rank + k[None, :] * out_wide
    inside = (r < rank)[:, None] & (k < n_wide)[None, :]
    if KEEP:
        total += tl.load(keep + member) * tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether Triton can compile and run a kernel for this type here. It needs a C compiler."""
    try:
        one = torch.ones(1, SMALLEST_DOT, device="cuda", dtype=dtype)
        tiles = torch.tensor([[0, 0, 1]], device="cuda", dtype=torch.int32)
        return bool(narrow(one, one[None], torch.ones(1, 1, device="cuda"), tiles).item() == SMALLEST_DOT)
    except Exception as error:  # noqa: BLE001  # whatever is missing, a loop does the same
        log.warning("Triton does not work here, so adapters are computed one after the other: %s", error)
        return False


def fits(rank: int, itemsize: int) -> bool:
    """Whether tiles of this rank fit into a multiprocessor's shared memory."""
    return (TILE + SMALLEST_DOT) * _padded(rank) * itemsize <= SHARED_BYTES


def narrow(x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """scales · x Wᵀ of each member: x (tokens, wide), weights (n, rank, wide) → (tokens, rank)."""
    rank, wide = weights.shape[1:]
    h = x.new_empty(len(x), rank)
    column = (TILE + _padded(rank)) * x.itemsize
    block = _block(128, 0, 2 * column)
    _narrow[(len(tiles),)](
        x, weights, scales, h, tiles, wide, rank, x.stride(0), *weights.stride(), h.stride(0),
        TILE=TILE, BLOCK=block, RANK=_padded(rank), num_stages=min(4, SHARED_BYTES // (block * column)),
    )  # fmt: skip
    return h


def widen(h: torch.Tensor, weights: torch.Tensor, y: torch.Tensor, tiles: torch.Tensor) -> None:
    """y (tokens, wide) += h W of each member, in place: h (tokens, rank), weights (n, rank, wide)."""
    rank, wide = weights.shape[1:]
    column = _padded(rank) * y.itemsize
    block = _block(256, TILE * column, column)
    _widen[(len(tiles), triton.cdiv(wide, block))](
        h, weights, y, tiles, wide, rank, h.stride(0), *weights.stride(), y.stride(0),
        TILE=TILE, BLOCK=block, RANK=_padded(rank),
    )  # fmt: skip


def outer(h: torch.Tensor, x: torch.Tensor, out: torch.Tensor, ends: torch.Tensor, keep: torch.Tensor | None) -> None:
    """out (n, rank, wide) = hᵀ x of each member, plus keep · out where `keep` (n,) is given."""
    n, rank, wide = out.shape
    block, stage = 128, (_padded(rank) + 128) * TILE * x.itemsize
    _outer[(n, triton.cdiv(wide, block))](
        h, x, out, ends, ends if keep is None else keep, wide, rank, h.stride(0), x.stride(0), *out.stride(),
        KEEP=keep is not None, TILE=TILE, BLOCK=block, RANK=_padded(rank),
        num_stages=max(1, min(3, SHARED_BYTES // stage)),
    )  # fmt: skip


def _block(most: int, fixed_bytes: int, column_bytes: int) -> int:
    """The largest number of columns, a power of two, with which a tile fits into shared memory."""
    while most > SMALLEST_DOT and fixed_bytes + most * column_bytes > SHARED_BYTES:
        most //= 2
    return most


def _padded(rank: int) -> int:
    return max(SMALLEST_DOT, triton.next_power_of_2(rank))


def tiles_of(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(member, start, stop) of tiles of at most TILE tokens of one member each; then empty tiles, up to the most that
    so many members and tokens can have."""
    tiles, start = [], 0
    for member, n in enumerate(lengths):
        tiles += [(member, start + i, min(start + n, start + i + TILE)) for i in range(0, n, TILE)]
        start += n
    return tiles + [(0, 0, 0)] * (triton.cdiv(start, TILE) + len(lengths) - len(tiles))

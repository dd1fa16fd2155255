"""Rows laid end to end in one pass, and the attention that keeps them apart.

A pass is one (1, T) sequence of all rows' tokens, slot by slot: no padding in any matrix product. Only
attention sees rows: through the variable-length kernel (torch.nn.attention.varlen) on CUDA in half precision,
row by row elsewhere. Registered with transformers under the name `ATTENTION`, so any decoder that takes its
attention from there works unchanged. Knows nothing of adapters or loss.

Keys and values of the texts being decoded: written by a packed first pass, then a token at a time.

A row's place in the cache is its place in the batch. Between two calls of `arrange` a step works in place on
the same tensors, and no length is read from the device, so a step can be recorded and replayed. Knows nothing
of adapters or of what is generated.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from seal_nb.ttt.device import has_varlen, sent, tensor_on

ATTENTION = "seal_rows"
SHORT = 512  # tokens
# From torch 2.12 on, fewer key heads than query heads must be asked for.
GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
CAUSAL, ALL_KEYS = (-1, 0), (-1, -1)  # windows of varlen_attn: keys to the left, keys to the right


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Where a pass with computed padding has its real and its padding tokens, and how many each row has.

    own, pad: places (int64) in the pass; own_ends, pad_ends: (rows + 1,) int32, running sums from 0"""

    own: torch.Tensor
    pad: torch.Tensor
    own_ends: torch.Tensor
    pad_ends: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Row structure of a pass over T tokens.

    ends: (rows + 1,) int32, where each row ends, from 0; longest: at least the tokens of each row"""

    ends: torch.Tensor
    longest: int
    padding: Padding | None = None

    def attend(
        self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """q (1, heads, T, d), k and v (1, kv_heads, T, d) → (1, T, heads, d); causal within rows, and padding
        is seen by no token."""
        if not has_varlen(q.device, q.dtype, q.shape[-1]):
            return self._row_by_row(q, k, v, scaling)
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))  # (T, heads, d)
        n, p = self.longest, self.padding
        if p is None:
            return _varlen(q, k, v, self.ends, self.ends, n, scaling, CAUSAL)[None]
        keys, values = k[p.own], v[p.own]
        own = _varlen(q[p.own], keys, values, p.own_ends, p.own_ends, n, scaling, CAUSAL)
        pad = _varlen(q[p.pad], keys, values, p.pad_ends, p.own_ends, n, scaling, ALL_KEYS)
        return torch.empty_like(q).index_copy(0, p.own, own).index_copy(0, p.pad, pad)[None]

    def _row_by_row(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        qs, ks, vs = (t[0].split(self.lengths, dim=1) for t in (q, k, v))
        parts = zip(qs, ks, vs, self.biases, strict=True)
        causal = self.padding is None
        return torch.cat([_row_attention(a, b, c, bias, scaling, causal) for a, b, c, bias in parts])[None]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row; waits for the device."""
        return self.ends.diff().tolist()

    @cached_property
    def biases(self) -> list[torch.Tensor]:
        """For each row 0 where a token (down) sees another (across), -inf elsewhere: (n, n)."""
        n_real = self.lengths if self.padding is None else self.padding.own_ends.diff().tolist()
        shapes = list(zip(self.lengths, n_real, strict=True))
        by_shape = {}
        for n, real in set(shapes):
            by_shape[n, real] = torch.full((n, n), float("-inf"), device=self.ends.device).triu(1)
            by_shape[n, real][:, real:] = float("-inf")
        return [by_shape[shape] for shape in shapes]


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    longest: int,
    scaling: float,
    window: tuple[int, int],
) -> torch.Tensor:
    out = varlen_attn(q, k, v, q_ends, k_ends, longest, longest, scale=scaling, window_size=window, **GROUPED_HEADS)
    return cast(torch.Tensor, out)


def _row_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scaling: float, causal: bool
) -> torch.Tensor:
    """One row in two batched products: q (heads, n, d), k, v (kv_heads, n, d), bias (n, n) → (n, heads, d).
    causal: bias is a causal mask and nothing else.

    On a CPU, torch's flash kernel spends most of a short row in its tiles. Heads that share a key head are
    stacked as rows of one product.
    """
    heads, n, d = q.shape
    kv = len(k)
    if n > SHORT:
        out = F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if causal else bias.to(q.dtype),
            is_causal=causal,
            scale=scaling,
            enable_gqa=heads != kv,
        )
        return out[0].transpose(0, 1)
    shared = heads // kv * n
    stacked = bias.to(q.dtype).expand(heads // kv, n, n).reshape(1, shared, n)
    scores = torch.baddbmm(stacked, q.reshape(kv, shared, d), k.transpose(1, 2), alpha=scaling)
    p = scores.softmax(-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    return (p @ v).view(heads, n, d).transpose(0, 1)


def make_rows(lengths: Sequence[int], device: torch.device, *, n_real: Sequence[int] | None = None) -> Rows:
    """Structure for rows of these lengths. Tokens past `n_real` of a row (computed padding) see real tokens
    only."""
    real = tuple(lengths if n_real is None else n_real)
    pairs, starts = list(zip(lengths, real, strict=True)), accumulate(lengths, initial=0)
    padding = None
    if sum(lengths) > sum(real):
        places = [(range(s, s + r), range(s + r, s + n)) for s, (n, r) in zip(starts, pairs, strict=False)]
        padding = Padding(
            own=tensor_on(device, [i for own, _ in places for i in own], torch.long),
            pad=tensor_on(device, [i for _, pad in places for i in pad], torch.long),
            own_ends=_running_sum(real, device),
            pad_ends=_running_sum([n - r for n, r in pairs], device),
        )
    return Rows(ends=_running_sum(lengths, device), longest=max(lengths), padding=padding)


def _running_sum(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return tensor_on(device, list(accumulate(lengths, initial=0)), torch.int32)


Attend = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def _attention(  # type: ignore[no-untyped-def]  # transformers' attention interface
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, attend: Attend | None = None, **kwargs
):
    """transformers' attention interface; `attend` is handed through the model's forward."""
    if attend is None:
        raise RuntimeError(
            "its layers do not hand `attend` on to their attention, or its own forward was called in place of"
            " FrozenBase.run"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attend(module, query, key, value, scale), None


AttentionInterface.register(ATTENTION, _attention)


BLOCK = 32  # tokens: the room of all rows grows by this; a multiple of 16, as CUDA's kernels want the mask
# Without cuDNN's, which torch prefers on Hopper: it makes a plan, about 30 ms, for each new shape of a batch.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Cache:
    """Keys and values of live rows: a (rows, room, kv_heads, d) tensor a layer, tokens at the left.

    positions (rows,): of each row's newest token; places (rows,): where it lies among all (rows * room)
    mask (rows, 1, 1, room): 0 where a row has a token, else -inf
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.device, self.dtype = device, dtype
        self.n_rows = self.room = 0

    def arrange(self, old_rows: Sequence[int | None], lengths: Sequence[int]) -> int:
        """Row i becomes what row old_rows[i] was (None: empty), with lengths[i] tokens, those of its first
        pass included. Returns for how many steps there is room."""
        room = (max(lengths) // BLOCK + 1) * BLOCK
        if room != self.room or list(old_rows) != list(range(self.n_rows)):
            self._move(old_rows, room)
        self.positions = self._index(lengths) - 1
        self.places = self.positions + torch.arange(self.n_rows, device=self.device) * room
        unseen = torch.arange(room, device=self.device) > self.positions[:, None]
        mask = torch.zeros(self.n_rows, room, device=self.device, dtype=self.dtype)
        self.mask = mask.masked_fill_(unseen, float("-inf"))[:, None, None]
        return room - max(lengths)

    def _move(self, old_rows: Sequence[int | None], room: int) -> None:
        self.n_rows, self.room = len(old_rows), room
        chosen = self._index([row or 0 for row in old_rows])
        empty = self._index([i for i, row in enumerate(old_rows) if row is None])
        for side in (self.keys, self.values):
            for layer in side:
                kept = side[layer][:, : self.room].index_select(0, chosen).index_fill_(0, empty, 0)
                missing = self.room - kept.shape[1]
                side[layer] = F.pad(kept, (0, 0, 0, 0, 0, missing)) if missing else kept

    def advance(self) -> None:
        """Make each row one token longer; the pass that follows fills in its keys and values."""
        self.positions += 1
        self.places += 1
        self.mask.view(-1).index_fill_(0, self.places, 0)

    def attend(
        self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of a step: each row's new token sees the row's tokens. Query heads that share a key head
        are queries of one head, so that no key is repeated."""
        keys, values = self._write(layer, k, v, self.places)
        out = F.scaled_dot_product_attention(
            q[0].transpose(0, 1).unflatten(1, (k.shape[1], -1)),  # (rows, kv_heads, heads / kv_heads, d)
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self.mask,
            scale=scaling,
        )
        return out.flatten(1, 2)[None]

    def prefill(self, rows: Rows, lengths: Sequence[int], at: Sequence[int]) -> Attend:
        """Attention of the first pass of `rows`; their keys and values go to rows `at` of the cache."""
        places = torch.cat([torch.arange(n) + i * self.room for i, n in zip(at, lengths, strict=True)])
        places = sent(places, self.device)

        def attend(layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            self._write(layer, k, v, places)
            return rows.attend(layer, q, k, v, scaling)

        return attend

    def _write(self, layer: nn.Module, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor]:
        """Tokens k, v (1, kv_heads, T, d) to their places; a layer's tensors are made at its first call."""
        index: int = layer.layer_idx  # type: ignore[assignment]
        for side, new in ((self.keys, k), (self.values, v)):
            tokens = new[0].transpose(0, 1)
            if index not in side:
                side[index] = tokens.new_zeros(self.n_rows, self.room, *tokens.shape[1:])
            side[index].view(-1, *tokens.shape[1:]).index_copy_(0, places, tokens)
        return [self.keys[index], self.values[index]]

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return tensor_on(self.device, values, torch.long)

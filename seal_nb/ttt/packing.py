"""Rows laid end to end in one pass, and the attention that keeps them apart.

A pass is one (1, T) sequence of all rows' tokens, slot by slot: no padding in any matrix product. Only
attention, a few per cent of the work, sees rows: as a batch padded to the longest row, or, on CUDA in half
precision, through variable-length attention (torch.nn.attention.varlen) without any padding. Registered
with transformers under the name `ATTENTION`, so any decoder that takes its attention from there works
unchanged. Knows nothing of adapters or loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "seal_rows"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Row structure of a pass over T tokens.

    lengths: tokens of each row; places: (T,) where each token lies in the padded batch (row * longest +
    offset)
    mask: (rows, 1, longest, longest) bool or None for plain causal attention; cu_lengths: (rows + 1,) int32
    """

    lengths: tuple[int, ...]
    places: torch.Tensor
    cu_lengths: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def attend(
        self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """q (1, heads, T, d), k and v (1, kv_heads, T, d) → (1, T, heads, d); causal within rows."""
        if not q.is_cuda and self.longest <= SHORT:
            return self._attend_row_by_row(q, k, v, scaling)
        if len(self.lengths) == 1 and self.mask is None:
            return _sdpa(q, k, v, None, scaling).transpose(1, 2)
        if q.is_cuda and self.mask is None and q.dtype in (torch.bfloat16, torch.float16):
            return self._attend_varlen(q, k, v, scaling)
        q, k, v = (self.padded(t[0].transpose(0, 1)) for t in (q, k, v))
        out = _sdpa(q, k, v, self.mask, scaling)  # (rows, heads, longest, d)
        return _Unpad.apply(out.transpose(1, 2).flatten(0, 1), self.places)[None]

    def _attend_row_by_row(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        qs, ks, vs = (t[0].split(self.lengths, dim=1) for t in (q, k, v))
        parts = zip(qs, ks, vs, self.biases, strict=True)
        rows = [_short_attention(a, b, c, bias.to(q.dtype), scaling) for a, b, c, bias in parts]
        return torch.cat(rows)[None]

    @cached_property
    def biases(self) -> list[torch.Tensor]:
        """For each row 0 where a token (down) sees another (across), -inf elsewhere: (n, n)."""
        by_length = {n: torch.full((n, n), float("-inf")).triu(1) for n in set(self.lengths)}
        if self.mask is None:
            return [by_length[n] for n in self.lengths]
        unseen = ~self.mask[:, 0]
        return [
            by_length[n].masked_fill(unseen[row, :n, :n], float("-inf")) for row, n in enumerate(self.lengths)
        ]

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, heads, d) → (rows, heads, longest, d), zeros where a row is shorter."""
        n = len(self.lengths)
        return (
            _Pad.apply(tokens, self.places, n * self.longest).unflatten(0, (n, self.longest)).transpose(1, 2)
        )

    def _attend_varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        repeats = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (k, v))
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))  # (T, heads, d)
        cu, n = self.cu_lengths, self.longest
        out = varlen_attn(q, k, v, cu, cu, n, n, scale=scaling, window_size=(-1, 0))
        return cast(torch.Tensor, out).unsqueeze(0)


SHORT = 512  # tokens


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scaling: float
) -> torch.Tensor:
    """One row in two batched products: q (heads, n, d), k, v (kv_heads, n, d), bias (n, n) → (n, heads, d).

    On a CPU, torch's flash kernel spends most of a short row in its tiles. Heads that share a key head are
    stacked as rows of one product.
    """
    heads, n, d = q.shape
    kv = len(k)
    stacked = bias.expand(heads // kv, n, n).reshape(1, -1, n)
    scores = torch.baddbmm(stacked, q.reshape(kv, -1, d), k.transpose(1, 2), alpha=scaling)
    p = scores.softmax(-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    return (p @ v).view(heads, n, d).transpose(0, 1)


class _Pad(torch.autograd.Function):
    """(T, …) → (n, …): each token at its own place, zeros elsewhere. Places are distinct, so its inverse is
    a gather."""

    @staticmethod
    def forward(ctx, tokens, places, n):  # type: ignore[no-untyped-def]  # torch's signature
        ctx.save_for_backward(places)
        return tokens.new_zeros(n, *tokens.shape[1:]).index_copy_(0, places, tokens)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """(n, …) → (T, …): the inverse of _Pad."""

    @staticmethod
    def forward(ctx, padded, places):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(places)
        ctx.n = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        zeros = grad.new_zeros(ctx.n, *grad.shape[1:])
        return zeros.index_copy_(0, ctx.saved_tensors[0], grad), None


def make_rows(lengths: Sequence[int], device: torch.device, *, n_real: Sequence[int] | None = None) -> Rows:
    """Structure for rows of these lengths. Tokens past `n_real` of a row (computed padding) see real tokens
    only."""
    longest = max(lengths)
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
    cu_lengths = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    mask = None
    if n_real is not None and any(r < n for r, n in zip(n_real, lengths, strict=True)):
        real_keys = torch.arange(longest) < torch.tensor(n_real)[:, None]  # (rows, longest)
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        mask = (causal & real_keys[:, None, :])[:, None].to(device)
    return Rows(lengths=tuple(lengths), places=places.to(device), cu_lengths=cu_lengths.to(device), mask=mask)


Attend = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def _attention(  # type: ignore[no-untyped-def]  # transformers' attention interface
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    attend: Attend | None = None,
    **kwargs,
):
    """transformers' attention interface; `attend` is handed through the model's forward."""
    if attend is None:
        raise RuntimeError(
            "a base prepared for slots runs through FrozenBase.hidden, not through the model's own forward"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attend(module, query, key, value, scale), None


AttentionInterface.register(ATTENTION, _attention)

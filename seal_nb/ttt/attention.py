"""Attention for packed rows (`Rows`) and for decoding with a KV cache (`Cache`).

A pass is one (1, T) sequence of all rows' tokens, end to end; only attention keeps rows apart. It is registered with
transformers as `ATTENTION`, so any decoder that takes its attention from there works unchanged.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from seal_nb.ttt.device import has_varlen, sent, tensor_on

ATTENTION = "seal_rows"
SHORT = 512  # tokens; up to here the plain product, which rounds less and takes a third of the time in bfloat16
# From torch 2.12 on, fewer key heads than query heads must be asked for.
GROUPED_HEADS: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
CAUSAL, ALL_KEYS = (-1, 0), (-1, -1)  # windows of varlen_attn: keys to the left, keys to the right
BLOCK = 32  # tokens by which the cache of all rows grows; a multiple of 16, as CUDA's kernels want the mask
# Without cuDNN's, which torch prefers on Hopper: it makes a plan, about 30 ms, for each new shape of a batch.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Called with a layer, its q (1, heads, T, d), k and v (1, kv_heads, T, d) and the scale → (1, T, heads, d)
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, float], Tensor]


class Rows:
    """Rows of a pass. Tokens past `n_real` of a row are padding, which attends to real tokens only. longest: no
    row has more tokens; 0: the number of tokens of the longest row"""

    def __init__(
        self, lengths: Sequence[int], device: torch.device, *, n_real: Sequence[int] | None = None, longest: int = 0
    ):
        self.ends, self.longest = _running_sum(lengths, device), longest or max(lengths)
        # With padding, the places (int64) of real and of padding tokens, and running sums like `ends`.
        self.real = self.padding = None
        if n_real is not None and sum(lengths) > sum(n_real):
            n_padding = [n - r for n, r in zip(lengths, n_real, strict=True)]
            is_real = torch.tensor([i < r for n, r in zip(lengths, n_real, strict=True) for i in range(n)])
            self.real = sent(is_real.nonzero()[:, 0], device), _running_sum(n_real, device)
            self.padding = sent((~is_real).nonzero()[:, 0], device), _running_sum(n_padding, device)

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Causal attention within rows. No token attends to padding."""
        if not has_varlen(q.device, q.dtype, q.shape[-1]):
            return self._row_by_row(q, k, v, scaling)
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))  # (T, heads, d)
        n = self.longest
        varlen: Callable[..., Any] = partial(varlen_attn, max_q=n, max_k=n, scale=scaling, **GROUPED_HEADS)
        if self.real is None or self.padding is None:
            return varlen(q, k, v, self.ends, self.ends, window_size=CAUSAL)[None]
        (real, real_ends), (padding, padding_ends) = self.real, self.padding
        keys, values = k[real], v[real]
        out = varlen(q[real], keys, values, real_ends, real_ends, window_size=CAUSAL)
        padding_out = varlen(q[padding], keys, values, padding_ends, real_ends, window_size=ALL_KEYS)
        return torch.empty_like(q).index_copy(0, real, out).index_copy(0, padding, padding_out)[None]

    def _row_by_row(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        qs, ks, vs = (t.split(self.lengths, dim=2) for t in (q, k, v))
        product = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        out = []
        for a, b, c, mask in zip(qs, ks, vs, self.masks, strict=True):
            with sdpa_kernel(SDPBackend.MATH if a.shape[2] <= SHORT else KERNELS):
                out.append(product(a, b, c, mask, is_causal=mask is None))
        return torch.cat(out, 2).transpose(1, 2)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row. Waits for the device."""
        return self.ends.diff().tolist()

    @cached_property
    def masks(self) -> Sequence[Tensor | None]:
        """For each row a matrix that says which token (down) attends to which other (across); None: causal."""
        if self.real is None:
            return [None] * len(self.lengths)
        masks = [torch.ones(n, n, dtype=torch.bool, device=self.ends.device).tril_() for n in self.lengths]
        for mask, n_real in zip(masks, self.real[1].diff().tolist(), strict=True):
            mask[:, n_real:] = False
        return masks


def _running_sum(lengths: Sequence[int], device: torch.device) -> Tensor:
    return tensor_on(device, list(accumulate(lengths, initial=0)), torch.int32)


def _attention(  # type: ignore[no-untyped-def]  # transformers' attention interface
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, attend: Attend | None = None, **kwargs
):
    """transformers' attention interface. The model's forward passes `attend` on to its layers."""
    if attend is None:
        missing = "its layers do not pass `attend` on to their attention"
        raise RuntimeError(f"{missing}, or its own forward was called instead of FrozenBase.run")
    return attend(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(ATTENTION, _attention)


class Cache:
    """Keys and values of the rows being decoded: (rows, room, kv_heads, d) of each layer, tokens at the left. Between
    two calls of `arrange` a step works in place on the same tensors, so it can be recorded and replayed."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.device, self.dtype = device, dtype
        self.n_rows = self.room = 0

    def arrange(self, old_rows: Sequence[int | None], lengths: Sequence[int]) -> int:
        """Move row old_rows[i] (None: empty) to row i, which has lengths[i] tokens, including those of its first pass.
        Returns the number of steps for which there is room."""
        room = (max(lengths) // BLOCK + 1) * BLOCK
        if room != self.room or list(old_rows) != list(range(self.n_rows)):
            self._move(old_rows, room)
        self.positions = tensor_on(self.device, lengths, torch.long) - 1  # (rows,) of each row's newest token
        self.places = self.positions + torch.arange(self.n_rows, device=self.device) * room  # among all rows * room
        unseen = torch.arange(room, device=self.device) > self.positions[:, None]
        mask = torch.zeros(self.n_rows, room, device=self.device, dtype=self.dtype)
        self.mask = mask.masked_fill_(unseen, float("-inf"))[:, None, None]  # (rows, 1, 1, room)
        return room - max(lengths)

    def _move(self, old_rows: Sequence[int | None], room: int) -> None:
        self.n_rows, self.room = len(old_rows), room
        chosen = tensor_on(self.device, [row or 0 for row in old_rows], torch.long)
        empty = tensor_on(self.device, [i for i, row in enumerate(old_rows) if row is None], torch.long)
        for side in (self.keys, self.values):
            for layer in side:
                kept = side[layer][:, : self.room].index_select(0, chosen).index_fill_(0, empty, 0)
                missing = self.room - kept.shape[1]
                side[layer] = F.pad(kept, (0, 0, 0, 0, 0, missing)) if missing else kept

    def advance(self) -> None:
        """Make each row one token longer; the next pass writes the token's keys and values."""
        self.positions += 1
        self.places += 1
        self.mask.view(-1).index_fill_(0, self.places, 0)

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Attention of a step: each row's new token attends to the row's tokens. Query heads that share a key head are
        queries of one head, so that no key is repeated."""
        keys, values = self._write(layer, k, v, self.places)
        out = F.scaled_dot_product_attention(
            q[0].transpose(0, 1).unflatten(1, (k.shape[1], -1)),  # (rows, kv_heads, heads / kv_heads, d)
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self.mask,
            scale=scaling,
        )
        return out.flatten(1, 2)[None]

    def prefill(self, lengths: Sequence[int], at: Sequence[int]) -> Attend:
        """Attention of the first pass of rows of these lengths; their keys and values go to rows `at` of the cache."""
        places = torch.cat([torch.arange(n) + i * self.room for i, n in zip(at, lengths, strict=True)])
        places, rows = sent(places, self.device), Rows(lengths, self.device)

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
            self._write(layer, k, v, places)
            return rows.attend(layer, q, k, v, scaling)

        return attend

    def _write(self, layer: nn.Module, k: Tensor, v: Tensor, places: Tensor) -> list[Tensor]:
        """Write tokens k, v (1, kv_heads, T, d) to their places. A layer's tensors are made at its first call."""
        index: int = layer.layer_idx  # type: ignore[assignment]
        for side, new in ((self.keys, k), (self.values, v)):
            tokens = new[0].transpose(0, 1)
            if index not in side:
                side[index] = tokens.new_zeros(self.n_rows, self.room, *tokens.shape[1:])
            side[index].view(-1, *tokens.shape[1:]).index_copy_(0, places, tokens)
        return [self.keys[index], self.values[index]]

"""Attention for packed rows (`Rows`) and for decoding with a KV cache (`Cache`).

A pass is one (1, T) sequence of all rows' tokens, end to end; only attention keeps rows apart. It is registered with
transformers as `ATTENTION`, so any decoder that takes its attention from there works unchanged."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from seal_nb.ttt.device import has_varlen, sent, tensor_on, wide

ATTENTION = "seal_rows"
HALF = (torch.bfloat16, torch.float16)
SHORT = 512  # tokens; in HALF, up to here the plain product, which rounds less and takes a third of the time
ALL_KEYS = (-1, -1)  # a window of varlen_attn: keys to the left, keys to the right
BLOCK = 32  # tokens by which the cache of all rows grows at least; a multiple of 16, as CUDA's kernels want the mask
# Without cuDNN's, which torch prefers on Hopper: it makes a plan, about 30 ms, for each new shape of a batch.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class How(NamedTuple):
    """How a layer attends."""

    scale: float
    window: int | None = None  # tokens that a token attends to, itself included; None: all before it
    softcap: float | None = None  # tanh keeps scores between -softcap and softcap (Gemma-2)


# Called with a layer, its q (1, heads, T, d), k and v (1, kv_heads, T, d) → (1, T, heads, d)
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, How], Tensor]
ATTEND: ContextVar[Attend | None] = ContextVar("ATTEND", default=None)  # of the pass that is running
# Arguments of transformers' attention interface that change its result and are not known here.
UNKNOWN = ("s_aux", "position_bias")


class Rows:
    """Rows of a pass, of these numbers of tokens. n_real: tokens before a row's padding, which attends to these only;
    empty: no row has padding. longest: no row has more tokens; 0: the number of tokens of the longest row"""

    def __init__(self, lengths: Sequence[int], device: torch.device, *, n_real: Sequence[int] = (), longest: int = 0):
        self.ends, self.longest = _running_sum(lengths, device), longest or max(lengths)
        self.masks: dict[int | None, list[Tensor | None]] = {}  # by window, see `_masks`
        # With padding, the places (int64) of real and of padding tokens, and running sums like `ends`.
        self.real = self.padding = None
        if n_real and sum(lengths) > sum(n_real):
            n_padding = [n - r for n, r in zip(lengths, n_real, strict=True)]
            is_real = torch.tensor([i < r for n, r in zip(lengths, n_real, strict=True) for i in range(n)])
            self.real = sent(is_real.nonzero()[:, 0], device), _running_sum(n_real, device)
            self.padding = sent((~is_real).nonzero()[:, 0], device), _running_sum(n_padding, device)

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """Causal attention within rows. No token attends to padding."""
        if how.softcap or q.shape[-1] != v.shape[-1] or not has_varlen(q.device, q.dtype, q.shape[-1]):
            return self._row_by_row(q, k, v, how)
        q, k, v = (t.squeeze(0).transpose(0, 1).contiguous() for t in (q, k, v))  # (T, heads, d)
        n, causal = self.longest, ((how.window or 0) - 1, 0)
        varlen: Callable[..., Any] = partial(varlen_attn, max_q=n, max_k=n, scale=how.scale, enable_gqa=True)
        if self.real is None or self.padding is None:
            return varlen(q, k, v, self.ends, self.ends, window_size=causal)[None]
        (real, real_ends), (padding, padding_ends) = self.real, self.padding
        keys, values = k[real], v[real]
        out = varlen(q[real], keys, values, real_ends, real_ends, window_size=causal)
        padding_out = varlen(q[padding], keys, values, padding_ends, real_ends, window_size=ALL_KEYS)
        return torch.empty_like(q).index_copy(0, real, out).index_copy(0, padding, padding_out)[None]

    def _row_by_row(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        out = []
        qs, ks, vs = (t.split(self.lengths, dim=2) for t in (q, k, v))
        for a, b, c, mask in zip(qs, ks, vs, self._masks(how.window), strict=True):
            short = q.dtype in HALF and a.shape[2] <= SHORT
            with sdpa_kernel(SDPBackend.MATH if short else KERNELS):
                out.append(_product(a, b, c, mask, how).transpose(1, 2))
        return torch.cat(out, 1)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row. Waits for the device."""
        return self.ends.diff().tolist()

    def _masks(self, window: int | None) -> list[Tensor | None]:
        """For each row (n, n), True where the token of the first index attends to that of the second; None: causal."""
        if window not in self.masks:
            n_real = self.lengths if self.real is None else self.real[1].diff().tolist()
            self.masks[window] = [self._mask(n, r, window) for n, r in zip(self.lengths, n_real, strict=True)]
        return self.masks[window]

    def _mask(self, n: int, n_real: int, window: int | None) -> Tensor | None:
        if n == n_real and n <= (window or n):
            return None
        mask = torch.ones(n, n, dtype=torch.bool, device=self.ends.device).tril_()
        mask[:, n_real:] = False
        return mask.triu_(1 - window) if window else mask


def _product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: How) -> Tensor:
    """q (b, heads, n, d), k and v (b, kv_heads, m, d) → (b, heads, n, d). mask: what may be attended to, or what is
    added to the scores; None: causal"""
    if how.softcap is None:
        causal, grouped = mask is None, q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=how.scale, enable_gqa=grouped)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril_()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    scores = how.softcap * torch.tanh((q @ k.transpose(-1, -2)) * (how.scale / how.softcap)) + mask
    return scores.softmax(-1, dtype=wide(q.dtype)).to(v.dtype) @ v


def _running_sum(lengths: Sequence[int], device: torch.device) -> Tensor:
    return tensor_on(device, list(accumulate(lengths, initial=0)), torch.int32)


def _attention(  # type: ignore[no-untyped-def]  # transformers' attention interface
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **kwargs
):
    attend = ATTEND.get()
    if attend is None:
        raise RuntimeError("the model's own forward was called instead of FrozenBase.run")
    if unknown := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise RuntimeError(f"its attention uses {unknown[0]}, which is not known here")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise RuntimeError("its attention is not causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(module, query, key, value, How(scale, sliding_window, softcap)), None


AttentionInterface.register(ATTENTION, _attention)


class Cache:
    """Keys and values of the rows being decoded: (rows, room, kv_heads, d) of each layer, tokens at the left. Between
    two calls of `arrange` a step works in place on the same tensors, so it can be recorded and replayed."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.masks: dict[int | None, Tensor] = {}  # (rows, 1, 1, room) of each kind of window, added to scores
        self.device, self.dtype = device, dtype
        self.n_rows = self.room = 0

    def arrange(self, old_rows: Sequence[int | None], lengths: Sequence[int]) -> int:
        """Move row old_rows[i] (None: empty) to row i, which has lengths[i] tokens, including those of its first pass.
        Returns the number of steps for which there is room."""
        n = max(lengths)
        block = BLOCK * max(1, n // (4 * BLOCK))  # a quarter, since all rows are copied when the cache grows
        room = self.room if n < self.room <= n + block else (n // block + 1) * block
        if room != self.room or list(old_rows) != list(range(self.n_rows)):
            self._move(old_rows, room)
        self.positions = tensor_on(self.device, lengths, torch.long) - 1  # (rows,) of each row's newest token
        self.places = self.positions + torch.arange(self.n_rows, device=self.device) * room  # among all rows * room
        behind = self.positions[:, None] - torch.arange(room, device=self.device)  # (rows, room)
        for window in self.masks:
            unseen = (behind < 0) | (behind >= (window or room))
            mask = torch.zeros(self.n_rows, room, device=self.device, dtype=self.dtype)
            self.masks[window] = mask.masked_fill_(unseen, float("-inf"))[:, None, None]
        return room - n

    def _move(self, old_rows: Sequence[int | None], room: int) -> None:
        self.n_rows, self.room = len(old_rows), room
        only_grows = list(old_rows) == list(range(len(old_rows)))
        chosen = tensor_on(self.device, [row or 0 for row in old_rows], torch.long)
        empty = tensor_on(self.device, [i for i, row in enumerate(old_rows) if row is None], torch.long)
        for side in (self.keys, self.values):
            for layer in side:
                kept = side[layer][:, : self.room]
                missing = self.room - kept.shape[1]
                if not (only_grows and missing):
                    kept = kept.index_select(0, chosen).index_fill_(0, empty, 0)
                side[layer] = F.pad(kept, (0, 0, 0, 0, 0, missing)) if missing else kept

    def advance(self) -> None:
        """Make each row one token longer; the next pass writes the token's keys and values."""
        self.positions += 1
        self.places += 1
        for window, mask in self.masks.items():
            mask.view(-1).index_fill_(0, self.places, 0)
            if window is not None:  # the token before the window is out of sight; place 0 stays, if there is none
                last = self.positions - window
                value = torch.zeros_like(last, dtype=mask.dtype).masked_fill_(last >= 0, float("-inf"))
                mask.view(-1).index_copy_(0, self.places - self.positions + last.clamp_(min=0), value)

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """Attention of a step: each row's new token attends to the row's tokens. Query heads that share a key head are
        queries of one head, so that no key is repeated."""
        keys, values = self._write(layer, k, v, self.places)
        queries = q[0].transpose(0, 1).unflatten(1, (k.shape[1], -1))  # (rows, kv_heads, heads / kv_heads, d)
        out = _product(queries, keys.transpose(1, 2), values.transpose(1, 2), self.masks[how.window], how)
        return out.flatten(1, 2)[None]

    def prefill(self, lengths: Sequence[int], at: Sequence[int]) -> Attend:
        """Attention of the first pass of rows of these lengths; their keys and values go to rows `at` of the cache."""
        places = torch.cat([torch.arange(n) + i * self.room for i, n in zip(at, lengths, strict=True)])
        places, rows = sent(places, self.device), Rows(lengths, self.device)

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
            self._write(layer, k, v, places)
            self.masks.setdefault(how.window, torch.empty(0))  # made by `arrange`, before the first step
            return rows.attend(layer, q, k, v, how)

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

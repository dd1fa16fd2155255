"""Keys and values of the texts being decoded: written by a packed first pass, then a token at a time.

A row's place in the cache is its place in the batch. Between two calls of `arrange` a step works in place on
the same tensors, and no length is read from the device, so a step can be recorded and replayed. Knows nothing
of adapters or of what is generated."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from seal_nb.ttt.device import sent, tensor_on
from seal_nb.ttt.packing import Attend, Rows

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

        def attend(
            layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
        ) -> torch.Tensor:
            self._write(layer, k, v, places)
            return rows.attend(layer, q, k, v, scaling)

        return attend

    def _write(
        self, layer: nn.Module, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor
    ) -> list[torch.Tensor]:
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

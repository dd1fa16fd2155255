"""Keys and values of the texts being decoded: filled by a packed first pass, then a token at a time.

Rows join and leave; a row's place in the cache is its place in the batch. Knows nothing of adapters or of
what is generated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from seal_nb.ttt.packing import Attend, Rows


@dataclass
class Cache:
    """Keys and values of live rows: a (rows, kv_heads, room, d) tensor a layer, tokens at the left; lengths
    (rows,)."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths: torch.Tensor

    @classmethod
    def empty(cls) -> "Cache":
        return cls([], [], torch.zeros(0, dtype=torch.long))

    def joined(self, other: "Cache") -> "Cache":
        if not len(self.lengths):
            return other
        room = max(self.keys[0].shape[2], other.keys[0].shape[2])
        pairs = [
            [torch.cat([_widened(a, room), _widened(b, room)]) for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in ((self.keys, other.keys), (self.values, other.values))
        ]
        return Cache(pairs[0], pairs[1], torch.cat([self.lengths, other.lengths]))

    def selected(self, rows: Sequence[int]) -> "Cache":
        index = torch.tensor(rows, device=self.lengths.device, dtype=torch.long)
        longest = int(self.lengths[index].max()) if len(rows) else 0
        kept = [[t[index, :, :longest] for t in side] for side in (self.keys, self.values)]
        return Cache(kept[0], kept[1], self.lengths[index])

    def opened(self, room: int) -> Attend:
        """The attention of one step: each row's new token is written after its last one and sees the row's
        tokens."""
        if self.keys[0].shape[2] < room:
            self.keys = [_widened(t, room) for t in self.keys]
            self.values = [_widened(t, room) for t in self.values]
        seen = int(self.lengths.max()) + 1
        mask = (torch.arange(seen, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]
        rows = torch.arange(len(self.lengths), device=self.lengths.device)

        def attend(
            layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
        ) -> torch.Tensor:
            keys, values = self.keys[layer.layer_idx], self.values[layer.layer_idx]  # type: ignore[index]
            keys[rows, :, self.lengths] = k[0].transpose(0, 1)
            values[rows, :, self.lengths] = v[0].transpose(0, 1)
            out = F.scaled_dot_product_attention(
                q[0].transpose(0, 1)[:, :, None],  # (rows, heads, 1, d)
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=mask,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            return out[:, :, 0][None]

        return attend


def _widened(t: torch.Tensor, room: int) -> torch.Tensor:
    return F.pad(t, (0, 0, 0, room - t.shape[2])) if t.shape[2] < room else t


class Prefill:
    """Attention of the first pass, which keeps each layer's keys and values."""

    def __init__(self, rows: Rows, lengths: Sequence[int]):
        self.rows, self.lengths = rows, lengths
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def attend(
        self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        self.keys.append(self.rows.padded(k[0].transpose(0, 1)))
        self.values.append(self.rows.padded(v[0].transpose(0, 1)))
        return self.rows.attend(layer, q, k, v, scaling)

    def cache(self, device: torch.device) -> Cache:
        return Cache(self.keys, self.values, torch.tensor(self.lengths, device=device))

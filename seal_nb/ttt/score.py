"""Soft scores: log-probability of a given text after a prompt, with or without adapters, in one forward pass.

Needs no generation and no grader, and moves before 0/1 verdicts do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from seal_nb.ttt.base import FrozenBase, RowTokens
from seal_nb.ttt.branches import Segment
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.loss import token_logprobs


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A prompt and the text whose tokens are scored."""

    prompt_ids: Sequence[int]
    target_ids: Sequence[int]
    adapters: tuple[Adapter, ...] = ()


@torch.no_grad()
def score(base: FrozenBase, rows: Sequence[ScoreRow], *, token_budget: int = 4096) -> list[list[float]]:
    """Log-probabilities in nats of each row's target tokens, in order."""
    results: list[list[float]] = []
    chunk: list[ScoreRow] = []
    for row in rows:
        if chunk and sum(map(_length, chunk)) + _length(row) > token_budget:
            results += _score_halving(base, chunk)
            chunk = []
        chunk.append(row)
    return results + (_score_halving(base, chunk) if chunk else [])


def _score_halving(base: FrozenBase, rows: list[ScoreRow]) -> list[list[float]]:
    """Score in one pass, or in halves where the memory does not suffice."""
    try:
        return _score_chunk(base, rows)
    except torch.OutOfMemoryError:
        pass
    base.make_room()
    if len(rows) == 1:
        return _score_chunk(base, rows)
    half = len(rows) // 2
    return _score_halving(base, rows[:half]) + _score_halving(base, rows[half:])


def _length(row: ScoreRow) -> int:
    return len(row.prompt_ids) + len(row.target_ids)


def _score_chunk(base: FrozenBase, rows: list[ScoreRow]) -> list[list[float]]:
    tokens, segments, sources, start = [], [], [], 0
    for row in rows:
        tokens.append(RowTokens.plain([*row.prompt_ids, *row.target_ids]))
        if row.adapters:
            segments.append(Segment(start=start, stop=start + _length(row), adapters=row.adapters))
        first = start + len(row.prompt_ids) - 1
        sources.append(torch.arange(first, first + len(row.target_ids)))
        start += _length(row)
    hidden = base.hidden(tokens, segments)
    targets = torch.tensor([t for row in rows for t in row.target_ids], device=base.device)
    found = token_logprobs(hidden[torch.cat(sources).to(base.device)], base.head, targets)
    return [part.tolist() for part in found.split([len(row.target_ids) for row in rows])]

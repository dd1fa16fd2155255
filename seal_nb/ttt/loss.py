"""The loss: cross entropy of the next token from hidden states (`weighted_nll`), and soft scores (`score`).

Logits are made in chunks, and since the head is frozen, so is the gradient by the hidden states, in the forward pass
(the idea of fused linear cross entropy, Liger Kernel, arXiv 2410.10989). A soft score takes no generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.device import region
from seal_nb.ttt.lora import Adapter

CHUNK = 1024  # labels


@region
def _nll_and_grad(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """nll (labels,), and the gradient of weights · nll by the logits (labels, vocabulary), in the logits' dtype."""
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
    norm = wide.logsumexp(-1, keepdim=True)
    nll = norm[:, 0] - wide.gather(1, targets[:, None])[:, 0]
    hit = torch.arange(wide.shape[1], device=wide.device)[None] == targets[:, None]
    grad = wide.sub_(norm).exp_().sub_(hit.to(wide.dtype)).mul_(weights[:, None].to(wide.dtype))
    return nll, grad.to(logits.dtype)


class _WeightedNll(torch.autograd.Function):
    """(Σ weights · nll, nll) of hidden (M, d), head, targets (M,), weights (M,). Only the sum can be differentiated, by
    hidden."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights):  # type: ignore[no-untyped-def]  # torch's signature
        parts, grad = [], torch.empty_like(hidden)
        for i in range(0, len(targets), CHUNK):
            part = slice(i, i + CHUNK)
            logits = F.linear(hidden[part], head.weight, head.bias)
            nll, grad_logits = _nll_and_grad(logits, targets[part], weights[part])
            grad[part] = grad_logits @ head.weight
            parts.append(nll)
        ctx.save_for_backward(grad)
        nll = torch.cat(parts) if parts else weights.new_zeros(0)
        ctx.mark_non_differentiable(nll)
        return (nll * weights.to(nll.dtype)).sum(), nll

    @staticmethod
    def backward(ctx, grad_total, _):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None


weighted_nll = _WeightedNll.apply


def _logprobs(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """Log-probability (M,) of each target under hidden (M, d)."""
    parts = [hidden.new_zeros(0)]
    for i in range(0, len(targets), CHUNK):
        # The product itself in float32: in bfloat16 it moves in steps of an eighth of a nat.
        part, bias = hidden[i : i + CHUNK], head.bias
        dtype = torch.promote_types(torch.float32, part.dtype)
        logits = F.linear(part.to(dtype), head.weight.to(dtype), bias if bias is None else bias.to(dtype))
        parts.append(logits.gather(1, targets[i : i + CHUNK, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A prompt and the text whose tokens are scored."""

    prompt_ids: Sequence[int]
    target_ids: Sequence[int]
    adapters: tuple[Adapter, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


@torch.no_grad()
def score(base: FrozenBase, rows: Sequence[ScoreRow], *, token_budget: int = 4096) -> list[list[float]]:
    """Log-probabilities, in nats, of each row's target tokens. token_budget: tokens of one pass, fewer if memory runs
    out."""
    results: list[list[float]] = []
    while left := rows[len(results) :]:
        stops = accumulate(map(len, left))
        chunk = left[: max(1, sum(stop <= token_budget for stop in stops))]
        try:
            results += base.with_room(partial(_score_chunk, base, chunk))
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            token_budget = sum(map(len, chunk)) // 2
    return results


def _score_chunk(base: FrozenBase, rows: Sequence[ScoreRow]) -> list[list[float]]:
    hidden = base.hidden([[*row.prompt_ids, *row.target_ids] for row in rows], [row.adapters for row in rows])
    starts = accumulate(map(len, rows), initial=-1)
    sources = [
        torch.arange(len(row.target_ids)) + len(row.prompt_ids) + at for row, at in zip(rows, starts, strict=False)
    ]
    targets = torch.tensor([t for row in rows for t in row.target_ids], device=base.device)
    found = _logprobs(hidden[torch.cat(sources).to(base.device)], base.head, targets)
    return [part.tolist() for part in found.split([len(row.target_ids) for row in rows])]

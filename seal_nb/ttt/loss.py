"""Cross entropy of the next token straight from hidden states, in chunks: no (T, vocabulary) matrix is
kept.

The idea is that of fused linear cross entropy (Liger Kernel, arXiv 2410.10989): the gradient with respect
to the hidden states is computed in the forward pass, chunk by chunk, since the head is frozen."""

import torch
from torch.nn import functional as F

CHUNK = 1024  # labels a chunk


def _logits(hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """At least float32, as transformers computes its loss."""
    logits = F.linear(hidden, head.weight, head.bias)
    return logits.to(torch.promote_types(torch.float32, logits.dtype))


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, weights):  # type: ignore[no-untyped-def]  # torch's signature
        parts, grad = [], torch.empty_like(hidden)
        for i in range(0, len(targets), CHUNK):
            part = slice(i, i + CHUNK)
            logits = _logits(hidden[part], head)
            norm = logits.logsumexp(-1, keepdim=True)
            parts.append(norm[:, 0] - logits.gather(1, targets[part, None])[:, 0])
            p = logits.sub_(norm).exp_()  # (labels, vocabulary), from here on d nll / d logits
            p.scatter_add_(1, targets[part, None], p.new_full((len(p), 1), -1.0))
            p.mul_(weights[part, None].to(p.dtype))
            grad[part] = p.to(hidden.dtype) @ head.weight
        ctx.save_for_backward(grad)
        nll = torch.cat(parts) if parts else weights.new_zeros(0)
        ctx.mark_non_differentiable(nll)
        return (nll * weights.to(nll.dtype)).sum(), nll

    @staticmethod
    def backward(ctx, grad_total, _):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None


def weighted_nll(
    hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ weights · nll, nll) for hidden (M, d), targets (M,), weights (M,). Only the sum can be
    differentiated, by hidden."""
    return _WeightedNll.apply(hidden, head, targets, weights)


@torch.no_grad()
def token_logprobs(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability (M,) of each target under hidden (M, d)."""
    parts = []
    for i in range(0, len(targets), CHUNK):
        # The product itself in float32: in bfloat16 it moves in steps of an eighth of a nat.
        part, bias = hidden[i : i + CHUNK], head.bias
        dtype = torch.promote_types(torch.float32, part.dtype)
        logits = F.linear(part.to(dtype), head.weight.to(dtype), bias if bias is None else bias.to(dtype))
        parts.append(logits.gather(1, targets[i : i + CHUNK, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts) if parts else hidden.new_zeros(0)

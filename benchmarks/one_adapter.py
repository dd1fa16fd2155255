"""The one-adapter path: one LoRA adapter on one model with plain autograd and torch's own AdamW.

What the slots are checked against on any device, and the published way for their speed. Needs torch and
transformers only, and shares no code with the slots but the initial values and the order of rows.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from seal_nb.ttt.lora import Layout, TrainJob, initial_weights, learning_rate_at


class LoraLinear(nn.Module):
    """A frozen Linear and one adapter's branch, float32 (or wider) weights used in the base's dtype."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, self.a.to(x.dtype)) * self.scaling
        return self.base(x) + F.linear(h, self.b.to(x.dtype))


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own structure on the same weights in memory."""
    shared: dict[int, object] = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, shared)


class OneAdapter:
    """One job's adapter on `model`, which must be the job's alone until `remove`.

    pad_to: 0 trains on real tokens only; otherwise the published padding, part of the loss where
    `padding_in_loss`"""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        job: TrainJob,
        encode: Callable[[str], list[int]],
        *,
        pad_to: int = 0,
        padding_in_loss: bool = False,
    ):
        self.model, self.layout, self.job = model, layout, job
        self.rows = [encode(text)[: job.train.max_seq_length] for text in job.texts]
        self.pad_to, self.padding_in_loss = pad_to, padding_in_loss
        self.n_labels_R = [(pad_to if padding_in_loss else len(row)) - 1 for row in self.rows]
        self.losses: list[tuple[int, torch.Tensor]] = []
        dtype = torch.promote_types(torch.float32, model.dtype)
        flat = initial_weights(layout, job.train.seed).to(model.device, dtype)
        self.branches = {t.name: self._put(flat, t) for t in layout.targets}
        self.parameters = [p for branch in self.branches.values() for p in (branch.a, branch.b)]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)

    def _put(self, flat: torch.Tensor, target) -> LoraLinear:  # type: ignore[no-untyped-def]
        linear = self.model.get_submodule(target.name)
        a, b = self.layout.a(flat, target), self.layout.b(flat, target)
        branch = LoraLinear(linear, a.clone(), b.clone(), self.job.lora.scaling)
        self.model.set_submodule(target.name, branch)
        return branch

    def remove(self) -> None:
        for name, branch in self.branches.items():
            self.model.set_submodule(name, branch.base)

    def flat(self) -> torch.Tensor:
        """The adapter as the slots lay it out."""
        parts = [p for branch in self.branches.values() for p in (branch.a, branch.b)]
        return torch.cat([p.detach().flatten() for p in parts])

    def steps(self) -> Iterator[None]:
        """The job's optimiser steps, each when it is asked for."""
        for step, window in enumerate(self.job.windows(self.n_labels_R)):
            for batch in window.batches:
                self.losses.append((window.epoch, self._pass([self.rows[i] for i in batch], window.n_labels)))
            self._step(learning_rate_at(self.job.train, step, self.job.n_steps))
            yield

    def train(self) -> None:
        for _ in self.steps():
            pass

    def epoch_losses(self) -> list[float]:
        """Mean loss of a label in each epoch, in nats; after all steps."""
        sums = [0.0] * self.job.train.epochs
        for epoch, loss in self.losses:
            sums[epoch] += float(loss)
        return [total / sum(self.n_labels_R) for total in sums]

    def _pass(self, rows: list[list[int]], n_labels: int) -> torch.Tensor:
        """Σ loss over the labels; its gradient is that of the sum divided by n_labels."""
        ids, attention, labels = self._padded(rows)
        logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(torch.float32, logits.dtype)).flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        (loss / n_labels).backward()
        return loss.detach()

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length = self.pad_to or max(map(len, rows))
        eos = int(self.model.config.eos_token_id)
        fill = eos if self.padding_in_loss else -100
        ids = [row + [eos] * (length - len(row)) for row in rows]
        attention = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        labels = [row + [fill] * (length - len(row)) for row in rows]
        device = self.model.device
        return (
            torch.tensor(ids, device=device),
            torch.tensor(attention, device=device),
            torch.tensor(labels, device=device),
        )

    def _step(self, learning_rate: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.job.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

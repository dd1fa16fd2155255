"""How far the jobs in training are, for whoever watches: steps, and the loss of each epoch so far.

Losses stay on the device while a job trains. Reading them waits for the device, so it is done at most once a
second, whatever the number of passes in between.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from seal_nb.ttt.scheduler import Slot

EVERY_S = 1.0


class Progress:
    """Keeps what was read last."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.every_s = every_s
        self._read_at = float("-inf")
        self._last: dict[str, dict[str, Any]] = {}

    def read(self, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        """By job name: ``step``, ``n_steps``, ``epoch_losses`` (nats per label; the last epoch is open).

        A loss that is not finite is None: the job is lost, and JSON has no word for it.
        """
        now = time.monotonic()
        if now - self._read_at >= self.every_s:
            self._read_at = now
            self._last = {slot.job.name: _progress(slot) for slot in slots}
        return self._last


def _progress(slot: Slot) -> dict[str, Any]:
    """An epoch that is over counts all labels of the job, as its result does; the open one, those seen."""
    losses = torch.stack([loss for _, loss, _ in slot.losses]).tolist() if slot.losses else []
    sums: dict[int, float] = {}
    seen: dict[int, float] = {}
    for (epoch, _, n_items), loss in zip(slot.losses, losses, strict=True):
        sums[epoch] = sums.get(epoch, 0.0) + loss * n_items
        # n_items is of the whole accumulation window, the loss is one micro-batch's share of it
        seen[epoch] = seen.get(epoch, 0.0) + n_items / slot.job.train.gradient_accumulation_steps
    all_labels = float(sum(row.n_items for row in slot.rows))
    seen |= {epoch: all_labels for epoch in seen if epoch < max(seen)}
    return {
        "step": slot.step,
        "n_steps": slot.job.n_steps,
        "epoch_losses": [_finite(sums[epoch] / max(seen[epoch], 1.0)) for epoch in sorted(sums)],
    }


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None

"""Do slots give the adapters of the one-adapter path on this device? Asked before any speed is believed."""

from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.one_adapter import OneAdapter, twin
from benchmarks.random_models import CONFIGS, JobMaker, number_tokenizer, random_model
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import TrainJob, initial_weights
from seal_nb.ttt.trainer import SlotTrainer

FLOAT32_LIMIT = 1e-3  # relative L2 of the update
HALF_LIMIT, HALF_MOST = 0.25, 0.7  # the same in half precision; unrelated updates are 1.4 apart
LOSS_LIMIT = 0.02  # relative, in half precision


def check_float32(device: str) -> dict[str, Any]:
    """The small configuration in float32: updates must agree to a thousandth."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = random_model("small", device=device, dtype=torch.float32)
    alone = twin(model)
    base = FrozenBase(model, number_tokenizer("small"), name="small")
    return check(base, alone, JobMaker(vocab_size=CONFIGS["small"]["vocab_size"]))


def check(base: FrozenBase, alone: PreTrainedModel, maker: JobMaker) -> dict[str, Any]:
    """Four jobs of other ranks, lengths and batch sizes side by side, each against itself alone.

    In half precision AdamW makes whole steps of rounding, so there updates are compared with what another
    padding changes in the one-adapter path itself, and losses must agree."""
    jobs = [_short(maker, i, rank=8 << (i % 3), batch_size=1 + i // 3) for i in range(4)]
    trainer = SlotTrainer(base, n_slots=3)
    for job in jobs:
        trainer.submit(job)
    trained = {t.job.name: t for t in trainer.run()}
    updates, losses = [], []
    for job in jobs:
        found, flat, loss = trained[job.name], *_alone(base, alone, job)
        if found.adapter is None:
            raise RuntimeError(f"job {job.name} failed in its slot: {found.error}")
        updates.append(_distance(base, job, found.adapter.flat, flat))
        losses += [abs(own / other - 1) for own, other in zip(found.epoch_losses, loss, strict=True)]
    spread = _spread(base, alone, jobs[0])
    exact = base.dtype in (torch.float32, torch.float64)
    limit = FLOAT32_LIMIT if exact else min(HALF_MOST, max(HALF_LIMIT, 3 * spread))
    return {
        "config": base.name,
        "dtype": str(base.dtype).removeprefix("torch."),
        "update_distance": max(updates),
        "update_distance_alone_padded_otherwise": spread,
        "loss_difference": max(losses),
        "update_distance_limit": limit,
        "passed": max(updates) < limit and max(losses) < (FLOAT32_LIMIT if exact else LOSS_LIMIT),
    }


def _short(maker: JobMaker, seed: int, *, rank: int, batch_size: int) -> TrainJob:
    job = maker.job(seed, rank=rank, batch_size=batch_size, epochs=2)
    return TrainJob(name=job.name, texts=job.texts[-3:], lora=job.lora, train=job.train)


def _alone(
    base: FrozenBase, model: PreTrainedModel, job: TrainJob, pad_to: int = 0
) -> tuple[torch.Tensor, list[float]]:
    """Weights after training, and the losses of its epochs."""
    adapter = OneAdapter(model, base.layout(job.lora), job, base.encode, pad_to=pad_to)
    adapter.train()
    adapter.remove()
    return adapter.flat(), adapter.epoch_losses()


def _distance(base: FrozenBase, job: TrainJob, found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 of the update."""
    initial = initial_weights(base.layout(job.lora), job.train.seed).to(expected)
    return float((found - expected).norm() / (expected - initial).norm())


def _spread(base: FrozenBase, alone: PreTrainedModel, job: TrainJob) -> float:
    longest = max(len(base.encode(text)) for text in job.texts)
    expected, _ = _alone(base, alone, job)
    padded, _ = _alone(base, alone, job, pad_to=longest + 13)
    return _distance(base, job, padded, expected)

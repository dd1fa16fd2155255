"""Each job of a mixed batch gives the adapter that PEFT and transformers' Trainer make alone."""

import pytest
import torch

from seal_nb.ttt import lora
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import Adapter, LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer
from tests.ttt.reference import train_alone
from tests.ttt.tiny import AsciiTokenizer, tiny_model

QV, MIXED, ALL = (), ("q_proj", "k_proj", "o_proj", "down_proj"), ("all-linear",)


def job(i: int, n_rows: int, *, length: int, rank: int, targets: tuple[str, ...], **train: object) -> TrainJob:
    letters = "the quick brown fox jumps over a lazy dog "
    texts = tuple(
        "".join(letters[(i * 7 + r * 3 + k * (1 + i % 3)) % len(letters)] for k in range(length + 5 * (r % 3)))
        for r in range(n_rows)
    )
    shape = LoraSettings(rank=rank, alpha=2 * rank, target_modules=targets)
    return TrainJob(name=f"job{i}", texts=texts, lora=shape, train=TrainSettings(seed=100 + i, **train))  # type: ignore[arg-type]


def mixed_jobs(n: int = 16) -> list[TrainJob]:
    return [
        job(
            i,
            1 + i % 5,
            length=6 + 11 * (i % 4),
            rank=(2, 4, 8)[i % 3],
            targets=(QV, MIXED, ALL)[i % 3],
            epochs=1 + i % 4,
            learning_rate=(1e-2, 1e-3, 3e-3)[i % 3],
            batch_size=1 + i % 3,
            gradient_accumulation_steps=1 + (i // 2) % 3,
        )
        for i in range(n)
    ]


def peft_weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    """By the names that a PEFT model gives them."""
    views = lora.peft_weights(adapter.layout, adapter.flat)
    return {name.replace(".weight", ".default.weight"): view for name, view in views.items()}


def distance(found: dict, after: dict, before: dict | None = None) -> float:
    """Relative L2 over all weights: of the weights, or with `before` of the update."""
    assert found.keys() == after.keys()
    error = sum(float((found[k] - after[k]).double().square().sum()) for k in after)
    size = sum(float((after[k] - (before[k] if before else 0)).double().square().sum()) for k in after)
    return (error / size) ** 0.5


@pytest.mark.parametrize(("kind", "n_jobs"), [("llama", 16), ("qwen2", 4)])
def test_every_job_of_a_mixed_batch_equals_peft_and_trainer_alone_in_float64(kind: str, n_jobs: int) -> None:
    """Jobs of many shapes on one family; on the other those that show its biases on q, k and v."""
    tokenizer = AsciiTokenizer()
    trainer = SlotTrainer(FrozenBase(tiny_model(kind), tokenizer), n_slots=6, token_budget=200)  # type: ignore[arg-type]
    jobs = mixed_jobs(n_jobs)
    for j in jobs:
        trainer.submit(j)
    trained = {t.job.name: t for t in trainer.run()}
    for j in jobs:
        _, before, after = train_alone(tiny_model(kind), tokenizer, j)
        assert trained[j.name].n_steps == j.n_steps
        assert distance(peft_weights(trained[j.name].adapter), after, before) < 1e-9, j

"""Loss on the padding as published, masks and truncation."""

import pytest
import torch

from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer
from tests.ttt.reference import train_alone
from tests.ttt.test_equality import distance, peft_weights
from tests.ttt.tiny import AsciiTokenizer, tiny_model

TEXTS = ("a short one", "one that is a little longer than it", "mid sized text")
LORA = LoraSettings(rank=4, alpha=8, target_modules=("all-linear",))


def train(settings: TrainSettings, *others: TrainJob) -> dict[str, torch.Tensor]:
    trainer = SlotTrainer(FrozenBase(tiny_model(), AsciiTokenizer()), n_slots=4)  # type: ignore[arg-type]
    for job in (TrainJob(name="it", texts=TEXTS, lora=LORA, train=settings), *others):
        trainer.submit(job)
    done = {t.job.name: t for t in trainer.run()}
    adapter = done["it"].adapter
    assert adapter is not None
    return peft_weights(adapter)


@pytest.mark.parametrize("mask", ["", " one"])
def test_padding_in_loss_equals_the_published_padded_training(mask: str) -> None:
    settings = TrainSettings(
        epochs=3, batch_size=2, padding_in_loss=True, pad_to=64, learning_rate=3e-3, end_mask_substring=mask
    )
    beside = TrainJob(name="other", texts=TEXTS[:2], lora=LORA, train=TrainSettings(epochs=2))
    found = train(settings, beside)
    job = TrainJob(name="it", texts=TEXTS, lora=LORA, train=settings)
    _, _before, after = train_alone(tiny_model(), AsciiTokenizer(), job)
    assert distance(found, after) < 1e-9


def test_leaving_padding_out_is_other_training() -> None:
    padded = train(TrainSettings(epochs=3, padding_in_loss=True, pad_to=64, learning_rate=3e-3))
    plain = train(TrainSettings(epochs=3, learning_rate=3e-3))
    assert distance(plain, padded) > 1e-3


@pytest.mark.parametrize("longer", [-1, 0, 1, 40])
def test_a_sequence_as_long_as_the_padding_is_cut_as_published(longer: int) -> None:
    n = 20 + longer
    settings = TrainSettings(epochs=2, padding_in_loss=True, pad_to=20, max_seq_length=20, learning_rate=3e-3)
    job = TrainJob(name="it", texts=(("the quick brown fox " * 4)[:n], "short"), lora=LORA, train=settings)
    trainer = SlotTrainer(FrozenBase(tiny_model(), AsciiTokenizer()), n_slots=1)  # type: ignore[arg-type]
    trainer.submit(job)
    adapter = trainer.run()[0].adapter
    assert adapter is not None
    _, _, after = train_alone(tiny_model(), AsciiTokenizer(), job)
    assert distance(peft_weights(adapter), after) < 1e-9


def test_a_sequence_without_any_label_does_no_harm_alone_in_its_pass() -> None:
    """One token, or all of it masked: nothing before it predicts it."""
    job = TrainJob(name="it", texts=("x", "a longer one"), lora=LORA, train=TrainSettings(epochs=2))
    trainer = SlotTrainer(FrozenBase(tiny_model(), AsciiTokenizer()), n_slots=1)  # type: ignore[arg-type]
    trainer.submit(job)
    done = trainer.run()[0]
    assert done.error == "" and done.n_steps == 4


def test_a_long_sequence_is_cut_as_the_trainer_would_get_it() -> None:
    settings = TrainSettings(epochs=2, max_seq_length=12, learning_rate=3e-3)
    found = train(settings)
    job = TrainJob(name="it", texts=TEXTS, lora=LORA, train=settings)
    _, _, after = train_alone(tiny_model(), AsciiTokenizer(), job)
    assert distance(found, after) < 1e-9

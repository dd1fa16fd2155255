"""Loss on the padding, as published and sampled; masks and truncation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import SettingsError
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.jobs import LoraSettings, TrainJob, TrainSettings, make_row, masked_prefix
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


def test_sampled_padding_is_unbiased() -> None:
    """The mean over draws of each padding position's weight is 1, and the rest of the row is untouched."""
    settings = TrainSettings(pad_samples=5, pad_to=40)
    exact = make_row(AsciiTokenizer(), TEXTS[0], TrainSettings(padding_in_loss=True, pad_to=40))
    total = torch.zeros(40, dtype=torch.float64)
    n = 4000
    for seed in range(n):
        row = make_row(AsciiTokenizer(), TEXTS[0], settings, draws=torch.Generator().manual_seed(seed))
        assert row.n_items == exact.n_items
        total.index_add_(0, row.positions[row.sources], row.weights)
    wanted = torch.zeros(40, dtype=torch.float64)
    wanted.index_add_(0, exact.positions[exact.sources], exact.weights)
    assert torch.allclose(total / n, wanted, atol=0.15)
    assert torch.equal((total / n)[: len(TEXTS[0])], wanted[: len(TEXTS[0])])


def test_sampled_padding_comes_closer_to_the_published_training_than_none() -> None:
    published = train(TrainSettings(epochs=3, padding_in_loss=True, pad_to=64, learning_rate=3e-3))
    sampled = train(TrainSettings(epochs=3, pad_samples=16, pad_to=64, learning_rate=3e-3))
    plain = train(TrainSettings(epochs=3, learning_rate=3e-3))
    assert distance(sampled, published) < distance(plain, published) / 2


def test_as_many_samples_as_there_is_padding_is_the_published_training() -> None:
    published = train(TrainSettings(epochs=2, padding_in_loss=True, pad_to=48))
    sampled = train(TrainSettings(epochs=2, pad_samples=48, pad_to=48))
    assert distance(sampled, published) < 1e-12


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


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_masked_prefix_ends_after_the_first_occurrence(ids: list[int], mark: list[int]) -> None:
    end = masked_prefix(ids, mark)
    if end:
        assert ids[end - len(mark) : end] == mark
    window = ids[: end - 1] if end else ids
    assert not any(window[i : i + len(mark)] == mark for i in range(len(window) - len(mark) + 1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": float("nan")}, "finetune_lr is nan"),
        ({"max_seq_length": 1}, "max_seq_length is 1"),
        ({"pad_samples": -1}, "pad_samples is -1"),
    ],
)
def test_impossible_settings_name_the_field_and_the_value(fields: dict, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        TrainSettings(**fields)

"""Slots: neighbours change nothing, jobs enter and leave, memory runs out, jobs fail alone."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_nb.ttt import trainer
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import BankRow
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings, initial_weights
from seal_nb.ttt.trainer import SlotTrainer, Trained
from tests.ttt.test_equality import distance, mixed_jobs, peft_weights
from tests.ttt.tiny import OUT_OF_MEMORY, AsciiTokenizer, refuse_tildes, tiny_model

BASE = FrozenBase(tiny_model(), AsciiTokenizer())  # type: ignore[arg-type]


def run(jobs: list[TrainJob], **sizes: int) -> dict[str, Trained]:
    slots = SlotTrainer(BASE, **sizes)  # type: ignore[arg-type]
    for job in jobs:
        slots.submit(job)
    return {t.job.name: t for t in slots.run()}


def weights(trained: Trained) -> dict[str, torch.Tensor]:
    assert trained.adapter is not None, trained.error
    return peft_weights(trained.adapter)


def a_job(name: str = "it", **train: object) -> TrainJob:
    texts = ("one text to learn", "another", "and a third, longer than the others")
    lora = LoraSettings(rank=4, alpha=8, dropout=float(train.pop("dropout", 0)))  # type: ignore[arg-type]
    return TrainJob(name=name, texts=texts, lora=lora, train=TrainSettings(**train))  # type: ignore[arg-type]


def test_the_same_job_twice_gives_the_same_bits() -> None:
    first, again = (run(mixed_jobs(5), n_slots=3)["job4"] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))
    assert first.epoch_losses == again.epoch_losses


def test_another_seed_gives_another_adapter() -> None:
    first, other = (weights(run([a_job(seed=s)], n_slots=1)["it"]) for s in (1, 2))
    assert distance(first, other) > 0.1


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(8)).map(lambda p: p[:5]), st.integers(1, 6), st.sampled_from([30, 120, 4096]))
def test_neighbours_slots_and_token_budget_change_rounding_only(mix: list[int], n_slots: int, budget: int) -> None:
    jobs = mixed_jobs(8)
    together = run([jobs[i] for i in mix], n_slots=n_slots, token_budget=budget)
    for i in mix:
        assert distance(weights(together[f"job{i}"]), alone(i)) < 1e-10


@cache
def alone(i: int) -> dict[str, torch.Tensor]:
    job = mixed_jobs(8)[i]
    return weights(run([job], n_slots=1)[job.name])


def test_dropout_belongs_to_the_job_not_to_its_neighbours() -> None:
    job = a_job(dropout=0.3, epochs=3)
    alone = weights(run([job], n_slots=1)["it"])
    together = weights(run([*mixed_jobs(3), job], n_slots=4)["it"])
    without = weights(run([a_job(epochs=3)], n_slots=1)["it"])
    assert distance(together, alone) < 1e-10
    assert distance(without, alone) > 1e-3


def test_a_job_enters_at_the_step_after_another_leaves() -> None:
    slots = SlotTrainer(BASE, n_slots=1)
    slots.submit(a_job("first", epochs=1))
    slots.submit(a_job("second", epochs=1))
    finished = [[t.job.name for t in slots.step()] for _ in range(6)]
    assert finished == [[], [], ["first"], [], [], ["second"]]
    assert not slots.busy and not slots.banks[0].weights.isnan().any()


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_budget_and_loses_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [a_job("a", gradient_accumulation_steps=3, epochs=2), a_job("b", epochs=2)]
    trained = {j.name: run([j], n_slots=1)[j.name] for j in jobs}
    alone = {name: weights(one) for name, one in trained.items()}
    n_tokens = {name: one.n_tokens for name, one in trained.items()}
    slots = SlotTrainer(BASE, n_slots=2)
    for job in jobs:
        slots.submit(job)
    run_base, calls = BASE.run, []

    def short_of_memory(ids, *rest):  # type: ignore[no-untyped-def]
        calls.append(len(ids))
        out = run_base(ids, *rest)
        if len(calls) in (2, 5):  # mid-window, after the forward pass
            raise error
        return out

    monkeypatch.setattr(BASE, "run", short_of_memory)
    done = {t.job.name: t for t in slots.run()}
    assert slots.token_budget.now < 100
    assert all(len(t.epoch_losses) == 2 for t in done.values())
    for name in alone:
        assert distance(weights(done[name]), alone[name]) < 1e-10
        assert done[name].n_tokens == n_tokens[name]  # a repeated pass counts once


def test_after_running_out_of_memory_passes_grow_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "PASSES_TO_RECOVER", 3)
    run_base, left = BASE.run, [2]

    def full_twice(*arguments):  # type: ignore[no-untyped-def]
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("out of memory")
        return run_base(*arguments)

    monkeypatch.setattr(BASE, "run", full_twice)
    slots = SlotTrainer(BASE, n_slots=2)
    slots.n_slots.lower(1)  # as when a second adapter found no room
    for name in ("a", "b"):
        slots.submit(a_job(name, epochs=8))
    slots.step()
    slots.step()
    assert slots.token_budget.now < 100
    assert all(t.adapter is not None for t in slots.run())
    assert slots.n_slots.now == 2 and slots.token_budget.now > 1000


def test_a_job_that_fails_while_it_enters_leaves_its_row_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    refresh, left = BankRow.refresh, [1]

    def fails_once(row: BankRow) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("no memory for the copy")
        refresh(row)

    monkeypatch.setattr(BankRow, "refresh", fails_once)
    done = run([a_job("first", epochs=1), a_job("second", epochs=1)], n_slots=1)
    assert "no memory for the copy" in done["first"].error and done["second"].adapter is not None


def test_a_micro_batch_too_large_for_the_device_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run_base = BASE.run

    def small_device(ids, *rest):  # type: ignore[no-untyped-def]
        if len(ids) > 60:
            raise torch.OutOfMemoryError("out of memory")
        return run_base(ids, *rest)

    monkeypatch.setattr(BASE, "run", small_device)
    big = TrainJob(name="big", texts=("x" * 100,), train=TrainSettings(epochs=1))
    mixed = TrainJob(name="mixed", texts=("x", "x" * 100), train=TrainSettings(gradient_accumulation_steps=2))
    done = run([a_job("small", epochs=1), big, mixed], n_slots=2)
    for name in ("big", "mixed"):
        assert done[name].adapter is None and "out of memory" in done[name].error
    assert done["small"].adapter is not None


@pytest.mark.parametrize("accumulation", [1, 2], ids="{} micro-batches a step".format)
@pytest.mark.parametrize("error", [RuntimeError, IndexError])
def test_a_job_that_breaks_the_pass_fails_alone_and_its_neighbours_go_on(
    error: type[Exception], accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"epochs": 2, "gradient_accumulation_steps": accumulation}
    good = [a_job("good", **how), a_job("better", **how, seed=7)]
    alone = {j.name: weights(run([j], n_slots=1)[j.name]) for j in good}
    refuse_tildes(BASE, monkeypatch, error)
    bad = TrainJob(name="bad", texts=("not ~ fine", "fine"), train=TrainSettings(**how))  # type: ignore[arg-type]
    done = run([good[0], bad, good[1]], n_slots=3)
    assert done["bad"].error == f"{error.__name__}: a kernel does not take this"
    for name in alone:
        assert distance(weights(done[name]), alone[name]) < 1e-10


def test_a_job_whose_weights_cannot_be_drawn_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(layout, seed):  # type: ignore[no-untyped-def]
        if seed == 13:
            raise RuntimeError("no memory for a pinned tensor")
        return initial_weights(layout, seed)

    monkeypatch.setattr("seal_nb.ttt.trainer.initial_weights", drawn)
    done = run([a_job("bad", seed=13, epochs=1), a_job("good", epochs=1)], n_slots=2)
    assert "pinned tensor" in done["bad"].error and done["good"].adapter is not None


def test_a_diverging_job_leaves_its_neighbours_bits_alone() -> None:
    good = a_job("good", epochs=3)
    alone = weights(run([good, a_job("other", epochs=3)], n_slots=2)["good"])
    done = run([good, a_job("bad", epochs=3, learning_rate=1e300)], n_slots=2)
    assert done["bad"].adapter is None and "not finite" in done["bad"].error
    assert distance(weights(done["good"]), alone) < 1e-10


def test_a_stack_of_frozen_adapters_acts_like_merged_weights() -> None:
    under = run([a_job("under", learning_rate=3e-2)], n_slots=1)["under"].adapter
    assert under is not None
    slots = SlotTrainer(BASE, n_slots=2)
    slots.submit(a_job("over", epochs=3), stack=[under])
    slots.submit(a_job("beside", epochs=3))
    done = {t.job.name: t for t in slots.run()}
    merged = tiny_model()
    for t in under.layout.targets:
        merged.get_submodule(t.name).weight.data += under.delta(t.name)
    reference = SlotTrainer(FrozenBase(merged, AsciiTokenizer()), n_slots=1)  # type: ignore[arg-type]
    reference.submit(a_job("over", epochs=3))
    assert distance(weights(done["over"]), weights(reference.run()[0])) < 1e-8

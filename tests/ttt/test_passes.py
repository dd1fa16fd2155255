"""A pass that is filled up to a static shape, as a CUDA graph needs it, is the same pass."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_nb.ttt import passes
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import Bank, BankRow
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings, initial_weights, make_row
from seal_nb.ttt.passes import CapturedPasses, MicroBatch, Pass, Shape, _shape
from seal_nb.ttt.trainer import SlotTrainer, Trained
from tests.ttt.test_equality import distance, peft_weights
from tests.ttt.tiny import AsciiTokenizer, refuse_tildes, tiny_model

BASE = FrozenBase(tiny_model(), AsciiTokenizer())  # type: ignore[arg-type]
LORA = LoraSettings(rank=4, alpha=6, target_modules=("all-linear",))
LETTERS = "the quick brown fox jumps over a lazy dog "


def bank_and_batches(
    lengths_of_slots: list[list[int]], n_rows: int, opens: list[bool]
) -> tuple[Bank, list[MicroBatch]]:
    """Adapters in rows 0, 2, 4, … of a bank (others stay unset), each with its rows of so many tokens."""
    layout = BASE.layout(LORA)
    bank = Bank(layout, n_rows, device=BASE.device, compute_dtype=BASE.dtype)
    for t in (bank.weights, bank.gradient, bank.mean, bank.square):
        t.fill_(float("nan"))  # what was never set must not matter
    seeds = range(2 * len(lengths_of_slots))
    entered = [BankRow(bank, LORA, initial_weights(layout, seed), dropout_seed=seed) for seed in seeds]
    for row in entered[1::2]:
        del bank.rows[row.index]
    batches = []
    for row, lengths, opening in zip(entered[::2], lengths_of_slots, opens, strict=True):
        row.flat.add_(0.01)  # B is zero at first, and hides A
        row.gradient.fill_(0.5)
        row.n_passed = int(not opening)
        rows = [make_row(AsciiTokenizer(), (LETTERS * 3)[i : i + n], TrainSettings()) for i, n in enumerate(lengths)]
        batches.append(MicroBatch((row,), rows, 7))
    return bank, batches


SLOTS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(SLOTS, st.integers(0, 40), st.integers(1, 5), st.lists(st.booleans(), min_size=4, max_size=4))
def test_filling_a_pass_up_changes_no_loss_and_no_gradient(
    lengths: list[list[int]], more_tokens: int, more_rows: int, opens: list[bool]
) -> None:
    bank, batches = bank_and_batches(lengths, 8, opens[: len(lengths)])
    gradient = bank.gradient.clone()
    plain = Pass(BASE, batches)
    losses = plain.run()
    expected = bank.gradient.clone()
    n_tokens, n_rows = plain.tokens.shape[1] + more_tokens, sum(map(len, lengths)) + more_rows
    bank.gradient.copy_(gradient)
    shape = Shape(bank.n, n_tokens, n_rows, 64, any(bank.adds_to_gradient))
    found = Pass(BASE, batches, shape).run_fused()
    assert torch.allclose(found[: len(losses)], losses, rtol=1e-12)
    used = sorted(bank.rows)
    assert torch.allclose(bank.gradient[used], expected[used], rtol=1e-9, atol=1e-12)


def test_a_shape_holds_its_pass_and_a_row_that_fills_it_up() -> None:
    bank, batches = bank_and_batches([[40, 30], [40]], 4, [True, True])
    assert _shape(batches, bank) == Shape(4, 128, 64, 512, False)
    bank.rows[0].n_passed = 1
    assert _shape(batches, bank).adds


@pytest.mark.parametrize("n_tokens", [128, 1024, 1025, 4000])
def test_shapes_are_few_and_waste_little(n_tokens: int) -> None:
    lengths = [n_tokens // 4, n_tokens - n_tokens // 4]
    rows = [make_row(AsciiTokenizer(), "x" * (n + 1), TrainSettings(max_seq_length=4096)) for n in lengths]
    bank = Bank(BASE.layout(LORA), 1, device=BASE.device, compute_dtype=BASE.dtype)
    shape = _shape([MicroBatch((), rows, 7)], bank)
    assert 0 <= shape.n_tokens - n_tokens < 256 and shape.longest >= max(lengths)


class Recording:
    """In the place of a CUDA graph: runs the pass again on the same static inputs, whatever they hold now."""

    def __init__(self, function: Callable[[], torch.Tensor]):
        self.static: Pass = function.__self__  # type: ignore[attr-defined]
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for holder in (self.static.plan.groups[0], self.static.rows):
            for on_the_host in ("members", "kept", "lengths"):
                holder.__dict__.pop(on_the_host, None)
        self.static.rows.masks.clear()
        self.static.losses.copy_(self.static.run_fused())


def trained(jobs: list[TrainJob], *, capturing: bool) -> tuple[dict[str, Trained], SlotTrainer]:
    trainer = SlotTrainer(BASE, n_slots=3, token_budget=100)
    trainer.captured.works = capturing
    for job in jobs:
        trainer.submit(job)
    return {t.job.name: t for t in trainer.run()}, trainer


def jobs_of_one_layout() -> list[TrainJob]:
    jobs = []
    for i in range(7):
        texts = tuple((LETTERS * 2)[i + k : 2 * i + 15 + 9 * k] for k in range(1 + i % 4))
        train = TrainSettings(
            epochs=2 + i % 3, seed=i, learning_rate=3e-3, batch_size=1 + i % 2, gradient_accumulation_steps=1 + i // 4
        )
        jobs.append(TrainJob(name=str(i), texts=texts, lora=LORA, train=train))
    return jobs


@pytest.mark.parametrize("most_graphs", [1, 32])
def test_jobs_whose_passes_are_captured_and_replayed_get_the_same_adapters(
    monkeypatch: pytest.MonkeyPatch, most_graphs: int
) -> None:
    recordings: list[Recording] = []

    def record(function, before):  # type: ignore[no-untyped-def]
        recordings.append(Recording(function))
        return recordings[-1], torch.zeros(3, dtype=torch.float64)

    monkeypatch.setattr(passes, "has_kernels", lambda *_: True)
    monkeypatch.setattr(passes, "cuda_graph", record)
    monkeypatch.setattr(passes, "MOST_GRAPHS", most_graphs)
    plain, _ = trained(jobs_of_one_layout(), capturing=False)
    found, trainer = trained(jobs_of_one_layout(), capturing=True)
    assert sum(r.replays for r in recordings) > 5 and len(trainer.captured.statics) <= most_graphs
    for name, one in plain.items():
        assert distance(peft_weights(found[name].adapter), peft_weights(one.adapter)) < 1e-10
        assert found[name].epoch_losses == pytest.approx(one.epoch_losses, rel=1e-10)


def test_a_pass_that_fails_only_when_captured_is_not_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "has_kernels", lambda *_: True)
    monkeypatch.setattr(Pass, "run_fused", lambda self: 1 / 0)
    plain, _ = trained(jobs_of_one_layout(), capturing=False)
    found, trainer = trained(jobs_of_one_layout(), capturing=True)
    assert not trainer.captured.works
    for name, one in plain.items():
        assert distance(peft_weights(found[name].adapter), peft_weights(one.adapter)) < 1e-10


def test_a_job_that_breaks_a_captured_pass_is_found_and_the_others_are_captured_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "has_kernels", lambda *_: True)
    refuse_tildes(BASE, monkeypatch)
    monkeypatch.setattr(passes, "cuda_graph", lambda function, before: (Recording(function), torch.zeros(3).double()))
    plain, _ = trained(jobs_of_one_layout(), capturing=False)
    bad = TrainJob(name="bad", texts=("fine", "not ~ fine"), lora=LORA, train=TrainSettings(epochs=2))
    found, trainer = trained([*jobs_of_one_layout(), bad], capturing=True)
    assert "does not take this" in found["bad"].error and trainer.captured.works
    for name, one in plain.items():
        assert distance(peft_weights(found[name].adapter), peft_weights(one.adapter)) < 1e-10


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("short")])
def test_a_capture_that_fails_costs_no_job_anything(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    failures = []

    def fails(function, before):  # type: ignore[no-untyped-def]
        failures.append(function)
        if len(failures) > 1:
            return Recording(function), torch.zeros(3, dtype=torch.float64)
        raise error

    monkeypatch.setattr(passes, "has_kernels", lambda *_: True)
    monkeypatch.setattr(passes, "cuda_graph", fails)
    monkeypatch.setattr(passes, "PASSES_WITHOUT", 5)
    plain, _ = trained(jobs_of_one_layout(), capturing=False)
    found, trainer = trained(jobs_of_one_layout(), capturing=True)
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    assert trainer.captured.works == out_of_memory, "memory says nothing about what can be captured"
    assert (len(failures) > 1) == out_of_memory and trainer.token_budget.now == 100, "the passes themselves fit"
    for name, one in plain.items():
        assert distance(peft_weights(found[name].adapter), peft_weights(one.adapter)) < 1e-10


def test_a_capture_shares_memory_unless_it_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, bool]] = []  # tokens of a captured pass; whether it brings its own memory

    def record(function, before):  # type: ignore[no-untyped-def]
        taken.append((function.__self__.tokens.shape[1], before is None))
        return Recording(function), torch.zeros(8, dtype=torch.float64)

    monkeypatch.setattr(passes, "TOKEN_STEP", 8)
    monkeypatch.setattr(passes, "has_kernels", lambda *_: True)
    monkeypatch.setattr(passes, "cuda_graph", record)
    captured = CapturedPasses(BASE)
    captured.works = True
    bank, _ = bank_and_batches([[8]], 8, [True])
    for n in (24, 16, 8, 40, 16, 40, 24):
        row = make_row(AsciiTokenizer(), (LETTERS * 3)[:n], TrainSettings())
        for _ in range(2):
            captured.run([MicroBatch((bank.rows[0],), [row], 7)])
    assert taken == [(24, True), (16, False), (8, False), (40, True), (16, False), (24, False)]
    assert sum(static.graph is not None for static in captured.statics.values()) == 3

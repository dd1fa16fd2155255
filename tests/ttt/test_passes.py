"""A pass that is filled up to a static shape, as a CUDA graph needs it, is the same pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_nb.ttt.bank import Bank
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import Segment
from seal_nb.ttt.jobs import LoraSettings, TrainSettings, make_row
from seal_nb.ttt.lora import initial_weights
from seal_nb.ttt.passes import Pass, Shape, _shape, _Static, run_eager
from tests.ttt.tiny import AsciiTokenizer, tiny_model

BASE = FrozenBase(tiny_model(), AsciiTokenizer())  # type: ignore[arg-type]
LORA = LoraSettings(rank=4, alpha=6, target_modules=("all-linear",))
LETTERS = "the quick brown fox jumps over a lazy dog "


def bank_and_pass(lengths_of_slots: list[list[int]], n_rows: int, opens: list[bool]) -> tuple[Bank, Pass]:
    """Adapters in rows 0, 2, 4, … of a bank (others stay unset), each with its rows of so many tokens."""
    layout = BASE.layout(LORA)
    bank = BASE.new_bank(layout, n_rows)
    for t in (bank.weights, bank.gradient, bank.mean, bank.square):
        t.fill_(float("nan"))  # what was never set must not matter
    entered = [
        bank.enter(LORA, initial_weights(layout, seed), seed) for seed in range(2 * len(lengths_of_slots))
    ]
    for row in entered[1::2]:
        row.leave()
    pass_, start = Pass(), 0
    for row, lengths, opening in zip(entered[::2], lengths_of_slots, opens, strict=True):
        row.weights.add_(0.01)  # B is zero at first, and hides A
        row.gradient.fill_(0.5)
        row.opens_window = opening
        rows = [
            make_row(AsciiTokenizer(), (LETTERS * 3)[i : i + n], TrainSettings())
            for i, n in enumerate(lengths)
        ]
        stop = start + sum(map(len, rows))
        pass_.add(Segment(start=start, stop=stop, trained=row), rows, 7)
        start = stop
    return bank, pass_


SLOTS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(SLOTS, st.integers(0, 40), st.integers(1, 5), st.lists(st.booleans(), min_size=4, max_size=4))
def test_filling_a_pass_up_changes_no_loss_and_no_gradient(
    lengths: list[list[int]], more_tokens: int, more_rows: int, opens: list[bool]
) -> None:
    bank, pass_ = bank_and_pass(lengths, 8, opens[: len(lengths)])
    gradient = bank.gradient.clone()
    losses = run_eager(BASE, pass_)
    expected = bank.gradient.clone()
    n_tokens, n_rows = sum(pass_.lengths) + more_tokens, sum(map(len, lengths)) + more_rows
    bank.gradient.copy_(gradient)
    static = _Static(BASE, bank, Shape(n_tokens, n_rows, 64, not bank.all_void))
    static.fill(pass_)
    found = static.warm_up()
    assert torch.allclose(found[: len(losses)], losses, rtol=1e-12)
    used = sorted(bank.rows)
    assert torch.allclose(bank.gradient[used], expected[used], rtol=1e-9, atol=1e-12)


def test_a_shape_holds_its_pass_and_a_row_that_fills_it_up() -> None:
    bank, pass_ = bank_and_pass([[40, 30], [40]], 4, [True, True])
    assert _shape(pass_, bank) == Shape(128, 64, 512, False)
    bank.rows[0].opens_window = False
    assert _shape(pass_, bank).keeps


@pytest.mark.parametrize("n_tokens", [128, 1024, 1025, 4000])
def test_shapes_are_few_and_waste_little(n_tokens: int) -> None:
    _, pass_ = bank_and_pass([[20]], 2, [True])
    pass_.__dict__["lengths"] = [n_tokens // 4, n_tokens - n_tokens // 4]
    shape = _shape(pass_, BASE.new_bank(BASE.layout(LORA), 1))
    assert 0 <= shape.n_tokens - n_tokens < 256 and shape.longest >= max(pass_.lengths)

"""Accuracies leave out what nobody graded; intervals say what is noise."""

import itertools
import json
import statistics
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb import metrics
from seal_nb.errors import DataError
from seal_nb.metrics import Difference, accuracy, gain, mean_interval, paired_difference

VERDICTS = st.lists(st.sampled_from([True, False, None]), max_size=12)


@pytest.fixture(autouse=True, scope="module")
def _fewer_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "N_RESAMPLES", 1000)
        yield


def published_verdicts(golden: Path, run: str, arm: str = "adapter") -> list[list[bool]]:
    runs = json.loads((golden / "eval_correct.json").read_text())["runs"]
    return [[mark == "1" for mark in passage[arm]] for passage in runs[run]["passages"]]


def test_seal_against_base_is_real_and_against_gpt_4_1_is_noise(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "N_RESAMPLES", 10_000)
    seal = published_verdicts(golden, "iter2")
    against_base = paired_difference(seal, published_verdicts(golden, "base"))
    against_gpt = paired_difference(seal, published_verdicts(golden, "gpt4_1"))
    assert (against_base.mean, against_base.low, against_base.high) == pytest.approx((0.073, 0.027, 0.119), abs=0.002)
    assert (against_gpt.mean, against_gpt.low, against_gpt.high) == pytest.approx((0.007, -0.035, 0.048), abs=0.002)
    assert against_base.sentence().startswith("+7.3 points [2.")
    assert against_base.sentence().endswith("], 200 passages: real")
    assert against_gpt.sentence().endswith("200 passages: not distinguishable from noise")
    assert against_base.p_value < 0.01 and against_gpt.p_value > 0.5


def test_an_ungraded_answer_is_excluded_and_never_wrong() -> None:
    assert accuracy([True, None, False, None]) == 0.5
    assert accuracy([None, None]) is None
    assert accuracy([]) is None
    assert gain([True, False], [None, True]) == 0.5
    assert gain([True, False], [None, None]) is None


@given(VERDICTS, st.integers(0, 5))
def test_more_ungraded_answers_change_no_accuracy(correct: list[bool | None], n_more: int) -> None:
    if correct:
        assert accuracy(correct + [None] * n_more) == accuracy(correct)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=2, max_size=8))
def test_an_interval_contains_its_mean_and_weights_name_what_they_weigh(correct: list[list[bool]]) -> None:
    by_passage = mean_interval(correct)
    by_question = mean_interval(correct, weighting="question")
    everything = [verdict for verdicts in correct for verdict in verdicts]
    assert by_passage.mean == pytest.approx(statistics.mean(sum(v) / len(v) for v in correct))
    assert by_question.mean == pytest.approx(sum(everything) / len(everything))
    for estimate in (by_passage, by_question):
        assert 0 <= estimate.low <= estimate.mean + 1e-9 and estimate.mean - 1e-9 <= estimate.high <= 1
        assert estimate.n == len(correct)


def test_intervals_repeat_exactly_and_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        rates = generator.beta(2, 2, size=40)  # passages differ: questions of one are not independent
        correct = [list(generator.random(5) < rate) for rate in rates]
        estimate = mean_interval(correct)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.90 <= covered / 200 <= 0.98
    assert mean_interval(correct) == mean_interval(correct)


def test_pairing_makes_a_constant_difference_certain() -> None:
    low = [[bool(n % 3 == 0), False] for n in range(30)]
    high = [[first, True] for first, _ in low]
    difference = paired_difference(high, low)
    assert (difference.mean, difference.low, difference.high) == (0.5, 0.5, 0.5)
    assert difference.sentence() == "+50.0 points [50.0, 50.0], 30 passages: real"


def test_an_answer_that_one_run_lacks_does_not_tilt_the_difference() -> None:
    whole = [[True, False]] * 10
    hard_one_missing: list[list[bool | None]] = [[True, None]] * 10
    assert mean_interval(hard_one_missing).mean > mean_interval(whole).mean
    assert paired_difference(hard_one_missing, whole).mean == 0.0


def test_a_passage_graded_in_one_run_only_is_left_out_and_counted() -> None:
    difference = paired_difference([[True]] * 9 + [[None]], [[False]] * 10)
    assert (difference.n, difference.n_left_out) == (9, 1)


def test_few_passages_are_never_called_a_real_difference() -> None:
    five = paired_difference([[True]] * 5, [[False]] * 5)
    assert five.sentence() == "+100.0 points [100.0, 100.0], 5 passages: too few to tell (at least 6)"
    one = paired_difference([[True]], [[False]])
    assert (one.low, one.high) == (-1.0, 1.0)
    assert "1 passage:" in one.sentence()
    assert paired_difference([[True]] * 6, [[False]] * 6).is_real


def test_runs_over_other_passages_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="2 and 1 passages cannot be paired"):
        paired_difference([[True], [True]], [[True]])
    with pytest.raises(DataError, match="no passage has a graded answer"):
        mean_interval([[None], []])


def test_a_difference_that_touches_zero_is_not_real() -> None:
    assert not Difference(mean=0.1, low=0.0, high=0.2, n=100, p_value=0.01).is_real
    assert Difference(mean=-0.1, low=-0.2, high=-0.01, n=100, p_value=0.01).is_real
    chance = Difference(mean=0.1, low=0.01, high=0.2, n=100, p_value=0.0625)
    assert not chance.is_real
    assert chance.sentence().endswith(
        "100 passages: interval excludes 0, but too few to settle it (sign-flip p = 0.062)"
    )


@pytest.mark.parametrize("at_once", [1, 700, 40_000])
def test_draws_in_parts_give_the_same_interval_and_p_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    generator = np.random.default_rng(3)
    one, other = (list(generator.random((41, 3)) < rate) for rate in (0.4, 0.5))
    drawn = np.random.default_rng(0).integers(0, 41, size=(1000, 41))  # all at once, as it was
    means = np.mean(one, axis=1)[drawn].sum(axis=1) / 41
    whole = paired_difference(one, other)
    monkeypatch.setattr(metrics, "DRAWS_AT_ONCE", at_once)
    assert paired_difference(one, other) == whole
    found = mean_interval(one)
    assert (found.low, found.high) == tuple(round(float(bound), 12) for bound in np.quantile(means, [0.025, 0.975]))


def test_passages_without_end_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DRAWS_AT_ONCE", 100_000)
    monkeypatch.setattr(metrics, "MOST_DRAWS", 1_000_000)
    tracemalloc.start()
    paired_difference([[True], [False]] * 1_000, [[False], [True]] * 1_000)
    assert tracemalloc.get_traced_memory()[1] < 10e6, "10,000 rows of 2,000 draws are 160 MB"
    tracemalloc.stop()


@pytest.mark.parametrize(("n", "p_value"), [(2, 0.5), (6, 2 / 64), (12, 2 / 4096), (40, 1 / 1001)])
def test_sign_flips_of_an_effect_that_all_passages_share(n: int, p_value: float) -> None:
    assert paired_difference([[True]] * n, [[False]] * n).p_value == pytest.approx(p_value)


@pytest.mark.parametrize("weighting", ["passage", "question"])
def test_sign_flips_count_every_swap_of_the_two_runs(weighting: str) -> None:
    """Against all swaps written out, with runs of different lengths."""
    first: list[list[bool]] = [[True, True, True], [True, False], [True], [False, True, True, True]]
    second: list[list[bool]] = [[True], [False, False], [True, False], [False, True]]
    found = paired_difference(first, second, weighting=weighting)
    swaps = []
    for mask in itertools.product([False, True], repeat=4):
        rows = [(b, a) if swap else (a, b) for a, b, swap in zip(first, second, mask, strict=True)]
        swaps.append(paired_difference(*zip(*rows, strict=True), weighting=weighting).mean)
    assert found.p_value == statistics.mean(abs(mean) >= abs(found.mean) - 1e-9 for mean in swaps)


@pytest.mark.parametrize("n", [6, 20])
def test_without_an_effect_one_difference_in_twenty_is_called_real(n: int) -> None:
    """n = 6 is the demo: the interval alone would call one in eight real."""
    generator = np.random.default_rng(7)
    called = [
        paired_difference(list(generator.random((n, 5)) < 0.4), list(generator.random((n, 5)) < 0.4))
        for _ in range(600)
    ]
    assert statistics.mean(difference.is_real for difference in called) <= 0.07
    if n == 6:
        assert statistics.mean(not d.low <= 0 <= d.high for d in called) > 0.10

"""How many passages or repeats settle a difference, and what a grader's mistakes do to it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError, SettingsError
from seal_nb.metrics import (
    MIN_PASSAGES,
    paired_difference,
    passage_differences,
    power_of,
    power_with_repeats,
    settled_sentence,
)
from seal_nb.results.graders import GraderErrors, difference_with_grader_noise, grader_errors


def published(golden: Path, run: str) -> list[list[bool]]:
    runs = json.loads((golden / "eval_correct.json").read_text())["runs"]
    return [[mark == "1" for mark in passage["adapter"]] for passage in runs[run]["passages"]]


def test_200_passages_settle_seal_against_base_and_thousands_would_not_settle_gpt_4_1(golden: Path) -> None:
    seal = published(golden, "iter2")
    base = power_of(passage_differences(seal, published(golden, "base")))
    gpt = power_of(passage_differences(seal, published(golden, "gpt4_1")))
    assert base.passages_needed == 164
    assert gpt.passages_needed is not None and gpt.passages_needed > 15_000
    assert 0.055 < gpt.smallest_found < 0.065
    said = settled_sentence(paired_difference(seal, published(golden, "gpt4_1")), gpt)
    assert "not distinguishable from noise; to settle +0.7 points would take 15548 passages" in said
    real = settled_sentence(paired_difference(seal, published(golden, "base")), base)
    assert real.endswith("200 passages: real")


def standardised(draws: np.ndarray) -> np.ndarray:
    return (draws - draws.mean()) / draws.std()


def test_so_many_passages_find_the_difference_as_often_as_said() -> None:
    generator = np.random.default_rng(0)
    pilot = standardised(generator.normal(size=2000))
    needed = power_of(list(0.1 + 0.3 * pilot)).passages_needed
    assert needed is not None
    runs = generator.normal(0.1, 0.3, (2000, needed))
    z = runs.mean(axis=1) / (runs.std(axis=1, ddof=1) / math.sqrt(needed))
    assert np.mean(z > 1.96) == pytest.approx(0.8, abs=0.05)


def test_repeats_help_only_against_the_noise_between_repeats() -> None:
    generator = np.random.default_rng(1)
    truths = 0.05 + 0.1 * standardised(generator.normal(size=400))
    noise = 0.5 * standardised(generator.normal(size=(400, 2)))
    summary = power_with_repeats([list(map(float, row)) for row in truths[:, None] + noise])
    assert summary.spread_of_repeats == pytest.approx(0.5 / math.sqrt(2), rel=0.1)
    # (0.1² + 0.5² / r) / 400 must be at most (0.05 / 2.8)²: r = 2.1
    assert summary.repeats_needed == 3
    assert "repeats of these passages" in summary.sentence()
    no_noise = power_with_repeats([[0.3, 0.3], [-0.29, -0.29]])
    assert no_noise.repeats_needed is None
    assert no_noise.sentence().endswith("more repeats of these passages would not do it")


def test_no_difference_needs_no_number_of_passages() -> None:
    assert power_of([0.1, -0.1]).passages_needed is None
    assert power_of([0.1, -0.1]).sentence().startswith("no difference to settle; 2 find ")


@pytest.mark.parametrize(("differences", "power"), [([0.1], 0.8), ([], 0.8), ([0.1, 0.2], 1.0)])
def test_too_little_to_say_is_refused(differences: list[float], power: float) -> None:
    with pytest.raises(SettingsError, match="at least 2 passages"):
        power_of(differences, power=power)


def test_a_perfect_grader_changes_nothing_but_the_last_digits() -> None:
    first, second = [[True, True], [True, False]] * 20, [[True, False], [False, False]] * 20
    perfect = GraderErrors(n_wrong=100_000, n_false_yes=0, n_right=100_000, n_false_no=0)
    plain, corrected = paired_difference(first, second), difference_with_grader_noise(first, second, perfect)
    assert corrected.mean == pytest.approx(plain.mean)
    assert (corrected.low, corrected.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    assert corrected.p_value == plain.p_value


def test_known_mistakes_are_taken_out_and_the_true_difference_is_found() -> None:
    generator = np.random.default_rng(2)
    errors = GraderErrors(n_wrong=5000, n_false_yes=500, n_right=5000, n_false_no=1000)  # 10 % and 20 %
    truth = {name: generator.random((300, 5)) < rate for name, rate in (("first", 0.6), ("second", 0.4))}

    def graded(right: np.ndarray) -> list[list[bool]]:
        says_yes = np.where(right, generator.random(right.shape) < 0.8, generator.random(right.shape) < 0.1)
        return [list(map(bool, row)) for row in says_yes]

    seen = graded(truth["first"]), graded(truth["second"])
    plain, corrected = paired_difference(*seen), difference_with_grader_noise(*seen, errors)
    true_difference = truth["first"].mean() - truth["second"].mean()
    assert plain.mean == pytest.approx(0.7 * true_difference, abs=0.03)
    assert corrected.mean == pytest.approx(true_difference, abs=0.04)
    assert corrected.low < true_difference < corrected.high
    assert corrected.high - corrected.low > plain.high - plain.low


def test_other_mistakes_in_the_other_run_can_be_the_whole_difference() -> None:
    """A rule that misses 7 % more of the baseline's right answers shows a gain where there is none."""
    first, second = [[True] * 9 + [False]] * 40, [[True] * 8 + [False] * 2] * 40
    right = GraderErrors(n_wrong=1000, n_false_yes=0, n_right=1000, n_false_no=100)
    worse = GraderErrors(n_wrong=1000, n_false_yes=0, n_right=1000, n_false_no=200)
    assert paired_difference(first, second).is_real
    corrected = difference_with_grader_noise(first, second, right, errors_of_minus=worse)
    assert corrected.mean == pytest.approx(0, abs=1e-9) and not corrected.is_real


def test_mistakes_are_counted_from_verdicts_whose_truth_is_known() -> None:
    errors = grader_errors([True, False, True, None, False], [True, True, False, True, None])
    assert errors == GraderErrors(n_wrong=1, n_false_yes=1, n_right=2, n_false_no=1)
    with pytest.raises(SettingsError, match="counts of checked answers"):
        grader_errors([True], [True])
    coin = GraderErrors(n_wrong=10, n_false_yes=5, n_right=10, n_false_no=5)
    with pytest.raises(DataError, match="tells nothing"):
        difference_with_grader_noise([[True]] * 2, [[False]] * 2, coin)


VERDICTS = st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=4)


@given(st.lists(VERDICTS, min_size=1, max_size=6))
def test_a_passage_without_a_verdict_in_both_runs_is_left_out(correct: list[list[bool | None]]) -> None:
    unknown: list[list[bool | None]] = [[None]] * len(correct)
    assert passage_differences(correct, unknown) == []
    graded = sum(any(v is not None for v in verdicts) for verdicts in correct)
    assert passage_differences(correct, correct) == [0.0] * graded


def test_no_fewer_passages_are_asked_for_than_can_be_real() -> None:
    assert power_of([0.5, 0.51, 0.49]).passages_needed == MIN_PASSAGES


@pytest.mark.parametrize(
    "differences",
    [[0.2] * 3, [0.0] * 8, [0.1] * 4 + [0.9] * 1 + [0.12] * 3 + [-0.01] * 2],
    ids=["few and alike", "none differs", "as many as needed and yet unsettled"],
)
def test_where_the_approximation_contradicts_the_test_no_number_is_given(differences: list[float]) -> None:
    assert power_of(differences, power=0.3).sentence().startswith("the normal approximation does not hold")


def test_power_is_over_the_questions_graded_in_both_runs() -> None:
    """The first run's right answer that the second has no verdict for is no difference."""
    first, second = [[True, False], [True, False]], [[None, False], [True, False]]
    assert passage_differences(first, second) == [0.0, 0.0]

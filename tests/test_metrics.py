"""Accuracies leave out what nobody graded; intervals say what is noise. benchmarks/coverage.py measures coverage."""

import itertools
import json
import math
import statistics
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.sandwich_covariance import cov_cluster_2groups
from statsmodels.stats.weightstats import ttost_paired

from benchmarks import coverage
from seal_nb.errors import DataError, SettingsError
from seal_nb.metrics import Difference, accuracy, adjusted, gain, mean_interval, paired_difference, passages_needed

VERDICTS = st.lists(st.sampled_from([True, False, None]), max_size=12)


def published_verdicts(golden: Path, run: str, arm: str = "adapter") -> list[list[bool]]:
    runs = json.loads((golden / "eval_correct.json").read_text())["runs"]
    return [[mark == "1" for mark in passage[arm]] for passage in runs[run]["passages"]]


def verdicts(generator: np.random.Generator, n: int, rate: float = 0.4, n_questions: int = 5) -> list[list[bool]]:
    return [list(map(bool, row)) for row in generator.random((n, n_questions)) < rate]


def test_seal_against_base_is_real_and_against_gpt_4_1_is_noise(golden: Path) -> None:
    seal = published_verdicts(golden, "iter2")
    against_base = paired_difference(seal, published_verdicts(golden, "base"))
    against_gpt = paired_difference(seal, published_verdicts(golden, "gpt4_1"))
    assert (against_base.mean, against_base.low, against_base.high) == pytest.approx((0.073, 0.027, 0.119), abs=0.002)
    assert (against_gpt.mean, against_gpt.low, against_gpt.high) == pytest.approx((0.007, -0.035, 0.048), abs=0.002)
    assert against_base.sentence().startswith("+7.3 points [2.")
    assert against_base.sentence().endswith("], 200 passages: real")
    assert against_gpt.sentence().endswith("200 passages: not distinguishable from noise")
    assert against_gpt.sentence(0.02).endswith("not shown to be less than 2 points worse")
    assert against_gpt.no_worse(0.04) and not against_gpt.is_equivalent(0.04)
    assert against_gpt.sentence(0.05).endswith(": equal within 5 points")
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
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        assert estimate.low < estimate.high, "no sample of a few passages is certain"
        assert estimate.n == len(correct)


@given(st.integers(0, 1000), st.integers(20, 60))
def test_a_difference_is_the_paired_t_test_of_the_passage_means(seed: int, n: int) -> None:
    """Against scipy, but for the half question that keeps few equal passages from being certain."""
    generator = np.random.default_rng(seed)
    one, other = verdicts(generator, n), verdicts(generator, n, 0.5)
    found, means = paired_difference(one, other), (np.mean(one, axis=1), np.mean(other, axis=1))
    scipys = stats.ttest_rel(*means)
    assert found.mean == pytest.approx(np.mean(means[0] - means[1]))
    spread = np.var(means[0] - means[1], ddof=1) + 0.5 / 25 / (n - 1)
    assert found.se == pytest.approx(np.sqrt(spread / n))
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(found.mean) / found.se, n - 1))
    assert found.p_value >= scipys.pvalue - 1e-9 and found.p_value == pytest.approx(scipys.pvalue, abs=0.03)
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)


@given(st.integers(0, 200), st.integers(2, 6))
def test_a_difference_by_questions_is_that_of_a_regression_with_clustered_errors(seed: int, n_questions: int) -> None:
    """Against statsmodels: questions count once, passages are the clusters."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, n_questions + 1, size=40)
    one, other = ([list(generator.random(n) < rate) for n in counts] for rate in (0.6, 0.4))
    found = paired_difference(one, other, weighting="question")
    rows = [
        (a - 1.0 * b, at) for at, pair in enumerate(zip(one, other, strict=True)) for a, b in zip(*pair, strict=True)
    ]
    data = pd.DataFrame(rows, columns=["change", "passage"])
    model = smf.ols("change ~ 1", data)
    fit = model.fit(
        cov_type="cluster", cov_kwds={"groups": data["passage"], "df_correction": False, "use_correction": False}
    )
    few = 0.5 * 40 / len(rows) ** 2 / 39
    assert found.mean == pytest.approx(fit.params["Intercept"])
    assert found.se**2 - few == pytest.approx(fit.bse["Intercept"] ** 2 * 40 / 39, rel=1e-6)


def test_sequences_that_share_passages_are_clustered_both_ways() -> None:
    """Against the two-way clustered errors of statsmodels (Cameron, Gelbach and Miller 2011)."""
    generator = np.random.default_rng(4)
    passages = np.array([generator.permutation(12)[:6] for _ in range(8)])
    change = 0.4 * generator.standard_normal(12)[passages] + 0.3 * generator.standard_normal((8, 1))
    change = change + 0.1 * generator.standard_normal((8, 6))
    found = paired_difference(
        change.tolist(), np.zeros((8, 6)).tolist(), groups_P_Q=passages.tolist(), unit="sequences"
    )
    rows = pd.DataFrame({"change": change.ravel(), "sequence": np.repeat(range(8), 6), "passage": passages.ravel()})
    fit = smf.ols("change ~ 1", rows).fit()
    both, of_sequences, of_passages = (
        cov[0, 0] for cov in cov_cluster_2groups(fit, rows["sequence"], rows["passage"], use_correction=False)
    )
    shared = of_sequences + of_passages - both
    expected = of_sequences * 8 / 7 + of_passages * 12 / 11 - shared * 48 / 47
    assert found.se**2 - 0.5 * 8 / 48**2 / 7 == pytest.approx(expected, rel=1e-6)
    assert (found.n, found.crossed, found.units) == (8, (12, "passages"), "8 sequences × 12 passages")
    alone = paired_difference(change.tolist(), np.zeros((8, 6)).tolist(), unit="sequences")
    assert alone.se < 0.9 * found.se, "as if the eight sequences had 48 passages"


def test_few_distinct_passages_are_too_few_in_any_number_of_sequences() -> None:
    rows, zeros, labels = [[1.0, 0.8]] * 50, [[0.0, 0.0]] * 50, [["a", "b"]] * 50
    found = paired_difference(rows, zeros, unit="sequences", groups_P_Q=labels)
    assert found.sentence().endswith("50 sequences × 2 passages: too few to tell (at least 6)")


def test_all_answers_equal_is_wide_with_few_and_narrow_with_many() -> None:
    """By Wilson at zero, with questions of a passage counted as alike."""
    few, many = (mean_interval([[False] * 5] * n) for n in (6, 200))
    assert (few.mean, few.low) == (0.0, 0.0) and 0.10 < few.high < 0.20
    assert 0.003 < many.high < 0.01
    none, all_of_them = (
        paired_difference([[True] * 5] * 6, [[True] * 5] * 6),
        paired_difference([[True]] * 6, [[False]] * 6),
    )
    assert none.low == -none.high and 0.1 < none.high < 0.3 and none.p_value == 1.0
    assert all_of_them.is_real and all_of_them.low < 0.8 and all_of_them.high == 1.0


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
    assert five.p_value < 0.05 and not five.is_real
    assert five.sentence().endswith("5 passages: too few to tell (at least 6)")
    one = paired_difference([[True]], [[False]])
    assert (one.low, one.high, one.p_value) == (-1.0, 1.0, 1.0)
    assert "1 passage:" in one.sentence()
    assert (mean_interval([[True]]).low, mean_interval([[True]]).high) == (0.0, 1.0)


def test_runs_over_other_passages_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="2 and 1 passages cannot be paired"):
        paired_difference([[True], [True]], [[True]])
    with pytest.raises(DataError, match="no passage has a graded answer"):
        mean_interval([[None], []])


def null_differences(generator: np.random.Generator, n: int) -> list[Difference]:
    arms = [verdicts(generator, 20) for _ in range(n)]
    return [paired_difference(one, other) for one, other in itertools.combinations(arms, 2)]


def test_comparisons_looked_at_together_have_holms_p_and_intervals_that_agree() -> None:
    differences = null_differences(np.random.default_rng(2), 5)
    differences[3] = paired_difference(
        [[True] * 5] * 10 + [[True, False]] * 10, [[False] * 5] * 10 + [[True, False]] * 10
    )
    found: list[Any] = adjusted([None, *differences])
    assert found[0] is None
    order = sorted(range(10), key=lambda at: differences[at].p_value)
    expected, largest = {}, 0.0
    for place, at in enumerate(order):
        largest = max(largest, (10 - place) * differences[at].p_value)
        expected[at] = min(1.0, largest)
    assert [one.p_value for one in found[1:]] == pytest.approx([expected[at] for at in range(10)])
    for one, before in zip(found[1:], differences, strict=True):
        assert (one.p_value < 0.05) == (not one.low <= 0 <= one.high)
        assert one.low <= before.low + 1e-12 and one.high >= before.high - 1e-12
        assert "20 passages (one of 10 comparisons): " in one.sentence()
    assert [one.is_real for one in found[1:]].count(True) == 1
    assert adjusted(differences[:1]) == differences[:1], "a single comparison stays as it is"


def test_equivalence_is_two_one_sided_tests() -> None:
    generator = np.random.default_rng(3)
    one, other = verdicts(generator, 300, n_questions=8), verdicts(generator, 300, n_questions=8)
    found = paired_difference(one, other)
    for margin in (0.01, 0.03, 0.06, 0.1):
        p, *_ = ttost_paired(np.mean(one, axis=1), np.mean(other, axis=1), -margin, margin)
        assert found.is_equivalent(margin) == (p < 0.05)
    assert found.is_equivalent(0.1) and not found.is_equivalent(0.01)
    few = paired_difference(one[:5], other[:5])
    assert not few.no_worse(0.9), "five passages show nothing"


@pytest.mark.parametrize(("smallest", "sd"), [(0.05, 0.3), (0.02, 0.1), (0.3, 0.2)])
def test_the_passages_of_a_plan_find_its_effect_in_four_of_five_cases(smallest: float, sd: float) -> None:
    n, generator = passages_needed(smallest, sd), np.random.default_rng(1)
    if n > 6:
        samples = smallest + sd * generator.standard_normal((4000, n))
        found = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert passages_needed(0.05, 0.3) == 285 and passages_needed(0.5, 0.0) == 6


def test_passages_without_end_take_a_bounded_memory() -> None:
    tracemalloc.start()
    found = paired_difference([[True], [False]] * 50_000, [[False], [True]] * 50_000)
    assert tracemalloc.get_traced_memory()[1] < 200e6 and found.n == 100_000
    tracemalloc.stop()


FOUND = json.loads((Path(coverage.__file__).with_suffix(".json")).read_text())


def test_the_page_on_statistics_shows_the_committed_simulation() -> None:
    page = (Path(coverage.__file__).parent.parent / "docs/statistics.md").read_text().splitlines()
    assert [line for line in coverage.markdown(FOUND) if line not in page] == []


def test_the_committed_simulation_is_as_good_as_asked() -> None:
    """Coverage from 0.94 to 0.965, at most 5 % false "real", but for the standard error of 10,000 runs (0.002)."""
    for row in FOUND["coverage"]:
        assert 0.938 <= row["difference_after"] <= 0.967, row
        assert row["effect"] or row["real_after"] <= 0.052, row
    assert all(row["false_real_after"] <= 0.055 for row in FOUND["continual"])
    assert FOUND["many_arms"]["any_real_after"] <= 0.05 < FOUND["many_arms"]["any_real_before"]
    assert all(row["p_below_5_percent"] <= 0.065 for row in FOUND["forgetting"])


@pytest.mark.parametrize("study", [coverage.many_arms, coverage.continual, coverage.forgetting_of_nothing])
def test_a_few_runs_of_the_simulation_find_the_same(study: Callable[[int], Any]) -> None:
    name = {"forgetting_of_nothing": "forgetting"}.get(study.__name__, study.__name__)
    found, committed = study(20), FOUND[name]
    rows = [(found, committed)] if isinstance(found, dict) else list(zip(found, committed, strict=True))
    for own, theirs in rows:
        assert own.keys() == theirs.keys()
        for key in ("any_real_after", "false_real_after", "p_below_5_percent"):
            assert key not in own or own[key] <= theirs[key] + 0.2
        for key in ("forgetting_before", "chance_after"):
            assert key not in own or own[key] == pytest.approx(theirs[key], abs=0.03)


@pytest.mark.parametrize(("smallest", "sd"), [(5, 0.3), (0, 0.3), (-0.1, 0.3), (0.05, math.nan)])
def test_a_plan_for_no_effect_is_refused(smallest: float, sd: float) -> None:
    with pytest.raises(SettingsError, match="give fractions such as 0.05"):
        passages_needed(smallest, sd)
    assert passages_needed(0.9, 0.1) == 6

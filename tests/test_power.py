"""How many passages settle a difference."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import SettingsError
from seal_nb.metrics import MIN_PASSAGES, passage_differences, power_of


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
    assert gpt.sentence().startswith("to settle +0.7 points would take 15548 passages")


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


def test_no_difference_needs_no_number_of_passages() -> None:
    assert power_of([0.1, -0.1]).passages_needed is None
    assert power_of([0.1, -0.1]).sentence().startswith("no difference to settle; 2 find ")


@pytest.mark.parametrize(("differences", "power"), [([0.1], 0.8), ([], 0.8), ([0.1, 0.2], 1.0)])
def test_too_little_to_say_is_refused(differences: list[float], power: float) -> None:
    with pytest.raises(SettingsError, match="at least 2 passages"):
        power_of(differences, power=power)


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

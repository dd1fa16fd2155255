"""How many passages settle a difference."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError
from seal_nb.metrics import MIN_PASSAGES, to_settle


def published(golden: Path, run: str) -> list[list[bool]]:
    runs = json.loads((golden / "eval_correct.json").read_text())["runs"]
    return [[mark == "1" for mark in passage["adapter"]] for passage in runs[run]["passages"]]


def settle(differences: list[float]) -> str:
    """Of one difference per passage."""
    return to_settle([[one] for one in differences], [[0.0]] * len(differences))


def test_thousands_of_passages_would_not_settle_seal_against_gpt_4_1(golden: Path) -> None:
    said = to_settle(published(golden, "iter2"), published(golden, "gpt4_1"))
    assert said == "to settle +0.7 points would take 15548 passages (80 % power); 200 find 6.0 points"


def standardised(draws: np.ndarray) -> np.ndarray:
    return (draws - draws.mean()) / draws.std()


def test_so_many_passages_find_the_difference_as_often_as_said() -> None:
    generator = np.random.default_rng(0)
    pilot = standardised(generator.normal(size=50))
    found = re.search(r"would take (\d+) passages", settle(list(0.1 + 0.3 * pilot)))
    assert found is not None
    needed = int(found[1])
    runs = generator.normal(0.1, 0.3, (2000, needed))
    z = runs.mean(axis=1) / (runs.std(axis=1, ddof=1) / math.sqrt(needed))
    assert np.mean(z > 1.96) == pytest.approx(0.8, abs=0.05)


def test_no_difference_needs_no_number_of_passages() -> None:
    assert settle([0.1, -0.1]).startswith("no difference to settle; 2 find ")


def test_one_passage_has_no_spread_to_say_anything_by() -> None:
    assert settle([0.1]) == settle([]) == ""
    with pytest.raises(DataError, match="cannot be paired"):
        to_settle([[True]], [])


VERDICTS = st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=4)


@given(st.lists(VERDICTS, min_size=1, max_size=6))
def test_a_passage_without_a_verdict_in_both_runs_is_left_out(correct: list[list[bool | None]]) -> None:
    unknown: list[list[bool | None]] = [[None]] * len(correct)
    assert to_settle(correct, unknown) == ""
    n_graded = sum(any(v is not None for v in verdicts) for verdicts in correct)
    said = to_settle(correct, correct)
    assert f"for {n_graded} passages that differ by +0.0 ± 0.0 points" in said if n_graded > 1 else said == ""


def test_no_fewer_passages_are_asked_for_than_can_be_real() -> None:
    assert f"would take {MIN_PASSAGES} passages" in settle([0.5, 0.51, 0.49])


@pytest.mark.parametrize(
    "differences",
    [[0.2] * 3, [0.0] * 8, [0.5, 0.51, 0.49, 0.5, 0.5, 0.5, 0.5]],
    ids=["few and alike", "none differs", "as many as needed and yet unsettled"],
)
def test_where_the_approximation_contradicts_the_test_no_number_is_given(differences: list[float]) -> None:
    assert settle(differences).startswith("the normal approximation does not hold")


def test_power_is_over_the_questions_graded_in_both_runs() -> None:
    """The first run's right answer that the second has no verdict for is no difference."""
    first, second = [[True, False], [True, False]], [[None, False], [True, False]]
    assert "differ by +0.0 ± 0.0 points" in to_settle(first, second)

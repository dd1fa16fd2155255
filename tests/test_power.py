"""How many passages a difference needs."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError
from seal_nb.metrics import MIN_PASSAGES, Weighting, paired_difference, to_settle


def published(golden: Path, run: str) -> list[list[bool]]:
    runs = json.loads((golden / "eval_correct.json").read_text())["runs"]
    return [[mark == "1" for mark in passage["adapter"]] for passage in runs[run]["passages"]]


def settle(differences: list[float]) -> str:
    """Of one difference per passage."""
    return to_settle([[one] for one in differences], [[0.0]] * len(differences), "passage", "passages")


def test_seal_against_gpt_4_1_needs_thousands_of_passages(golden: Path) -> None:
    said = to_settle(published(golden, "iter2"), published(golden, "gpt4_1"), "passage", "passages")
    assert said == (
        "a difference of +0.7 points needs 15548 passages (80 % power); "
        "with 200 passages only a difference of 6.0 points would be found"
    )


def standardised(draws: np.ndarray) -> np.ndarray:
    return (draws - draws.mean()) / draws.std()


def test_so_many_passages_find_the_difference_as_often_as_said() -> None:
    generator = np.random.default_rng(0)
    pilot = standardised(generator.normal(size=50))
    found = re.search(r"needs (\d+) passages", settle(list(0.1 + 0.3 * pilot)))
    assert found is not None
    needed = int(found[1])
    runs = generator.normal(0.1, 0.3, (2000, needed))
    z = runs.mean(axis=1) / (runs.std(axis=1, ddof=1) / math.sqrt(needed))
    assert np.mean(z > 1.96) == pytest.approx(0.8, abs=0.05)


def test_no_difference_needs_no_number_of_passages() -> None:
    assert settle([0.1, -0.1]).startswith("the runs do not differ; with 2 passages only a difference of ")
    assert settle([0.0] * 8) == "the runs do not differ"


def test_one_passage_has_no_spread_to_say_anything_by() -> None:
    assert settle([0.1]) == ""
    with pytest.raises(DataError, match="no passage has a graded answer"):
        settle([])
    with pytest.raises(DataError, match="cannot be paired"):
        to_settle([[True]], [], "passage", "passages")


VERDICTS = st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=4)


@given(st.lists(VERDICTS, min_size=1, max_size=6))
def test_a_passage_without_a_verdict_in_both_runs_is_left_out(correct: list[list[bool | None]]) -> None:
    n_graded = sum(any(v is not None for v in verdicts) for verdicts in correct)
    if not n_graded:
        return
    wrong = [[None if verdict is None else False for verdict in verdicts] for verdicts in correct]
    said = to_settle(correct, wrong, "passage", "passages")
    if n_graded == 1:
        assert said == ""
    elif any(True in verdicts for verdicts in correct):
        assert f" {n_graded} passages" in said
    else:
        assert said == "the runs do not differ"


def test_no_fewer_passages_are_asked_for_than_can_be_real() -> None:
    assert f"needs {MIN_PASSAGES} passages" in settle([0.5, 0.51, 0.49])


@pytest.mark.parametrize(
    "differences",
    [[0.2] * 3, [0.5, 0.51, 0.49, 0.5, 0.5, 0.5, 0.5]],
    ids=["few and alike", "as many as needed and yet unsettled"],
)
def test_where_the_approximation_contradicts_the_test_no_number_is_given(differences: list[float]) -> None:
    assert settle(differences).startswith("how many passages this difference needs is unknown")


def test_power_is_over_the_questions_graded_in_both_runs() -> None:
    """The first run's right answer that the second has no verdict for is no difference."""
    first, second = [[True, False], [True, False]], [[None, False], [True, False]]
    assert to_settle(first, second, "passage", "passages") == "the runs do not differ"


def test_the_difference_and_the_unit_are_those_of_the_comparison() -> None:
    """Passages of one question gain, passages of ten lose: each weighting has its own sign."""
    first, second = [[True]] * 3 + [[True] + [False] * 9] * 2, [[False]] * 3 + [[True] * 4 + [False] * 6] * 2
    weightings: tuple[Weighting, ...] = ("passage", "question")
    signs = []
    for weighting in weightings:
        difference = paired_difference(first, second, weighting=weighting)
        said = to_settle(first, second, weighting, "sequences")
        assert said.startswith(f"a difference of {100 * difference.mean:+.1f} points needs ")
        assert "sequences (80 % power); with 5 sequences only" in said
        signs.append(difference.mean > 0)
    assert signs == [True, False]


def test_with_so_many_passages_the_difference_is_as_many_standard_errors_if_questions_count() -> None:
    """80 % power at 5 % needs 2.80 standard errors; those of the drawn differences are measured."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 10, 60)
    first, second = (
        [list(generator.random(n) < (share if n > 5 else 0.3)) for n in counts.tolist()] for share in (0.4, 0.3)
    )
    found = re.search(r"needs (\d+) passages", to_settle(first, second, "question", "passages"))
    assert found is not None
    gained = np.array([sum(a) - sum(b) for a, b in zip(first, second, strict=True)])
    drawn = generator.integers(0, 60, (4000, int(found[1])))
    differences = gained[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    assert gained.sum() / counts.sum() / differences.std() == pytest.approx(2.80, rel=0.1)

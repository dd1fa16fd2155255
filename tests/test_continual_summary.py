"""Continual matrices: published aggregation, forgetting and transfer with intervals over sequences."""

import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError
from seal_nb.results.continual import (
    ContinualRun,
    Matrix,
    aggregate_summaries,
    continual_estimates,
    continual_matrix,
    summarize_sequences,
    was_asked,
)

# Three passages: each is learnt by its own edit, and the first is forgotten by the last edit.
FORGETTING: Matrix = [[0.0, 0.0, 0.0], [1.0, None, None], [0.5, 1.0, None], [0.0, 1.0, 1.0]]


def summary(matrices: list[Matrix]) -> dict:
    return summarize_sequences(matrices, dataset="d.json", base_model="m")


def test_the_matrix_holds_accuracies_and_leaves_blank_what_was_not_asked() -> None:
    verdicts = [[[True, False], [None, True]], [[True, True], None], [[None, None], [False]]]
    assert continual_matrix(verdicts) == [[0.5, 1.0], [1.0, None], [None, 0.0]]
    with pytest.raises(DataError, match="has 1 passages after 1 edits, not 2"):
        continual_matrix([[[], []], [[]], [[], []]])


def test_a_summary_has_the_published_keys_and_zeros_where_nothing_was_asked() -> None:
    other: Matrix = [[0.5, 0.0, 0.0], *FORGETTING[1:]]
    made = summary([FORGETTING, other])
    assert made["mean_over_sequences"] == [[0.25, 0, 0], [1, 0, 0], [0.5, 1, 0], [0, 1, 1]]
    assert made["std_over_sequences"][0][0] == round(statistics.stdev([0.0, 0.5]), 4)
    assert (made["n_sequences"], made["n_datapoints"]) == (2, 3)


def test_one_sequence_has_a_spread_of_zero_and_an_ungraded_cell_stays_null() -> None:
    ungraded: Matrix = [[None, 0.0], [1.0, None], [1.0, 1.0]]
    made = summary([ungraded])
    assert made["mean_over_sequences"] == [[None, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert made["std_over_sequences"] == [[None, 0.0], [0.0, 0.0], [0.0, 0.0]]


@given(st.lists(st.lists(st.integers(0, 10000), min_size=2, max_size=2), min_size=1, max_size=8))
def test_runs_aggregate_as_published_mean_of_means_and_mean_of_stds(values: list[list[int]]) -> None:
    runs = [
        {
            "mean_over_sequences": [[mean / 10000], [mean / 20000]],
            "std_over_sequences": [[std / 10000], [0.0]],
            "n_sequences": 8,
        }
        for mean, std in values
    ]
    made = aggregate_summaries(runs)
    assert made["n_sequences"] == 8 * len(values)
    assert made["mean_over_sequences"][0][0] == round(statistics.mean(m / 10000 for m, _ in values), 4)
    assert made["mean_over_sequences"][1][0] == round(statistics.mean(m / 20000 for m, _ in values), 4)
    assert made["std_over_sequences"][0][0] == round(statistics.mean(s / 10000 for _, s in values), 4)


def test_the_pooled_spread_is_that_of_all_sequences_together() -> None:
    starts = [[0.1, 0.5, 0.3], [0.9, 0.7], [0.2, 0.2, 0.6, 1.0]]
    runs = [summary([[[start], [1.0]] for start in run]) for run in starts]
    made = aggregate_summaries(runs)
    everything = [start for run in starts for start in run]
    assert made["pooled_std_over_sequences"][0][0] == pytest.approx(statistics.stdev(everything), abs=2e-4)
    assert made["std_over_sequences"][0][0] < made["pooled_std_over_sequences"][0][0]
    assert made["n_sequences"] == 9 and len(made["matrices"]) == 9


def test_the_published_overall_results_aggregate_to_themselves_and_give_the_published_numbers(golden: Path) -> None:
    published = json.loads((golden / "published_results.json").read_text())["continual_overall_results"]
    made = aggregate_summaries([published, published])
    assert made["mean_over_sequences"] == published["mean_over_sequences"]
    assert made["std_over_sequences"] == published["std_over_sequences"]
    mean = published["mean_over_sequences"]
    matrix = [[v if was_asked(t, p) else None for p, v in enumerate(row)] for t, row in enumerate(mean)]
    found = continual_estimates([matrix])
    assert round(found["never_edited"].mean, 3) == 0.307
    assert round(found["after_own_edit"].mean, 3) == 0.415
    assert round(found["final"].mean, 3) == 0.247


def test_runs_of_other_sizes_are_not_put_together() -> None:
    two: Matrix = [[0.0, 0.0], [1.0, None], [1.0, 1.0]]
    with pytest.raises(DataError, match="do not make one set"):
        aggregate_summaries([summary([FORGETTING]), summary([two])])
    with pytest.raises(DataError):
        summary([])
    with pytest.raises(DataError, match="mean_over_sequences"):
        aggregate_summaries([{"n_sequences": 8}])


@pytest.mark.parametrize("field", ["dataset", "base_model", "strategy"])
def test_runs_of_another_kind_are_not_put_together(field: str) -> None:
    one = summary([FORGETTING]) | {"strategy": "stacked"}
    assert aggregate_summaries([one, one])["strategy"] == "stacked"
    with pytest.raises(DataError, match=f"field '{field}': differs between the summaries: .*'another'"):
        aggregate_summaries([one, one | {field: "another"}])


def test_forgetting_and_backward_transfer_of_a_worked_example() -> None:
    found = continual_estimates([FORGETTING] * 8)
    assert found["after_own_edit"].mean == 1.0
    assert found["final"].mean == pytest.approx(2 / 3)
    assert found["backward_transfer"].mean == pytest.approx(-0.5)  # passage 0 fell by 1, passage 1 by 0
    assert found["forgetting"].mean == pytest.approx(0.5)
    difference = found["final_minus_never_edited"]
    assert difference.sentence() == "+66.7 points [66.7, 66.7], 8 sequences: real"  # type: ignore[union-attr]


def test_one_passage_has_no_forgetting_to_speak_of() -> None:
    assert "forgetting" not in continual_estimates([[[0.0], [1.0]]])


def test_the_curve_is_over_the_passages_edited_so_far() -> None:
    curve = ContinualRun(value=summary([FORGETTING])).curve()
    assert list(curve.accuracy) == pytest.approx([1.0, 0.75, 2 / 3])
    curve = ContinualRun(value=summary([[[0.2, 0.4], [1, None], [1, 1]]])).curve()
    assert list(curve.never_edited) == pytest.approx([0.2, 0.3])

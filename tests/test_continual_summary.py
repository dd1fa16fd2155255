"""Continual matrices: published aggregation, forgetting and transfer with intervals over sequences."""

import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError
from seal_nb.results.collect import collect
from seal_nb.results.continual import (
    ContinualRun,
    Matrix,
    aggregate_summaries,
    continual_matrix,
    forgetting,
    pool_summaries,
    summarize_sequences,
    was_asked,
)
from seal_nb.storage import write_json

# Three passages: each is learnt by its own edit, and the first is forgotten by the last edit.
FORGETTING: Matrix = [[0.0, 0.0, 0.0], [1.0, None, None], [0.5, 1.0, None], [0.0, 1.0, 1.0]]


def summary(matrices: list[Matrix]) -> dict:
    return summarize_sequences(matrices, dataset="d.json", base_model="m")


def pooled(*summaries: dict) -> dict:
    return aggregate_summaries([ContinualRun(value=value) for value in summaries])


def test_the_matrix_holds_accuracies_and_leaves_blank_what_was_not_asked() -> None:
    verdicts = [[[True, False], [None, True]], [[True, True], None], [[None, None], [False]]]
    assert continual_matrix(verdicts) == [[0.5, 1.0], [1.0, None], [None, 0.0]]


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
    made = pooled(*runs)
    assert made["n_sequences"] == 8 * len(values)
    assert made["mean_over_sequences"][0][0] == round(statistics.mean(m / 10000 for m, _ in values), 4)
    assert made["mean_over_sequences"][1][0] == round(statistics.mean(m / 20000 for m, _ in values), 4)
    assert made["std_over_sequences"][0][0] == round(statistics.mean(s / 10000 for _, s in values), 4)


def test_the_pooled_spread_is_that_of_all_sequences_together() -> None:
    starts = [[0.1, 0.5, 0.3], [0.9, 0.7], [0.2, 0.2, 0.6, 1.0]]
    runs = [summary([[[start], [1.0]] for start in run]) for run in starts]
    made = pooled(*runs)
    everything = [start for run in starts for start in run]
    assert made["pooled_std_over_sequences"][0][0] == pytest.approx(statistics.stdev(everything), abs=2e-4)
    assert made["std_over_sequences"][0][0] < made["pooled_std_over_sequences"][0][0]
    assert made["n_sequences"] == 9 and len(made["matrices"]) == 9


def test_the_published_overall_results_aggregate_to_themselves_and_give_the_published_numbers(golden: Path) -> None:
    published = json.loads((golden / "published_results.json").read_text())["continual_overall_results"]
    made = pooled(published, published)
    assert made["mean_over_sequences"] == published["mean_over_sequences"]
    assert made["std_over_sequences"] == published["std_over_sequences"]
    mean = published["mean_over_sequences"]
    matrix = [[v if was_asked(t, p) else None for p, v in enumerate(row)] for t, row in enumerate(mean)]
    found = ContinualRun(value=summary([matrix])).estimates()
    assert round(found["never_edited"].mean, 3) == 0.307
    assert round(found["after_own_edit"].mean, 3) == 0.415
    assert round(found["final"].mean, 3) == 0.247


def test_a_pooled_summary_is_confirmed_and_a_changed_cell_is_named() -> None:
    ungraded: Matrix = [[None, 0.0, 0.0], *FORGETTING[1:]]
    made = pooled(summary([FORGETTING, ungraded]), summary([[[0.5, 0.0, 0.0], *FORGETTING[1:]]] * 3))
    assert ContinualRun(value=made).disagreements() == ContinualRun(value=made).notes() == []
    made["mean_over_sequences"][3][0] = 0.9
    (found,) = ContinualRun(value=made).disagreements()
    assert found.startswith("summary: mean_over_sequences is stored as")


def test_a_pooled_summary_that_does_not_say_which_sequences_each_run_has_is_not_checked() -> None:
    whole = pooled(summary([FORGETTING]), summary([FORGETTING]))
    without = {name: entry for name, entry in whole.items() if name != "n_sequences_of_runs"}
    for made in (without, pooled(whole, summary([FORGETTING]))):
        run = ContinualRun(value=made)
        assert run.disagreements() == [] and "the means are not checked" in run.notes()[0]


def test_runs_of_other_sizes_are_not_put_together() -> None:
    two: Matrix = [[0.0, 0.0], [1.0, None], [1.0, 1.0]]
    with pytest.raises(DataError, match="do not make one set"):
        pooled(summary([FORGETTING]), summary([two]))
    with pytest.raises(DataError):
        summary([])
    with pytest.raises(DataError, match="field 'mean_over_sequences': is missing"):
        pooled({"n_sequences": 8})
    with pytest.raises(DataError, match="field 'std_over_sequences': matrices of sizes"):
        pooled(summary([FORGETTING]) | {"std_over_sequences": two})


@pytest.mark.parametrize("field", ["n_sequences", "std_over_sequences"])
def test_a_summary_without_a_number_that_pooling_needs_is_named_with_its_file(tmp_path: Path, field: str) -> None:
    whole = write_json(tmp_path / "whole.json", summary([FORGETTING]))
    cut = write_json(tmp_path / "cut.json", {**summary([FORGETTING]), field: None})
    with pytest.raises(DataError, match=rf"cut\.json, field '{field}': is missing"):
        pool_summaries([whole, cut], tmp_path / "pooled.json")
    assert not (tmp_path / "pooled.json").exists()


@pytest.mark.parametrize(
    ("titles", "second_step", "reason"),
    [
        (["t"], {"texts": [], "correct": []}, "has 0 entries for 1 questions"),
        (["t", "u"], {"texts": ["a"], "correct": [True]}, "has 1 entries for 2 titles"),
        (["t"], None, "has 1 entries for 2 steps"),
    ],
)
def test_a_summary_whose_lists_do_not_fit_is_listed_and_ends_no_collection(
    tmp_path: Path, titles: list[str], second_step: dict | None, reason: str
) -> None:
    asked = [[{"question": "q", "answer": "a"}]]
    steps = [{"texts": ["a"], "correct": [True]}, *([second_step] if second_step else [])]
    broken = summary([[[1.0], [1.0]]]) | {"sequences": [{"titles": titles, "questions": asked, "steps": steps}]}
    write_json(tmp_path / "summary_broken.json", broken)
    write_json(tmp_path / "summary_base.json", summary([FORGETTING]))
    found = collect(tmp_path)
    assert found.unread == (("summary_broken.json", reason),)
    assert list(found.accuracy(form="continual")["arm"]) == ["summary_base"]


@pytest.mark.parametrize("field", ["dataset", "base_model", "strategy"])
def test_runs_of_another_kind_are_not_put_together(field: str) -> None:
    one = summary([FORGETTING]) | {"strategy": "stacked"}
    assert pooled(one, one)["strategy"] == "stacked"
    with pytest.raises(DataError, match=f"field '{field}': differs between the summaries: .*'another'"):
        pooled(one, one | {field: "another"})


def test_forgetting_and_backward_transfer_of_a_worked_example() -> None:
    found = ContinualRun(value=summary([FORGETTING] * 8)).estimates()
    assert found["after_own_edit"].mean == 1.0
    assert found["final"].mean == pytest.approx(2 / 3)
    assert found["backward_transfer"].mean == pytest.approx(-0.5)  # passage 0 fell by 1, passage 1 by 0
    assert found["forgetting"].mean == pytest.approx(0.5)
    difference = found["final_minus_never_edited"]
    assert difference.sentence().startswith("+66.7 points [")  # type: ignore[union-attr]
    assert difference.sentence().endswith("], 8 sequences: real")  # type: ignore[union-attr]
    assert found["forward_transfer"] is None, "not asked before its own edit"


def test_one_passage_has_no_forgetting_to_speak_of() -> None:
    assert "forgetting" not in ContinualRun(value=summary([[[0.0], [1.0]]])).estimates()


def test_forward_transfer_is_what_earlier_edits_changed_before_a_passages_own() -> None:
    asked_before: Matrix = [[0.2, 0.2, 0.2], [1.0, 0.4, None], [0.5, 1.0, 0.2], [0.0, 1.0, 1.0]]
    run = ContinualRun(value=summary([asked_before]))
    assert run.estimates()["forward_transfer"].mean == pytest.approx(0.1)  # type: ignore[union-attr]
    assert run.mean[1] == [1.0, 0.0, 0.0], "as published: 0.0 before its own edit"


def test_forgetting_by_chance_is_the_mean_over_all_orders_of_a_passages_cells() -> None:
    """Against all orders written out."""
    matrices: list[Matrix] = [
        [[0.0] * 3, [0.6, None, None], [0.9, 0.2, None], [0.4, 0.8, 0.0]],
        [[0.0] * 3, [0.3, None, None], [0.3, 0.5, None], [0.6, None, 0.0]],
    ]
    found = forgetting(matrices, {"unit": "sequences"})
    cells_P = [[(0.6, 0.9, 0.4), (0.2, 0.8)], [(0.3, 0.3, 0.6)]]  # the ungraded last cell leaves its passage out

    def drop(cells: tuple[float, ...]) -> float:
        return max(cells[:-1]) - cells[-1]

    drops = [statistics.mean(map(drop, of_sequence)) for of_sequence in cells_P]
    assert found["forgetting"].mean == pytest.approx(statistics.mean(drops))  # type: ignore[union-attr]
    orders = [
        statistics.mean(statistics.mean(map(drop, itertools.permutations(cells))) for cells in of_sequence)
        for of_sequence in cells_P
    ]
    assert found["forgetting_by_chance"].mean == pytest.approx(statistics.mean(orders))  # type: ignore[union-attr]


def test_falling_at_every_step_is_forgetting_and_noise_is_not() -> None:
    generator = np.random.default_rng(5)
    noise = generator.random((8, 9, 8))
    falling = noise / 5 + np.linspace(0.8, 0, 9)[:, None]
    for matrices, is_below in ((noise, False), (falling, True)):
        found = forgetting(matrices.tolist(), {"unit": "sequences"})["forgetting"]
        assert found is not None and found.mean > 0.1
        assert (found.p_value < 0.01) == is_below  # type: ignore[attr-defined]


def test_the_curve_is_over_the_passages_edited_so_far() -> None:
    curve = ContinualRun(value=summary([FORGETTING])).curve()
    assert list(curve.accuracy) == pytest.approx([1.0, 0.75, 2 / 3])
    curve = ContinualRun(value=summary([[[0.2, 0.4], [1, None], [1, 1]]])).curve()
    assert list(curve.never_edited) == pytest.approx([0.2, 0.3])


def test_one_sequence_has_an_estimate_and_a_pooled_summary_is_as_its_parts() -> None:
    asked = [[{"question": "q", "answer": "a"}] * 5] * 3
    steps = [{"texts": ["x"] * n, "correct": [True] * n} for n in (15, 5, 10, 15)]
    sequences = [{"titles": [f"{n}{p}" for p in range(3)], "questions": asked, "steps": steps} for n in range(8)]
    generator = np.random.default_rng(1)
    matrices: list[Matrix] = [generator.random((4, 3)).round(1).tolist() for _ in range(8)]
    whole = ContinualRun(value=summary(matrices) | {"sequences": sequences})
    halves = [
        ContinualRun(value=summary(matrices[at : at + 4]) | {"sequences": sequences[at : at + 4]}) for at in (0, 4)
    ]
    pooled_run = ContinualRun(value=aggregate_summaries(halves))
    assert pooled_run.disagreements() == []
    for one, other in zip(whole.estimates().values(), pooled_run.estimates().values(), strict=True):
        assert one is not None and other is not None
        assert (one.low, one.high, one.units) == pytest.approx((other.low, other.high, other.units))
    alone = ContinualRun(value=summary(matrices[:1]) | {"sequences": sequences[:1]})
    assert alone.accuracy()["n"][0] == 1 and alone.estimates()["final_minus_never_edited"] is not None

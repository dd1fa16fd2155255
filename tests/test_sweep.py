"""Sweeps: every combination once, on the same passages and seeds; the figure holds what the rows say."""

from collections.abc import Sequence
from typing import Any

import pytest

from seal_nb.errors import SettingsError
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import PlannedLoop, SinglePassageSettings, build_run, requests_for_run
from seal_nb.experiments.sweep import Point, Sweep, grid_of, sweep_points
from seal_nb.passages import Passage, Question
from seal_nb.protocol import Answers, TTTReply, build_reply
from seal_nb.results.single_passage import SinglePassageRun
from seal_nb.views.plots import plot_sweep

PASSAGES = [
    Passage(title=f"T{n}", context="C", questions=(Question(question="q", answer="a"),), hand_written="x")
    for n in range(8)
]
SETTINGS = SinglePassageSettings(arm="hand_written", eval_times=2, training=Training(lora_rank=4, lora_alpha=8))
GRID = {"finetune_lr": [1e-4, 1e-3], "lora_rank": [2, 16], "target_modules": [[], ["all-linear"]]}


def planned(points: Sequence[Point]) -> list[list[PlannedLoop]]:
    return [requests_for_run(PASSAGES, settings, model_id="m") for _, settings in points]


def answered(points: Sequence[Point], loops: Sequence[Sequence[PlannedLoop]]) -> dict[str, TTTReply]:
    """Adapters are right where the rate is high; the soft score grows with the rank."""
    replies = {}
    for (_, settings), own in zip(points, loops, strict=True):
        training = settings.training
        word = "CORRECT" if training.finetune_lr > 5e-4 else "INCORRECT"
        for loop in own:
            before = Answers(texts=["n"], verdicts=["INCORRECT"], gold_logprobs=[-9.0])
            after = Answers(texts=["y"], verdicts=[word], gold_logprobs=[-9.0 + training.lora_rank])
            replies[loop.request_id] = build_reply(baseline=before, adapter=after, request_id=loop.request_id)
    return replies


def rows_of(points: Sequence[Point], loops: Sequence[Sequence[PlannedLoop]], replies: dict[str, TTTReply]) -> list:
    built = [build_run(PASSAGES, own, replies, settings) for (_, settings), own in zip(points, loops, strict=True)]
    return Sweep([values for values, _ in points], [SinglePassageRun(value=value) for value in built]).rows


@pytest.mark.parametrize("text", ["{", "[1]", '{"lora_rank": 8}', "lora_rank=8"])
def test_a_grid_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match=r"grid is .*such as \{\"lora_rank\": \[8, 32\]\}"):
        grid_of(text)


def test_a_grid_is_read_as_it_is_written() -> None:
    assert grid_of('{"finetune_lr": [3e-4], "target_modules": [[], ["all-linear"]]}') == {
        "finetune_lr": [3e-4],
        "target_modules": [[], ["all-linear"]],
    }


def test_every_combination_is_a_point_and_alpha_follows_the_rank() -> None:
    points = sweep_points(SETTINGS, GRID)
    assert len(points) == 8 and len({str(values) for values, _ in points}) == 8
    assert {(s.training.lora_rank, s.training.lora_alpha) for _, s in points} == {(2, 4), (16, 32)}
    fixed = sweep_points(SETTINGS, {"lora_rank": [2], "lora_alpha": [64]})
    assert fixed[0][1].training.lora_alpha == 64


def test_points_share_passages_and_seeds_and_no_request() -> None:
    loops = planned(sweep_points(SETTINGS, GRID))
    seeds = [[loop.request.seed for loop in own] for own in loops]
    assert all(one == seeds[0] for one in seeds) and len(seeds[0]) == 16
    assert len({loop.request_id for own in loops for loop in own}) == 8 * 16


def test_rows_compare_every_point_with_the_first_and_the_figure_says_the_same() -> None:
    points = sweep_points(SETTINGS, GRID)
    loops = planned(points)
    rows = rows_of(points, loops, answered(points, loops))
    assert [row["accuracy"] for row in rows] == [0.0] * 4 + [1.0] * 4
    assert [row["soft gain"] for row in rows] == [2.0, 2.0, 16.0, 16.0] * 2
    assert rows[0]["against the first"] is None
    assert rows[0]["label"] == "finetune_lr 0.0001, lora_rank 2, target_modules default"
    assert rows[7]["against the first"].startswith("+100.0 points [")
    assert rows[7]["against the first"].endswith("8 passages (one of 7 comparisons): real")
    chart = plot_sweep(rows, list(GRID))
    assert f"{rows[7]['label']}: 100.0%" in chart.alt
    (axes,) = chart.axes
    assert len(axes.containers) == 4 and axes.get_xscale() == "log"


def test_what_enters_no_mean_is_counted() -> None:
    points = sweep_points(SETTINGS, {"finetune_epochs": [1]})
    loops = planned(points)
    replies = answered(points, loops)
    del replies[loops[0][0].request_id]
    for loop in loops[0][2:4]:  # both repeats of the second passage
        ungraded = Answers(texts=["y"], verdicts=["UNGRADED"])
        replies[loop.request_id] = build_reply(baseline=ungraded, adapter=ungraded, request_id=loop.request_id)
    (row,) = rows_of(points, loops, replies)
    assert (row["passages"], row["ungraded"], row["missing"]) == (7, 2, 1)


def test_a_point_without_any_reply_is_blank_and_not_zero() -> None:
    points = sweep_points(SETTINGS, {"finetune_epochs": [1, 2]})
    loops = planned(points)
    rows = rows_of(points, loops, {})
    assert [row["accuracy"] for row in rows] == [None, None]
    assert [(row["passages"], row["missing"], row["first error"]) for row in rows] == [(0, 16, "no reply")] * 2
    assert plot_sweep(rows, ["finetune_epochs"]).alt == "QA accuracy by setting: "


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"learning_rate": [1]}, "cannot sweep 'learning_rate'; settings of the inner loop are answer_style, batch"),
        ({}, "the grid has 1 points"),
        ({"lora_rank": []}, "the grid has 0 points"),
        ({"lora_rank": range(1, 300)}, "the grid has 299 points; 1 to 200"),
        ({"lora_rank": [0]}, "lora_rank=0: must be at least 1"),
        ({"lora_rank": ["8"]}, "lora_rank='8' is of type str; give a whole number"),
    ],
)
def test_a_grid_that_is_none_is_refused(grid: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        sweep_points(SETTINGS, grid)

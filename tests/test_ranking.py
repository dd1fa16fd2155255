"""How much a ranking knows: agreement of repeats against chance, and the repeats it would take."""

import random
from pathlib import Path
from typing import Any

import pytest

from seal_nb.experiments.rest_em import RankingSummary
from seal_nb.results.collect import read_run
from seal_nb.results.single_passage import SinglePassageRun


def run_of(rewards_P_E_R: list[list[list[float]]], n_questions: int = 10) -> SinglePassageRun:
    """A run whose adapters reach these accuracies."""

    def rows(rewards: list[float]) -> list[dict[str, Any]]:
        return [
            {"rep": rep, "baseline_correct": False, "adapter_correct": question < round(reward * n_questions)}
            for rep, reward in enumerate(rewards)
            for question in range(n_questions)
        ]

    return SinglePassageRun(
        value={
            "articles": [
                {"title": "T", "completions": [{"text": "e", "questions": rows(r)} for r in rewards_E_R]}
                for rewards_E_R in rewards_P_E_R
            ]
        }
    )


def noisy(n_passages: int, n_repeats: int, *, between: float, within: float, seed: int = 0) -> SinglePassageRun:
    """Five self-edits a passage, of true rewards around 0.5, each measured with noise."""
    draws = random.Random(seed)
    passages = []
    for _ in range(n_passages):
        truths = [0.5 + draws.gauss(0, between) for _ in range(5)]
        passages.append([[_measured(t, within, draws) for _ in range(n_repeats)] for t in truths])
    return run_of(passages, n_questions=25)


def _measured(truth: float, within: float, draws: random.Random) -> float:
    return min(1.0, max(0.0, truth + draws.gauss(0, within)))


def test_the_published_ranking_is_hardly_better_than_chance(golden: Path) -> None:
    """Two of its three repeats agree on the winner about once in four; chance is once in five."""
    run = read_run(golden / "results/rank_iter0.json.gz")
    agreement = RankingSummary(run)
    assert agreement.agreement is not None and agreement.chance == 0.2
    assert agreement.agreement.mean == pytest.approx(0.243, abs=0.001)
    assert agreement.agreement_sentence().endswith("chance 20.0 %: not distinguishable from chance")
    summary = RankingSummary(run)
    assert summary.reliability == pytest.approx(0.318, abs=0.001)
    assert summary.sentence() == "3 repeats on 50 passages give a reliability of 0.32"


def test_repeats_that_agree_always_pick_the_same_winner() -> None:
    agreement = RankingSummary(run_of([[[0.2, 0.2], [0.8, 0.8], [0.5, 0.5]]] * 8))
    assert agreement.agreement is not None
    assert (agreement.agreement.mean, agreement.chance) == (1.0, pytest.approx(1 / 3))
    assert "more than chance" in agreement.agreement_sentence()
    few = RankingSummary(run_of([[[0.2, 0.2], [0.8, 0.8], [0.5, 0.5]]] * 5))
    assert few.sentence().endswith("but 5 passages are too few to tell")


def test_ties_are_broken_by_lot_so_that_equal_self_edits_agree_by_chance_only() -> None:
    agreement = RankingSummary(run_of([[[0.4, 0.4]] * 4] * 10))
    assert agreement.agreement is not None and agreement.agreement.mean == agreement.chance == 0.25


def test_pure_noise_agrees_as_often_as_chance_and_is_said_to_be_random() -> None:
    run = noisy(200, 2, between=0.0, within=0.2)
    agreement = RankingSummary(run)
    assert agreement.agreement is not None
    assert agreement.agreement.low <= agreement.chance <= agreement.agreement.high
    no_difference = RankingSummary(run_of([[[0.2, 0.8], [0.8, 0.2]]] * 4))
    assert "the choice is random" in no_difference.sentence()


def test_the_reliability_of_many_repeats_is_the_one_that_their_variances_give() -> None:
    """Variances 0.01 and 0.02: eight repeats give 0.01 / (0.01 + 0.02 / 8) = 0.8."""
    enough = RankingSummary(noisy(100, 8, between=0.1, within=0.02**0.5, seed=1))
    assert enough.reliability == pytest.approx(0.8, abs=0.05)


def test_one_repeat_says_nothing() -> None:
    run = run_of([[[0.1], [0.9]]] * 3)
    assert RankingSummary(run).agreement is None
    assert "is not known" in RankingSummary(run).sentence()


def test_a_run_without_any_answer_has_no_repeats() -> None:
    summary = RankingSummary(SinglePassageRun(value={"articles": [{"title": "T", "completions": []}]}))
    assert (summary.reliability, summary.n_ranked) == (None, 0)

"""How much a ranking knows: about the same questions, about others, and on questions that did not choose."""

import random
from pathlib import Path
from typing import Any

import numpy as np
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
    run = read_run(golden / "results/rank_iter0.json.gz")
    summary = RankingSummary(run)
    same, elsewhere, audit = summary.reliability, summary.reliability_elsewhere, summary.audit_advantage
    assert same is not None and elsewhere is not None and audit is not None and summary.own_advantage is not None
    assert same.mean == pytest.approx(0.318, abs=0.001) and 0.1 < same.low < same.high < 0.5
    assert elsewhere.mean == pytest.approx(0.153, abs=0.001) and elsewhere.low < 0
    assert summary.most_elsewhere == pytest.approx(0.153 / 0.318, abs=0.01)
    assert summary.own_advantage.mean == pytest.approx(0.141, abs=0.001)
    assert -0.03 < audit.low < 0 < audit.mean < 0.02 and not audit.is_real
    assert summary.sentence().startswith(
        "3 repeats on 50 passages: reliability 0.32 [0.15, 0.48] for the same questions"
    )
    assert summary.sentence().endswith("(0.48 with any number of repeats, more with more questions)")
    assert summary.audit_sentence().endswith("not distinguishable from noise; on the questions that chose it: +14.1")


def test_few_passages_and_noise_are_said_to_be_so() -> None:
    few = RankingSummary(run_of([[[0.2, 0.2], [0.8, 0.8], [0.5, 0.5]]] * 5))
    assert few.sentence().endswith("but 5 passages are too few to tell")
    assert "the choice is random" in RankingSummary(run_of([[[0.2, 0.8], [0.8, 0.2]]] * 4)).sentence()
    noise = RankingSummary(noisy(200, 2, between=0.0, within=0.2)).reliability
    assert noise is not None and noise.low < 0 < noise.high


def test_the_reliability_of_many_repeats_is_the_one_that_their_variances_give() -> None:
    """Variances 0.01 and 0.02: eight repeats give 0.01 / (0.01 + 0.02 / 8) = 0.8."""
    enough = RankingSummary(noisy(100, 8, between=0.1, within=0.02**0.5, seed=1))
    assert enough.reliability is not None and enough.reliability.mean == pytest.approx(0.8, abs=0.05)


def simulated(*, of_edit: float, of_question: float, n_questions: int = 6, n_repeats: int = 3) -> SinglePassageRun:
    """Self-edits that differ in what they teach about the passage (on all questions) and about single questions."""
    draws, passages = np.random.default_rng(1), []
    for _ in range(300):
        own = of_question * draws.standard_normal((5, 1, n_questions))
        right = draws.random((5, n_repeats, n_questions)) < 0.5 + of_edit * draws.standard_normal((5, 1, 1)) + own
        rows = [
            [
                {"rep": rep, "baseline_correct": False, "adapter_correct": bool(right[edit, rep, at])}
                for rep in range(n_repeats)
                for at in range(n_questions)
            ]
            for edit in range(5)
        ]
        passages.append({"title": "T", "completions": [{"text": "e", "questions": one} for one in rows]})
    return SinglePassageRun(value={"articles": passages})


def test_a_reward_for_single_questions_holds_for_these_questions_only() -> None:
    summary = RankingSummary(simulated(of_edit=0.0, of_question=0.25))
    same, elsewhere, audit = summary.reliability, summary.reliability_elsewhere, summary.audit_advantage
    assert same is not None and elsewhere is not None and audit is not None
    assert same.low > 0.3 and elsewhere.low < 0 < elsewhere.high and not audit.is_real


def test_a_reward_for_the_whole_passage_holds_for_other_questions_and_the_audit_shows_it() -> None:
    """Variance 0.03 of a self-edit, about 0.22 of an answer: 0.03 / (0.03 + 0.22 / 18) = 0.71 either way."""
    summary = RankingSummary(simulated(of_edit=0.03**0.5, of_question=0.0))
    same, elsewhere, audit = summary.reliability, summary.reliability_elsewhere, summary.audit_advantage
    assert same is not None and elsewhere is not None and audit is not None and summary.own_advantage is not None
    assert same.mean == pytest.approx(0.71, abs=0.05) and elsewhere.mean == pytest.approx(same.mean, abs=0.05)
    assert audit.is_real and 0.1 < audit.mean < summary.own_advantage.mean, "the winner's own mean is too high"


def test_one_repeat_says_nothing() -> None:
    run = run_of([[[0.1], [0.9]]] * 3)
    assert "is not known" in RankingSummary(run).sentence()


def test_a_run_without_any_answer_has_no_repeats() -> None:
    summary = RankingSummary(SinglePassageRun(value={"articles": [{"title": "T", "completions": []}]}))
    assert (summary.reliability, summary.n_ranked) == (None, 0)

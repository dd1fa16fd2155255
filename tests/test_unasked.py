"""Passages without questions or graded answers: trained on, and in no mean, ranking, figure or comparison."""

import json
import math
import unicodedata
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from seal_nb.errors import DataError
from seal_nb.experiments.continual import continual, retrieval_accuracy
from seal_nb.experiments.cpt import cpt
from seal_nb.experiments.rest_em import RankingSummary, rest_em_round
from seal_nb.experiments.session import TTT
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import evaluate
from seal_nb.experiments.sweep import sweep
from seal_nb.grading.choose import make_grader
from seal_nb.inspector.inspection import Inspection
from seal_nb.passages import Passage, Question
from seal_nb.results.collect import collect, read_run
from seal_nb.results.continual import ContinualRun, summarize_sequences
from seal_nb.results.regrade import regrade
from seal_nb.results.run import compare
from seal_nb.results.single_passage import SinglePassageRun
from seal_nb.server.client import TTTClient
from seal_nb.views import plots
from tests.server.conftest import server  # noqa: F401  # the stub server, with its real processes

ASKED = (Question(question="Where?", answer="on a hill", other_answers=("uphill",)), Question(question="?", answer="b"))
PASSAGES = [
    Passage(title=title, context=f"{title} lies there.", questions=asked, completions=("one\ntwo",), hand_written="x")
    for title, asked in {"Orle": ASKED, "Café": (), "Ulm": ASKED[:1], "Bare": ()}.items()
]
UNASKED = [replace(one, questions=()) for one in PASSAGES]
Experiment = Callable[..., Any]
EXPERIMENTS: dict[Experiment, dict[str, Any]] = {
    evaluate: {"arms": "passage_only,in_context"},
    cpt: {"arms": "passage_only"},
    continual: {"arm": "hand_written", "n_sequences": 2, "n_datapoints": 4},
    sweep: {"grid": {"lora_rank": [8, 32]}},
}


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.__name__)
def test_passages_without_any_question_are_refused_before_a_server_is_asked(
    experiment: Experiment, tmp_path: Path
) -> None:
    wanted = "none of 4 passages has a question, so nothing can be asked; give at least one of them questions"
    with TTT(TTTClient("tcp://127.0.0.1:1")) as ttt, pytest.raises(DataError, match=wanted):
        experiment(ttt, UNASKED, folder=tmp_path, **EXPERIMENTS[experiment])


def test_passages_without_questions_are_trained_on_and_change_no_number(
    server: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TTT(TTTClient(server.endpoint)) as ttt:
        run = evaluate(ttt, PASSAGES, arms="passage_only,in_context", folder=tmp_path / "a")
        assert "2 of 4 passages have no questions: trained on, in no mean or ranking" in capsys.readouterr().out
        asked = evaluate(ttt, [one for one in PASSAGES if one.questions], arms="passage_only", folder=tmp_path / "b")
        of_cpt = cpt(ttt, PASSAGES, arms="passage_only", training=Training(), folder=tmp_path / "c")
        swept = sweep(ttt, PASSAGES, {"lora_rank": [8, 32]}, folder=tmp_path / "d")
        chained = continual(
            ttt, PASSAGES, strategies="stacked,replay,retrieval", folder=tmp_path / "e", **EXPERIMENTS[continual]
        )
    mine, other = run["passage_only"], asked["passage_only"]
    assert mine.counts()["n_answers"] == of_cpt["passage_only"].counts()["n_answers"] == 3, "of two golds, too"
    assert mine.overall() == other.overall() and mine.estimate().mean == other.estimate().mean
    assert (mine.estimate().n, mine.estimate().n_left_out) == (2, 2)
    repeats = [one["completions"][0]["repeats"][0] for one in mine.value["articles"]]
    assert all("train_steps" in repeat for repeat in repeats), "they are trained on"
    assert [len(one.self_edits) for one in run["in_context"].passages] == [1, 0, 1, 0], "nothing to ask, nothing to do"
    assert compare(mine, run["in_context"])["n"].item() == 2
    entries = of_cpt["passage_only"].value["per_passage"]
    assert [one["adapter_accuracy"] is None for one in entries] == [False, True, False, True]
    assert of_cpt["passage_only"].notes() == ["2 of 4 passages have no graded answer and are left out"]
    assert of_cpt.accuracy()["n"].item() == 2 and set(swept.frame()["passages"]) == {2}
    for matrix, passages in zip(chained["stacked"].matrices, chained.sequences, strict=True):
        assert [cell is None for cell in matrix[-1]] == [not one.questions for one in passages]
    assert chained.strategies()["accuracy"].notna().all() and chained.estimates()["mean"].notna().any()
    assert retrieval_accuracy(chained.sequences) is not None
    for figure in (run.plot_accuracy(), run.plot_gains(), of_cpt.plot_gains(), swept.plot()):
        assert figure.alt  # type: ignore[attr-defined]
    for name in chained:
        assert chained.plot_matrix(name).drawn() and chained.plot_curve(name).drawn()  # type: ignore[attr-defined]
    assert plots.plot_gains(*_gains(mine)).alt.startswith("Of 2 passages")


def _gains(run: SinglePassageRun) -> tuple[list[str], list[float | None], list[float | None]]:
    rows = [(one.title, one.self_edits[0].stats()) for one in run.passages]
    before, after = ([stats[f"{kind}_mean"] for _, stats in rows] for kind in ("baseline", "adapter"))
    return [title for title, _ in rows], before, after


def test_only_the_last_passage_of_each_sequence_has_questions() -> None:
    matrices = [[[None, 0.5], [None, None], [None, 1.0]]] * 2
    found = ContinualRun(value=summarize_sequences(matrices, dataset="d", base_model="m")).estimates()
    known = {name: one and one.mean for name, one in found.items()}
    assert known == {
        "never_edited": 0.5,
        "after_own_edit": 1.0,
        "final": 1.0,
        "final_minus_never_edited": 0.5,
        "backward_transfer": None,
        "forward_transfer": None,
        "forgetting": None,
        "forgetting_by_chance": None,
    }


def rows(before: str, after: str) -> list[dict[str, Any]]:
    """One question for each sign: 0, 1 or ? (UNGRADED), without and with the adapter."""
    word = {"0": False, "1": True, "?": None}
    about = {"rep": 0, "answer": "a", "baseline_answer": "b", "adapter_answer": "a"}
    return [
        {**about, "question": f"q{n}", "baseline_correct": word[b], "adapter_correct": word[a]}
        for n, (b, a) in enumerate(zip(before, after, strict=True))
    ]


def run_value(*passages: list[tuple[str, str]]) -> dict[str, Any]:
    """A run; of each passage the verdicts on each self-edit."""
    articles = [
        {
            "title": f"passage {at}",
            "context": "text",
            "prompt": "Write.",
            "completions": [{"text": f"edit {n}", "questions": rows(*one)} for n, one in enumerate(edits)],
        }
        for at, edits in enumerate(passages)
    ]
    return {"overall": {}, "arm": "self_edits", "prompt_key": "implications", "articles": articles}


MIXED = run_value([("00", "01"), ("00", "11")], [("", ""), ("", "")], [("??", "??"), ("0?", "??")], [("10", "11")] * 2)


def test_a_round_ranks_and_draws_only_passages_with_verdicts(tmp_path: Path) -> None:
    run = SinglePassageRun(value=deepcopy(MIXED))
    chosen = rest_em_round(run, folder=tmp_path)
    kept = [(one.passage, one.self_edit) for one in chosen.choices().itertuples() if not pd.isna(one.self_edit)]
    assert kept == [(0, 1), (3, 0)] and len(chosen.rows) == 2
    reasons = chosen.choices()["reason"]
    assert reasons[1] == "no self-edit can be ranked: no questions" and "UNGRADED answers" in reasons[2]
    assert (RankingSummary(run).n_passages, RankingSummary(run).n_ranked) == (4, 2)
    assert "of 2 passages" in chosen.plot_rewards().alt  # type: ignore[attr-defined]
    assert run.rewards()["reward"].isna().tolist() == [False] * 2 + [True] * 4 + [False] * 2


def test_a_run_that_is_graded_again_leaves_the_same_passages_out() -> None:
    again = regrade(SinglePassageRun(value=deepcopy(MIXED)), make_grader("exact"))
    assert again.run is not None and again.run.estimate().n == 3  # the UNGRADED ones have verdicts now
    stats = [one["stats"]["adapter_mean_accuracy"] for one in again.run.value["articles"]]
    assert [value is None for value in stats] == [False, True, False, False]


def test_results_of_a_folder_follow_and_rank_only_what_was_graded(tmp_path: Path) -> None:
    for name, value in {"run_base": MIXED, "run_round1": deepcopy(MIXED)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    better = run_value([("00", "11")] * 2, [("", "")], [("00", "??")], [("10", "11")] * 2)
    better["articles"][2]["completions"][0]["questions"][0]["adapter_correct"] = True  # one passage more is graded
    better["articles"][0]["completions"][0]["questions"][0]["adapter_correct"] = False
    (tmp_path / "run_round1.json").write_text(json.dumps(better))
    found = collect(tmp_path)
    assert found.passage_accuracies("implications") == [[0.75, 0.75], [1.0, 1.0]]
    (row,) = found.differences().to_dict("records")
    assert row["n"] == 2
    assert found.summary()["best arm"].startswith("self-edits, round 1")
    assert found.best_answered() is found.arms()["self-edits, round 1"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_inspector_shows_passages_without_verdicts_last_and_without_numbers(form: Any, tmp_path: Path) -> None:
    value = deepcopy(MIXED)
    value["articles"][1]["title"] = unicodedata.normalize(form, "Café")
    (tmp_path / "run_x.json").write_text(json.dumps(value))
    view = Inspection(read_run(tmp_path / "run_x.json"))  # type: ignore[arg-type]
    assert view.passages["gain"].isna().tolist() == [False, True, True, False]
    assert list(view.select(sort="largest gain")["n"]) == [0, 3, 1, 2]
    assert view.answers(1, 0).empty and view.compare(1, 0, 1).empty and not view.self_edits(1)["best"].any()
    assert len(view.select("ties")) == 1


def test_nothing_graded_at_all_is_missing_and_breaks_no_table(tmp_path: Path) -> None:
    (tmp_path / "run_base.json").write_text(json.dumps(run_value([("?", "?")], [("", "")])))
    found = collect(tmp_path)
    (run,) = found.single_passage
    row = run.accuracy().iloc[0]
    assert math.isnan(row["gain"]) and f"{row['gain']:+.1%}" == "+nan%", "what a notebook prints"
    assert found.arms() == {} and found.summary()["best arm"] is None

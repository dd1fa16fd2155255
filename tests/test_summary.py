"""A summary is computed from the verdicts; what a file cannot give is null and said."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from seal_nb.errors import DataError
from seal_nb.passages import load_passages
from seal_nb.results.collect import read_run, run_of
from seal_nb.results.continual import summarize_sequences
from seal_nb.results.run import KINDS
from seal_nb.storage import read_json, write_json


def summarize(path: Path) -> dict[str, Any]:
    return read_run(path).summary()


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, Any]:
    return read_json(golden / "results/rank_iter0.json.gz")


def test_a_published_run_is_confirmed_in_every_number(golden: Path, published: dict[str, Any]) -> None:
    found = summarize(golden / "results/rank_iter0.json.gz")
    assert found["kind"] == "single_passage"
    assert found["overall"] == published["overall"]
    assert found["disagreements"] == found["notes"] == []
    assert (found["n_passages"], found["n_self_edits"], found["n_answers"]) == (50, 250, 3375)
    assert found["intervals"]["gain"]["sentence"].endswith("50 passages: real")
    json.dumps(found, allow_nan=False)


def test_a_stored_number_that_the_verdicts_do_not_give_is_named(tmp_path: Path, published: dict[str, Any]) -> None:
    touched = copy.deepcopy(published)
    touched["overall"]["mean_gain"] = 0.5
    touched["articles"][3]["completions"][1]["stats"]["adapter_mean"] = 0.1
    found = summarize(write_json(tmp_path / "run.json", touched))
    assert found["overall"]["mean_gain"] == 0.0831
    assert len(found["disagreements"]) == 2
    assert "overall: mean_gain is stored as 0.5, computed 0.0831" in found["disagreements"]
    assert "article 3, self-edit 1: adapter_mean is stored as 0.1" in found["disagreements"][1]


def test_without_verdicts_every_number_is_null_and_the_stored_one_is_only_said(
    tmp_path: Path, published: dict[str, Any]
) -> None:
    bare = copy.deepcopy(published)
    for article in bare["articles"]:
        for completion in article["completions"]:
            del completion["questions"]
    found = summarize(write_json(tmp_path / "run.json", bare))
    assert set(found["overall"]) == set(published["overall"])
    assert set(found["overall"].values()) == {None}
    assert found["intervals"] is None
    assert found["notes"] == [
        "250 of 250 self-edits have no graded answer and are left out; "
        "the file itself says adapter_mean_accuracy 0.4018"
    ]


def test_ungraded_answers_are_counted_and_change_no_other_answer(tmp_path: Path, published: dict[str, Any]) -> None:
    touched = copy.deepcopy(published)
    touched["articles"][0]["completions"][0]["questions"][0]["adapter_correct"] = None
    found = summarize(write_json(tmp_path / "run.json", touched))
    assert (found["n_ungraded_adapter"], found["n_ungraded_baseline"]) == (1, 0)
    assert found["overall"]["baseline_mean_accuracy"] == published["overall"]["baseline_mean_accuracy"]


def test_a_passage_without_self_edits_is_no_obstacle(tmp_path: Path, published: dict[str, Any]) -> None:
    touched = copy.deepcopy(published)
    touched["articles"].append({"title": "T", "context": "C", "completions": []})
    found = summarize(write_json(tmp_path / "run.json", touched))
    assert found["overall"] == published["overall"]
    assert found["intervals"]["adapter"]["n_left_out"] == 1


def test_a_published_cpt_run_needs_its_items_only_for_intervals(golden: Path) -> None:
    found = summarize(golden / "results/cpt_base.json")
    assert found["kind"] == "cpt"
    assert found["overall"] == {"baseline_accuracy": 0.3255, "adapter_accuracy": 0.4097, "gain": 0.0842}
    assert found["intervals"] is None and "no intervals" in found["notes"][0]
    assert (found["n_answers"], found["n_passages"], found["n_train_sequences"]) == (974, 200, 2000)


def test_the_interval_of_a_cpt_run_is_about_its_overall_number(tmp_path: Path) -> None:
    """Every question counts once: a passage of one question must not weigh as much as one of nine."""
    reply = {"baseline_correct": [False] * 10, "adapter_correct": [True] + [False] * 8 + [True]}
    counts = [{"n_questions": 1}, {"n_questions": 9}]
    path = tmp_path / "cpt_run_x.json"
    path.write_text(json.dumps({"server_reply": reply, "per_passage": counts}))
    found = summarize(path)
    assert found["overall"]["adapter_accuracy"] == found["intervals"]["adapter"]["mean"] == 0.2
    assert found["overall"]["gain"] == found["intervals"]["gain"]["mean"] == 0.2
    assert found["intervals"]["gain"]["sentence"].startswith("+20.0 points")


@pytest.mark.parametrize(
    ("reply", "field"),
    [
        (None, "server_reply"),
        ({"baseline_correct": [True]}, "server_reply.adapter_correct"),
        ({"baseline_correct": [True, 1], "adapter_correct": []}, r"server_reply.baseline_correct\[1\]"),
        ({"baseline_correct": [True], "adapter_correct": []}, "server_reply.adapter_correct"),
    ],
)
def test_a_broken_cpt_run_is_refused_with_path_and_field(tmp_path: Path, reply: Any, field: str) -> None:
    path = write_json(tmp_path / "cpt_run.json", {"server_reply": reply})
    with pytest.raises(DataError, match=rf"cpt_run\.json, field '{field}'"):
        summarize(path)


def test_a_continual_summary_is_confirmed_and_a_changed_cell_is_named(tmp_path: Path) -> None:
    matrices = [[[0.0, 0.2], [0.5, None], [0.25, 0.75]], [[0.1, 0.2], [0.5, None], [0.5, 0.5]]]
    made = summarize_sequences(matrices, dataset="d", base_model="m")
    found = summarize(write_json(tmp_path / "summary_x.json", made))
    assert (found["kind"], found["n_passages"], found["n_sequences"]) == ("continual", 2, 2)
    assert found["overall"]["final"] == 0.5 and found["disagreements"] == found["notes"] == []
    assert found["intervals"]["gain"]["sentence"].startswith("+37.5 points")
    made["mean_over_sequences"][2][0] = 0.9
    assert "mean_over_sequences is stored as" in summarize(write_json(tmp_path / "x.json", made))["disagreements"][0]


TEN_WORDS = "to carry the water of the river over the valley"
LONG = "1 of 2 questions have gold answers of seven words or more, on which the local grader agrees less with GPT-4.1"
ASKED = [{"question": "Why?", "answer": TEN_WORDS}, {"question": "When?", "answer": "1954"}]


def run_with_a_long_gold(form: str, asked: list[dict[str, Any]]) -> dict[str, Any]:
    if form == "single":
        verdicts = {f"{kind}_{name}": value for kind in KINDS for name, value in (("answer", "x"), ("correct", False))}
        edit = {"text": "e", "questions": [{"rep": rep, **one, **verdicts} for rep in (0, 1) for one in asked]}
        return {"articles": [{"title": "T", "context": "c", "completions": [edit]}]}
    if form == "cpt":
        reply = {f"{kind}_correct": [False] * len(asked) for kind in KINDS}
        reply |= {f"{kind}_texts": ["x"] * len(asked) for kind in KINDS}
        return {"server_reply": reply, "passages": [{"title": "T", "context": "c", "questions": asked}]}
    step = {"texts": ["x"] * len(asked), "correct": [False] * len(asked)}
    sequence = {"titles": ["T"], "questions": [asked], "steps": [step, step]}
    return summarize_sequences([[[0.0], [0.0]]], dataset="d", base_model="m") | {"sequences": [sequence]}


@pytest.mark.parametrize("form", ["single", "cpt", "continual"])
def test_long_gold_answers_of_a_locally_graded_run_are_counted(tmp_path: Path, form: str) -> None:
    def notes(asked: list[dict[str, Any]], grader: str) -> list[str]:
        value = run_with_a_long_gold(form, asked) | {"grader": grader}
        return summarize(write_json(tmp_path / "run.json", value))["notes"]

    for grader in ("local", "first:local"):
        (said,) = notes(ASKED, grader)
        assert said.startswith(LONG) and said.endswith("(docs/graders.md)")
    assert notes(ASKED, "judge:gpt-4.1") == notes(ASKED, "") == notes(ASKED, "recall") == []
    assert notes(ASKED[1:], "local") == []
    with_a_short_one = {**ASKED[0], "other_answers": ["to carry water"]}
    assert notes([with_a_short_one, ASKED[1]], "local") == []


def test_the_note_of_long_golds_hides_no_disagreement_and_needs_the_passages(
    golden: Path, published: dict[str, Any]
) -> None:
    local = run_of({**published, "grader": "local", "overall": published["overall"] | {"mean_gain": 0.5}}).summary()
    assert "gold answers of seven words or more" in local["notes"][0]
    assert local["disagreements"] == ["overall: mean_gain is stored as 0.5, computed 0.0831"]
    cpt = {**read_json(golden / "results/cpt_base.json"), "grader": "local"}
    (only,) = run_of(cpt).notes()
    assert "no intervals" in only
    assert run_of(cpt, passages=load_passages(golden / "eval/base_val.json.gz")).notes()[0].startswith("87 of 970 ")

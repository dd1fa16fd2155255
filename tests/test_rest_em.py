"""Selection as published, byte for byte; what a file lacks is said, what is broken is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.rest_em import RankingSummary, rest_em_round, select_best, sft_rows
from seal_nb.results.collect import read_run
from seal_nb.results.single_passage import SinglePassageRun, run_file_name
from seal_nb.storage import read_json


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, Any]:
    return read_json(golden / "results/rank_iter0.json.gz")


def one_passage(*means: float | None, **fields: Any) -> SinglePassageRun:
    """A run of one passage whose self-edits have stored means only."""
    completions = [
        {"text": f" edit {n} \n", "stats": {"adapter_mean": mean, "gain_mean": mean and mean - 0.2}}
        for n, mean in enumerate(means)
    ]
    article = {"title": "T", "context": "C", "prompt": "P", "completions": completions} | fields
    return SinglePassageRun(value={"articles": [article]})


def question(adapter: bool | None, *, rep: int = 0, soft: float | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"rep": rep, "baseline_correct": False, "adapter_correct": adapter}
    return row | ({} if soft is None else {"baseline_gold_logprob": -9.0, "adapter_gold_logprob": soft})


def graded_passage(*questions_E: list[dict[str, Any]]) -> SinglePassageRun:
    completions = [{"text": f"edit {n}", "questions": rows} for n, rows in enumerate(questions_E)]
    return one_passage(completions=completions)


def test_the_published_sft_file_is_rebuilt_byte_for_byte(golden: Path, tmp_path: Path) -> None:
    run = read_run(golden / "results/rank_iter0.json.gz")
    written = rest_em_round(run, exp_name="iter0", folder=tmp_path).sft_file
    assert written.name == "sft_best1of5_iter0.jsonl"
    assert written.read_bytes() == (golden / "EM_SFT/sft_best1of5_iter0.jsonl").read_bytes()


def test_the_published_selection_survives_without_per_question_records(published: dict[str, Any], golden: Path) -> None:
    bare = copy.deepcopy(published)
    for article in bare["articles"]:
        for completion in article["completions"]:
            completion["questions"] = None
    whole, stored = SinglePassageRun(value=published), SinglePassageRun(value=bare)
    assert sft_rows(stored, select_best(stored)) == sft_rows(whole, select_best(whole))
    assert all("from the stored mean" in choice.reason for choice in select_best(stored))


def test_22_of_50_published_passages_tie_and_10_gain_nothing(published: dict[str, Any]) -> None:
    run = SinglePassageRun(value=published)
    summary = RankingSummary(run)
    assert (summary.n_passages, summary.n_tied_best, summary.n_best_without_gain) == (50, 22, 10)
    assert sum(choice.self_edit is not None for choice in select_best(run, drop_no_gain=True)) == 40


def test_a_stamp_names_the_file_where_no_experiment_does(published: dict[str, Any], tmp_path: Path) -> None:
    run, elsewhere = (SinglePassageRun(value=published | more) for more in ({}, {"timestamp": "/../../../x"}))
    assert rest_em_round(run, k_best=2, folder=tmp_path).sft_file.name == "sft_best2of5_0508_015401.jsonl"
    assert rest_em_round(elsewhere, folder=tmp_path / "a").sft_file.parent == tmp_path / "a"
    assert "/" not in run_file_name("../x", "self_edits")


def test_the_first_of_equals_wins_and_says_so() -> None:
    (choice,) = select_best(one_passage(0.2, 0.6, 0.6, 0.4))
    assert choice.self_edit == 1
    assert "equal to 1 more, by file order" in choice.reason


def test_several_best_come_best_first() -> None:
    run = one_passage(0.2, 0.6, None, 0.4)
    assert [choice.self_edit for choice in select_best(run, k_best=2)] == [1, 3]
    assert [choice.self_edit for choice in select_best(run, k_best=9)] == [1, 3, 0]
    assert [row["completion"] for row in sft_rows(run, select_best(run))] == ["edit 1"]


def test_a_null_mean_is_unrankable_and_said() -> None:
    (choice,) = select_best(one_passage(None, None))
    assert choice.self_edit is None and "no self-edit can be ranked" in choice.reason
    assert RankingSummary(one_passage(None, 0.5)).n_unrankable_self_edits == 1
    assert sft_rows(one_passage(None), [choice]) == []


def test_null_records_anywhere_are_absent_records() -> None:
    run = SinglePassageRun(value={"overall": None, "articles": [None, {"completions": [None, {"text": None}]}]})
    assert [choice.self_edit for choice in select_best(run)] == [None, None]


def test_an_ungraded_answer_is_no_reward() -> None:
    four_right = [question(True)] * 4 + [question(False)]
    run = graded_passage(four_right, [question(True)] + [question(None)] * 4, [question(None)] * 5)
    (choice,) = select_best(run)
    assert (choice.self_edit, choice.reward) == (0, 0.8)
    assert choice.reason.endswith(
        "left out: UNGRADED answers in self-edit 1, 2; grade it again: seal-nb grade --only-ungraded"
    )
    assert RankingSummary(run).n_unrankable_self_edits == 2
    (none,) = select_best(graded_passage([question(True), question(None)]))
    assert none.self_edit is None and "grade it again: seal-nb grade --only-ungraded" in none.reason
    assert sft_rows(run, [none]) == []


def test_the_soft_score_breaks_ties_and_only_ties() -> None:
    run = graded_passage([question(True, soft=-8.0)], [question(True, soft=-2.0)], [question(False, soft=-0.1)])
    assert select_best(run)[0].self_edit == 0
    (choice,) = select_best(run, tie_break="soft")
    assert choice.self_edit == 1 and "by soft score" in choice.reason


def test_without_soft_scores_file_order_decides_and_is_named() -> None:
    (choice,) = select_best(one_passage(0.5, 0.5), tie_break="soft")
    assert choice.self_edit == 0 and "by file order" in choice.reason


def test_dropping_what_gains_nothing_says_what_was_dropped_and_keeps_what_is_unknown() -> None:
    (dropped,) = select_best(one_passage(0.1, 0.2), drop_no_gain=True)
    assert dropped.self_edit is None and dropped.reason == "its best self-edit gains nothing (+0.0 points)"
    unknown = one_passage(completions=[{"text": "a", "stats": {"adapter_mean": 0.5, "gain_mean": None}}])
    assert select_best(unknown, drop_no_gain=True)[0].self_edit is not None


def test_a_missing_prompt_is_refused_by_place_and_filled_in_when_its_key_is_given() -> None:
    run = one_passage(0.5, prompt=None)
    with pytest.raises(DataError, match="item 0, field 'prompt': is missing; give the prompt_key"):
        sft_rows(run, select_best(run))
    (row,) = sft_rows(run, select_best(run), prompt_key="implications")
    assert row["prompt"].endswith("Passage:\nT\nC\n\nImplications:\n")


def test_the_advantage_of_a_winner_is_that_of_a_worked_example() -> None:
    repeats = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    run = graded_passage(*[[question(bool(value), rep=rep) for rep, value in enumerate(values)] for values in repeats])
    summary = RankingSummary(run)
    assert summary.own_advantage is not None and summary.own_advantage.mean == pytest.approx(2 / 3 - 1 / 2)
    assert summary.audit_advantage is None, "one question cannot audit itself"
    assert summary.reliability is None, "one passage has no interval"
    assert RankingSummary(one_passage(0.5, 0.4)).own_advantage is None


def test_no_selection_can_be_asked_for_that_is_not_one() -> None:
    with pytest.raises(SettingsError, match="k_best=0"):
        select_best(one_passage(0.5), k_best=0)


@pytest.mark.parametrize(
    ("article", "field"),
    [
        ("text", ""),
        ({"completions": {}}, "completions"),
        ({"completions": ["text"]}, "completions[0]"),
        ({"completions": [{"text": 3}]}, "completions[0].text"),
        ({"completions": [{}, {"stats": {"adapter_mean": "0.5"}}]}, "completions[1].stats.adapter_mean"),
        ({"completions": [{"stats": {"adapter_mean": True}}]}, "completions[0].stats.adapter_mean"),
        ({"completions": [{"questions": [{"rep": "0"}]}]}, "completions[0].questions[0].rep"),
        ({"completions": [{"questions": [{}, {"adapter_correct": 1}]}]}, "completions[0].questions[1].adapter_correct"),
        ({"prompt": 5}, "prompt"),
    ],
)
def test_a_broken_run_file_is_refused_with_path_item_and_field(tmp_path: Path, article: Any, field: str) -> None:
    path = tmp_path / "run_broken.json"
    path.write_text(json.dumps({"articles": [{"title": "fine"}, article]}))
    with pytest.raises(DataError) as refused:
        read_run(path)
    assert (refused.value.item, refused.value.field) == (1, field)
    assert str(path) in str(refused.value)


def test_a_file_that_is_no_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    path.write_text("[]")
    with pytest.raises(DataError, match="is neither a single-passage run"):
        read_run(path)

"""A folder of results, ours and published: what is found, which arm it is, and which differences are real."""

import json
import math
from pathlib import Path

import pytest

from seal_nb.errors import DataError
from seal_nb.prompts import self_edit_prompt
from seal_nb.results.collect import ContinualResult, collect_results, results_in
from seal_nb.results.compare import (
    comparison_rows,
    evaluations,
    glance_rows,
    left_out,
    passage_accuracies,
    prompt_keys,
    round_estimates,
    rounds,
    seen_estimates,
    seen_rows,
)
from seal_nb.results.single_passage import run_from_json
from seal_nb.results.tables import answer_rows

QUESTION = {"rep": 0, "question": "q", "answer": "a", "baseline_answer": "b", "adapter_answer": "a"}


def run_file(*passages: tuple[str, str], **settings: object) -> dict[str, object]:
    """A run with one self-edit a passage; verdicts as strings of 0, 1 and ? for baseline and adapter."""
    word = {"0": False, "1": True, "?": None}
    articles = [
        {
            "title": f"passage {at}",
            "context": "text",
            "completions": [
                {
                    "text": "edit",
                    "questions": [
                        {**QUESTION, "baseline_correct": word[b], "adapter_correct": word[a]}
                        for b, a in zip(before, after, strict=True)
                    ],
                }
            ],
        }
        for at, (before, after) in enumerate(passages)
    ]
    return {"overall": {}, "arm": "self_edits", "k_completions": 1, **settings, "articles": articles}


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("file", "settings", "arm", "number"),
    [
        ("run_base.json", {}, "self-edits, base model", 0),
        ("run_round2.json", {}, "self-edits, round 2", 2),
        ("eval/iter1.json", {"arm": None}, "self-edits, round 1", 1),
        ("run_base_passage_only.json", {"arm": "passage_only"}, "passage only", None),
        ("run_round1_hand_written.json", {"arm": "hand_written"}, "hand-written", None),
        ("naive.json", {"arm": None}, "passage only", None),
        ("run_mine.json", {}, "self-edits", None),
    ],
)
def test_arm_and_round_follow_from_the_file(file: str, settings: dict, arm: str, number: int | None) -> None:
    (result,) = results_in(run_file(("0", "1"), **settings), file)
    assert (result.arm, result.rest_em_round) == (arm, number)


def test_rewards_are_no_evaluation(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("00", "01")))
    write(tmp_path, "run_round1_rank.json", run_file(("00", "11"), k_completions=2))
    assert list(evaluations(collect_results(tmp_path))) == ["self-edits, base model"]


@pytest.mark.parametrize(
    ("file", "settings", "is_ranking"),
    [
        ("run_base.json", {"k_completions": 5, "eval_times": 1}, False),
        ("run_base.json", {"k_completions": 1, "eval_times": 3}, False),
        ("run_mine.json", {"k_completions": 5, "eval_times": 3}, True),
        ("rank_iter0.json", {"k_completions": 5, "eval_times": 1}, True),
        ("run_franklin.json", {"k_completions": 5, "eval_times": 1}, False),
        ("run_ranked.json", {"k_completions": 5, "eval_times": 1}, False),
    ],
)
def test_several_self_edits_of_a_passage_are_still_an_evaluation(file: str, settings: dict, is_ranking: bool) -> None:
    (result,) = results_in(run_file(("0", "1"), **settings), file)
    assert result.is_ranking == is_ranking


@pytest.mark.parametrize(
    ("prompt", "settings", "key"),
    [
        ("Write a poem about it: text", {}, "other"),
        (self_edit_prompt("rewrite", title="passage 0", context="text"), {}, "rewrite"),
        ("", {}, "implications"),
        ("Write a poem about it: text", {"prompt_key": "spa"}, "spa"),
        ("Write a poem about it: text", {"arm": "gpt4_1"}, "implications"),
    ],
)
def test_self_edits_by_an_unknown_prompt_are_not_those_of_the_published_one(
    prompt: str, settings: dict, key: str
) -> None:
    value = run_file(("0", "1"), **settings)
    value["articles"][0]["prompt"] = prompt  # type: ignore[index]
    (result,) = results_in(value, "run_mine.json")
    assert result.prompt_key == key


def test_every_file_is_shown_or_left_out_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path, "a/run_base.json", run_file(("0", "0")))
    write(tmp_path, "b/run_base.json", run_file(("0", "1")))
    write(tmp_path, "run_round1_rank.json", run_file(("0", "1")))
    write(tmp_path, "run_round1.json", run_file(("0", "1"), prompt_key="rewrite"))
    write(tmp_path, "run_round2.json", run_file(("?", "?")))
    found = collect_results(tmp_path)
    assert [r.file for r in evaluations(found, prompt_key="implications").values()] == ["b/run_base.json"]
    assert dict(left_out(found, prompt_key="implications")) == {
        "a/run_base.json": "another file stands for this arm",
        "run_round1_rank.json": "rewards of a ReST-EM round",
        "run_round1.json": "prompt rewrite",
        "run_round2.json": "no answer graded",
    }


def test_each_of_several_runs_in_one_file_is_left_out_by_name(golden: Path) -> None:
    found = collect_results(golden)
    shown, missing = evaluations(found, prompt_key="implications"), left_out(found, prompt_key="implications")
    assert len(shown) + len(missing) == len(found.single) == len(set(missing)) + len(shown)
    assert ("results/rank_iter0.json.gz", "rewards of a ReST-EM round") in missing


def test_ungraded_answers_are_left_out_of_an_estimate(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("0?", "1?"), ("00", "0?")))
    (result,) = collect_results(tmp_path).single
    assert result.adapter().mean == 0.5


def test_files_that_are_no_results_are_passed_over_and_broken_ones_named(tmp_path: Path) -> None:
    write(tmp_path, "items.json", [{"title": "a"}])
    write(tmp_path, "run_base.record.json", {"stage": "03"})
    write(tmp_path, "server/run_x.json", run_file(("0", "1")))
    write(tmp_path, "run_bad.json", {"articles": [{"completions": 3}]})
    (tmp_path / "run_torn.json").write_text('{"articles": [')
    found = collect_results(tmp_path)
    assert not (found.single or found.cpt or found.continual)
    assert [file for file, _ in found.unread] == ["run_bad.json", "run_torn.json"]
    assert all(reason for _, reason in found.unread)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        collect_results(tmp_path / "nowhere")


def test_a_round_that_was_not_run_is_a_gap(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("0", "0")))
    write(tmp_path, "run_round2.json", run_file(("0", "1")))
    results = rounds(collect_results(tmp_path), "implications")
    assert [e and e.mean for e in round_estimates(results)] == [0.0, None, 1.0]
    assert passage_accuracies(results) == []


def test_passages_are_followed_over_rounds(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("00", "00"), ("00", "10")))
    write(tmp_path, "run_round1.json", run_file(("00", "11"), ("00", "10")))
    assert passage_accuracies(rounds(collect_results(tmp_path), "implications")) == [[0.0, 1.0], [0.5, 0.5]]


def test_arms_over_other_passages_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("0", "0"), ("0", "1")))
    write(tmp_path, "run_round1.json", run_file(("0", "1")))
    assert comparison_rows(evaluations(collect_results(tmp_path))) == []


def test_published_comparisons_come_out_as_they_are(golden: Path) -> None:
    found = collect_results(golden)
    rows = comparison_rows(evaluations(found, prompt_key="implications"))
    said = {(row["arm"], row["against"]): row["difference"] for row in rows}
    assert said["self-edits, round 2", "self-edits, base model"].startswith("+7.3 points [2.")
    assert said["self-edits, round 2", "self-edits, base model"].endswith("200 passages: real")
    assert "not distinguishable" in said["texts of GPT-4.1", "self-edits, round 2"]
    assert said["texts of GPT-4.1", "self-edits, round 2"].startswith("-0.7 points [-4.")


def test_published_rounds_of_every_prompt_are_found(golden: Path) -> None:
    found = collect_results(golden)
    means = {key: round_estimates(rounds(found, key)) for key in prompt_keys(found)}
    assert next(iter(means)) == "implications" and len(means) == 5
    assert [round(e.mean, 3) for e in means["implications"]] == [0.397, 0.427, 0.47]
    assert all(len(estimates) == 3 for estimates in means.values())


def test_published_continual_ends_below_never_editing(golden: Path) -> None:
    (result,) = collect_results(golden).continual
    last = seen_rows(result)[-1]
    assert round(last["passages so far"], 3) == 0.247 and round(last["never edited"], 3) == 0.307
    assert [e.low for e in seen_estimates(result)] == [e.mean for e in seen_estimates(result)]


def test_published_cpt_keeps_all_questions(golden: Path) -> None:
    by_file = {result.file: result for result in collect_results(golden).cpt}
    result = by_file["results/cpt_base.json"]
    assert (result.n_passages, result.n_questions) == (200, 974)
    assert round(result.adapter_accuracy, 4) == 0.4097


def test_our_continual_summary_has_intervals(tmp_path: Path) -> None:
    from seal_nb.results.continual import summarize_sequences

    matrices = [[[0.0], [1.0]], [[0.5], [0.5]]]
    write(tmp_path, "summary_continual.json", summarize_sequences(matrices, dataset="d", base_model="m"))
    (result,) = collect_results(tmp_path).continual
    (estimate,) = seen_estimates(result)
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (0.75, 0.5, 1.0, 2)


def test_a_step_of_which_nothing_was_graded_is_not_known_and_not_zero() -> None:
    value = {"mean_over_sequences": [[0.5], [None]], "std_over_sequences": [], "n_sequences": 3}
    (result,) = results_in(value, "summary_x.json")
    assert isinstance(result, ContinualResult)
    (estimate,) = seen_estimates(result)
    assert math.isnan(estimate.mean) and math.isnan(estimate.low)


def test_an_answer_nobody_could_grade_is_no_flip() -> None:
    """UNGRADED to right is nothing that the adapter put right: it stands behind the flips."""
    rows = answer_rows(run_from_json(run_file(("?01", "110"))), limit=9)
    assert [row["verdicts"] for row in rows] == ["wrong → right", "right → wrong", "ungraded → right"]


def test_a_glance_at_the_published_results_has_the_published_numbers(golden: Path, tmp_path: Path) -> None:
    sources = {"ours": collect_results(tmp_path), "published": collect_results(golden)}
    rows = {row["at a glance"]: row for row in glance_rows(sources, prompt_key="implications")}
    assert {row["ours"] for row in rows.values()} == {None}, "an empty folder has no numbers"
    said = {what: row["published"] for what, row in rows.items()}
    assert said["ReST-EM rounds"] == "39.7% (n = 200) → 47.0% (n = 200)"
    assert said["after the last continual edit"] == "24.7%, never edited 30.7%"
    assert said["best arm"].startswith("self-edits, round 2 47.0%") and "not adapted 32.3%" in said["best arm"]
    pairs = comparison_rows(evaluations(sources["published"], prompt_key="implications"))
    real = sum(row["difference"].endswith(": real") for row in pairs)
    assert said["differences between arms"] == f"{real} of {len(pairs)} are real"


def test_a_glance_without_a_graded_answer_has_no_arm(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("?", "?")))
    (first, *_) = glance_rows({"ours": collect_results(tmp_path)})
    assert first == {"at a glance": "best arm", "ours": None}

"""A folder of results, ours and published: what is found, which arm it is, and which differences are real."""

import json
from pathlib import Path

import pytest

from seal_nb.errors import DataError
from seal_nb.prompts import self_edit_prompt
from seal_nb.results.collect import Collection, collect, read_run, runs_in
from seal_nb.results.continual import ContinualRun, summarize_sequences
from seal_nb.results.cpt import CptRun
from seal_nb.results.single_passage import SinglePassageRun
from seal_nb.storage import write_json

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
        ("run_background2.json", {}, "self-edits", None),
        ("run_around3.json", {}, "self-edits", None),
        ("eval_iter-2.json", {"arm": None}, "self-edits, round 2", 2),
        ("round1_evaluate.json", {}, "self-edits, round 1", 1),
    ],
)
def test_arm_and_round_follow_from_the_file(file: str, settings: dict, arm: str, number: int | None) -> None:
    (result,) = runs_in(run_file(("0", "1"), **settings), file=file)
    assert (result.arm, result.rest_em_round) == (arm, number)


def test_rewards_are_no_evaluation(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("00", "01")))
    write(tmp_path, "run_round1_rank.json", run_file(("00", "11"), k_completions=2))
    assert list(collect(tmp_path).arms()) == ["self-edits, base model"]


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
    (result,) = runs_in(run_file(("0", "1"), **settings), file=file)
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
    (result,) = runs_in(value, file="run_mine.json")
    assert result.prompt_key == key


def test_every_file_is_shown_or_left_out_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path, "a/run_base.json", run_file(("0", "0")))
    write(tmp_path, "b/run_base.json", run_file(("0", "1")))
    write(tmp_path, "run_round1_rank.json", run_file(("0", "1")))
    write(tmp_path, "run_round1.json", run_file(("0", "1"), prompt_key="rewrite"))
    write(tmp_path, "run_round2.json", run_file(("?", "?")))
    found = collect(tmp_path)
    assert [run.file for run in found.arms("implications").values()] == ["b/run_base.json"]
    assert dict(found.left_out("implications").to_numpy().tolist()) == {
        "a/run_base.json": "another file is shown for this arm",
        "run_round1_rank.json": "rewards of a ReST-EM round",
        "run_round1.json": "prompt rewrite",
        "run_round2.json": "no answer graded",
    }


@pytest.fixture(scope="module")
def published(golden: Path) -> Collection:
    return collect(golden)


def test_each_of_several_runs_in_one_file_is_left_out_by_name(published: Collection) -> None:
    shown, missing = published.arms("implications"), published.left_out("implications")
    assert len(shown) + len(missing) == len(published.single_passage) == missing["file"].nunique() + len(shown)
    assert ["results/rank_iter0.json.gz", "rewards of a ReST-EM round"] in missing.to_numpy().tolist()


def test_ungraded_answers_are_left_out_of_an_estimate(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("0?", "1?"), ("00", "0?")))
    (run,) = collect(tmp_path).single_passage
    (row,) = run.accuracy().to_dict("records")
    assert (row["n"], row["accuracy"], row["ungraded"], row["gain"]) == (2, 0.5, 2, 0.5)


def test_other_files_are_ignored_and_broken_results_are_listed(tmp_path: Path) -> None:
    write(tmp_path, "items.json", [{"title": "a"}])
    write(tmp_path, "run_base.record.json", {"stage": "03"})
    write(tmp_path, "server/run_x.json", run_file(("0", "1")))
    write(tmp_path, "run_bad.json", {"articles": [{"completions": 3}]})
    (tmp_path / "run_torn.json").write_text('{"articles": [')
    found = collect(tmp_path)
    assert found.runs == ()
    assert [file for file, _ in found.unread] == ["run_bad.json", "run_torn.json"]
    assert all(reason for _, reason in found.unread)


CPT = {"server_reply": {"baseline_correct": [True], "adapter_correct": [False]}}
SUMMARY = summarize_sequences([[[0.1], [0.5]]], dataset="", base_model="")


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (run_file(("0", "1"), k_completions="two"), "k_completions"),
        (run_file(("0", "1"), eval_times=[3]), "eval_times"),
        (run_file(("0", "1")) | {"overall": {"adapter_mean_accuracy": "high"}}, "overall.adapter_mean_accuracy"),
        (CPT | {"overall": "high"}, "overall"),
        (CPT | {"n_articles": "1"}, "n_articles"),
        (CPT | {"per_passage": [{"title": "T"}]}, "per_passage[0].n_questions"),
        (CPT | {"lora_params": [1]}, "lora_params"),
        (SUMMARY | {"n_sequences": "8"}, "n_sequences"),
        (SUMMARY | {"matrices": [[0.1]]}, "matrices[0][0]"),
        (SUMMARY | {"sequences": [{"titles": ["T"], "questions": []}]}, "sequences[0].steps"),
    ],
)
def test_a_field_of_another_kind_is_named_and_ends_no_collection(
    tmp_path: Path, value: dict[str, object], field: str
) -> None:
    write_json(tmp_path / "broken.json", value)
    write_json(tmp_path / "run_good.json", run_file(("0", "1")))
    with pytest.raises(DataError) as refused:
        read_run(tmp_path / "broken.json")
    assert refused.value.field == field and "broken.json" in str(refused.value)
    found = collect(tmp_path)
    assert [run.file for run in found.runs] == ["run_good.json"] and [file for file, _ in found.unread] == [
        "broken.json"
    ]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        collect(tmp_path / "nowhere")


def test_a_file_is_read_as_its_form_and_written_as_it_was(tmp_path: Path, golden: Path) -> None:
    summary = summarize_sequences([[[0.0], [1.0]]], dataset="d", base_model="m")
    write(tmp_path, "summary_x.json", summary)
    write(tmp_path, "run_x.json", run_file(("0", "1"), unknown={"kept": 1}))
    forms = {"summary_x.json": ContinualRun, "run_x.json": SinglePassageRun}
    for name, form in forms.items():
        run = read_run(tmp_path / name)
        assert type(run) is form
        assert json.loads(run.write(tmp_path / "again.json").read_text()) == json.loads((tmp_path / name).read_text())
    assert type(read_run(golden / "results/cpt_base.json")) is CptRun
    with pytest.raises(DataError, match="is neither a single-passage run"):
        read_run(write_json(tmp_path / "items.json", [{"title": "T"}]))


def test_a_round_that_was_not_run_is_a_gap(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("0", "0")))
    write(tmp_path, "run_round2.json", run_file(("0", "1")))
    results = collect(tmp_path).rounds("implications")
    assert [run and run.estimate().mean for run in results] == [0.0, None, 1.0]
    assert collect(tmp_path).passage_accuracies("implications") == []


def test_passages_are_followed_over_rounds(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("00", "00"), ("00", "10")))
    write(tmp_path, "run_round1.json", run_file(("00", "11"), ("00", "10")))
    assert collect(tmp_path).passage_accuracies("implications") == [[0.0, 1.0], [0.5, 0.5]]


def test_arms_over_other_passages_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("0", "0"), ("0", "1")))
    write(tmp_path, "run_round1.json", run_file(("0", "1")))
    assert len(collect(tmp_path).differences()) == 0


def test_published_comparisons_come_out_as_they_are(published: Collection) -> None:
    found = published.differences("implications").set_index(["arm", "against"])
    settled = found.loc["self-edits, round 2", "self-edits, base model"]
    assert settled.sentence.startswith("+7.3 points [2.") and settled.sentence.endswith("200 passages: real")
    noise = found.loc["texts of GPT-4.1", "self-edits, round 2"]
    assert noise.sentence.startswith("-0.7 points [-4.") and "not distinguishable" in noise.sentence
    assert settled.is_real and not noise.is_real and "needs" in noise.to_settle


def test_published_rounds_of_every_prompt_are_found(published: Collection) -> None:
    means = {key: [run.estimate().mean for run in published.rounds(key)] for key in published.prompt_keys()}
    assert next(iter(means)) == "implications" and len(means) == 5
    assert [round(mean, 3) for mean in means["implications"]] == [0.397, 0.427, 0.47]
    assert all(len(rounds) == 3 for rounds in means.values())


def test_published_continual_ends_below_never_editing(published: Collection) -> None:
    (run,) = published.continual
    last = run.curve().iloc[-1]
    assert round(last.accuracy, 3) == 0.247 and round(last.never_edited, 3) == 0.307
    assert run.curve()["low"].isna().all(), "no intervals without the matrices"


def test_published_cpt_keeps_all_questions(published: Collection) -> None:
    by_file = {run.file: run for run in published.cpt}
    (row,) = by_file["results/cpt_base.json"].accuracy().to_dict("records")
    assert (row["n"], row["questions"]) == (200, 974)
    assert round(row["accuracy"], 4) == 0.4097


def test_our_continual_summary_has_intervals(tmp_path: Path) -> None:
    matrices = [[[0.0], [1.0]], [[0.5], [0.5]]]
    write(tmp_path, "summary_continual.json", summarize_sequences(matrices, dataset="d", base_model="m"))
    (run,) = collect(tmp_path).continual
    (row,) = run.curve().to_dict("records")
    assert (row["accuracy"], row["low"], row["high"], row["n"]) == (0.75, 0.5, 1.0, 2)
    (row,) = run.accuracy().to_dict("records")
    assert (row["accuracy"], row["baseline"], row["gain"], row["n"]) == (0.75, 0.25, 0.5, 2)


def test_a_step_without_a_verdict_is_missing_and_not_zero() -> None:
    value = {"mean_over_sequences": [[0.5], [None]], "std_over_sequences": [], "n_sequences": 3}
    (run,) = runs_in(value, file="summary_x.json")
    assert isinstance(run, ContinualRun)
    assert run.curve().accuracy.isna().all()


def test_answers_that_changed_come_first_and_ungraded_is_no_change() -> None:
    answers = SinglePassageRun(value=run_file(("?01", "110"))).answers(changed_first=True)
    assert list(answers.verdicts) == ["wrong → right", "right → wrong", "ungraded → right"]
    assert answers.passage[0] == "passage 0" and answers.adapter_answer[0] == "a"


def test_the_summary_of_the_published_results_has_the_published_numbers(published: Collection, tmp_path: Path) -> None:
    assert set(collect(tmp_path).summary().values()) == {None}, "an empty folder has no numbers"
    said = published.summary("implications")
    assert said["ReST-EM rounds"] == "39.7% (n = 200) → 47.0% (n = 200)"
    assert said["after the last continual edit"] == "24.7%, never edited 30.7%"
    assert said["best arm"] == "self-edits, round 2 47.0% (n = 200), baseline 32.3% (n = 200)"
    assert said["differences between arms"] == "5 of 6 are real"


def test_a_summary_without_a_graded_answer_has_no_arm(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("?", "?")))
    assert collect(tmp_path).summary()["best arm"] is None


@pytest.mark.parametrize(
    ("answers", "recited"),
    [
        (["Ilse Corvandt built it in 1893 of brass."] * 3, 1.0),
        (["Ilse Corvandt", "1893", "brass"], 0.0),
        (["1893", "", "brass"], pytest.approx(1 / 3)),
        (["", "", ""], None),
    ],
)
def test_a_reciting_model_is_found_out_and_a_terse_one_is_not(answers: list[str], recited: float | None) -> None:
    asked = zip(["Who built it?", "When?", "Of what?"], ["Ilse Corvandt", "1893", "brass"], answers, strict=True)
    rows = [{"question": question, "answer": gold, "adapter_answer": answer} for question, gold, answer in asked]
    assert SinglePassageRun(value={"articles": [{"completions": [{"questions": rows}]}]}).recited() == recited


def test_only_another_answer_of_the_same_passage_is_recited() -> None:
    rows = [
        {"question": f"q{n}", "answer": gold, "adapter_answer": "Paris"} for n, gold in enumerate(["Paris", "paris"])
    ]
    other = [{"question": "q2", "answer": "Rome", "adapter_answer": "Paris"}]
    articles = [{"completions": [{"questions": one}]} for one in (rows, other)]
    assert SinglePassageRun(value={"articles": articles}).recited() == 0.0

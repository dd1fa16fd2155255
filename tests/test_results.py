"""A folder of results, ours and published: what is found, which arm it is, and which differences are real."""

import gzip
import json
import math
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_nb import storage
from seal_nb.errors import DataError, SettingsError
from seal_nb.grading.base import Rule, Verdict
from seal_nb.prompts import self_edit_prompt
from seal_nb.results import run as results_run
from seal_nb.results.collect import Collection, collect, read_run, runs_in
from seal_nb.results.continual import ContinualRun, summarize_sequences
from seal_nb.results.regrade import compare_graders
from seal_nb.results.run import compare
from seal_nb.results.single_passage import CptRun, SinglePassageRun
from seal_nb.storage import write_json
from seal_nb.views.tables import as_html, as_text

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
        "a/run_base.json": "another file has this arm with the same seed, or with verdicts",
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


DEEP = b'{"a":' * 90 + b"1" + b"}" * 90
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "bomb.json.gz": (gzip.compress(b"[" + b" " * 3_000_000 + bytes(range(128)) * 200 + b"]"), "holds more than"),
    "large.json": (b" " * 1_000_001, "holds more than 1 MB"),
    "torn.json.gz": (gzip.compress(b"[1, 2]")[:-9], "cannot be read"),
    "deep.json": (b"[" * 200_000, "more than 100 levels"),
    "deeper.json": (DEEP.replace(b"1", DEEP), "more than 100 levels"),
    "digits.json": (b'{"articles": [], "n_articles": 1' + b"0" * 400 + b"}", "a whole number has 401 digits"),
    "many_digits.json": (b"1" * 5000, "a whole number has 5000 digits"),
    "twice.json": (b'{"articles": [], "arm": "a", "arm": "b"}', "key 'arm' occurs twice"),
    "latin.json": ('{"articles": "é"}'.encode("latin-1"), "not UTF-8"),
    "huge.json": (
        b'{"articles": [], "overall": {"adapter_mean_accuracy": 1e300}}',
        "is 1e+300, not a plausible number",
    ),
    "count.json": (b'{"articles": [], "n_articles": -1}', "is -1, not a count"),
    "small.json.gz": (gzip.compress(b'{"articles": [' + b" " * 500_000 + b"]}"), "holds more than 0 MB"),
    "values.json": (b'{"articles": [' + b"{}," * 160_000 + b"{}]}", "more than 300000 objects, lists and commas"),
    "objects.json": (b'{"articles": [' + b"[{}]," * 30 + b"{}]}", "more than 30 objects and texts"),
    "names.json": (
        json.dumps({"articles": [], "x": [{"model": f"m{n}"} for n in range(12)]}).encode(),
        "or 10 models and graders",
    ),
    "runs.json": (json.dumps({"runs": {f"r{n}": {"passages": []} for n in range(6)}}).encode(), "more than 5 runs"),
    "marks.json": (
        b'{"runs": {"r": {"passages": [{"baseline": "' + b"1" * 30 + b'", "adapter": ""}]}}}',
        "30 passages and verdicts",
    ),
    "release.json": (
        b'{"query_server": [' + b'{"file": "a"},' * 5 + b'{"file": "b"}], "continual_overall_results": {}}',
        "more than 5 runs",
    ),
    "no_statistics.json": (
        json.dumps(
            {
                "server_reply": {"baseline_correct": [True], "adapter_correct": [False]},
                "per_passage": [{"title": "t", "n_questions": 0}],
            }
        ).encode(),
        "has 0 questions for 1 verdicts",
    ),
}


def test_a_file_that_cannot_be_read_is_listed_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MOST_BYTES", 1_000_000)
    monkeypatch.setattr(storage, "FREE_BYTES", 400_000)
    monkeypatch.setattr(storage, "MOST_VALUES", 300_000)
    for limit, value in {"MOST_PARTS": 30, "MOST_NAMES": 10, "MOST_RUNS": 5}.items():
        monkeypatch.setattr(f"seal_nb.results.collect.{limit}", value)
    for name, (content, _) in UNREADABLE.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.json")  # it would wait for a writer
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "dangling.json").symlink_to("nowhere")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    write(tmp_path, "run_good.json", run_file(("0", "1"), lora_params={"lr": math.nan}, grader="half \ud800 \\\\ud800"))
    found = collect(tmp_path)
    assert [(run.file, run.value["grader"]) for run in found.runs] == [("run_good.json", "half \ufffd \\\\ud800")]
    reasons, wanted = dict(found.unread), {name: said for name, (_, said) in UNREADABLE.items()}
    wanted |= dict.fromkeys(["pipe.json", "folder.json", "zero.json"], "not a regular file") | {
        "dangling.json": "no such file"
    }
    assert reasons.keys() == wanted.keys() and [name for name in wanted if wanted[name] not in reasons[name]] == []


@pytest.mark.parametrize("wrong", [DataError("is wrong"), ValueError("1 verdicts"), KeyError("a"), OverflowError()])
def test_a_run_whose_statistics_fail_is_listed_and_ends_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    def broken(run: CptRun, kind: str) -> list:
        raise wrong

    monkeypatch.setattr(CptRun, "scores", broken)
    write(tmp_path, "cpt_run_bad.json", CPT)
    write(tmp_path, "run_good.json", run_file(("0", "1")))
    found = collect(tmp_path)
    assert [file for file, _ in found.unread] == ["cpt_run_bad.json"] and list(found.overview().file) == [
        "run_good.json"
    ]


def test_a_key_that_occurs_twice_among_many_is_found_in_one_pass(tmp_path: Path) -> None:
    """One by one, this takes minutes."""
    with pytest.raises(ValueError, match="key 'last' occurs twice"):
        storage.parse_json("{" + "".join(f'"{n}":1,' for n in range(200_000)) + '"last":1,"last":2}')


def test_folders_that_are_linked_are_read_once_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path, "disk/demo/run_base.json", run_file(("0", "1")))
    (tmp_path / "runs/real").mkdir(parents=True)
    for link, to in {"demo": "disk/demo", "again": "disk/demo", "real/loop": "runs", "around": ".", "all": "/"}.items():
        (tmp_path / "runs" / link).symlink_to(tmp_path / to)
    assert [run.name for run in collect(tmp_path / "runs").runs] == ["run_base"]


@pytest.mark.parametrize("number", ["99999999999", "1" * 200, "1000"])
def test_a_round_is_no_number_without_end(tmp_path: Path, number: str) -> None:
    write(tmp_path, "run_iter1.json", run_file(("0", "0")))
    write(tmp_path, "run_base.json", run_file(("0", "0")))
    write(tmp_path, f"run_iter{number}.json", run_file(("0", "1")))
    assert len(collect(tmp_path).rounds("implications")) == 2
    assert runs_in(run_file(("0", "1")), file=f"iter{number * 40}")[0].rest_em_round is None


def test_of_many_arms_the_first_are_compared_and_the_table_says_so(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path, f"run_iter{number}.json", run_file(("0", "1")))
    table = collect(tmp_path).differences()
    assert len(table) == 20 * 19 / 2 + 1 and table.arm.iloc[-1] == "10 more arms"
    assert as_text(table) and collect(tmp_path).summary()["differences between arms"] == "0 of 190 are real (Holm's p)"


def test_a_passage_with_questions_without_end_is_searched_for_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    graded = []
    monkeypatch.setattr(Rule, "grade", lambda self, answered: graded.append(1) or [Verdict.INCORRECT])
    monkeypatch.setattr(results_run, "MOST_CHARACTERS", 100_000)
    rows = [{"question": f"q{n}", "answer": f"g{n}", "adapter_answer": f"a{n % 500}" * 2_000} for n in range(2_000)]
    assert SinglePassageRun(value={"articles": [{"completions": [{"questions": rows}]}]}).recitation["recited"] == 0.0
    assert 0 < len(graded) < 200


JUNK = [None, True, -1, 10**30, 1e308, math.nan, "", "\ud800", "\x1b[2J", "$x^{$", "0.5", [], {}, [[]], [None], [1],
        ["x"], {"a": 1}, {"a": {"b": 1}}]  # fmt: skip
ASKED = [{"question": "q", "answer": "a"}]
SEQUENCE = {"titles": ["T"], "questions": [ASKED], "steps": [{"texts": ["x"], "correct": [True]}] * 2}
GOOD: dict[str, Any] = {
    "single": run_file(("01", "1?"), lora_params={"lr": 1e-3}, eval_times=1, n_articles=1, prompt_key="rewrite"),
    "cpt": CPT | {"per_passage": [{"title": "T", "n_questions": 1}], "n_articles": 1, "lora_params": {"lr": 1e-3}},
    "continual": SUMMARY | {"sequences": [SEQUENCE]},
    "marks": {"runs": {"base": {"passages": [{"baseline": "01", "adapter": "11"}], "overall": {"gain": 0.5}}}},
    "release": {
        "query_server": [{"file": "a/base.json", "overall": {"adapter_mean_accuracy": 0.4}}],
        "cpt": [{"file": "b.json", "overall": {"adapter_accuracy": 0.4}}],
        "continual_overall_results": SUMMARY,
    },
}
GOOD["single"]["articles"][0]["completions"][0] |= {"stats": {"adapter_mean": 0.5}, "prompt_key": "rewrite"}
for holder in (GOOD["single"]["articles"][0]["completions"][0]["questions"][0], GOOD["cpt"]["server_reply"]):
    holder["earlier"] = {"judge": {name: holder[name] for name in ("baseline_correct", "adapter_correct")}}


def holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: the object or list, and the key in it."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        yield from holders(one) if isinstance(one, dict | list) else ()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(sorted(GOOD)), at=st.floats(0, 1, exclude_max=True), junk=st.sampled_from(JUNK))
def test_a_wrong_value_anywhere_in_a_file_of_any_form_ends_no_table(
    tmp_path: Path, form: str, at: float, junk: object
) -> None:
    value = deepcopy(GOOD[form])
    places = list(holders(value))
    holder, key = places[int(at * len(places))]
    holder[key] = deepcopy(junk)
    write(tmp_path, "bad.json", value)
    write(tmp_path, "run_iter1.json", run_file(("0", "1")))
    found = collect(tmp_path)
    assert "run_iter1.json" in [run.file for run in found.runs]
    tables = [found.overview(), found.left_out(), *(found.accuracy(form=name) for name in ("cpt", "continual"))]
    tables += [table for run in found.continual for table in (run.curve(), run.answers())]
    tables += [pd.DataFrame(found.unread, columns=["file", "reason"]), compare_graders(found.best_answered())]
    assert found.summary() and [as_text(table).encode() for table in tables] and as_html(tables[0]).encode()


def test_a_continual_run_without_a_verdict_has_a_curve_without_numbers() -> None:
    summary = summarize_sequences([[[None], [None]]], dataset="", base_model="")
    (row,) = ContinualRun(value=summary).curve().to_dict("records")
    assert math.isnan(row["accuracy"])


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
    (row,) = collect(tmp_path).differences().to_dict("records")
    assert row["sentence"] == "not compared: shares 1 of 2 passages with the other run, which has 1"
    assert not row["is_real"]


def test_published_comparisons_come_out_as_they_are(published: Collection) -> None:
    found = published.differences("implications").set_index(["arm", "against"])
    settled = found.loc["self-edits, round 2", "self-edits, base model"]
    assert settled.sentence.startswith("+7.3 points [1.") and settled.sentence.endswith("(one of 6 comparisons): real")
    noise = found.loc["texts of GPT-4.1", "self-edits, round 2"]
    assert noise.sentence.startswith("-0.7 points [-4.") and "not distinguishable" in noise.sentence
    assert settled.is_real and not noise.is_real
    (declared,) = published.differences("implications", compare=[" > ".join(settled.name)]).sentence
    assert declared.startswith("+7.3 points [2.") and declared.endswith("200 passages: real")
    with pytest.raises(DataError, match="'self-edits, round 2 > mine' are not two arms of: passage only; "):
        published.differences("implications", compare=["self-edits, round 2 > mine"])


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
    assert (row["accuracy"], row["n"]) == (0.75, 2) and row["low"] < 0.5 and row["high"] > 0.9
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
    assert said["differences between arms"] == "5 of 6 are real (Holm's p)"


def test_a_summary_without_a_graded_answer_has_no_arm(tmp_path: Path) -> None:
    write(tmp_path, "run_base.json", run_file(("?", "?")))
    assert collect(tmp_path).summary()["best arm"] is None


@pytest.mark.parametrize(
    ("answers", "recited"),
    [
        (["Ilse Corvandt built it in 1893 of brass."] * 3, 1.0),
        (["Ilse Corvandt", "1893", "brass"], 0.0),
        (["1893", "", "brass"], pytest.approx(1 / 3)),
        (["", "", ""], 0.0),
    ],
)
def test_a_reciting_model_is_found_out_and_a_terse_one_is_not(answers: list[str], recited: float | None) -> None:
    asked = zip(["Who built it?", "When?", "Of what?"], ["Ilse Corvandt", "1893", "brass"], answers, strict=True)
    rows = [{"question": question, "answer": gold, "adapter_answer": answer} for question, gold, answer in asked]
    run = SinglePassageRun(value={"articles": [{"completions": [{"questions": rows}]}]})
    assert run.recitation["recited"] == recited


def test_only_another_answer_of_the_same_passage_is_recited() -> None:
    rows = [
        {"question": f"q{n}", "answer": gold, "adapter_answer": "Paris"} for n, gold in enumerate(["Paris", "paris"])
    ]
    other = [{"question": "q2", "answer": "Rome", "adapter_answer": "Paris"}]
    also = [{**other[0], "other_answers": ["Paris"]}, {"question": "q3", "answer": "paris", "adapter_answer": "Oslo"}]
    articles = [{"completions": [{"questions": one}]} for one in (rows, other, also)]
    assert SinglePassageRun(value={"articles": articles}).recitation["recited"] == 0.0


def test_right_and_not_recited_and_the_parrot_are_beside_the_accuracy() -> None:
    asked = [("Who built it?", "Ilse Corvandt", "Ilse Corvandt built it in 1893."), ("When?", "1893", "It was 1893.")]
    verdicts = {"baseline_answer": "No.", "baseline_correct": False, "adapter_correct": True}
    rows = [
        {"question": question, "answer": gold, "adapter_answer": answer, **verdicts} for question, gold, answer in asked
    ]
    text = "Ilse Corvandt built it in " + "many " * 50 + "1893."  # the year is beyond the parrot's words
    article = {"context": text, "completions": [{"questions": rows}]}
    (row,) = SinglePassageRun(value={"articles": [article] * 8}).accuracy().to_dict("records")
    assert (row["accuracy"], row["not_recited"], row["recited"], row["baseline_recited"]) == (1.0, 0.5, 0.5, 0.0)
    assert row["not_recited_low"] < 0.5 < row["not_recited_high"] and row["parrot"] == 0.5


def test_runs_with_other_seeds_are_pooled_and_runs_with_other_settings_are_arms_of_their_own(tmp_path: Path) -> None:
    about = {"model": "m-local-1", "lora_params": {"epochs": 5, "lr": 1e-3}}
    rights = [("0", "1"), ("0", "0")] * 4
    for folder, seed, verdicts in (("a", 1, rights), ("b", 2, rights[::-1]), ("c", 2, rights)):
        write(tmp_path, f"{folder}/run_base.json", run_file(*verdicts, seed=seed, **about))
    other = about | {"lora_params": {"epochs": 10, "lr": 1e-3}}
    write(tmp_path, "d/run_base.json", run_file(*rights[:2], seed=1, **about))
    write(tmp_path, "e/run_base.json", run_file(*rights, seed=1, **other))
    write(tmp_path, "f/run_base.json", run_file(*rights, seed=1, **about, grader="exact"))
    found = collect(tmp_path)
    base = "self-edits, base model"
    names = [base, f"{base} (d/run_base.json)", f"{base} (finetune_epochs 10 / 5)", f"{base} (grader exact / local)"]
    assert sorted(found.arms()) == sorted(names)
    pooled = found.arms()[base]
    assert pooled.estimate().units == "8 passages × 2 runs" and pooled.estimate().mean == 0.5
    assert found.accuracy().set_index("arm")["file"][base] == "a/run_base.json + c/run_base.json"
    assert list(found.left_out().file) == ["b/run_base.json"], "the later file has the same seed"
    by_pair = found.differences().set_index(["arm", "against"])
    assert by_pair.loc[(names[2], base), "differs"] == "finetune_epochs 10 / 5"
    refused = by_pair.loc[(names[3], base), "sentence"]
    assert refused == "not compared: was graded by local, the other run by exact"
    with pytest.raises(DataError, match="was graded by local, the other run by exact; .*seal-nb grade"):
        compare(found.arms()[names[3]], pooled)


def test_rounds_are_compared_by_what_they_gain_over_their_own_baselines(tmp_path: Path) -> None:
    """The accuracy rises because the model without adapter does: the difference in differences is negative."""
    write(tmp_path, "run_base.json", run_file(*[("00", "11"), ("00", "00")] * 6))
    write(tmp_path, "run_round1.json", run_file(*[("01", "11"), ("01", "01")] * 6))
    table = collect(tmp_path).rounds_accuracy()
    assert list(table.accuracy) == [0.5, 0.75]
    assert table.more_gain[1].startswith("-25.0 points [") and table.more_gain[1].endswith("12 passages: real")


def seeds(tmp_path: Path, arm: str, *rights: list[tuple[str, str]], **about: object) -> None:
    for seed, verdicts in enumerate(rights):
        named = {"arm": arm, "seed": seed, "model": "m-local-1", **about}
        write(tmp_path, f"{arm}{seed}/run_base_{arm}.json", run_file(*verdicts, **named))


def test_pooled_arms_are_compared_with_those_of_another_number_of_runs(tmp_path: Path) -> None:
    good, bad = [("00", "11"), ("00", "10")] * 4, [("00", "00"), ("00", "10")] * 4
    seeds(tmp_path, "passage_only", bad, bad[::-1], bad)
    seeds(tmp_path, "hand_written", good, good[::-1])
    arms = collect(tmp_path).arms()
    pairs = [("hand-written", "passage only"), ("passage only", "hand-written")]
    one, other = (compare(arms[arm], arms[against]) for arm, against in pairs)
    assert one.sentence[0].split(", ")[2].startswith("8 passages × 3 runs")
    assert (one.low[0], one.high[0]) == pytest.approx((-other.high[0], -other.low[0]))
    assert collect(tmp_path).differences().is_real.tolist() == [True]


@pytest.mark.parametrize(
    "other",
    [{"grader": "judge:x"}, {"k_completions": 3}, {"prompt_key": "rewrite"}, {"answer_style": "short"}, {"seed": None}],
)
def test_runs_that_differ_by_more_than_their_seeds_are_not_pooled(tmp_path: Path, other: dict[str, Any]) -> None:
    verdicts = [("0", "1"), ("0", "0")] * 4
    about: dict[str, Any] = {"model": "m-local-1", "prompt_key": "implications"}
    write(tmp_path, "a/run_mine.json", run_file(*verdicts, **about, seed=1))
    write(tmp_path, "b/run_mine.json", run_file(*verdicts, **about | {"seed": 2} | other))
    assert len(collect(tmp_path).arms()) == 2


def test_ungraded_answers_and_recitation_are_those_of_all_runs_of_an_arm(tmp_path: Path) -> None:
    seeds(tmp_path, "hand_written", [("00", "11")] * 6, [("00", "1?")] * 6)
    (row,) = collect(tmp_path).accuracy().to_dict("records")
    assert (row["ungraded"], row["recited"]) == (6, 0.0)


@pytest.mark.parametrize("margin", [2, -0.05, "0.02", 0])
def test_a_margin_that_is_no_fraction_is_refused(margin: Any) -> None:
    run = SinglePassageRun(value=run_file(*[("0", "1")] * 8))
    with pytest.raises(SettingsError, match="margin is .*give a fraction"):
        compare(run, run, margin=margin)


def test_the_best_of_cpt_is_an_arm_and_not_its_luckiest_seed(tmp_path: Path) -> None:
    for seed, right in enumerate((True, False)):
        reply = {"baseline_correct": [False] * 8, "adapter_correct": [right] * 8}
        about = {"arm": "hand_written", "seed": seed, "model": "m-local-1", "server_reply": reply}
        write(tmp_path, f"cpt_run_{seed}.json", about | {"per_passage": [{"title": "T", "n_questions": 1}] * 8})
    assert collect(tmp_path).summary()["best of many passages in one adapter"] == "hand-written 50.0%, 8 passages"

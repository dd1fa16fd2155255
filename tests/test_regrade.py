"""Runs graded again: published numbers to the last bit from published verdicts, earlier verdicts kept."""

import gzip
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import seal_nb
from benchmarks.stand_in import Answer, Asked, error, stand_in
from seal_nb.cli import main
from seal_nb.errors import DataError
from seal_nb.experiments.continual import Edits, sequence_record
from seal_nb.experiments.cpt import CPTSettings, build_cpt_run, cpt_request
from seal_nb.experiments.rest_em import select_best
from seal_nb.experiments.single_passage import SinglePassageSettings, build_run, requests_for_run
from seal_nb.grading.base import AS_BOOLEAN, IN_WORDS, Answered, Verdict
from seal_nb.grading.choose import grader_of, make_grader
from seal_nb.passages import Passage, Question, load_passages
from seal_nb.protocol import Answers, TTTRequest, build_reply
from seal_nb.results.collect import read_run, run_of
from seal_nb.results.continual import continual_matrix, summarize_sequences, verdict_row
from seal_nb.results.regrade import agreement_of, grade_file, regrade
from seal_nb.results.single_passage import CptRun, SinglePassageRun

PASSAGES = [
    Passage(title=title, context="c", questions=tuple(Question(question=f"{title}{n}?", answer="x") for n in range(k)))
    for title, k in (("A", 2), ("B", 3), ("A", 1))  # titles repeat
]


class Says:
    """A grader that says what a function says; records what it was asked."""

    def __init__(self, say: Callable[[Answered], bool | None], name: str = "stub") -> None:
        self.say, self.name = say, name
        self.asked: list[Answered] = []

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        self.asked += answered
        return [IN_WORDS[self.say(one)] for one in answered]


class Again:
    """A value graded again: the new value, and what the grading reports."""

    def __init__(self, value: dict[str, Any], grader: Says, *, passages: Any = (), only_ungraded: bool = False) -> None:
        self.done = regrade(run_of(value, passages=passages), grader, only_ungraded=only_ungraded)
        self.run, self.verdicts, self.kinds = self.done.run.value, self.done.verdicts, self.done.kinds


@pytest.fixture(scope="session")
def ranking(golden: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress((golden / "results/rank_iter0.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def cpt(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "results/cpt_base.json").read_text())


def without_ours(run: dict[str, Any]) -> dict[str, Any]:
    """A regraded run less what regrading adds."""
    text = json.dumps(run)
    copy = json.loads(text)
    for article in copy.get("articles", []):
        for completion in article["completions"]:
            for row in completion["questions"]:
                row.pop("earlier", None)
    for name in ("grader", "n_ungraded", "per_passage"):
        copy.pop(name, None)
    copy.get("server_reply", {}).pop("earlier", None)
    return copy


def test_published_verdicts_given_again_make_the_published_file_to_the_last_bit(ranking: dict[str, Any]) -> None:
    verdicts = [
        row[f"{kind}_correct"]
        for article in ranking["articles"]
        for completion in article["completions"]
        for row in completion["questions"]
        for kind in ("baseline", "adapter")
    ]
    in_order = iter(verdicts)
    done = Again(ranking, Says(lambda _: next(in_order)))
    assert len(verdicts) == len(done.verdicts) == 6750
    assert without_ours(done.run) == ranking
    assert (done.run["grader"], done.run["n_ungraded"]) == ("stub", 0)


def test_published_cpt_verdicts_given_again_make_the_published_numbers(cpt: dict[str, Any], golden: Path) -> None:
    reply = cpt["server_reply"]
    pairs = zip(reply["baseline_correct"], reply["adapter_correct"], strict=True)
    in_order = iter([verdict for pair in pairs for verdict in pair])
    done = Again(cpt, Says(lambda _: next(in_order)), passages=load_passages(golden / "eval/base_val.json.gz"))
    assert done.run["overall"] == cpt["overall"]
    again = without_ours(done.run)
    assert again["server_reply"] == reply
    assert sum(len(entry["adapter_correct"]) for entry in done.run["per_article"].values()) == 974
    assert sum(entry["n_questions"] for entry in done.run["per_passage"]) == 974


def test_a_run_graded_again_is_a_run_for_every_other_stage(ranking: dict[str, Any], tmp_path: Path) -> None:
    done = Again(ranking, Says(lambda one: "the" in one.answer))
    path = tmp_path / "run_again.json"
    path.write_text(json.dumps(done.run))
    said = read_run(path).summary()
    assert said["disagreements"] == [] and said["overall"] == done.run["overall"]
    assert said["overall"] != ranking["overall"]
    assert len(select_best(SinglePassageRun(value=done.run), k_best=1)) > 0


def test_earlier_verdicts_stay_beside_by_the_name_of_their_grader(ranking: dict[str, Any]) -> None:
    first = Again(ranking, Says(lambda _: True, name="one")).run
    second = Again(first, Says(lambda _: None, name="two")).run
    third = Again(second, Says(lambda _: False, name="two")).run
    published = ranking["articles"][0]["completions"][0]["questions"][0]
    row = third["articles"][0]["completions"][0]["questions"][0]
    names = ("baseline_correct", "adapter_correct")
    assert row["earlier"] == {"earlier": {name: published[name] for name in names}, "one": dict.fromkeys(names, True)}
    assert [row[name] for name in names] == [False, False]
    assert ranking["articles"][0]["completions"][0]["questions"][0].keys() == published.keys()  # not changed


def test_ungraded_answers_are_counted_and_enter_no_mean(ranking: dict[str, Any]) -> None:
    """An outage of the judge from the second article on: the first one alone makes the numbers."""
    title = ranking["articles"][0]["title"]
    alone = {**ranking, "articles": [a for a in ranking["articles"] if a["title"] == title]}

    def say(one: Answered) -> bool | None:
        return len(one.answer) % 2 == 0 if one.title == title else None

    done, expected = Again(ranking, Says(say)), Again(alone, Says(say))
    assert done.run["overall"]["adapter_mean_accuracy"] == expected.run["overall"]["adapter_mean_accuracy"]
    assert done.run["overall"]["mean_gain"] == expected.run["overall"]["mean_gain"]
    n_rows = sum(len(c["questions"]) for a in ranking["articles"] for c in a["completions"])
    n_graded = sum(len(c["questions"]) for a in alone["articles"] for c in a["completions"])
    assert done.run["n_ungraded"] == n_rows - n_graded > 0
    assert done.run["articles"][-1]["stats"]["mean_gain"] is None
    assert "UNGRADED" in done.done.lines()[0] and "--only-ungraded" in done.done.lines()[1]


def test_with_nothing_graded_there_is_no_number_and_no_zero(ranking: dict[str, Any]) -> None:
    done = Again(ranking, Says(lambda _: None))
    assert set(done.run["overall"].values()) == {None}
    assert {c["stats"]["gain_mean"] for a in done.run["articles"] for c in a["completions"]} == {None}


def test_only_ungraded_asks_for_those_alone_and_leaves_the_others(ranking: dict[str, Any]) -> None:
    outage = Again(ranking, Says(lambda one: True if "a" in one.answer else None, name="judge"))
    n_missing = sum(verdict is None for verdict in outage.verdicts)
    later = Says(lambda _: False, name="judge")
    done = Again(outage.run, later, only_ungraded=True)
    assert len(later.asked) == n_missing > 0
    assert not any("a" in one.answer for one in later.asked)
    assert list(done.verdicts) == [verdict is True for verdict in outage.verdicts]
    assert (done.run["grader"], done.run["n_ungraded"]) == ("judge", 0)


@pytest.mark.parametrize(
    ("run", "grader"),
    [
        ({"model": "ca533fcb8e7b2ce7-float32-local-2048"}, "local"),
        ({"model": "ca533fcb8e7b2ce7-bfloat16-judge:org/m-7b-v2-2048-deterministic"}, "judge:org/m-7b-v2"),
        ({"base_model": "ca533fcb8e7b2ce7-float32-f1-512"}, "f1"),
        ({"model": "ca533fcb8e7b2ce7-float32-local-2048", "grader": "exact"}, "exact"),
        ({"model": "base"}, ""),
        ({"model": "local"}, ""),
        ({}, ""),
    ],
)
def test_whose_verdicts_a_file_has(run: dict[str, Any], grader: str) -> None:
    assert grader_of(run) == grader


def test_two_graders_in_one_file_are_both_named(ranking: dict[str, Any]) -> None:
    outage = Again(ranking, Says(lambda one: True if "a" in one.answer else None, name="judge"))
    done = Again(outage.run, Says(lambda _: False, name="local"), only_ungraded=True)
    assert done.run["grader"] == "judge, what it left: local"


def own_cpt_run(verdicts: Sequence[bool | None]) -> dict[str, Any]:
    settings = CPTSettings(arm="passage_only")
    request = cpt_request(PASSAGES, settings, model_id="m")
    words = [IN_WORDS[verdict] for verdict in verdicts]
    texts = [f"answer {n}" for n in range(len(verdicts))]
    reply = build_reply(
        baseline=Answers(texts=texts, verdicts=words), adapter=Answers(texts=texts, verdicts=words[::-1])
    )
    return build_cpt_run(PASSAGES, request, reply, settings, model="m", dataset="d", timestamp="t")


def test_own_cpt_run_graded_again_is_what_it_would_have_been(tmp_path: Path) -> None:
    first, second = [True, False, True, True, False, False], [False, True, None, True, True, False]
    pairs = zip(second, second[::-1], strict=True)
    in_order = iter([verdict for pair in pairs for verdict in pair])
    done = Again(own_cpt_run(first), Says(lambda _: next(in_order)), passages=PASSAGES)
    again, expected = done.run, own_cpt_run(second)
    kept = again["server_reply"].pop("earlier")
    assert again.pop("grader") == "stub"
    assert again == expected
    assert kept == {"earlier": {"baseline_correct": first, "adapter_correct": first[::-1]}}


@pytest.mark.parametrize("n_passages", [3, 30])
def test_earlier_verdicts_are_copied_once_however_many_there_are(
    n_passages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Mock(wraps=deepcopy)
    monkeypatch.setattr("seal_nb.results.run.deepcopy", copies)
    texts, verdicts = ["t"] * n_passages, [True] * n_passages
    reply = {
        "baseline_texts": texts, "adapter_texts": texts, "baseline_correct": verdicts, "adapter_correct": verdicts,
    }  # fmt: skip
    Again({"server_reply": reply}, Says(lambda _: False), passages=PASSAGES[2:] * n_passages)
    assert copies.call_count == 3, "the run, and the verdicts of each kind"


def test_cpt_run_with_other_passages_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"has 6 entries for 5 questions; .*--dataset"):
        Again(own_cpt_run([True] * 6), Says(lambda _: True), passages=PASSAGES[:2])


def own_summary(step_verdicts: Sequence[Sequence[bool | None]]) -> dict[str, Any]:
    sequence = PASSAGES[:2]
    replies = [
        build_reply(baseline=None, adapter=Answers(texts=["x"] * len(v), verdicts=[IN_WORDS[one] for one in v]))
        for v in step_verdicts
    ]
    counts = [len(passage.questions) for passage in sequence]
    rows = [verdict_row(reply.adapter_correct, counts, step) for step, reply in enumerate(replies)]
    summary = summarize_sequences([continual_matrix(rows)], dataset="d", base_model="m")
    requests = [TTTRequest(train_sequences=["x"], request_id=str(n), seed=n) for n in range(3)]
    edits = Edits(passages=sequence, texts=["t"] * 2, requests=requests, replies=replies)
    return {**summary, "sequences": [sequence_record(edits)]}


def test_continual_summary_graded_again_is_what_it_would_have_been() -> None:
    first = [[True, False, True, True, False], [True, False], [False, False, True, True, True]]
    second = [[False, False, True, None, False], [False, True], [True, True, False, False, None]]
    in_order = iter([verdict for step in second for verdict in step])
    done = Again(own_summary(first), Says(lambda _: next(in_order)))
    steps = done.run["sequences"][0]["steps"]
    assert [step.pop("earlier") for step in steps] == [{"earlier": {"correct": verdicts}} for verdicts in first]
    assert done.run.pop("grader") == "stub"
    assert done.run == own_summary(second)
    assert done.kinds.count("baseline") == 5 and done.kinds.count("adapter") == 7


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"articles": []}, "holds no answers"),
        ({"articles": [{"completions": [{"questions": [{"rep": "x"}]}]}]}, "questions\\[0\\].rep"),
        ({"server_reply": []}, "server_reply"),
        ({"mean_over_sequences": [[0.0], [1.0]]}, "holds no answers"),
    ],
)
def test_what_holds_no_answers_is_refused(value: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Again(value, Says(lambda _: True))


def test_files_are_told_apart_and_written_whole(ranking: dict[str, Any], tmp_path: Path) -> None:
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run.json"
    rows.write_text('{"question": "q", "gold": "g", "answer": "a"}\n')
    run.write_text(json.dumps({**ranking, "articles": ranking["articles"][:2]}))
    assert grade_file(rows, tmp_path / "graded.jsonl").run is None
    out = tmp_path / "again.json"
    out.write_text("before")
    with pytest.raises(ZeroDivisionError):
        grade_file(run, out, grader=Says(lambda _: bool(1 // 0)))
    assert out.read_text() == "before"
    done = grade_file(run, out, grader=Says(lambda _: True))
    assert json.loads(out.read_text()) == json.loads(json.dumps(done.run.value))


def test_what_an_outage_of_the_judge_left_is_graded_by_a_second_command_and_nothing_is_paid_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(asked: Asked) -> Answer | str:
        return "yes" if len(asked.prompt) % 2 else error(503, "down")

    shipped, out = Path(seal_nb.__path__[0]) / "data/run_example.json", tmp_path / "judged.json"
    with stand_in(half) as service:
        grader = service.judge(tmp_path / "judge", max_attempts=1)
        assert main(["grade", str(shipped), "--out", str(out), "--grader", grader]) == 0
        first, paid = json.loads(out.read_text()), {prompt for prompt in service.times if len(prompt) % 2}
        assert "UNGRADED" in capsys.readouterr().out
        service.behave = lambda asked: "no"
        assert main(["grade", str(out), "--out", str(out), "--grader", grader, "--only-ungraded"]) == 0
    done, rows = json.loads(out.read_text()), answered_rows(json.loads(shipped.read_text()))
    assert first["n_ungraded"] > 0 == done["n_ungraded"]
    assert {service.times[prompt] for prompt in paid} == {1}
    # An answer that failed was asked about again, once: refused once and answered once.
    assert {service.times[prompt] for prompt in service.times if prompt not in paid} == {2}
    assert read_run(out).summary()["disagreements"] == []
    for row, earlier in zip(answered_rows(done), rows, strict=True):
        assert row["earlier"]["earlier"]["adapter_correct"] == earlier["adapter_correct"]
        assert None not in (row["baseline_correct"], row["adapter_correct"])


def answered_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for article in run["articles"] for one in article["completions"] for row in one["questions"]]


def test_verdict_words_and_booleans_are_each_others_inverse() -> None:
    assert {verdict: IN_WORDS[boolean] for verdict, boolean in AS_BOOLEAN.items()} == {v: v for v in Verdict}


def test_agreement_of_a_worked_example() -> None:
    verdicts = [True] * 20 + [True] * 5 + [False] * 10 + [False] * 15 + [None, True]
    reference = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15 + [True, None]
    found = agreement_of(verdicts, reference)
    assert found is not None
    assert (found.n, found.n_left_out) == (50, 2)
    assert found.agreement == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)
    assert found.bias == pytest.approx((25 - 30) / 50)


@pytest.mark.parametrize(
    ("verdicts", "reference", "kappa"),
    [([False, False], [True, False], 0.0), ([True], [True], 1.0), ([None], [True], None)],
)
def test_kappa_of_one_sided_verdicts_is_defined(
    verdicts: list[bool | None], reference: list[bool | None], kappa: float | None
) -> None:
    found = agreement_of(verdicts, reference)
    assert (found and found.kappa) == kappa


def test_other_answers_go_into_each_form_of_run_and_count_when_it_is_graded_again() -> None:
    asked = Question(question="When?", answer="nineteen ninety", other_answers=("1990",))
    passage = Passage(title="A", context="c", questions=(asked, Question(question="Who?", answer="Ilse")))
    said = Answers(texts=["1990", "1990"], verdicts=[Verdict.UNGRADED] * 2)
    reply = build_reply(baseline=said, adapter=said, request_id="r", seed=1)
    settings = CPTSettings(arm="passage_only")
    request = cpt_request([passage], settings, model_id="m")
    about = {"model": "m", "dataset": "d", "timestamp": "t"}
    cpt_run = CptRun(value=build_cpt_run([passage], request, reply, settings, **about), passages=[passage])
    loops = requests_for_run([passage], SinglePassageSettings(arm="passage_only"), model_id="m")
    value = build_run([passage], loops, {loops[0].request_id: reply}, SinglePassageSettings(arm="passage_only"))
    rows = value["articles"][0]["completions"][0]["questions"]
    assert [row.get("other_answers") for row in rows] == [["1990"], None], "published files have no such field"
    edits = Edits(passages=[passage], texts=["t"], requests=[request] * 2, replies=[reply] * 2)
    rows = [verdict_row([True, False], [2], step) for step in range(2)]
    summary = summarize_sequences([continual_matrix(rows)], dataset="d", base_model="m")
    summary["sequences"] = [sequence_record(edits)]
    for run in (cpt_run, run_of(value), run_of(summary)):
        again = regrade(run, make_grader("exact")).run
        assert again is not None and again.flat_verdicts("adapter") == [True, False], run.form

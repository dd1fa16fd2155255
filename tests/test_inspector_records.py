"""What the inspector says about a run: which passages, which flips, what the texts tell about them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import SettingsError
from seal_nb.grading.base import Answered, Verdict
from seal_nb.inspector.inspection import (
    EXAMPLE,
    SHOWN,
    SORTED,
    Inspection,
    explanation,
    flip_of,
    open_run,
    says,
    sequence_rows,
)
from seal_nb.inspector.pages import compared_table
from seal_nb.results.single_passage import AnsweredQuestion, read_run, run_from_json
from seal_nb.results.summary import summarize


def answered(**values: Any) -> dict[str, Any]:
    asked = {"rep": 0, "question": "what is it", "answer": "a brass clock", "baseline_answer": "a boat",
             "adapter_answer": "a brass clock", "baseline_correct": False,
             "adapter_correct": True}  # fmt: skip
    return asked | values


def article(title: str, *completions: list[dict[str, Any]], texts: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "title": title,
        "context": f"{title} is a brass clock.",
        "completions": [
            {"text": texts[at] if texts else f"text {at}", "questions": questions}
            for at, questions in enumerate(completions)
        ],
    }


def inspect(*articles: dict[str, Any], graders: tuple[str, ...] = (), **settings: Any) -> Inspection:
    return Inspection(run_from_json({"articles": list(articles), **settings}), graders=graders)


LOST = answered(baseline_correct=True, adapter_correct=False, adapter_answer="1893")
UNGRADED = answered(adapter_correct=None)
SAME = answered(adapter_correct=False)


@pytest.fixture
def four() -> Inspection:
    return inspect(
        article("won", [answered()], [SAME]),
        article("lost", [LOST], [LOST]),
        article("unclear", [UNGRADED], [UNGRADED]),
        article("tied", [answered()], [answered()]),
    )


@pytest.mark.parametrize(
    ("show", "expected"),
    [
        ("all", ["won", "lost", "unclear", "tied"]),
        ("gains", ["won", "tied"]),
        ("losses", ["lost"]),
        ("ties", ["lost", "tied"]),
        ("ungraded", ["unclear"]),
    ],
)
def test_a_filter_shows_the_passages_it_names(four: Inspection, show: Any, expected: list[str]) -> None:
    assert [row.title for row in four.select(show)] == expected


@pytest.mark.parametrize(
    ("sort", "first"),
    [("file order", "won"), ("largest gain", "tied"), ("largest loss", "lost"), ("most ungraded", "unclear")],
)
def test_a_sort_puts_what_it_names_first(four: Inspection, sort: Any, first: str) -> None:
    assert four.select(sort=sort)[0].title == first


def test_a_passage_without_a_graded_answer_has_no_gain_and_comes_last_by_gain(four: Inspection) -> None:
    last = four.select(sort="largest gain")[-1]
    assert (last.title, last.gain, last.best, last.n_ungraded) == ("unclear", None, None, 2)


def test_searching_looks_into_title_passage_and_questions(four: Inspection) -> None:
    assert [row.title for row in four.select(search="  LOST is a brass ")] == ["lost"]
    assert len(four.select(search="what is it")) == 4 and four.select(search="nowhere") == []


@pytest.mark.parametrize(("name", "value"), [("show", "everything"), ("sort", "by luck")])
def test_an_unknown_filter_or_sort_is_refused_with_those_there_are(four: Inspection, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is '{value}'; known are (all|file order),"):
        four.select(**{name: value})  # type: ignore[arg-type]


@given(st.lists(st.lists(st.sampled_from([LOST, UNGRADED, SAME, answered()]), max_size=4), max_size=5))
def test_every_sort_keeps_every_passage_that_a_filter_shows(passages: list[list[dict[str, Any]]]) -> None:
    inspection = inspect(*(article(str(at), questions) for at, questions in enumerate(passages)))
    for show in SHOWN:
        shown = {row.index for row in inspection.select(show)}
        assert all({row.index for row in inspection.select(show, sort)} == shown for sort in SORTED)


def test_flips_come_first_and_ungraded_before_what_stayed(four: Inspection) -> None:
    rows = inspect(article("t", [SAME, UNGRADED, LOST, answered()])).answers(0, 0)
    assert [row.flip for row in rows] == ["gained", "lost", "ungraded", "stayed wrong"]


def test_graders_disagree_only_where_both_judged() -> None:
    verdicts = {"file": (True, None), "other": (True, False)}
    row = inspect(article("t", [answered()])).answers(0, 0)[0]
    object.__setattr__(row, "verdicts", verdicts)
    assert not row.graders_disagree
    object.__setattr__(row, "verdicts", {"file": (True, True), "other": (None, False)})
    assert row.graders_disagree


def test_other_graders_judge_each_different_answer_once_and_only_of_passages_looked_at() -> None:
    class Counting:
        name = "counting"
        seen: list[Answered] = []  # noqa: RUF012

        def grade(self, asked: list[Answered]) -> list[Verdict]:
            self.seen += asked
            return [Verdict.CORRECT] * len(asked)

    inspection = inspect(article("a", [answered(), answered(rep=1)]), article("b", [answered()]))
    inspection.graders = {"counting": Counting()}
    inspection.select("all", "largest gain")
    assert Counting.seen == []
    assert inspection.answers(0, 0)[0].verdicts == {"file": (False, True), "counting": (True, True)}
    inspection.answers(0, 0)
    assert [one.answer for one in Counting.seen] == ["a boat", "a brass clock"]
    assert inspection.n_disagreements(0) == 2


def test_self_edits_of_equal_accuracy_are_all_best(four: Inspection) -> None:
    assert [row.is_best for row in four.self_edits(3)] == [True, True]
    assert [row.is_best for row in four.self_edits(0)] == [True, False]
    assert [row.is_best for row in four.self_edits(2)] == [False, False]


def test_two_self_edits_are_compared_question_by_question() -> None:
    (row,) = inspect(article("t", [answered(), answered(rep=1)], [SAME, answered(rep=1)])).compare(0, 0, 1)
    assert (row.first_correct, row.second_correct, row.difference) == ((True, True), (False, True), -1)


def test_comparing_with_a_self_edit_that_was_not_asked_leaves_its_side_empty() -> None:
    (row,) = inspect(article("t", [answered()], [])).compare(0, 0, 1)
    assert (row.second_answers, row.difference) == ((), None)


def test_an_answer_without_a_verdict_is_no_difference_and_comes_last() -> None:
    unknown = answered(question="unknown?", adapter_correct=None)
    rows = inspect(article("t", [answered(), unknown], [SAME, unknown])).compare(0, 0, 1)
    by_question = {row.question: row.difference for row in rows}
    assert by_question["unknown?"] is None
    cells = compared_table(sorted(rows, key=lambda row: row.question, reverse=True), "a", "b").cells()
    assert [row[-1] for row in cells] == ["-1", "–"]


def question(**values: Any) -> AnsweredQuestion:
    given = {"repeat": 0, "question": "q", "gold": "1893", "baseline_answer": "x", "adapter_answer": "1893",
             "baseline_correct": False, "adapter_correct": True, "soft_gain": None}  # fmt: skip
    return AnsweredQuestion(**{**given, **values})


OTHER = question(question="r", gold="Ilse Corvandt")
PASSAGE = "T\nIlse Corvandt built it in 1893."


@pytest.mark.parametrize(
    ("one", "sequences", "expected"),
    [
        (question(), ["T\nIt is of 1893.", PASSAGE], "train sequence 1 of 2 says it"),
        (question(), ["T\n1893", "T\nthe 1893 one", PASSAGE], "train sequences 1, 2 of 3 say it"),
        (question(), ["T\nIt is old.", PASSAGE], "only the passage says it"),
        (question(), [PASSAGE], "the passage says it"),
        (question(), ["T\nIt is from 18935."], "no train sequence has these words"),
        (question(), [], "nothing is known of the training"),
        (question(adapter_answer="in that year"), [PASSAGE],
         "the passage says it; the answer says it in other words"),
        (question(adapter_answer="  ", adapter_correct=False), [PASSAGE],
         "the passage says it; the adapter answered nothing"),
        (question(adapter_answer="It was Ilse Corvandt.", adapter_correct=False), [PASSAGE],
         "the passage says it; it answers another question: 'Ilse Corvandt'"),
        (question(adapter_correct=None), [PASSAGE], "no verdict on the adapter answer"),
        (question(adapter_correct=None, baseline_correct=None), [],
         "no verdict on the baseline and the adapter answer"),
    ],
)  # fmt: skip
def test_explanation_says_what_the_texts_tell(one: AnsweredQuestion, sequences: list[str], expected: str) -> None:
    assert explanation(one, [one, OTHER], sequences) == expected


def test_a_gold_answer_counts_as_said_by_whole_words_only() -> None:
    assert says("The clock was built in 1893, by her.", "1893") and says("THE brass, clock!", "a brass clock")
    assert not says("18930", "1893") and not says("anything", "") and not says("", "1893")


@pytest.mark.parametrize(
    ("before", "after", "flip"),
    [
        (False, True, "gained"), (True, False, "lost"), (True, True, "stayed right"),
        (False, False, "stayed wrong"), (None, True, "ungraded"), (False, None, "ungraded"),
    ],
)  # fmt: skip
def test_flip_compares_two_verdicts_and_nothing_else(before: bool | None, after: bool | None, flip: str) -> None:
    assert flip_of(question(baseline_correct=before, adapter_correct=after)) == flip


def test_train_sequences_are_those_of_the_run_s_settings_and_the_passage_is_last() -> None:
    questions = [answered()]
    lines = inspect(article("T", questions, texts=("one\ntwo",)), split_newlines=True).sequences(0, 0)
    whole = inspect(article("T", questions, texts=("one\ntwo",)), split_newlines=False).sequences(0, 0)
    assert [row.scored for row in lines] == ["T\none", "T\ntwo", "T\nT is a brass clock."]
    assert [row.scored for row in whole] == ["T\none\ntwo", "T\nT is a brass clock."]
    assert [row.is_passage for row in lines] == [False, False, True]
    alone = inspect(article("T", questions, texts=("",))).sequences(0, 0)
    assert [row.scored for row in alone] == ["T\nT is a brass clock."]


def test_loss_begins_after_the_first_end_mask() -> None:
    (row, other) = sequence_rows(["Q: a Answer: b Answer: c", "none"], end_mask_substring="Answer:")
    assert (row.unscored, row.scored) == ("Q: a Answer:", " b Answer: c")
    assert (other.unscored, other.scored) == ("", "none")


def test_published_ranking_opens_and_its_ties_are_the_22_that_are_known(golden: Path) -> None:
    inspection = Inspection(read_run(golden / "results" / "rank_iter0.json.gz"))
    assert len(inspection.passages) == 50
    assert len(inspection.select("ties")) == 22
    rows = inspection.answers(0, 0)
    assert len(rows) == 15 and set(rows[0].verdicts) == {"file", "local", "recall"}


def test_gain_of_a_passage_is_the_published_one(golden: Path) -> None:
    run = read_run(golden / "results" / "rank_iter0.json.gz")
    for row, passage in zip(Inspection(run).passages, run.passages, strict=True):
        assert row.gain == pytest.approx(passage.stored_stats["mean_gain"], abs=5e-5)


def test_the_run_that_ships_is_whole_and_says_what_its_verdicts_say() -> None:
    run = open_run(EXAMPLE)
    said = summarize(run.path)
    assert (said["disagreements"], said["notes"]) == ([], [])
    assert run.settings["training"]["max_new_tokens"] == 32, "an edit is asked as the run was"
    assert [len(one.self_edits) for one in run.passages] == [3, 3, 3, 3]
    for passage in run.passages:
        for edit in passage.self_edits:
            kinds = {one["kind"] for one in edit.made["token_logprobs"]}
            assert kinds == {"train", "gold", "passage"} and len(edit.repeats()) == 2


def test_token_texts_of_the_run_that_ships_are_its_train_sequences() -> None:
    inspection = Inspection(open_run(EXAMPLE), graders=())
    for row in inspection.passages:
        for edit in range(row.n_self_edits):
            made = inspection.run.passages[row.index].self_edits[edit].made["token_logprobs"]
            texts = ["".join(one["tokens"]) for one in made if one["kind"] == "train"]
            assert texts == [one.scored for one in inspection.sequences(row.index, edit)]

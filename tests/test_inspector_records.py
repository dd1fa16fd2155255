"""The data of the inspector: which passages, which flips, and what the texts show about them."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_nb.errors import DataError, SettingsError
from seal_nb.grading.base import Answered, Verdict
from seal_nb.inspector.inspection import (
    DIFFERENCE,
    GAINED,
    LOST,
    SHOWN,
    SORTED,
    UNGRADED,
    Inspection,
    contains,
    flip_of,
    graders_disagree,
    observation,
    open_run,
)
from seal_nb.inspector.live import PassageInspector
from seal_nb.results.collect import read_run
from seal_nb.results.single_passage import AnsweredQuestion, SinglePassageRun


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
    return Inspection(SinglePassageRun(value={"articles": list(articles), **settings}), graders=graders)


WORSE = answered(baseline_correct=True, adapter_correct=False, adapter_answer="1893")
UNCLEAR = answered(adapter_correct=None)
SAME = answered(adapter_correct=False)


@pytest.fixture
def four() -> Inspection:
    return inspect(
        article("won", [answered()], [SAME]),
        article("lost", [WORSE], [WORSE]),
        article("unclear", [UNCLEAR], [UNCLEAR]),
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
    assert four.select(show)["passage"].tolist() == expected


@pytest.mark.parametrize(
    ("sort", "first"),
    [("file order", "won"), ("largest gain", "tied"), ("largest loss", "lost"), ("most ungraded", "unclear")],
)
def test_a_sort_puts_what_it_names_first(four: Inspection, sort: Any, first: str) -> None:
    assert four.select(sort=sort)["passage"].iloc[0] == first


def test_a_passage_without_a_graded_answer_has_no_gain_and_comes_last_by_gain(four: Inspection) -> None:
    last = four.select(sort="largest gain").iloc[-1]
    assert (last["passage"], last["ungraded"]) == ("unclear", 2)
    assert pd.isna(last["gain"]) and pd.isna(last["best"])


def test_searching_looks_into_title_passage_and_questions(four: Inspection) -> None:
    assert four.select(search="  LOST is a brass ")["passage"].tolist() == ["lost"]
    assert len(four.select(search="what is it")) == 4 and four.select(search="nowhere").empty


@pytest.mark.parametrize(("name", "value"), [("show", "everything"), ("sort", "by luck")])
def test_an_unknown_filter_or_sort_is_refused_with_those_there_are(four: Inspection, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is '{value}'; known are (all|file order),"):
        four.select(**{name: value})  # type: ignore[arg-type]


@settings(max_examples=5)
@given(st.lists(st.lists(st.sampled_from([WORSE, UNCLEAR, SAME, answered()]), max_size=4), max_size=5))
def test_every_sort_keeps_every_passage_that_a_filter_shows(passages: list[list[dict[str, Any]]]) -> None:
    inspection = inspect(*(article(str(at), questions) for at, questions in enumerate(passages)))
    for show in SHOWN:
        shown = set(inspection.select(show)["n"])
        assert all(set(inspection.select(show, sort)["n"]) == shown for sort in SORTED)


def test_flips_come_first_and_ungraded_before_what_stayed() -> None:
    rows = inspect(article("t", [SAME, UNCLEAR, WORSE, answered()])).answers(0, 0)
    assert rows["flip"].tolist() == [GAINED, LOST, UNGRADED, "stayed wrong"]


def test_graders_disagree_only_where_both_judged() -> None:
    assert not graders_disagree([(True, None), (True, False)])
    assert graders_disagree([(True, True), (None, False)])


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
    said = inspection.answers(0, 0)["verdicts"].tolist()
    assert said == ["file: wrong → right\ncounting: right → right"] * 2
    inspection.answers(0, 0)
    assert [one.answer for one in Counting.seen] == ["a boat", "a brass clock"]
    assert inspection.n_disagreements(0) == 2


def test_self_edits_of_equal_accuracy_are_all_best(four: Inspection) -> None:
    assert [four.self_edits(n)["best"].tolist() for n in (3, 0, 2)] == [[True, True], [True, False], [False, False]]
    assert four.passages["tied"].tolist() == [0, 2, 0, 2]


def test_two_self_edits_are_compared_question_by_question() -> None:
    table = inspect(article("t", [answered(), answered(rep=1)], [SAME, answered(rep=1)])).compare(0, 0, 1)
    (row,) = table.to_dict("records")
    assert row["self-edit 0"] == "a brass clock\n[right] (2 times)" and row[DIFFERENCE] == -1
    assert row["self-edit 1"] == "a brass clock\n[right]\na brass clock\n[wrong]"


def test_comparing_with_a_self_edit_that_was_not_asked_leaves_its_side_empty() -> None:
    (row,) = inspect(article("t", [answered()], [])).compare(0, 0, 1).to_dict("records")
    assert pd.isna(row["self-edit 1"]) and pd.isna(row[DIFFERENCE])


def test_an_answer_without_a_verdict_is_no_difference_and_comes_last() -> None:
    unknown = answered(question="unknown?", adapter_correct=None)
    table = inspect(article("t", [unknown, answered()], [unknown, SAME])).compare(0, 0, 1)
    assert table["question"].tolist() == ["what is it", "unknown?"]
    assert table[DIFFERENCE].iloc[0] == -1 and pd.isna(table[DIFFERENCE].iloc[1])


def question(**values: Any) -> AnsweredQuestion:
    given = {"repeat": 0, "question": "q", "gold": "1893", "baseline_answer": "x", "adapter_answer": "1893",
             "baseline_correct": False, "adapter_correct": True, "soft_gain": None}  # fmt: skip
    return AnsweredQuestion(**{**given, **values})


OTHER = question(question="r", gold="Ilse Corvandt")
PASSAGE = "T\nIlse Corvandt built it in 1893."


@pytest.mark.parametrize(
    ("one", "sequences", "expected"),
    [
        (question(), ["T\nIt is of 1893.", PASSAGE], "train sequence 1 of 2 contains the gold answer"),
        (question(), ["T\n1893"] * 4 + [PASSAGE], "train sequences 1, 2, 3 … of 5 contain the gold answer"),
        (question(), ["T\nIt is old.", PASSAGE], "only the passage contains the gold answer"),
        (question(), ["T\nIt is from 18935."], "no train sequence contains the words of the gold answer"),
        (question(adapter_answer="in that year"), [PASSAGE],
         "only the passage contains the gold answer; the adapter's answer uses other words"),
        (question(gold="in '93", other_golds=["1893"]), [PASSAGE], "only the passage contains the gold answer"),
        (question(adapter_answer="  ", adapter_correct=False), [PASSAGE],
         "only the passage contains the gold answer; the adapter's answer is empty"),
        (question(adapter_answer="It was Ilse Corvandt.", adapter_correct=False), ["T\nnothing"],
         "no train sequence contains the words of the gold answer; "
         "the adapter's answer contains that of another question: 'Ilse Corvandt'"),
        (question(adapter_correct=None), [PASSAGE], "no verdict on the adapter answer"),
        (question(adapter_correct=None, baseline_correct=None), [PASSAGE],
         "no verdict on the baseline and the adapter answer"),
    ],
)  # fmt: skip
def test_observation_says_what_the_texts_show(one: AnsweredQuestion, sequences: list[str], expected: str) -> None:
    assert observation(one, [one, OTHER], sequences) == expected


def test_a_text_contains_a_gold_answer_by_whole_words_only() -> None:
    assert contains("The clock was built in 1893, by her.", "1893") and contains("THE brass, clock!", "a brass clock")
    assert not contains("18930", "1893") and not contains("anything", "") and not contains("", "1893")


@pytest.mark.parametrize(
    ("before", "after", "flip"),
    [
        (False, True, GAINED), (True, False, LOST), (True, True, "stayed right"),
        (False, False, "stayed wrong"), (None, True, UNGRADED), (False, None, UNGRADED),
    ],
)  # fmt: skip
def test_flip_compares_two_verdicts_and_nothing_else(before: bool | None, after: bool | None, flip: str) -> None:
    assert flip_of(before, after) == flip


def test_train_sequences_are_those_of_the_run_s_settings_and_the_passage_is_last() -> None:
    questions = [answered()]
    lines = inspect(article("T", questions, texts=("one\ntwo",)), split_newlines=True).sequences(0, 0)
    whole = inspect(article("T", questions, texts=("one\ntwo",)), split_newlines=False).sequences(0, 0)
    assert lines["train sequence"].tolist() == ["T\none", "T\ntwo", "T\nT is a brass clock."]
    assert whole["train sequence"].tolist() == ["T\none\ntwo", "T\nT is a brass clock."]
    assert lines["from"].tolist() == ["the self-edit", "the self-edit", "the passage"]
    alone = inspect(article("T", questions, texts=("",))).sequences(0, 0)
    assert alone["train sequence"].tolist() == ["T\nT is a brass clock."]


def test_flip_of_an_edit_is_what_the_edit_changed_and_not_what_the_adapter_did() -> None:
    before = [answered(question="kept"), answered(question="broken"), SAME | {"question": "mended"}]
    after = [answered(question="kept"), SAME | {"question": "broken"}, answered(question="mended")]
    table = inspect(article("t", before, after)).compare_edit(0, 0, 1)
    flips = [("mended", GAINED), ("broken", LOST), ("kept", "stayed right")]
    assert list(zip(table["question"], table["flip"], strict=True)) == flips


def test_a_self_edit_with_a_lucky_second_repeat_does_not_differ_from_itself() -> None:
    table = inspect(article("t", [SAME, answered(rep=1)])).compare_edit(0, 0, 0)
    assert table["flip"].tolist() == ["stayed wrong"]


def test_text_up_to_the_first_end_mask_is_marked() -> None:
    one = article("Q", [answered()], texts=("a Answer: b Answer: c",))
    masked = inspect(one, lora_params={"end_mask_substring": "Answer:"}).sequences(0, 0)["train sequence"].tolist()
    assert masked == ["⟦Q\na Answer:⟧ b Answer: c", "Q\nQ is a brass clock."]


def test_published_ranking_opens_with_its_22_ties_and_its_gains(golden: Path) -> None:
    run = read_run(golden / "results" / "rank_iter0.json.gz")
    inspection = Inspection(run)
    shown = PassageInspector(inspection, show="ties", sort="largest loss").static_view().text
    assert "22 passages, the first 15 shown" in shown
    assert inspection.made_with().iloc[0].tolist() == ["file", "rank_iter0.json.gz"]
    assert len(inspection.answers(0, 0)) == 15
    published = [passage.stored_stats["mean_gain"] for passage in run.passages]
    assert inspection.passages["gain"].tolist() == pytest.approx(published, abs=5e-5) and len(published) == 50


def test_the_run_that_ships_is_whole_and_says_what_its_verdicts_say() -> None:
    run = open_run("shipped:example")
    said = read_run(run.path).summary()
    assert (said["disagreements"], said["notes"]) == ([], [])
    assert run.settings["training"]["max_new_tokens"] == 32, "an edit is asked as the run was"
    assert [len(one.self_edits) for one in run.passages] == [3, 3, 3, 3]
    for passage in run.passages:
        for edit in passage.self_edits:
            kinds = {one["kind"] for one in edit.made["token_logprobs"]}
            assert kinds == {"train", "gold", "passage"} and len(edit.repeats()) == 2


def test_only_a_single_passage_run_can_be_opened(golden: Path) -> None:
    with pytest.raises(DataError, match=r"cpt_base\.json: is a cpt run, which has no self-edits; give a run_\*\.json"):
        open_run(golden / "results/cpt_base.json")


def test_token_texts_of_the_run_that_ships_are_its_train_sequences() -> None:
    inspection = Inspection(open_run("shipped:example"), graders=())
    for passage in inspection.run.passages:
        for edit in passage.self_edits:
            texts = ["".join(one["tokens"]) for one in edit.made["token_logprobs"] if one["kind"] == "train"]
            assert texts == inspection.sequences(passage.index, edit.index)["train sequence"].tolist()

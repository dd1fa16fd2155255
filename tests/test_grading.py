"""Graders: verdicts on made-up answers, agreement with the published verdicts, files in and out."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError, SettingsError
from seal_nb.grading.base import Answered, Verdict
from seal_nb.grading.choose import GRADERS, make_grader
from seal_nb.grading.rules import exact_match, token_f1
from seal_nb.passages import load_passages
from seal_nb.results.regrade import grade_file

WHO = "Who built the Oskavel tide clock?"
CAMS = "How many cams has the Oskavel tide clock?"
YEAR = "In what year was the Oskavel tide clock built?"

# question, gold, answer, verdict of the local grader
LOCAL = [
    (WHO, "Ilse Corvandt", "Ilse Corvandt", "CORRECT"),
    (WHO, "Ilse Corvandt", "ilse corvandt.", "CORRECT"),
    (WHO, "Ilse Corvandt", "It was built in 1893 by Ilse Corvandt, after a barge ran aground.", "CORRECT"),
    (WHO, "Ilse Corvandt", "Corvandt", "CORRECT"),
    (WHO, "Ilse Corvandt", "It was not Ilse Corvandt or Jan Merel who built it, but Pell Oduya.", "INCORRECT"),
    (WHO, "Ilse Corvandt", "Pell Oduya built the Oskavel tide clock.", "INCORRECT"),
    (WHO, "Ilse Corvandt", "The Oskavel tide clock is a clock.", "INCORRECT"),
    (WHO, "Ilse Corvandt", "Not only Ilse Corvandt built it.", "CORRECT"),
    ("Who did not pay?", "Pell Oduya", "Those who did not pay: Pell Oduya", "CORRECT"),
    (WHO, "Ilse Corvandt", "It was not Ilse Corvandt.", "INCORRECT"),
    (WHO, "Ilse Corvandt", "Who is Ilse Corvandt?", "INCORRECT"),
    (WHO, "Ilse Corvandt", "", "INCORRECT"),
    (WHO, "Ilse Corvandt", " \n\t ", "INCORRECT"),
    (WHO, "Jürgen Blåvær", "Jurgen Blavær", "CORRECT"),
    (YEAR, "1893", "1893", "CORRECT"),
    (YEAR, "1893", "It was built in 1893.", "CORRECT"),
    (YEAR, "1893", "It was built in 1983.", "INCORRECT"),
    (YEAR, "1893", "18931", "INCORRECT"),
    (CAMS, "eleven", "It has 11 cams.", "CORRECT"),
    (CAMS, "eleven", "It has 22 cams.", "INCORRECT"),
    (CAMS, "11", "Eleven", "CORRECT"),
    ("How many people live there?", "10,000", "About 10000 people live there.", "CORRECT"),
    ("What are the cams made from?", "whalebone", "The cams are of whale bone.", "CORRECT"),
    ("What is its symbol?", "§", "§", "CORRECT"),
    ("What is its symbol?", "§", "a star", "INCORRECT"),
    ("What is its symbol?", "", "a star", "UNGRADED"),
    ("What is its symbol?", "", "", "INCORRECT"),
]


@pytest.mark.parametrize(("question", "gold", "answer", "verdict"), LOCAL)
def test_local_grader(question: str, gold: str, answer: str, verdict: str) -> None:
    assert verdict_of("local", question, gold, answer) == verdict


EXACT = [
    # gold, answer, exact, F1
    ("The Eiffel Tower", "eiffel tower!", True, 1.0),
    ("Eiffel Tower", "the tower", False, 2 / 3),
    ("Eiffel Tower", "It is the Eiffel Tower", False, 2 / 3),
    ("four four two", "four", False, 0.5),
    ("1893", "1893\nbecause of the barge", True, 1.0),
    ("1893", "1894", False, 0.0),
    ("a", "the", False, 0.0),
    ("a", "x", False, 0.0),
    ("A", "a.", True, 1.0),
    ("A", "!!!", False, 0.0),
    ("!!!", "!!!", True, 1.0),
    ("The Who", "the", False, 0.0),
]


@pytest.mark.parametrize(("gold", "answer", "exact", "f1"), EXACT)
def test_measures_of_squad(gold: str, answer: str, exact: bool, f1: float) -> None:
    assert exact_match(gold, answer) is exact
    assert token_f1(gold, answer) == pytest.approx(f1)


def pairs(file: str = "grading_pairs.jsonl") -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(__file__).with_name(file).read_text("utf-8").splitlines()]


CONTRADICTIONS = {"single letter", "signs only", "articles", "symbol of a name", "unit", "currency", "fraction"}


def wrong_verdicts(name: str, chosen: list[dict[str, str]]) -> list[dict[str, str]]:
    asked = [Answered(question=one["question"], gold=one["gold"], answer=one["answer"]) for one in chosen]
    verdicts = make_grader(name).grade(asked)
    return [one for one, verdict in zip(chosen, verdicts, strict=True) if verdict != one["verdict"]]


@pytest.mark.parametrize("kind", sorted({one["class"] for one in pairs()}))
def test_local_grader_gives_the_verdict_that_a_person_would(kind: str) -> None:
    assert wrong_verdicts("local", [one for one in pairs() if one["class"] == kind]) == []


def test_of_pairs_that_were_written_to_break_it_it_gives_96_percent() -> None:
    """Before the rules were mended for them it was 1,828 of 2,016. docs/graders.md has what is left."""
    chosen = pairs("grading_pairs_more.jsonl")
    assert len(chosen) == 2016 and len(wrong_verdicts("local", chosen)) <= 79


@pytest.mark.parametrize("name", ["exact", "f1", "recall"])
def test_plain_rules_see_another_sign_unit_currency_or_symbol(name: str) -> None:
    wrong = [one for one in pairs() if one["verdict"] == "INCORRECT" and one["class"] in CONTRADICTIONS]
    unseen = ("50 km", "5 ft 2 in", "5 million", "2 hours")  # other digits or a part: F1 and recall count words
    assert wrong_verdicts(name, [one for one in wrong if one["answer"] not in unseen]) == []


def test_recall_reads_scripts_without_spaces() -> None:
    assert wrong_verdicts("recall", [one for one in pairs() if one["class"] == "without spaces"]) == []


def verdict_of(grader: str, question: str, gold: str, answer: str) -> str:
    (verdict,) = make_grader(grader).grade([Answered(question=question, gold=gold, answer=answer)])
    return verdict.value


@pytest.mark.parametrize("name", GRADERS)
@pytest.mark.parametrize("answer", ["", " ", "\n\n"])
def test_empty_answer_is_incorrect_whatever_the_gold(name: str, answer: str) -> None:
    for gold in ("42", "", "§"):
        assert verdict_of(name, "q?", gold, answer) == "INCORRECT"


@pytest.mark.parametrize("name", GRADERS)
def test_name_of_a_grader_is_how_it_is_asked_for(name: str) -> None:
    assert make_grader(name).name == name


def test_unknown_grader_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="'oracle'; known are local, exact, f1"):
        make_grader("oracle")


# Words that meet each other often, and anything at all.
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(["1893", "the", "Ilse", "not", "or", "11", "eleven", "?", "\n", "é", "x-y", "13/14/2020",
                              "1/0", "-5", "$"])).map(" ".join),
)  # fmt: skip
ANSWERS = st.builds(Answered, question=TEXTS, gold=TEXTS, answer=TEXTS, title=st.text(max_size=10))


@pytest.mark.parametrize("name", GRADERS)
@given(batch=st.lists(ANSWERS, max_size=8))
def test_verdict_does_not_depend_on_the_batch(name: str, batch: list[Answered]) -> None:
    grader = make_grader(name)
    alone = [make_grader(name).grade([one])[0] for one in batch]
    assert grader.grade(batch) == alone
    assert grader.grade(batch[::-1]) == alone[::-1]


@given(gold=TEXTS.filter(str.strip), question=TEXTS)
def test_the_gold_answer_itself_is_correct(gold: str, question: str) -> None:
    assert verdict_of("local", question, gold, gold) == "CORRECT"


@pytest.mark.parametrize("name", ["local", "recall"])
def test_half_a_surrogate_pair_and_very_long_texts_are_graded(name: str) -> None:
    numbers = ("13/14/2020", "1990-13-45", "25:61", "1/0", "9" * 5_000, f"{'9' * 5_000}/3", "7 " * 20_000, "1," * 9_000)
    numbers += ("一" * 5_000, "十" * 2_000, "1.000" * 4_000, "é" + "9" * 5_000, "10^10^10", "e9" * 3_000, "1/" * 5_000)
    for text in (*numbers, "1990-05-03 " * 2_000, "\ud800 x", "x " * 20_000, "§" * 20_000, "１２ Ⅻ ½ ①", "\x00"):
        assert verdict_of(name, text, text, text) in set(Verdict)


@pytest.mark.parametrize("name", ["local", "recall"])
def test_topic_line_is_the_title(name: str) -> None:
    """A question in the published form gets the verdict of the same question with its title apart."""
    grader = make_grader(name)
    plain = Answered(title="Ilse", question=WHO, gold="Ilse Corvandt", answer="Corvandt")
    published = replace(plain, title="", question=f"Topic: Ilse\n{WHO}")
    both = replace(published, title="Ilse")
    assert len(set(grader.grade([plain, published, both]))) == 1
    # If the topic counted as asked, "Ilse" would be no novel word and "Merel" alone would miss nothing.
    assert grader.grade([replace(published, gold="Ilse", answer="Ilse Merel")]) == [Verdict.CORRECT]


def shipped_answers(template: str, *, of_another_question: bool) -> list[Answered]:
    return [
        Answered(
            title=passage.title,
            question=asked.question,
            gold=asked.answer,
            answer=template.format(said.answer, title=passage.title),
        )
        for split in ("shipped:train", "shipped:val")
        for passage in load_passages(split)
        for asked in passage.questions
        for said in passage.questions
        if (asked is not said) is of_another_question
    ]


SENTENCES = ("{}", "The answer is {}.", "In the records of {title} it was {}, as far as is known to historians.")


@pytest.mark.parametrize("template", SENTENCES)
@pytest.mark.parametrize("of_another_question", [False, True])
def test_on_the_shipped_passages_a_gold_answer_is_told_from_another_questions(
    template: str, of_another_question: bool
) -> None:
    answered = shipped_answers(template, of_another_question=of_another_question)
    expected = Verdict.INCORRECT if of_another_question else Verdict.CORRECT
    wrong = [one for one, v in zip(answered, make_grader("local").grade(answered), strict=True) if v != expected]
    assert len(answered) >= 150
    assert wrong == []


# Against the published verdicts of GPT-4.1.


@pytest.fixture(scope="session")
def published(golden: Path) -> list[dict[str, Any]]:
    with gzip.open(golden / "graded_answers.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [row for row in map(json.loads, lines) if row["verdict"] is not None]


def graded(name: str, rows: Sequence[dict[str, Any]]) -> list[bool]:
    texts = ("title", "question", "gold", "answer")
    answered = [Answered(**{text: row[text] for text in texts}) for row in rows]
    return [verdict is Verdict.CORRECT for verdict in make_grader(name).grade(answered)]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("recall", "novel_gold_recall_rule"),
        ("exact", "squad_em_first_line"),
        ("f1", "token_f1_ge_0.5_first_line"),
    ],
)  # fmt: skip
def test_plain_rules_give_the_published_counts(
    golden: Path, published: list[dict[str, Any]], name: str, key: str
) -> None:
    expected = json.loads((golden / "golden/expected.json").read_text())["grader_agreement_pack_half"][key]
    pairs = list(zip(graded(name, published), (row["verdict"] for row in published), strict=True))
    counts = {
        "tp": pairs.count((True, True)), "fp": pairs.count((True, False)),
        "fn": pairs.count((False, True)), "tn": pairs.count((False, False)),
    }  # fmt: skip
    seen = 1 if name == "recall" else 0  # "20 million" for "twenty"
    assert counts == {cell: expected[cell] for cell in counts} | {
        "fp": expected["fp"] - seen,
        "tn": expected["tn"] + seen,
    }


def test_stored_measurements_are_cross_validated_by_title() -> None:
    path = Path(__file__).resolve().parent.parent / "seal_nb/data/local_grader.json"
    measured = json.loads(path.read_text())["measured"]
    verdicts = measured["published_verdicts"]
    assert verdicts["kappa"] >= 0.775
    assert min(verdicts["kappa_by_fold"]) > 0.72
    assert all(abs(measured[run]["gain_bias"]) <= 0.021 for run in ("rank_iter0", "cpt_base"))
    assert abs(verdicts["gain_bias_as_given"]) <= 0.021


def biases(verdicts: Sequence[bool], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    kinds = {row["kind"] for row in rows}
    pairs = [(row["kind"], said - row["verdict"]) for said, row in zip(verdicts, rows, strict=True)]
    by_kind = {kind: [wrong for k, wrong in pairs if k == kind] for kind in kinds}
    return {kind: sum(wrong) / len(wrong) for kind, wrong in by_kind.items()}


def ranking_answers(golden: Path) -> list[dict[str, Any]]:
    run = json.loads(gzip.decompress((golden / "results/rank_iter0.json.gz").read_bytes()))
    asked = [
        question | {"title": article["title"]}
        for article in run["articles"]
        for completion in article["completions"]
        for question in completion["questions"]
    ]
    return [one_answer(question, side) for question in asked for side in ("baseline", "adapter")]


def cpt_answers(golden: Path) -> list[dict[str, Any]]:
    items = json.loads(gzip.decompress((golden / "eval/base_val.json.gz").read_bytes()))
    reply = json.loads((golden / "results/cpt_base.json").read_text())["server_reply"]
    asked = [question | {"title": item["title"]} for item in items for question in item["questions"]]
    for i, question in enumerate(asked):
        for side in ("baseline", "adapter"):
            question[f"{side}_answer"] = reply[f"{side}_texts"][i]
            question[f"{side}_correct"] = reply[f"{side}_correct"][i]
    return [one_answer(question, side) for question in asked for side in ("baseline", "adapter")]


def one_answer(question: dict[str, Any], side: str) -> dict[str, Any]:
    return {
        "title": question["title"],
        "question": question["question"],
        "gold": question["answer"],
        "answer": question[f"{side}_answer"],
        "verdict": question[f"{side}_correct"],
        "kind": side,
    }


@pytest.mark.parametrize("answers_of", [ranking_answers, cpt_answers])
def test_gain_of_a_whole_published_run_is_within_a_point_and_a_half(golden: Path, answers_of: Any) -> None:
    """Half of these questions are among the fitted ones; the other half never met the grader."""
    rows = answers_of(golden)
    bias = biases(graded("local", rows), rows)
    assert abs(bias["adapter"] - bias["baseline"]) <= 0.015
    assert max(map(abs, bias.values())) < 0.035


def test_every_published_empty_answer_is_wrong_there_too(golden: Path) -> None:
    empty = [row for row in cpt_answers(golden) if not row["answer"].strip()]
    assert not any(row["verdict"] for row in empty)


# Files.

ROWS: list[dict[str, Any]] = [
    {"question": WHO, "gold": "Ilse Corvandt", "answer": "Corvandt", "verdict": True, "kind": "adapter"},
    {"question": WHO, "gold": "Ilse Corvandt", "answer": "Pell", "verdict": False, "kind": "adapter"},
    {"question": WHO, "gold": "Ilse Corvandt", "answer": "Corvandt", "verdict": False, "kind": "baseline"},
    {"question": WHO, "gold": "Ilse Corvandt", "answer": "", "verdict": None, "kind": "baseline", "n": 7},
]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_rows_come_out_in_order_with_a_verdict_and_nothing_lost(tmp_path: Path, name: str) -> None:
    done = grade_file(write_rows(tmp_path / name, ROWS), tmp_path / "out.jsonl")
    out = read_rows(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in out] == ["CORRECT", "INCORRECT", "CORRECT", "INCORRECT"]
    assert [row["reference_verdict"] for row in out] == [True, False, False, None]
    assert [{**row, "verdict": row["reference_verdict"]} for row in out] == [
        {**row, "reference_verdict": row["verdict"]} for row in ROWS
    ]
    assert done.verdicts == [True, False, True, False]


def test_bias_is_given_overall_and_by_kind_and_for_the_gain(tmp_path: Path) -> None:
    done = grade_file(write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    overall, adapter, baseline = done.agreement(), done.agreement("adapter"), done.agreement("baseline")
    assert overall and adapter and baseline
    assert (overall.n, overall.n_left_out) == (3, 1)
    assert (adapter.bias, baseline.bias) == (0.0, 1.0)
    assert done.gain_bias == -1.0
    assert "100.0 points too low" in done.lines()[-1]


def test_rows_of_both_kinds_count_on_both_sides_of_the_gain(tmp_path: Path) -> None:
    rows = [ROWS[1], ROWS[2] | {"kind": "adapter+baseline"}]
    done = grade_file(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert done.gain_bias == 0.5 - 1.0


def test_without_reference_verdicts_agreement_is_unknown(tmp_path: Path) -> None:
    rows = [{"question": WHO, "gold": "Ilse", "answer": "Ilse"}]
    done = grade_file(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert done.agreement() is None
    assert done.gain_bias is None
    assert "reference_verdict" not in read_rows(tmp_path / "out.jsonl")[0]
    assert done.lines()[-1] == "no reference verdicts in the file: agreement unknown"


def test_graded_file_can_be_graded_again(tmp_path: Path) -> None:
    first = tmp_path / "out.jsonl"
    grade_file(write_rows(tmp_path / "in.jsonl", ROWS), first, grader="exact")
    again = grade_file(first, first)
    assert [row["verdict"] for row in read_rows(first)] == ["CORRECT", "INCORRECT", "CORRECT", "INCORRECT"]
    overall = again.agreement()
    assert overall is not None and overall.n == 3


GOOD = {"question": "q", "gold": "g", "answer": "a"}
BROKEN = [
    ('{"question": "q", "gold": "g"}', "line 2, field 'answer': is missing"),
    ('{"question": "q", "gold": 42, "answer": "a"}', "line 2, field 'gold': is 42, not a text"),
    ('{"question": null, "gold": "g", "answer": "a"}', "line 2, field 'question': is None"),
    (json.dumps(GOOD | {"verdict": "yes"}), "line 2, field 'verdict': is 'yes'"),
    (json.dumps(GOOD | {"verdict": 1}), "line 2, field 'verdict': is 1"),
    (json.dumps(GOOD | {"verdict": []}), "line 2, field 'verdict'"),
    (json.dumps(GOOD | {"reference_verdict": "CORRECT"}), "line 2, field 'reference_verdict'"),
    (json.dumps(GOOD | {"kind": 3}), "line 2, field 'kind'"),
    ("[1]", "line 2: is [1], not an object"),
    ('{"question": "q"', "line 2: not valid JSON"),
]


@pytest.mark.parametrize(("line", "said"), BROKEN)
def test_broken_row_is_refused_with_path_line_and_field(tmp_path: Path, line: str, said: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    with pytest.raises(DataError) as refused:
        grade_file(source, out)
    assert f"{source}, item {said}" in str(refused.value)
    assert out.read_text() == "before"


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        grade_file(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(DataError, match="cannot be read"):
        grade_file(cut, tmp_path / "out.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        grade_file(tmp_path / "latin.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_empty_file_and_line_separators_inside_texts(tmp_path: Path) -> None:
    assert grade_file(write_rows(tmp_path / "in.jsonl", []), tmp_path / "out.jsonl").verdicts == []
    rows = [GOOD | {"answer": "one\u2028two\x85three"}]
    grade_file(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert read_rows(tmp_path / "out.jsonl")[0]["answer"] == "one\u2028two\x85three"


def test_published_file_reports_kappa_and_bias(golden: Path, tmp_path: Path) -> None:
    """On the answers that the grader was fitted to; cross-validated by title its kappa is 0.778."""
    done = grade_file(golden / "graded_answers.jsonl.gz", tmp_path / "out.jsonl")
    assert len(done.verdicts) == 23_671
    overall = done.agreement()
    assert overall is not None
    assert overall.n_left_out == 12
    assert overall.kappa > 0.775
    assert abs(overall.bias) < 0.018
    found = {kind: done.agreement(kind) for kind in set(done.kinds)}
    assert {kind: round(one.bias, 2) for kind, one in found.items() if one} == {
        "adapter": -0.01, "baseline": -0.04, "adapter+baseline": -0.02,
    }  # fmt: skip
    assert done.gain_bias == pytest.approx(0.029, abs=0.005)


@pytest.mark.parametrize("name", GRADERS)
def test_the_best_of_several_golds_counts(name: str) -> None:
    one = Answered(question="When was it built?", gold="nineteen ninety", answer="1990")
    grade = make_grader(name).grade
    assert grade([replace(one, other_golds=("1990",)), replace(one, gold="1066", other_golds=("1492",))]) == [
        Verdict.CORRECT,
        Verdict.INCORRECT,
    ]
    assert grade([replace(one, gold=" ", other_golds=("1990",)), replace(one, gold="", other_golds=("",))]) == [
        Verdict.CORRECT,
        Verdict.UNGRADED,
    ]


SEVERAL = [
    # golds, right answers, wrong answers
    (("A", "7"), ["7", "A", "seven"], ["8", "B", "the"]),
    (("-5 °C", "23 °F"), ["23 °F", "minus 5 degrees Celsius"], ["5 °C", "23 °C"]),
    (("C#", "C++"), ["C++", "C sharp"], ["C", "F#"]),
    (("北京", "Beijing"), ["Beijing", "答案是北京。"], ["不是北京", "上海"]),
    (("3/4", "75%"), ["0.75", "75 percent"], ["4/3", "7.5%"]),
    (("1990-05-03", "May 1990"), ["3 May 1990", "May 1990"], ["4 June 1990", "1991"]),
    (("!!!", "Chk Chk Chk"), ["!!!", "chk chk chk"], ["???", "the"]),
]


@pytest.mark.parametrize(("golds", "right", "wrong"), SEVERAL)
def test_each_of_several_golds_is_compared_in_its_own_way(
    golds: tuple[str, str], right: list[str], wrong: list[str]
) -> None:
    for gold, other in (golds, golds[::-1]):
        asked = [Answered(question="What is it?", gold=gold, other_golds=(other,), answer=one) for one in right + wrong]
        expected = [Verdict.CORRECT] * len(right) + [Verdict.INCORRECT] * len(wrong)
        assert make_grader("local").grade(asked) == expected


def test_a_file_of_answers_may_have_several_golds(tmp_path: Path) -> None:
    row = {"question": "When?", "gold": "nineteen ninety", "other_golds": ["1990"], "answer": "1990"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    graded = grade_file(tmp_path / "answers.jsonl", tmp_path / "graded.jsonl", grader="exact")
    assert list(graded.verdicts) == [True]
    assert json.loads((tmp_path / "graded.jsonl").read_text()) == {**row, "verdict": "CORRECT"}

"""Item files come in as published; a broken one is refused with path, item and field."""

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError
from seal_nb.passages import Passage, Question, load_passages, published_order, to_item

ITEM = {"title": "T", "context": "C", "questions": [{"question": "q?", "answer": "a"}]}


def written(folder: Path, value: object) -> Path:
    path = folder / "items.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_published_items_go_out_as_they_came_in(golden: Path) -> None:
    for name in ("eval/base_val.json.gz", "train/iter0_train.json.gz", "squad_val.json.gz"):
        published = json.loads(gzip.decompress((golden / name).read_bytes()))
        assert [to_item(passage) for passage in load_passages(golden / name)] == published


def test_the_published_order_gives_the_published_evaluation_items(golden: Path) -> None:
    shuffled = published_order(load_passages(golden / "squad_val.json.gz"))
    evaluated = load_passages(golden / "eval/base_val.json.gz")
    assert len(shuffled) == 2067
    assert [(p.title, p.context, p.questions) for p in shuffled[:200]] == [
        (p.title, p.context, p.questions) for p in evaluated
    ]


@given(st.integers(0, 2**32), st.integers(0, 60))
def test_the_order_is_that_of_the_global_shuffle_and_the_input_stays(seed: int, n: int) -> None:
    passages = [Passage(title=str(i), context="c", questions=()) for i in range(n)]
    expected = list(passages)
    random.seed(seed)
    random.shuffle(expected)
    assert published_order(passages, seed) == expected
    assert [p.title for p in passages] == [str(i) for i in range(n)]


def test_squad_comes_in_one_passage_a_paragraph_with_every_different_answer_as_gold(tmp_path: Path) -> None:
    answers = [{"text": one, "answer_start": 0} for one in ("first", "second", "first")]
    paragraph = {"context": "C1", "qas": [{"question": "q?", "id": "1", "answers": answers}]}
    squad = {"version": "1.1", "data": [{"title": "Super_Bowl_50", "paragraphs": [paragraph, paragraph]}]}
    path = tmp_path / "dev-v1.1.json.gz"
    path.write_bytes(gzip.compress(json.dumps(squad).encode()))
    asked = Question(question="q?", answer="first", other_answers=("second",))
    expected = Passage(title="Super Bowl 50", context="C1", questions=(asked,))
    assert load_passages(path) == [expected, expected]


@pytest.mark.parametrize("golds", [["a"], [{"text": "a"}], {"text": ["a"]}])
def test_rows_of_a_title_form_one_passage_however_their_answers_are_written(golds: object) -> None:
    rows = [{"title": "Super_Bowl_50", "context": "C", "question": "q?", "answers": one} for one in (golds, [], None)]
    (one,) = load_passages([*rows[:2], {**rows[2], "question": None}])
    assert (one.title, len(one.questions)) == ("Super Bowl 50", 1)


def test_absent_and_null_self_edits_and_prompt_mean_none(tmp_path: Path) -> None:
    path = written(tmp_path, [ITEM, ITEM | {"completions": None, "prompt": None}])
    assert load_passages(path)[0] == load_passages(path)[1]


@pytest.mark.parametrize(
    ("value", "item", "field", "problem"),
    [
        ({"title": "T"}, None, "", "is {'title': 'T'}, not a list"),
        ({"articles": []}, None, "", "is a run file"),
        ([ITEM, "text"], 1, "", "is 'text', not an object"),
        ([ITEM, {**ITEM, "title": None}], 1, "title", "is missing"),
        ([ITEM | {"context": 3}], 0, "context", "is 3, not a text"),
        ([ITEM | {"context": "  "}], 0, "context", "is empty"),
        ([{"title": "T", "context": "C"}], 0, "questions", "is missing"),
        ([ITEM | {"questions": {"question": "q"}}], 0, "questions", "is {'question': 'q'}, not a list"),
        ([ITEM | {"questions": ["q"]}], 0, "questions[0]", "is 'q', not an object"),
        ([ITEM | {"questions": [{"question": "q"}]}], 0, "questions[0].answer", "is missing"),
        ([ITEM | {"completions": ["a", None]}], 0, "completions[1]", "is None, not a text"),
        ([ITEM | {"prompt": []}], 0, "prompt", "is [], not a text"),
        ({"data": [{"title": "T", "paragraphs": [{"context": "C"}]}]}, 0, "paragraphs[0].qas", "is missing"),
        (
            {"data": [{"title": "T", "paragraphs": [{"context": "C", "qas": [{"question": "q", "answers": [{}]}]}]}]},
            0,
            "paragraphs[0].qas[0].answers[0]",
            "is {}, not a text",
        ),
    ],
)
def test_a_broken_file_is_refused_with_path_item_and_field(
    tmp_path: Path, value: object, item: int | None, field: str, problem: str
) -> None:
    path = written(tmp_path, value)
    with pytest.raises(DataError) as refused:
        load_passages(path)
    assert (refused.value.item, refused.value.field) == (item, field)
    assert str(path) in str(refused.value) and problem in str(refused.value)


@pytest.mark.parametrize("raw", [b'[{"title": "T"', b"\xff\xfe\x00", b"\x1f\x8b\x08broken", b""])
def test_a_file_that_is_no_json_is_refused_with_its_path(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "items.json"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"items\.json"):
        load_passages(path)


def test_a_missing_file_and_an_unknown_shipped_split_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_passages(tmp_path / "absent.json")
    with pytest.raises(DataError, match="shipped are train, val"):
        load_passages("shipped:test")


ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))
WORDS = ANY.filter(str.strip)


def asked(question: str, golds: list[str]) -> Question:
    return Question(question=question, answer=golds[0], other_answers=tuple(golds[1:]))


@given(
    st.builds(
        Passage,
        title=WORDS,
        context=WORDS,
        questions=st.lists(st.builds(asked, WORDS, st.lists(WORDS, unique=True, min_size=1, max_size=3))).map(tuple),
        completions=st.lists(ANY).map(tuple),
        prompt=ANY,
        hand_written=ANY,
    )
)
def test_any_passage_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, passage: Passage) -> None:
    path = written(tmp_path_factory.mktemp("items"), [to_item(passage)])
    assert load_passages(path) == [passage]

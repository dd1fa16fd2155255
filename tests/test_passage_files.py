"""One's own passages as CSV, JSONL and Markdown, and what a mistake in one is answered with."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError
from seal_nb.passages import Passage, Question, load_passages, to_item

ORLE = Passage(
    title="Orle",
    context="Orle lies on a hill.\nIt has two mills.",
    questions=(
        Question(question="Where does Orle lie?", answer="on a hill"),
        Question(question="How many mills has Orle?", answer="two"),
    ),
)
ZOR = Passage(title="Zor", context="Zor is a moon.", questions=(Question(question="What is Zor?", answer="a moon"),))


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def as_csv(passages: list[Passage], delimiter: str = ",") -> str:
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerow(["title", "context", "question", "answer"])
    for one in passages:
        rows.writerows([one.title, one.context, q.question, q.answer] for q in one.questions)
    return out.getvalue()


MARKDOWN = """# Orle

Orle lies on
a hill.

It has two mills.

- Q: Where does Orle lie?
- A: on a hill
Q: How many mills has Orle?
A: two

# Zor
Zor is a moon.
Q: What is Zor?
A: a moon
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.csv", as_csv([ORLE, ZOR])),
        ("own.tsv", as_csv([ORLE, ZOR], delimiter="\t")),
        ("own.jsonl", "\n".join(json.dumps(to_item(one)) for one in (ORLE, ZOR)) + "\n\n"),
        ("own.md", MARKDOWN),
        ("OWN.CSV", "\ufeff" + as_csv([ORLE, ZOR]).replace("title,context", "Title, Context ")),
    ],
)
def test_each_form_gives_the_same_passages(tmp_path: Path, name: str, text: str) -> None:
    assert load_passages(written(tmp_path, name, text)) == [ORLE, ZOR]


def test_implications_by_hand_may_stand_in_markdown(tmp_path: Path) -> None:
    text = "# Zor\nZor is a moon.\nI: Zor is no planet.\nI: Zor moves.\nQ: What?\nA: a moon\n"
    (one,) = load_passages(written(tmp_path, "own.markdown", text))
    assert one.hand_written == "Zor is no planet.\nZor moves."


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), min_size=1).filter(
    lambda text: text.strip() == text and text != ""
)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT), min_size=1, max_size=6))
def test_any_text_survives_csv_and_jsonl(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("own")
    grouped: dict[tuple[str, str], list[Question]] = {}
    for title, context, question, answer in rows:
        grouped.setdefault((title, context), []).append(Question(question=question, answer=answer))
    passages = [Passage(title=t, context=c, questions=tuple(q)) for (t, c), q in grouped.items()]
    assert load_passages(written(folder, "a.csv", as_csv(passages))) == passages
    lines = "".join(json.dumps(to_item(one), ensure_ascii=False) + "\n" for one in passages)
    assert load_passages(written(folder, "a.jsonl", lines)) == passages


def test_a_long_passage_and_a_long_header_are_read(tmp_path: Path) -> None:
    long = Passage(title="T", context="word " * 50_000 + "end", questions=(Question(question="q", answer="a"),))
    assert load_passages(written(tmp_path, "a.csv", as_csv([long]))) == [long], "csv's own limit is 128 KB"
    rows = "".join(f"T,C,q{n},a\n" for n in range(20_000))  # each row filled up to the header: 4 * 10**8 cells
    text = "title,context,question,answer" + ",x" * 20_000 + "\n" + rows
    assert len(load_passages(written(tmp_path, "b.csv", text))[0].questions) == 20_000


HEAD = "title,context,question,answer\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "line 1, field 'title': has no column 'title' but no header"),
        ("a.csv", "title,context,question\n", "field 'answer': has no column 'answer' but title"),
        ("a.csv", HEAD, "holds no passage"),
        ("a.csv", HEAD + 'a,"b\nc",d,e\nT,C,,A\n', "line 4, field 'question': is empty; fill it in"),
        ("a.csv", HEAD + "T,C,Q\n", "line 2, field 'answer': is empty"),
        ("a.csv", HEAD + 'T,"C,Q,A\n', "is not CSV"),
        ("a.jsonl", '{"title": "T"}\n{oops\n', "line 2: not valid JSON"),
        ("a.jsonl", '\n{"title": "T", "questions": []}\n', "line 2, field 'context': is missing"),
        ("a.jsonl", "[1]\n", r"line 1: is \[1\], not an object"),
        ("a.md", "text\n# T\n", "line 1, field 'title': is before the first title"),
        ("a.md", "# T\nC\nQ: one?\nQ: two?\n", "line 4, field 'answer': is missing before this line"),
        ("a.md", "# T\nC\nA: one\n", "line 3, field 'question': is missing before this line"),
        ("a.md", "# T\nC\nQ: one?\n", "line 1, field 'questions.0..answer': is missing"),
        ("a.md", "# T\nQ: one?\nA: a\n", "line 1, field 'context': is empty"),
    ],
)
def test_a_mistake_is_named_by_path_line_and_field(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(DataError, match=said) as refused:
        load_passages(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_or_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_passages(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(HEAD.encode() + b"caf\xe9,b,c,d\n")
    with pytest.raises(DataError, match="save it as UTF-8"):
        load_passages(tmp_path / "latin.csv")


def test_a_line_separator_inside_a_quoted_cell_is_text(tmp_path: Path) -> None:
    """U+2028 and a lone form feed end no row of a CSV file; a line break in quotes stays as it is."""
    passages = [Passage(title="T", context="a\u2028b\x0cc\r\nd", questions=(Question(question="q", answer="a"),))]
    assert load_passages(written(tmp_path, "a.csv", as_csv(passages))) == passages

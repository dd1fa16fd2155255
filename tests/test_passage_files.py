"""One's own passages as CSV, JSONL and Markdown, and what a mistake in one is answered with."""

import csv
import gzip
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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


def as_rows(passages: list[Passage]) -> list[dict]:
    """As `datasets` writes SQuAD: one row a question."""
    return [
        {"id": "1", "title": one.title, "context": one.context, "question": q.question}
        | {"answers": {"text": [q.answer, *q.other_answers], "answer_start": [0] * (1 + len(q.other_answers))}}
        for one in passages
        for q in one.questions
    ]


def as_squad(passages: list[Passage]) -> dict:
    """SQuAD v2, with a question more that has no answer."""
    articles = []
    for one in passages:
        qas: list[dict] = [{"question": "Where on Mars?", "answers": [], "is_impossible": True}]
        for q in one.questions:
            golds = [{"text": gold, "answer_start": 0} for gold in (q.answer, *q.other_answers)]
            qas.append({"question": q.question, "answers": golds, "is_impossible": False})
        articles.append({"title": one.title, "paragraphs": [{"context": one.context, "qas": qas}]})
    return {"version": "v2.0", "data": articles}


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
        ("rows.json", "\n".join(map(json.dumps, as_rows([ORLE, ZOR])))),
        ("rows.jsonl", json.dumps(as_rows([ORLE, ZOR]), indent=2)),
        ("data.json", json.dumps({"version": "1", "data": as_rows([ORLE, ZOR])})),
        ("columns.json", pd.DataFrame(as_rows([ORLE, ZOR])).to_json()),
        ("squad.json", json.dumps(as_squad([ORLE, ZOR]))),
        ("semicolons.csv", "sep=;\r\n" + as_csv([ORLE, ZOR], ";")),
        ("unnamed.txt", as_csv([ORLE, ZOR], "|")),
        ("two.csv", as_csv([ORLE]) + "\ufeff" + as_csv([ZOR]) + ",,,\n\n"),
        ("order.csv", as_csv([ORLE]) + "answer,question,context,title\na moon,What is Zor?,Zor is a moon.,Zor\n"),
        (
            "index.csv",
            pd.DataFrame(as_rows([ORLE, ZOR]))
            .assign(answer=lambda t: t.answers.map(str))
            .to_csv()
            .replace("{'text': ['", "")
            .replace("'], 'answer_start': [0]}", ""),
        ),
        ("two.jsonl", "".join(f"\ufeff{json.dumps(to_item(one))}\r\n" for one in (ORLE, ZOR))),
        (
            "two.md",
            "---\nauthor: me\n---\n"
            + MARKDOWN.replace("- Q:", "* **Q:**")
            .replace("- A:", "1. **A**:")
            .replace("\nQ:", "\n## Questions\nQuestion 2:")
            .replace(" two\n", "\n  two\n"),
        ),
    ],
)
def test_each_form_gives_the_same_passages(tmp_path: Path, name: str, text: str) -> None:
    assert load_passages(written(tmp_path, name, text)) == [ORLE, ZOR]


def test_implications_by_hand_may_stand_in_markdown(tmp_path: Path) -> None:
    text = "# Zor\nZor is a moon.\nI: Zor is no planet.\nI: Zor moves.\nQ: What?\nA: a moon\n"
    (one,) = load_passages(written(tmp_path, "own.markdown", text))
    assert one.hand_written == "Zor is no planet.\nZor moves."


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp"), exclude_characters="\ufeff"), min_size=1
).filter(lambda text: text.strip() == text and text != "")


@given(
    st.lists(st.tuples(TEXT, TEXT, TEXT, st.lists(TEXT, min_size=1, max_size=3, unique=True)), min_size=1, max_size=6)
)
def test_any_text_survives_every_form(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("own")
    grouped: dict[tuple[str, str], list[Question]] = {}
    for title, context, question, (answer, *others) in rows:
        title, context = (unicodedata.normalize("NFC", text.replace("_", "-")) for text in (title, context))
        grouped.setdefault((title, context), []).append(
            Question(question=question, answer=answer, other_answers=tuple(others))
        )
    passages = [Passage(title=t, context=c, questions=tuple(q)) for (t, c), q in grouped.items()]
    one_gold = [replace(p, questions=tuple(replace(q, other_answers=()) for q in p.questions)) for p in passages]
    for sign in ",;\t|":
        for encoding in ("utf-8-sig", "utf-16"):
            (folder / "a.csv").write_bytes(as_csv(one_gold, sign).encode(encoding))
            assert load_passages(folder / "a.csv") == one_gold, (sign, encoding)
    lines = "".join(json.dumps(to_item(one), ensure_ascii=False) + "\n" for one in passages)
    assert load_passages(written(folder, "a.jsonl", lines)) == passages
    (folder / "b.json").write_bytes(gzip.compress(json.dumps(as_squad(passages)).encode()))
    assert load_passages(folder / "b.json") == passages
    table = pd.DataFrame(as_rows(passages))
    table.to_parquet(folder / "c")
    for source in (as_rows(passages), table, folder / "c", pd.read_parquet(folder / "c"), passages):
        assert load_passages(source) == passages


def test_a_hub_dataset_is_read_row_by_row_and_several_splits_are_refused() -> None:
    class Dataset:  # what is used of `datasets.Dataset`
        column_names = ("title", "context", "question", "answers")

        def __iter__(self) -> Iterator[dict]:
            return iter(as_rows([ORLE, ZOR]))

    assert load_passages(Dataset()) == [ORLE, ZOR]
    with pytest.raises(DataError, match=r"has the splits train, test; give one of them: dataset\['train'\]"):
        load_passages({"train": Dataset(), "test": Dataset()})


def test_the_summary_says_what_was_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_passages("shipped:val").summary == "passages_val.json: 12 passages, 60 questions"
    assert not caplog.records, "nothing to warn of"
    squad = as_squad([replace(ZOR, questions=()), replace(ORLE, questions=(Question(question="q", answer="a"),) * 2)])
    loaded = load_passages(written(tmp_path, "v2.json", json.dumps(squad)))
    said = "v2.json: 2 passages, 2 questions; 1 passage without questions: trained on, in no mean or ranking; "
    assert loaded.summary == said + "left out: 2 questions without an answer"
    assert [one.message for one in caplog.records] == [loaded.summary]


@pytest.mark.parametrize(
    "source",
    [
        {name: [row[name] for row in as_rows([ORLE, ZOR])] for name in as_rows([ORLE])[0]},
        {"train": as_rows([ORLE, ZOR])},
        {"Data": [to_item(ORLE), to_item(ZOR)], "Version": 1.0},
        [to_item(one) | {"questions": {"question": [q.question for q in one.questions],
                                       "answer": [q.answer for q in one.questions]}} for one in (ORLE, ZOR)],
        pa.Table.from_pylist(as_rows([ORLE, ZOR])),
        [row | {"context": row["context"].encode()} for row in as_rows([ORLE, ZOR])],
    ],
)  # fmt: skip
def test_columns_and_one_split_are_read_as_rows(source: object) -> None:
    assert load_passages(source) == [ORLE, ZOR]


def test_a_table_of_markdown_is_one_of_rows_and_blanks_after_separators_are_no_text(tmp_path: Path) -> None:
    for text in (
        "|title|context|question|answer|\n|---|:-:|---|--:|\n| Zor | Zor is a moon. | What is Zor? | a moon |\n",
        'title, context, question, answer\n"Zor", "Zor is a moon.", "What is Zor?", "a moon"\n',
    ):
        assert load_passages(written(tmp_path, "a.csv", text)) == [ZOR]


def test_a_gold_is_no_fraction_because_pandas_had_a_gap_to_fill(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {"title": ["T", "U"], "context": ["C", "D"], "question": ["When?", None], "answer": [1990, None]}
    )
    rows.to_parquet(tmp_path / "a")
    for source in (rows, tmp_path / "a"):
        asked, unasked = load_passages(source)
        assert (asked.questions[0].answer, unasked.questions) == ("1990", ())


@pytest.mark.parametrize(
    ("answer", "golds"),
    [
        (["1990", "nineteen ninety", "1990"], ("1990", "nineteen ninety")),
        (1990, ("1990",)),
        ("3.50", ("3.50",)),
        ([-2, 1.25], ("-2", "1.25")),
        ([1990.0, 0.0000001], ("1990", "0.0000001")),
    ],
)
def test_several_golds_and_numbers_are_kept_as_written(tmp_path: Path, answer: object, golds: tuple[str, ...]) -> None:
    text = json.dumps([{"title": "T", "context": "C", "questions": [{"question": "q", "answer": answer}]}])
    for as_text in (text, text.replace('"3.50"', "3.50")):
        ((question,),) = [one.questions for one in load_passages(written(tmp_path, "a.json", as_text))]
        assert (question.answer, *question.other_answers) == golds


@pytest.mark.parametrize(
    "text",
    [
        "Orle\n====\nC\n\nQuestions\n---------\n- [ ] Q: q\n- [x] A: a\n",
        "# Orle #\nC\n\n### Question 1: q\n\n### Answer 1: a\n",
        "+++\nq = 1\n+++\n# Orle\n<!-- Q: no\nA: no -->\nC\n\n***\n\n> **question:** q\n> **answer:** a\n",
        "# Orle\nC\n\nQ1. q\nA1. a\n---\n",
        "# Orle\nC\n---\nQ: q\nA: a\n",
    ],
)
def test_headings_comments_and_rules_of_markdown_are_no_text(tmp_path: Path, text: str) -> None:
    assert load_passages(written(tmp_path, "a.md", text)) == [
        Passage(title="Orle", context="C", questions=(Question(question="q", answer="a"),))
    ]


def test_code_in_markdown_holds_neither_titles_nor_questions(tmp_path: Path) -> None:
    (one,) = load_passages(written(tmp_path, "a.md", "# T\nC\n\n    # no title\n\n~~~\n<!-- Q: no -->\nQ: no\n~~~\n"))
    assert (one.context, one.questions) == ("C\n# no title\n~~~ <!-- Q: no --> Q: no ~~~", ())


def test_a_markdown_section_is_text_only_without_questions(tmp_path: Path) -> None:
    text = "# T\nC\n\n## One\nkept\n```\n# no title\nQ: no question\n```\n## Two\nmore\nQ: a\nA: b\n"
    text = text.replace("\n", "\r\n")
    (one,) = loaded = load_passages(written(tmp_path, "a.md", text))
    assert one.context == "C\n## One kept ``` # no title Q: no question ```"
    assert one.questions == (Question(question="a", answer="b"),)
    assert "left out: 1 section of Markdown with questions in it" in loaded.summary


def test_a_long_passage_and_a_long_header_are_read(tmp_path: Path) -> None:
    long = Passage(title="T", context="word " * 50_000 + "end", questions=(Question(question="q", answer="a"),))
    assert load_passages(written(tmp_path, "a.csv", as_csv([long]))) == [long], "csv's own limit is 128 KB"
    rows = "".join(f"T,C,q{n},a\n" for n in range(20_000))  # each row filled up to the header: 4 * 10**8 cells
    text = "title,context,question,answer" + ",x" * 20_000 + "\n" + rows
    assert len(load_passages(written(tmp_path, "b.csv", text))[0].questions) == 20_000


HEAD = "title,context,question,answer\n"
ROW = '{"title": "T", "context": "C", "question": "Q", '
ITEM = '{"title": "T", "context": "C", "questions": []'
REFUSED = [  # what, a file, its content: the rows of docs/refusals.md
    ("no file", "missing.csv", None),
    ("an empty file", "empty.json", " "),
    ("another kind of file", "book.xlsx", b"PK\3\4"),
    ("a text without a title", "notes.txt", "Orle lies."),
    ("not UTF-8", "latin.csv", HEAD.encode() + b"caf\xe9,b,c,d\n"),
    ("a gzip file that holds too much", "rows.csv.gz", gzip.compress(b" " * 2**25)),
    ("a gzip file that was cut", "cut.csv.gz", gzip.compress(HEAD.encode())[:-9]),
    ("a broken Parquet file", "cut.parquet", b"PAR1" * 9),
    ("unknown shipped passages", "shipped:test", None),
    ("a CSV row with other cells", "extra.csv", HEAD + "Orle,Orle lies, on a hill.,Where?,hill\n"),
    ("a CSV header without a column", "other.csv", "title,text,question,answer\n"),
    ("a column twice", "twice.csv", "title,context,question,answer,answer\n"),
    ("a quote that is not closed", "quotes.csv", HEAD + 'T,"C,Q,A\n'),
    ("several golds in a cell, not as JSON", "golds.csv", HEAD.replace("er\n", "ers\n") + "T,C,Q,\"['a']\"\n"),
    ("no passage", "none.csv", HEAD),
    ("broken JSON", "broken.json", "[{"),
    ("a broken line of JSON Lines", "broken.jsonl", ITEM + "}\n{oops\n"),
    ("a run file", "run.json", '{"articles": []}'),
    ("several splits", "splits.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}'),
    ("JSON that is no list", "number.json", "5"),
    ("an item that is no object", "lists.json", '[["T", "C"]]'),
    ("another layout", "coqa.json", '[{"id": "1", "story": "x", "questions": []}]'),
    ("a context in parts", "hotpot.json", '[{"question": "Q?", "context": [["Orle", ["It lies."]]]}]'),
    ("a question without an answer", "unanswered.json", f"[{ROW}" + '"answer": null}]'),
    ("an empty text", "blank.json", f"[{ROW}" + '"answers": ["a", " "]}]'),
    ("another value than a text", "true.json", f"[{ROW}" + '"answer": true}]'),
    ("a NUL character", "nul.csv", HEAD + "T,C\0,Q,A\n"),
    ("half a surrogate pair", "half.json", f"[{ITEM}, " + '"prompt": "\\ud83d"}]'),
    ("prompts that are no match for the self-edits", "prompts.json", f"[{ITEM}, " + '"prompts": ["p"]}]'),
    ("Markdown before the first title", "early.md", "text\n# T\n"),
    ("a passage without a text of its own", "only.md", "# T\n## Text\nOrle lies.\nQ: Where?\nA: hill\n"),
    ("a question or an answer that is missing", "turn.md", "# T\nC\nQ: one?\nQ: two?\n"),
    ("a line right below an answer", "below.md", "# T\nC\nQ: one?\nA: a\nand more\n"),
    ("a code block that does not end", "code.md", "# T\nC\n```\ncode\n"),
    ("a comment that does not end", "comment.md", "# T\nC\n\n<!-- later\n"),
]


def refusal(source: str | Path) -> DataError:
    with pytest.raises(DataError) as refused:
        load_passages(source)
    return refused.value


def test_the_docs_have_each_refusal_with_its_message_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "refusals.md").read_text()
    monkeypatch.chdir(tmp_path)
    rows = []
    for what, name, content in REFUSED:
        if content is not None:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        error = refusal(name)
        assert str(error).endswith(f"; {error.remedy}") and (name in str(error) or content is None)
        fence = "``" if "`" in str(error) else "`"
        message, remedy = (
            f"{fence}{one}{fence}" for one in (str(error).removesuffix(f"; {error.remedy}"), error.remedy)
        )
        rows.append(f"| {what} | {message} | {remedy} |")
    table = page.split("| what | message | what to do |\n|---|---|---|\n")[1].split("\n\n")[0]
    for line, row in zip(table.splitlines(), rows, strict=True):
        assert re.fullmatch(re.escape(line).replace("…", ".*"), row), row


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", HEAD + 'a,"b\nc",d,e\nT,C,,A\n', "line 4, field 'question': is empty"),
        ("a.csv", HEAD + "T,C,Q\n", "line 2: has 3 cells, and the header 4"),
        ("a.csv", HEAD + 'T,C,Q,A\nT,"C,Q,A\n\n', "line 3: is not CSV"),
        ("a.csv", "sep=;\n" + HEAD, "line 2, field 'title': has no column 'title' but title,context"),
        ("a.jsonl", json.dumps(to_item(ZOR) | {"hand_written": "\0"}), "field 'hand_written': is '.x00', which has"),
        ("a.json", '[{"title":"\\ud83d","context":"x","questions":[]}]', "'title': is '.ud83d', which has half"),
        ("a.json", f"[{ROW}" + '"answer":NaN}]', "field 'answer': is missing"),
        ("a.json", f"[{ROW}" + '"answers":{"text":["a",""]}}]', "field 'answers.1.': is empty"),
        ("a.json", '{"title":["T","U"],"context":["C"]}', "not a list of items"),
        ("a.jsonl", '\n{"title": "T", "questions": []}\n', "line 2, field 'context': is missing"),
        ("a.md", "# T\nC\nA: one\n", "line 3, field 'question': is missing before this line"),
        ("a.md", "# T\nC\nQ: one?\n", "line 1, field 'questions.0..answer': is missing"),
        ("a.md", "# T\nQ: one?\nA: a\n", "line 1, field 'context': is empty"),
    ],
)
def test_a_mistake_is_named_by_path_line_and_field(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = written(tmp_path, name, text)
    assert re.search(said, str(refusal(path))) and str(path) in str(refusal(path))


@pytest.mark.parametrize(
    ("field", "layout"),
    [
        ("story", "CoQA"),
        ("document_text", "Natural Questions"),
        ("SearchResults", "TriviaQA"),
        ("entity_pages", "TriviaQA"),
        ("passage", "BoolQ or DROP"),
        ("messages", "a chat"),
    ],
)
def test_a_known_layout_is_named_also_in_parquet(tmp_path: Path, field: str, layout: str) -> None:
    rows = [{"question": "Q?", field: "x"}]
    pd.DataFrame(rows).to_parquet(tmp_path / "a")
    for source in (rows, tmp_path / "a"):
        assert f"; this looks like {layout}" in str(refusal(source))


def test_a_table_that_pandas_read_from_csv_is_what_its_file_is(tmp_path: Path) -> None:
    """Its cells are texts, also those with several golds and with none."""
    text = "title,context,question,answers,other_answers\n" + "".join(
        f"T,C,q{n},{cell},{other}\n"
        for n, (cell, other) in enumerate(
            [('"[""a"", 1.50]"', ""), ('"{""text"": [], ""x"": []}"', ""), ("a", '"[""b""]"')]
        )
    )
    path = written(tmp_path, "a.csv", text)
    table = pd.read_csv(path, keep_default_na=False)
    for source in (path, table, table.replace("", None)):
        (one,) = loaded = load_passages(source)
        assert [(q.question, q.answer, q.other_answers) for q in one.questions] == [
            ("q0", "a", ("1.50",)),
            ("q2", "a", ("b",)),
        ]
        assert "left out: 1 question without an answer" in loaded.summary


def test_tables_in_memory_with_a_column_twice_are_refused(tmp_path: Path) -> None:
    names = ["title", "context", "question", "answer", "answer"]
    table = pa.Table.from_arrays([pa.array(["x"])] * 5, names=names)
    pq.write_table(table, tmp_path / "a")
    for source in (table, tmp_path / "a", pd.DataFrame([["x"] * 5], columns=names)):
        assert "field 'answer': is the name of 2 columns" in str(refusal(source))


def test_a_row_that_shifts_below_empty_columns_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "title;context;question;answer;;\nT;a hill; near the sea;Where?;a hill;;\n")
    assert "item line 2: has 7 cells, and the header 4" in str(refusal(path))
    path = written(tmp_path, "b.csv", HEAD.strip() + ",source,page\nT,a hill, near the sea,Where?,a hill,,\n")
    assert "item line 2: has 7 cells, and the header 6" in str(refusal(path))
    path = written(tmp_path, "c.csv", HEAD.strip() + ",,\nT,C,q,a,,\nT,C,r,b,\n")
    assert [one.answer for one in load_passages(path)[0].questions] == ["a", "b"]


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "", "is_impossible": True},
        {"answers": [{"text": "", "answer_start": -1}], "is_impossible": "TRUE"},
        {"answers": [{"text": "CANNOTANSWER"}, {"text": "CANNOTANSWER"}]},
    ],
)
def test_an_unanswerable_question_is_left_out_however_it_is_marked(row: dict[str, object]) -> None:
    asked = {"title": "T", "context": "C", "question": "q"}
    (passage,) = load_passages([asked | {"answer": "a"}, asked | row])
    assert [one.answer for one in passage.questions] == ["a"]


def test_a_cell_with_a_list_holds_several_golds_whatever_its_column_is_called(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'title,context,question,answer\nT,C,q,"[""on a hill"", ""hill""]"\n')
    ((question,),) = [one.questions for one in load_passages(path)]
    assert (question.answer, question.other_answers) == ("on a hill", ("hill",))


def test_a_line_separator_inside_a_quoted_cell_is_text(tmp_path: Path) -> None:
    """U+2028 and a lone form feed end no row of a CSV file; a line break in quotes stays as it is."""
    passages = [Passage(title="T", context="a\u2028b\x0cc\r\nd", questions=(Question(question="q", answer="a"),))]
    assert load_passages(written(tmp_path, "a.csv", as_csv(passages))) == passages

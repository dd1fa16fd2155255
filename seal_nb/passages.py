"""Passages with their questions: the files they are read from, and the item files that are written.

A broken file is refused with its path, the item and the field. Nothing is repaired, and no text is changed.
"""

import csv
import io
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, TypeAdapter
from pydantic_core import PydanticCustomError

from seal_nb.errors import DataError, SettingsError, checked
from seal_nb.storage import (
    MOST_BYTES,
    data_file,
    read_json,
    read_json_lines,
    read_text,
    runs_folder,
    write_json,
    write_record,
)

CSV_COLUMNS = ("title", "context", "question", "answer")
_HEADING = re.compile(r"#\s+(?P<title>\S.*)")
_ENTRY = re.compile(r"(?:[-*]\s+)?(?P<kind>[QAI]):\s*(?P<text>.*)")

Placed = tuple[int | str, Any]  # 0 or "line 3", and the item


def _by_passage(rows: Iterable[tuple[int | str, Mapping[str, str]]]) -> list[Placed]:
    """One item per title and context, in order of first appearance, from rows of one question each."""
    items: dict[tuple[str, str], Placed] = {}
    for place, row in rows:
        new: Placed = (place, {"title": row["title"], "context": row["context"], "questions": []})
        _, item = items.setdefault((row["title"], row["context"]), new)
        item["questions"].append({"question": row["question"], "answer": row["answer"]})
    return list(items.values())


def _csv_items(path: Path) -> list[Placed]:
    csv.field_size_limit(MOST_BYTES)  # csv's own limit is 128 KB, less than a long passage
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True, delimiter=delimiter)
    rows = []
    try:
        columns = table.fieldnames = [name.strip().lower() for name in table.fieldnames or []]
        if missing := [name for name in CSV_COLUMNS if name not in columns]:
            problem = f"has no column {missing[0]!r} but {', '.join(columns) or 'no header'}"
            remedy = f"give a header with {', '.join(CSV_COLUMNS)}"
            raise DataError(problem, path=path, item="line 1", field=missing[0], remedy=remedy)
        # DictReader fills up short rows: only as far as a column that is read, so that a long header costs once.
        table.fieldnames = columns[: max(at for at, name in enumerate(columns) if name in CSV_COLUMNS) + 1]
        for cells in table:
            row, place = {name: (cells[name] or "").strip() for name in CSV_COLUMNS}, f"line {table.line_num}"
            if empty := [name for name, value in row.items() if not value]:
                raise DataError("is empty", path=path, item=place, field=empty[0], remedy="fill it in")
            rows.append((place, row))
    except csv.Error as error:
        place = f"line {table.line_num}"
        raise DataError(f"is not CSV or TSV: {error}", path=path, item=place, remedy="close the quotes") from error
    return _by_passage(rows)


def _markdown_items(path: Path) -> list[Placed]:
    """Lines of a paragraph are joined by spaces, paragraphs by a line break."""
    items: list[Placed] = []
    for number, line in enumerate(map(str.strip, read_text(path).splitlines()), start=1):
        place = f"line {number}"
        if heading := _HEADING.fullmatch(line):
            items.append((place, {"title": heading["title"], "context": [], "questions": [], "hand_written": []}))
        elif items:
            _add_line(items[-1][1], line, path, place)
        elif line:
            remedy = "begin with '# title'"
            raise DataError("is before the first title", path=path, item=place, field="title", remedy=remedy)
    for _, item in items:
        paragraphs = re.split(r"\n{2,}", "\n".join(item["context"]).strip())
        item["context"] = "\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
        item["hand_written"] = "\n".join(item["hand_written"]).rstrip("\n")
    return items


def _add_line(item: dict[str, Any], line: str, path: Path, place: str) -> None:
    entry, questions = _ENTRY.fullmatch(line), item["questions"]
    is_answered = not questions or "answer" in questions[-1]
    if entry is None:
        item["context"].append(line)
    elif entry["kind"] == "I":
        item["hand_written"].append(entry["text"])
    elif entry["kind"] == "Q" and is_answered:
        questions.append({"question": entry["text"]})
    elif entry["kind"] == "A" and not is_answered:
        questions[-1]["answer"] = entry["text"]
    else:
        field, remedy = "answer" if entry["kind"] == "Q" else "question", "write Q: and A: in turn"
        raise DataError("is missing before this line", path=path, item=place, field=field, remedy=remedy)


READERS: dict[str, Callable[[Path], Iterable[Placed]]] = {
    ".csv": _csv_items, ".tsv": _csv_items, ".jsonl": read_json_lines, ".md": _markdown_items,
    ".markdown": _markdown_items,
}  # fmt: skip
SHIPPED_SPLITS = ("train", "val")


def _not_empty(value: Any) -> Any:
    if not (value.strip() if isinstance(value, str) else value):
        raise PydanticCustomError("empty", "is empty")
    return value


Text = Annotated[str, AfterValidator(_not_empty)]  # checked where a file is read


@dataclass(frozen=True, kw_only=True)
class Question:
    """A closed-book question and its gold answer. ``other_answers`` are right too, and the best of all counts."""

    question: Text
    answer: Text
    other_answers: tuple[Text, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text to train on, and closed-book questions about it.

    Args:
        title: not empty.
        context: the text.
        questions: with a gold answer each.
        completions: self-edits of the passage.
        prompt: the prompt that they complete, as in the published item files.
        prompts: the prompt of each self-edit, if they differ (a prompt family); ``prompt_keys`` names each.
        hand_written: implications written by a person, one per line.
    """

    title: Text
    context: Text
    questions: tuple[Question, ...]
    completions: tuple[str, ...] = ()
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    prompt_keys: tuple[str, ...] = ()
    hand_written: str = ""


def load_passages(source: str | Path) -> list[Passage]:
    """Read passages.

    Args:
        source: ``shipped:train`` or ``shipped:val`` (about things that do not exist), or a file; ``runs/`` is the
            project's (``storage.runs_folder``). The forms of a file (docs/own_passages.md):

            - `.json`, also `.gz`: item file (``{title, context, questions, completions?, prompt?}``) or SQuAD v1.1
            - `.jsonl`: one item per line
            - `.csv`, `.tsv`: columns ``title``, ``context``, ``question``, ``answer``; one question per row
            - `.md`: a passage under each ``# title``; lines ``Q: …`` and ``A: …``, and ``I: …`` for implications

    Returns: the passages in file order.

    Raises: DataError with the path, the item (its index or line) and the wrong field.
    """
    path = runs_folder(source)
    if str(source).startswith("shipped:"):
        split = str(source).removeprefix("shipped:")
        if split not in SHIPPED_SPLITS:
            raise DataError(f"no shipped passages {split!r}", remedy=f"shipped are {', '.join(SHIPPED_SPLITS)}")
        path = data_file(f"passages_{split}.json")
    if reader := READERS.get(path.suffix.lower()):
        items = list(reader(path))
        if not items:
            raise DataError("holds no passage", path=path, remedy="see the forms in docs/own_passages.md")
        return _passages(items, path)
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        return _passages(_squad_items(path, data["data"]), path)
    if isinstance(data, dict) and "articles" in data:
        raise DataError("is a run file, not an item file", path=path, remedy="give it to 05_rest_em_round")
    if not isinstance(data, list):
        problem = f"is {repr(data)[:40]}, not a list of items"
        raise DataError(problem, path=path, remedy="give an item or SQuAD v1.1 file")
    return _passages(enumerate(data), path)


def passage_at(passages: Sequence[Passage], index: int) -> Passage:
    """The passage with this index. Raises: SettingsError if there is none."""
    if not 0 <= index < len(passages):
        raise SettingsError(f"passage is {index}; the dataset has {len(passages)}, counted from 0")
    return passages[index]


def published_order(passages: Sequence[Passage], seed: int = 42) -> list[Passage]:
    """A shuffled copy, in the order of ``random.seed(seed); random.shuffle(items)`` (published: 42)."""
    shuffled = list(passages)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def to_item(passage: Passage) -> dict[str, Any]:
    """The passage as an entry of a published item file, without its empty fields."""
    item: dict[str, Any] = _PASSAGE.dump_python(passage, mode="json", exclude_defaults=True)
    return item


def asked(question: Question) -> dict[str, Any]:
    """The question and its gold answers as published files have them; ``other_answers`` only where there are some."""
    row: dict[str, Any] = _QUESTION.dump_python(question, mode="json", exclude_defaults=True)
    return row


class _SquadAnswer(BaseModel):
    text: Text


class _SquadQuestion(BaseModel):
    question: Text
    answers: Annotated[list[_SquadAnswer], AfterValidator(_not_empty)]  # SQuAD v2 has questions without an answer


class _SquadParagraph(BaseModel):
    context: Text
    qas: list[_SquadQuestion]


class _SquadArticle(BaseModel):
    title: Text
    paragraphs: list[_SquadParagraph]


_PASSAGE = TypeAdapter(Passage)
_QUESTION = TypeAdapter(Question)
_SQUAD_ARTICLE = TypeAdapter(_SquadArticle)


def _passages(items: Iterable[Placed], path: Path | str) -> list[Passage]:
    passages = []
    for place, value in items:
        if isinstance(value, dict):  # null means absent
            value = {name: entry for name, entry in value.items() if entry is not None}
        one = checked(_PASSAGE.validate_python, value, path=path, item=place)
        for name in ("prompts", "prompt_keys"):
            if (n := len(getattr(one, name))) not in (0, len(one.completions)):
                problem = f"has {n} entries for {len(one.completions)} completions"
                raise DataError(problem, path=path, item=place, field=name, remedy="correct it, or remove the item")
        passages.append(one)
    return passages


def _squad_items(path: Path, articles: list[Any]) -> Iterator[Placed]:
    """One item per paragraph; the title with spaces and the first answer as gold, as in published items."""
    for index, value in enumerate(articles):
        article = checked(_SQUAD_ARTICLE.validate_python, value, path=path, item=index)
        for paragraph in article.paragraphs:
            asked = [{"question": one.question, "answer": one.answers[0].text} for one in paragraph.qas]
            yield index, {"title": article.title.replace("_", " "), "context": paragraph.context, "questions": asked}


REPOSITORY = "rajpurkar/squad"  # SQuAD v1.1 (Rajpurkar et al. 2016, CC BY-SA 4.0)
REVISION = "7b6d24c440a36b6815f21b70d25016731768db1f"  # of 2024-03, its last commit
OUT_NAMES = {"train": "squad_train.json", "validation": "squad_val.json"}  # SEAL's
FILES = {split: f"plain_text/{split}-00000-of-00001.parquet" for split in OUT_NAMES}


def passages_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Passage]:
    """One passage per paragraph, in order of first appearance, from the hub's rows (one per question)."""
    named = ({**row, "title": row["title"].replace("_", " "), "answer": row["answers"]["text"][0]} for row in rows)
    return _passages(_by_passage(enumerate(named)), REPOSITORY)


def fetch_squad(split: str, folder: Path, *, revision: str = REVISION) -> Path:
    """Write a split as an item file into ``folder``, with a record of its commit. ``revision``: a commit, branch or tag
    of the repository. Raises: DataError if it cannot be downloaded."""
    from huggingface_hub import hf_hub_download

    if split not in FILES:
        raise DataError(f"SQuAD has no split {split!r}", remedy=f"give {' or '.join(FILES)}")
    try:
        from pyarrow import parquet
    except ImportError as error:
        problem = "SQuAD's files on the hub are parquet, and pyarrow is not installed"
        raise DataError(problem, remedy="pip install -e '.[data]'") from error
    try:
        file = Path(hf_hub_download(REPOSITORY, FILES[split], repo_type="dataset", revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{REPOSITORY} could not be fetched from the hub ({type(error).__name__}: {str(error).splitlines()[0]})",
            remedy="check the network or HF_ENDPOINT; or give train-v1.1.json from SQuAD's own site as the "
            "dataset, which is read as it is",
        ) from error
    passages = passages_from_rows(parquet.read_table(file).to_pylist())
    written = write_json(folder / OUT_NAMES[split], [to_item(passage) for passage in passages])
    commit = file.parents[FILES[split].count("/")].name  # the hub's cache has a folder for each
    source = {"repository": REPOSITORY, "split": split, "revision": revision, "commit": commit}
    write_record(written, stage="data squad", settings=source)
    return written

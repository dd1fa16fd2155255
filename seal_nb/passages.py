"""Passages with their questions: the files they are read from, and the item files that are written.

- `.json`, also `.gz`: item file (a list of ``{title, context, questions, completions?, prompt?}``) or SQuAD v1.1
- `.csv`, `.tsv`: columns ``title``, ``context``, ``question``, ``answer``; one question per row
- `.jsonl`: one item per line
- `.md`: a passage under each ``# title``; lines ``Q: …`` and ``A: …``, and ``I: …`` for implications
- ``shipped:train``, ``shipped:val``: passages of this project, about things that do not exist

`fetch_squad` downloads SQuAD v1.1 (Rajpurkar et al. 2016, CC BY-SA 4.0,
https://huggingface.co/datasets/rajpurkar/squad) and writes the item files that SEAL (arXiv 2506.10943) uses. A broken
file is refused with its path, the item and the field. Nothing is repaired, and no text is changed.
"""

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError, SettingsError
from seal_nb.storage import read_json, runs_folder, write_json

CSV_COLUMNS = ("title", "context", "question", "answer")
_HEADING = re.compile(r"#\s+(?P<title>\S.*)")
_ENTRY = re.compile(r"(?:[-*]\s+)?(?P<kind>[QAI]):\s*(?P<text>.*)")

Placed = tuple[str, dict[str, Any]]  # "line 3", and the item


def read_passage_file(path: Path) -> list[Placed]:
    """The items of a CSV, TSV, JSONL or Markdown file. Raises: DataError with path, line and field."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("no such file", path=path, remedy="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", path=path, remedy="save it as UTF-8") from error
    items = list(READERS[path.suffix.lower()](path, text))
    if not items:
        raise DataError("holds no passage", path=path, remedy="see the forms in docs/own_passages.md")
    return items


def _csv_items(path: Path, text: str) -> Iterator[Placed]:
    is_tsv = path.suffix.lower() == ".tsv"
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter="\t" if is_tsv else ",")
    columns = [name.strip().lower() for name in rows.fieldnames or []]
    if missing := [name for name in CSV_COLUMNS if name not in columns]:
        raise DataError(
            f"has no column {missing[0]!r} but {', '.join(columns) or 'no header'}",
            path=path,
            item="line 1",
            field=missing[0],
            remedy=f"give a header with {', '.join(CSV_COLUMNS)}",
        )
    rows.fieldnames = columns
    items: dict[tuple[str, str], Placed] = {}
    try:
        for row in rows:
            place = f"line {rows.line_num}"
            for name in CSV_COLUMNS:
                if not (row[name] or "").strip():
                    raise DataError("is empty", path=path, item=place, field=name, remedy="fill it in")
            key = (row["title"].strip(), row["context"].strip())
            new: Placed = (place, {"title": key[0], "context": key[1], "questions": []})
            asked = {"question": row["question"].strip(), "answer": row["answer"].strip()}
            items.setdefault(key, new)[1]["questions"].append(asked)
    except csv.Error as error:
        raise DataError(
            f"is not {'TSV' if is_tsv else 'CSV'}: {error}",
            path=path,
            item=f"line {rows.line_num}",
            remedy="close the quotes",
        ) from error
    yield from items.values()


def _jsonl_items(path: Path, text: str) -> Iterator[Placed]:
    # Only line feeds end a JSON line: a string may hold other characters that Python calls line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise DataError(
                f"is not JSON: {error}", path=path, item=f"line {number}", remedy="write one object a line"
            ) from error


def _markdown_items(path: Path, text: str) -> Iterator[Placed]:
    item: dict[str, Any] | None = None
    place = ""
    for number, line in enumerate(text.splitlines(), start=1):
        here = f"line {number}"
        if heading := _HEADING.fullmatch(line.strip()):
            if item is not None:
                yield place, _closed(item)
            place, item = here, {"title": heading["title"], "lines": [], "questions": [], "by_hand": []}
        elif item is not None:
            _add_line(item, line.strip(), path, here)
        elif line.strip():
            raise DataError(
                "is before the first title", path=path, item=here, field="title", remedy="begin with '# title'"
            )
    if item is not None:
        yield place, _closed(item)


def _add_line(item: dict[str, Any], line: str, path: Path, here: str) -> None:
    entry = _ENTRY.fullmatch(line)
    if entry is None:
        item["lines"].append(line)
        return
    questions: list[dict[str, str]] = item["questions"]
    is_answered = not questions or "answer" in questions[-1]
    if entry["kind"] == "I":
        item["by_hand"].append(entry["text"])
    elif entry["kind"] == "Q" and is_answered:
        questions.append({"question": entry["text"]})
    elif entry["kind"] == "A" and not is_answered:
        questions[-1]["answer"] = entry["text"]
    else:
        field = "answer" if entry["kind"] == "Q" else "question"
        raise DataError(
            "is missing before this line", path=path, item=here, field=field, remedy="write Q: and A: in turn"
        )


def _closed(item: dict[str, Any]) -> dict[str, Any]:
    """The item; lines of a paragraph are joined by spaces, paragraphs by a line break."""
    paragraphs = re.split(r"\n{2,}", "\n".join(item["lines"]).strip())
    text = "\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)
    return {
        "title": item["title"],
        "context": text,
        "questions": item["questions"],
        "hand_written": "\n".join(item["by_hand"]),
    }


READERS = {
    ".csv": _csv_items,
    ".tsv": _csv_items,
    ".jsonl": _jsonl_items,
    ".md": _markdown_items,
    ".markdown": _markdown_items,
}
SHIPPED_SPLITS = ("train", "val")
PUBLISHED_ORDER_SEED = 42


@dataclass(frozen=True, kw_only=True)
class Question:
    """A closed-book question and its one gold answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text to train on, and closed-book questions about it.

    Args:
        completions: self-edits of the passage.
        prompt: the prompt that they complete, as in the published item files.
        prompts: the prompt of each self-edit, if they differ (a prompt family); ``prompt_keys`` names each.
        hand_written: implications written by a person, one per line.
    """

    title: str
    context: str
    questions: tuple[Question, ...]
    completions: tuple[str, ...] = ()
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    prompt_keys: tuple[str, ...] = ()
    hand_written: str = ""


def load_passages(source: str | Path) -> list[Passage]:
    """Read passages.

    Args:
        source: a file of one of the forms above, or ``shipped:train`` or ``shipped:val``. A path that begins with
            ``runs/`` is in the project's ``runs`` folder (``storage.runs_folder``).

    Returns: the passages in file order.

    Raises: DataError with the path, the item (its index or line) and the wrong field.
    """
    path = _shipped_path(source) if str(source).startswith("shipped:") else runs_folder(source)
    if path.suffix.lower() in READERS:
        return [_passage(_Item(path, place, value)) for place, value in read_passage_file(path)]
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        return _squad_passages(path, data["data"])
    if isinstance(data, dict) and "articles" in data:
        raise DataError("is a run file, not an item file", path=path, remedy="give it to 05_rest_em_round")
    if not isinstance(data, list):
        raise DataError(
            f"holds {_kind(data)}, not a list of items", path=path, remedy="give an item or SQuAD v1.1 file"
        )
    return [_passage(_Item(path, index, value)) for index, value in enumerate(data)]


def passage_at(passages: Sequence[Passage], index: int) -> Passage:
    """The passage with this index. Raises: SettingsError if there is none."""
    if not 0 <= index < len(passages):
        raise SettingsError(f"passage is {index}; the dataset has {len(passages)}, counted from 0")
    return passages[index]


def published_order(passages: Sequence[Passage], seed: int = PUBLISHED_ORDER_SEED) -> list[Passage]:
    """A shuffled copy, in the order of ``random.seed(seed); random.shuffle(items)`` (published: 42)."""
    shuffled = list(passages)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def to_item(passage: Passage) -> dict[str, Any]:
    """The passage as an entry of a published item file, without its empty fields."""
    item: dict[str, Any] = {
        "title": passage.title,
        "context": passage.context,
        "questions": [{"question": q.question, "answer": q.answer} for q in passage.questions],
    }
    if passage.completions:
        item["completions"] = list(passage.completions)
    if passage.prompt:
        item["prompt"] = passage.prompt
    if passage.prompts:
        item |= {"prompts": list(passage.prompts), "prompt_keys": list(passage.prompt_keys)}
    if passage.hand_written:
        item["hand_written"] = passage.hand_written
    return item


class _Item:
    """One JSON object of a file. Its errors name the file, the item and the field."""

    def __init__(self, path: Path, index: int | str, value: object, prefix: str = "") -> None:
        self.path, self.index, self.prefix = path, index, prefix
        if not isinstance(value, dict):
            raise self.refused("", f"is {_kind(value)}, not an object")
        self.value: dict[str, Any] = value

    def refused(self, name: str, problem: str) -> DataError:
        field = f"{self.prefix}{name}".rstrip(".")
        return DataError(problem, path=self.path, item=self.index, field=field, remedy="correct or remove the item")

    def text(self, name: str, *, default: str | None = None) -> str:
        value = self.value.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.refused(name, "is missing" if value is None else f"is {_kind(value)}, not a text")
        if default is None and not value.strip():
            raise self.refused(name, "is empty")
        return value

    def entries(self, name: str, *, optional: bool = False) -> list[Any]:
        value = self.value.get(name)
        if value is None and optional:
            return []
        if not isinstance(value, list):
            raise self.refused(name, "is missing" if value is None else f"is {_kind(value)}, not a list")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; empty if it is absent."""
        entries = self.entries(name, optional=True)
        for at, entry in enumerate(entries):
            if not isinstance(entry, str):
                raise self.refused(f"{name}[{at}]", f"is {_kind(entry)}, not a text")
        return tuple(entries)

    def objects(self, name: str) -> list["_Item"]:
        entries = enumerate(self.entries(name))
        return [_Item(self.path, self.index, entry, f"{self.prefix}{name}[{at}].") for at, entry in entries]


def _passage(item: _Item) -> Passage:
    completions = item.texts("completions")
    for name in ("prompts", "prompt_keys"):
        if (n := len(item.texts(name))) not in (0, len(completions)):
            raise item.refused(name, f"has {n} entries for {len(completions)} completions")
    return Passage(
        title=item.text("title"),
        context=item.text("context"),
        questions=tuple(
            Question(question=entry.text("question"), answer=entry.text("answer"))
            for entry in item.objects("questions")
        ),
        completions=completions,
        prompt=item.text("prompt", default=""),
        prompts=item.texts("prompts"),
        prompt_keys=item.texts("prompt_keys"),
        hand_written=item.text("hand_written", default=""),
    )


def _squad_passages(path: Path, articles: list[Any]) -> list[Passage]:
    """One passage per paragraph; the title with spaces and the first answer as gold, as in published items."""
    passages = []
    for index, value in enumerate(articles):
        article = _Item(path, index, value)
        for paragraph in article.objects("paragraphs"):
            questions = tuple(_squad_question(entry) for entry in paragraph.objects("qas"))
            title = article.text("title").replace("_", " ")
            passages.append(Passage(title=title, context=paragraph.text("context"), questions=questions))
    return passages


def _squad_question(entry: _Item) -> Question:
    answers = entry.objects("answers")
    if not answers:
        raise entry.refused("answers", "is empty (SQuAD v2 has such questions; v1.1 does not)")
    return Question(question=entry.text("question"), answer=answers[0].text("text"))


def _shipped_path(source: str | Path) -> Path:
    split = str(source).removeprefix("shipped:")
    if split not in SHIPPED_SPLITS:
        raise DataError(f"no shipped passages {split!r}", remedy=f"shipped are {', '.join(SHIPPED_SPLITS)}")
    return Path(str(resources.files("seal_nb") / "data" / f"passages_{split}.json"))


def _kind(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


REPOSITORY = "rajpurkar/squad"
FILES = {
    "train": "plain_text/train-00000-of-00001.parquet",
    "validation": "plain_text/validation-00000-of-00001.parquet",
}
OUT_NAMES = {"train": "squad_train.json", "validation": "squad_val.json"}  # SEAL's


def passages_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Passage]:
    """One passage per paragraph, in order of first appearance, from the hub's rows (one per question)."""
    questions: dict[tuple[str, str], list[Question]] = {}
    for row in rows:
        key = (row["title"].replace("_", " "), row["context"])
        gold = Question(question=row["question"], answer=row["answers"]["text"][0])
        questions.setdefault(key, []).append(gold)
    return [
        Passage(title=title, context=context, questions=tuple(asked)) for (title, context), asked in questions.items()
    ]


def fetch_squad(split: str, folder: Path) -> Path:
    """Write a split as an item file into ``folder``. Raises: DataError if it cannot be downloaded."""
    rows = _rows(split)
    return write_json(folder / OUT_NAMES[split], [to_item(one) for one in passages_from_rows(rows)])


def _rows(split: str) -> list[dict[str, Any]]:
    if split not in FILES:
        raise DataError(f"SQuAD has no split {split!r}", remedy=f"give {' or '.join(FILES)}")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            "SQuAD's files on the hub are parquet, and pyarrow is not installed", remedy="pip install -e '.[data]'"
        ) from error
    rows: list[dict[str, Any]] = parquet.read_table(_downloaded(FILES[split])).to_pylist()
    return rows


def _downloaded(file: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(REPOSITORY, file, repo_type="dataset")
    except (OSError, ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise DataError(
            f"{REPOSITORY} could not be fetched from the hub ({said})",
            remedy="check the network or HF_ENDPOINT; or give train-v1.1.json from SQuAD's own site as the "
            "dataset, which is read as it is",
        ) from error

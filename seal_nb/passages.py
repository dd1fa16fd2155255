"""Passages with their questions, and the item files they come from and go to.

Read: the published item files (a list of ``{title, context, questions, completions?, prompt?}``), SQuAD
v1.1 (Rajpurkar et al. 2016) in its own layout, both plain or gzip-compressed, one's own passages as CSV,
JSONL or Markdown (``passage_files``), and the passages that ship with the project (``shipped:train``,
``shipped:val``). A broken file is refused with its path, the item
and the field. Nothing is repaired or guessed here, and no text is changed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError, SettingsError
from seal_nb.passage_files import SUFFIXES, read_passage_file
from seal_nb.runs import read_json

SHIPPED_SPLITS = ("train", "val")
PUBLISHED_ORDER_SEED = 42


@dataclass(frozen=True, kw_only=True)
class Question:
    """A closed-book question and its one gold answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text that should end up in a model's weights, and the questions that tell whether it did.

    ``completions`` are self-edits and ``prompt`` is what they complete, as in the published item files. Where
    they complete different prompts (a family), ``prompts`` and ``prompt_keys`` have an entry for each.
    ``hand_written`` holds implications written by a person, one a line.
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
    """The passages of an item file, a SQuAD v1.1 file, a CSV, JSONL or Markdown file, or of
    ``shipped:train`` / ``shipped:val``, in file order.

    Raises: DataError with the path, the item (its index or line) and the field of what is wrong.
    """
    path = _shipped_path(source) if str(source).startswith("shipped:") else Path(source)
    if path.suffix.lower() in SUFFIXES:
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
    """The passage with this index. Raises: SettingsError where there is none."""
    if not 0 <= index < len(passages):
        raise SettingsError(f"passage is {index}; the dataset has {len(passages)}, counted from 0")
    return passages[index]


def published_order(passages: Sequence[Passage], seed: int = PUBLISHED_ORDER_SEED) -> list[Passage]:
    """A shuffled copy, in the order of ``random.seed(seed); random.shuffle(items)`` (published: 42)."""
    shuffled = list(passages)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def to_item(passage: Passage) -> dict[str, Any]:
    """The passage as an entry of a published item file; fields that are empty are left out."""
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
    """One JSON object of a file, read field by field with errors that say where."""

    def __init__(self, path: Path, index: int | str, value: object, prefix: str = "") -> None:
        self.path, self.index, self.prefix = path, index, prefix
        if not isinstance(value, dict):
            raise self.refused("", f"is {_kind(value)}, not an object")
        self.value: dict[str, Any] = value

    def refused(self, name: str, problem: str) -> DataError:
        field = f"{self.prefix}{name}".rstrip(".")
        return DataError(
            problem, path=self.path, item=self.index, field=field, remedy="mend or drop the item"
        )

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
        """A list of texts; absent is empty."""
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
    """One passage a paragraph; titles with spaces and the first answer as gold, as in published items."""
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

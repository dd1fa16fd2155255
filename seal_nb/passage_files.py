"""One's own passages: CSV, JSONL and Markdown files as item objects, each with the line it stands on.

CSV: a header with ``title``, ``context``, ``question``, ``answer``; a row a question; rows of equal title and
context are one passage. JSONL: an item object a line. Markdown: a passage under each ``# title``; lines
``Q: …`` and ``A: …`` below it are its questions, ``I: …`` an implication written by hand; the rest is text.
Fields are checked by ``passages``, which alone makes records of them.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError

CSV_COLUMNS = ("title", "context", "question", "answer")
SUFFIXES = (".csv", ".jsonl", ".md", ".markdown")
_HEADING = re.compile(r"#\s+(?P<title>\S.*)")
_ENTRY = re.compile(r"(?:[-*]\s+)?(?P<kind>[QAI]):\s*(?P<text>.*)")

Placed = tuple[str, dict[str, Any]]  # "line 3", and the item


def read_passage_file(path: Path) -> list[Placed]:
    """The items of a file by its suffix. Raises: DataError with path, line and field."""
    text = _text(path)
    readers = {
        ".csv": _csv_items,
        ".jsonl": _jsonl_items,
        ".md": _markdown_items,
        ".markdown": _markdown_items,
    }
    items = list(readers[path.suffix.lower()](path, text))
    if not items:
        raise DataError("holds no passage", path=path, remedy="see the forms in docs/own_passages.md")
    return items


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("no such file", path=path, remedy="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", path=path, remedy="save it as UTF-8") from error


def _csv_items(path: Path, text: str) -> Iterator[Placed]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
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
            f"is no CSV: {error}", path=path, item=f"line {rows.line_num}", remedy="close the quotes"
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
                "stands before the first title",
                path=path,
                item=here,
                field="title",
                remedy="begin with '# title'",
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
    """Paragraphs of the text are joined by a line break; by-hand lines are what shipped passages have."""
    paragraphs = re.split(r"\n{2,}", "\n".join(item["lines"]).strip())
    text = "\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)
    return {
        "title": item["title"],
        "context": text,
        "questions": item["questions"],
        "hand_written": "\n".join(item["by_hand"]),
    }

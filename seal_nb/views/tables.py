"""Tables of plain records: HTML in a notebook, aligned text in a terminal, CSV in a file.

The text form is what nbval compares, so it holds data only. Every cell is escaped. Does not compute anything.
"""

import csv
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_KNOWN = "–"
LONGEST_CELL = 80  # characters, in the text form


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of records and how each column is written.

    `columns`: record key → format, such as `{"arm": "", "accuracy": ".1%"}`; the key is the heading.
    A value of None is written as a dash: not known is not zero.
    """

    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]
    caption: str = ""

    def cells(self) -> list[list[str]]:
        return [[_written(row.get(key), form) for key, form in self.columns.items()] for row in self.rows]

    def to_csv(self, path: Path) -> Path:
        """Writes the unformatted values: a fraction stays a fraction."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows([[row.get(key) for key in self.columns] for row in self.rows])
        return path

    def _repr_html_(self) -> str:
        numeric = self._numeric()
        head = "".join(_cell("th", key, right) for key, right in zip(self.columns, numeric, strict=True))
        body = "".join(
            "<tr>"
            + "".join(_cell("td", text, right) for text, right in zip(cells, numeric, strict=True))
            + "</tr>"
            for cells in self.cells()
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        grid = [list(self.columns), *([_one_line(text) for text in cells] for cells in self.cells())]
        widths = [max(len(line[i]) for line in grid) for i in range(len(self.columns))]
        lines = [self._aligned(line, widths) for line in grid]
        return "\n".join(([self.caption] if self.caption else []) + lines)

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> str:
        pieces = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, self._numeric(), strict=True)
        ]
        return "  ".join(pieces).rstrip()

    def _numeric(self) -> list[bool]:
        """Columns of numbers are set right; a format such as `.1%` says that a column is one."""
        return [
            bool(form) or any(isinstance(row.get(key), int | float) for row in self.rows)
            for key, form in self.columns.items()
        ]


def _one_line(text: str) -> str:
    """A long text in one line of a terminal; the HTML has all of it."""
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST_CELL else f"{flat[: LONGEST_CELL - 1]}…"


def _written(value: Any, form: str) -> str:
    if value is None:
        return NOT_KNOWN
    return format(value, form) if form and isinstance(value, int | float) else str(value)


def _cell(tag: str, text: str, right: bool) -> str:
    # Long texts (a self-edit) keep their lines; numbers stand under one another.
    style = f"text-align:{'right' if right else 'left'};white-space:pre-wrap;vertical-align:top"
    return f'<{tag} style="{style}">{html.escape(text)}</{tag}>'

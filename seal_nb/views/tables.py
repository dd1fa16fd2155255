"""Tables of plain records: HTML in a notebook, aligned text in a terminal, CSV in a file.

The text form is what nbval compares, so it holds data only. Every cell is escaped. Where somebody looks on, a
click on a heading sorts; a table that is made headless has no script. Does not compute anything.
"""

import csv
import html
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_KNOWN = "–"
LONGEST_CELL = 80


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of records and how each column is written.

    `columns`: record key → format, such as `{"arm": "", "accuracy": ".1%"}`; the key is the heading.
    A value of None is written as a dash: not known is not zero. The text form cuts what is longer than
    `longest_cell` characters, so that a line stays one.
    """

    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]
    caption: str = ""
    longest_cell: int = LONGEST_CELL

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

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        shown = self._repr_html_()
        if somebody_looks_on() and len(self.rows) > 1:
            shown = sortable(shown)
        return {"text/html": shown, "text/plain": repr(self)}

    def _repr_html_(self) -> str:
        numeric = self._numeric()
        head = "".join(_cell("th", key, right) for key, right in zip(self.columns, numeric, strict=True))
        body = "".join(
            "<tr>" + "".join(_cell("td", text, right) for text, right in zip(cells, numeric, strict=True)) + "</tr>"
            for cells in self.cells()
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        grid = [list(self.columns), *([_one_line(text, self.longest_cell) for text in cells] for cells in self.cells())]
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


def somebody_looks_on() -> bool:
    """Whether this kernel's front end could ask its user something; papermill's and nbval's cannot."""
    shell_module = sys.modules.get("IPython.core.getipython")
    shell = shell_module.get_ipython() if shell_module else None
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def sortable(table: str) -> str:
    """The HTML of a table with a script that sorts its rows by a column: click a heading, or Enter on it."""
    name = f"t{uuid.uuid4().hex[:12]}"
    return f'<div id="{name}">{table}</div><script>({SORTER})(document.getElementById("{name}"))</script>'


# Numbers are compared as numbers wherever a cell begins with one ("+20.0%", "−3"), the rest as text.
SORTER = """function(box){
if(!box)return;
const number=t=>parseFloat(t.replace("\u2212","-").replace(/,/g,""));
box.querySelectorAll("thead th").forEach((head,column)=>{
 head.tabIndex=0;head.style.cursor="pointer";head.title="sort by this column";
 head.setAttribute("aria-sort","none");
 const sort=()=>{
  const up=head.getAttribute("aria-sort")!=="ascending",body=box.querySelector("tbody");
  box.querySelectorAll("thead th").forEach(other=>other.setAttribute("aria-sort","none"));
  head.setAttribute("aria-sort",up?"ascending":"descending");
  const text=row=>row.cells[column].textContent.trim();
  const compare=(a,b)=>{const x=number(text(a)),y=number(text(b));
   if(isNaN(x)!==isNaN(y))return isNaN(x)?1:-1;
   return (isNaN(x)?text(a).localeCompare(text(b)):x-y)*(up?1:-1);};
  [...body.rows].sort(compare).forEach(row=>body.appendChild(row));
 };
 head.addEventListener("click",sort);
 head.addEventListener("keydown",event=>{if(event.key==="Enter"){sort();event.stopPropagation();}});
});}"""


def _one_line(text: str, longest: int) -> str:
    """A long text in one line of a terminal; the HTML has all of it."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else f"{flat[: longest - 1]}…"


def _written(value: Any, form: str) -> str:
    if value is None:
        return NOT_KNOWN
    return format(value, form) if form and isinstance(value, int | float) else str(value)


def _cell(tag: str, text: str, right: bool) -> str:
    # Long texts (a self-edit) keep their lines; numbers stand under one another.
    style = f"text-align:{'right' if right else 'left'};white-space:pre-wrap;vertical-align:top"
    return f'<{tag} style="{style}">{html.escape(text)}</{tag}>'

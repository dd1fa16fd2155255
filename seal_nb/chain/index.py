"""One page for a whole run: every figure and table of the executed notebooks in a folder, and their settings.

`write_index(run_dir)` reads the `.ipynb` files below a folder and writes one self-contained `index.html`:
pictures inside as base64, no script, nothing loaded from elsewhere, light and dark. Text from a notebook is
always escaped, and tables are read out of their HTML and written anew, so that nothing in an output can act
in the page. Runs no notebook.
"""

import ast
import base64
import binascii
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat

from seal_nb.errors import DataError
from seal_nb.metrics import counted
from seal_nb.storage import write_text

SKIPPED_FOLDERS = {".ipynb_checkpoints", ".venv", ".git"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG out of a notebook: base64 text, what it shows in words, and the heading it stands under."""

    png: str
    alt: str
    heading: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table out of a notebook as plain text cells."""

    caption: str
    heading: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    value: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Executed:
    """What the page shows of one notebook; `failure` is empty unless a cell raised."""

    path: Path
    title: str
    started: str  # as papermill writes it, ISO 8601; empty if papermill did not run it
    settings: tuple[Setting, ...]
    content: tuple[Picture | Grid, ...]
    failure: str


def write_index(run_dir: str | Path, *, title: str = "Run report") -> Path:
    """Writes `run_dir/index.html` from the executed notebooks below it and returns its path.

    Raises: DataError where the folder holds no notebook or one cannot be read.
    """
    folder = Path(run_dir)
    found = sorted((read_executed(path) for path in sorted(_notebooks(folder))), key=_place_on_page)
    if not found:
        raise DataError("no executed notebook", path=folder, remedy="run a stage with its output in this folder")
    return write_text(folder / "index.html", _page(title, folder, found))


def read_executed(path: Path) -> Executed:
    """Title, settings, figures, tables and failure of one notebook."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise DataError(f"not a notebook: {error}", path=path, remedy="run its stage again") from error
    title, heading, content, failure = "", "", [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#{1,6}\s+(.+?)\s*$", cell.source, flags=re.MULTILINE)
            title = title or (headings[0] if headings else "")
            heading = headings[-1] if headings else heading
        for output in cell.get("outputs", []):
            content += _shown(output, heading)
            if output.output_type == "error":
                failure = f"{output.ename}: {output.evalue}"
    return Executed(
        path=path,
        title=title or path.stem,
        started=str(notebook.metadata.get("papermill", {}).get("start_time") or ""),
        settings=_settings(notebook.cells),
        content=tuple(content),
        failure=failure,
    )


def _place_on_page(one: Executed) -> tuple[bool, str, str]:
    """The results of the whole run first, then the stages in the order in which they ran."""
    return not one.path.stem.startswith("08_results"), one.started, str(one.path)


def _notebooks(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.ipynb"):
        if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts):
            yield path


def _shown(output: Any, heading: str) -> list[Picture | Grid]:
    data = output.get("data", {})
    if "image/png" in data:
        png = "".join(data["image/png"].split())
        if not _is_png(png):
            return []
        labelled = output.get("metadata", {}).get("image/png", {})
        alt = labelled.get("alt", "") if isinstance(labelled, dict) else ""
        return [Picture(png=png, alt=alt or data.get("text/plain", "") or heading, heading=heading)]
    if "<table" in data.get("text/html", ""):
        reader = _TableReader()
        reader.feed(data["text/html"])
        return [reader.grid(heading)] if reader.rows else []
    return []


def _is_png(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=True).startswith(b"\x89PNG")
    except (binascii.Error, ValueError):
        return False


class _TableReader(HTMLParser):
    """Collects the text of the cells of a table; attributes, links and scripts stay behind."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.is_head: list[bool] = []
        self.caption = ""
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
            self.is_head.append(True)
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.is_head[-1] &= tag == "th"
        elif tag == "br":
            self.handle_data("\n")
        if tag in ("td", "th", "caption", "script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            del self._inside[self._inside.index(tag) :]

    def handle_data(self, data: str) -> None:
        place = self._inside[-1] if self._inside else ""
        if place == "caption":
            self.caption += data
        elif place in ("td", "th") and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def grid(self, heading: str) -> Grid:
        has_head = self.is_head[0]
        return Grid(
            caption=self.caption.strip(),
            heading=heading,
            head=tuple(self.rows[0]) if has_head else (),
            rows=tuple(tuple(row) for row in self.rows[1 if has_head else 0 :] if row),
        )


def _settings(cells: Sequence[Any]) -> tuple[Setting, ...]:
    """The parameters cell with what papermill injected below it, in the order of the cell."""
    settings: dict[str, Setting] = {}
    for tag in ("parameters", "injected-parameters"):
        for cell in cells:
            if tag in cell.get("metadata", {}).get("tags", []):
                for one in _assignments(cell.source):
                    comment = one.help or (settings[one.name].help if one.name in settings else "")
                    settings[one.name] = Setting(name=one.name, value=one.value, help=comment)
    return tuple(settings.values())


def _assignments(source: str) -> Iterator[Setting]:
    lines = source.splitlines()
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return
    for statement in statements:
        if not isinstance(statement, ast.AnnAssign | ast.Assign) or statement.value is None:
            continue
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        last = lines[(statement.end_lineno or 1) - 1].encode()[statement.end_col_offset or 0 :].decode()
        comment = last.partition("#")[2].strip()
        yield Setting(name=ast.unparse(target), value=ast.unparse(statement.value), help=comment)


def _page(title: str, folder: Path, found: Sequence[Executed]) -> str:
    contents = "".join(
        f'<li><a href="#n{number}">{html.escape(one.title)}</a> '
        f"<small>{html.escape(_folder_of(one, folder))}</small>{' — failed' if one.failure else ''}</li>"
        for number, one in enumerate(found)
    )
    sections = "".join(_section(number, one, folder) for number, one in enumerate(found))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{_at_a_glance(found)}<nav><ol>{contents}</ol></nav>{sections}"
        "</body></html>\n"
    )


def _at_a_glance(found: Sequence[Executed]) -> str:
    """What to see first: whether everything ran to its end, and the first table and figure of the results."""
    failed = [f'<a href="#n{number}">{html.escape(one.title)}</a>' for number, one in enumerate(found) if one.failure]
    ran = f"{counted(len(found), 'notebooks')} ran"
    said = f'<span class="failure">{ran}; failed: {", ".join(failed)}</span>' if failed else f"{ran} to the end."
    results = [one for one in found if one.path.stem.startswith("08_results") and not one.failure]
    first = [
        next((item for one in results for item in one.content if isinstance(item, kind)), None)
        for kind in (Grid, Picture)
    ]
    shown = "".join(_item_html(item) for item in first if item is not None)
    return f"<p>{said}</p>{shown}"


def _folder_of(one: Executed, folder: Path) -> str:
    """The stage's folder: one notebook may have run several times."""
    parent = one.path.parent.relative_to(folder).as_posix()
    return "" if parent == "." else parent


def _section(number: int, one: Executed, folder: Path) -> str:
    place = one.path.relative_to(folder).as_posix()
    failure = f'<p class="failure">A cell failed: {html.escape(one.failure)}</p>' if one.failure else ""
    return (
        f'<section id="n{number}"><h2>{html.escape(one.title)} '
        f"<small>{html.escape(_folder_of(one, folder))}</small></h2>"
        f'<p>Executed notebook: <a href="{quote(place)}">{html.escape(place)}</a></p>{failure}'
        f"{_settings_html(one.settings)}{''.join(_content_html(one.content))}</section>"
    )


def _settings_html(settings: Sequence[Setting]) -> str:
    if not settings:
        return ""
    rows = tuple((one.name, one.value, one.help) for one in settings)
    table = _table_html(Grid(caption="", heading="", head=("setting", "value", "meaning"), rows=rows))
    return f"<details><summary>Settings ({len(settings)})</summary>{table}</details>"


def _content_html(content: Sequence[Picture | Grid]) -> Iterator[str]:
    heading = ""
    for item in content:
        if item.heading != heading:
            heading = item.heading
            yield f"<h3>{html.escape(heading)}</h3>"
        yield _item_html(item)


def _item_html(item: Picture | Grid) -> str:
    if isinstance(item, Grid):
        return _table_html(item)
    alt = html.escape(item.alt)
    return f'<figure><img src="data:image/png;base64,{item.png}" alt="{alt}"></figure>'


def _table_html(grid: Grid) -> str:
    caption = f"<caption>{html.escape(grid.caption)}</caption>" if grid.caption else ""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in grid.head)
    body = "".join("<tr>" + "".join(_cell_html(text) for text in row) + "</tr>" for row in grid.rows)
    head_row = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{caption}{head_row}<tbody>{body}</tbody></table></div>'


def _cell_html(text: str) -> str:
    numeric = ' class="number"' if re.fullmatch(r"[-+−]?[\d.,]+\s?%?|–", text.strip()) else ""
    return f"<td{numeric}>{html.escape(text)}</td>"


CSS = """
:root{color-scheme:light dark;--ink:#222;--ground:#fff;--line:#ccc;--soft:#f4f4f4;--link:#0059a8;
--bad:#b00020}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--ground:#181818;--line:#484848;--soft:#242424;
--link:#7cc4ff;--bad:#ff8a8a}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);max-width:60rem;
margin:2rem auto;padding:0 1rem}
a{color:var(--link)}h2{border-top:1px solid var(--line);padding-top:1.5rem;margin-top:2.5rem}
figure{margin:1rem 0;background:#fff;border-radius:6px;padding:.6rem;display:inline-block;max-width:100%;
box-sizing:border-box}
img{max-width:100%;height:auto;display:block}
.wide{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.88rem}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{border-bottom:1px solid var(--line);padding:.3rem .7rem;text-align:left;vertical-align:top;
white-space:pre-wrap}
th{background:var(--soft)}.number{text-align:right;font-variant-numeric:tabular-nums}
small{font-weight:400;opacity:.7;font-size:.75em}summary{cursor:pointer}.failure{color:var(--bad);font-weight:600}
"""

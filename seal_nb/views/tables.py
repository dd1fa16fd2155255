"""DataFrames shown in a notebook: HTML by a pandas Styler, and aligned text for terminals, logs and nbval.

The column names choose the number format. Every cell and heading is escaped. In JupyterLab a click on a heading
sorts; a table of a headless run has no script, so that saved outputs are small and the same every time."""

import html
import sys
from collections.abc import Mapping
from hashlib import sha256
from numbers import Number
from pathlib import Path
from typing import Any

import pandas as pd

from seal_nb.errors import visible
from seal_nb.storage import data_file, write_text

Formats = Mapping[str, str] | None
NOT_KNOWN = "–"
LONGEST_CELL = 80
FORMULAS = tuple("=+-@\t\r\n＝＋－＠")  # how they begin; spreadsheets read the wide forms as well
_COLUMNS = {  # by format; other fractions are shown with four digits
    ".1%": "accuracy, low, high, baseline, adapter, best, never_edited, just_edited, final, agreement, reward, mean, "
    "recited, not_recited, not_recited_low, not_recited_high, baseline_recited, parrot",
    "+.1%": "gain, gain_low, gain_high, difference, baseline_bias, adapter_bias, gain_bias",
    "+.2f": "soft_gain",
    ".2g": "p, p_holm",
    ".0f": "steps",
    ",.0f": "tokens, needed",
    ".2f": "kappa",
    ".3f": "loss",
    "g": "lr",
}
FORMATS = {name: form for form, names in _COLUMNS.items() for name in names.split(", ")}
FORMATS["right answers, second − first"] = "+.0f"
_STYLES = [
    {"selector": "th, td", "props": "text-align: left; vertical-align: top; white-space: pre-wrap"},
    {"selector": "caption", "props": "text-align: left; caption-side: top"},
]

# Sorting of tables, for the whole page. It is put into a page that JupyterLab shows, never into a saved output.
SCRIPT = f"<script>{data_file('tables.js').read_text()}</script>"


def show(frame: pd.DataFrame, caption: str = "", *, formats: Formats = None) -> None:
    """Display a DataFrame in a notebook.

    Args:
        frame: any DataFrame. Columns such as ``accuracy`` or ``gain`` are shown as percentages (``FORMATS``); missing
            values as "–".
        caption: a line above the table.
        formats: format specifications for further columns, such as ``{"loss": ".2f"}``."""
    from IPython.display import display

    display(mime_bundle(frame, caption, formats=formats), raw=True)


def mime_bundle(
    frame: pd.DataFrame, caption: str = "", *, formats: Formats = None, longest_cell: int = LONGEST_CELL
) -> dict[str, str]:
    """What ``show`` displays: ``text/html`` and ``text/plain``."""
    if frame.empty:
        nothing = visible(f"{caption}: no rows") if caption else "no rows"
        return {"text/html": f"<p>{html.escape(nothing)}</p>", "text/plain": nothing}
    script = SCRIPT if has_live_frontend() and len(frame) > 1 else ""
    text = as_text(frame, caption, formats=formats, longest_cell=longest_cell)
    return {"text/html": as_html(frame, caption, formats=formats) + script, "text/plain": text}


def write_csv(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as CSV, whole or not at all, without its index.

    Args:
        frame: the table. Texts that a spreadsheet would take for a formula get an apostrophe in front, and hidden
            characters are written in letters; numbers stay as they are.
        path: of the file; folders are made.

    Returns:
        The path.

    Raises:
        DataError: the path cannot be a file."""

    def text(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        # pandas does not quote a lone carriage return, which would begin a row; `visible` writes it in letters.
        return f"'{visible(value)}" if value.startswith(FORMULAS) else visible(value)

    return write_text(path, frame.astype(object).map(text).rename(columns=text).to_csv(index=False))


def as_html(frame: pd.DataFrame, caption: str = "", *, formats: Formats = None) -> str:
    """The table as HTML, the same for the same data."""
    cells, is_number, caption = _cells(frame, formats), _number_columns(frame), visible(caption)
    right = [f"td.col{at}, th.col{at}" for at, one in enumerate(is_number) if one]
    styler = cells.style.format(escape="html").format_index(escape="html", axis=1).hide(axis="index")
    styler.set_uuid(sha256(f"{caption}{cells.to_csv()}".encode()).hexdigest()[:8])
    styler.set_table_attributes('class="sn-sorts"')
    styler.set_table_styles([*_STYLES, *({"selector": one, "props": "text-align: right"} for one in right)])
    styler.cell_ids = False
    if caption:
        styler.set_caption(html.escape(caption))
    return str(styler.to_html())


def as_text(
    frame: pd.DataFrame, caption: str = "", *, formats: Formats = None, longest_cell: int = LONGEST_CELL
) -> str:
    """The table as aligned text; longer cells are cut, so that a row is one line."""

    def cut(cell: str) -> str:
        flat = " ".join(cell.split())
        return flat if len(flat) <= longest_cell else f"{flat[: longest_cell - 1]}…"

    columns = []
    for (name, cells), is_number in zip(_cells(frame, formats).map(cut).items(), _number_columns(frame), strict=True):
        column = [name, *cells]
        width = max(map(len, column))
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in column])
    return "\n".join(
        [visible(caption)] * bool(caption) + ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    )


def has_live_frontend() -> bool:
    """Whether JupyterLab shows this kernel's output now; not so under papermill, nbval and nbconvert."""
    shell_module = sys.modules.get("IPython.core.getipython")
    shell = shell_module.get_ipython() if shell_module else None
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def _cells(frame: pd.DataFrame, formats: Formats) -> pd.DataFrame:
    """Every value as text, with hidden characters visible: they could command a terminal or reorder a row."""
    known = {**FORMATS, **(formats or {})}
    cells = frame.astype(object)
    for at, name in enumerate(frame.columns):
        cells.isetitem(at, [visible(_cell_text(value, known.get(str(name), ""))) for value in frame.iloc[:, at]])
    return cells.set_axis([visible(str(name)) for name in cells.columns], axis=1)


def _cell_text(value: Any, form: str) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return NOT_KNOWN
    if isinstance(value, float) and not form:
        form = ".4g" if abs(value) < 10_000 else ",.0f"  # an integer column with a gap is one of floats
    is_number = isinstance(value, Number) and not isinstance(value, bool)  # a file from elsewhere may hold anything
    return format(value, form) if form and is_number else str(value)


def _number_columns(frame: pd.DataFrame) -> list[bool]:
    """Columns of numbers are aligned to the right."""
    numbers = {*frame.convert_dtypes().select_dtypes("number")}
    return [name in numbers or str(name) in FORMATS for name in frame.columns]

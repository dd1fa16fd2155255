"""DataFrames shown in a notebook: HTML by a pandas Styler, and aligned text for terminals, logs and nbval.

The column names choose the number format. Every cell and heading is escaped. In JupyterLab a click on a heading
sorts; a table of a headless run has no script, so that saved outputs are small and the same every time.
"""

import html
import sys
import uuid
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

NOT_KNOWN = "–"
LONGEST_CELL = 80
_SHARES = "accuracy low high baseline adapter never_edited just_edited final agreement recited reward mean"
_CHANGES = "gain gain_low gain_high difference baseline_bias adapter_bias gain_bias"
FORMATS = {
    **dict.fromkeys(_SHARES.split(), ".1%"),
    **dict.fromkeys(_CHANGES.split(), "+.1%"),
    **{"p": ".2g", "p_value": ".2g", "kappa": ".2f", "lr": "g", "loss": ".3f", "soft_gain": "+.2f"},
}  # by column name; other fractions are shown with four digits
_STYLES = [
    {"selector": "th, td", "props": "text-align: left; vertical-align: top; white-space: pre-wrap"},
    {"selector": "caption", "props": "text-align: left; caption-side: top"},
]


def show(frame: "pd.DataFrame", caption: str = "", *, formats: Mapping[str, str] | None = None) -> None:
    """Display a DataFrame in a notebook.

    Args:
        frame: any DataFrame. Columns such as ``accuracy`` or ``gain`` are shown as percentages (``FORMATS``); missing
            values as "–".
        caption: a line above the table.
        formats: format specifications for further columns, such as ``{"loss": ".2f"}``.
    """
    from IPython.display import display

    display(mime_bundle(frame, caption, formats=formats), raw=True)


def mime_bundle(
    frame: "pd.DataFrame",
    caption: str = "",
    *,
    formats: Mapping[str, str] | None = None,
    longest_cell: int = LONGEST_CELL,
) -> dict[str, str]:
    """What ``show`` displays: ``text/html`` and ``text/plain``."""
    if frame.empty:
        nothing = f"{caption}: no rows" if caption else "no rows"
        return {"text/html": f"<p>{html.escape(nothing)}</p>", "text/plain": nothing}
    shown = as_html(frame, caption, formats=formats)
    if has_live_frontend() and len(frame) > 1:
        shown = sortable(shown)
    return {"text/html": shown, "text/plain": as_text(frame, caption, formats=formats, longest_cell=longest_cell)}


def as_html(frame: "pd.DataFrame", caption: str = "", *, formats: Mapping[str, str] | None = None) -> str:
    """The table as HTML, the same for the same data."""
    cells, is_number = _cells(frame, formats), _number_columns(frame)
    name = sha256(f"{caption}{cells.to_csv()}".encode()).hexdigest()[:8]
    styler = cells.style.format(escape="html").format_index(escape="html", axis=1).set_uuid(name)
    styler = styler.set_table_styles(
        [
            *_STYLES,
            *(
                {"selector": f"td.col{at}, th.col{at}", "props": "text-align: right"}
                for at, one in enumerate(is_number)
                if one
            ),
        ]
    )
    styler.cell_ids = False
    styler = styler.hide(axis="index")
    return str((styler.set_caption(html.escape(caption)) if caption else styler).to_html())


def as_text(
    frame: "pd.DataFrame",
    caption: str = "",
    *,
    formats: Mapping[str, str] | None = None,
    longest_cell: int = LONGEST_CELL,
) -> str:
    """The table as aligned text; longer cells are cut, so that a row is one line."""
    cells = _cells(frame, formats).map(partial(_one_line, longest=longest_cell))
    lines = [[str(name) for name in cells.columns], *cells.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, _number_columns(frame), strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([caption] * bool(caption) + aligned)


def _cells(frame: "pd.DataFrame", formats: Mapping[str, str] | None) -> "pd.DataFrame":
    """Every value as text."""
    known = {**FORMATS, **(formats or {})}
    cells = frame.astype(object)
    for at, name in enumerate(frame.columns):
        cells.isetitem(at, [_cell_text(value, known.get(str(name), "")) for value in frame.iloc[:, at]])
    return cells


def _cell_text(value: Any, form: str) -> str:
    import pandas as pd

    if pd.api.types.is_scalar(value) and pd.isna(value):
        return NOT_KNOWN
    if isinstance(value, float) and not form:
        form = ".4g" if abs(value) < 10_000 else ",.0f"  # an integer column with a gap is one of floats
    return format(value, form) if form and not isinstance(value, str | bool) else str(value)


def _number_columns(frame: "pd.DataFrame") -> list[bool]:
    """Columns of numbers are aligned to the right."""
    import pandas as pd

    def is_number(values: Any) -> bool:
        known = [value for value in values if not (pd.api.types.is_scalar(value) and pd.isna(value))]
        return bool(known) and all(pd.api.types.is_number(value) and not isinstance(value, bool) for value in known)

    return [str(name) in FORMATS or is_number(frame.iloc[:, at]) for at, name in enumerate(frame.columns)]


def has_live_frontend() -> bool:
    """Whether JupyterLab shows this kernel's output now; not so under papermill, nbval and nbconvert."""
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

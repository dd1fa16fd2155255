"""Fragments of HTML that the inspector is put together from, under one style; every text is escaped.

A loss curve the size of a word, as SVG: for a line of status that is redrawn while an adapter trains.

Links to what made a run: its file, the record beside it, the executed notebook in its folder.
"""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from seal_nb.storage import record_path
from seal_nb.views.tables import SORTER, somebody_looks_on

# A table inside a widget cannot bring a script: it learns to sort when somebody comes near it.
TABLES_SORT = f"""<script>(function(){{if(window.sealNbTablesSort)return;window.sealNbTablesSort=true;
const near=event=>{{const box=event.target.closest&&event.target.closest(".seal-nb-inspector,.seal-nb-live");
if(box)box.querySelectorAll("table:not([data-sorts])").forEach(
 table=>{{table.dataset.sorts="yes";({SORTER})(table);}});}};
document.addEventListener("mouseover",near);document.addEventListener("focusin",near);}})()</script>"""

# JupyterLab moves between cells by the arrow keys unless the element in focus says that keys are its own. No
# widget can say that from Python. The view appears a little after its output, hence the repetition.
KEYS_ARE_OURS = """<script>(function(){let n=0;const say=()=>{
document.querySelectorAll(".seal-nb-inspector,.seal-nb-live").forEach(box=>
 box.querySelectorAll("select,button,input").forEach(
  one=>one.setAttribute("data-lm-suppress-shortcuts","true")));
if(n++<100)setTimeout(say,200);};say();})()</script>"""

CSS = """<style>
.seal-nb{font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,inherit);
 max-width:76rem}
.seal-nb h4{margin:.9em 0 .3em;font-size:1.05em}.seal-nb p{margin:.3em 0}
.seal-nb table{border-collapse:collapse;font-size:.95em;margin:.2em 0 .8em}
.seal-nb th,.seal-nb td{padding:.25em .7em .25em .2em;border-bottom:1px solid var(--jp-border-color2,#8884);
 max-width:30rem;vertical-align:top;text-align:left;overflow-wrap:break-word}
.seal-nb caption{text-align:left;font-weight:600;padding:.2em 0}
.seal-nb .sn-text{white-space:pre-wrap;border-left:3px solid var(--jp-border-color1,#8886);padding-left:.7em;
 max-width:60rem}
.seal-nb .sn-tokens{white-space:pre-wrap;line-height:1.75;font-size:1.05em}
.seal-nb .sn-tokens span{border-radius:3px;padding:.1em 0}
.seal-nb .sn-none{opacity:.5}.seal-nb .sn-soft{opacity:.7}
.seal-nb .sn-pair{display:grid;grid-template-columns:1fr 1fr;gap:1.2em}
.seal-nb .sn-failure{color:var(--jp-error-color0,#b00020);white-space:pre-wrap;font-weight:600}
.seal-nb-inspector .widget-html-content,.seal-nb-live .widget-html-content{min-width:0;flex:1 1 0}
</style>"""


def page(*parts: str) -> str:
    """Fragments under one style, which follows JupyterLab's theme where there is one."""
    return f'{CSS}<div class="seal-nb">{"".join(parts)}</div>'


def heading(text: str) -> str:
    return f"<h4>{html.escape(text)}</h4>"


def note(text: str) -> str:
    return f'<p class="sn-soft">{html.escape(text)}</p>'


def failure(text: str) -> str:
    """What went wrong, with its remedy; read out by screen readers at once."""
    return f'<p class="sn-failure" role="alert">{html.escape(text)}</p>'


def text_block(text: str) -> str:
    return f'<div class="sn-text">{html.escape(text)}</div>'


def show(bundle: dict[str, Any]) -> None:
    """Display a widget with its twin; a widget has the arrow keys for itself, and tables that sort."""
    from IPython.display import display

    display(bundle, raw=True)
    if len(bundle) > 2:  # more than HTML and text
        display({"text/html": KEYS_ARE_OURS + TABLES_SORT, "text/plain": ""}, raw=True)


WIDTH, HEIGHT, EDGE = 120, 26, 3  # pixels


def sparkline(values: Sequence[float]) -> str:
    """An inline SVG in the colour of the text around it; its numbers are its label."""
    if not values:
        return ""
    most = max([*values, 1e-9])
    step = (WIDTH - 2 * EDGE) / max(len(values) - 1, 1)
    points = [(EDGE + at * step, HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * value / most) for at, value in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    label = "loss by epoch: " + ", ".join(f"{value:.2f}" for value in values)
    x, y = points[-1]
    return (
        f'<svg role="img" aria-label="{label}" width="{WIDTH}" height="{HEIGHT}" '
        'style="vertical-align:middle">'
        f"<title>{label}</title>"
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="currentColor"/></svg>'
    )


class RunLinks:
    """Links where somebody can follow them; headless the names alone: a place means nothing elsewhere."""

    def __init__(self, run: Path) -> None:
        found = [run, record_path(run), *sorted(run.parent.glob("0*.ipynb"))]
        self.files = [path for path in found if path.is_file()]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        shown = ", ".join(map(_link if somebody_looks_on() else _name, self.files))
        names = ", ".join(path.name for path in self.files)
        return {"text/html": f"<p>On disk: {shown}</p>", "text/plain": f"on disk: {names}"}


def _name(path: Path) -> str:
    return html.escape(path.name)


def _link(path: Path) -> str:
    """Relative to the notebook's folder, as JupyterLab resolves it."""
    return f'<a href="{quote(os.path.relpath(path))}" target="_blank">{_name(path)}</a>'

"""HTML of the inspector: headings, tables (of `views.tables`) and loss curves. Every text is escaped.

``StaticView`` is what a headless notebook, GitHub and an exported page show. ``WidgetView`` shows a widget in
JupyterLab together with its static view.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from seal_nb.views.tables import SCRIPT, as_html, as_text, has_live_frontend

CSS = """<style>
.seal-nb{font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,inherit);
 max-width:76rem}
.seal-nb h4{margin:.9em 0 .3em;font-size:1.05em}
.seal-nb caption{padding:.6em 0 .3em;font-size:1.05em;font-weight:600;color:inherit;white-space:normal}
.seal-nb p{margin:.3em 0}
.seal-nb .sn-table{overflow-x:auto}.seal-nb .sn-wide table{min-width:64em}
.seal-nb table{border-collapse:collapse;font-size:.95em;margin:.2em 0 .8em}
.seal-nb th,.seal-nb td{padding:.25em .7em .25em .2em;border-bottom:1px solid var(--jp-border-color2,#8884);
 max-width:30rem;overflow-wrap:break-word}
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
    """HTML fragments with the inspector's style, which follows JupyterLab's theme."""
    return f'{CSS}<div class="seal-nb">{"".join(parts)}</div>'


def heading(text: str) -> str:
    return f"<h4>{escape(text)}</h4>"


def note(text: str) -> str:
    return f'<p class="sn-soft">{escape(text)}</p>'


def text_block(text: str) -> str:
    return f'<div class="sn-text">{escape(text)}</div>'


def table_html(table: pd.DataFrame, caption: str = "") -> str:
    wide = " sn-wide" if len(table.columns) > 7 else ""  # scrolls in a narrow window
    return f'<div class="sn-table{wide}">{as_html(table, caption)}</div>'


def loss_curve(losses: Sequence[float]) -> str:
    """A small loss curve in a line of text; its label contains the numbers."""
    if not losses:
        return ""
    bars = "".join("▁▂▃▄▅▆▇█"[round(7 * loss / max([*losses, 1e-9]))] for loss in losses)
    label = "loss by epoch: " + ", ".join(f"{loss:.2f}" for loss in losses)
    return f'<span role="img" aria-label="{label}" title="{label}">{bars}</span>'


@dataclass(frozen=True)
class StaticView:
    """HTML and the same content as text. In JupyterLab its tables can be sorted by clicking a heading."""

    html: str
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.html + (SCRIPT if has_live_frontend() else ""), "text/plain": self.text}


def static_tables(tables: Mapping[str, pd.DataFrame], title: str = "") -> StaticView:
    """A static view of tables (caption → table; an empty caption is not shown) under a heading."""
    html = [table_html(table, caption) for caption, table in tables.items()]
    text = [as_text(table, caption) for caption, table in tables.items()]
    return StaticView(page(heading(title) if title else "", *html), "\n\n".join([title, *text]).strip())


class WidgetView(ABC):
    """Shows ``box`` (an ipywidget) in JupyterLab. Its static view is in the same output, and alone elsewhere."""

    box: Any

    @abstractmethod
    def static_view(self) -> StaticView:
        """The same content without a widget."""

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = self.static_view()._repr_mimebundle_()
        return bundle | self.box._repr_mimebundle_(**kwargs) if has_live_frontend() else bundle

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self._repr_mimebundle_(), raw=True)
        if has_live_frontend():
            display({"text/html": SCRIPT, "text/plain": ""}, raw=True)

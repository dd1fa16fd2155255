"""HTML of the inspector: headings, tables (of `views.tables`), loss curves and coloured tokens. Every text is escaped.

A token is blue if the adapter made it more likely, orange if less. Colour is not the only sign: from one nat on, it is
bold or underlined. Pale tokens have no value: nothing predicts them, or they carry no loss.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from seal_nb.protocol import ScoredText
from seal_nb.storage import data_file
from seal_nb.views.plots import BLUE, DPI, GREY, INK, ORANGE, Chart, styled
from seal_nb.views.tables import SCRIPT, as_html, as_text, has_live_frontend

FULL_NATS = 4.0  # a change this large has the full colour
MARKED_NATS = 1.0
STRONGEST = 0.6  # opacity of the full colour: text stays readable on light and on dark background
COLUMNS = 88  # characters in a line of the picture
CHARACTER_IN, LINE_IN = 8 / DPI, 0.2  # of DejaVu Sans Mono at 8.5 points: 8 pixels
KINDS = ("gold", "passage", "train")
NO_VALUES = "This run has no values of single tokens. Train the self-edit below; the new one has them."
LEGEND = "blue, bold: more likely with the adapter; orange, underlined: less likely; pale: no loss, or no value"
CSS = f"<style>\n{data_file('inspector.css').read_text()}</style>"


def page(*parts: str) -> str:
    """HTML fragments with the inspector's style, which follows JupyterLab's theme."""
    return f'{CSS}<div class="seal-nb">{"".join(parts)}</div>'


def heading(text: str) -> str:
    return f"<h4>{escape(text)}</h4>"


def note(text: str) -> str:
    return f'<p class="sn-soft">{escape(text)}</p>'


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


def token_frame(scored: ScoredText) -> pd.DataFrame:
    """One row a token: ``text``, ``before`` and ``after`` (nats, without and with the adapter), ``change`` and its
    ``opacity``. A token without a value has no change, and without an adapter none has."""
    after = scored.adapter_logprobs or [None] * len(scored.tokens)
    table = pd.DataFrame({"text": scored.tokens, "before": scored.baseline_logprobs, "after": after})
    table = table.astype({"before": float, "after": float})
    change = table["after"] - table["before"]
    return table.assign(change=change, opacity=STRONGEST * (change.abs().fillna(0.0) / FULL_NATS).clip(upper=1.0))


class TokenTexts:
    """Texts token by token, as coloured HTML in JupyterLab, as a picture elsewhere: the ``TTTReply.token_logprobs`` of
    some ``kinds`` ("gold", "passage", "train"; empty: all, in this order). ``questions`` are pairs of question and gold
    answer in the order of the request; topic lines are left out of the headings."""

    def __init__(
        self, scored: Sequence[ScoredText], questions: Sequence[tuple[str, str]], kinds: Sequence[str] = KINDS
    ) -> None:
        self.texts: list[tuple[str, pd.DataFrame]] = []  # heading, tokens
        for one in sorted(scored, key=lambda one: (KINDS.index(one.kind), one.index)):
            if one.kind in (kinds or KINDS):
                names = {"passage": "The passage", "train": f"Train sequence {one.index + 1}"}
                name = names.get(one.kind) or questions[one.index][0].rpartition("\n")[2]
                tokens = token_frame(one)
                total = tokens["change"].sum(min_count=1)
                self.texts.append((name if pd.isna(total) else f"{name} ({total:+.1f} nats)", tokens))

    def _repr_mimebundle_(self, **_: Any) -> Any:
        if self.texts and not has_live_frontend():
            return self.chart()._repr_mimebundle_()
        return {"text/html": page(self.html()), "text/plain": self.in_words() or NO_VALUES}

    def in_words(self) -> str:
        return " ".join(f"{name}: {_in_words(tokens)}" for name, tokens in self.texts)

    def html(self) -> str:
        """Headings and coloured texts. Hovering over a token shows its numbers."""
        if not self.texts:
            return note(NO_VALUES)
        coloured = [(heading(name), "".join(map(_token_html, tokens.itertuples()))) for name, tokens in self.texts]
        return note(LEGEND) + "".join(f'{name}<div class="sn-tokens">{text}</div>' for name, text in coloured)

    @styled
    def chart(self) -> Chart:
        """The same as a picture; ``alt`` describes it in words."""
        chart = Chart()
        chart.set_layout_engine("none")
        axes = chart.add_axes((0, 0, 1, 1))
        row = 0
        for name, tokens in self.texts:
            axes.text(0, row + 0.5, name[:COLUMNS], fontsize=8.5, va="center", weight="bold", color=INK)
            row = _draw(axes, tokens, row + 1)
        axes.text(0, row + 0.5, LEGEND, fontsize=7.5, va="center", color=GREY)
        axes.set_axis_off()
        axes.set(xlim=(0, COLUMNS), ylim=(row + 1, 0))
        # Not laid out by matplotlib: a column of the axes is exactly as wide as a character.
        width, height = COLUMNS * CHARACTER_IN + 0.2, (row + 1) * LINE_IN + 0.15
        chart.set_size_inches(width, height)
        axes.set_position((0.1 / width, 0.075 / height, 1 - 0.2 / width, 1 - 0.15 / height))
        return chart.finished(self.in_words())


def _token_html(token: Any) -> str:
    text, change = escape(token.text), token.change
    if pd.isna(change):
        return f'<span class="sn-none">{text}</span>'
    colour = "0,114,178" if change > 0 else "230,159,0"
    numbers = f"{token.before:.2f} → {token.after:.2f} nats ({change:+.2f})"
    if abs(change) >= MARKED_NATS:
        text = f"<b>{text}</b>" if change > 0 else f"<u>{text}</u>"
    return f'<span title="{numbers}" style="background:rgba({colour},{token.opacity:.2f})">{text}</span>'


def _draw(axes: Axes, tokens: pd.DataFrame, row: int) -> int:
    """Draws the tokens of a text from this row on. Newlines end a row. Returns: the row after the text."""
    column = 0
    font: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 8.5, "va": "center"}
    for token in tokens.itertuples():
        weight = "bold" if token.change >= MARKED_NATS else "normal"
        colour = BLUE if token.change > 0 else ORANGE
        ink = GREY if pd.isna(token.change) else INK
        for piece in re.findall(rf"\n|[^\n]{{1,{COLUMNS}}}", token.text):  # several only if longer than a row
            if column and (piece == "\n" or column + len(piece) > COLUMNS):
                row, column = row + 1, 0
                piece = piece.lstrip(" ")
            if not piece.strip("\n"):
                continue
            axes.add_patch(Rectangle((column, row + 0.06), len(piece), 0.88, alpha=token.opacity, lw=0, fc=colour))
            axes.text(column, row + 0.5, piece, weight=weight, color=ink, **font)
            if token.change <= -MARKED_NATS:
                axes.plot([column, column + len(piece)], [row + 0.92] * 2, color=INK, linewidth=0.8)
            column += len(piece)
    return row + 1


def _in_words(tokens: pd.DataFrame) -> str:
    known = tokens.dropna(subset=["change"])
    if known.empty:
        return "no values."
    changes, largest = known["change"], known.loc[known["change"].abs().idxmax()]
    return (
        f"{sum(changes > 0)} of {len(changes)} tokens more likely with the adapter, {sum(changes < 0)} less; "
        f"{changes.sum():+.1f} nats in all, the largest change {largest['change']:+.1f} at {largest['text'].strip()!r}."
    )

"""HTML of the inspector: headings, tables (of `views.tables`), loss curves and coloured tokens. Every text is escaped.

A token is blue if the adapter made it more likely, orange if less. Colour is not the only sign: from one nat on, it is
bold or underlined. Pale tokens have no value: nothing predicts them, or they carry no loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from seal_nb.protocol import ScoredText
from seal_nb.storage import data_file
from seal_nb.views.tables import SCRIPT, as_html, as_text, has_live_frontend

FULL_NATS = 4.0  # a change this large has the full colour
MARKED_NATS = 1.0
STRONGEST = 0.6  # opacity of the full colour: text stays readable on light and on dark background
KEPT = 'style="white-space:pre-wrap"'  # also where style sheets are removed
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
    """Texts token by token as coloured HTML: the ``TTTReply.token_logprobs`` of some ``kinds`` ("gold", "passage",
    "train"; empty: all, in this order). ``questions`` are pairs of question and gold answer in the order of the
    request; topic lines are left out of the headings."""

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
        return {"text/html": page(self.html()), "text/plain": self.in_words() or NO_VALUES}

    def in_words(self) -> str:
        return " ".join(f"{name}: {_in_words(tokens)}" for name, tokens in self.texts)

    def html(self) -> str:
        """Headings and coloured texts. Hovering over a token shows its numbers."""
        if not self.texts:
            return note(NO_VALUES)
        coloured = [(heading(name), "".join(map(_token_html, tokens.itertuples()))) for name, tokens in self.texts]
        return note(LEGEND) + "".join(f'{name}<div class="sn-tokens" {KEPT}>{text}</div>' for name, text in coloured)


def _token_html(token: Any) -> str:
    text, change = escape(token.text), token.change
    if pd.isna(change):
        return f'<span class="sn-none">{text}</span>'
    colour = "0,114,178" if change > 0 else "230,159,0"
    numbers = f"{token.before:.2f} → {token.after:.2f} nats ({change:+.2f})"
    if abs(change) >= MARKED_NATS:
        text = f"<b>{text}</b>" if change > 0 else f"<u>{text}</u>"
    return f'<span title="{numbers}" style="background-color:rgba({colour},{token.opacity:.2f})">{text}</span>'


def _in_words(tokens: pd.DataFrame) -> str:
    known = tokens.dropna(subset=["change"])
    if known.empty:
        return "no values."
    changes, largest = known["change"], known.loc[known["change"].abs().idxmax()]
    return (
        f"{sum(changes > 0)} of {len(changes)} tokens more likely with the adapter, {sum(changes < 0)} less; "
        f"{changes.sum():+.1f} nats in all, the largest change {largest['change']:+.1f} at {largest['text'].strip()!r}."
    )

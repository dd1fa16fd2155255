"""Change in log-probability drawn over a text, token by token: coloured HTML, and the same as a picture.

Blue: more likely with the adapter than without; orange: less likely. Colour is not alone: from one nat on a
token is bold where it rose and underlined where it fell, and each carries its numbers. Pale tokens have no
value: nothing predicts them, or they carry no loss. Records of ``seal_nb.protocol`` in, nothing computed.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.patches import Rectangle

from seal_nb.inspector.html import heading, note, page
from seal_nb.protocol import ScoredText
from seal_nb.views.style import BLUE, DPI, GREY, INK, ORANGE, Chart, styled
from seal_nb.views.tables import somebody_looks_on

FULL_NATS = 4.0  # a change this large has the full colour
MARKED_NATS = 1.0
STRONGEST = 0.6  # opacity of the full colour: text stays readable on light and on dark ground
COLUMNS = 88  # characters in a line of the picture
CHARACTER_IN, LINE_IN = 5.12 / 72, 0.2  # of DejaVu Sans Mono at 8.5 points
NO_VALUES = "This run has no values for single tokens; train the self-edit below, and the new one has them."
LEGEND = "blue, bold: more likely with the adapter; orange, underlined: less likely; pale: no loss, or no value"


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    """One token; ``change`` in nats, None where there is no value."""

    text: str
    before: float | None
    after: float | None

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


def scored_tokens(scored: ScoredText) -> list[ScoredToken]:
    """The tokens of one text; without an adapter nothing changed and nothing is coloured."""
    after = scored.adapter_logprobs or [None] * len(scored.tokens)
    return [
        ScoredToken(text=text, before=b, after=a)
        for text, b, a in zip(scored.tokens, scored.baseline_logprobs, after, strict=True)
    ]


def tokens_html(scored: ScoredText) -> str:
    """The text with each token coloured; its numbers show on hovering."""
    return f'<span class="sn-tokens">{"".join(_token_html(one) for one in scored_tokens(scored))}</span>'


def tokens_page(texts: Sequence[tuple[str, ScoredText]]) -> str:
    """Coloured texts under their headings, with the legend, in the inspector's style."""
    parts = [f"{heading(name)}<div>{tokens_html(scored)}</div>" for name, scored in texts]
    return page(note(LEGEND), *parts)


def total_change(scored: ScoredText) -> float | None:
    """Sum over the text's tokens, in nats; None where there is no value."""
    known = [one.change for one in scored_tokens(scored) if one.change is not None]
    return sum(known) if known else None


class TokenTexts:
    """Texts with values for their tokens: coloured HTML where somebody looks on, else the picture."""

    def __init__(self, texts: Sequence[tuple[str, ScoredText]]) -> None:
        self.texts = texts

    def _repr_mimebundle_(self, **_: Any) -> Any:
        if not self.texts:
            return {"text/plain": NO_VALUES, "text/html": f"<p>{NO_VALUES}</p>"}
        if somebody_looks_on():
            return {"text/html": tokens_page(self.texts), "text/plain": token_chart(self.texts).alt}
        return token_chart(self.texts)._repr_mimebundle_()


@styled
def token_chart(texts: Sequence[tuple[str, ScoredText]]) -> Chart:
    """(heading, text) pairs below one another, each token on its colour: the twin of ``tokens_html``."""
    lines: list[tuple[str, list[tuple[int, str, ScoredToken]]]] = []
    for name, scored in texts:
        pieces = _wrapped(scored_tokens(scored))
        lines += [(name if at == 0 else "", line) for at, line in enumerate(pieces)]
    n_rows = len(lines) + sum(bool(name) for name, _ in lines) + 1
    chart = Chart(figsize=(COLUMNS * CHARACTER_IN + 0.2, n_rows * LINE_IN + 0.15), dpi=DPI)
    axes = chart.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(n_rows, 0)
    row = 0
    for name, line in lines:
        if name:
            axes.text(0, row + 0.5, name[:COLUMNS], fontsize=8.5, va="center", weight="bold", color=INK)
            row += 1
        for column, text, token in line:
            _draw(axes, column, row, text, token)
        row += 1
    axes.text(0, row + 0.5, LEGEND, fontsize=7.5, va="center", color=GREY)
    chart.alt = " ".join(f"{name}: {_in_words(scored)}" for name, scored in texts)
    return chart


def _draw(axes, column: int, row: int, text: str, token: ScoredToken) -> None:  # type: ignore[no-untyped-def]
    change = token.change
    if change is not None and _opacity(change) > 0.02:
        colour = BLUE if change > 0 else ORANGE
        axes.add_patch(
            Rectangle((column, row + 0.06), len(text), 0.88, facecolor=colour, alpha=_opacity(change), linewidth=0)
        )
    is_up, is_down = (change is not None and sign * change >= MARKED_NATS for sign in (1, -1))
    axes.text(
        column, row + 0.5, text, family="DejaVu Sans Mono", fontsize=8.5, va="center",
        weight="bold" if is_up else "normal",
        color=INK if change is not None else GREY,
    )  # fmt: skip
    if is_down:
        axes.plot([column, column + len(text)], [row + 0.92] * 2, color=INK, linewidth=0.8)


def _wrapped(tokens: Sequence[ScoredToken]) -> list[list[tuple[int, str, ScoredToken]]]:
    """Lines of (column, text, token); a token that does not fit goes to the next line, newlines are kept."""
    lines: list[list[tuple[int, str, ScoredToken]]] = [[]]
    column = 0
    for token in tokens:
        for number, part in enumerate(token.text.split("\n")):
            if number:
                lines.append([])
                column = 0
            if column and column + len(part) > COLUMNS:
                lines.append([])
                column, part = 0, part.lstrip(" ")
            for start in range(0, len(part), COLUMNS):  # longer than a line only where a token is
                if start:
                    lines.append([])
                piece = part[start : start + COLUMNS]
                lines[-1].append((0 if start else column, piece, token))
                column = len(piece) if start else column + len(piece)
    return [line for line in lines if line] or [[]]


def _opacity(change: float) -> float:
    return STRONGEST * min(1.0, abs(change) / FULL_NATS)


def _token_html(token: ScoredToken) -> str:
    text = html.escape(token.text)
    change = token.change
    if change is None:
        return f'<span class="sn-none">{text}</span>'
    colour = "0,114,178" if change > 0 else "230,159,0"
    numbers = f"{token.before:.2f} → {token.after:.2f} nats ({change:+.2f})"
    if abs(change) >= MARKED_NATS:
        text = f"<b>{text}</b>" if change > 0 else f"<u>{text}</u>"
    return f'<span title="{numbers}" style="background:rgba({colour},{_opacity(change):.2f})">{text}</span>'


def _in_words(scored: ScoredText) -> str:
    changes = [(one.text.strip(), one.change) for one in scored_tokens(scored) if one.change is not None]
    if not changes:
        return "no values."
    up, down = (sum(sign * change > 0 for _, change in changes) for sign in (1, -1))
    most = max(changes, key=lambda pair: abs(pair[1]))
    total = sum(change for _, change in changes)
    return (
        f"{up} of {len(changes)} tokens more likely with the adapter, {down} less; {total:+.1f} nats in all, "
        f"the largest change {most[1]:+.1f} at {most[0]!r}."
    )

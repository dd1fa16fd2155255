"""Change in log-probability of each token, drawn over the text: as coloured HTML, and as a picture.

Blue means more likely with the adapter, orange less likely. Colour is not the only sign: from one nat on, a token is
bold if it rose and underlined if it fell. Pale tokens have no value: nothing predicts them, or they carry no loss.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from seal_nb.inspector.html import heading, note, page
from seal_nb.protocol import ScoredText
from seal_nb.views.style import BLUE, DPI, GREY, INK, ORANGE, Chart, styled
from seal_nb.views.tables import has_live_frontend

FULL_NATS = 4.0  # a change this large has the full colour
MARKED_NATS = 1.0
STRONGEST = 0.6  # opacity of the full colour: text stays readable on light and on dark background
COLUMNS = 88  # characters in a line of the picture
CHARACTER_IN, LINE_IN = 8 / DPI, 0.2  # of DejaVu Sans Mono at 8.5 points: 8 pixels
NO_VALUES = "This run has no values of single tokens. Train the self-edit below; the new one has them."
LEGEND = "blue, bold: more likely with the adapter; orange, underlined: less likely; pale: no loss, or no value"


class Token(NamedTuple):
    text: str
    before: float | None  # nats, without the adapter; None: no value
    after: float | None

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def opacity(self) -> float:
        return STRONGEST * min(1.0, abs(self.change or 0.0) / FULL_NATS)


def tokens_of(scored: ScoredText) -> list[Token]:
    """The tokens of one text. Without an adapter no token has a change."""
    after = scored.adapter_logprobs or [None] * len(scored.tokens)
    return [Token(*one) for one in zip(scored.tokens, scored.baseline_logprobs, after, strict=True)]


def total_change(scored: ScoredText) -> float | None:
    """Sum over the text's tokens, in nats; None if no token has a value."""
    known = [one.change for one in tokens_of(scored) if one.change is not None]
    return sum(known) if known else None


def named_texts(
    scored: Sequence[ScoredText], questions: Sequence[tuple[str, str]], kinds: Sequence[str] = ()
) -> list[tuple[str, ScoredText]]:
    """Each text with a heading: gold answers first, then the passage, then train sequences.

    Args:
        scored: Texts with a value for each token, as in ``TTTReply.token_logprobs``.
        questions: (question, gold answer) in the order of the request. Topic lines are left out of the headings.
        kinds: Of "gold", "passage" and "train"; empty: all.
    """
    order = ("gold", "passage", "train")
    named = []
    for one in sorted(scored, key=lambda one: (order.index(one.kind), one.index)):
        names = {"passage": "The passage", "train": f"Train sequence {one.index + 1}"}
        name = questions[one.index][0].rpartition("\n")[2] if one.kind == "gold" else names[one.kind]
        change = total_change(one)
        if not kinds or one.kind in kinds:
            named.append((name if change is None else f"{name} ({change:+.1f} nats)", one))
    return named


class TokenTexts:
    """Shows texts token by token: coloured HTML in JupyterLab, a picture elsewhere.

    Args:
        texts: (heading, text) pairs, as ``named_texts`` gives them.
    """

    def __init__(self, texts: Sequence[tuple[str, ScoredText]]) -> None:
        self.texts = texts

    def _repr_mimebundle_(self, **_: Any) -> Any:
        if not self.texts:
            return {"text/html": page(note(NO_VALUES)), "text/plain": NO_VALUES}
        if has_live_frontend():
            return {"text/html": page(tokens_html(self.texts)), "text/plain": token_chart(self.texts).alt}
        return token_chart(self.texts)._repr_mimebundle_()


def tokens_html(texts: Sequence[tuple[str, ScoredText]]) -> str:
    """Headings and coloured texts. Hovering over a token shows its numbers."""
    if not texts:
        return note(NO_VALUES)
    coloured = [(heading(name), "".join(map(_token_html, tokens_of(scored)))) for name, scored in texts]
    return note(LEGEND) + "".join(f'{name}<div class="sn-tokens">{text}</div>' for name, text in coloured)


def _token_html(token: Token) -> str:
    text, change = escape(token.text), token.change
    if change is None:
        return f'<span class="sn-none">{text}</span>'
    colour = "0,114,178" if change > 0 else "230,159,0"
    numbers = f"{token.before:.2f} → {token.after:.2f} nats ({change:+.2f})"
    if abs(change) >= MARKED_NATS:
        text = f"<b>{text}</b>" if change > 0 else f"<u>{text}</u>"
    return f'<span title="{numbers}" style="background:rgba({colour},{token.opacity:.2f})">{text}</span>'


@styled
def token_chart(texts: Sequence[tuple[str, ScoredText]]) -> Chart:
    """The same as a picture; ``alt`` describes it in words."""
    drawn: list[tuple[int, int, str, Token | None]] = []  # row, column, text; None: a heading
    n_rows = 0
    for name, scored in texts:
        if name:
            drawn.append((n_rows, 0, name[:COLUMNS], None))
        placed = _placed(tokens_of(scored), n_rows + bool(name))
        drawn += placed
        n_rows = 1 + max((row for row, *_ in placed), default=n_rows)
    width, height = COLUMNS * CHARACTER_IN + 0.2, (n_rows + 1) * LINE_IN + 0.15
    chart = Chart(figsize=(width, height), dpi=DPI)
    chart.set_layout_engine("none")
    # Not laid out by matplotlib: a column of the axes is exactly as wide as a character.
    axes = chart.add_axes((0.1 / width, 0.075 / height, 1 - 0.2 / width, 1 - 0.15 / height))
    axes.set_axis_off()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(n_rows + 1, 0)
    for row, column, text, token in drawn:
        _draw(axes, row, column, text, token)
    axes.text(0, n_rows + 0.5, LEGEND, fontsize=7.5, va="center", color=GREY)
    chart.alt = " ".join(f"{name}: {_in_words(scored)}" for name, scored in texts)
    return chart


def _draw(axes: Axes, row: int, column: int, text: str, token: Token | None) -> None:
    if token is None:
        axes.text(column, row + 0.5, text, fontsize=8.5, va="center", weight="bold", color=INK)
        return
    change = token.change or 0.0
    colour = BLUE if change > 0 else ORANGE
    axes.add_patch(Rectangle((column, row + 0.06), len(text), 0.88, alpha=token.opacity, linewidth=0, facecolor=colour))
    font: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 8.5, "va": "center"}
    font |= {"weight": "bold" if change >= MARKED_NATS else "normal", "color": GREY if token.change is None else INK}
    axes.text(column, row + 0.5, text, **font)
    if change <= -MARKED_NATS:
        axes.plot([column, column + len(text)], [row + 0.92] * 2, color=INK, linewidth=0.8)


def _placed(tokens: Sequence[Token], row: int) -> list[tuple[int, int, str, Token]]:
    """Row, column, text and token. A token that does not fit goes to the next row; newlines end a row."""
    placed, column = [], 0
    for token in tokens:
        for piece in re.findall(rf"\n|[^\n]{{1,{COLUMNS}}}", token.text):  # several only if longer than a row
            if column and (piece == "\n" or column + len(piece) > COLUMNS):
                row, column = row + 1, 0
                piece = piece.lstrip(" ")
            if piece.strip("\n"):
                placed.append((row, column, piece, token))
                column += len(piece)
    return placed


def _in_words(scored: ScoredText) -> str:
    changes = [(change, one.text.strip()) for one in tokens_of(scored) if (change := one.change) is not None]
    if not changes:
        return "no values."
    largest, at = max(changes, key=lambda pair: abs(pair[0]))
    return (
        f"{sum(change > 0 for change, _ in changes)} of {len(changes)} tokens more likely with the adapter, "
        f"{sum(change < 0 for change, _ in changes)} less; {total_change(scored):+.1f} nats in all, "
        f"the largest change {largest:+.1f} at {at!r}."
    )

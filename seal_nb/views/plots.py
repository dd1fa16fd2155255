"""Figures of accuracy: by arm, ReST-EM round, passage, grader, swept setting and continual edit.

Plain records in, a matplotlib Figure out. Every axis names its unit and n, every figure draws the baseline it is
compared with, and every figure has its content in words (`Chart.alt`). Accuracies are fractions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from seal_nb.metrics import counted, written_value
from seal_nb.views.style import (
    BLUE,
    CYCLE,
    GREY,
    HEAT_MAP,
    INK,
    LIGHT,
    ORANGE,
    PALE,
    RED,
    SKY,
    Chart,
    new_chart,
    percent_ticks,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd

INTERVAL = "95 % interval"
Place = Literal["outside upper left", "outside right center"]

MOST_LINES = 30  # of single passages in one figure
MOST_DUMBBELLS = 40  # with more passages, the histogram is drawn


class Estimated(Protocol):
    """A mean with its 95 % interval over n passages (`seal_nb.metrics.Estimate` is one)."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def n(self) -> int: ...


@styled
def plot_accuracy(
    arms: Mapping[str, Estimated],
    *,
    baseline: Estimated | None = None,
    published: Mapping[str, float] | None = None,
    unit: str = "passages",
) -> Chart:
    """One bar per arm with its 95 % interval, and the model without adapter as a line.

    Args:
        arms: arm name → estimate, such as ``{run.arm: run.estimate()}``. Accuracies are fractions.
        baseline: the estimate of the model without adapter.
        published: arm name → published accuracy, drawn as a dashed mark; only for the published passages.
        unit: what n counts.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(1.2 + 0.46 * max(len(arms), 1))
    names, values = list(arms), list(arms.values())
    axes.barh(range(len(names)), [value.mean for value in values], color=BLUE, height=0.62)
    for row, value in enumerate(values):
        _interval(axes, value, row)
    _baseline_line(axes, baseline)
    for row, name in enumerate(names):
        if published and name in published:
            axes.plot([published[name]] * 2, [row - 0.42, row + 0.42], "--", color=ORANGE, linewidth=2.2)
    if published and set(published) & set(names):
        axes.plot([], [], "--", color=ORANGE, linewidth=2.2, label="published")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    accuracy_axis(axes, "x", f"QA accuracy ({_n_label(values, unit)}, {INTERVAL})")
    _limit_to(axes, [value.high for value in values] + ([baseline.high] if baseline else []))
    legend_outside(chart)
    chart.alt = _arms_in_words(arms, baseline)
    return chart


@styled
def plot_rounds(
    series: Mapping[str, Sequence[Estimated | None]],
    *,
    baseline: Estimated | None = None,
    per_passage: Sequence[Sequence[float]] = (),
    published: Mapping[str, Sequence[float]] | None = None,
    unit: str = "passages",
) -> Chart:
    """Accuracy by ReST-EM round with 95 % intervals; round 0 is the base model.

    Args:
        series: name (such as a prompt key) → an estimate per round, None for a round that was not run. One line each.
        baseline: the estimate of the model without adapter.
        per_passage: for each passage its accuracy in each round: thin lines, if there is one series and at most 30.
        published: name → published accuracy per round, dashed; only for the published passages.
        unit: what n counts.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(3.6)
    lines = per_passage if len(series) == 1 and len(per_passage) <= MOST_LINES else []
    for accuracies in lines:
        axes.plot(range(len(accuracies)), accuracies, color=LIGHT, linewidth=0.9, zorder=1)
    _baseline_line(axes, baseline, vertical=False)
    shift = 0.04  # so that the intervals of several lines do not cover each other
    for number, (name, estimates) in enumerate(series.items()):
        known = [(k + shift * (number - (len(series) - 1) / 2), e) for k, e in enumerate(estimates) if e is not None]
        errorbars(axes, [x for x, _ in known], [e for _, e in known], CYCLE[number % len(CYCLE)], name)
    for number, name in enumerate(series):
        values = (published or {}).get(name)
        if values:
            label, colour = (
                (f"{name}, published", CYCLE[number % len(CYCLE)]) if len(series) > 1 else ("published", GREY)
            )
            axes.plot(range(len(values)), values, "--o", color=colour, mfc="white", label=label)
    n_rounds = max(
        [len(estimates) for estimates in series.values()] + [len(v) for v in (published or {}).values()] + [1]
    )
    axes.set_xticks(range(n_rounds), ["0\n(base model)", *(str(k) for k in range(1, n_rounds))])
    axes.set_xlim(-0.3, n_rounds - 0.7)
    axes.set_xlabel("ReST-EM round")
    run = [estimate for estimates in series.values() for estimate in estimates if estimate is not None]
    accuracy_axis(axes, "y", f"QA accuracy\n({_n_label(run, unit)}, {INTERVAL})")
    axes.set_ylim(bottom=0)
    if lines:
        axes.plot([], [], color=LIGHT, linewidth=0.9, label="one passage")
    legend_outside(chart, "outside right center", 1)
    chart.alt = "QA accuracy by ReST-EM round. " + " ".join(
        f"{name}: " + ", ".join("not run" if e is None else f"{e.mean:.1%}" for e in estimates) + "."
        for name, estimates in series.items()
    )
    return chart


@styled
def plot_gains(titles: Sequence[str], baseline: Sequence[float | None], adapter: Sequence[float | None]) -> Chart:
    """One line per passage from baseline to adapter accuracy, the largest gain on top.

    Args:
        titles: (P,) passage titles.
        baseline: (P,) accuracies without adapter, None for a passage without a graded answer (left out).
        adapter: (P,) accuracies with adapter.

    Returns:
        A matplotlib Figure; a histogram of the gains for more than 40 passages.
    """
    sides = zip(titles, baseline, adapter, strict=True)
    known = [(title, b, a) for title, b, a in sides if b is not None and a is not None]
    return _gains_of_known([t for t, _, _ in known], [b for _, b, _ in known], [a for _, _, a in known])


def _gains_of_known(titles: list[str], baseline: list[float], adapter: list[float]) -> Chart:
    if len(titles) > MOST_DUMBBELLS:
        return plot_gain_histogram([after - before for before, after in zip(baseline, adapter, strict=True)])
    chart, axes = new_chart(1.3 + 0.26 * max(len(titles), 1))
    order = sorted(range(len(titles)), key=lambda i: (baseline[i] - adapter[i], -adapter[i], i))
    for row, i in enumerate(order):
        colour = BLUE if adapter[i] > baseline[i] else RED if adapter[i] < baseline[i] else GREY
        axes.plot([baseline[i], adapter[i]], [row, row], color=colour, linewidth=2.2, zorder=1)
        axes.plot([baseline[i]], [row], "o", color=INK, mfc="white", zorder=2)
        axes.plot([adapter[i]], [row], "o", color=colour, zorder=3)
    axes.plot([], [], "o", color=INK, mfc="white", linestyle="none", label="baseline")
    for colour, label in ((BLUE, "adapter, gain"), (GREY, "no change"), (RED, "loss")):
        axes.plot([], [], "o", color=colour, linestyle="none", label=label)
    axes.set_yticks(range(len(order)), [short(titles[i]) for i in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    accuracy_axis(axes, "x", f"QA accuracy of one passage (n = {len(titles)} passages)")
    axes.set_xlim(-0.03, 1.03)
    legend_outside(chart)
    gained = sum(after > before for before, after in zip(baseline, adapter, strict=True))
    lost = sum(after < before for before, after in zip(baseline, adapter, strict=True))
    chart.alt = f"Of {len(titles)} passages {gained} gain accuracy with the adapter, {lost} lose."
    return chart


@styled
def plot_gain_histogram(gains: Sequence[float]) -> Chart:
    """How many passages gained how much, in bins of ten points, with zero and the mean."""
    chart, axes = new_chart(2.8)
    edges = [tenth / 10 - 0.05 for tenth in range(-10, 12)]  # so that zero is the middle of a bin
    axes.hist(gains, bins=edges, color=SKY, edgecolor="white", linewidth=0.8)
    mean = sum(gains) / len(gains) if gains else 0.0
    axes.axvline(0, color=INK, linewidth=1, linestyle=":", label="no gain")
    if gains:
        axes.axvline(mean, color=ORANGE, linewidth=1.8, label=f"mean {mean:+.1%}")
    widest = max([abs(gain) for gain in gains] + [0.25]) + 0.1
    axes.set_xlim(-widest, widest)
    axes.set_xlabel(f"gain = adapter − baseline accuracy of a passage (n = {len(gains)} passages)")
    axes.xaxis.set_major_formatter(percent_ticks())
    axes.set_ylabel("passages")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend_outside(chart)
    chart.alt = f"Histogram of the gains of {len(gains)} passages, mean {mean:+.1%}."
    return chart


def _interval(axes: Axes, value: Estimated, row: float) -> None:
    """The interval around a bar's end, and the mean as a number to its right."""
    below, above = max(value.mean - value.low, 0.0), max(value.high - value.mean, 0.0)
    axes.errorbar(value.mean, row, xerr=[[below], [above]], color=INK, capsize=3, linewidth=1.2)
    axes.annotate(f"{value.mean:.1%}", (value.high, row), (6, 0), textcoords="offset points", va="center", fontsize=9)


def errorbars(axes: Axes, xs: Sequence[float], estimates: Sequence[Estimated], colour: str, label: str) -> None:
    """A line through the means with the 95 % intervals."""
    reach = [[max(one.mean - one.low, 0.0) for one in estimates], [max(one.high - one.mean, 0.0) for one in estimates]]
    axes.errorbar(
        xs, [one.mean for one in estimates], yerr=reach, fmt="-o", color=colour, capsize=3, label=label or None
    )


def _baseline_line(axes: Axes, baseline: Estimated | None, *, vertical: bool = True) -> None:
    if baseline is None:
        return
    draw_line, draw_band = (axes.axvline, axes.axvspan) if vertical else (axes.axhline, axes.axhspan)
    draw_line(baseline.mean, color=INK, linestyle=":", linewidth=1.4, label=f"baseline, {baseline.mean:.1%}")
    draw_band(baseline.low, baseline.high, color=GREY, alpha=0.15, linewidth=0)


def gaps(values: Iterable[float | None]) -> list[float]:
    """None as NaN: a gap in a line."""
    return [math.nan if value is None else value for value in values]


def accuracy_axis(axes: Axes, which: str, label: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(label)
    axis.set_major_formatter(percent_ticks())
    axis.set_major_locator(MaxNLocator(6))
    axis.grid(True)


def _limit_to(axes: Axes, highest: Sequence[float]) -> None:
    """Leave room for the number to the right of the longest bar."""
    axes.set_xlim(0, max([*highest, 0.1]) * 1.16)


def legend_outside(chart: Chart, place: Place = "outside upper left", columns: int = 4) -> None:
    """The legend outside the axes, so that it covers no data."""
    if chart.axes[0].get_legend_handles_labels()[0]:
        chart.legend(loc=place, ncols=columns, handletextpad=0.4, columnspacing=1.4)


def _n_label(values: Sequence[Estimated], unit: str) -> str:
    counts = sorted({value.n for value in values})
    return f"n = {' to '.join(str(n) for n in (counts if len(counts) < 3 else (counts[0], counts[-1])))} {unit}"


def short(text: str, longest: int = 34) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _arms_in_words(arms: Mapping[str, Estimated], baseline: Estimated | None) -> str:
    parts = [f"{name} {e.mean:.1%} ({e.low:.1%} to {e.high:.1%})" for name, e in arms.items()]
    against = f" Baseline: {baseline.mean:.1%}." if baseline else ""
    return "QA accuracy with 95 % interval: " + "; ".join(parts) + "." + against


@styled
def plot_graders(graders: "pd.DataFrame") -> Chart:
    """One line per grader from the accuracy without adapter to the accuracy with it; its length is the gain.

    Args:
        graders: the DataFrame of ``compare_graders``; rows without both accuracies are left out.

    Returns:
        A matplotlib Figure.
    """
    shown = graders.dropna(subset=["baseline", "adapter"]).to_dict("records") if len(graders) else []
    chart, axes = new_chart(1.1 + 0.32 * max(len(shown), 1))
    for place, row in enumerate(reversed(shown)):
        before, after = row["baseline"], row["adapter"]
        axes.plot([before, after], [place, place], color=PALE, linewidth=4, zorder=1)
        axes.scatter([before], [place], color=GREY, zorder=2, label="baseline" if not place else None)
        axes.scatter([after], [place], color=BLUE, zorder=3, label="with adapter" if not place else None)
        axes.annotate(
            f"{100 * (after - before):+.1f}", (max(before, after), place), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [row["grader"] for row in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.xaxis.set_major_formatter(percent_ticks())
    axes.margins(x=0.12)
    axes.set_xlabel(
        f"answers called correct (n = {max((row['n'] for row in shown), default=0)}); number: gain in points"
    )
    axes.grid(axis="x")
    if shown:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    chart.alt = (
        "; ".join(f"{row['grader']}: {row['baseline']:.1%} to {row['adapter']:.1%}" for row in shown)
        or "No grader has judged both arms."
    )
    return chart


@styled
def plot_sweep(rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, unit: str = "passages") -> Chart:
    """Accuracy against the first swept setting; one line per combination of the other settings.

    Args:
        rows: one per point, with ``label``, ``estimate`` (None: left out) and the value of each setting.
        names: the swept settings. The x axis is the first, logarithmic if it spans a factor of ten; values that are not
            numbers are placed in order of appearance.
        unit: what n counts.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(3.4)
    known = [row for row in rows if row["estimate"] is not None]
    values = list(dict.fromkeys(_key(row[names[0]]) for row in known))
    numeric = all(isinstance(value, (int, float)) for value in values)
    place = {value: float(value) if numeric else float(at) for at, value in enumerate(values)}
    if numeric and values and min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_xscale("log")
    for number, (label, own) in enumerate(_lines(known, names[1:]).items()):
        own = sorted(own, key=lambda row: place[_key(row[names[0]])])
        xs = [place[_key(row[names[0]])] for row in own]
        errorbars(axes, xs, [row["estimate"] for row in own], CYCLE[number % len(CYCLE)] if label else BLUE, label)
    axes.set_xticks([place[value] for value in values], [written_value(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(names[0])
    n = known[0]["estimate"].n if known else 0
    accuracy_axis(axes, "y", f"QA accuracy\n(n = {n} {unit}, {INTERVAL})")
    axes.set_ylim(bottom=0)
    if len(names) > 1:
        legend_outside(chart, "outside right center", 1)
    chart.alt = "QA accuracy by setting: " + "; ".join(f"{row['label']}: {row['estimate'].mean:.1%}" for row in known)
    return chart


def _lines(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(", ".join(f"{name} {written_value(row[name])}" for name in names), []).append(row)
    return lines


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@styled
def plot_continual_matrix(matrix: Sequence[Sequence[float | None]], *, n_sequences: int) -> Chart:
    """The accuracy matrix as a heat map; the passage of each edit is outlined, cells that were not asked are blank.

    Args:
        matrix: (K+1)×K accuracies, such as ``ContinualRun.mean``.
        n_sequences: number of sequences that the matrix is the mean of.

    Returns:
        A matplotlib Figure.
    """
    k = len(matrix) - 1
    chart, axes = new_chart(1.6 + 0.36 * (k + 1), 3.4 + 0.5 * k)
    asked = asked_cells(matrix)
    image = axes.imshow(asked, cmap=HEAT_MAP, vmin=0, vmax=max(float(asked.max() or 0.0), 0.1), aspect="auto")
    axes.set_facecolor("#F2F2F2")
    _write_cells(axes, asked)
    for step in range(1, k + 1):
        axes.add_patch(Rectangle((step - 1.5, step - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2))
    axes.set_yticks(range(k + 1), ["never edited", *(f"after edit {step}" for step in range(1, k + 1))])
    axes.set_xticks(range(k), [str(column + 1) for column in range(k)])
    axes.set_xlabel("passage, in order of editing\n(outlined: just edited; blank: not asked)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = chart.colorbar(image, ax=axes, format=percent_ticks())
    bar.set_label(f"QA accuracy\n(mean, n = {n_sequences} sequences)")
    last = asked[k].mean() if k else 0.0
    chart.alt = (
        f"Accuracy after each of {k} edits over {n_sequences} sequences: never edited {asked[0].mean():.1%}, "
        f"all {k} passages after the last edit {last:.1%}."
    )
    return chart


@styled
def plot_continual_curve(
    seen: Sequence[Estimated],
    never_edited: Iterable[float | None],
    *,
    just_edited: Iterable[float | None] = (),
    published: Sequence[float] = (),
) -> Chart:
    """Mean accuracy on the passages edited so far by number of edits, and of the unedited model on the same passages.

    Args:
        seen: (K,) estimates after edit 1 … K, n = sequences.
        never_edited: (K,) accuracy of the unedited model on the same passages.
        just_edited: (K,) accuracy on the passage of each edit, right after it.
        published: (K,) as `seen`, of the published run.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(3.3)
    edits = range(1, len(seen) + 1)
    before = gaps(never_edited)
    axes.plot(edits, before, ":", color=INK, linewidth=1.6, label="never edited, same passages")
    if just := gaps(just_edited):
        axes.plot(edits, just, "s", color=ORANGE, linestyle="none", label="passage just edited")
    errorbars(axes, edits, seen, BLUE, "all passages so far")
    if published:
        axes.plot(range(1, len(published) + 1), published, "--o", color=GREY, mfc="white", label="published")
    axes.set_xlabel("number of edits")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"QA accuracy\n(n = {seen[0].n if seen else 0} sequences, {INTERVAL})")
    axes.yaxis.set_major_formatter(percent_ticks())
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=PALE)
    legend_outside(chart, columns=2)
    chart.alt = "Accuracy on the passages edited in so far: " + "; ".join(
        f"after {counted(t, 'edits')} {e.mean:.1%}, never edited {unedited:.1%}"
        for t, (e, unedited) in enumerate(zip(seen, before, strict=True), 1)
    )
    return chart


def asked_cells(matrix: Sequence[Sequence[float | None]]) -> np.ma.MaskedArray:
    """(K+1, K) accuracies; masked where the passage was not asked or not graded."""
    values = np.array([[np.nan if cell is None else cell for cell in row] for row in matrix], dtype=float)
    rows, columns = np.indices(values.shape)
    return np.ma.array(values, mask=((rows >= 1) & (columns >= rows)) | np.isnan(values))


def _write_cells(axes: Axes, asked: np.ma.MaskedArray) -> None:
    """The numbers in the cells, dark on light and light on dark."""
    middle = (asked.max() or 0.1) / 2
    for (row, column), value in np.ndenumerate(asked.filled(np.nan)):
        if not np.isnan(value):
            colour = "white" if value < middle else INK
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)

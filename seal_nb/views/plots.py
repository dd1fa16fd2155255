"""Every figure of an experiment: accuracy, rewards, losses, continual edits, graders and log-probabilities.

Plain records in, a matplotlib Figure out. Every axis names its unit and n, every figure draws the baseline it is
compared with, and every figure has its content in words (`Chart.alt`). Accuracies are fractions.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from seal_nb.metrics import Estimate, counted, written_value
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
    legend_outside,
    new_chart,
    percent_ticks,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd

MOST_LINES = 30  # of single passages in one figure
MOST_DUMBBELLS = 40  # with more passages, the histogram is drawn
LONGEST_NAME = 34  # characters


@styled
def plot_accuracy(
    arms: Mapping[str, Estimate], *, baseline: Estimate | None = None, published: Mapping[str, float] | None = None
) -> Chart:
    """One bar per arm with its 95 % interval, and the model without adapter as a line.

    Args:
        arms: arm name → estimate, such as ``{run.arm: run.estimate()}``. Accuracies are fractions.
        baseline: the estimate of the model without adapter.
        published: arm name → published accuracy, drawn as a dashed mark; only for the published passages.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(1.2 + 0.46 * max(len(arms), 1))
    known = {name: value for name, value in (published or {}).items() if name in arms}
    means, intervals = [one.mean for one in arms.values()], _reach(arms.values())
    axes.barh(range(len(arms)), means, xerr=intervals, color=BLUE, height=0.62, ecolor=INK, capsize=3)
    for row, (name, one) in enumerate(arms.items()):
        _number(axes, f"{one.mean:.1%}", one.high, row)
        if name in known:
            label = "published" if name == next(iter(known)) else None
            axes.plot([known[name]] * 2, [row - 0.42, row + 0.42], "--", color=ORANGE, linewidth=2.2, label=label)
    if baseline:
        axes.axvline(baseline.mean, color=INK, linestyle=":", linewidth=1.4, label=f"baseline, {baseline.mean:.1%}")
        axes.axvspan(baseline.low, baseline.high, color=GREY, alpha=0.15, linewidth=0)
    _name_rows(axes, arms)
    _scale(axes.xaxis, _accuracy_label(arms.values(), between=" "), percent=True)
    highest = [one.high for one in arms.values()] + ([baseline.high] if baseline else [])
    axes.set_xlim(0, max([*highest, 0.1]) * 1.16)  # room for the number to the right of the longest bar
    legend_outside(chart)
    bars = [f"{name} {one.mean:.1%} ({one.low:.1%} to {one.high:.1%})" for name, one in arms.items()]
    against = f" Baseline: {baseline.mean:.1%}." if baseline else ""
    chart.alt = f"QA accuracy with 95 % interval: {'; '.join(bars)}.{against}"
    return chart


@styled
def plot_rounds(
    series: Mapping[str, Sequence[Estimate | None]],
    *,
    baseline: Estimate | None = None,
    per_passage: Sequence[Sequence[float]] = (),
    published: Mapping[str, Sequence[float]] | None = None,
) -> Chart:
    """Accuracy by ReST-EM round with 95 % intervals; round 0 is the base model.

    Args:
        series: name (such as a prompt key) → an estimate per round, None for a round that was not run. One line each.
        baseline: the estimate of the model without adapter.
        per_passage: for each passage its accuracy in each round: thin lines, if there is one series and at most 30.
        published: name → published accuracy per round, dashed; only for the published passages.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(3.6)
    is_alone, published = len(series) == 1, published or {}
    for at, accuracies in enumerate(per_passage if is_alone and len(per_passage) <= MOST_LINES else []):
        label = None if at else "one passage"
        axes.plot(range(len(accuracies)), accuracies, color=LIGHT, linewidth=0.9, zorder=1, label=label)
    if baseline:
        axes.axhline(baseline.mean, color=INK, linestyle=":", linewidth=1.4, label=f"baseline, {baseline.mean:.1%}")
        axes.axhspan(baseline.low, baseline.high, color=GREY, alpha=0.15, linewidth=0)
    for number, (name, estimates) in enumerate(series.items()):
        colour, shift = _colour(number), 0.04 * (number - (len(series) - 1) / 2)  # intervals side by side
        run = {k + shift: one for k, one in enumerate(estimates) if one is not None}
        _estimates(axes, list(run), list(run.values()), colour, name)
        if values := published.get(name):
            label, colour = ("published", GREY) if is_alone else (f"{name}, published", colour)
            axes.plot(range(len(values)), values, "--o", color=colour, mfc="white", label=label)
    n_rounds = max(map(len, [*series.values(), *published.values(), [None]]))
    axes.set_xticks(range(n_rounds), ["0\n(base model)", *map(str, range(1, n_rounds))])
    axes.set_xlim(-0.3, n_rounds - 0.7)
    axes.set_xlabel("ReST-EM round")
    _scale(axes.yaxis, _accuracy_label(one for estimates in series.values() for one in estimates if one), percent=True)
    axes.set_ylim(bottom=0)
    legend_outside(chart, "outside right center", 1)
    chart.alt = "QA accuracy by ReST-EM round. " + " ".join(
        f"{name}: " + ", ".join("not run" if one is None else f"{one.mean:.1%}" for one in estimates) + "."
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
    gains = [a - b for _, b, a in known]
    if len(known) > MOST_DUMBBELLS:
        return plot_gain_histogram(gains)
    known.sort(key=lambda one: (one[1] - one[2], -one[2]))
    chart, axes = new_chart(1.3 + 0.26 * max(len(known), 1))
    labels = ("baseline", "adapter, gain", "no change", "loss")
    _dumbbells(axes, [short(t) for t, _, _ in known], [b for _, b, _ in known], [a for _, _, a in known], labels)
    _scale(axes.xaxis, f"QA accuracy of one passage (n = {len(known)} passages)", percent=True)
    axes.set_xlim(-0.03, 1.03)
    legend_outside(chart)
    gained, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    chart.alt = f"Of {len(known)} passages {gained} gain accuracy with the adapter, {lost} lose."
    return chart


@styled
def plot_gain_histogram(gains: Sequence[float]) -> Chart:
    """How many passages gained how much, in bins of ten points, with zero and the mean."""
    chart, axes = new_chart(2.8)
    edges = [tenth / 10 - 0.05 for tenth in range(-10, 12)]  # so that zero is the middle of a bin
    axes.hist(gains, bins=edges, color=SKY, edgecolor="white", linewidth=0.8)
    mean = sum(gains) / len(gains)
    axes.axvline(0, color=INK, linewidth=1, linestyle=":", label="no gain")
    axes.axvline(mean, color=ORANGE, linewidth=1.8, label=f"mean {mean:+.1%}")
    widest = max(0.25, *map(abs, gains)) + 0.1
    axes.set_xlim(-widest, widest)
    label = f"gain = adapter − baseline accuracy of a passage (n = {len(gains)} passages)"
    _scale(axes.xaxis, label, percent=True, grid=False)
    axes.set_ylabel("passages")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend_outside(chart)
    chart.alt = f"Histogram of the gains of {len(gains)} passages, mean {mean:+.1%}."
    return chart


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
    before, after = ([row[side] for row in shown] for side in ("baseline", "adapter"))
    labels = ("baseline", "with adapter, gain", "no change", "loss")
    _dumbbells(axes, [row["grader"] for row in shown], before, after, labels)
    for row, ends in enumerate(zip(before, after, strict=True)):
        _number(axes, f"{100 * (ends[1] - ends[0]):+.1f}", max(ends), row)
    n = max((row["n"] for row in shown), default=0)
    _scale(axes.xaxis, f"answers called correct (n = {n}); number: gain in points", percent=True)
    axes.margins(x=0.12)
    legend_outside(chart)
    words = [f"{row['grader']}: {row['baseline']:.1%} to {row['adapter']:.1%}" for row in shown]
    chart.alt = "; ".join(words) or "No grader has judged both arms."
    return chart


@styled
def plot_gold_logprobs(questions: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Chart:
    """Log-probability of each gold answer without and with the adapter: it changes before a verdict does.

    Args:
        questions: one label for each gold answer.
        before: log-probabilities without the adapter, in nats.
        after: with the adapter.
    """
    chart, axes = new_chart(1.4 + 0.42 * max(len(questions), 1))
    labels = ("without adapter", "with adapter, more likely", "as likely", "less likely")
    _dumbbells(axes, [fill(short(question, 76), 38) for question in questions], before, after, labels)
    _scale(axes.xaxis, f"log-probability of gold answer\n(nats, n = {len(questions)} questions)")
    legend_outside(chart)
    risen = sum(high > low for low, high in zip(before, after, strict=True))
    chart.alt = f"With the adapter {risen} of {len(questions)} gold answers are more likely than without."
    return chart


@styled
def plot_rewards(
    titles: Sequence[str],
    rewards: Sequence[Sequence[float | None]],
    chosen: Sequence[Sequence[int]],
    baseline: Sequence[float | None],
) -> Chart:
    """The reward (mean adapter accuracy) of each self-edit, and which were chosen.

    Args:
        titles: (P,) passage titles.
        rewards: for each passage the reward of each self-edit, None if it could not be graded.
        chosen: for each passage the indices of the chosen self-edits; empty if the passage is dropped.
        baseline: (P,) accuracy without adapter.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(1.4 + 0.3 * max(len(titles), 1))
    _dots(axes, titles, rewards, baseline, chosen, labels=("self-edit", "chosen", "baseline"))
    _scale(axes.xaxis, f"reward: mean adapter accuracy (n = {len(titles)} passages)", percent=True)
    axes.set_xlim(-0.03, 1.03)
    legend_outside(chart)
    kept = sum(map(bool, chosen))
    chart.alt = f"Rewards of the self-edits of {len(titles)} passages; self-edits of {kept} of them are kept."
    return chart


@styled
def plot_self_edit_lengths(
    titles: Sequence[str], words_P_E: Sequence[Sequence[int]], passage_words: Sequence[int]
) -> Chart:
    """For each passage the number of words of each self-edit, and of the passage itself."""
    chart, axes = new_chart(1.3 + 0.3 * max(len(titles), 1))
    every = [range(len(words)) for words in words_P_E]
    _dots(axes, titles, words_P_E, passage_words, every, labels=("", "self-edit", "the passage itself"))
    _scale(axes.xaxis, f"words (n = {len(titles)} passages, {sum(map(len, words_P_E))} self-edits)")
    axes.set_xlim(left=0)
    legend_outside(chart)
    words = [f"{title} {', '.join(map(str, own))}" for title, own in zip(titles, words_P_E, strict=True)]
    chart.alt = f"Words of the self-edits of each passage: {'; '.join(words)}"
    return chart


@styled
def plot_losses(curves: Mapping[str, Sequence[float | None]], *, step: str = "epoch") -> Chart:
    """Training loss of each adapter by epoch; more than six adapters are drawn pale, with their mean.

    Args:
        curves: adapter name → mean loss per epoch, in nats per token; None where it is not known.
        step: name of the x axis, if it is not epochs.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(2.9)
    known = {name: _gaps(losses) for name, losses in curves.items()}
    lines = [(short(name), losses, _colour(at)) for at, (name, losses) in enumerate(known.items())]
    if len(known) > len(CYCLE):
        for at, losses in enumerate(known.values()):
            label = None if at else f"one of {len(known)}"
            axes.plot(range(1, len(losses) + 1), losses, color=LIGHT, linewidth=0.9, label=label)
        shared = min(map(len, known.values()))
        lines = [("mean", np.nanmean([losses[:shared] for losses in known.values()], axis=0).tolist(), BLUE)]
    for name, losses, colour in lines:
        axes.plot(range(1, len(losses) + 1), losses, "-o", color=colour, markersize=4, label=name)
    n_adapters = counted(len(curves), "adapters")
    axes.set_xlabel(f"{step} (n = {n_adapters})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale(axes.yaxis, "training loss (nats per token)")
    axes.set_ylim(bottom=0)
    legend_outside(chart, "outside right center", 1)
    described = [(name, losses) for name, losses in known.items() if losses][: len(CYCLE)]
    chart.alt = f"Training loss of {n_adapters} by {step}. " + " ".join(
        f"{name}: {losses[0]:.2f} to {losses[-1]:.2f}." for name, losses in described
    )
    return chart


@styled
def plot_sweep(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart:
    """Accuracy against the first swept setting; one line per combination of the other settings.

    Args:
        rows: one per point, with ``label``, ``estimate`` (None: left out) and the value of each setting.
        names: the swept settings. The x axis is the first, logarithmic if it spans a factor of ten; values that are not
            numbers are placed in order of appearance.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(3.4)
    known = [row for row in rows if row["estimate"] is not None]
    values = {written_value(row[names[0]]): row[names[0]] for row in known}
    is_numeric = all(isinstance(value, (int, float)) for value in values.values())
    place = {text: value if is_numeric else at for at, (text, value) in enumerate(values.items())}
    lines: dict[str, dict[float, Estimate]] = {}
    for row in known:
        label = ", ".join(f"{name} {written_value(row[name])}" for name in names[1:])
        lines.setdefault(label, {})[place[written_value(row[names[0]])]] = row["estimate"]
    for number, (label, own) in enumerate(lines.items()):
        xs = sorted(own)
        _estimates(axes, xs, [own[x] for x in xs], _colour(number), label)
    if is_numeric and values and 0 < 10 * min(place.values()) <= max(place.values()):
        axes.set_xscale("log")
    axes.set_xticks(list(place.values()), list(place))
    axes.minorticks_off()
    axes.set_xlabel(names[0])
    _scale(axes.yaxis, _accuracy_label(row["estimate"] for row in known), percent=True)
    axes.set_ylim(bottom=0)
    legend_outside(chart, "outside right center", 1)
    chart.alt = "QA accuracy by setting: " + "; ".join(f"{row['label']}: {row['estimate'].mean:.1%}" for row in known)
    return chart


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
    highest = max(float(asked.max() or 0.0), 0.1)
    image = axes.imshow(asked, cmap=HEAT_MAP, vmin=0, vmax=highest, aspect="auto")
    axes.set_facecolor("#F2F2F2")
    for (row, column), value in np.ma.ndenumerate(asked):
        colour = "white" if value < highest / 2 else INK  # light on dark and dark on light
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)
    for step in range(k):
        axes.add_patch(Rectangle((step - 0.5, step + 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2))
    axes.set_yticks(range(k + 1), ["never edited", *(f"after edit {step + 1}" for step in range(k))])
    axes.set_xticks(range(k), [str(column + 1) for column in range(k)])
    axes.set_xlabel("passage, in order of editing\n(outlined: just edited; blank: not asked)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = chart.colorbar(image, ax=axes, format=percent_ticks())
    bar.set_label(f"QA accuracy\n(mean, n = {n_sequences} sequences)")
    chart.alt = (
        f"Accuracy after each of {k} edits over {n_sequences} sequences: never edited {asked[0].mean():.1%}, "
        f"all {k} passages after the last edit {asked[k].mean() if k else 0.0:.1%}."
    )
    return chart


@styled
def plot_continual_curve(
    seen: Sequence[Estimate], never_edited: Iterable[float | None], *, just_edited: Iterable[float | None] = ()
) -> Chart:
    """Mean accuracy on the passages edited so far by number of edits, and of the unedited model on the same passages.

    Args:
        seen: (K,) estimates after edit 1 … K, n = sequences.
        never_edited: (K,) accuracy of the unedited model on the same passages.
        just_edited: (K,) accuracy on the passage of each edit, right after it.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(3.3)
    edits, before = range(1, len(seen) + 1), _gaps(never_edited)
    axes.plot(edits, before, ":", color=INK, linewidth=1.6, label="never edited, same passages")
    if just := _gaps(just_edited):
        axes.plot(edits, just, "s", color=ORANGE, label="passage just edited")
    _estimates(axes, edits, seen, BLUE, "all passages so far")
    axes.set_xlabel("number of edits")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale(axes.yaxis, _accuracy_label(seen), percent=True)
    axes.set_ylim(bottom=0)
    legend_outside(chart, columns=2)
    chart.alt = "Accuracy on the passages edited in so far: " + "; ".join(
        f"after {counted(t, 'edits')} {one.mean:.1%}, never edited {unedited:.1%}"
        for t, (one, unedited) in enumerate(zip(seen, before, strict=True), 1)
    )
    return chart


def asked_cells(matrix: Sequence[Sequence[float | None]]) -> np.ma.MaskedArray:
    """(K+1, K) accuracies; masked where the passage was not asked or not graded."""
    values = np.array(matrix, dtype=float)  # None becomes NaN
    rows, columns = np.indices(values.shape)
    return np.ma.array(values, mask=((rows >= 1) & (columns >= rows)) | np.isnan(values))


def short(text: str, longest: int = LONGEST_NAME) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _dumbbells(
    axes: Axes, names: Sequence[str], before: Sequence[float], after: Sequence[float], labels: Sequence[str]
) -> None:
    """One row per name, from an open circle to a filled one. ``labels``: before, and after if it rose, stayed, fell."""
    rows, order = range(len(names)), (BLUE, GREY, RED)
    pairs = zip(before, after, strict=True)
    colours = [BLUE if high > low else RED if high < low else GREY for low, high in pairs]
    axes.hlines(rows, before, after, colors=colours, linewidth=2.2, zorder=1)
    axes.plot(before, rows, "o", color=INK, mfc="white", label=labels[0])
    axes.scatter(after, rows, color=colours, zorder=3)
    for colour, label in zip(order, labels[1:], strict=True):
        axes.plot([], [], "o", color=colour, label=label)
    _name_rows(axes, names)


def _dots(
    axes: Axes,
    titles: Sequence[str],
    values_P_E: Sequence[Sequence[float | None]],
    marks_P: Sequence[float | None],
    chosen_P: Sequence[Collection[int]],
    *,
    labels: tuple[str, str, str],
) -> None:
    """One row per passage with a dot for each self-edit and a mark. ``labels``: open dot, chosen dot, mark."""
    for row, (values, mark, chosen) in enumerate(zip(values_P_E, marks_P, chosen_P, strict=True)):
        for at, value in enumerate(values):
            height = row + 0.16 * values[:at].count(value)  # equal values do not cover each other
            style: dict[str, Any] = (
                {"color": BLUE, "zorder": 3} if at in chosen else {"color": GREY, "mfc": "white", "zorder": 2}
            )
            axes.plot(_gaps([value]), [height], "o", **style)
        if known := [value for value in values if value is not None]:
            axes.hlines(row, min(known), max(known), color=PALE, linewidth=2, zorder=1)
        axes.plot(_gaps([mark] * 2), [row - 0.35, row + 0.35], color=INK, linewidth=1.6)
    if labels[0]:
        axes.plot([], [], "o", color=GREY, mfc="white", label=labels[0])
    axes.plot([], [], "o", color=BLUE, label=labels[1])
    axes.plot([], [], "|", color=INK, markersize=10, label=labels[2])
    _name_rows(axes, [short(title) for title in titles])


def _estimates(axes: Axes, xs: Sequence[float], estimates: Sequence[Estimate], colour: str, label: str) -> None:
    """A line through the means with the 95 % intervals."""
    means = [one.mean for one in estimates]
    axes.errorbar(xs, means, yerr=_reach(estimates), fmt="-o", color=colour, capsize=3, label=label or None)


def _reach(estimates: Collection[Estimate]) -> list[list[float]]:
    """How far the intervals reach below and above their means."""
    below, above = [one.mean - one.low for one in estimates], [one.high - one.mean for one in estimates]
    return [[max(reach, 0.0) for reach in side] for side in (below, above)]


def _number(axes: Axes, text: str, x: float, row: float) -> None:
    """A number to the right of a point."""
    axes.annotate(text, (x, row), (6, 0), textcoords="offset points", va="center", fontsize=9)


def _name_rows(axes: Axes, names: Collection[str]) -> None:
    """The names on the y axis, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _scale(axis: Axis, label: str, *, percent: bool = False, grid: bool = True) -> None:
    axis.set_label_text(label)
    if percent:
        axis.set_major_formatter(percent_ticks())
        axis.set_major_locator(MaxNLocator(6))
    axis.grid(visible=grid)


def _accuracy_label(estimates: Iterable[Estimate], *, between: str = "\n") -> str:
    known = list(estimates)
    counts = sorted({one.n for one in known}) or [0]
    n = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
    return f"QA accuracy{between}(n = {n} {known[0].unit if known else 'passages'}, 95 % interval)"


def _colour(number: int) -> str:
    return CYCLE[number % len(CYCLE)]


def _gaps(values: Iterable[float | None]) -> list[float]:
    """None as NaN: a gap in a line."""
    return [math.nan if value is None else value for value in values]

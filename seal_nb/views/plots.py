"""Figures of the experiments: plain records in, a matplotlib figure out.

Every axis names its unit and n, every figure draws the baseline it is compared with, every bar says what its
interval is, and every figure carries its content in words (`Chart.alt`). Accuracies are fractions; per cent
is formatting. Does not read files, compute intervals or show anything.

What each grader makes of the same answers, as a figure. Takes plain rows; grades nothing.

The figure of a sweep over inner-loop settings: accuracy of each point with its interval.

Plain rows in, a matplotlib figure out. The x axis is the first swept setting, on a logarithmic scale where it
spans a factor of ten; every other combination is a line. Computes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from seal_nb.metrics import written_value
from seal_nb.views.style import (
    BLUE,
    CYCLE,
    GREY,
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

INTERVAL = "95 % interval"
Place = Literal["outside upper left", "outside right center"]

MOST_DUMBBELLS = 40  # more passages than this are unreadable one by one: draw the histogram


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
def accuracy_by_arm(
    arms: Mapping[str, Estimated],
    *,
    baseline: Estimated | None = None,
    published: Mapping[str, float] | None = None,
    unit: str = "passages",
) -> Chart:
    """One bar an arm with its 95 % interval; the model that was not adapted as a line across.

    `published`: accuracy by arm name, a dashed mark on that arm's bar; only for the published passages.
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
def accuracy_across_rounds(
    series: Mapping[str, Sequence[Estimated | None]],
    *,
    baseline: Estimated | None = None,
    per_passage: Sequence[Sequence[float]] = (),
    published: Mapping[str, Sequence[float]] | None = None,
    unit: str = "passages",
) -> Chart:
    """QA accuracy against ReST-EM rounds: one line a prompt or run, 95 % intervals, round 0 the base model.

    `series`: an estimate for each round, None where a round was not run. `per_passage`: for each passage its
    accuracy in each round, as thin lines behind. `published`: the same rounds as published, dashed; only for
    the published passages.
    """
    chart, axes = new_chart(3.6)
    for accuracies in per_passage:
        axes.plot(range(len(accuracies)), accuracies, color=LIGHT, linewidth=0.9, zorder=1)
    _baseline_line(axes, baseline, vertical=False)
    shift = 0.04  # intervals of several lines stand side by side
    for number, (name, estimates) in enumerate(series.items()):
        _round_line(axes, name, estimates, CYCLE[number % len(CYCLE)], shift * (number - (len(series) - 1) / 2))
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
    known = [estimate for estimates in series.values() for estimate in estimates if estimate is not None]
    accuracy_axis(axes, "y", f"QA accuracy\n({_n_label(known, unit)}, {INTERVAL})")
    axes.set_ylim(bottom=0)
    if per_passage:
        axes.plot([], [], color=LIGHT, linewidth=0.9, label="one passage")
    legend_outside(chart, "outside right center", 1)
    chart.alt = "QA accuracy by ReST-EM round. " + " ".join(
        f"{name}: " + ", ".join("not run" if e is None else f"{e.mean:.1%}" for e in estimates) + "."
        for name, estimates in series.items()
    )
    return chart


@styled
def gain_by_passage(titles: Sequence[str], baseline: Sequence[float | None], adapter: Sequence[float | None]) -> Chart:
    """One line a passage from baseline to adapter accuracy, largest gain on top; lists run side by side.

    A passage without a graded answer on one side is left out. Above 40 passages the lines are unreadable:
    the histogram of the gains is drawn instead.
    """
    sides = zip(titles, baseline, adapter, strict=True)
    known = [(title, b, a) for title, b, a in sides if b is not None and a is not None]
    return _gains_of_known([t for t, _, _ in known], [b for _, b, _ in known], [a for _, _, a in known])


def _gains_of_known(titles: list[str], baseline: list[float], adapter: list[float]) -> Chart:
    if len(titles) > MOST_DUMBBELLS:
        return gain_histogram([after - before for before, after in zip(baseline, adapter, strict=True)])
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
def gain_histogram(gains: Sequence[float]) -> Chart:
    """How many passages gained how much: bins of ten points, zero and the mean drawn."""
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
    """The interval around a bar's end, and the mean in figures to its right."""
    below, above = max(value.mean - value.low, 0.0), max(value.high - value.mean, 0.0)
    axes.errorbar(value.mean, row, xerr=[[below], [above]], color=INK, capsize=3, linewidth=1.2)
    axes.annotate(f"{value.mean:.1%}", (value.high, row), (6, 0), textcoords="offset points", va="center", fontsize=9)


def _round_line(axes: Axes, name: str, estimates: Sequence[Estimated | None], colour: str, shift: float) -> None:
    known = [(k + shift, e) for k, e in enumerate(estimates) if e is not None]
    means = [e.mean for _, e in known]
    reach = [[max(e.mean - e.low, 0.0) for _, e in known], [max(e.high - e.mean, 0.0) for _, e in known]]
    axes.errorbar([x for x, _ in known], means, yerr=reach, fmt="-o", color=colour, capsize=3, label=name)


def _baseline_line(axes: Axes, baseline: Estimated | None, *, vertical: bool = True) -> None:
    if baseline is None:
        return
    draw_line, draw_band = (axes.axvline, axes.axvspan) if vertical else (axes.axhline, axes.axhspan)
    draw_line(baseline.mean, color=INK, linestyle=":", linewidth=1.4, label=f"not adapted, {baseline.mean:.1%}")
    draw_band(baseline.low, baseline.high, color=GREY, alpha=0.15, linewidth=0)


def accuracy_axis(axes: Axes, which: str, label: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(label)
    axis.set_major_formatter(percent_ticks())
    axis.set_major_locator(MaxNLocator(6))
    axis.grid(True)


def _limit_to(axes: Axes, highest: Sequence[float]) -> None:
    """Room to the right of the longest bar for its figures."""
    axes.set_xlim(0, max([*highest, 0.1]) * 1.16)


def legend_outside(chart: Chart, place: Place = "outside upper left", columns: int = 4) -> None:
    """The legend beside the axes, where the layout makes room for it and no data is covered."""
    if chart.axes[0].get_legend_handles_labels()[0]:
        chart.legend(loc=place, ncols=columns, handletextpad=0.4, columnspacing=1.4)


def _n_label(values: Sequence[Estimated], unit: str) -> str:
    counts = sorted({value.n for value in values})
    return f"n = {' to '.join(str(n) for n in (counts if len(counts) < 3 else (counts[0], counts[-1])))} {unit}"


def short(text: str, longest: int = 34) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _arms_in_words(arms: Mapping[str, Estimated], baseline: Estimated | None) -> str:
    parts = [f"{name} {e.mean:.1%} ({e.low:.1%} to {e.high:.1%})" for name, e in arms.items()]
    against = f" Not adapted: {baseline.mean:.1%}." if baseline else ""
    return "QA accuracy with 95 % interval: " + "; ".join(parts) + "." + against


@styled
def accuracy_by_grader(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """A line a grader from the accuracy without adapter to that with it: its length is the gain.

    Rows with ``grader``, ``baseline``, ``adapter`` and ``n``, as of ``grader_comparison``; those without
    accuracies are left out.
    """
    shown = [row for row in rows if row.get("baseline") is not None and row.get("adapter") is not None]
    chart, axes = new_chart(1.1 + 0.32 * max(len(shown), 1))
    for place, row in enumerate(reversed(shown)):
        before, after = row["baseline"], row["adapter"]
        axes.plot([before, after], [place, place], color=PALE, linewidth=4, zorder=1)
        axes.scatter([before], [place], color=GREY, zorder=2, label="not adapted" if not place else None)
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
def sweep_accuracy(rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, unit: str = "passages") -> Chart:
    """QA accuracy with interval against the first of ``names``, a line for each combination of the others.

    ``rows``: as ``sweep_rows`` gives them, with ``estimate`` and a value for each name; rows without an
    estimate are left out. Values that are not numbers stand side by side in order of appearance.
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
        _line(axes, [place[_key(row[names[0]])] for row in own], [row["estimate"] for row in own], label, number)
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


def _line(axes: Any, xs: Sequence[float], estimates: Sequence[Estimated], label: str, number: int) -> None:
    colour = CYCLE[number % len(CYCLE)] if label else BLUE
    means = [one.mean for one in estimates]
    reach = [[max(one.mean - one.low, 0.0) for one in estimates], [max(one.high - one.mean, 0.0) for one in estimates]]
    axes.errorbar(xs, means, yerr=reach, fmt="-o", color=colour, capsize=3, label=label or None)


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

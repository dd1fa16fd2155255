"""Every figure: accuracy, rewards, losses, continual edits, graders, log-probabilities and a server's activity.

Every axis names its unit and n, every figure draws the baseline it is compared with, and every figure has its content
in words (`Chart.alt`). Accuracies are fractions. Figures are made without pyplot: no global state, nothing to close."""

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seal_nb.errors import SettingsError, visible
from seal_nb.metrics import Estimate, Scores, counted, written_value
from seal_nb.server.client import Sample
from seal_nb.storage import data_file, open_own

# Okabe and Ito (jfly.uni-koeln.de/color): told apart under every common colour blindness.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
INK, GREY, LIGHT, PALE = "#222222", "#767676", "#B5B5B5", "#D9D9D9"

WIDTH_IN = 6.4  # a text column of a notebook
DPI = 110
UNDATED: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
MOST_LINES = 30  # of single passages in one figure
MOST_DUMBBELLS = 40  # with more passages, the histogram is drawn
LONGEST_NAME = 200  # characters of a label: drawing a hundred thousand takes a minute
MOST_ROWS = 200  # that make a chart higher; it has no more names of rows, either
MOST_EDITS = 40  # with more, a matrix has no number in each cell
MOST_CURVES = 6  # with more adapters, the mean is drawn
Place = Literal["outside upper left", "outside right center"]  # of the legend
# A decorator: the function draws in this style, and global settings stay as they are.
styled = mpl.rc_context(fname=data_file("figures.mplstyle"))


class Chart(Figure):
    """A matplotlib Figure with its content in words (`alt`), which notebooks show as alternative text."""

    alt: str = ""

    def save(self, path: str | Path, formats: str = "png") -> list[Path]:
        """Writes a file for each format of a comma list of png, svg and pdf (the last two for papers). ``path`` has no
        ending; folders are made. Raises: SettingsError for another format."""
        files = [Path(f"{path}.{ending.strip()}") for ending in formats.split(",")]
        for file in files:
            drawn = self.drawn(file.suffix[1:], dpi=2 * DPI)
            file.parent.mkdir(parents=True, exist_ok=True)
            with open_own(file) as out:
                out.truncate(0)
                out.write(drawn)
        return files

    @styled
    def drawn(self, ending: str = "png", *, dpi: int = DPI) -> bytes:
        """The content of a file without date or program name, so that equal figures are equal files."""
        if ending not in UNDATED:
            raise SettingsError(f"figure format is {ending!r}; known are {', '.join(UNDATED)}")
        buffer = io.BytesIO()
        self.savefig(buffer, format=ending, dpi=dpi, facecolor="white", metadata=UNDATED[ending])
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        image = base64.b64encode(self.drawn()).decode("ascii")
        return {"image/png": image, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}

    def finished(self, alt: str, place: Place = "outside upper left", columns: int = 4) -> "Chart":
        """The chart with its alternative text, and with a legend outside the axes, so that it covers no data."""
        self.alt = visible(alt)
        if self.axes[0].get_legend_handles_labels()[0]:
            self.legend(loc=place, ncols=columns, handletextpad=0.4, columnspacing=1.4)
        return self


def new_chart(height_in: float, width_in: float = WIDTH_IN) -> tuple[Chart, Axes]:
    """An empty chart with one pair of axes."""
    chart = Chart(figsize=(width_in, height_in))
    return chart, chart.add_subplot()


@styled
def plot_accuracy(
    arms: Mapping[str, Estimate], *, baseline: Estimate | None = None, published: Mapping[str, float] | None = None
) -> Chart:
    """One bar per arm with its 95 % interval, and ``baseline``, the model without adapter, as a line. ``published``
    accuracies by arm are dashed marks; only for the published passages."""
    chart, axes = _row_chart(arms, 1.2, 0.46, _accuracy_label(arms.values(), between=" "), percent=True)
    means, intervals = [one.mean for one in arms.values()], _reach(arms.values())
    axes.barh(range(len(arms)), means, xerr=intervals, color=BLUE, height=0.62, ecolor=INK)
    for row, one in enumerate(arms.values()):
        _number(axes, f"{one.mean:.1%}", one.high, row)
    known = [(row, published[name]) for row, name in enumerate(arms) if published and name in published]
    for at, (row, value) in enumerate(known):
        label = None if at else "published"
        axes.plot([value] * 2, [row - 0.42, row + 0.42], "--", color=ORANGE, linewidth=2.2, label=label)
    if baseline:
        axes.axvline(baseline.mean, color=INK, linestyle=":", linewidth=1.4, label=f"baseline, {baseline.mean:.1%}")
        axes.axvspan(baseline.low, baseline.high, color=GREY, alpha=0.15, linewidth=0)
    highest = [one.high for one in arms.values()] + ([baseline.high] if baseline else [])
    axes.set_xlim(0, max([*highest, 0.1]) * 1.16)  # room for the number to the right of the longest bar
    bars = [f"{name} {one.mean:.1%} ({one.low:.1%} to {one.high:.1%})" for name, one in arms.items()]
    against = f" Baseline: {baseline.mean:.1%}." if baseline else ""
    return chart.finished(f"QA accuracy with 95 % interval: {'; '.join(bars)}.{against}")


@styled
def plot_differences(differences: pd.DataFrame) -> Chart:
    """A forest plot: one row for each comparison with its interval; filled if it is real. Rows of ``compare`` or
    ``Collection.differences`` without numbers are left out."""
    shown = differences.dropna(subset="difference")
    over = _range(shown["n"].astype(int))
    of_many = f"\nintervals and p for all {len(shown)} together" if len(shown) > 1 else ""
    names = [f"{arm} − {against}" for arm, against in zip(shown["arm"], shown["against"], strict=True)]
    chart, axes = _row_chart(names, 1.0, 0.34, f"difference in points\n(n = {over} passages){of_many}")
    axes.axvline(0, color=INK, linewidth=1, linestyle=":")
    for row, one in enumerate(shown.to_dict("records")):
        colour, ends = BLUE if one["is_real"] else GREY, [100 * one["low"], 100 * one["high"]]
        axes.plot(ends, [row, row], color=colour, linewidth=2)
        axes.plot(100 * one["difference"], row, "o", color=colour, mfc=colour if one["is_real"] else "white")
        _number(axes, f"{100 * one['difference']:+.1f}", ends[1], row)
    axes.plot([], [], "o", color=BLUE, label="real")
    axes.plot([], [], "o", color=GREY, mfc="white", label="not distinguishable from noise")
    axes.margins(x=0.12)
    words = [f"{name}: {sentence}" for name, sentence in zip(names, shown["sentence"], strict=True)]
    return chart.finished(f"Differences between arms. {'; '.join(words)}.")


@styled
def plot_rounds(
    series: Mapping[str, Sequence[Estimate | None]],
    *,
    baseline: Estimate | None = None,
    per_passage: Sequence[Sequence[float]] = (),
    published: Mapping[str, Sequence[float]] | None = None,
) -> Chart:
    """Accuracy by ReST-EM round with 95 % intervals; round 0 is the base model. ``series`` has a line for each name
    (such as a prompt key), with None for a round that was not run. ``per_passage`` accuracies are thin lines, if there
    is one series and at most 30 passages. ``published`` accuracies are dashed; only for the published passages."""
    chart, axes = new_chart(3.6)
    is_alone, published = len(series) == 1, published or {}
    for at, accuracies in enumerate(per_passage if is_alone and len(per_passage) <= MOST_LINES else []):
        label = None if at else "one passage"
        axes.plot(range(len(accuracies)), accuracies, color=LIGHT, linewidth=0.9, zorder=1, label=label)
    if baseline:
        axes.axhline(baseline.mean, color=INK, linestyle=":", linewidth=1.4, label=f"baseline, {baseline.mean:.1%}")
        axes.axhspan(baseline.low, baseline.high, color=GREY, alpha=0.15, linewidth=0)
    for number, (name, estimates) in enumerate(series.items()):
        shift = 0.04 * (number - (len(series) - 1) / 2)  # intervals side by side
        run = {k + shift: one for k, one in enumerate(estimates) if one is not None}
        colour = _estimates(axes, run, name)
        if values := published.get(name):
            label, colour = ("published", GREY) if is_alone else (f"{name}, published", colour)
            axes.plot(range(len(values)), values, "--o", color=colour, mfc="white", label=label)
    n_rounds = max(map(len, [*series.values(), *published.values(), [None]]))
    rounds = _places(n_rounds, MOST_LINES)
    axes.set_xticks(rounds, [str(at) if at else "0\n(base model)" for at in rounds])
    axes.set_xlim(-0.3, n_rounds - 0.7)
    axes.set_xlabel("ReST-EM round")
    _scale(axes.yaxis, _accuracy_label(one for estimates in series.values() for one in estimates if one), percent=True)
    axes.set_ylim(bottom=0)
    shown = [", ".join("not run" if one is None else f"{one.mean:.1%}" for one in row) for row in series.values()]
    words = [f"{name}: {text}." for name, text in zip(series, shown, strict=True)]
    return chart.finished(f"QA accuracy by ReST-EM round. {' '.join(words)}", "outside right center", 1)


@styled
def plot_gains(titles: Sequence[str], baseline: Scores, adapter: Scores) -> Chart:
    """One line per passage from baseline to adapter accuracy, the largest gain on top, or a histogram of the gains for
    more than 40 passages. Passages without one of the accuracies (None) are left out."""
    sides = zip(titles, baseline, adapter, strict=True)
    known = [(short(title), b, a) for title, b, a in sides if b is not None and a is not None]
    gains = [a - b for _, b, a in known]
    if len(known) > MOST_DUMBBELLS:
        return plot_gain_histogram(gains)
    known.sort(key=lambda one: (one[1] - one[2], -one[2]))
    label = f"QA accuracy of one passage (n = {len(known)} passages)"
    chart, axes = _row_chart([name for name, _, _ in known], 1.3, 0.26, label, percent=True)
    _dumbbells(axes, [ends for _, *ends in known], ("baseline", "adapter, gain", "no change", "loss"))
    axes.set_xlim(-0.03, 1.03)
    gained, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return chart.finished(f"Of {len(known)} passages {gained} gain accuracy with the adapter, {lost} lose.")


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
    _scale(axes.yaxis, "passages", whole=True, grid=False)
    return chart.finished(f"Histogram of the gains of {len(gains)} passages, mean {mean:+.1%}.")


@styled
def plot_graders(graders: pd.DataFrame) -> Chart:
    """One line per grader from the accuracy without adapter to the accuracy with it; its length is the gain. Rows of
    ``compare_graders`` without both accuracies are left out."""
    shown = graders.reindex(columns=["grader", "n", "baseline", "adapter"]).dropna()
    label = f"answers called correct (n = {shown['n'].max() if len(shown) else 0}); number: gain in points"
    chart, axes = _row_chart(list(shown["grader"]), 1.1, 0.32, label, percent=True)
    ends = shown[["baseline", "adapter"]].to_numpy(float)
    _dumbbells(axes, ends, ("baseline", "with adapter, gain", "no change", "loss"))
    for row, (before, after) in enumerate(ends):
        _number(axes, f"{100 * (after - before):+.1f}", max(before, after), row)
    axes.margins(x=0.12)
    words = [f"{name} {low:.1%} → {high:.1%}" for name, (low, high) in zip(shown["grader"], ends, strict=True)]
    return chart.finished(f"Called correct, baseline → adapter: {', '.join(words) or 'no grader judged both arms'}.")


@styled
def plot_gold_logprobs(questions: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Chart:
    """Log-probability of each gold answer without and with the adapter: it changes before a verdict does.

    Args:
        questions: one label for each gold answer.
        before: log-probabilities without the adapter, in nats.
        after: with the adapter.

    Returns:
        A figure with a row for each gold answer."""
    names = [fill(short(question, 76), 38) for question in questions]
    label = f"log-probability of gold answer\n(nats, n = {len(questions)} questions)"
    chart, axes = _row_chart(names, 1.4, 0.42, label)
    ends = list(zip(before, after, strict=True))
    _dumbbells(axes, ends, ("without adapter", "with adapter, more likely", "as likely", "less likely"))
    risen = sum(high > low for low, high in ends)
    return chart.finished(f"With the adapter {risen} of {len(ends)} gold answers are more likely than without.")


@styled
def plot_rewards(
    titles: Sequence[str], rewards: Sequence[Scores], chosen: Sequence[Sequence[int]], baseline: Scores
) -> Chart:
    """The rewards (mean adapter accuracies) of each passage's self-edits (None: not graded), the indices of the chosen
    ones (none: the passage is dropped), and the accuracy without adapter."""
    label = f"reward: mean adapter accuracy (n = {len(titles)} passages)"
    chart, axes = _row_chart([short(title) for title in titles], 1.4, 0.3, label, percent=True)
    _dots(axes, rewards, baseline, chosen, ("self-edit", "chosen", "baseline"))
    axes.set_xlim(-0.03, 1.03)
    n, kept = len(titles), sum(map(bool, chosen))
    return chart.finished(f"Rewards of the self-edits of {n} passages; self-edits of {kept} of them are kept.")


@styled
def plot_self_edit_lengths(titles: Sequence[str], words_P_E: Sequence[Sequence[int]], words_P: Sequence[int]) -> Chart:
    """For each passage the number of words of each self-edit, and of the passage itself."""
    label = f"words (n = {len(titles)} passages, {sum(map(len, words_P_E))} self-edits)"
    chart, axes = _row_chart([short(title) for title in titles], 1.3, 0.3, label)
    every = [range(len(words)) for words in words_P_E]
    _dots(axes, words_P_E, words_P, every, ("", "self-edit", "the passage itself"))
    axes.set_xlim(left=0)
    words = [f"{title} {', '.join(map(str, own))}" for title, own in zip(titles, words_P_E, strict=True)]
    return chart.finished(f"Words of the self-edits of each passage: {'; '.join(words)}")


@styled
def plot_losses(curves: Mapping[str, Scores], *, step: str = "epoch") -> Chart:
    """Training loss of each adapter by epoch; more than six adapters are drawn pale, with their mean.

    Args:
        curves: adapter name → mean loss per epoch, in nats per token; None where it is not known.
        step: name of the x axis, if it is not epochs.

    Returns:
        A matplotlib Figure."""
    chart, axes = new_chart(2.9)
    known = {name: np.array(losses, dtype=float) for name, losses in curves.items()}
    lines = [(short(name), losses) for name, losses in known.items()]
    if len(known) > MOST_CURVES:
        for at, losses in enumerate(known.values()):
            label = None if at else f"one of {len(known)}"
            axes.plot(range(1, len(losses) + 1), losses, color=LIGHT, linewidth=0.9, label=label)
        shared = min(map(len, known.values()))
        lines = [("mean", np.nanmean([losses[:shared] for losses in known.values()], axis=0))]
    for name, losses in lines:
        axes.plot(range(1, len(losses) + 1), losses, "-o", markersize=4, label=short(name, LONGEST_NAME))
    n_adapters = counted(len(curves), "adapters")
    _scale(axes.xaxis, f"{step} (n = {n_adapters})", whole=True, grid=False)
    _scale(axes.yaxis, "training loss (nats per token)")
    axes.set_ylim(bottom=0)
    words = [f"{name}: {losses[0]:.2f} to {losses[-1]:.2f}." for name, losses in known.items() if len(losses)]
    alt = f"Training loss of {n_adapters} by {step}. {' '.join(words[:MOST_CURVES])}"
    return chart.finished(alt, "outside right center", 1)


@styled
def plot_sweep(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart:
    """Accuracy against the first of the swept settings ``names``; one line per combination of the others. A row has a
    ``label``, an ``estimate`` (None: left out) and the value of each setting. The x axis is logarithmic if it spans a
    factor of ten; values that are not numbers are placed in order of appearance."""
    chart, axes = new_chart(3.4)
    known = [row for row in rows if row["estimate"] is not None]
    values = {written_value(row[names[0]]): row[names[0]] for row in known}
    is_numeric = all(isinstance(value, (int, float)) for value in values.values())
    place = {text: value if is_numeric else at for at, (text, value) in enumerate(values.items())}
    lines: dict[str, dict[float, Estimate]] = {}
    for row in known:
        label = ", ".join(f"{name} {written_value(row[name])}" for name in names[1:])
        lines.setdefault(label, {})[place[written_value(row[names[0]])]] = row["estimate"]
    for label, own in lines.items():
        _estimates(axes, dict(sorted(own.items())), label)
    if is_numeric and values and 0 < 10 * min(place.values()) <= max(place.values()):
        axes.set_xscale("log")
    axes.set_xticks(list(place.values()), list(place))
    axes.minorticks_off()
    axes.set_xlabel(names[0])
    _scale(axes.yaxis, _accuracy_label(row["estimate"] for row in known), percent=True)
    axes.set_ylim(bottom=0)
    words = [f"{row['label']}: {row['estimate'].mean:.1%}" for row in known]
    return chart.finished(f"QA accuracy by setting: {'; '.join(words)}", "outside right center", 1)


@styled
def plot_continual_matrix(matrix: Sequence[Scores], *, n_sequences: int) -> Chart:
    """The (K+1)×K accuracies, the mean of ``n_sequences`` sequences, as a heat map from 0 to 100 %. The passage of each
    edit is outlined; cells that were not asked are blank."""
    k = len(matrix) - 1
    shown = min(k, MOST_EDITS)
    chart, axes = new_chart(1.6 + 0.36 * (shown + 1), 3.4 + 0.5 * shown)
    asked = asked_cells(matrix)
    image = axes.imshow(asked, vmin=0, vmax=1, aspect="auto")  # all matrices of a page have one scale
    axes.set_facecolor("#F2F2F2")
    for (row, column), value in np.ma.ndenumerate(asked) if k <= MOST_EDITS else ():
        colour = "white" if value < 0.5 else INK  # light on dark and dark on light
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)
    for step in range(k):
        axes.add_patch(Rectangle((step - 0.5, step + 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2))
    steps = _places(k + 1, MOST_EDITS + 1)
    axes.set_yticks(steps, [f"after edit {step}" if step else "never edited" for step in steps])
    axes.set_xticks(columns := _places(k, MOST_EDITS), [str(column + 1) for column in columns])
    axes.set_xlabel("passage, in order of editing\n(outlined: just edited; blank: not asked)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = chart.colorbar(image, ax=axes, format=FuncFormatter(_percent))
    bar.set_label(f"QA accuracy\n(mean, n = {n_sequences} sequences)")
    return chart.finished(
        f"Accuracy after each of {k} edits over {n_sequences} sequences: never edited {asked[0].mean():.1%}, "
        f"all {k} passages after the last edit {asked[k].mean() if k else 0.0:.1%}."
    )


@styled
def plot_continual_curve(seen: Sequence[Estimate], never_edited: Scores, *, just_edited: Scores = ()) -> Chart:
    """Mean accuracy on the passages edited so far by number of edits, that of the unedited model on the same passages,
    and that on the passage of each edit right after it."""
    chart, axes = new_chart(3.3)
    edits, before = range(1, len(seen) + 1), np.array(never_edited, dtype=float)
    axes.plot(edits, before, ":", color=INK, linewidth=1.6, label="never edited, same passages")
    if len(just_edited):
        axes.plot(edits, np.array(just_edited, dtype=float), "s", color=ORANGE, label="passage just edited")
    _estimates(axes, dict(enumerate(seen, start=1)), "all passages so far")
    _scale(axes.xaxis, "number of edits", whole=True, grid=False)
    _scale(axes.yaxis, _accuracy_label(seen), percent=True)
    axes.set_ylim(bottom=0)
    rows = enumerate(zip(seen, before, strict=True), 1)
    words = [f"after {counted(t, 'edits')} {one.mean:.1%}, never edited {other:.1%}" for t, (one, other) in rows]
    return chart.finished(f"Accuracy on the passages edited in so far: {'; '.join(words)}", columns=2)


@styled
def plot_server_activity(samples: Sequence[Sample]) -> Chart:
    """Requests that wait, slots in use (and slots), and jobs per minute, over the time of watching."""
    chart = Chart(figsize=(WIDTH_IN, 3.8))
    above, below = chart.subplots(2, 1, sharex=True)
    names = {"slots": "slots", "slots_in_use": "slots in use", "queued": "requests waiting"}
    over = {name: [sample[name] for sample in samples] for name in ("at_s", "jobs_per_min", *names)}
    for name, colour, style in zip(names, (GREY, BLUE, ORANGE), (":", "-", "-"), strict=True):
        # A count holds until the next sample: steps, not slopes.
        above.step(over["at_s"], over[name], style, where="post", color=colour, label=names[name])
    below.plot(over["at_s"], over["jobs_per_min"], color=GREEN, label="jobs per minute")
    _scale(above.yaxis, "number", whole=True)
    _scale(below.yaxis, "jobs per minute\n(of the last minute)")
    below.set_xlabel(f"seconds since watching began (n = {len(samples)} samples)")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
    return chart.finished(
        f"A server over {over['at_s'][-1] - over['at_s'][0]:.0f} s: at most {max(over['queued'])} requests "
        f"waiting, {max(over['slots_in_use'])} of {over['slots'][-1]} slots in use, "
        f"{max(over['jobs_per_min']):g} jobs per minute."
    )


def asked_cells(matrix: Sequence[Scores]) -> np.ma.MaskedArray:
    """(K+1, K) accuracies; masked where the passage was not asked or not graded."""
    values = np.array(matrix, dtype=float)  # None becomes NaN
    rows, columns = np.indices(values.shape)
    return np.ma.array(values, mask=((rows >= 1) & (columns >= rows)) | np.isnan(values))


def short(text: str, longest: int = 34) -> str:
    text = visible(text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _places(n: int, most: int) -> range:
    """Where names stand on an axis of ``n`` places: at each of them, or evenly at no more than ``most``."""
    return range(0, n, max(1, -(-n // most)))


def _row_chart(
    names: Collection[str], frame_in: float, row_in: float, label: str, *, percent: bool = False
) -> tuple[Chart, Axes]:
    """A chart with a row for each name, the first on top, and the label of its x axis."""
    chart, axes = new_chart(frame_in + row_in * max(min(len(names), MOST_ROWS), 1))
    rows = _places(len(names), MOST_ROWS)
    axes.set_yticks(rows, [short(name, LONGEST_NAME) for name in list(names)[:: rows.step]])
    axes.set_ylim(len(names) - 0.4, -0.6)
    _scale(axes.xaxis, label, percent=percent)
    return chart, axes


def _dumbbells(axes: Axes, ends_P_2: Sequence[Sequence[float]] | np.ndarray, labels: Sequence[str]) -> None:
    """In each row an open circle and a filled one. ``labels``: the open one, the filled one that rose, stayed, fell."""
    rows, (before, after) = range(len(ends_P_2)), np.array(ends_P_2, dtype=float).reshape(-1, 2).T
    colours = np.select([after > before, after < before], [BLUE, RED], GREY).tolist()
    axes.hlines(rows, before, after, colors=colours, linewidth=2.2, zorder=1)
    axes.plot(before, rows, "o", color=INK, mfc="white", label=labels[0])
    axes.scatter(after, rows, color=colours, zorder=3)
    for colour, label in zip((BLUE, GREY, RED), labels[1:], strict=True):
        axes.plot([], [], "o", color=colour, label=label)


def _dots(
    axes: Axes, dots_P_E: Sequence[Scores], marks_P: Scores, chosen_P: Sequence[Collection[int]], labels: Sequence[str]
) -> None:
    """In each row a dot for each value and a mark. ``labels``: open dot, chosen dot, mark."""
    points = [
        (value, row + 0.16 * values[:at].count(value), at in chosen)  # equal values do not cover each other
        for row, (values, chosen) in enumerate(zip(dots_P_E, chosen_P, strict=True))
        for at, value in enumerate(values)
        if value is not None
    ]
    xs, ys, is_chosen = np.array(points, dtype=float).reshape(-1, 3).T
    axes.plot(xs[is_chosen == 0], ys[is_chosen == 0], "o", color=GREY, mfc="white", label=labels[0])
    axes.plot(xs[is_chosen == 1], ys[is_chosen == 1], "o", color=BLUE, zorder=3, label=labels[1])
    for row, values in enumerate(dots_P_E):
        if known := [value for value in values if value is not None]:
            axes.hlines(row, min(known), max(known), color=PALE, linewidth=2, zorder=1)
    marks, rows = np.array(marks_P, dtype=float), np.arange(len(marks_P))
    axes.plot([marks, marks], [rows - 0.35, rows + 0.35], color=INK, linewidth=1.6)
    axes.plot([], [], "|", color=INK, markersize=10, label=labels[2])


def _estimates(axes: Axes, by_x: Mapping[float, Estimate], label: str) -> Any:
    """A line through the means with the 95 % intervals. Returns: its colour."""
    means = [one.mean for one in by_x.values()]
    drawn = axes.errorbar(list(by_x), means, yerr=_reach(by_x.values()), fmt="-o", label=short(label, LONGEST_NAME))
    return drawn.lines[0].get_color()


def _reach(estimates: Iterable[Estimate]) -> np.ndarray:
    """(2, n): how far the intervals reach below and above their means."""
    sides = np.array([(one.mean - one.low, one.high - one.mean) for one in estimates])
    return np.maximum(sides.reshape(-1, 2).T, 0.0)


def _number(axes: Axes, text: str, x: float, row: float) -> None:
    """A number to the right of a point."""
    axes.annotate(text, (x, row), (6, 0), textcoords="offset points", va="center", fontsize=9)


def _scale(axis: Axis, label: str, *, percent: bool = False, whole: bool = False, grid: bool = True) -> None:
    axis.set_label_text(label)
    if percent:
        axis.set_major_formatter(_percent)
    if percent or whole:
        axis.set_major_locator(MaxNLocator(integer=True) if whole else MaxNLocator(6))
    axis.grid(visible=grid)


def _percent(share: float, _: object = None) -> str:
    """With as many digits as the tick has, so that no two ticks read the same."""
    return f"{100 * share:.4g}%"


def _range(counts: Iterable[int]) -> str:
    known = sorted(counts) or [0]
    return " to ".join(map(str, dict.fromkeys([known[0], known[-1]])))


def _accuracy_label(estimates: Iterable[Estimate], *, between: str = "\n") -> str:
    known = list(estimates)
    n = _range(one.n for one in known)
    unit, crossed = (known[0].unit, known[0].crossed) if known else ("passages", None)
    over = f" × {counted(*crossed)}" if crossed else ""
    return f"QA accuracy{between}(n = {n} {unit}{over}, 95 % interval)"

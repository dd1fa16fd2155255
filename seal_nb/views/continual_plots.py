"""Figures of continual self-edits: the accuracy matrix as a heat map and its curve against never editing.

The matrix has K + 1 rows and K columns: row t is the accuracy on each passage after t edits, row 0 before
any. Passages that were not yet edited in are not asked again, so those cells hold nothing (published files
store 0.0 there). Figures only: matrix and intervals come from `seal_nb.experiments.continual`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from seal_nb.metrics import counted
from seal_nb.views.plots import INTERVAL, Estimated, legend_outside
from seal_nb.views.style import BLUE, GREY, HEAT_MAP, INK, ORANGE, PALE, RED, Chart, new_chart, percent_ticks, styled


@styled
def continual_matrix(matrix: Sequence[Sequence[float | None]], *, n_sequences: int) -> Chart:
    """Heat map of the (K+1)×K accuracies, cells that were not asked left blank, own edit outlined."""
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
def continual_curve(
    seen: Sequence[Estimated],
    never_edited: Sequence[float],
    *,
    just_edited: Sequence[float] = (),
    published: Sequence[float] = (),
) -> Chart:
    """Mean accuracy on the passages edited in so far against the number of edits, beside never editing.

    `seen[t - 1]`: after edit t, n = sequences. `never_edited[t - 1]`: the untouched model, same passages.
    `just_edited[t - 1]`: the passage of edit t right after it. `published`: as `seen`, of the published run.
    """
    chart, axes = new_chart(3.3)
    edits = range(1, len(seen) + 1)
    reach = [[max(e.mean - e.low, 0.0) for e in seen], [max(e.high - e.mean, 0.0) for e in seen]]
    axes.plot(edits, never_edited, ":", color=INK, linewidth=1.6, label="never edited, same passages")
    if just_edited:
        axes.plot(edits, just_edited, "s", color=ORANGE, linestyle="none", label="passage just edited")
    axes.errorbar(
        edits, [e.mean for e in seen], yerr=reach, fmt="-o", color=BLUE, capsize=3, label="all passages so far"
    )
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
        f"after {counted(t, 'edits')} {e.mean:.1%}, never edited {before:.1%}"
        for t, (e, before) in enumerate(zip(seen, never_edited, strict=True), 1)
    )
    return chart


def asked_cells(matrix: Sequence[Sequence[float | None]]) -> np.ma.MaskedArray:
    """(K+1, K) accuracies; masked where a passage had not been edited in yet, or where nothing is known."""
    values = np.array([[np.nan if cell is None else cell for cell in row] for row in matrix], dtype=float)
    rows, columns = np.indices(values.shape)
    return np.ma.array(values, mask=((rows >= 1) & (columns >= rows)) | np.isnan(values))


def _write_cells(axes: Axes, asked: np.ma.MaskedArray) -> None:
    """The figures in the cells, dark on light and light on dark."""
    middle = (asked.max() or 0.1) / 2
    for (row, column), value in np.ndenumerate(asked.filled(np.nan)):
        if not np.isnan(value):
            colour = "white" if value < middle else INK
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)

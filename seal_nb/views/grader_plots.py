"""What each grader makes of the same answers, as a figure. Takes plain rows; grades nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from seal_nb.views.style import BLUE, GREY, PALE, Chart, new_chart, percent_ticks, styled


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

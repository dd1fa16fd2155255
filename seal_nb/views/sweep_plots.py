"""The figure of a sweep over inner-loop settings: accuracy of each point with its interval.

Plain rows in, a matplotlib figure out. The x axis is the first swept setting, on a logarithmic scale where it
spans a factor of ten; every other combination is a line. Computes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from seal_nb.experiments.sweep import written_value
from seal_nb.views.plots import INTERVAL, Estimated, accuracy_axis, legend_outside
from seal_nb.views.style import BLUE, CYCLE, Chart, new_chart, styled


@styled
def sweep_accuracy(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, unit: str = "passages"
) -> Chart:
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
        _line(
            axes, [place[_key(row[names[0]])] for row in own], [row["estimate"] for row in own], label, number
        )
    axes.set_xticks([place[value] for value in values], [written_value(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(names[0])
    n = known[0]["estimate"].n if known else 0
    accuracy_axis(axes, "y", f"QA accuracy\n(n = {n} {unit}, {INTERVAL})")
    axes.set_ylim(bottom=0)
    if len(names) > 1:
        legend_outside(chart, "outside right center", 1)
    chart.alt = "QA accuracy by setting: " + "; ".join(
        f"{row['label']}: {row['estimate'].mean:.1%}" for row in known
    )
    return chart


def _lines(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(", ".join(f"{name} {written_value(row[name])}" for name in names), []).append(row)
    return lines


def _line(axes: Any, xs: Sequence[float], estimates: Sequence[Estimated], label: str, number: int) -> None:
    colour = CYCLE[number % len(CYCLE)] if label else BLUE
    means = [one.mean for one in estimates]
    reach = [
        [max(one.mean - one.low, 0.0) for one in estimates],
        [max(one.high - one.mean, 0.0) for one in estimates],
    ]
    axes.errorbar(xs, means, yerr=reach, fmt="-o", color=colour, capsize=3, label=label or None)


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

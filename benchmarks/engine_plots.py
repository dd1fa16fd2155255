"""The figure of `benchmarks.engines`: texts a second over requests at a time. Numbers in, a figure out."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter

from seal_nb.views.plots import BLUE, GREY, ORANGE, WIDTH_IN, Chart, styled


@styled
def engine_throughput(result: Mapping[str, Any]) -> Chart:
    """One panel for each engine that was measured; both axes are logarithmic, perfect scaling is a line."""
    service, vllm = result["service"], result.get("vllm")
    chart = Chart(figsize=(WIDTH_IN if vllm else WIDTH_IN / 2 + 0.4, 2.9), dpi=110)
    panels = chart.subplots(1, 2 if vllm else 1, squeeze=False)[0]
    _panel(
        panels[0],
        service["rows"],
        f"stand-in: {service['lanes']} at a time, {service['service_time_s']:g} s each",
        BLUE,
    )
    possible = [row["possible"] for row in service["rows"]]
    panels[0].plot([row["parallel"] for row in service["rows"]], possible, "--", color=GREY, label="possible")
    panels[0].legend()
    if vllm:
        _panel(panels[1], vllm["rows"], f"vLLM on this CPU: batches of {vllm['lanes']}", ORANGE)
        panels[1].axvline(vllm["lanes"], color=GREY, linestyle=":")
    chart.alt = "Texts a second over requests at a time: " + "; ".join(
        f"{row['parallel']}: {row['texts_per_s']:.2g}" for row in service["rows"]
    )
    return chart


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], title: str, colour: str) -> None:
    axes.plot(
        [row["parallel"] for row in rows], [row["texts_per_s"] for row in rows], "o-", color=colour, label="measured"
    )
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel("requests at a time")
    axes.set_ylabel("self-edits / s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([row["parallel"] for row in rows])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")

"""Figures around training: self-edits and the rewards that choose among them, and the loss of adapters.

Plain lists in, a figure out; choosing is done by the notebook, not here.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill

from matplotlib.ticker import MaxNLocator

from seal_nb.metrics import counted
from seal_nb.views.plots import accuracy_axis, legend_outside, short
from seal_nb.views.style import BLUE, CYCLE, GREY, INK, LIGHT, PALE, RED, Chart, new_chart, styled

MOST_LOSS_CURVES = 6  # as many as there are colours


@styled
def self_edit_rewards(
    titles: Sequence[str],
    rewards: Sequence[Sequence[float | None]],
    chosen: Sequence[Sequence[int]],
    baseline: Sequence[float | None] | None = None,
) -> Chart:
    """For each passage the reward (mean adapter accuracy) of each of its self-edits, and which were chosen.

    `rewards[p][e]`: None where a self-edit could not be graded. `chosen[p]`: indices of the self-edits that
    are kept, empty where the passage is dropped.
    """
    chart, axes = new_chart(1.4 + 0.3 * max(len(titles), 1))
    for row, (values, choices) in enumerate(zip(rewards, chosen, strict=True)):
        heights = _spread(values, row)
        if known := [value for value in values if value is not None]:
            axes.plot([min(known), max(known)], [row, row], color=PALE, linewidth=2, zorder=1)
        for number, value in enumerate(values):
            if value is not None:
                is_chosen = number in choices
                face = BLUE if is_chosen else "white"
                axes.plot(
                    [value], [heights[number]], "o", color=BLUE if is_chosen else GREY, mfc=face, zorder=2 + is_chosen
                )
        if baseline is not None and (before := baseline[row]) is not None:
            axes.plot([before] * 2, [row - 0.35, row + 0.35], color=INK, linewidth=1.6, zorder=2)
    axes.plot([], [], "o", color=GREY, mfc="white", linestyle="none", label="self-edit")
    axes.plot([], [], "o", color=BLUE, linestyle="none", label="chosen")
    if baseline is not None:
        axes.plot([], [], "|", color=INK, markersize=10, linestyle="none", label="baseline")
    axes.set_yticks(range(len(titles)), [short(title) for title in titles])
    axes.set_ylim(len(titles) - 0.4, -0.6)
    accuracy_axis(axes, "x", f"reward: mean adapter accuracy (n = {len(titles)} passages)")
    axes.set_xlim(-0.03, 1.03)
    legend_outside(chart)
    kept = sum(bool(choices) for choices in chosen)
    chart.alt = f"Rewards of the self-edits of {len(titles)} passages; self-edits of {kept} of them are kept."
    return chart


@styled
def training_loss(curves: Mapping[str, Sequence[float]], *, step: str = "epoch") -> Chart:
    """Mean loss of each epoch (or `step`) of each adapter; many adapters are pale, with their mean drawn."""
    chart, axes = new_chart(2.9)
    many = len(curves) > MOST_LOSS_CURVES
    for number, (name, losses) in enumerate(curves.items()):
        epochs = range(1, len(losses) + 1)
        if many:
            axes.plot(
                epochs, losses, color=LIGHT, linewidth=0.9, label=f"one of {len(curves)}" if number == 0 else None
            )
        else:
            axes.plot(epochs, losses, "-o", color=CYCLE[number % len(CYCLE)], markersize=4, label=short(name))
    if many:
        shared = min(len(losses) for losses in curves.values())
        mean = [sum(losses[epoch] for losses in curves.values()) / len(curves) for epoch in range(shared)]
        axes.plot(range(1, shared + 1), mean, "-o", color=BLUE, markersize=4, label="mean")
    n_adapters = counted(len(curves), "adapters")
    axes.set_xlabel(f"{step} (n = {n_adapters})")
    axes.set_ylabel("training loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    legend_outside(chart, "outside right center", 1)
    chart.alt = f"Training loss of {n_adapters} by {step}. " + " ".join(
        f"{name}: {losses[0]:.2f} to {losses[-1]:.2f}."
        for name, losses in list(curves.items())[:MOST_LOSS_CURVES]
        if losses
    )
    return chart


def _spread(values: Sequence[float | None], row: int) -> list[float]:
    """Heights at which equal rewards stand beside one another instead of on top."""
    return [row + 0.16 * sum(other == value for other in values[:i]) for i, value in enumerate(values)]


@styled
def gold_logprobs(questions: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Chart:
    """Log-probability of each gold answer without and with the adapter: gains that no verdict shows yet."""
    chart, axes = new_chart(1.4 + 0.42 * max(len(questions), 1))
    for row, (low, high) in enumerate(zip(before, after, strict=True)):
        colour = BLUE if high > low else RED
        axes.plot([low, high], [row, row], color=colour, linewidth=2.2, zorder=1)
        axes.plot([low], [row], "o", color=INK, mfc="white", zorder=2)
        axes.plot([high], [row], "o", color=colour, zorder=3)
    axes.plot([], [], "o", color=INK, mfc="white", linestyle="none", label="without adapter")
    for colour, label in ((BLUE, "with adapter, more likely"), (RED, "less likely")):
        axes.plot([], [], "o", color=colour, linestyle="none", label=label)
    axes.set_yticks(range(len(questions)), [fill(short(question, 76), 38) for question in questions])
    axes.set_ylim(len(questions) - 0.4, -0.6)
    axes.set_xlabel(f"log-probability of gold answer\n(nats, n = {len(questions)} questions)")
    axes.grid(axis="x")
    legend_outside(chart)
    risen = sum(high > low for low, high in zip(before, after, strict=True))
    chart.alt = f"With the adapter {risen} of {len(questions)} gold answers are more likely than without."
    return chart


@styled
def self_edit_lengths(titles: Sequence[str], words_P_E: Sequence[Sequence[int]], passage_words: Sequence[int]) -> Chart:
    """For each passage the length of each of its self-edits, beside the length of the passage itself."""
    chart, axes = new_chart(1.3 + 0.3 * max(len(titles), 1))
    for row, (lengths, own) in enumerate(zip(words_P_E, passage_words, strict=True)):
        axes.plot(lengths, _spread(lengths, row), "o", color=BLUE, linestyle="none", zorder=3)
        axes.plot([own] * 2, [row - 0.35, row + 0.35], color=INK, linewidth=1.6, zorder=2)
    axes.plot([], [], "o", color=BLUE, linestyle="none", label="self-edit")
    axes.plot([], [], "|", color=INK, markersize=10, linestyle="none", label="the passage itself")
    axes.set_yticks(range(len(titles)), [short(title) for title in titles])
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"words (n = {len(titles)} passages, {sum(map(len, words_P_E))} self-edits)")
    axes.grid(axis="x")
    legend_outside(chart)
    chart.alt = "Words of the self-edits of each passage: " + "; ".join(
        f"{title} {', '.join(map(str, lengths))}" for title, lengths in zip(titles, words_P_E, strict=True)
    )
    return chart

"""Figures of training: self-edits and their rewards, the loss of adapters, log-probabilities of gold answers."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.ticker import MaxNLocator

from seal_nb.metrics import counted
from seal_nb.views.plots import accuracy_axis, gaps, legend_outside, short
from seal_nb.views.style import BLUE, CYCLE, GREY, INK, LIGHT, PALE, RED, Chart, new_chart, styled

MOST_LOSS_CURVES = 6  # as many as there are colours


@styled
def plot_rewards(
    titles: Sequence[str],
    rewards: Sequence[Sequence[float | None]],
    chosen: Sequence[Sequence[int]],
    baseline: Sequence[float | None] | None = None,
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
def plot_losses(curves: Mapping[str, Sequence[float | None]], *, step: str = "epoch") -> Chart:
    """Training loss of each adapter by epoch; more than six adapters are drawn pale, with their mean.

    Args:
        curves: adapter name → mean loss per epoch, in nats per token; None where it is not known.
        step: name of the x axis, if it is not epochs.

    Returns:
        A matplotlib Figure.
    """
    chart, axes = new_chart(2.9)
    known = {name: gaps(losses) for name, losses in curves.items()}
    many = len(known) > MOST_LOSS_CURVES
    for number, (name, losses) in enumerate(known.items()):
        epochs = range(1, len(losses) + 1)
        if many:
            label = f"one of {len(known)}" if number == 0 else None
            axes.plot(epochs, losses, color=LIGHT, linewidth=0.9, label=label)
        else:
            axes.plot(epochs, losses, "-o", color=CYCLE[number % len(CYCLE)], markersize=4, label=short(name))
    if many:
        shared = min(map(len, known.values()))
        mean = np.nanmean([losses[:shared] for losses in known.values()], axis=0).tolist()
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
        for name, losses in list(known.items())[:MOST_LOSS_CURVES]
        if losses
    )
    return chart


def _spread(values: Sequence[float | None], row: int) -> list[float]:
    """Heights that keep equal values from covering each other."""
    return [row + 0.16 * sum(other == value for other in values[:i]) for i, value in enumerate(values)]


@styled
def plot_gold_logprobs(questions: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Chart:
    """Log-probability of each gold answer without and with the adapter: it changes before a verdict does.

    Args:
        questions: one label for each gold answer.
        before: log-probabilities without the adapter, in nats.
        after: with the adapter.
    """
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
def plot_self_edit_lengths(
    titles: Sequence[str], words_P_E: Sequence[Sequence[int]], passage_words: Sequence[int]
) -> Chart:
    """For each passage the number of words of each self-edit, and of the passage itself."""
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

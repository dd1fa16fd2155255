"""The statistics of published run files, computed so that they agree with them to the last bit.

SEAL's query client (``knowledge-incorporation``) rounds every accuracy to 4 decimals before averaging, takes
``statistics.mean`` and ``statistics.stdev``, and rounds what it reports once. About a third of the means
differ in the last bit with numpy, and a mean that is off by a bit picks another self-edit among equals. What
could not be graded is None here and enters no mean. Intervals are in ``metrics``.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seal_nb.metrics import Scores, Verdicts, accuracy, gain
from seal_nb.protocol import rounded


def repeat_stats(repeats: Iterable[tuple[Verdicts, Verdicts]]) -> dict[str, float | None]:
    """Published stats of one self-edit from (baseline, adapter) verdicts of each repeat.

    Accuracies are rounded to 4 decimals before averaging, as the published server sends them. A gain is over
    the questions graded on both sides. A repeat without any graded answer is left out; with none left the
    numbers are None.
    """
    pairs = list(repeats)
    before = [rounded(accuracy(baseline)) for baseline, _ in pairs]
    after = [rounded(accuracy(adapter)) for _, adapter in pairs]
    return {
        "baseline_mean": mean(before),
        "baseline_std": sample_std(before),
        "adapter_mean": mean(after),
        "adapter_std": sample_std(after),
        "gain_mean": mean([rounded(_paired_gain(baseline, adapter)) for baseline, adapter in pairs]),
    }


def _paired_gain(baseline: Verdicts, adapter: Verdicts) -> float | None:
    """Over the questions graded on both sides, so that an answer that one side lacks is no gain."""
    both = [pair for pair in zip(baseline, adapter, strict=True) if pair[0] is not None and pair[1] is not None]
    if baseline and not both:
        return None
    return gain([before for before, _ in both], [after for _, after in both])


def published_statistics(
    completion_stats_P_E: Sequence[Sequence[Mapping[str, Any]]],
) -> tuple[list[dict[str, float | None]], dict[str, float | None]]:
    """Published ``stats`` of every article and the ``overall`` of a run, from the stats of its self-edits.

    Averages run over unrounded values; every number is rounded to 4 decimals once. Overall
    ``mean_adapter_std_within_completions`` averages over all self-edits, ``mean_gain`` is adapter minus
    baseline mean.
    """
    articles = [_article_stats(stats_E) for stats_E in completion_stats_P_E]
    within = [stats["adapter_std"] for stats_E in completion_stats_P_E for stats in stats_E]
    before = [article["baseline_accuracy"] for article in articles]
    after = [article["adapter_mean_accuracy"] for article in articles]
    before_mean, after_mean = mean(before), mean(after)
    known = before_mean is not None and after_mean is not None
    overall = {
        "baseline_mean_accuracy": before_mean,
        "baseline_std_of_article_means": sample_std(before),
        "adapter_mean_accuracy": after_mean,
        "adapter_std_of_article_means": sample_std(after),
        "mean_adapter_std_over_completions": mean([a["adapter_std_over_completions"] for a in articles]),
        "mean_adapter_std_within_completions": mean(within),
        "mean_gain": after_mean - before_mean if known else None,  # type: ignore[operator]
    }
    rounded_P = [{name: rounded(value) for name, value in article.items()} for article in articles]
    return rounded_P, {name: rounded(value) for name, value in overall.items()}


def _article_stats(stats_E: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    after = [stats["adapter_mean"] for stats in stats_E]
    return {
        "baseline_accuracy": mean([stats["baseline_mean"] for stats in stats_E]),
        "adapter_mean_accuracy": mean(after),
        "adapter_std_over_completions": sample_std(after),
        "mean_adapter_std_within_completions": mean([stats["adapter_std"] for stats in stats_E]),
        "mean_gain": mean([stats["gain_mean"] for stats in stats_E]),
    }


def mean(values: Scores) -> float | None:
    """The exact mean (``statistics.mean``) of what is known; None of nothing."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def sample_std(values: Scores) -> float | None:
    """The sample standard deviation of what is known: 0.0 of one value, None of nothing."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else (0.0 if known else None)

"""Numbers about answers: accuracies, intervals, paired differences; published statistics.

A verdict is True, False or None; None is an ungraded answer, which is left out and counted, never taken for wrong.
``correct_P_Q`` holds, for each passage, the verdicts of all its answers (questions × repeats × self-edits)."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, Literal, TypeVar

import numpy as np

from seal_nb.errors import DataError
from seal_nb.protocol import accuracy as accuracy
from seal_nb.protocol import gain as gain
from seal_nb.protocol import rounded


def counted(number: int, plural: str) -> str:
    """``counted(1, "passages")`` is "1 passage", ``counted(2, "passages")`` is "2 passages"."""
    return f"{number} {plural.removesuffix('s') if number == 1 else plural}"


Verdicts = Sequence[bool | None]
Scores = Sequence[float | None]  # verdicts too: True is 1.0
Weighting = Literal["passage", "question"]
T = TypeVar("T")

N_RESAMPLES = 10_000
LEAST_RESAMPLES = 1_000  # of so many passages that the chance of the draw no longer shows
MOST_DRAWS = 40_000_000  # of one interval: up to 4,000 passages have all resamples
DRAWS_AT_ONCE = 4_000_000  # in memory
MIN_PASSAGES = 6  # sign test: five that all agree are still 1 in 16 by chance
SIGNIFICANCE = 0.05
MOST_ENUMERATED = 12  # passages whose 2**n sign flips are all tried; beyond that they are drawn
STATS = ("baseline_mean", "baseline_std", "adapter_mean", "adapter_std", "gain_mean")  # of a self-edit


def mean(values: Scores) -> float | None:
    """The exact mean of what is known, as published; None of nothing. With numpy about a third of the published means
    differ in the last bit, and a mean that is off by a bit picks another self-edit among equals."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def sample_std(values: Scores) -> float | None:
    """The sample standard deviation of what is known: 0.0 of one value, None of nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.stdev(known) if len(known) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval over ``n`` units; ``n_left_out`` of them had no graded answer."""

    mean: float
    low: float
    high: float
    n: int
    n_left_out: int = 0
    unit: str = "passages"

    @property
    def n_asked(self) -> int:
        return self.n + self.n_left_out


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """An Estimate of how much higher the first of two runs over the same passages is. ``p_value``: how often randomly
    swapping the runs in each passage gives a difference at least as large. ``means``: of both runs."""

    p_value: float
    means: tuple[float, ...] = ()

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes zero and the sign-flip test is significant. The bootstrap alone is too narrow
        with few passages: without any effect, its interval excludes zero in one of eight runs of 6 passages."""
        return not self.low <= 0 <= self.high and self.n >= MIN_PASSAGES and self.p_value < SIGNIFICANCE

    def sentence(self) -> str:
        """Such as "+7.3 points [2.7, 11.9], 200 passages: real"."""
        if self.is_real:
            verdict = "real"
        elif self.n < MIN_PASSAGES:
            verdict = f"too few to tell (at least {MIN_PASSAGES})"
        elif self.low <= 0 <= self.high:
            verdict = "not distinguishable from noise"
        else:
            verdict = f"interval excludes 0, but too few to settle it (sign-flip p = {self.p_value:.2g})"
        interval = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{100 * self.mean:+.1f} points {interval}, {counted(self.n, self.unit)}: {verdict}"


def mean_interval(
    correct_P_Q: Sequence[Scores], *, weighting: Weighting = "passage", unit: str = "passages"
) -> Estimate:
    """Mean accuracy with a 95 % cluster bootstrap interval: whole passages are resampled, with their questions, from a
    fixed seed; with one passage it is [0, 1]. ``weighting``: "passage" is the published mean (of passage means),
    "question" counts every answer once. ``unit`` names passages in sentences. Raises: DataError: nothing was graded."""
    known = [scores for passage in correct_P_Q if (scores := [score for score in passage if score is not None])]
    totals, n = _totals(known, weighting), len(known)
    centre, low, high = _bootstrap(totals, widest=(0.0, 1.0))
    return Estimate(mean=centre, low=low, high=high, n=n, n_left_out=len(correct_P_Q) - n, unit=unit)


def paired_difference(
    correct_P_Q: Sequence[Scores],
    minus_P_Q: Sequence[Scores],
    *,
    weighting: Weighting = "passage",
    unit: str = "passages",
) -> Difference:
    """First minus second run over the same passages in the same order: paired bootstrap and sign-flip test. If a
    passage has the same number of answers in both runs, only answers graded in both are compared. With one passage the
    interval is [-1, 1]. Raises: DataError if the numbers of passages differ, or no passage was graded in both."""
    totals = _paired_totals(correct_P_Q, minus_P_Q, weighting)
    n, (centre, low, high) = totals.shape[1], _bootstrap(totals, widest=(-1.0, 1.0))
    about = {"n_left_out": len(correct_P_Q) - n, "unit": unit, "p_value": _sign_flip_p(totals)}
    sums = totals.sum(axis=1)
    return Difference(mean=centre, low=low, high=high, n=n, means=tuple((sums[::2] / sums[1::2]).tolist()), **about)


def if_graded(statistic: Callable[..., T], *scores_P_Q: Sequence[Scores], **how: Any) -> T | None:
    """``mean_interval`` or ``paired_difference`` of these scores; None where no passage has a graded answer in all."""
    try:
        return statistic(*scores_P_Q, **how)
    except DataError:
        return None


def _paired_totals(correct_P_Q: Sequence[Scores], minus_P_Q: Sequence[Scores], weighting: Weighting) -> np.ndarray:
    """(4, P) ``_totals`` of the first and of the second run, over passages that both have graded: of the scores known
    in both, or in each if the numbers of answers differ."""
    if len(correct_P_Q) != len(minus_P_Q):
        remedy = "keep the passages that both have, in one order"
        raise DataError(f"runs of {len(correct_P_Q)} and {len(minus_P_Q)} passages cannot be paired", remedy=remedy)
    kept = []
    for first, second in zip(correct_P_Q, minus_P_Q, strict=True):
        if len(first) == len(second):
            is_known = [a is not None and b is not None for a, b in zip(first, second, strict=True)]
            first, second = list(compress(first, is_known)), list(compress(second, is_known))
        a, b = ([score for score in scores if score is not None] for scores in (first, second))
        if a and b:
            kept.append((a, b))
    return np.concatenate([_totals([pair[run] for pair in kept], weighting) for run in (0, 1)])


def _totals(scores_P_Q: Sequence[Sequence[float]], weighting: Weighting) -> np.ndarray:
    """(2, P) sums and weights; the ratio of their totals is the weighted mean."""
    if not scores_P_Q:
        raise DataError("no passage has a graded answer", remedy="grade the answers of the run again")
    sums, counts = np.array([(sum(scores), len(scores)) for scores in scores_P_Q], dtype=np.float64).T
    return np.stack([sums, counts] if weighting == "question" else [sums / counts, np.ones_like(counts)])


def _mean(sums: np.ndarray) -> Any:
    """One run's mean from (2, …) sums and weights, or two runs' difference of means from (4, …)."""
    means = sums[::2] / sums[1::2]
    return means[0] - means[1] if len(means) > 1 else means[0]


def _bootstrap(totals: np.ndarray, *, widest: tuple[float, float]) -> tuple[float, float, float]:
    """The mean (`_mean`) and its 95 % percentile interval over passages drawn with replacement."""
    n, (low, high) = totals.shape[1], widest
    if n > 1:
        parts = [[values[drawn].sum(axis=1) for values in totals] for drawn in _draws(n, n)]
        resampled = _mean(np.concatenate(parts, axis=1))
        # Rounded, so that summation error does not make a zero "real".
        low, high = (round(float(bound), 12) for bound in np.quantile(resampled, [0.025, 0.975]))
    return float(_mean(totals.sum(axis=1))), low, high


def _draws(below: int, n: int) -> Iterator[np.ndarray]:
    """Rows of ``n`` random whole numbers, a part at a time. The parts together are what one draw of all would be."""
    generator, at_once = np.random.default_rng(0), max(1, DRAWS_AT_ONCE // n)
    n_rows = min(N_RESAMPLES, max(LEAST_RESAMPLES, MOST_DRAWS // n))
    for start in range(0, n_rows, at_once):
        yield generator.integers(0, below, size=(min(at_once, n_rows - start), n))


def _sign_flip_p(totals: np.ndarray) -> float:
    """Two-sided p of a difference of two means under random swaps of the runs in each passage. All 2**P swaps up to
    MOST_ENUMERATED passages, else N_RESAMPLES at random and the one observed."""
    n = totals.shape[1]
    every = [np.arange(2**n)[:, None] >> np.arange(n) & 1] if n <= MOST_ENUMERATED else []  # (swaps, P)
    # (swaps, 2): what the swaps add to the first run
    more = np.concatenate([swapped @ (totals[2:] - totals[:2]).T for swapped in every or _draws(2, n)])
    sums = totals.sum(axis=1)
    differences = _mean(np.concatenate([sums[:2] + more, sums[2:] - more], axis=1).T)
    # Rounded sums of the same numbers in another order must not count as smaller.
    n_as_large = int(np.sum(np.abs(differences) >= abs(_mean(sums)) - 1e-9))
    return n_as_large / len(more) if every else (n_as_large + 1) / (len(more) + 1)


def written_value(value: Any) -> str:
    """A swept value, short: lists joined, an empty one the default."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value)) or "default"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def repeat_stats(repeats: Sequence[tuple[Verdicts, Verdicts]]) -> dict[str, float | None]:
    """Published stats of one self-edit from (baseline, adapter) verdicts of each repeat. Accuracies are rounded to 4
    decimals before averaging, as the published server sends them. A repeat without any graded answer is left out."""
    before = [rounded(accuracy(baseline)) for baseline, _ in repeats]
    after = [rounded(accuracy(adapter)) for _, adapter in repeats]
    # Over the questions graded on both sides, so that an answer that one side lacks is no gain.
    both_R = [[pair for pair in zip(*sides, strict=True) if None not in pair] for sides in repeats]
    gains = [rounded(gain([before for before, _ in both], [after for _, after in both])) for both in both_R]
    numbers = (mean(before), sample_std(before), mean(after), sample_std(after), mean(gains))
    return dict(zip(STATS, numbers, strict=True))


def published_statistics(
    completion_stats_P_E: Sequence[Sequence[Mapping[str, Any]]],
) -> tuple[list[dict[str, float | None]], dict[str, float | None]]:
    """Published ``stats`` of every article and the ``overall`` of a run, from the stats of its self-edits. Averages run
    over unrounded values; every number is rounded to 4 decimals once."""
    articles = [
        {
            "baseline_accuracy": mean([stats["baseline_mean"] for stats in stats_E]),
            "adapter_mean_accuracy": mean([stats["adapter_mean"] for stats in stats_E]),
            "adapter_std_over_completions": sample_std([stats["adapter_mean"] for stats in stats_E]),
            "mean_adapter_std_within_completions": mean([stats["adapter_std"] for stats in stats_E]),
            "mean_gain": mean([stats["gain_mean"] for stats in stats_E]),
        }
        for stats_E in completion_stats_P_E
    ]
    before, after = ([one[name] for one in articles] for name in ("baseline_accuracy", "adapter_mean_accuracy"))
    before_mean, after_mean = mean(before), mean(after)
    overall = {
        "baseline_mean_accuracy": before_mean,
        "baseline_std_of_article_means": sample_std(before),
        "adapter_mean_accuracy": after_mean,
        "adapter_std_of_article_means": sample_std(after),
        "mean_adapter_std_over_completions": mean([one["adapter_std_over_completions"] for one in articles]),
        "mean_adapter_std_within_completions": mean([one["adapter_std"] for one in chain(*completion_stats_P_E)]),
        "mean_gain": None if before_mean is None or after_mean is None else after_mean - before_mean,
    }
    *rounded_P, of_run = ({name: rounded(one[name]) for name in one} for one in (*articles, overall))
    return rounded_P, of_run

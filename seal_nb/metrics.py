"""Numbers about answers: accuracies, intervals, paired differences; published statistics.

A verdict is True, False or None; None is an ungraded answer, which is left out and counted, never taken for wrong.
``correct_P_Q`` holds, for each passage, the verdicts of all its answers (questions × repeats × self-edits).
docs/statistics.md explains each choice, with its source; benchmarks/coverage.py shows how often intervals hold."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np

from seal_nb.errors import DataError, SettingsError
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

MIN_PASSAGES = 6  # with five, even a sign test of passages that all agree has p = 1/16
SIGNIFICANCE = 0.05
POWER = 0.8
ALIKE = 0.15  # correlation of two answers of one passage, in the published evaluations (0.09 to 0.16)
HALF_A_QUESTION = 0.5  # squared changes of one question that are added to the squared deviations of few passages
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
    """A mean with its 95 % interval over ``n`` units; ``n_left_out`` of them had no graded answer. ``crossed``: what
    the units share, as ``(12, "passages")`` of sequences or ``(3, "runs")`` of passages. The interval is over both."""

    mean: float
    low: float
    high: float
    n: int
    n_left_out: int = 0
    unit: str = "passages"
    crossed: tuple[int, str] | None = None

    @property
    def n_asked(self) -> int:
        return self.n + self.n_left_out

    @property
    def units(self) -> str:
        """What the interval is over, such as "8 sequences × 12 passages"."""
        return counted(self.n, self.unit) + (f" × {counted(*self.crossed)}" if self.crossed else "")


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """An Estimate of how much higher the first of two runs over the same passages is, with the p of the paired t test:
    below 0.05 exactly if the interval excludes zero. ``se``: its standard error, with ``df`` degrees of freedom.
    ``means``: of both runs. ``own_p``: before ``adjusted``, which makes p and interval those of ``n_compared``
    comparisons."""

    se: float
    df: float
    own_p: float
    p_value: float
    means: tuple[float, ...] = ()
    n_compared: int = 1

    @property
    def is_enough(self) -> bool:
        n_passages = self.crossed[0] if self.crossed and self.crossed[1] == "passages" else self.n
        return min(self.n, n_passages) >= MIN_PASSAGES

    @property
    def is_real(self) -> bool:
        """Whether there are enough passages and p is below 0.05."""
        return self.is_enough and self.p_value < SIGNIFICANCE

    @property
    def sd(self) -> float:
        """Standard deviation of the difference between passages, which a plan needs (``passages_needed``)."""
        return self.se * math.sqrt(self.n)

    def no_worse(self, margin: float) -> bool:
        """Whether the first run is shown to be less than ``margin`` worse (one-sided t test, 5 %)."""
        return self.is_enough and _t_tail((self.mean + margin) / self.se, self.df) < SIGNIFICANCE

    def is_equivalent(self, margin: float) -> bool:
        """Whether both runs are shown to be within ``margin`` of each other: two one-sided tests (Schuirmann 1987)."""
        return self.no_worse(margin) and replace(self, mean=-self.mean).no_worse(margin)

    def at_p(self, p_value: float, *, n_compared: int = 1) -> Self:
        """The same with another p: its interval excludes zero exactly if this p is below 0.05."""
        level = SIGNIFICANCE * min(1.0, self.own_p / p_value) if self.own_p else SIGNIFICANCE
        reach = self.se * _t(self.df, level)
        low, high = max(-1.0, self.mean - reach), min(1.0, self.mean + reach)
        return replace(self, low=low, high=high, p_value=p_value, n_compared=n_compared)

    def sentence(self, margin: float | None = None) -> str:
        """Such as "+7.3 points [2.7, 11.9], 200 passages: real". With a margin, one that is not real says whether it
        is shown to be within the margin."""
        verdict = "real" if self.is_real else "not distinguishable from noise"
        if not self.is_enough:
            verdict = f"too few to tell (at least {MIN_PASSAGES})"
        elif margin is not None and not self.is_real:
            points = f"{100 * margin:g} points"
            verdict += f", not shown to be less than {points} worse" if not self.no_worse(margin) else ""
            verdict = f"equal within {points}" if self.is_equivalent(margin) else verdict
        interval = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        of_many = f" (one of {self.n_compared} comparisons)" if self.n_compared > 1 else ""
        return f"{100 * self.mean:+.1f} points {interval}, {self.units}{of_many}: {verdict}"


def mean_interval(correct_P_Q: Sequence[Scores], *, unit: str = "passages", **how: Any) -> Estimate:
    """Mean accuracy with its 95 % interval: Wilson's, for as many independent answers as have the variance between
    passages (Dean and Pagano 2015). With one passage it is [0, 1]. ``how``: ``weighting`` "passage" is the published
    mean (of passage means), "question" counts every answer once. ``groups_P_Q``: what each answer shares with answers
    of other units (the passage in a sequence, the seed); ``group`` names them. ``n_each``: answers of which a score is
    the mean. Raises: DataError: nothing was graded."""
    spread = _spread([correct_P_Q], **how)
    share, n = spread.mean * (1 - spread.mean), spread.n_independent
    if spread.variance and share > 0:
        n = min(share / spread.variance * (_Z / _t(spread.df)) ** 2, spread.n_answers)
    low, high = 0.0, 1.0
    if spread.df:
        centre, narrower = (spread.mean + _Z**2 / (2 * n)), 1 + _Z**2 / n
        reach = _Z * math.sqrt(share / n + (_Z / (2 * n)) ** 2)
        low, high = ((centre + sign * reach) / narrower for sign in (-1, 1))
    low, high = max(0.0, min(low, spread.mean)), min(1.0, max(high, spread.mean))
    return Estimate(mean=spread.mean, low=low, high=high, unit=unit, **spread.about)


def paired_difference(
    correct_P_Q: Sequence[Scores], minus_P_Q: Sequence[Scores], *, unit: str = "passages", **how: Any
) -> Difference:
    """First minus second run over the same passages in the same order, with the paired t interval and its p. If a
    passage has the same number of answers in both runs, only answers graded in both are compared. With one passage the
    interval is [-1, 1]. ``how``: as of ``mean_interval``. Raises: DataError if the numbers of passages differ,
    or no passage was graded in both."""
    if len(correct_P_Q) != len(minus_P_Q):
        problem = f"runs of {len(correct_P_Q)} and {len(minus_P_Q)} passages cannot be paired"
        raise DataError(problem, remedy="keep the passages that both have, in one order")
    spread = _spread([correct_P_Q, minus_P_Q], **how)
    about: dict[str, Any] = {"mean": spread.mean, "unit": unit, "means": spread.means, **spread.about}
    if not spread.df:
        return Difference(low=-1.0, high=1.0, se=1.0, df=1.0, own_p=1.0, p_value=1.0, **about)
    size, n, t, n_passages = abs(spread.mean), spread.n_independent, _t(spread.df), spread.about["n"]
    variance = max(size * (1 - size) / n, (t / (n + t**2)) ** 2)  # without any spread: as wide as Wilson's at zero
    if spread.variance:
        variance = spread.variance + HALF_A_QUESTION * n_passages / spread.n_answers**2 / max(1, n_passages - 1)
    se = math.sqrt(variance)
    p = 2 * _t_tail(size / se, spread.df)
    return Difference(low=0.0, high=0.0, se=se, df=spread.df, own_p=p, p_value=p, **about).at_p(p)


def ratio_interval(shares_P: Sequence[float], of_P: Sequence[float]) -> Estimate | None:
    """The sum of the first over the sum of the second numbers of each passage, with its 95 % t interval (linearised).
    None for fewer than two passages, or for a sum of zero."""
    shares, of = np.array(shares_P, dtype=float), np.array(of_P, dtype=float)
    n = len(of)
    if n < 2 or not of.sum():
        return None
    ratio = float(shares.sum() / of.sum())
    reach = _t(n - 1) * float(np.std((shares - ratio * of) / of.mean(), ddof=1)) / math.sqrt(n)
    return Estimate(mean=ratio, low=ratio - reach, high=ratio + reach, n=n)


def if_graded(statistic: Callable[..., T], *scores_P_Q: Sequence[Scores], **how: Any) -> T | None:
    """``mean_interval`` or ``paired_difference`` of these scores; None where no passage has a graded answer in all."""
    try:
        return statistic(*scores_P_Q, **how)
    except DataError:
        return None


def adjusted(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """Comparisons that are looked at together, with Holm's p (Holm 1979): without any effect, one or more of them is
    called real in at most 5 % of cases. None stays None."""
    known = [one for one in differences if one is not None]
    if len(known) < 2:
        return list(differences)
    from statsmodels.stats.multitest import multipletests

    holm = iter(multipletests([one.own_p for one in known], method="holm")[1])
    return [one and one.at_p(float(next(holm)), n_compared=len(known)) for one in differences]


def passages_needed(smallest: float, sd: float) -> int:
    """Passages that find a true difference with 80 % power in a paired t test.

    Args:
        smallest: the smallest difference of interest, a fraction such as 0.05; not the one that was seen.
        sd: standard deviation of the difference between passages (column ``sd`` of ``compare``), from an earlier run.

    Returns:
        Their number, at least 6.

    Raises:
        SettingsError: for an effect that is not between 0 and 1."""
    from statsmodels.stats.power import TTestPower

    if not (0 < smallest < 1 and sd >= 0):
        raise SettingsError(f"smallest effect {smallest:g}, sd {sd:g}: give fractions such as 0.05 (5 points)")
    needed = TTestPower().solve_power(smallest / max(sd, smallest / 3), power=POWER, alpha=SIGNIFICANCE)
    return max(MIN_PASSAGES, math.ceil(float(np.squeeze(needed))))


_Z = statistics.NormalDist().inv_cdf(1 - SIGNIFICANCE / 2)


def _t(df: float, level: float = SIGNIFICANCE) -> float:
    from scipy.special import stdtrit  # a third of a second

    return float(stdtrit(df, 1 - level / 2))


def _t_tail(t: float, df: float) -> float:
    from scipy.special import stdtr

    return float(stdtr(df, -t))


class _Spread(NamedTuple):
    """A mean or a difference of means, with its variance between units (0.0 if all are equal). ``n_independent``: how
    many independent answers these are worth if answers of a unit are ``ALIKE``. ``df`` is 0 with one unit."""

    mean: float
    means: tuple[float, ...]
    variance: float
    df: float
    n_answers: float
    n_independent: float
    about: dict[str, Any]


def _spread(
    runs: Sequence[Sequence[Scores]],
    *,
    weighting: Weighting = "passage",
    groups_P_Q: Sequence[Sequence[Any]] = (),
    minus_groups_P_Q: Sequence[Sequence[Any]] = (),
    group: str = "passages",
    n_each: float = 1,
) -> _Spread:
    """Of one run, or of the first minus the second, over units that all have graded. The variance is that of linearised
    sums over units; with groups, over units and over groups (Cameron, Gelbach and Miller 2011)."""
    kept: list[list[tuple[float, float, int, Any]]] = [[] for _ in runs]  # score, weight, unit, group
    n = 0
    for at, rows in enumerate(zip(*runs, strict=True)):
        is_paired = len({*map(len, rows)}) == 1
        places_R = [[q for q, score in enumerate(row) if score is not None] for row in rows]
        if is_paired:
            places_R = [sorted(set(places_R[0]).intersection(*places_R))] * len(rows)
        if not all(places_R):
            continue
        n += 1
        labels_R = [of[at] if of else () for of in (groups_P_Q, minus_groups_P_Q or groups_P_Q)]
        for own, row, places, labels in zip(kept, rows, places_R, labels_R, strict=False):
            weight = 1.0 if weighting == "question" else 1 / len(places)
            own += [(float(row[q] or 0), weight, n, labels[q] if groups_P_Q else n) for q in places]
    if not n:
        raise DataError("no passage has a graded answer", remedy="grade the answers of the run again")
    means, changes = list[float](), list[np.ndarray]()
    units, groups = list[int](), list[Any]()
    for own, sign in zip(kept, (1, -1), strict=False):
        scores, weights, units_of, groups_of = zip(*own, strict=True)
        means.append(float(np.average(scores, weights=weights)))
        changes.append(sign * np.array(weights) / sum(weights) * (np.array(scores) - means[-1]))
        units += units_of
        groups += groups_of
    per_answer = np.concatenate(changes)
    variance, _ = _between(per_answer, units)
    n_answers, df, crossed = min(map(len, kept)) * n_each, n - 1.0, None
    if groups_P_Q:
        of_groups, n_groups = _between(per_answer, groups)
        shared, _ = _between(per_answer, list(zip(units, groups, strict=True)))
        crossed, of_units = (n_groups, group), variance
        if variance or of_groups:
            variance = max(of_units, of_groups, of_units + of_groups - shared)
            df = (of_units + of_groups) ** 2 / (of_units**2 / max(df, 1) + of_groups**2 / max(n_groups - 1, 1))
        df = min(df, (n_groups if group == "passages" else n) - 1)  # of distinct passages
    return _Spread(
        mean=means[0] - sum(means[1:]),
        means=tuple(means),
        variance=variance,
        df=df,
        n_answers=n_answers,
        n_independent=n_answers / (1 + (n_answers / n - 1) * ALIKE),
        about={"n": n, "n_left_out": len(runs[0]) - n, "crossed": crossed},
    )


def _between(per_answer: np.ndarray, keys: Sequence[Any]) -> tuple[float, int]:
    """The variance of a total from the sums of its parts by key, and the number of keys; 0.0 for one key."""
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    sums = np.bincount([places[key] for key in keys], weights=per_answer)
    n = len(sums)
    variance = float(sums @ sums) * n / (n - 1) if n > 1 else 0.0
    return (variance if variance > 1e-18 else 0.0), n  # sums of equal numbers differ in the last bits


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

"""Numbers about answers: accuracies, intervals, paired differences, power, recitation, agreement of graders.

Accuracies are fractions. A verdict is True, False or None; None is an ungraded answer, which is left out and counted,
never taken for wrong. ``correct_P_Q`` holds, for each passage, the verdicts of all its answers (questions × repeats ×
self-edits). The statistics of published run files, which must agree in every bit, are in ``results.statistics``.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from seal_nb.errors import DataError, SettingsError


def counted(number: int, plural: str) -> str:
    """``counted(1, "passages")`` is "1 passage", ``counted(2, "passages")`` is "2 passages"."""
    return f"{number} {plural.removesuffix('s') if number == 1 else plural}"


Verdicts = Sequence[bool | None]
Scores = Sequence[float | None]  # verdicts too: True is 1.0
Weighting = Literal["passage", "question"]

N_RESAMPLES = 10_000
MIN_PASSAGES = 6  # sign test: five that all agree are still 1 in 16 by chance
SIGNIFICANCE = 0.05
MOST_ENUMERATED = 12  # passages whose 2**n sign flips are all tried; beyond that they are drawn
_CHUNK = 500  # resamples at a time, so that memory stays small


def accuracy(correct: Scores) -> float | None:
    """Share of graded answers that are correct: 0.0 without questions, None where none was graded."""
    graded = [verdict for verdict in correct if verdict is not None]
    if not correct:
        return 0.0
    return sum(graded) / len(graded) if graded else None


def gain(baseline: Verdicts, adapter: Verdicts) -> float | None:
    """Adapter accuracy minus baseline accuracy, unrounded; None where either is."""
    before, after = accuracy(baseline), accuracy(adapter)
    return None if before is None or after is None else after - before


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval over ``n`` units; ``n_left_out`` of them had no graded answer."""

    mean: float
    low: float
    high: float
    n: int
    n_left_out: int = 0
    unit: str = "passages"


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """An Estimate of how much higher the first of two runs over the same passages is.

    ``p_value``: how often randomly swapping the runs in each passage gives a difference at least as large.
    """

    p_value: float

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes zero and the sign-flip test is significant.

        The bootstrap alone is too narrow with few passages: without any effect, its interval excludes zero in one of
        eight runs of 6 passages.
        """
        return self._leaves_out_zero and self.n >= MIN_PASSAGES and self.p_value < SIGNIFICANCE

    @property
    def _leaves_out_zero(self) -> bool:
        return not self.low <= 0 <= self.high

    def sentence(self) -> str:
        """Such as "+7.3 points [2.7, 11.9], 200 passages: real"."""
        return (
            f"{100 * self.mean:+.1f} points [{100 * self.low:.1f}, {100 * self.high:.1f}], "
            f"{counted(self.n, self.unit)}: "
            f"{'real' if self.is_real else self._unclear()}"
        )

    def _unclear(self) -> str:
        if self.n < MIN_PASSAGES:
            return f"too few to tell (at least {MIN_PASSAGES})"
        if self._leaves_out_zero:
            return f"interval excludes 0, but too few to settle it (sign-flip p = {self.p_value:.2g})"
        return "not distinguishable from noise"


def mean_interval(
    correct_P_Q: Sequence[Scores],
    *,
    weighting: Weighting = "passage",
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
    unit: str = "passages",
) -> Estimate:
    """Mean accuracy with a cluster bootstrap interval: whole passages are resampled, with their questions.

    Args:
        correct_P_Q: for each passage its verdicts or scores; None is left out.
        weighting: "passage" is the published mean (of passage means), "question" counts every answer once.
        seed: of the bootstrap.
        n_resamples: of the bootstrap.
        unit: what the outer list is over, for sentences.

    Returns:
        The mean with its 95 % interval; with one passage the interval is [0, 1].

    Raises:
        DataError: nothing was graded.
    """
    known = [[score for score in scores if score is not None] for scores in correct_P_Q]
    sums_P, weights_P = _sums_and_weights([scores for scores in known if scores], weighting)
    n = len(sums_P)
    low, high = 0.0, 1.0
    if n > 1:
        resampled = np.concatenate([sums[0] / sums[1] for sums in _resampled((sums_P, weights_P), seed, n_resamples)])
        low, high = _interval(resampled)
    return Estimate(
        mean=float(sums_P.sum() / weights_P.sum()), low=low, high=high, n=n, n_left_out=len(known) - n, unit=unit
    )


def paired_difference(
    correct_P_Q: Sequence[Scores],
    minus_P_Q: Sequence[Scores],
    *,
    weighting: Weighting = "passage",
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
    unit: str = "passages",
) -> Difference:
    """First minus second run over the same passages in the same order: paired bootstrap and sign-flip test.

    If a passage has the same number of answers in both runs, only answers graded in both are compared. With one passage
    the interval is [-1, 1]. The other arguments are those of ``mean_interval``.

    Raises:
        DataError: the numbers of passages differ, or no passage was graded in both.
    """
    if len(correct_P_Q) != len(minus_P_Q):
        raise DataError(
            f"runs of {len(correct_P_Q)} and {len(minus_P_Q)} passages cannot be paired",
            remedy="keep the passages that both have, in one order",
        )
    both = [graded_in_both(*scores) for scores in zip(correct_P_Q, minus_P_Q, strict=True)]
    kept = [(first, second) for first, second in both if first and second]
    totals = (
        *_sums_and_weights([first for first, _ in kept], weighting),
        *_sums_and_weights([second for _, second in kept], weighting),
    )
    low, high = -1.0, 1.0
    if len(kept) > 1:
        chunks = _resampled(totals, seed, n_resamples)
        resampled = np.concatenate([a / wa - b / wb for a, wa, b, wb in chunks])
        low, high = _interval(resampled)
    a, wa, b, wb = (values.sum() for values in totals)
    return Difference(
        mean=float(a / wa - b / wb),
        low=low,
        high=high,
        n=len(kept),
        n_left_out=len(both) - len(kept),
        unit=unit,
        p_value=_sign_flip_p(totals, seed, n_resamples),
    )


def graded_in_both(first: Scores, second: Scores) -> tuple[list[float], list[float]]:
    """The scores known in both; if the numbers of answers differ, those known in each."""
    if len(first) == len(second):
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        return [a for a, _ in pairs], [b for _, b in pairs]
    return [a for a in first if a is not None], [b for b in second if b is not None]


def _sums_and_weights(scores_P_Q: Sequence[Sequence[float]], weighting: Weighting) -> tuple[np.ndarray, np.ndarray]:
    """(P,) sums and (P,) weights whose ratio of totals is the weighted mean."""
    if not scores_P_Q:
        raise DataError("no passage has a graded answer", remedy="grade the answers of the run again")
    sums = np.array([sum(scores) for scores in scores_P_Q], dtype=np.float64)
    counts = np.array([len(scores) for scores in scores_P_Q], dtype=np.float64)
    return (sums, counts) if weighting == "question" else (sums / counts, np.ones_like(counts))


def _resampled(totals: Sequence[np.ndarray], seed: int, n_resamples: int) -> Iterable[list[np.ndarray]]:
    """Totals of each (P,) array over passages drawn with replacement, a chunk of resamples at a time."""
    generator = np.random.default_rng(seed)
    n = len(totals[0])
    for start in range(0, n_resamples, _CHUNK):
        drawn = generator.integers(0, n, size=(min(_CHUNK, n_resamples - start), n))  # (chunk, P)
        yield [values[drawn].sum(axis=1) for values in totals]


def _sign_flip_p(totals: Sequence[np.ndarray], seed: int, n_draws: int) -> float:
    """Two-sided p of a difference of ratios a/wa - b/wb under random swaps of the runs in each passage.

    All 2**P swaps up to MOST_ENUMERATED passages, else ``n_draws`` at random and the one observed.
    """
    n = len(totals[0])
    is_exact = n <= MOST_ENUMERATED
    generator = np.random.default_rng(seed)
    a, wa, b, wb = (values.sum() for values in totals)
    more_A, more_WA = totals[2] - totals[0], totals[3] - totals[1]  # (P,) what a swap adds to the first run
    as_large, n_swaps = (0, 2**n) if is_exact else (1, n_draws + 1)
    for start in range(0, 2**n if is_exact else n_draws, _CHUNK):
        if is_exact:
            swapped = np.arange(start, min(start + _CHUNK, 2**n))[:, None] >> np.arange(n) & 1  # (chunk, P)
        else:
            swapped = generator.integers(0, 2, size=(min(_CHUNK, n_draws - start), n))
        da, dwa = swapped @ more_A, swapped @ more_WA
        differences = (a + da) / (wa + dwa) - (b - da) / (wb - dwa)
        # Rounded sums of the same numbers in another order must not count as smaller.
        as_large += int(np.sum(np.abs(differences) >= abs(a / wa - b / wb) - 1e-9))
    return as_large / n_swaps


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval; rounded, so that summation error does not make a zero "real"."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return round(float(low), 12), round(float(high), 12)


def recitation_rate(
    questions: Sequence[str],
    golds: Sequence[str],
    answers: Sequence[str],
    match: Callable[[str, str, str], bool],
    *,
    passages: Sequence[int] | None = None,
) -> float:
    """Share of answers that contain the gold answer of *another* question.

    A model that recites its passage profits from every rule that looks for the gold answer in the text; this rate
    says how much. ``match(question, gold, answer)`` is that rule. With ``passages`` (one index per answer) only
    questions of the same passage are compared. A gold answer equal to the answer's own does not count.
    """
    if not answers:
        return 0.0
    places = [0] * len(answers) if passages is None else passages
    asked: dict[int, set[tuple[str, str]]] = {}
    for place, question, gold in zip(places, questions, golds, strict=True):
        asked.setdefault(place, set()).add((question, gold))
    recited = sum(
        any(match(question, other, answer) for question, other in asked[place] if other.casefold() != gold.casefold())
        for place, gold, answer in zip(places, golds, answers, strict=True)
        if answer.strip()
    )
    return recited / len(answers)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A grader against a reference over ``n`` answers that both judged.

    ``bias`` is the share the grader calls correct minus the reference's share; ``precision`` and ``recall``
    are of "correct", None where undefined.
    """

    n: int
    n_left_out: int
    agreement: float
    kappa: float
    bias: float
    precision: float | None
    recall: float | None


def grader_agreement(verdicts: Verdicts, reference: Verdicts) -> Agreement:
    """Cohen's kappa, agreement and bias. Raises: DataError where no answer was judged by both."""
    pairs = [(v, r) for v, r in zip(verdicts, reference, strict=True) if v is not None and r is not None]
    n = len(pairs)
    if not n:
        raise DataError("no answer has both a verdict and a reference verdict")
    says, truly = sum(v for v, _ in pairs), sum(r for _, r in pairs)
    both = sum(v and r for v, r in pairs)
    agree = (n - says - truly + 2 * both) / n
    by_chance = (says * truly + (n - says) * (n - truly)) / n**2
    return Agreement(
        n=n,
        n_left_out=len(verdicts) - n,
        agreement=agree,
        kappa=1.0 if by_chance == 1 else (agree - by_chance) / (1 - by_chance),
        bias=(says - truly) / n,
        precision=both / says if says else None,
        recall=both / truly if truly else None,
    )


POWER = 0.8
FEWEST_SPREAD = 2  # passages it takes to see a spread


@dataclass(frozen=True, kw_only=True)
class PowerSummary:
    """What it would take to settle a difference: a paired comparison over passages, two-sided at 5 % (Cohen 1988).

    ``spread``: standard deviation of the difference over passages. ``passages_needed``: for a difference of the size
    seen, at least ``MIN_PASSAGES``; None if it is zero. ``smallest_found``: the smallest true difference that
    ``n_passages`` find.
    """

    difference: float
    n_passages: int
    spread: float
    passages_needed: int | None
    smallest_found: float
    power: float

    @property
    def is_normal(self) -> bool:
        """Whether the normal approximation holds: passages vary, and there are not already enough of them."""
        enough = self.passages_needed is not None and self.passages_needed <= self.n_passages
        return round(self.spread, 12) > 0 and not enough

    def sentence(self) -> str:
        """For a difference that is not settled, such as
        "to settle +0.7 points would take 3541 passages (80 % power); 200 find 2.9 points".
        """
        if not self.is_normal:
            return (
                f"the normal approximation does not hold for {self.n_passages} passages that differ by "
                f"{100 * self.difference:+.1f} ± {100 * self.spread:.1f} points: it cannot say how many "
                "would settle it"
            )
        power = f"({100 * self.power:.0f} % power)"
        found = f"{self.n_passages} find {100 * self.smallest_found:.1f} points"
        if not self.passages_needed:
            return f"no difference to settle; {found} {power}"
        wanted = f"to settle {100 * self.difference:+.1f} points would take {self.passages_needed} passages"
        return f"{wanted} {power}; {found}"


def power_of(differences_P: Sequence[float], *, power: float = POWER) -> PowerSummary:
    """From one difference per passage. Raises: SettingsError for fewer than two passages or an impossible power."""
    n = len(differences_P)
    if n < FEWEST_SPREAD or not 0 < power < 1:
        raise SettingsError(
            f"{n} passages, power {power}: it takes at least {FEWEST_SPREAD} passages and a power between 0 and 1"
        )
    difference, spread = statistics.mean(differences_P), statistics.stdev(differences_P)
    # How many standard errors a difference must be for the test to find it this often.
    reach = NormalDist().inv_cdf(1 - SIGNIFICANCE / 2) + NormalDist().inv_cdf(power)
    needed = math.ceil(round(spread**2 * reach**2 / difference**2, 9)) if difference else None
    return PowerSummary(
        difference=difference,
        n_passages=n,
        spread=spread,
        passages_needed=None if needed is None else max(MIN_PASSAGES, needed),
        smallest_found=reach * spread / math.sqrt(n),
        power=power,
    )


def passage_differences(correct_P_Q: Sequence[Scores], minus_P_Q: Sequence[Scores]) -> list[float]:
    """First minus second run for each passage, over what both have graded, as ``paired_difference`` does."""
    both = [graded_in_both(*scores) for scores in zip(correct_P_Q, minus_P_Q, strict=True)]
    return [statistics.fmean(a) - statistics.fmean(b) for a, b in both if a and b]


def written_value(value: Any) -> str:
    """A swept value, short: lists joined, an empty one the default."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value)) or "default"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)

"""What it would take to settle a difference: how many passages, or how many repeats of each.

Normal approximation of a paired comparison over passages, two-sided at 5 %, found in 4 of 5 such runs unless
said otherwise (Cohen 1988). A passage's difference varies because passages differ and because repeats of one
do; more repeats remove the second part only. Passages are the units, as everywhere here.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from seal_nb.errors import SettingsError
from seal_nb.metrics import MIN_PASSAGES, SIGNIFICANCE, Difference, Scores, graded_in_both

POWER = 0.8
FEWEST_SPREAD = 2  # passages it takes to see a spread


@dataclass(frozen=True, kw_only=True)
class PowerSummary:
    """``spread``: standard deviation of the difference over passages, a fraction like ``difference``.

    ``passages_needed``: for a difference of the size seen, at least ``MIN_PASSAGES`` (with fewer nothing is
    real), None where it is zero. ``smallest_found``: the smallest true difference that ``n_passages`` find.
    ``spread_of_repeats``: the part of ``spread`` that is noise between repeats, None where passages have one
    repeat; ``repeats_needed``: repeats a passage, with the passages at hand, None where even endless repeats
    would not settle it or nothing is known of them.
    """

    difference: float
    n_passages: int
    n_repeats: int
    spread: float
    passages_needed: int | None
    smallest_found: float
    spread_of_repeats: float | None
    repeats_needed: int | None
    power: float

    @property
    def is_normal(self) -> bool:
        """Whether the numbers mean something for an unsettled difference.

        Passages that do not vary, or enough of them and nothing settled, contradict the approximation.
        """
        enough = self.passages_needed is not None and self.passages_needed <= self.n_passages
        return round(self.spread, 12) > 0 and not enough

    def sentence(self) -> str:
        """Of a difference that is not settled.

        Such as "to settle +0.7 points would take 3541 passages (80 % power); 200 find 2.9 points".
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
        said = f"{wanted} {power}; {found}"
        if self.spread_of_repeats is None:
            return said
        if self.repeats_needed is None:
            return f"{said}; more repeats of these passages would not do it"
        return f"{said}; or {self.repeats_needed} repeats of these passages"


def power_of(differences_P: Sequence[float], *, power: float = POWER) -> PowerSummary:
    """From one difference a passage. Raises: SettingsError for fewer than two passages, or no such power."""
    return power_with_repeats([[difference] for difference in differences_P], power=power)


def power_with_repeats(differences_P_R: Sequence[Sequence[float]], *, power: float = POWER) -> PowerSummary:
    """From the difference of each repeat of each passage; passages may have other numbers of repeats."""
    known = [list(repeats) for repeats in differences_P_R if repeats]
    if len(known) < FEWEST_SPREAD or not 0 < power < 1:
        raise SettingsError(
            f"{len(known)} passages, power {power}: it takes at least {FEWEST_SPREAD} passages and a power "
            "between 0 and 1"
        )
    means = [statistics.mean(repeats) for repeats in known]
    difference, spread = statistics.mean(means), statistics.stdev(means)
    reach = _reach(power)
    several = [statistics.variance(repeats) for repeats in known if len(repeats) > 1]
    n_repeats = min(map(len, known))
    of_repeats = statistics.mean(several) if several else None
    return PowerSummary(
        difference=difference,
        n_passages=len(known),
        n_repeats=n_repeats,
        spread=spread,
        passages_needed=max(MIN_PASSAGES, _at_least(spread**2 * reach**2 / difference**2))
        if difference
        else None,
        smallest_found=reach * spread / math.sqrt(len(known)),
        spread_of_repeats=None if of_repeats is None else math.sqrt(of_repeats / n_repeats),
        repeats_needed=_repeats_needed(spread**2, of_repeats, n_repeats, difference, len(known), reach),
        power=power,
    )


def _reach(power: float) -> float:
    """How many standard errors a difference must be for a two-sided test to find it so often."""
    normal = NormalDist()
    return normal.inv_cdf(1 - SIGNIFICANCE / 2) + normal.inv_cdf(power)


def _repeats_needed(
    variance: float, of_repeats: float | None, n_repeats: int, difference: float, n: int, reach: float
) -> int | None:
    """Repeats r with (variance of passages + of repeats / r) / n small enough for the difference seen."""
    if of_repeats is None or not difference:
        return None
    of_passages = max(0.0, variance - of_repeats / n_repeats)
    room = n * difference**2 / reach**2 - of_passages
    return _at_least(of_repeats / room) if room > 0 else None


def _at_least(number: float) -> int:
    return max(1, math.ceil(round(number, 9)))


def passage_differences(correct_P_Q: Sequence[Scores], minus_P_Q: Sequence[Scores]) -> list[float]:
    """First minus second run for each passage, over what both have graded, as ``paired_difference`` does."""
    both = [graded_in_both(*scores) for scores in zip(correct_P_Q, minus_P_Q, strict=True)]
    return [statistics.fmean(a) - statistics.fmean(b) for a, b in both if a and b]


def settled_sentence(difference: Difference, power: PowerSummary) -> str:
    """The difference in plain words, and what would settle it where it is not settled."""
    return difference.sentence() if difference.is_real else f"{difference.sentence()}; {power.sentence()}"

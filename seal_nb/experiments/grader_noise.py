"""What a grader's mistakes do to a difference of two runs, where its error rates are known.

A grader that says yes to a share f of the wrong answers and no to a share m of the right ones turns a true
accuracy a into f + (1 - f - m) a. Turned round (Rogan & Gladen 1978), with f and m of each run drawn anew
from what the check of the grader leaves open, and passages drawn anew as always: an interval that holds the
grader's noise too. Mistakes that are independent between answers are in every ordinary interval already;
what that interval lacks is that they shrink a difference, and tilt it where the two runs' rates differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from seal_nb.errors import DataError, SettingsError
from seal_nb.metrics import N_RESAMPLES, Difference, Scores, Verdicts, paired_difference

LEAST_SHARE = 0.1  # of 1 - f - m: below that a verdict says next to nothing


@dataclass(frozen=True, kw_only=True)
class GraderErrors:
    """Mistakes of a grader on answers whose truth is known: counts, so that their own noise is known."""

    n_wrong: int  # answers that are wrong
    n_false_yes: int  # of them, called right
    n_right: int
    n_false_no: int

    def __post_init__(self) -> None:
        pairs = ((self.n_false_yes, self.n_wrong), (self.n_false_no, self.n_right))
        if any(not 0 <= mistakes <= n for mistakes, n in pairs) or not self.n_wrong or not self.n_right:
            raise SettingsError(
                f"{self}: give counts of checked answers, right and wrong, and mistakes among them"
            )

    @property
    def false_yes(self) -> float:
        return self.n_false_yes / self.n_wrong

    @property
    def false_no(self) -> float:
        return self.n_false_no / self.n_right

    def drawn(self, generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,) false-yes and (n,) false-no rates that the counts leave possible (Beta, Jeffreys prior)."""
        return (
            generator.beta(self.n_false_yes + 0.5, self.n_wrong - self.n_false_yes + 0.5, n),
            generator.beta(self.n_false_no + 0.5, self.n_right - self.n_false_no + 0.5, n),
        )


def grader_errors(verdicts: Verdicts, truth: Verdicts) -> GraderErrors:
    """From a grader's verdicts on answers whose truth is known; what either leaves open does not count."""
    pairs = [(v, t) for v, t in zip(verdicts, truth, strict=True) if v is not None and t is not None]
    return GraderErrors(
        n_wrong=sum(not t for _, t in pairs),
        n_false_yes=sum(v and not t for v, t in pairs),
        n_right=sum(bool(t) for _, t in pairs),
        n_false_no=sum(t and not v for v, t in pairs),
    )


def difference_with_grader_noise(
    correct_P_Q: Sequence[Scores],
    minus_P_Q: Sequence[Scores],
    errors: GraderErrors,
    *,
    errors_of_minus: GraderErrors | None = None,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> Difference:
    """First minus second run, corrected for the grader's mistakes, with an interval that holds them.

    ``errors_of_minus``: of the second run's answers where they are known apart (a rule may miss other
    answers in another run). ``p_value`` is that of the ordinary test where both runs have the same errors,
    else the share of resamples beyond zero, twice. Raises: DataError for a grader that tells nothing.
    """
    plain = paired_difference(correct_P_Q, minus_P_Q, seed=seed, n_resamples=n_resamples)
    second = errors_of_minus or errors
    for one in (errors, second):
        if 1 - one.false_yes - one.false_no < LEAST_SHARE:
            raise DataError(
                f"a grader with {one.false_yes:.2f} false yes and {one.false_no:.2f} false no tells nothing",
                remedy="use another grader",
            )
    first_P, second_P = _passage_means(correct_P_Q, minus_P_Q)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(first_P), size=(n_resamples, len(first_P)))
    mine = errors.drawn(generator, n_resamples)
    theirs = mine if errors_of_minus is None else second.drawn(generator, n_resamples)
    resampled = _true(first_P[drawn].mean(axis=1), *mine) - _true(second_P[drawn].mean(axis=1), *theirs)
    low, high = np.quantile(resampled, [0.025, 0.975])
    centre = _true(first_P.mean(), errors.false_yes, errors.false_no) - _true(
        second_P.mean(), second.false_yes, second.false_no
    )
    beyond = min(1.0, 2 * min(float(np.mean(resampled <= 0)), float(np.mean(resampled >= 0))))
    return replace(
        plain,
        mean=float(centre),
        low=round(float(low), 12),
        high=round(float(high), 12),
        p_value=plain.p_value if errors_of_minus is None else beyond,
    )


def _passage_means(first: Sequence[Scores], second: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    """(P,) and (P,) accuracies of the passages that both runs have graded."""
    known = [
        ([score for score in a if score is not None], [score for score in b if score is not None])
        for a, b in zip(first, second, strict=True)
    ]
    kept = [(sum(a) / len(a), sum(b) / len(b)) for a, b in known if a and b]
    means = np.array(kept, dtype=np.float64)
    return means[:, 0], means[:, 1]


def _true(observed: np.ndarray, false_yes: np.ndarray | float, false_no: np.ndarray | float) -> np.ndarray:
    """Accuracy that a grader with these rates shows as ``observed``."""
    return (observed - false_yes) / np.maximum(1 - false_yes - false_no, LEAST_SHARE)

"""Graders side by side on the answers of one run: agreement, bias, and what that does to the gain.

A grader that is too hard moves both accuracies; what bends a result is being harder on one arm than on the
other, and the gain shows that. The verdicts that a run file holds are read, its own and those of earlier
gradings (``regrade``), and the local graders are asked anew. One of them is the reference: what the others
are measured against, not a truth.

What a grader's mistakes do to a difference of two runs, where its error rates are known.

A grader that says yes to a share f of the wrong answers and no to a share m of the right ones turns a true
accuracy a into f + (1 - f - m) a. Turned round (Rogan & Gladen 1978), with f and m of each run drawn anew
from what the check of the grader leaves open, and passages drawn anew as always: an interval that holds the
grader's noise too. Mistakes that are independent between answers are in every ordinary interval already;
what that interval lacks is that they shrink a difference, and tilt it where the two runs' rates differ.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from seal_nb.errors import DataError, SettingsError
from seal_nb.grading.base import AS_BOOLEAN
from seal_nb.grading.choose import GRADERS, grader_of, make_grader
from seal_nb.metrics import (
    N_RESAMPLES,
    Difference,
    Scores,
    Verdicts,
    accuracy,
    gain,
    grader_agreement,
    paired_difference,
)
from seal_nb.passages import Passage
from seal_nb.results.verdicts import KINDS, Kind, Place, form_of

STORED = "in the file"
ByGrader = Mapping[str, Mapping[Kind, Verdicts]]


def verdicts_by_grader(run: Mapping[str, Any], passages: Sequence[Passage] = ()) -> ByGrader:
    """Of each grader the verdicts on both arms, answers in the run's order; stored ones first.

    ``passages`` as in ``form_of``. Raises: DataError for a file without answers.
    """
    places, own = form_of(deepcopy(dict(run)), passages).places, grader_of(run)
    answered = [place.answered for place in places]
    verdicts: dict[str, Verdicts] = {f"{own} ({STORED})" if own else STORED: [place.verdict for place in places]}
    for name in dict.fromkeys(name for place in places for name in place.holder.get("earlier", {})):
        verdicts[f"{name} ({STORED})"] = [_earlier(place, name) for place in places]
    verdicts |= {name: [AS_BOOLEAN[v] for v in make_grader(name).grade(answered)] for name in GRADERS}
    return {name: _by_arm(places, given) for name, given in verdicts.items()}


def _earlier(place: Place, name: str) -> bool | None:
    kept = place.holder.get("earlier", {}).get(name, {}).get(place.field)
    verdict: bool | None = kept[place.index] if isinstance(kept, list) and place.index is not None else kept
    return verdict


def _by_arm(places: Sequence[Place], verdicts: Verdicts) -> dict[Kind, Verdicts]:
    return {
        kind: [verdict for place, verdict in zip(places, verdicts, strict=True) if place.kind == kind] for kind in KINDS
    }


def reference_of(by_grader: ByGrader) -> str:
    """A judge where one has graded, else whoever graded first: the last kept verdicts, or the file's own."""
    stored = [name for name in by_grader if name.endswith(STORED) or name.endswith(f"({STORED})")]
    return next((name for name in stored if name.startswith("judge")), stored[-1])


def comparison(by_grader: ByGrader, reference: str = "") -> list[dict[str, Any]]:
    """A row for each grader: fractions over the answers that it and the reference judged.

    ``bias`` is the share called correct minus the reference's, ``gain bias`` how much higher the gain comes
    out. None where nothing was judged by both. Raises: SettingsError for an unknown reference.
    """
    reference = reference or reference_of(by_grader)
    if reference not in by_grader:
        raise SettingsError(f"reference is {reference!r}; known are {', '.join(by_grader)}")
    return [_row(name, verdicts, by_grader[reference]) for name, verdicts in by_grader.items()]


def _row(name: str, own: Mapping[Kind, Verdicts], reference: Mapping[Kind, Verdicts]) -> dict[str, Any]:
    before, after = (_judged_by_both(own[kind], reference[kind]) for kind in KINDS)
    row = {
        "grader": name,
        "n": len(before[0]) + len(after[0]),
        "ungraded": sum(verdict is None for kind in KINDS for verdict in own[kind]),
        "baseline": accuracy(before[0]) if before[0] else None,
        "adapter": accuracy(after[0]) if after[0] else None,
    }
    if not before[0] or not after[0]:
        return row
    agreed = grader_agreement([*before[0], *after[0]], [*before[1], *after[1]])
    gains = [gain(before[side], after[side]) or 0.0 for side in (0, 1)]
    return row | {
        "agreement": agreed.agreement,
        "kappa": agreed.kappa,
        "baseline bias": grader_agreement(*before).bias,
        "adapter bias": grader_agreement(*after).bias,
        "gain": gains[0],
        "gain bias": gains[0] - gains[1],
    }


def _judged_by_both(own: Verdicts, reference: Verdicts) -> tuple[list[bool], list[bool]]:
    pairs = [(v, r) for v, r in zip(own, reference, strict=True) if v is not None and r is not None]
    return [v for v, _ in pairs], [r for _, r in pairs]


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
            raise SettingsError(f"{self}: give counts of checked answers, right and wrong, and mistakes among them")

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

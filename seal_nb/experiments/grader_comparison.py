"""Graders side by side on the answers of one run: agreement, bias, and what that does to the gain.

A grader that is too hard moves both accuracies; what bends a result is being harder on one arm than on the
other, and the gain shows that. The verdicts that a run file holds are read, its own and those of earlier
gradings (``regrade``), and the local graders are asked anew. One of them is the reference: what the others
are measured against, not a truth.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.experiments.graded_forms import KINDS, Kind, Place, form_of, grader_of
from seal_nb.grading.base import GRADERS, make_grader
from seal_nb.grading.verdicts import AS_BOOLEAN
from seal_nb.metrics import Verdicts, accuracy, gain, grader_agreement
from seal_nb.passages import Passage

STORED = "in the file"
ByGrader = Mapping[str, Mapping[Kind, Verdicts]]


def verdicts_by_grader(run: Mapping[str, Any], passages: Sequence[Passage] = ()) -> ByGrader:
    """Of each grader the verdicts on both arms, answers in the run's order; stored ones first.

    ``passages`` as in ``form_of``. Raises: DataError for a file without answers.
    """
    places, own = form_of(deepcopy(dict(run)), passages).places, grader_of(run)
    answered = [place.answered for place in places]
    verdicts: dict[str, Verdicts] = {
        f"{own} ({STORED})" if own else STORED: [place.verdict for place in places]
    }
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
        kind: [verdict for place, verdict in zip(places, verdicts, strict=True) if place.kind == kind]
        for kind in KINDS
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

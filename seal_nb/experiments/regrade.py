"""A finished run graded again: no training, no answering, other verdicts, statistics by the published rule.

What an answer was called before stays beside it, in ``earlier`` by the grader's name, so that graders can be
compared on the same answers; a grader's new verdicts replace its own. Whose verdicts a file has stands in its
field ``grader`` or in the identity of its model; a published file has verdicts by "earlier".
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError
from seal_nb.experiments.graded_forms import KINDS, Kind, Place, form_of, grader_of, is_run
from seal_nb.grading.grade_file import graded_summary
from seal_nb.grading.verdicts import AS_BOOLEAN, IN_WORDS, Grader
from seal_nb.metrics import Verdicts, accuracy
from seal_nb.passages import Passage, load_passages
from seal_nb.runs import read_json, write_json

UNNAMED = "earlier"  # the grader of a file that does not say


@dataclass(frozen=True, kw_only=True)
class Regraded:
    """The run with its new verdicts; of every answer in it the new and the old one, and whose it is."""

    run: dict[str, Any]
    grader: str
    earlier_grader: str
    kinds: tuple[Kind, ...]
    verdicts: Verdicts
    earlier: Verdicts

    def lines(self) -> list[str]:
        """The text form: counts, agreement with the earlier verdicts, and what that does to accuracies."""
        pairs = zip(self.kinds, self.verdicts, self.earlier, strict=True)
        rows = [{"kind": k, "verdict": IN_WORDS[v], "reference_verdict": e} for k, v, e in pairs]
        said = graded_summary(self.grader, rows).lines()
        for name, verdicts in ((self.earlier_grader, self.earlier), (self.grader, self.verdicts)):
            shares = {kind: accuracy(self._of(kind, verdicts)) for kind in KINDS}
            said.append(
                f"{name}: " + ", ".join(f"{kind} {_percent(share)}" for kind, share in shares.items())
            )
        return said

    def _of(self, kind: Kind, verdicts: Verdicts) -> Verdicts:
        return [verdict for own, verdict in zip(self.kinds, verdicts, strict=True) if own == kind]


def is_run_file(path: str | Path) -> bool:
    """Whether the file is a run that can be graded again, and not rows of answers."""
    try:
        return is_run(read_json(path))
    except DataError:
        return False


def regrade_file(
    path: str | Path,
    out: str | Path,
    grader: Grader,
    *,
    dataset: str | Path = "",
    only_ungraded: bool = False,
) -> Regraded:
    """`regrade` from file to file, written whole or not at all.

    ``dataset``: the items that a CPT run was asked about; empty: what the run itself names, if it is there.
    """
    value = read_json(path)
    passages: Sequence[Passage] = ()
    if "articles" not in value:
        named = str(dataset or value.get("dataset") or "")
        passages = load_passages(named) if dataset or named.startswith("shipped:") else ()
    done = regrade(value, grader, passages=passages, only_ungraded=only_ungraded, path=str(path))
    write_json(out, done.run)
    return done


def regrade(
    value: dict[str, Any],
    grader: Grader,
    *,
    passages: Sequence[Passage] = (),
    only_ungraded: bool = False,
    path: str = "",
) -> Regraded:
    """A run of the same form with verdicts by ``grader``; with ``only_ungraded`` those that are there stay.

    ``passages`` as in ``form_of``. Raises: DataError, and what the grader raises.
    """
    run = deepcopy(value)
    form = form_of(run, passages, path=path)
    earlier, named = [place.verdict for place in form.places], grader_of(run) or UNNAMED
    wanted = [place for place in form.places if place.verdict is None or not only_ungraded]
    if named != grader.name:
        _keep_earlier(form.places, named)
    for place, verdict in zip(wanted, grader.grade([place.answered for place in wanted]), strict=True):
        place.put(AS_BOOLEAN[verdict])
    mixed = named != grader.name and len(wanted) < len(form.places)
    run["grader"] = f"{named}, what it left: {grader.name}" if mixed else grader.name
    form.compute()
    return Regraded(
        run=run,
        grader=run["grader"],
        earlier_grader=named,
        kinds=tuple(place.kind for place in form.places),
        verdicts=[place.verdict for place in form.places],
        earlier=earlier,
    )


def _keep_earlier(places: Sequence[Place], named: str) -> None:
    """The latest verdicts of each grader; a list of verdicts is copied once."""
    fields = {(id(place.holder), place.field): place for place in places}
    for place in fields.values():
        kept = place.holder.setdefault("earlier", {}).setdefault(named, {})
        kept[place.field] = deepcopy(place.holder[place.field])


def _percent(share: float | None) -> str:
    return "none graded" if share is None else f"{share:.1%} of answers correct"

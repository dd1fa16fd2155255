"""Grade finished answers again, without training: run files, and files of answers; compare graders on one run.

A regraded run keeps the earlier verdicts in ``earlier``, by the name of their grader; a grader that grades again
replaces its own verdicts. A grader is measured against earlier verdicts by ``kind`` too (baseline, adapter, or both),
because one that is stricter on one arm shifts every gain."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from seal_nb.errors import DataError, SettingsError, checked
from seal_nb.grading.base import AS_BOOLEAN, IN_WORDS, Answered, Grader, Verdict, answered_with
from seal_nb.grading.choose import GRADERS, grader_of, make_grader
from seal_nb.metrics import Verdicts, accuracy
from seal_nb.passages import load_passages
from seal_nb.results.collect import is_run, run_of
from seal_nb.results.run import KINDS, Run, StoredVerdict
from seal_nb.storage import read_json, read_json_lines, write_text

if TYPE_CHECKING:
    import pandas as pd

UNNAMED = "earlier"  # the grader of a file that names none, such as a published one


class Agreement(NamedTuple):
    """A grader against a reference over ``n`` answers that both judged. ``kappa`` is Cohen's; ``bias`` is the share
    that the grader calls correct minus the reference's share."""

    n: int
    n_left_out: int
    agreement: float
    kappa: float
    bias: float

    def __str__(self) -> str:
        left_out = f", {self.n_left_out} left out" if self.n_left_out else ""
        return (
            f"agreement {self.agreement:.4f}, kappa {self.kappa:.4f}, "
            f"bias {self.bias * 100:+.2f} points (n = {self.n}{left_out})"
        )


def agreement_of(verdicts: Verdicts, reference: Verdicts) -> Agreement | None:
    """Agreement of a grader's verdicts with a reference's; None where no answer was judged by both."""
    pairs = [(v, r) for v, r in zip(verdicts, reference, strict=True) if v is not None and r is not None]
    if not (n := len(pairs)):
        return None
    says, truly = sum(v for v, _ in pairs), sum(r for _, r in pairs)
    agree = sum(v == r for v, r in pairs) / n
    by_chance = (says * truly + (n - says) * (n - truly)) / n**2
    kappa = 1.0 if by_chance == 1 else (agree - by_chance) / (1 - by_chance)
    return Agreement(n=n, n_left_out=len(verdicts) - n, agreement=agree, kappa=kappa, bias=(says - truly) / n)


@dataclass(frozen=True, kw_only=True)
class Graded:
    """The verdicts of a grader on the answers of a file, and the reference verdicts in it. ``kinds``: "baseline",
    "adapter", "adapter+baseline", or "" if it is not known. ``run``: a run with the new verdicts; its reference
    verdicts are those of ``earlier_grader``."""

    grader: str
    kinds: Sequence[str]
    verdicts: Verdicts
    reference: Verdicts
    run: Run | None = None
    earlier_grader: str = ""

    def agreement(self, *kinds: str) -> Agreement | None:
        """With the reference verdicts, over all answers or those of some kinds."""
        wanted = [not kinds or kind in kinds for kind in self.kinds]
        return agreement_of(*(list(compress(of, wanted)) for of in (self.verdicts, self.reference)))

    @property
    def gain_bias(self) -> float | None:
        """Bias on adapter answers minus bias on baseline answers; None without both."""
        before, after = (self.agreement(kind, "adapter+baseline") for kind in KINDS)
        return after.bias - before.bias if before and after else None

    def lines(self) -> list[str]:
        """As text: counts, agreement if there are reference verdicts, and the accuracies of a run by both graders."""
        counts = ", ".join(f"{list(self.verdicts).count(value)} {word}" for word, value in AS_BOOLEAN.items())
        said = [f"{len(self.verdicts)} answers graded by {self.grader!r}: {counts}"]
        if None in self.verdicts:
            said.append("UNGRADED answers enter no mean; grade the written file again with --only-ungraded")
        if overall := self.agreement():
            said.append(f"against the reference verdicts: {overall}")
            by_kind = {kind: self.agreement(kind) for kind in sorted({*self.kinds} - {""})}
            said += [f"  {kind}: {found}" for kind, found in by_kind.items() if found]
        else:
            said.append("no reference verdicts in the file: agreement unknown")
        if self.gain_bias is not None:
            way = "high" if self.gain_bias > 0 else "low"
            said.append(f"a gain measured on such answers comes out {abs(self.gain_bias) * 100:.1f} points too {way}")
        if self.run:
            for name, verdicts in ((self.earlier_grader, self.reference), (self.grader, self.verdicts)):
                judged = list(zip(self.kinds, verdicts, strict=True))
                shares = {kind: accuracy([verdict for one, verdict in judged if one == kind]) for kind in KINDS}
                words = {
                    kind: "none graded" if s is None else f"{s:.1%} of answers correct" for kind, s in shares.items()
                }
                said.append(f"{name}: " + ", ".join(map(" ".join, words.items())))
        return said


def _grade(grader: Grader, answered: Sequence[Answered], earlier: Verdicts, only_ungraded: bool) -> list[bool | None]:
    """The new verdicts; with ``only_ungraded``, the earlier ones where there are any."""
    is_kept = [only_ungraded and verdict is not None for verdict in earlier]
    new = iter(grader.grade([one for one, kept in zip(answered, is_kept, strict=True) if not kept]))
    return [verdict if kept else AS_BOOLEAN[next(new)] for verdict, kept in zip(earlier, is_kept, strict=True)]


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)

    question: str
    gold: str
    other_golds: list[str] = Field([], validation_alias=AliasChoices("other_golds", "other_answers"))
    answer: str
    title: str = ""
    kind: str = ""
    verdict: bool | Literal["CORRECT", "INCORRECT", "UNGRADED"] | None = None
    reference_verdict: bool | None = None


def grade_file(
    source: str | Path,
    out: str | Path,
    *,
    grader: str | Grader = "local",
    dataset: str | Path = "",
    only_ungraded: bool = False,
) -> Graded:
    """Grade ``source`` into ``out``: a run file (`regrade`), or JSON lines of ``question``, ``gold`` (with
    ``other_golds`` if there are several) and ``answer``, also gzip-compressed. Rows keep their fields and get a
    ``verdict`` in words; one of true, false or null becomes ``reference_verdict``. ``dataset``: the items that a CPT
    run was asked about; empty: the shipped dataset that the run names, if it does. ``only_ungraded``: what an earlier
    grading did not leave UNGRADED keeps its verdict. Raises: DataError with path, line and field, and then nothing is
    written; SettingsError for an unknown grader."""
    judge, value = make_grader(grader) if isinstance(grader, str) else grader, dict[str, Any]()
    with suppress(DataError):  # rows of answers are no JSON value
        value = read_json(source)
    if is_run(value):
        named = str(dataset or value.get("dataset") or "") if "server_reply" in value else ""
        passages = load_passages(named) if named and (dataset or named.startswith("shipped:")) else ()
        done = regrade(run_of(value, path=source, passages=passages), judge, only_ungraded=only_ungraded)
        if done.run:
            done.run.write(out)
        return done
    if Path(out).suffix == ".gz":
        raise DataError("output is plain JSON lines", path=out, remedy="leave off .gz")
    placed = list(read_json_lines(source))
    read = [checked(_Row.model_validate, row, path=source, item=place) for place, row in placed]
    answered = [
        answered_with((one.gold, *one.other_golds), question=one.question, answer=one.answer, title=one.title)
        for one in read
    ]
    # A verdict in words comes from an earlier grading: it is replaced and is never a reference.
    earlier = [AS_BOOLEAN.get(row.get("verdict") or Verdict.UNGRADED) for _, row in placed]
    verdicts = _grade(judge, answered, earlier, only_ungraded)
    for (_, row), verdict in zip(placed, verdicts, strict=True):
        if "verdict" in row and not isinstance(row["verdict"], str):
            row["reference_verdict"] = row["verdict"]
        row["verdict"] = IN_WORDS[verdict]
    write_text(out, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for _, row in placed))
    kinds, reference = [one.kind for one in read], [row.get("reference_verdict") for _, row in placed]
    return Graded(grader=judge.name, kinds=kinds, verdicts=verdicts, reference=reference)


def regrade(run: Run, grader: Grader, *, only_ungraded: bool = False) -> Graded:
    """A copy of the run with verdicts by ``grader`` and the statistics that follow from them. ``only_ungraded``: keep
    the verdicts that are there. Raises: DataError if the run has no answers, or its passages are needed and missing;
    and what the grader raises."""
    places, named, name = _answers_of(run), grader_of(run.value) or UNNAMED, grader.name
    earlier, kinds = [place.verdict() for place in places], [place.kind for place in places]
    verdicts = _grade(grader, [place.answered for place in places], earlier, only_ungraded)
    if only_ungraded and name != named and set(earlier) != {None}:
        name = f"{named}, what it left: {name}"
    again = run.graded(verdicts, grader=name, keep_as=named if named != grader.name else "")
    return Graded(grader=name, kinds=kinds, verdicts=verdicts, reference=earlier, run=again, earlier_grader=named)


def _answers_of(run: Run) -> list[StoredVerdict]:
    if not (found := run.stored_verdicts()):
        raise DataError("holds no answers", path=run.path, remedy="give a run file that has its answers")
    return found


def compare_graders(run: Run, *, reference: str = "") -> "pd.DataFrame":
    """The graders of a run (the file's, the earlier ones, and those that need no service) against a reference grader:
    a row of the result, or else a judge's verdicts in the file, or else the first grading.

    One row per grader, over the answers that it and the reference judged: ``grader``, ``n``, ``ungraded``,
    ``baseline`` and ``adapter`` (share called correct), ``agreement``, ``kappa``, ``baseline_bias``, ``adapter_bias``
    (share called correct minus the reference's), ``gain``, ``gain_bias``. Missing if the two judged no answer of an
    arm in common. Raises: DataError if the run has no answers; SettingsError if there is no such reference."""
    import pandas as pd

    places, own = _answers_of(run), grader_of(run.value)
    stored: dict[str, Verdicts] = {f"{own} (in the file)" if own else "in the file": [one.verdict() for one in places]}
    earlier = dict.fromkeys(name for one in places for name in one.holder.get("earlier") or {} if name != own)
    stored |= {f"{name} (in the file)": [one.verdict(name) for one in places] for name in earlier}
    first = f"{next(iter(earlier))} (in the file)" if earlier else next(iter(stored))
    reference = reference or next((name for name in stored if name.startswith("judge")), first)
    answered = [one.answered for one in places]
    by_grader = stored | {name: [AS_BOOLEAN[v] for v in make_grader(name).grade(answered)] for name in GRADERS}
    if reference not in by_grader:
        raise SettingsError(f"reference is {reference!r}; known are {', '.join(by_grader)}")
    verdicts = pd.DataFrame(by_grader, dtype="boolean")
    kinds, rows = pd.Series([one.kind for one in places]), []
    for name in by_grader:
        both = verdicts[[name, reference]].set_axis(["own", "reference"], axis=1).dropna().astype(float)
        shares = both.groupby(kinds).mean().reindex(KINDS)
        bias, gains = shares["own"] - shares["reference"], shares.loc["adapter"] - shares.loc["baseline"]
        agreed = agreement_of(by_grader[name], by_grader[reference]) if shares["own"].notna().all() else None
        rows.append(
            {
                "grader": name,
                "n": len(both),
                "ungraded": verdicts[name].isna().sum(),
                **shares["own"],
                "agreement": agreed and agreed.agreement,
                "kappa": agreed and agreed.kappa,
                **bias.add_suffix("_bias"),
                "gain": gains["own"],
                "gain_bias": gains["own"] - gains["reference"],
            }
        )
    return pd.DataFrame(rows)

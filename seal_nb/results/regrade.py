"""Grade finished answers again, without training: run files, and files of answers; compare graders on one run.

A regraded run keeps the earlier verdicts in ``earlier``, by the name of their grader; a grader that grades again
replaces its own verdicts. The field ``grader`` (or the name of the model) says whose verdicts a file holds; published
files do not say, and theirs are called "earlier".

A file of answers is JSON lines of ``question``, ``gold``, ``answer``; the output has a ``verdict`` too, in the same
order with all other fields. A ``verdict`` of true, false or null in the input is a reference: it becomes
``reference_verdict``, and the grader is measured against it, overall and by ``kind`` (baseline, adapter, or both),
because a grader that is stricter on one arm shifts every gain. A broken row is refused; then nothing is written.
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_nb.errors import DataError, SettingsError
from seal_nb.grading.base import AS_BOOLEAN, IN_WORDS, Answered, Grader, Verdict
from seal_nb.grading.choose import GRADERS, grader_of, make_grader
from seal_nb.metrics import Agreement, Verdicts, accuracy, gain, grader_agreement
from seal_nb.passages import Passage, load_passages
from seal_nb.results.collect import is_run, run_of
from seal_nb.results.run import KINDS, Kind, Run, StoredVerdict, frame
from seal_nb.storage import read_json, write_text

if TYPE_CHECKING:
    import pandas as pd

_TEXTS = ("question", "gold", "answer")
_SETTLED = (Verdict.CORRECT, Verdict.INCORRECT)


@dataclass(frozen=True, kw_only=True)
class GradedFile:
    """The verdicts of a grader on a file, and their agreement with the reference verdicts in it."""

    grader: str
    n_correct: int
    n_incorrect: int
    n_ungraded: int
    overall: Agreement | None  # None: no row has a reference verdict
    by_kind: dict[str, Agreement]
    gain_bias: float | None  # bias on adapter answers minus bias on baseline answers; None without both

    @property
    def n(self) -> int:
        return self.n_correct + self.n_incorrect + self.n_ungraded

    def lines(self) -> list[str]:
        """As text: counts, then agreement if there are reference verdicts."""
        counts = f"{self.n_correct} CORRECT, {self.n_incorrect} INCORRECT, {self.n_ungraded} UNGRADED"
        said = [f"{self.n} answers graded by {self.grader!r}: {counts}"]
        if self.n_ungraded:
            said.append("UNGRADED answers enter no mean; grade the written file again with --only-ungraded")
        if self.overall is None:
            return [*said, "no reference verdicts in the file: agreement unknown"]
        said.append(f"against the reference verdicts: {_described(self.overall)}")
        said += [f"  {kind}: {_described(agreement)}" for kind, agreement in self.by_kind.items()]
        if self.gain_bias is not None:
            size, way = abs(self.gain_bias) * 100, "high" if self.gain_bias > 0 else "low"
            said.append(f"a gain measured on such answers comes out {size:.1f} points too {way}")
        return said


def grade_file(
    source: str | Path, out: str | Path, *, grader: str | Grader = "local", only_ungraded: bool = False
) -> GradedFile:
    """Grade ``source`` (JSON lines, also gzip-compressed) into ``out``, whole or not at all.

    ``only_ungraded``: only rows that an earlier grading left UNGRADED; the others keep their verdict.
    Raises: DataError with path, line and field for a row that cannot be graded; SettingsError for an unknown
    grader.
    """
    judge = make_grader(grader) if isinstance(grader, str) else grader
    if Path(out).suffix == ".gz":
        raise DataError("output is plain JSON lines", path=out, remedy="leave off .gz")
    rows = _read_rows(Path(source))
    wanted = [not only_ungraded or row.get("verdict") not in _SETTLED for row in rows]
    verdicts = iter(judge.grade([_answered(row) for row, is_wanted in zip(rows, wanted, strict=True) if is_wanted]))
    graded = [
        _graded_row(row, next(verdicts)) if is_wanted else row for row, is_wanted in zip(rows, wanted, strict=True)
    ]
    write_text(out, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in graded))
    return graded_summary(judge.name, graded)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = _text(path).split("\n")
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("no such file", path=path, remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", path=path, remedy="write the file again") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path, remedy="copy the file again") from error


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    item = f"line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", path=path, item=item) from error
    if not isinstance(row, dict):
        raise DataError(f"is a JSON {type(row).__name__}, not an object", path=path, item=item)
    for name in _TEXTS:
        if name not in row:
            raise DataError("is missing", path=path, item=item, field=name, remedy="a row needs all three")
    for name in (*_TEXTS, "title", "kind"):
        if not isinstance(row.get(name, ""), str):
            raise DataError(f"is {row[name]!r}, not a text", path=path, item=item, field=name)
    for name, also in (("verdict", tuple(Verdict)), ("reference_verdict", ())):
        value = row.get(name)
        if not (value is None or isinstance(value, bool) or value in also):
            raise DataError(f"is {value!r}, not true, false or null", path=path, item=item, field=name)
    return row


def _answered(row: dict[str, Any]) -> Answered:
    return Answered(question=row["question"], gold=row["gold"], answer=row["answer"], title=row.get("title", ""))


def _graded_row(row: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """A verdict in words comes from an earlier grading: it is replaced and is never a reference."""
    if "verdict" not in row or isinstance(row["verdict"], str):
        return row | {"verdict": verdict.value}
    return row | {"verdict": verdict.value, "reference_verdict": row["verdict"]}


def graded_summary(name: str, rows: Sequence[dict[str, Any]]) -> GradedFile:
    """Of rows with ``verdict``, and ``reference_verdict`` and ``kind`` where known."""
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in Verdict}
    kinds = sorted({row["kind"] for row in rows if "kind" in row})
    by_kind = {kind: _agreement([row for row in rows if row.get("kind") == kind]) for kind in kinds}
    sides = [
        _agreement([row for row in rows if side in row.get("kind", "").split("+")]) for side in ("adapter", "baseline")
    ]
    adapter, baseline = sides
    return GradedFile(
        grader=name,
        n_correct=counts[Verdict.CORRECT],
        n_incorrect=counts[Verdict.INCORRECT],
        n_ungraded=counts[Verdict.UNGRADED],
        overall=_agreement(rows),
        by_kind={kind: agreement for kind, agreement in by_kind.items() if agreement is not None},
        gain_bias=adapter.bias - baseline.bias if adapter and baseline else None,
    )


def _agreement(rows: Sequence[dict[str, Any]]) -> Agreement | None:
    verdicts = [AS_BOOLEAN[Verdict(row["verdict"])] for row in rows]
    reference = [row.get("reference_verdict") for row in rows]
    judged_by_both = any(v is not None and r is not None for v, r in zip(verdicts, reference, strict=True))
    return grader_agreement(verdicts, reference) if judged_by_both else None


def _described(one: Agreement) -> str:
    left_out = f", {one.n_left_out} left out" if one.n_left_out else ""
    return (
        f"agreement {one.agreement:.4f}, kappa {one.kappa:.4f}, "
        f"bias {one.bias * 100:+.2f} points (n = {one.n}{left_out})"
    )


UNNAMED = "earlier"  # the grader of a file that names none


@dataclass(frozen=True, kw_only=True)
class Regraded:
    """A run with new verdicts, and for every answer its arm, its new and its earlier verdict."""

    run: Run
    grader: str
    earlier_grader: str
    kinds: tuple[Kind, ...]
    verdicts: Verdicts
    earlier: Verdicts

    def lines(self) -> list[str]:
        """As text: counts, agreement with the earlier verdicts, and the accuracy by both."""
        pairs = zip(self.kinds, self.verdicts, self.earlier, strict=True)
        rows = [{"kind": k, "verdict": IN_WORDS[v], "reference_verdict": e} for k, v, e in pairs]
        said = graded_summary(self.grader, rows).lines()
        for name, verdicts in ((self.earlier_grader, self.earlier), (self.grader, self.verdicts)):
            own = _by_kind(self.kinds, verdicts)
            said.append(f"{name}: " + ", ".join(f"{kind} {_percent(accuracy(own[kind]))}" for kind in KINDS))
        return said


def is_run_file(path: str | Path) -> bool:
    """Whether the file is a run that can be graded again, and not rows of answers."""
    try:
        return is_run(read_json(path))
    except DataError:
        return False


def regrade_file(
    path: str | Path, out: str | Path, grader: Grader, *, dataset: str | Path = "", only_ungraded: bool = False
) -> Regraded:
    """`regrade` from file to file, written whole or not at all.

    ``dataset``: the items that a CPT run was asked about; empty: the shipped dataset that the run names, if it does.
    """
    value = read_json(path)
    passages: Sequence[Passage] = ()
    if "articles" not in value:
        named = str(dataset or value.get("dataset") or "")
        passages = load_passages(named) if dataset or named.startswith("shipped:") else ()
    done = regrade(run_of(value, path=path, passages=passages), grader, only_ungraded=only_ungraded)
    done.run.write(out)
    return done


def regrade(run: Run, grader: Grader, *, only_ungraded: bool = False) -> Regraded:
    """A copy of the run with verdicts by ``grader`` and the statistics that follow from them.

    ``only_ungraded``: keep the verdicts that are there. Raises: DataError if the run has no answers, or its passages
    are needed and missing; and what the grader raises.
    """
    places, named = _answers_of(run), grader_of(run.value) or UNNAMED
    earlier = [place.verdict for place in places]
    wanted = [not only_ungraded or verdict is None for verdict in earlier]
    new = iter(grader.grade([place.answered for place, is_wanted in zip(places, wanted, strict=True) if is_wanted]))
    verdicts = [
        AS_BOOLEAN[next(new)] if is_wanted else verdict for verdict, is_wanted in zip(earlier, wanted, strict=True)
    ]
    is_other = named != grader.name
    name = f"{named}, what it left: {grader.name}" if is_other and not all(wanted) else grader.name
    return Regraded(
        run=run.graded(verdicts, grader=name, keep_as=named if is_other else ""),
        grader=name,
        earlier_grader=named,
        kinds=tuple(place.kind for place in places),
        verdicts=verdicts,
        earlier=earlier,
    )


def _answers_of(run: Run) -> list[StoredVerdict]:
    found = run.stored_verdicts()
    if not found:
        raise DataError("holds no answers", path=run.path, remedy="give a run file that has its answers")
    return found


def _by_kind(kinds: Sequence[Kind], verdicts: Verdicts) -> dict[Kind, Verdicts]:
    return {kind: [v for k, v in zip(kinds, verdicts, strict=True) if k == kind] for kind in KINDS}


def _percent(share: float | None) -> str:
    return "none graded" if share is None else f"{share:.1%} of answers correct"


STORED = "in the file"
ByGrader = Mapping[str, Mapping[Kind, Verdicts]]


def verdicts_by_grader(run: Run) -> ByGrader:
    """For each grader its verdicts on both arms, in the order of the run's answers.

    The verdicts in the file come first, then its earlier verdicts, then those of the graders that need no service.
    Raises: DataError for a run without answers.
    """
    places, own = _answers_of(run), grader_of(run.value)
    answered, kinds = [place.answered for place in places], [place.kind for place in places]
    verdicts: dict[str, Verdicts] = {f"{own} ({STORED})" if own else STORED: [place.verdict for place in places]}
    for name in dict.fromkeys(name for place in places for name in place.holder.get("earlier", {})):
        verdicts[f"{name} ({STORED})"] = [place.earlier(name) for place in places]
    verdicts |= {name: [AS_BOOLEAN[v] for v in make_grader(name).grade(answered)] for name in GRADERS}
    return {name: _by_kind(kinds, given) for name, given in verdicts.items()}


def reference_of(by_grader: ByGrader) -> str:
    """A judge's verdicts if there are any, else the first grading: the last kept verdicts, or the file's own."""
    stored = [name for name in by_grader if name == STORED or name.endswith(f"({STORED})")]
    return next((name for name in stored if name.startswith("judge")), stored[-1])


def compare_graders(run: Run, *, reference: str = "") -> "pd.DataFrame":
    """The graders on the answers of one run, measured against a reference grader.

    A grader that is too strict on both arms moves both accuracies; one that is stricter on one arm shifts the gain.

    Args:
        run: a run with its answers; a CPT run must be read with its passages.
        reference: a grader of the result; empty: a judge's verdicts in the file, else the first grading.

    Returns:
        One row per grader, over the answers that it and the reference judged: ``grader``, ``n``, ``ungraded``,
        ``baseline`` and ``adapter`` (share called correct), ``agreement``, ``kappa``, ``baseline_bias``,
        ``adapter_bias`` (share called correct minus the reference's), ``gain``, ``gain_bias``. Missing if the two
        judged no answer of an arm in common.

    Raises:
        DataError: the run holds no answers. SettingsError: there is no such reference.
    """
    by_grader = verdicts_by_grader(run)
    reference = reference or reference_of(by_grader)
    if reference not in by_grader:
        raise SettingsError(f"reference is {reference!r}; known are {', '.join(by_grader)}")
    return frame([_grader_row(name, verdicts, by_grader[reference]) for name, verdicts in by_grader.items()])


def _grader_row(name: str, own: Mapping[Kind, Verdicts], reference: Mapping[Kind, Verdicts]) -> dict[str, Any]:
    pairs = {
        kind: [(v, r) for v, r in zip(own[kind], reference[kind], strict=True) if v is not None and r is not None]
        for kind in KINDS
    }
    (before, before_ref), (after, after_ref) = (([v for v, _ in of], [r for _, r in of]) for of in pairs.values())
    row: dict[str, Any] = {
        "grader": name,
        "n": len(before) + len(after),
        "ungraded": sum(verdict is None for kind in KINDS for verdict in own[kind]),
        "baseline": accuracy(before) if before else None,
        "adapter": accuracy(after) if after else None,
    }
    if not before or not after:
        return row
    agreed = grader_agreement(before + after, before_ref + after_ref)
    own_gain, reference_gain = gain(before, after) or 0.0, gain(before_ref, after_ref) or 0.0
    return row | {
        "agreement": agreed.agreement,
        "kappa": agreed.kappa,
        "baseline_bias": grader_agreement(before, before_ref).bias,
        "adapter_bias": grader_agreement(after, after_ref).bias,
        "gain": own_gain,
        "gain_bias": own_gain - reference_gain,
    }

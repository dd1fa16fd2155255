"""A finished run graded again: no training, no answering, other verdicts, statistics by the published rule.

What an answer was called before stays beside it, in ``earlier`` by the grader's name, so that graders can be
compared on the same answers; a grader's new verdicts replace its own. Whose verdicts a file has stands in its
field ``grader`` or in the identity of its model; a published file has verdicts by "earlier".

A file of answers graded: JSON lines of ``question``, ``gold``, ``answer`` in, the same with a verdict out.

Order and every other field are kept. A ``verdict`` that comes in as true, false or null is somebody else's:
it goes out as ``reference_verdict`` and the grader is measured against it, overall and by ``kind`` (baseline,
adapter, or both) where rows have one, since a grader that is harder on one kind bends every gain. A broken
row is refused, and then nothing is written.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError
from seal_nb.grading.base import AS_BOOLEAN, IN_WORDS, Answered, Grader, Verdict
from seal_nb.grading.choose import grader_of, make_grader
from seal_nb.metrics import Agreement, Verdicts, accuracy, grader_agreement
from seal_nb.passages import Passage, load_passages
from seal_nb.results.verdicts import KINDS, Kind, Place, form_of, is_run
from seal_nb.storage import read_json, write_json, write_text

_TEXTS = ("question", "gold", "answer")
_SETTLED = (Verdict.CORRECT, Verdict.INCORRECT)


@dataclass(frozen=True, kw_only=True)
class GradedFile:
    """What a grader said about a file, and how that compares with the reference verdicts in it."""

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
        """The text form: counts, then agreement where it can be had."""
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
    """A verdict in words is that of an earlier grading: it is replaced, and never a reference."""
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
            said.append(f"{name}: " + ", ".join(f"{kind} {_percent(share)}" for kind, share in shares.items()))
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
    path: str | Path, out: str | Path, grader: Grader, *, dataset: str | Path = "", only_ungraded: bool = False
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

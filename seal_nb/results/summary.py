"""What a run file says, computed again from its per-question verdicts.

For single-passage and CPT run files, published or ours: the ``overall`` numbers under their published keys,
intervals over passages, and whether the file's own numbers agree. What a file cannot give is None and said in
``notes``; a stored number never stands in for a computed one. Nothing is graded or trained here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError
from seal_nb.metrics import Verdicts, Weighting, accuracy, gain, mean_interval, paired_difference
from seal_nb.passages import Passage
from seal_nb.results.cpt import split_by_passage
from seal_nb.results.single_passage import STATS, EvaluatedPassage, SinglePassageRun, run_from_json
from seal_nb.results.statistics import published_statistics
from seal_nb.storage import read_json

CPT_KEYS = ("baseline_accuracy", "adapter_accuracy", "gain")


def summarize(path: str | Path, *, passages: Sequence[Passage] = ()) -> dict[str, Any]:
    """One JSON-able object: ``kind``, ``overall``, counts, ``intervals``, ``disagreements``, ``notes``.

    ``passages`` (for a published CPT run, which does not say which question belongs to which passage) are the
    passages it was asked about, in order. Raises: DataError for a file that is no run, or is broken.
    """
    value = read_json(path)
    if isinstance(value, dict) and "articles" in value:
        return _single_passage(run_from_json(value, path=path))
    if isinstance(value, dict) and "server_reply" in value:
        return _cpt(value, path, passages)
    raise DataError(
        "is neither a single-passage run (articles) nor a CPT run (server_reply)",
        path=path,
        remedy="give a run_*.json or cpt_run_*.json",
    )


def _single_passage(run: SinglePassageRun) -> dict[str, Any]:
    graded_P = [[edit for edit in passage.self_edits if edit.is_graded] for passage in run.passages]
    computed = [[edit.stats() for edit in edits] for edits in graded_P]
    articles, overall = published_statistics(computed)
    baseline_P, adapter_P = _verdicts(run, "baseline_correct"), _verdicts(run, "adapter_correct")
    notes = _missing_notes(run, graded_P)
    return {
        "kind": "single_passage",
        "file": run.path.name,
        "overall": overall,
        **_counts(baseline_P, adapter_P),
        "n_self_edits": sum(len(passage.self_edits) for passage in run.passages),
        "intervals": _intervals(baseline_P, adapter_P),
        "disagreements": _single_passage_disagreements(run, articles, overall) if not notes else [],
        "notes": notes,
    }


def _verdicts(run: SinglePassageRun, field: str) -> list[list[bool | None]]:
    return [
        [getattr(answered, field) for edit in passage.self_edits for answered in edit.questions]
        for passage in run.passages
    ]


def _missing_notes(run: SinglePassageRun, graded_P: Sequence[Sequence[object]]) -> list[str]:
    n_self_edits = sum(len(passage.self_edits) for passage in run.passages)
    n_without = n_self_edits - sum(map(len, graded_P))
    if not n_without:
        return []
    stored = run.stored_overall.get("adapter_mean_accuracy")
    said = f"the file itself says adapter_mean_accuracy {stored}" if stored is not None else "none are stored"
    return [f"{n_without} of {n_self_edits} self-edits have no graded answer and are left out; {said}"]


def _counts(baseline_P: Sequence[Verdicts], adapter_P: Sequence[Verdicts]) -> dict[str, int]:
    """Counts over both arms; an answer is one question in one repeat of one self-edit."""
    pairs = [
        pair for before, after in zip(baseline_P, adapter_P, strict=True) for pair in zip(before, after, strict=True)
    ]
    return {
        "n_passages": len(adapter_P),
        "n_answers": len(pairs),
        "n_ungraded_baseline": sum(before is None for before, _ in pairs),
        "n_ungraded_adapter": sum(after is None for _, after in pairs),
    }


def _intervals(
    baseline_P: Sequence[Verdicts], adapter_P: Sequence[Verdicts], weighting: Weighting = "passage"
) -> dict[str, Any] | None:
    """Means with 95 % intervals over passages, the paired gain also as a sentence; None without verdicts."""
    try:
        gained = paired_difference(adapter_P, baseline_P, weighting=weighting)
        return {
            "baseline": asdict(mean_interval(baseline_P, weighting=weighting)),
            "adapter": asdict(mean_interval(adapter_P, weighting=weighting)),
            "gain": asdict(gained) | {"sentence": gained.sentence()},
        }
    except DataError:
        return None


def _single_passage_disagreements(
    run: SinglePassageRun, articles: Sequence[Mapping[str, Any]], overall: Mapping[str, Any]
) -> list[str]:
    """Where the file's own numbers are not the computed ones, bit for bit; absent ones are passed over."""
    found = _unequal("overall", run.stored_overall, overall)
    for passage, article in zip(run.passages, articles, strict=True):
        found += _unequal(f"article {passage.index}", passage.stored_stats, article)
        found += _self_edit_disagreements(passage)
    return found


def _self_edit_disagreements(passage: EvaluatedPassage) -> list[str]:
    found = []
    for edit in passage.self_edits:
        stored = {name: edit.stored_stats[name] for name in STATS}
        found += _unequal(f"article {passage.index}, self-edit {edit.index}", stored, edit.stats())
    return found


def _unequal(where: str, stored: Mapping[str, Any], computed: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}: {name} is stored as {stored[name]}, computed {computed[name]}"
        for name in computed
        if stored.get(name) is not None and stored[name] != computed[name]
    ]


def _cpt(value: Mapping[str, Any], path: str | Path, passages: Sequence[Passage]) -> dict[str, Any]:
    reply = _Reply(value["server_reply"], path)
    rounded = {
        "baseline_accuracy": accuracy(reply.baseline),
        "adapter_accuracy": accuracy(reply.adapter),
        "gain": gain(reply.baseline, reply.adapter),
    }
    overall = {name: None if entry is None else round(entry, 4) for name, entry in rounded.items()}
    baseline_P, adapter_P, notes = _by_passage(value, reply, passages)
    return {
        "kind": "cpt",
        "file": Path(path).name,
        "overall": overall,
        **_counts(baseline_P or [reply.baseline], adapter_P or [reply.adapter]),
        "n_passages": value.get("n_articles"),
        "n_train_sequences": value.get("train_sequences"),
        "intervals": _intervals(baseline_P, adapter_P, weighting="question"),
        "disagreements": _unequal("overall", value.get("overall") or {}, overall),
        "notes": notes,
    }


def _by_passage(
    value: Mapping[str, Any], reply: "_Reply", passages: Sequence[Passage]
) -> tuple[list[Verdicts], list[Verdicts], list[str]]:
    """Verdicts of each passage: as our files store them, or cut by the passages given."""
    if passages:
        counts = [len(passage.questions) for passage in passages]
        return split_by_passage(reply.baseline, counts), split_by_passage(reply.adapter, counts), []
    if counts := [entry["n_questions"] for entry in value.get("per_passage") or []]:
        return split_by_passage(reply.baseline, counts), split_by_passage(reply.adapter, counts), []
    note = "the file does not say which question belongs to which passage: no intervals without its item file"
    return [], [], [note]


class _Reply:
    """The verdicts of a CPT run's ``server_reply``, checked."""

    def __init__(self, reply: Any, path: str | Path) -> None:
        self.path = path
        if not isinstance(reply, dict):
            raise DataError("is not an object", path=path, field="server_reply", remedy="write the file again")
        self.baseline = self._verdicts(reply, "baseline_correct")
        self.adapter = self._verdicts(reply, "adapter_correct")
        if len(self.baseline) != len(self.adapter):
            raise self._refused("adapter_correct", f"has {len(self.adapter)} entries, not {len(self.baseline)}")

    def _verdicts(self, reply: Mapping[str, Any], name: str) -> list[bool | None]:
        verdicts = reply.get(name)
        if not isinstance(verdicts, list):
            raise self._refused(name, "is not a list")
        for at, verdict in enumerate(verdicts):
            if verdict is not None and not isinstance(verdict, bool):
                raise self._refused(f"{name}[{at}]", f"is {str(verdict)[:40]!r}, not true, false or null")
        return verdicts

    def _refused(self, field: str, problem: str) -> DataError:
        return DataError(problem, path=self.path, field=f"server_reply.{field}", remedy="write the file again")

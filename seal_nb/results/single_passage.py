"""Single-passage run files, published and ours, read into records.

The published form: ``{overall, …, articles: [{stats, title, context, prompt, completions: [{text, stats,
questions: [{rep, …, baseline_correct, adapter_correct}]}]}]}``. Released files may lack per-question records
or hold nulls; that is read as what it is, absent, and decided on by whoever needs it. A value of another
kind is refused with path, item and field. Of statistics, only a self-edit's own are computed here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError
from seal_nb.metrics import Verdicts
from seal_nb.results.statistics import mean, repeat_stats
from seal_nb.storage import read_json


def run_file_name(exp_name: str, arm: str) -> str:
    """`run_<exp_name>.json` for self-edits, as published; the other arms add their name."""
    return f"run_{exp_name}.json" if arm == "self_edits" else f"run_{exp_name}_{arm}.json"


STATS = ("baseline_mean", "baseline_std", "adapter_mean", "adapter_std", "gain_mean")


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """One question in one repeat, without and with the adapter; a verdict of None is ungraded."""

    repeat: int
    question: str
    gold: str
    baseline_answer: str
    adapter_answer: str
    baseline_correct: bool | None
    adapter_correct: bool | None
    soft_gain: float | None  # nats: change in log-probability of the gold answer; ours only


@dataclass(frozen=True, kw_only=True)
class EvaluatedSelfEdit:
    """A self-edit with its answers; ``stored_stats`` are the file's own numbers, None where it has none.

    ``made`` is what else the file says about it: seeds, settings, scores of tokens.
    """

    index: int
    text: str | None
    questions: tuple[AnsweredQuestion, ...]
    stored_stats: Mapping[str, float | None]
    prompt: str | None = None  # its own, where self-edits of one passage complete different ones
    made: Mapping[str, Any] = field(default_factory=dict)

    def repeats(self) -> list[tuple[Verdicts, Verdicts]]:
        """(baseline, adapter) verdicts of each repeat, in file order."""
        by_repeat: dict[int, list[AnsweredQuestion]] = {}
        for answered in self.questions:
            by_repeat.setdefault(answered.repeat, []).append(answered)
        return [
            ([a.baseline_correct for a in answers], [a.adapter_correct for a in answers])
            for answers in by_repeat.values()
        ]

    @property
    def is_graded(self) -> bool:
        return any(answered.adapter_correct is not None for answered in self.questions)

    def stats(self) -> Mapping[str, float | None]:
        """Recomputed from the verdicts where there are any, else as stored."""
        return repeat_stats(self.repeats()) if self.is_graded else self.stored_stats

    def soft_gain(self) -> float | None:
        """Mean over questions and repeats, in nats; None where no soft score was taken."""
        return mean([answered.soft_gain for answered in self.questions])


@dataclass(frozen=True, kw_only=True)
class EvaluatedPassage:
    """A passage of a run with its evaluated self-edits; ``prompt`` is None where the file has none."""

    index: int
    title: str
    context: str
    prompt: str | None
    self_edits: tuple[EvaluatedSelfEdit, ...]
    stored_stats: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SinglePassageRun:
    """A run file; ``settings`` is everything beside ``overall`` and ``articles``, as it stands there."""

    path: Path
    passages: tuple[EvaluatedPassage, ...]
    stored_overall: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def n_completions(self) -> int:
        """The largest number of self-edits of a passage: the n of "best k of n"."""
        return max((len(passage.self_edits) for passage in self.passages), default=0)


def read_run(path: str | Path) -> SinglePassageRun:
    """A single-passage run file, published or ours, plain or .gz. Raises: DataError."""
    return run_from_json(read_json(path), path=path)


def run_from_json(value: Any, *, path: str | Path = "") -> SinglePassageRun:
    """The same from a value in memory; ``path`` only for messages."""
    if not isinstance(value, dict) or not isinstance(value.get("articles"), list):
        raise DataError(
            "has no list of articles", path=path, field="articles", remedy="give a single-passage run_*.json"
        )
    reader = _Reader(Path(path))
    return SinglePassageRun(
        path=Path(path),
        passages=tuple(reader.passage(at, article) for at, article in enumerate(value["articles"])),
        stored_overall=value.get("overall") or {},
        settings={name: entry for name, entry in value.items() if name not in ("overall", "articles")},
    )


class _Reader:
    """Reads articles; knows where it is, for messages. Null stands for absent everywhere."""

    def __init__(self, path: Path) -> None:
        self.path, self.item = path, 0

    def passage(self, item: int, value: Any) -> EvaluatedPassage:
        self.item = item
        article = self._of(dict, value, "") or {}
        completions = self._of(list, article.get("completions"), "completions") or []
        return EvaluatedPassage(
            index=item,
            title=self._of(str, article.get("title"), "title") or "",
            context=self._of(str, article.get("context"), "context") or "",
            prompt=self._of(str, article.get("prompt"), "prompt"),
            self_edits=tuple(self._self_edit(at, entry, f"completions[{at}]") for at, entry in enumerate(completions)),
            stored_stats=self._of(dict, article.get("stats"), "stats") or {},
        )

    def _self_edit(self, index: int, value: Any, where: str) -> EvaluatedSelfEdit:
        completion = self._of(dict, value, where) or {}
        stats = self._of(dict, completion.get("stats"), f"{where}.stats") or {}
        questions = self._of(list, completion.get("questions"), f"{where}.questions") or []
        return EvaluatedSelfEdit(
            index=index,
            text=self._of(str, completion.get("text"), f"{where}.text"),
            prompt=self._of(str, completion.get("prompt"), f"{where}.prompt"),
            questions=tuple(self._question(entry, f"{where}.questions[{at}]") for at, entry in enumerate(questions)),
            stored_stats={name: self._number(stats.get(name), f"{where}.stats.{name}") for name in STATS},
            made={key: kept for key, kept in completion.items() if key not in ("text", "stats", "questions")},
        )

    def _question(self, value: Any, where: str) -> AnsweredQuestion:
        entry = self._of(dict, value, where) or {}
        texts = {
            name: self._of(str, entry.get(name), f"{where}.{name}") or ""
            for name in ("question", "answer", "baseline_answer", "adapter_answer")
        }
        before, after = (
            self._number(entry.get(f"{arm}_gold_logprob"), f"{where}.{arm}_gold_logprob")
            for arm in ("baseline", "adapter")
        )
        return AnsweredQuestion(
            repeat=self._of(int, entry.get("rep"), f"{where}.rep") or 0,
            question=texts["question"],
            gold=texts["answer"],
            baseline_answer=texts["baseline_answer"],
            adapter_answer=texts["adapter_answer"],
            baseline_correct=self._of(bool, entry.get("baseline_correct"), f"{where}.baseline_correct"),
            adapter_correct=self._of(bool, entry.get("adapter_correct"), f"{where}.adapter_correct"),
            soft_gain=None if before is None or after is None else after - before,
        )

    def _of(self, kind: type, value: Any, field: str) -> Any:
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        named = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}
        raise self._refused(value, field, named[kind])

    def _number(self, value: Any, field: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._refused(value, field, "a number")
        return float(value) if math.isfinite(value) else None

    def _refused(self, value: Any, field: str, wanted: str) -> DataError:
        return DataError(
            f"is {str(value)[:40]!r}, not {wanted} or null",
            path=self.path,
            item=self.item,
            field=field,
            remedy="mend the file or write it again",
        )

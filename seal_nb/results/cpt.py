"""CPT run files (many passages in one adapter), published and ours: read, written, recomputed.

The published form: ``{overall, …, per_article, server_reply: {baseline_texts, …, adapter_correct, …}}``. It does not
say which question belongs to which passage, so intervals and regrading need the passages; ours add ``per_passage``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from seal_nb.errors import DataError, checked
from seal_nb.grading.base import answered_with
from seal_nb.metrics import Scores, Verdicts, Weighting, accuracy, gain
from seal_nb.passages import Passage
from seal_nb.protocol import rounded
from seal_nb.results.run import KINDS, Count, Kind, Many, Part, Run, RunFields, StoredVerdict, verdict_change

if TYPE_CHECKING:
    import pandas as pd


OTHER_PASSAGES = "give the item file that this run was asked about (--dataset)"


class _Reply(Part):
    baseline_correct: Many[bool | None]
    adapter_correct: Many[bool | None]
    baseline_texts: Many[str] | None = None
    adapter_texts: Many[str] | None = None
    earlier: dict[str, dict[str, Many[bool | None]]] | None = None


class _OfPassage(Part):
    title: str | None = None
    n_questions: Count


class _File(RunFields):
    server_reply: _Reply
    per_passage: Many[_OfPassage] | None = None


@dataclass(kw_only=True, eq=False)
class CptRun(Run):
    """A ``cpt_run_*.json``. ``passages`` are what it was asked about, in order; empty: as far as the file says.
    Raises: DataError with path and field for broken verdicts."""

    passages: Sequence[Passage] = ()

    form: ClassVar[str] = "cpt"
    key_fields: ClassVar[str] = "title and number of questions"
    weighting: ClassVar[Weighting] = "question"

    def __post_init__(self) -> None:
        read = checked(_File.model_validate, self.value, path=self.path)
        reply = read.server_reply
        for name in ("adapter_correct", "baseline_texts", "adapter_texts"):
            values, where = getattr(reply, name), f"server_reply.{name}"
            if values or name == "adapter_correct":  # texts may be absent or empty
                check_length(values, len(reply.baseline_correct), path=self.path, field=where, of="verdicts")
        if read.per_passage and (n := sum(one.n_questions for one in read.per_passage)) != len(reply.baseline_correct):
            problem = f"has {n} questions for {len(reply.baseline_correct)} verdicts"
            raise DataError(problem, path=self.path, field="per_passage", remedy="write the file again")
        for grader, kept in (reply.earlier or {}).items():
            for name, verdicts in kept.items():
                where = f"server_reply.earlier.{grader}.{name}"
                check_length(verdicts, len(reply.baseline_correct), path=self.path, field=where, of="verdicts")
        self.passages = tuple(self.passages)[: self.value.get("n_articles") or None]

    @property
    def arm(self) -> str:
        return super().arm + (", all weights" if self.value.get("method") == "full" else "")

    def flat_verdicts(self, kind: Kind) -> list[bool | None]:
        return list(self.value["server_reply"][f"{kind}_correct"])

    def scores(self, kind: Kind) -> list[Scores]:
        counts = [n for _, n in self.unit_keys()]
        return list(split_by_passage(self.flat_verdicts(kind), counts)) if counts else []

    def stored_mean(self, kind: Kind) -> float | None:
        verdicts = self.flat_verdicts(kind)
        return accuracy(verdicts) if verdicts else self.stored_overall.get(f"{kind}_accuracy")

    def unit_keys(self) -> list[Any]:
        """(title, number of questions) of each passage."""
        if self.passages:
            return [(passage.title, len(passage.questions)) for passage in self.passages]
        return [(entry.get("title"), entry["n_questions"]) for entry in self.value.get("per_passage") or []]

    def extra(self) -> dict[str, Any]:
        n_questions = len(self.flat_verdicts("adapter")) or self.value.get("eval_questions")
        return {"questions": n_questions, "lr": (self.value.get("lora_params") or {}).get("lr")}

    def answers(self) -> "pd.DataFrame":
        """All answers of the run.

        Returns:
            One row per question: ``passage``, ``question``, ``gold`` (both missing unless the run was read with its
            passages), ``baseline_answer``, ``adapter_answer``, ``verdicts``, ``baseline_correct``, ``adapter_correct``.
        """
        import pandas as pd

        before, after = (self.flat_verdicts(kind) for kind in KINDS)
        asked = [question for passage in self.passages for question in passage.questions]
        columns = {
            "passage": [title for title, n in self.unit_keys() for _ in range(n)],
            "question": [one.question for one in asked],
            "gold": [one.answer for one in asked],
            **{f"{kind}_answer": self.value["server_reply"].get(f"{kind}_texts") for kind in KINDS},
            "verdicts": list(map(verdict_change, before, after)),
            "baseline_correct": before,
            "adapter_correct": after,
        }
        for name, values in columns.items():
            if values:
                check_length(values, len(after), path=self.path, field=name, remedy=OTHER_PASSAGES)
        return pd.DataFrame({name: values or None for name, values in columns.items()}, index=range(len(after)))

    def overall(self) -> dict[str, float | None]:
        """Published ``overall``: 4 decimals, the gain from unrounded accuracies."""
        before, after = (self.flat_verdicts(kind) for kind in KINDS)
        accuracies = {"baseline_accuracy": rounded(accuracy(before)), "adapter_accuracy": rounded(accuracy(after))}
        return accuracies | {"gain": rounded(gain(before, after))}

    def counts(self) -> dict[str, Any]:
        n_passages = self.value.get("n_articles") or len(self.unit_keys()) or None
        return super().counts() | {"n_passages": n_passages, "n_train_sequences": self.value.get("train_sequences")}

    def notes(self) -> list[str]:
        if self.unit_keys():
            return []
        return ["the file does not say which question belongs to which passage: no intervals without its item file"]

    def stored_verdicts(self) -> list[StoredVerdict]:
        reply = self.value["server_reply"]
        asked = [(passage.title, question) for passage in self.passages for question in passage.questions]
        for name in ("baseline_texts", "baseline_correct", "adapter_texts", "adapter_correct"):
            where = f"server_reply.{name}"
            check_length(reply.get(name), len(asked), path=self.path, field=where, remedy=OTHER_PASSAGES)
        found = []
        for at, (title, one) in enumerate(asked):
            for kind in KINDS:
                text = reply[f"{kind}_texts"][at]
                golds = one.answer, *one.other_answers
                answered = answered_with(golds, title=title, question=one.question, answer=text)
                found.append(StoredVerdict(kind, answered, reply, f"{kind}_correct", at))
        return found

    def fill_statistics(self) -> None:
        overall, pairs = self.overall(), list(zip(*(self.flat_verdicts(kind) for kind in KINDS), strict=True))
        self.value["server_reply"] |= {
            "baseline_accuracy": overall["baseline_accuracy"],
            "adapter_accuracy": overall["adapter_accuracy"],
            "adapter_gain": overall["gain"],
            "gains": [None if before is None or after is None else after - before for before, after in pairs],
        }
        per_passage: list[dict[str, Any]] = []  # by index, because titles repeat
        per_article: dict[str, dict[str, list[bool | None]]] = {}  # of all passages of one title
        by_passage = zip(self.unit_keys(), *(self.scores(kind) for kind in KINDS), strict=True)
        for at, ((title, n_questions), before, after) in enumerate(by_passage):
            verdicts = {"baseline_correct": before, "adapter_correct": after}
            accuracies = {f"{kind}_accuracy": rounded(accuracy(verdicts[f"{kind}_correct"])) for kind in KINDS}
            per_passage.append({"index": at, "title": title, "n_questions": n_questions, **verdicts, **accuracies})
            mine = per_article.setdefault(title, {name: [] for name in verdicts})
            for name, values in verdicts.items():
                mine[name] += values
        n_ungraded = sum(None in pair for pair in pairs)
        self.value.update(overall=overall, n_ungraded=n_ungraded, per_article=per_article, per_passage=per_passage)


def check_length(
    values: Sequence[Any] | None, n: int, *, path: str | Path, field: str, of: str = "questions", remedy: str = ""
) -> None:
    """Refuse a list that has not one entry per question. Raises: DataError."""
    if (n_there := len(values or ())) != n:
        remedy = remedy or "write the file again"
        raise DataError(f"has {n_there} entries for {n} {of}", path=path, field=field, remedy=remedy)


def split_by_passage(verdicts: Verdicts, counts: Sequence[int]) -> list[Verdicts]:
    """A flat list of verdicts cut into passages of ``counts`` questions each. Raises: DataError."""
    if len(verdicts) != sum(counts):
        remedy = "give the passages of this run, in its order"
        raise DataError(f"{len(verdicts)} verdicts for {sum(counts)} questions", remedy=remedy)
    return [verdicts[end - n : end] for end, n in zip(accumulate(counts), counts, strict=True)]

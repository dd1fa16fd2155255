"""CPT run files (many passages in one adapter), published and ours: read, written, recomputed.

The published form: ``{overall, …, per_article, server_reply: {baseline_texts, adapter_texts, baseline_correct,
adapter_correct, …}}``. It does not say which question belongs to which passage, so intervals and regrading need the
passages; our files add ``per_passage``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from seal_nb.errors import DataError
from seal_nb.grading.base import IN_WORDS, Answered
from seal_nb.metrics import Scores, Verdicts, Weighting, accuracy, gain
from seal_nb.passages import Passage
from seal_nb.protocol import Answers, build_reply, rounded
from seal_nb.results.run import KINDS, VERDICT_WORDS, Kind, Run, RunFields, StoredVerdict, frame

if TYPE_CHECKING:
    import pandas as pd

_PUBLISHED_NUMBERS = {"baseline_accuracy", "adapter_accuracy", "adapter_gain", "gains"}


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True)

    baseline_correct: list[bool | None]
    adapter_correct: list[bool | None]


class _OfPassage(BaseModel):
    title: str | None = None
    n_questions: int


class _File(RunFields):
    server_reply: _Reply
    per_passage: list[_OfPassage] | None = None


@dataclass(kw_only=True, eq=False)
class CptRun(Run):
    """A ``cpt_run_*.json``. ``passages`` are what it was asked about, in order; empty: as far as the file says.
    Raises: DataError with path and field for broken verdicts."""

    passages: Sequence[Passage] = ()

    form: ClassVar[str] = "cpt"
    weighting: ClassVar[Weighting] = "question"

    def __post_init__(self) -> None:
        reply = self.checked(_File).server_reply
        n_before, n_after = len(reply.baseline_correct), len(reply.adapter_correct)
        if n_before != n_after:
            raise DataError(
                f"has {n_after} entries, not {n_before}",
                path=self.path,
                field="server_reply.adapter_correct",
                remedy="write the file again",
            )
        self.passages = tuple(self.passages)[: self.value.get("n_articles") or None]

    @property
    def arm(self) -> str:
        return super().arm + (", all weights" if self.value.get("method") == "full" else "")

    def verdicts(self, kind: Kind) -> list[bool | None]:
        """Of all questions in order."""
        found: list[bool | None] = self.value["server_reply"][f"{kind}_correct"]
        return found

    def scores(self, kind: Kind) -> list[Scores]:
        counts = [n for _, n in self.unit_keys()]
        return list(split_by_passage(self.verdicts(kind), counts)) if counts else []

    def stored_mean(self, kind: Kind) -> float | None:
        verdicts = self.verdicts(kind)
        return accuracy(verdicts) if verdicts else (self.value.get("overall") or {}).get(f"{kind}_accuracy")

    def unit_keys(self) -> list[Any]:
        """(title, number of questions) of each passage."""
        if self.passages:
            return [(passage.title, len(passage.questions)) for passage in self.passages]
        return [(entry.get("title"), entry["n_questions"]) for entry in self.value.get("per_passage") or []]

    def extra(self) -> dict[str, Any]:
        n_questions = len(self.verdicts("adapter")) or self.value.get("eval_questions")
        return {"questions": n_questions, "lr": (self.value.get("lora_params") or {}).get("lr")}

    def answers(self) -> "pd.DataFrame":
        """All answers of the run.

        Returns:
            One row per question: ``passage``, ``question``, ``gold`` (both missing unless the run was read with its
            passages), ``baseline_answer``, ``adapter_answer``, ``verdicts``, ``baseline_correct``, ``adapter_correct``.
        """
        reply, asked = self.value["server_reply"], self._asked()
        titles = [title for title, n in self.unit_keys() for _ in range(n)]
        rows = []
        for at, (before, after) in enumerate(zip(self.verdicts("baseline"), self.verdicts("adapter"), strict=True)):
            rows.append(
                {
                    "passage": titles[at] if titles else None,
                    "question": asked[at].question if asked else None,
                    "gold": asked[at].gold if asked else None,
                    "baseline_answer": (reply.get("baseline_texts") or {at: None})[at],
                    "adapter_answer": (reply.get("adapter_texts") or {at: None})[at],
                    "verdicts": f"{VERDICT_WORDS[before]} → {VERDICT_WORDS[after]}",
                    "baseline_correct": before,
                    "adapter_correct": after,
                }
            )
        return frame(rows)

    def overall(self) -> dict[str, float | None]:
        """Published ``overall``: 4 decimals, the gain from unrounded accuracies."""
        before, after = (self.verdicts(kind) for kind in KINDS)
        numbers = {
            "baseline_accuracy": accuracy(before),
            "adapter_accuracy": accuracy(after),
            "gain": gain(before, after),
        }
        return {name: rounded(number) for name, number in numbers.items()}

    def counts(self) -> dict[str, Any]:
        before, after = (self.verdicts(kind) for kind in KINDS)
        return {
            "n_passages": self.value.get("n_articles") or len(self.unit_keys()) or None,
            "n_answers": len(after),
            "n_ungraded_baseline": before.count(None),
            "n_ungraded_adapter": after.count(None),
            "n_train_sequences": self.value.get("train_sequences"),
        }

    def notes(self) -> list[str]:
        if self.unit_keys():
            return []
        return ["the file does not say which question belongs to which passage: no intervals without its item file"]

    def stored_verdicts(self) -> list[StoredVerdict]:
        reply, asked = self.value["server_reply"], self._asked()
        for kind in KINDS:
            for name in (f"{kind}_texts", f"{kind}_correct"):
                check_length(reply.get(name), len(asked), path=self.path, field=f"server_reply.{name}")
        return [
            StoredVerdict(
                kind=kind,
                answered=replace(one, answer=reply[f"{kind}_texts"][at]),
                holder=reply,
                field=f"{kind}_correct",
                index=at,
            )
            for at, one in enumerate(asked)
            for kind in KINDS
        ]

    def _asked(self) -> list[Answered]:
        return [
            Answered(title=passage.title, question=question.question, gold=question.answer, answer="")
            for passage in self.passages
            for question in passage.questions
        ]

    def fill_statistics(self) -> None:
        reply = self.value["server_reply"]
        before, after = (
            Answers(texts=reply[f"{kind}_texts"], verdicts=[IN_WORDS[one] for one in self.verdicts(kind)])
            for kind in KINDS
        )
        built = build_reply(baseline=before, adapter=after)
        reply |= built.model_dump(mode="json", include=_PUBLISHED_NUMBERS)
        per_passage = self._per_passage()
        per_article: dict[str, dict[str, list[bool | None]]] = {}  # of all passages of one title
        for entry in per_passage:
            mine = per_article.setdefault(entry["title"], {"baseline_correct": [], "adapter_correct": []})
            for name, verdicts in mine.items():
                verdicts += entry[name]
        self.value.update(
            overall=self.overall(), n_ungraded=built.n_ungraded, per_article=per_article, per_passage=per_passage
        )

    def _per_passage(self) -> list[dict[str, Any]]:
        """One entry per passage, by its index, because titles repeat."""
        return [
            {
                "index": at,
                "title": passage.title,
                "n_questions": len(passage.questions),
                "baseline_correct": before,
                "adapter_correct": after,
                "baseline_accuracy": rounded(accuracy(before)),
                "adapter_accuracy": rounded(accuracy(after)),
            }
            for at, (passage, before, after) in enumerate(
                zip(self.passages, self.scores("baseline"), self.scores("adapter"), strict=True)
            )
        ]


def check_length(values: Any, n_questions: int, *, path: str | Path, field: str) -> None:
    """Refuse answers or verdicts that are not one per question. Raises: DataError."""
    n_there = len(values) if isinstance(values, list) else 0
    if n_there != n_questions:
        raise DataError(
            f"has {n_there} entries, and the passages {n_questions} questions",
            path=path,
            field=field,
            remedy="give the item file that this run was asked about (--dataset)",
        )


def split_by_passage(verdicts: Verdicts, counts: Sequence[int]) -> list[Verdicts]:
    """A flat list of verdicts cut into passages of ``counts`` questions each. Raises: DataError."""
    if len(verdicts) != sum(counts):
        raise DataError(
            f"{len(verdicts)} verdicts for {sum(counts)} questions",
            remedy="give the passages of this run, in its order",
        )
    return [verdicts[end - n : end] for end, n in zip(accumulate(counts), counts, strict=True)]

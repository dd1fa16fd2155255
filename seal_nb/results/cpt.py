"""CPT run files (many passages in one adapter), published and ours: read, written, recomputed.

The published form: ``{overall, …, per_article, server_reply: {baseline_texts, …, adapter_correct, …}}``. It does not
say which question belongs to which passage, so intervals and regrading need the passages; ours add ``per_passage``."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from seal_nb.errors import DataError, checked
from seal_nb.grading.base import answered_with
from seal_nb.metrics import Scores, Verdicts, Weighting, accuracy, gain
from seal_nb.passages import Passage, Question
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
        reply, n = read.server_reply, len(read.server_reply.baseline_correct)
        lists: dict[str, Any] = {
            name: getattr(reply, name) for name in ("adapter_correct", "baseline_texts", "adapter_texts")
        }
        for grader, kept in (reply.earlier or {}).items():
            lists |= {f"earlier.{grader}.{name}": verdicts for name, verdicts in kept.items()}
        for name, values in lists.items():
            if values or not name.endswith("_texts"):  # texts may be absent or empty
                check_length(values, n, path=self.path, field=f"server_reply.{name}", of="verdicts")
        if read.per_passage and (n_asked := sum(one.n_questions for one in read.per_passage)) != n:
            problem = f"has {n_asked} questions for {n} verdicts"
            raise DataError(problem, path=self.path, field="per_passage", remedy="write the file again")
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
        return accuracy(verdicts) if verdicts else (self.value.get("overall") or {}).get(f"{kind}_accuracy")

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
        Returns: one row per question: ``passage``, ``question``, ``gold`` (both missing unless the run was read with
        its passages), ``baseline_answer``, ``adapter_answer``, ``verdicts``, ``baseline_correct``, ``adapter_correct``.
        """
        import pandas as pd

        before, after = (self.flat_verdicts(kind) for kind in KINDS)
        columns = {
            "passage": [title for title, n in self.unit_keys() for _ in range(n)],
            "question": [one.question for _, one in self._asked()],
            "gold": [one.answer for _, one in self._asked()],
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
        shares = {"baseline_accuracy": accuracy(before), "adapter_accuracy": accuracy(after)}
        return {name: rounded(share) for name, share in (shares | {"gain": gain(before, after)}).items()}

    def _asked(self) -> list[tuple[str, Question]]:
        """Title and question of each answer; empty if the run was read without its passages."""
        return [(passage.title, question) for passage in self.passages for question in passage.questions]

    def counts(self) -> dict[str, Any]:
        n_passages = self.value.get("n_articles") or len(self.unit_keys()) or None
        return super().counts() | {"n_passages": n_passages, "n_train_sequences": self.value.get("train_sequences")}

    def notes(self) -> list[str]:
        if self.unit_keys():
            return super().notes()
        return ["the file does not say which question belongs to which passage: no intervals without its item file"]

    def stored_verdicts(self) -> list[StoredVerdict]:
        reply, asked, found = self.value["server_reply"], self._asked(), []
        for name in ("baseline_texts", "baseline_correct", "adapter_texts", "adapter_correct"):
            where = f"server_reply.{name}"
            check_length(reply.get(name), len(asked), path=self.path, field=where, remedy=OTHER_PASSAGES)
        for at, (title, one) in enumerate(asked):
            golds = one.answer, *one.other_answers
            for kind in KINDS:
                text = reply[f"{kind}_texts"][at]
                answered = answered_with(golds, title=title, question=one.question, answer=text)
                found.append(StoredVerdict(kind, answered, reply, f"{kind}_correct", at))
        return found

    def fill_statistics(self) -> None:
        overall, pairs = self.overall(), list(zip(*map(self.flat_verdicts, KINDS), strict=True))
        gains = [None if before is None or after is None else after - before for before, after in pairs]
        for name, value in overall.items():
            self.value["server_reply"]["adapter_gain" if name == "gain" else name] = value
        self.value["server_reply"]["gains"] = gains
        per_passage: list[dict[str, Any]] = []  # by index, because titles repeat
        per_article: dict[str, dict[str, list[Any]]] = {}  # of all passages of one title
        by_passage = zip(self.unit_keys(), *map(self.scores, KINDS), strict=True)
        for at, ((title, n_questions), before, after) in enumerate(by_passage):
            verdicts = {"baseline_correct": before, "adapter_correct": after}
            shares = {"baseline_accuracy": rounded(accuracy(before)), "adapter_accuracy": rounded(accuracy(after))}
            per_passage.append({"index": at, "title": title, "n_questions": n_questions, **verdicts, **shares})
            for name, values in verdicts.items():
                per_article.setdefault(title, {}).setdefault(name, []).extend(values)
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

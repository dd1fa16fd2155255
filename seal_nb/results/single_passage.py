"""Single-passage run files, published and ours: read, written, recomputed.

The published form: ``{overall, …, articles: [{stats, title, context, prompt, completions: [{text, stats, questions:
[{rep, …, baseline_correct, adapter_correct}]}]}]}``. Released files may lack per-question records or hold nulls; both
are read as absent. A value of another kind is refused with path, item and field.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from seal_nb.errors import DataError
from seal_nb.grading.base import Answered, Verdict
from seal_nb.grading.choose import make_grader
from seal_nb.metrics import Scores, Verdicts, recitation_rate
from seal_nb.prompts import DEFAULT_PROMPT_KEY, recorded_key
from seal_nb.results.run import ARM_NAMES, KINDS, VERDICT_WORDS, Kind, Run, StoredVerdict, frame, unequal
from seal_nb.results.statistics import mean, published_statistics, repeat_stats
from seal_nb.storage import read_json

if TYPE_CHECKING:
    import pandas as pd

STATS = ("baseline_mean", "baseline_std", "adapter_mean", "adapter_std", "gain_mean")
ROUND = re.compile(r"(?:iter|round)[_-]?(\d+)")
RANKING = re.compile(r"(^|_)rank(_|$|\.)")
PROMPT = re.compile(r"prompt-([a-z-]+)")
PROMPT_NAMES = {"long": "implications-long", "very-long": "implications-very-long"}  # in published file names
_CHANGES = {"wrong → right": 0, "right → wrong": 1}  # order of ``answers(changed_first=True)``


def run_file_name(exp_name: str, arm: str) -> str:
    """`run_<exp_name>.json` for self-edits, as published; the other arms add their name."""
    return f"run_{exp_name}.json" if arm == "self_edits" else f"run_{exp_name}_{arm}.json"


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
    soft_gain: float | None  # nats: change in log-probability of the gold answer; not in published files


@dataclass(frozen=True, kw_only=True)
class EvaluatedSelfEdit:
    """A self-edit with its answers.

    ``stored_stats`` are the numbers of the file, None where it has none. ``made`` is everything else that the file says
    about the self-edit: seeds, settings, scores of tokens.
    """

    index: int
    text: str | None
    questions: tuple[AnsweredQuestion, ...]
    stored_stats: Mapping[str, float | None]
    prompt: str | None = None  # set if the self-edits of one passage complete different prompts
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
        """Computed from the verdicts if there are any, else as stored."""
        return repeat_stats(self.repeats()) if self.is_graded else self.stored_stats

    def soft_gain(self) -> float | None:
        """Mean over questions and repeats, in nats; None without soft scores."""
        return mean([answered.soft_gain for answered in self.questions])


@dataclass(frozen=True, kw_only=True)
class EvaluatedPassage:
    """A passage of a run with its evaluated self-edits; ``prompt`` is None if the file has none."""

    index: int
    title: str
    context: str
    prompt: str | None
    self_edits: tuple[EvaluatedSelfEdit, ...]
    stored_stats: Mapping[str, Any]

    def verdicts(self, kind: Kind) -> Verdicts:
        """Of all answers: self-edits, repeats and questions in file order."""
        return [getattr(one, f"{kind}_correct") for edit in self.self_edits for one in edit.questions]


@dataclass(frozen=True, kw_only=True)
class SinglePassageRun(Run):
    """A ``run_*.json``: each passage has its own adapter per self-edit. ``settings``: all fields but the results."""

    passages: tuple[EvaluatedPassage, ...]
    stored_overall: Mapping[str, Any]
    settings: Mapping[str, Any]

    form: ClassVar[str] = "single_passage"

    @property
    def n_completions(self) -> int:
        """The largest number of self-edits of a passage: the n of "best k of n"."""
        return max((len(passage.self_edits) for passage in self.passages), default=0)

    @property
    def arm(self) -> str:
        number = self.rest_em_round
        if number is None:
            return super().arm
        return f"self-edits, round {number}" if number else ARM_NAMES["base"]

    @property
    def rest_em_round(self) -> int | None:
        """The ReST-EM round whose model wrote the self-edits: "iter2" and "round_2" are 2, "base" is 0.

        None for other arms and for names without a round.
        """
        if self.settings.get("arm") not in (None, "", "self_edits"):
            return None
        found = ROUND.search(self.name)
        return int(found[1]) if found else (0 if re.search(r"(^|_)base(_|$)", self.name) else None)

    @property
    def prompt_key(self) -> str:
        """The prompt of the self-edits: as the file says, else its name, else its first prompt."""
        named = PROMPT.search(self.name)
        from_name = PROMPT_NAMES.get(named[1], named[1]) if named else ""
        return str(self.settings.get("prompt_key") or from_name or self._recorded_key() or DEFAULT_PROMPT_KEY)

    def _recorded_key(self) -> str:
        if self.settings.get("arm") not in (None, "", "self_edits") or not self.passages:
            return ""
        first = self.passages[0]
        keys = [str(edit.made["prompt_key"]) for edit in first.self_edits if edit.made.get("prompt_key")]
        return recorded_key(first.prompt or "", keys, title=first.title, context=first.context)

    @property
    def is_ranking(self) -> bool:
        """Whether this measures rewards on training passages and is no evaluation.

        No file says so. Its name does, or that several self-edits were each measured several times; several self-edits
        alone are an evaluation over more texts.
        """
        n_edits, n_repeats = (int(self.settings.get(key) or 1) for key in ("k_completions", "eval_times"))
        return bool(RANKING.search(self.name)) or (n_edits > 1 and n_repeats > 1)

    def scores(self, kind: Kind) -> list[Scores]:
        return [passage.verdicts(kind) for passage in self.passages]

    def stored_mean(self, kind: Kind) -> float | None:
        return self.stored_overall.get(f"{kind}_mean_accuracy")

    def unit_keys(self) -> list[Any]:
        keys = [(passage.title, passage.context) for passage in self.passages]
        return keys if any(title or context for title, context in keys) else []

    def extra(self) -> dict[str, Any]:
        return {"prompt": self.prompt_key, "recited": self.recited()}

    def answers(self, *, changed_first: bool = False) -> "pd.DataFrame":
        """All answers of the run.

        Args:
            changed_first: put answers that the adapter made right first, then those it made wrong, then the rest.

        Returns:
            One row per question and repeat of each self-edit: ``passage``, ``self_edit``, ``repeat``, ``question``,
            ``gold``, ``baseline_answer``, ``adapter_answer``, ``verdicts`` ("wrong → right"), ``baseline_correct``,
            ``adapter_correct`` (missing: ungraded).
        """
        rows = [
            {
                "passage": passage.title,
                "self_edit": edit.index,
                "repeat": one.repeat,
                "question": one.question,
                "gold": one.gold,
                "baseline_answer": one.baseline_answer,
                "adapter_answer": one.adapter_answer,
                "verdicts": f"{VERDICT_WORDS[one.baseline_correct]} → {VERDICT_WORDS[one.adapter_correct]}",
                "baseline_correct": one.baseline_correct,
                "adapter_correct": one.adapter_correct,
            }
            for passage in self.passages
            for edit in passage.self_edits
            for one in edit.questions
        ]
        if changed_first:
            rows.sort(key=lambda row: _CHANGES.get(str(row["verdicts"]), 2))
        return frame(rows)

    def rewards(self) -> "pd.DataFrame":
        """The reward of each self-edit: accuracy of its adapters, averaged over the repeats.

        Returns:
            One row per self-edit: ``passage`` and ``self_edit`` (indices), ``title``, ``text``, ``reward``, ``gain``.
        """
        rows = [
            {
                "passage": passage.index,
                "title": passage.title,
                "self_edit": edit.index,
                "text": edit.text,
                "reward": edit.stats()["adapter_mean"],
                "gain": edit.stats()["gain_mean"],
            }
            for passage in self.passages
            for edit in passage.self_edits
        ]
        return frame(rows)

    def recited(self) -> float | None:
        """Share of adapter answers that contain the gold answer of another question of the same passage.

        The local grader decides what an answer contains. None without answers.
        """
        answered = [(p.index, one) for p in self.passages for edit in p.self_edits for one in edit.questions]
        if not any(one.adapter_answer for _, one in answered):
            return None
        grader = make_grader("local")

        def match(question: str, gold: str, answer: str) -> bool:
            return grader.grade([Answered(question=question, gold=gold, answer=answer)]) == [Verdict.CORRECT]

        return recitation_rate(
            [one.question for _, one in answered],
            [one.gold for _, one in answered],
            [one.adapter_answer for _, one in answered],
            match,
            passages=[passage for passage, _ in answered],
        )

    def overall(self) -> dict[str, float | None]:
        return self._statistics()[1]

    def _statistics(self) -> tuple[list[dict[str, float | None]], dict[str, float | None]]:
        """Published ``stats`` of each passage and ``overall``, from self-edits that have verdicts."""
        return published_statistics(
            [[edit.stats() for edit in passage.self_edits if edit.is_graded] for passage in self.passages]
        )

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "n_self_edits": sum(len(passage.self_edits) for passage in self.passages)}

    def notes(self) -> list[str]:
        graded = [edit.is_graded for passage in self.passages for edit in passage.self_edits]
        if all(graded):
            return []
        stored = self.stored_mean("adapter")
        said = f"the file itself says adapter_mean_accuracy {stored}" if stored is not None else "none are stored"
        return [f"{graded.count(False)} of {len(graded)} self-edits have no graded answer and are left out; {said}"]

    def disagreements(self) -> list[str]:
        if self.notes():
            return []
        articles, overall = self._statistics()
        found = unequal("overall", self.stored_overall, overall)
        for passage, article in zip(self.passages, articles, strict=True):
            found += unequal(f"article {passage.index}", passage.stored_stats, article)
            for edit in passage.self_edits:
                found += unequal(f"article {passage.index}, self-edit {edit.index}", edit.stored_stats, edit.stats())
        return found

    def stored_verdicts(self) -> list[StoredVerdict]:
        return [
            StoredVerdict(kind=kind, answered=_answered(row, article, kind), holder=row, field=f"{kind}_correct")
            for article in self.value["articles"]
            for completion in article.get("completions") or []
            for row in completion.get("questions") or []
            for kind in KINDS
        ]

    def fill_statistics(self) -> None:
        run = run_from_json(self.value, path=self.path)
        stats_P_E = [[dict(repeat_stats(edit.repeats())) for edit in passage.self_edits] for passage in run.passages]
        stats_P, self.value["overall"] = published_statistics(stats_P_E)
        for article, stats, stats_E in zip(self.value["articles"], stats_P, stats_P_E, strict=True):
            article["stats"] = stats
            for completion, own in zip(article.get("completions") or [], stats_E, strict=True):
                completion["stats"] = own
        pairs = zip(*(([one for unit in run.scores(kind) for one in unit]) for kind in KINDS), strict=True)
        self.value["n_ungraded"] = sum(None in pair for pair in pairs)

    def with_value(self, value: dict[str, Any]) -> Self:
        return type(self)(**vars(run_from_json(value, path=self.path, file=self.file)))


def _answered(row: Mapping[str, Any], article: Mapping[str, Any], kind: Kind) -> Answered:
    return Answered(
        title=article.get("title") or "",
        question=row.get("question") or "",
        gold=row.get("answer") or "",
        answer=row.get(f"{kind}_answer") or "",
    )


def read_run(path: str | Path) -> SinglePassageRun:
    """A single-passage run file, published or ours, plain or .gz. Raises: DataError."""
    return run_from_json(read_json(path), path=path)


def run_from_json(value: Any, *, path: str | Path = "", file: str = "") -> SinglePassageRun:
    """The same from a value in memory; ``path`` is used in messages, ``file`` in tables."""
    if not isinstance(value, dict) or not isinstance(value.get("articles"), list):
        raise DataError(
            "has no list of articles", path=path, field="articles", remedy="give a single-passage run_*.json"
        )
    reader = _Reader(Path(path))
    return SinglePassageRun(
        value=value,
        path=Path(path),
        file=file,
        passages=tuple(reader.passage(at, article) for at, article in enumerate(value["articles"])),
        stored_overall=value.get("overall") or {},
        settings={name: entry for name, entry in value.items() if name not in ("overall", "articles")},
    )


class _Reader:
    """Reads articles and names path, item and field in its messages. Null means absent everywhere."""

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

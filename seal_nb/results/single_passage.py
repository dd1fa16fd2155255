"""Single-passage run files, published and ours: read, written, recomputed.

The published form: ``{overall, …, articles: [{stats, title, context, prompt, completions: [{text, stats, questions:
[{rep, …, baseline_correct, adapter_correct}]}]}]}``. Released files may lack per-question records or hold nulls."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from seal_nb.errors import checked
from seal_nb.grading.base import Answered, Verdict, answered_with
from seal_nb.grading.choose import make_grader
from seal_nb.metrics import STATS, Scores, Verdicts, mean, published_statistics, repeat_stats
from seal_nb.prompts import DEFAULT_PROMPT_KEY, recorded_key
from seal_nb.results import run as runs
from seal_nb.storage import file_name

if TYPE_CHECKING:
    import pandas as pd

ROUND = re.compile(r"(?<![a-z])(?:iter|round)[_-]?(\d{1,3})(?!\d)")
MOST_ASKED = 50  # questions of a passage whose gold answers ``recited`` looks for
MOST_CHARACTERS = 4_000_000  # of texts that it grades: some 10 s
LONGEST = 2_000  # characters of a text that it reads
RANKING = re.compile(r"(^|_)rank(_|$|\.)")
PROMPT = re.compile(r"prompt-([a-z-]+)")
PROMPT_NAMES = {"long": "implications-long", "very-long": "implications-very-long"}  # in published file names
_CHANGES = {"wrong → right": 0, "right → wrong": 1}  # order of ``answers(changed_first=True)``
ANSWERS = ("passage", "self_edit", "repeat", "question", "gold", "baseline_answer", "adapter_answer", "verdicts",
           "baseline_correct", "adapter_correct")  # fmt: skip


def run_file_name(exp_name: str, arm: str) -> str:
    """`run_<exp_name>.json` for self-edits, as published; the other arms add their name."""
    return file_name(f"run_{exp_name}" if arm == "self_edits" else f"run_{exp_name}_{arm}", ".json")


def _numbered(entries: list[Any]) -> list[Any]:
    return [entry.model_copy(update={"index": at}) for at, entry in enumerate(entries)]


class _Entry(BaseModel):
    """Part of a run file; null means absent everywhere. ``stored`` is the part itself, in which statistics and verdicts
    are replaced."""

    model_config = ConfigDict(strict=True, frozen=True, populate_by_name=True)

    stored: Any = Field(None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        value = {} if value is None else value
        if not isinstance(value, dict):
            return value
        return {name: entry for name, entry in value.items() if entry is not None} | {"stored": value}


class AnsweredQuestion(_Entry):
    """One question in one repeat, without and with the adapter; a verdict of None is ungraded."""

    repeat: int = Field(0, alias="rep")
    question: str = ""
    gold: str = Field("", alias="answer")
    other_golds: runs.Many[str] = Field([], alias="other_answers")  # not in published files
    baseline_answer: str = ""
    adapter_answer: str = ""
    baseline_correct: bool | None = None
    adapter_correct: bool | None = None
    baseline_gold_logprob: runs.Number = None  # nats; not in published files
    adapter_gold_logprob: runs.Number = None
    earlier: Mapping[str, Mapping[str, bool | None]] = {}  # verdicts of other graders

    @property
    def golds(self) -> list[str]:
        return [self.gold, *self.other_golds]

    def answered(self, answer: str, title: str) -> Answered:
        """One of its answers, to grade; ``title``: of the passage."""
        return answered_with(self.golds, question=self.question, answer=answer, title=title)

    @property
    def soft_gain(self) -> float | None:
        """Change in log-probability of the gold answer, in nats."""
        before, after = self.baseline_gold_logprob, self.adapter_gold_logprob
        return None if before is None or after is None else after - before


class EvaluatedSelfEdit(_Entry):
    """A self-edit with its answers; ``stored_stats`` are the numbers of the file, None where it has none."""

    model_config = ConfigDict(extra="allow")

    index: int = 0
    text: str | None = None
    prompt: str | None = None  # set if the self-edits of one passage complete different prompts
    questions: runs.Many[AnsweredQuestion] = []
    stored_stats: Annotated[dict[str, runs.Number], AfterValidator(lambda stats: dict.fromkeys(STATS) | stats)] = Field(
        dict.fromkeys(STATS), alias="stats"
    )

    @property
    def made(self) -> Mapping[str, Any]:
        """Everything else that the file says about the self-edit: seeds, settings, scores of tokens."""
        return self.model_extra or {}

    def repeats(self) -> Sequence[tuple[Verdicts, Verdicts]]:
        """(baseline, adapter) verdicts of each repeat, in file order."""
        by_repeat: dict[int, tuple[list[bool | None], list[bool | None]]] = {}
        for one in self.questions:
            before, after = by_repeat.setdefault(one.repeat, ([], []))
            before.append(one.baseline_correct)
            after.append(one.adapter_correct)
        return list(by_repeat.values())

    @property
    def is_graded(self) -> bool:
        return any(answered.adapter_correct is not None for answered in self.questions)

    def stats(self) -> Mapping[str, float | None]:
        """Computed from the verdicts if there are any, else as stored."""
        return repeat_stats(self.repeats()) if self.is_graded else self.stored_stats

    def soft_gain(self) -> float | None:
        """Mean over questions and repeats, in nats; None without soft scores."""
        return mean([answered.soft_gain for answered in self.questions])


class EvaluatedPassage(_Entry):
    """A passage of a run with its evaluated self-edits; ``prompt`` is None if the file has none."""

    index: int = 0
    title: str = ""
    context: str = ""
    prompt: str | None = None
    self_edits: Annotated[runs.Many[EvaluatedSelfEdit], AfterValidator(_numbered)] = Field([], alias="completions")
    stored_stats: dict[str, Any] = Field({}, alias="stats")

    def questions(self) -> list[AnsweredQuestion]:
        """Of all self-edits and repeats, in file order."""
        return [one for edit in self.self_edits for one in edit.questions]


class _Articles(runs.RunFields):
    articles: Annotated[runs.Many[EvaluatedPassage], AfterValidator(_numbered)]


@dataclass(kw_only=True, eq=False)
class SinglePassageRun(runs.Run):
    """A ``run_*.json``: each passage has its own adapter per self-edit.
    Raises: DataError with path, item and field for a value of another kind."""

    form: ClassVar[str] = "single_passage"

    def __post_init__(self) -> None:
        self.passages = checked(_Articles.model_validate, self.value, path=self.path).articles

    @property
    def settings(self) -> Mapping[str, Any]:
        """All fields but the results."""
        return {name: entry for name, entry in self.value.items() if name not in ("overall", "articles")}

    @property
    def arm(self) -> str:
        number = self.rest_em_round
        if number is None:
            return super().arm
        return f"self-edits, round {number}" if number else runs.ARM_NAMES["base"]

    @property
    def rest_em_round(self) -> int | None:
        """The ReST-EM round whose model wrote the self-edits: "iter2" and "round_2" are 2, "base" is 0. None for other
        arms and for names without a round."""
        if self.settings.get("arm") not in (None, "", "self_edits"):
            return None
        if found := ROUND.search(self.name):
            return int(found[1])
        return 0 if re.search(r"(^|_)base(_|$)", self.name) else None

    @property
    def prompt_key(self) -> str:
        """The prompt of the self-edits: as the file says, else its name, else its first prompt."""
        named, recorded = PROMPT.search(self.name), ""
        from_name = PROMPT_NAMES.get(named[1], named[1]) if named else ""
        if self.settings.get("arm") in (None, "", "self_edits") and self.passages:
            first = self.passages[0]
            keys = [str(edit.made["prompt_key"]) for edit in first.self_edits if edit.made.get("prompt_key")]
            recorded = recorded_key(first.prompt or "", keys, title=first.title, context=first.context)
        return str(self.settings.get("prompt_key") or from_name or recorded or DEFAULT_PROMPT_KEY)

    @property
    def is_ranking(self) -> bool:
        """Whether this measures rewards on training passages and is no evaluation: its name says so, or several
        self-edits were each measured several times. Several self-edits alone are an evaluation over more texts."""
        n_edits, n_repeats = (self.settings.get(key) or 1 for key in ("k_completions", "eval_times"))
        return bool(RANKING.search(self.name)) or (n_edits > 1 and n_repeats > 1)

    def scores(self, kind: runs.Kind) -> list[Scores]:
        return [[getattr(one, f"{kind}_correct") for one in passage.questions()] for passage in self.passages]

    def stored_mean(self, kind: runs.Kind) -> float | None:
        return (self.value.get("overall") or {}).get(f"{kind}_mean_accuracy")

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
            ``adapter_correct`` (missing: ungraded)."""
        rows = []
        for passage, edit in self._self_edits():
            for one in edit.questions:
                change = runs.verdict_change(one.baseline_correct, one.adapter_correct)
                rows.append({"passage": passage.title, "self_edit": edit.index, "verdicts": change, **one.model_dump()})
        if changed_first:
            rows.sort(key=lambda row: _CHANGES.get(row["verdicts"], 2))
        return runs.frame(rows, ANSWERS)

    def rewards(self) -> "pd.DataFrame":
        """The reward of each self-edit: accuracy of its adapters, averaged over the repeats.
        Returns: one row per self-edit: ``passage`` and ``self_edit`` (indices), ``title``, ``text``, ``reward``,
        ``gain``."""
        rows = []
        for passage, edit in self._self_edits():
            about = {"passage": passage.index, "title": passage.title, "self_edit": edit.index, "text": edit.text}
            rows.append({**about, "reward": edit.stats()["adapter_mean"], "gain": edit.stats()["gain_mean"]})
        return runs.frame(rows)

    def _self_edits(self) -> list[tuple[EvaluatedPassage, EvaluatedSelfEdit]]:
        return [(passage, edit) for passage in self.passages for edit in passage.self_edits]

    def recited(self) -> float | None:
        """Share of adapter answers that contain the gold answer of another question of the same passage. A model that
        recites its passage profits from every grader that looks for the gold answer in the text. The local grader
        decides what an answer contains. Of a large run, an even share of the answers is read. None without answers."""
        grade, answers = make_grader("local").grade, []
        for passage in self.passages:
            found = passage.questions()
            asked = list(dict.fromkeys((one.question[:LONGEST], one.gold[:LONGEST]) for one in found))[:MOST_ASKED]
            answers += [({*map(str.casefold, one.golds)}, one.adapter_answer[:LONGEST], asked) for one in found]

        @cache
        def is_in(question: str, gold: str, answer: str) -> bool:
            return grade([Answered(question=question, gold=gold, answer=answer)]) == [Verdict.CORRECT]

        n_characters = sum((len(answer) + LONGEST // 20) * len(asked) for _, answer, asked in answers)
        recited = [
            any(gold.casefold() not in own and is_in(question, gold, answer) for question, gold in asked)
            for own, answer, asked in answers[:: 1 + n_characters // MOST_CHARACTERS]
        ]
        return sum(recited) / len(recited) if any(answer for _, answer, _ in answers) else None

    def overall(self) -> dict[str, float | None]:
        return self._statistics()[1]

    def _statistics(self) -> tuple[list[dict[str, float | None]], dict[str, float | None]]:
        """Published ``stats`` of each passage and ``overall``, from self-edits that have verdicts."""
        graded = [[edit.stats() for edit in one.self_edits if edit.is_graded] for one in self.passages]
        return published_statistics(graded)

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "n_self_edits": len(self._self_edits())}

    def notes(self) -> list[str]:
        edits = self._self_edits()
        graded = [one.is_graded for _, one in edits if one.questions or {*one.stored_stats.values()} - {None}]
        if all(graded):
            return []
        stored = self.stored_mean("adapter")
        said = f"the file itself says adapter_mean_accuracy {stored}" if stored is not None else "none are stored"
        return [f"{graded.count(False)} of {len(graded)} self-edits have no graded answer and are left out; {said}"]

    def disagreements(self) -> list[str]:
        if self.notes():
            return []
        articles, overall = self._statistics()
        found = runs.unequal("overall", self.value.get("overall") or {}, overall)
        for passage, article in zip(self.passages, articles, strict=True):
            place = f"article {passage.index}"
            found += runs.unequal(place, passage.stored_stats, article)
            for edit in passage.self_edits:
                found += runs.unequal(f"{place}, self-edit {edit.index}", edit.stored_stats, edit.stats())
        return found

    def stored_verdicts(self) -> list[runs.StoredVerdict]:
        return [
            runs.StoredVerdict(
                kind, one.answered(getattr(one, f"{kind}_answer"), passage.title), one.stored, f"{kind}_correct"
            )
            for passage in self.passages
            for one in passage.questions()
            for kind in runs.KINDS
        ]

    def fill_statistics(self) -> None:
        passages = replace(self).passages  # read again, because verdicts were replaced
        stats_P_E = [[repeat_stats(edit.repeats()) for edit in passage.self_edits] for passage in passages]
        stats_P, self.value["overall"] = published_statistics(stats_P_E)
        for passage, stats, stats_E in zip(passages, stats_P, stats_P_E, strict=True):
            passage.stored["stats"] = stats
            for edit, own in zip(passage.self_edits, stats_E, strict=True):
                edit.stored["stats"] = own
        answered = [one for passage in passages for one in passage.questions()]
        self.value["n_ungraded"] = sum(None in (one.baseline_correct, one.adapter_correct) for one in answered)

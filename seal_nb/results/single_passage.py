"""Run files over passages, published and ours: single passages (an adapter each) and CPT (one adapter for many).

The published forms: ``{overall, …, articles: [{stats, title, context, prompt, completions: [{text, stats, questions:
[{rep, …, baseline_correct, adapter_correct}]}]}]}``, in which records of questions may be missing or null; and
``{overall, …, per_article, server_reply: {baseline_texts, …, adapter_correct, …}}``, which does not say which question
belongs to which passage, so that intervals and regrading need the passages; ours add ``per_passage``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from seal_nb import metrics
from seal_nb.errors import DataError, checked
from seal_nb.grading.base import Answered, answered_with
from seal_nb.passages import Passage, Question
from seal_nb.prompts import DEFAULT_PROMPT_KEY, recorded_key
from seal_nb.protocol import rounded
from seal_nb.results import run as runs
from seal_nb.storage import file_name

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
ROUND = re.compile(r"(?<![a-z])(?:iter|round)[_-]?(\d{1,3})(?!\d)")
RANKING = re.compile(r"(^|_)rank(_|$|\.)")
PROMPT = re.compile(r"prompt-([a-z-]+)")
PROMPT_NAMES = {"long": "implications-long", "very-long": "implications-very-long"}  # in published file names
_CHANGES = {"wrong → right": 0, "right → wrong": 1}  # order of ``answers(changed_first=True)``
ANSWERS = ("passage", "self_edit", "repeat", "question", "gold", "baseline_answer", "adapter_answer", "verdicts",
           "baseline_correct", "adapter_correct")  # fmt: skip
OTHER_PASSAGES = "give the item file that this run was asked about (--dataset)"


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
    stored_stats: Annotated[
        dict[str, runs.Number], AfterValidator(lambda stats: dict.fromkeys(metrics.STATS) | stats)
    ] = Field(dict.fromkeys(metrics.STATS), alias="stats")

    @property
    def made(self) -> Mapping[str, Any]:
        """Everything else that the file says about the self-edit: seeds, settings, scores of tokens."""
        return self.model_extra or {}

    def repeats(self) -> Sequence[tuple[metrics.Verdicts, metrics.Verdicts]]:
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
        return metrics.repeat_stats(self.repeats()) if self.is_graded else self.stored_stats

    def soft_gain(self) -> float | None:
        """Mean over questions and repeats, in nats; None without soft scores."""
        return metrics.mean([answered.soft_gain for answered in self.questions])


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

    passages: Sequence[EvaluatedPassage] = ()

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

    def own_scores(self, kind: runs.Kind) -> list[metrics.Scores]:
        return [[getattr(one, f"{kind}_correct") for one in passage.questions()] for passage in self.passages]

    def stored_mean(self, kind: runs.Kind) -> float | None:
        return (self.value.get("overall") or {}).get(f"{kind}_mean_accuracy")

    def unit_keys(self) -> list[Any]:
        keys = [(passage.title, passage.context) for passage in self.passages]
        return keys if any(title or context for title, context in keys) else []

    def extra(self) -> dict[str, Any]:
        return {"prompt": self.prompt_key}

    def cost(self) -> tuple[float | None, float | None]:
        made = [one for _, edit in self._self_edits() for one in edit.made.get("repeats") or []]
        steps, tokens = (metrics.mean([one.get(name) for one in made]) for name in ("train_steps", "train_tokens"))
        return steps, tokens

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

    def overall(self) -> dict[str, float | None]:
        return self._statistics()[1]

    def _statistics(self) -> tuple[list[dict[str, float | None]], dict[str, float | None]]:
        """Published ``stats`` of each passage and ``overall``, from self-edits that have verdicts."""
        graded = [[edit.stats() for edit in one.self_edits if edit.is_graded] for one in self.passages]
        return metrics.published_statistics(graded)

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "n_self_edits": len(self._self_edits())}

    def gaps(self) -> list[str]:
        edits = self._self_edits()
        graded = [one.is_graded for _, one in edits if one.questions or {*one.stored_stats.values()} - {None}]
        if all(graded):
            return []
        stored = self.stored_mean("adapter")
        said = f"the file itself says adapter_mean_accuracy {stored}" if stored is not None else "none are stored"
        return [f"{graded.count(False)} of {len(graded)} self-edits have no graded answer and are left out; {said}"]

    def disagreements(self) -> list[str]:
        if self.gaps():
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
        found = []
        for passage in self.passages:
            for one, kind in product(passage.questions(), runs.KINDS):
                answered = one.answered(getattr(one, f"{kind}_answer"), passage.title)
                found.append(runs.StoredVerdict(kind, answered, one.stored, f"{kind}_correct"))
        return found

    def fill_statistics(self) -> None:
        passages = replace(self).passages  # read again, because verdicts were replaced
        stats_P_E = [[metrics.repeat_stats(edit.repeats()) for edit in passage.self_edits] for passage in passages]
        stats_P, self.value["overall"] = metrics.published_statistics(stats_P_E)
        for passage, stats, stats_E in zip(passages, stats_P, stats_P_E, strict=True):
            passage.stored["stats"] = stats
            for edit, own in zip(passage.self_edits, stats_E, strict=True):
                edit.stored["stats"] = own
        answered = [one for passage in passages for one in passage.questions()]
        self.value["n_ungraded"] = sum(None in (one.baseline_correct, one.adapter_correct) for one in answered)


class _CptReply(runs.GradedPart):
    baseline_correct: runs.Many[bool | None]
    adapter_correct: runs.Many[bool | None]
    baseline_texts: runs.Many[str] | None = None
    adapter_texts: runs.Many[str] | None = None


class _CptCount(runs.Part):
    title: str | None = None
    n_questions: runs.Count


class _CptPassage(runs.Part):
    title: str
    context: str = ""
    questions: runs.Many[runs.AskedQuestion]


class _CptFile(runs.RunFields):
    server_reply: _CptReply
    passages: runs.Many[_CptPassage] | None = None
    per_passage: runs.Many[_CptCount] | None = None


@dataclass(kw_only=True, eq=False)
class CptRun(runs.Run):
    """A ``cpt_run_*.json``. ``passages`` are what it was asked about, in order; empty: those of the file (ours).
    Raises: DataError with path and field for broken verdicts."""

    passages: Sequence[Passage] = ()

    form: ClassVar[str] = "cpt"
    key_fields: ClassVar[str] = "title and number of questions"
    weighting: ClassVar[metrics.Weighting] = "question"

    def __post_init__(self) -> None:
        read = checked(_CptFile.model_validate, self.value, path=self.path)
        n = len(read.server_reply.baseline_correct)
        for name, values in read.server_reply.lists().items():
            if values or not name.endswith("_texts"):  # texts may be absent or empty
                check_length(values, n, path=self.path, field=f"server_reply.{name}", of="verdicts")
        if read.per_passage and (n_asked := sum(one.n_questions for one in read.per_passage)) != n:
            problem = f"has {n_asked} questions for {n} verdicts"
            raise DataError(problem, path=self.path, field="per_passage", remedy="write the file again")
        stored = [
            Passage(title=one.title, context=one.context, questions=tuple(Question(**vars(q)) for q in one.questions))
            for one in read.passages or []
        ]
        self.passages = tuple(self.passages or stored)[: self.value.get("n_articles") or None]

    @property
    def arm(self) -> str:
        return super().arm + (", all weights" if self.value.get("method") == "full" else "")

    def flat_verdicts(self, kind: runs.Kind) -> list[bool | None]:
        return list(self.value["server_reply"][f"{kind}_correct"])

    def own_scores(self, kind: runs.Kind) -> list[metrics.Scores]:
        counts = [n for _, n in self.unit_keys()]
        return list(split_by_passage(self.flat_verdicts(kind), counts)) if counts else []

    def stored_mean(self, kind: runs.Kind) -> float | None:
        verdicts = self.flat_verdicts(kind)
        return metrics.accuracy(verdicts) if verdicts else (self.value.get("overall") or {}).get(f"{kind}_accuracy")

    def unit_keys(self) -> list[Any]:
        """(title, number of questions) of each passage."""
        if self.passages:
            return [(passage.title, len(passage.questions)) for passage in self.passages]
        return [(entry.get("title"), entry["n_questions"]) for entry in self.value.get("per_passage") or []]

    def extra(self) -> dict[str, Any]:
        n_questions = len(self.flat_verdicts("adapter")) or self.value.get("eval_questions")
        return {"questions": n_questions, "lr": (self.value.get("lora_params") or {}).get("lr")}

    def cost(self) -> tuple[float | None, float | None]:
        reply = self.value["server_reply"]
        return reply.get("train_steps"), reply.get("train_tokens")

    def answers(self) -> "pd.DataFrame":
        """All answers of the run.
        Returns: one row per question: ``passage``, ``question``, ``gold`` (both missing unless the run was read with
        its passages), ``baseline_answer``, ``adapter_answer``, ``verdicts``, ``baseline_correct``, ``adapter_correct``.
        """
        before, after = (self.flat_verdicts(kind) for kind in runs.KINDS)
        columns = {
            "passage": [title for title, n in self.unit_keys() for _ in range(n)],
            "question": [one.question for _, one in self._asked()],
            "gold": [one.answer for _, one in self._asked()],
            **{f"{kind}_answer": self.value["server_reply"].get(f"{kind}_texts") for kind in runs.KINDS},
            "verdicts": list(map(runs.verdict_change, before, after)),
            "baseline_correct": before,
            "adapter_correct": after,
        }
        for name, values in columns.items():
            if values:
                check_length(values, len(after), path=self.path, field=name, remedy=OTHER_PASSAGES)
        rows = zip(*(values or [None] * len(after) for values in columns.values()), strict=True)
        return runs.frame(rows, list(columns))

    def overall(self) -> dict[str, float | None]:
        """Published ``overall``: 4 decimals, the gain from unrounded accuracies."""
        before, after = (self.flat_verdicts(kind) for kind in runs.KINDS)
        shares = {"baseline_accuracy": metrics.accuracy(before), "adapter_accuracy": metrics.accuracy(after)}
        return {name: rounded(share) for name, share in (shares | {"gain": metrics.gain(before, after)}).items()}

    def _asked(self) -> list[tuple[str, Question]]:
        """Title and question of each answer; empty if the run was read without its passages."""
        return [(passage.title, question) for passage in self.passages for question in passage.questions]

    def counts(self) -> dict[str, Any]:
        n_passages = self.value.get("n_articles") or len(self.unit_keys()) or None
        return super().counts() | {"n_passages": n_passages, "n_train_sequences": self.value.get("train_sequences")}

    def gaps(self) -> list[str]:
        if self.unit_keys():
            return super().gaps()
        return ["the file does not say which question belongs to which passage: no intervals without its item file"]

    def stored_verdicts(self) -> list[runs.StoredVerdict]:
        reply, asked, found = self.value["server_reply"], self._asked(), []
        for name in ("baseline_texts", "baseline_correct", "adapter_texts", "adapter_correct"):
            where = f"server_reply.{name}"
            check_length(reply.get(name), len(asked), path=self.path, field=where, remedy=OTHER_PASSAGES)
        for at, (title, one) in enumerate(asked):
            for kind in runs.KINDS:
                golds, answer = (one.answer, *one.other_answers), reply[f"{kind}_texts"][at]
                answered = answered_with(golds, title=title, question=one.question, answer=answer)
                found.append(runs.StoredVerdict(kind, answered, reply, f"{kind}_correct", at))
        return found

    def fill_statistics(self) -> None:
        overall, pairs = self.overall(), list(zip(*map(self.flat_verdicts, runs.KINDS), strict=True))
        gains = [None if before is None or after is None else after - before for before, after in pairs]
        for name, value in overall.items():
            self.value["server_reply"]["adapter_gain" if name == "gain" else name] = value
        self.value["server_reply"]["gains"] = gains
        per_passage: list[dict[str, Any]] = []  # by index, because titles repeat
        per_article: dict[str, dict[str, list[Any]]] = {}  # of all passages of one title
        by_passage = zip(self.unit_keys(), *map(self.scores, runs.KINDS), strict=True)
        for at, ((title, n_questions), before, after) in enumerate(by_passage):
            verdicts = {"baseline_correct": before, "adapter_correct": after}
            sides = verdicts.items()
            shares = {name.replace("correct", "accuracy"): rounded(metrics.accuracy(own)) for name, own in sides}
            per_passage.append({"index": at, "title": title, "n_questions": n_questions, **verdicts, **shares})
            for name, values in sides:
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


def split_by_passage(verdicts: Sequence[T], counts: Sequence[int]) -> list[Sequence[T]]:
    """A flat list of verdicts cut into passages of ``counts`` questions each. Raises: DataError."""
    if len(verdicts) != sum(counts):
        remedy = "give the passages of this run, in its order"
        raise DataError(f"{len(verdicts)} verdicts for {sum(counts)} questions", remedy=remedy)
    return [verdicts[end - n : end] for end, n in zip(accumulate(counts), counts, strict=True)]

"""A single-passage run as a reader goes through it: passages to choose from, self-edits, answers, and why.

Plain records for a notebook's tables and widgets. Opening a run computes what the list of passages shows and
nothing else; the answers of a passage are judged by the other graders when that passage is looked at. Draws
nothing, trains nothing, changes no file.

Why a verdict flipped, as far as the texts tell: who says the gold answer, and what was said instead.

Observations about texts that anybody can check, in a sentence; not causes. The gold answer counts as said
where its words stand in a row, after SQuAD's normalisation.

Rows of the passage inspector: a run's passages, self-edits, answers and train sequences as plain records.

Everything a table or widget shows is one of these. Made from the records of ``run_files``; which of them are
wanted, and when, is decided in ``inspection``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from seal_nb.errors import SettingsError
from seal_nb.grading.base import AS_BOOLEAN, Answered, Grader
from seal_nb.grading.choose import make_grader
from seal_nb.grading.rules import normalised
from seal_nb.passages import Passage, Question
from seal_nb.results.single_passage import (
    AnsweredQuestion,
    EvaluatedPassage,
    EvaluatedSelfEdit,
    SinglePassageRun,
    read_run,
)
from seal_nb.self_edits import passage_only_sequences, train_sequences

Flip = Literal["gained", "lost", "stayed right", "stayed wrong", "ungraded"]
MOST_NAMED = 3  # train sequences named in one sentence


def flip_of(one: AnsweredQuestion) -> Flip:
    """What the adapter did to a verdict; without both verdicts there is nothing to compare."""
    if one.baseline_correct is None or one.adapter_correct is None:
        return "ungraded"
    if one.baseline_correct == one.adapter_correct:
        return "stayed right" if one.adapter_correct else "stayed wrong"
    return "gained" if one.adapter_correct else "lost"


def explanation(one: AnsweredQuestion, asked: Sequence[AnsweredQuestion], sequences: Sequence[str]) -> str:
    """One sentence; ``asked`` are all questions of the self-edit, ``sequences`` what it became."""
    if flip_of(one) == "ungraded":
        sides = [
            name
            for name, verdict in (("baseline", one.baseline_correct), ("adapter", one.adapter_correct))
            if verdict is None
        ]
        return f"no verdict on the {' and the '.join(sides)} answer"
    facts = [_taught(one, sequences)]
    if not one.adapter_answer.strip():
        facts.append("the adapter answered nothing")
    elif not one.adapter_correct:
        facts += _instead(one, asked)
    elif not says(one.adapter_answer, one.gold):
        facts.append("the answer says it in other words")
    return "; ".join(facts)


def says(text: str, gold: str) -> bool:
    """Whether the words of the gold answer stand in the text in a row."""
    words = normalised(gold)
    return bool(words) and f" {words} " in f" {normalised(text)} "


def _taught(one: AnsweredQuestion, sequences: Sequence[str]) -> str:
    """The last sequence is the passage itself."""
    if not sequences:
        return "nothing is known of the training"
    places = [number for number, text in enumerate(sequences[:-1], start=1) if says(text, one.gold)]
    if places:
        named = ", ".join(map(str, places[:MOST_NAMED])) + (" …" if len(places) > MOST_NAMED else "")
        many = len(places) > 1
        return f"train sequence{'s' * many} {named} of {len(sequences)} say{'' if many else 's'} it"
    if says(sequences[-1], one.gold):
        return "only the passage says it" if len(sequences) > 1 else "the passage says it"
    return "no train sequence has these words"


def _instead(one: AnsweredQuestion, asked: Sequence[AnsweredQuestion]) -> list[str]:
    """Whether a wrong answer gives another question's answer: what a model does that recites."""
    others = {other.gold for other in asked if other.gold.casefold() != one.gold.casefold()}
    recited = sorted(gold for gold in others if says(one.adapter_answer, gold))
    return [f"it answers another question: {recited[0]!r}"] if recited else []


Pair = tuple[bool | None, bool | None]  # verdict without and with the adapter; None: ungraded


@dataclass(frozen=True, kw_only=True)
class PassageRow:
    """One passage in the list. Accuracies are fractions; None where nothing was graded."""

    index: int
    title: str
    n_self_edits: int
    baseline: float | None
    best: float | None  # the highest mean adapter accuracy of its self-edits
    gain: float | None  # mean over its self-edits
    n_gained: int  # answers, over all self-edits and repeats, that the adapter put right
    n_lost: int
    n_ungraded: int
    n_tied_best: int  # self-edits that share the highest accuracy; 1: no tie


@dataclass(frozen=True, kw_only=True)
class SelfEditRow:
    """One self-edit of a passage."""

    index: int
    text: str
    baseline: float | None
    adapter: float | None
    gain: float | None
    soft_gain: float | None  # nats: mean change in log-probability of the gold answers
    n_gained: int
    n_lost: int
    n_ungraded: int
    is_best: bool
    made: Mapping[str, Any]  # what the file says beside text and answers: settings, seeds, origin


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One question in one repeat. ``verdicts``: by grader, the file's own first."""

    repeat: int
    question: str
    gold: str
    baseline_answer: str
    adapter_answer: str
    flip: Flip
    why: str
    verdicts: Mapping[str, Pair]
    soft_gain: float | None

    @property
    def graders_disagree(self) -> bool:
        """Whether two graders that judged this question judged one of its answers differently."""
        return any(
            len({pair[side] for pair in self.verdicts.values() if pair[side] is not None}) > 1 for side in (0, 1)
        )


@dataclass(frozen=True, kw_only=True)
class SequenceRow:
    """One train sequence: text that carries no loss, then text that does.

    ``unscored`` ends with the mask of ``end_mask_substring``. The very first token carries none either, since
    nothing predicts it; which letters that is only the model's tokenizer knows.
    """

    number: int
    unscored: str
    scored: str
    is_passage: bool


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """One question under two self-edits; of several repeats each answer is one."""

    question: str
    gold: str
    baseline_answer: str
    first_answers: tuple[str, ...]
    second_answers: tuple[str, ...]
    first_correct: tuple[bool | None, ...]
    second_correct: tuple[bool | None, ...]

    @property
    def difference(self) -> int | None:
        """Right answers of the second self-edit minus those of the first; None where a verdict is missing."""
        first, second = self.first_correct, self.second_correct
        if not first or not second or None in first or None in second:
            return None
        return sum(v is True for v in second) - sum(v is True for v in first)


def as_passage(evaluated: EvaluatedPassage) -> Passage:
    """The passage of a run with each of its questions once, as an item file would have it."""
    asked = {
        one.question: Question(question=one.question, answer=one.gold)
        for edit in evaluated.self_edits
        for one in edit.questions
    }
    return Passage(title=evaluated.title, context=evaluated.context, questions=tuple(asked.values()))


def sequences_of(evaluated: EvaluatedPassage, text: str, *, split_newlines: bool) -> list[str]:
    """The train sequences of a text about a passage; an empty text is the passage-only arm."""
    about = {"title": evaluated.title, "context": evaluated.context}
    if not text.strip():
        return passage_only_sequences(**about)
    return train_sequences(text, **about, split_newlines=split_newlines)


def sequence_rows(sequences: Sequence[str], *, end_mask_substring: str = "") -> list[SequenceRow]:
    """Each sequence divided where its loss begins: the real division is in tokens, this one in letters."""
    rows = []
    for number, text in enumerate(sequences, start=1):
        found = text.find(end_mask_substring) if end_mask_substring else -1
        start = found + len(end_mask_substring) if found >= 0 else 0
        rows.append(
            SequenceRow(number=number, unscored=text[:start], scored=text[start:], is_passage=number == len(sequences))
        )
    return rows


def passage_row(passage: EvaluatedPassage) -> PassageRow:
    stats = [edit.stats() for edit in passage.self_edits]
    known = {
        name: [value for one in stats if (value := one[name]) is not None]
        for name in ("baseline_mean", "adapter_mean", "gain_mean")
    }
    flips = [flip_of(one) for edit in passage.self_edits for one in edit.questions]
    best = max(known["adapter_mean"], default=None)
    return PassageRow(
        index=passage.index,
        title=passage.title,
        n_self_edits=len(stats),
        baseline=_mean(known["baseline_mean"]),
        best=best,
        gain=_mean(known["gain_mean"]),
        n_gained=flips.count("gained"),
        n_lost=flips.count("lost"),
        n_ungraded=flips.count("ungraded"),
        n_tied_best=known["adapter_mean"].count(best) if best is not None else 0,
    )


def self_edit_row(edit: EvaluatedSelfEdit, best: float | None) -> SelfEditRow:
    stats = edit.stats()
    flips = [flip_of(one) for one in edit.questions]
    return SelfEditRow(
        index=edit.index,
        text=edit.text or "",
        baseline=stats["baseline_mean"],
        adapter=stats["adapter_mean"],
        gain=stats["gain_mean"],
        soft_gain=edit.soft_gain(),
        n_gained=flips.count("gained"),
        n_lost=flips.count("lost"),
        n_ungraded=flips.count("ungraded"),
        is_best=best is not None and stats["adapter_mean"] == best,
        made=edit.made,
    )


def answer_row(
    one: AnsweredQuestion, said: Mapping[str, Pair], asked: Sequence[AnsweredQuestion], sequences: Sequence[str]
) -> AnswerRow:
    return AnswerRow(
        repeat=one.repeat,
        question=one.question,
        gold=one.gold,
        baseline_answer=one.baseline_answer,
        adapter_answer=one.adapter_answer,
        flip=flip_of(one),
        why=explanation(one, asked, sequences),
        verdicts={"file": (one.baseline_correct, one.adapter_correct), **said},
        soft_gain=one.soft_gain,
    )


def verdict_pairs(grader: Grader, passage: EvaluatedPassage, asked: Sequence[AnsweredQuestion]) -> list[Pair]:
    """What a grader says of each question's two answers; equal answers are judged once."""
    both = [(one, text) for one in asked for text in (one.baseline_answer, one.adapter_answer)]
    unique = {(one.question, one.gold, text): None for one, text in both}
    verdicts = grader.grade(
        [Answered(question=question, gold=gold, answer=text, title=passage.title) for question, gold, text in unique]
    )
    known = {key: AS_BOOLEAN[verdict] for key, verdict in zip(unique, verdicts, strict=True)}
    flat = [known[one.question, one.gold, text] for one, text in both]
    return list(zip(flat[::2], flat[1::2], strict=True))


def by_question(asked: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
    found: dict[str, list[AnsweredQuestion]] = {}
    for one in asked:
        found.setdefault(one.question, []).append(one)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


Show = Literal["all", "gains", "losses", "ties", "ungraded", "graders disagree"]
Sort = Literal["file order", "largest gain", "largest loss", "most ungraded", "most disagreement"]
SHOWN: tuple[Show, ...] = ("all", "gains", "losses", "ties", "ungraded", "graders disagree")
SORTED: tuple[Sort, ...] = (
    "file order", "largest gain", "largest loss", "most ungraded", "most disagreement"
)  # fmt: skip
EXAMPLE = "shipped:example"  # the run that comes with the project
OTHER_GRADERS = ("local", "recall")  # beside the verdicts of the file; both need no network
FLIP_ORDER = ("gained", "lost", "ungraded", "stayed wrong", "stayed right")  # what a reader wants to see first


def open_run(source: str | Path) -> SinglePassageRun:
    """A single-passage run file, published or ours; "shipped:example" is one that comes with the project.

    Raises: DataError.
    """
    if str(source) == EXAMPLE:
        return read_run(Path(str(resources.files("seal_nb") / "data" / "inspector_run.json.gz")))
    return read_run(source)


class Inspection:
    """A run opened for looking at. ``graders`` judge beside the file's own verdicts."""

    def __init__(self, run: SinglePassageRun, *, graders: Sequence[str] = OTHER_GRADERS) -> None:
        self.run = run
        self.graders: dict[str, Grader] = {name: make_grader(name) for name in graders}
        self._answers: dict[tuple[int, int], tuple[AnswerRow, ...]] = {}

    @cached_property
    def passages(self) -> tuple[PassageRow, ...]:
        return tuple(passage_row(passage) for passage in self.run.passages)

    def select(self, show: Show = "all", sort: Sort = "file order", search: str = "") -> list[PassageRow]:
        """Passages that fit, in order. "graders disagree" and "most disagreement" grade the whole run."""
        wanted = search.casefold().strip()
        rows = [
            row for row in self.passages if self._fits(row, show) and (not wanted or wanted in self._text_of(row.index))
        ]
        return sorted(rows, key=self._order(sort))

    def self_edits(self, passage: int) -> tuple[SelfEditRow, ...]:
        """All self-edits of a passage, in file order."""
        edits = self.run.passages[passage].self_edits
        best = max((m for edit in edits if (m := edit.stats()["adapter_mean"]) is not None), default=None)
        return tuple(self_edit_row(edit, best) for edit in edits)

    def answers(self, passage: int, self_edit: int) -> tuple[AnswerRow, ...]:
        """Every question of every repeat: flips to right first, then to wrong, then the others."""
        key = passage, self_edit
        if key not in self._answers:
            self._answers[key] = self._judged(self.run.passages[passage], self_edit)
        return self._answers[key]

    def n_disagreements(self, passage: int) -> int:
        """Answers over all self-edits that the graders judge differently."""
        n_edits = len(self.run.passages[passage].self_edits)
        return sum(row.graders_disagree for edit in range(n_edits) for row in self.answers(passage, edit))

    def sequences(self, passage: int, self_edit: int) -> list[SequenceRow]:
        """What the adapter was trained on, as the run's settings make it of the self-edit."""
        evaluated = self.run.passages[passage]
        edit = evaluated.self_edits[self_edit]
        params = edit.made.get("lora_params") or self.run.settings.get("lora_params") or {}
        return sequence_rows(
            sequences_of(evaluated, edit.text or "", split_newlines=self._splits(edit)),
            end_mask_substring=str(params.get("end_mask_substring") or ""),
        )

    def compare(self, passage: int, first: int, second: int) -> list[ComparedRow]:
        """Two self-edits of a passage, question by question."""
        edits = self.run.passages[passage].self_edits
        of_first, of_second = (by_question(edits[one].questions) for one in (first, second))
        return [
            ComparedRow(
                question=question,
                gold=asked[0].gold,
                baseline_answer=asked[0].baseline_answer,
                first_answers=tuple(one.adapter_answer for one in asked),
                second_answers=tuple(one.adapter_answer for one in of_second.get(question, ())),
                first_correct=tuple(one.adapter_correct for one in asked),
                second_correct=tuple(one.adapter_correct for one in of_second.get(question, ())),
            )
            for question, asked in of_first.items()
        ]

    def with_self_edit(self, passage: int, edit: EvaluatedSelfEdit) -> "Inspection":
        """The same run with one more self-edit of a passage; nothing is written."""
        evaluated = self.run.passages[passage]
        added = replace(edit, index=len(evaluated.self_edits))
        grown = replace(evaluated, self_edits=(*evaluated.self_edits, added))
        passages = (*self.run.passages[:passage], grown, *self.run.passages[passage + 1 :])
        one = Inspection(replace(self.run, passages=passages), graders=())
        one.graders, one._answers = self.graders, dict(self._answers)
        return one

    def _judged(self, passage: EvaluatedPassage, self_edit: int) -> tuple[AnswerRow, ...]:
        edit = passage.self_edits[self_edit]
        sequences = sequences_of(passage, edit.text or "", split_newlines=self._splits(edit))
        said = {name: verdict_pairs(grader, passage, edit.questions) for name, grader in self.graders.items()}
        rows = [
            answer_row(one, {name: pairs[at] for name, pairs in said.items()}, edit.questions, sequences)
            for at, one in enumerate(edit.questions)
        ]
        return tuple(sorted(rows, key=lambda row: FLIP_ORDER.index(row.flip)))

    def _splits(self, edit: EvaluatedSelfEdit) -> bool:
        told = edit.made.get("split_newlines", self.run.settings.get("split_newlines"))
        return True if told is None else bool(told)

    def _fits(self, row: PassageRow, show: Show) -> bool:
        tests: dict[Show, Callable[[], bool]] = {
            "all": lambda: True,
            "gains": lambda: (row.gain or 0.0) > 0,
            "losses": lambda: (row.gain or 0.0) < 0 or row.n_lost > 0,
            "ties": lambda: row.n_tied_best > 1,
            "ungraded": lambda: row.n_ungraded > 0,
            "graders disagree": lambda: self.n_disagreements(row.index) > 0,
        }
        if show not in tests:
            raise SettingsError(f"show is {show!r}; known are {', '.join(SHOWN)}")
        return tests[show]()

    def _order(self, sort: Sort) -> Callable[[PassageRow], Any]:
        keys: dict[Sort, Callable[[PassageRow], Any]] = {
            "file order": lambda row: row.index,
            "largest gain": lambda row: (row.gain is None, -(row.gain or 0.0), row.index),
            "largest loss": lambda row: (row.gain is None, row.gain or 0.0, -row.n_lost, row.index),
            "most ungraded": lambda row: (-row.n_ungraded, row.index),
            "most disagreement": lambda row: (-self.n_disagreements(row.index), row.index),
        }
        if sort not in keys:
            raise SettingsError(f"sort is {sort!r}; known are {', '.join(SORTED)}")
        return keys[sort]

    def _text_of(self, passage: int) -> str:
        one = self.run.passages[passage]
        questions = (asked.question for edit in one.self_edits[:1] for asked in edit.questions)
        return "\n".join([one.title, one.context, *questions]).casefold()

"""Rows of the passage inspector: a run's passages, self-edits, answers and train sequences as plain records.

Everything a table or widget shows is one of these. Made from the records of ``run_files``; which of them are
wanted, and when, is decided in ``inspection``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seal_nb.experiments.explanations import Flip, explanation, flip_of
from seal_nb.experiments.run_files import AnsweredQuestion, EvaluatedPassage, EvaluatedSelfEdit
from seal_nb.grading.verdicts import AS_BOOLEAN, Answered, Grader
from seal_nb.passages import Passage, Question
from seal_nb.self_edits import passage_only_sequences, train_sequences

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
            len({pair[side] for pair in self.verdicts.values() if pair[side] is not None}) > 1
            for side in (0, 1)
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
            SequenceRow(
                number=number, unscored=text[:start], scored=text[start:], is_passage=number == len(sequences)
            )
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
    one: AnsweredQuestion,
    said: Mapping[str, Pair],
    asked: Sequence[AnsweredQuestion],
    sequences: Sequence[str],
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
        [
            Answered(question=question, gold=gold, answer=text, title=passage.title)
            for question, gold, text in unique
        ]
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

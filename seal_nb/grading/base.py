"""The interface of a grader: question, gold answer and given answer in, a verdict out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol


class Verdict(StrEnum):
    """UNGRADED means that no verdict could be found (an outage, an unreadable reply); it is never "wrong" or reward."""

    CORRECT = "CORRECT"
    INCORRECT = "INCORRECT"
    UNGRADED = "UNGRADED"


# The form of verdicts in result files, and back.
AS_BOOLEAN = {Verdict.CORRECT: True, Verdict.INCORRECT: False, Verdict.UNGRADED: None}
IN_WORDS = {boolean: verdict for verdict, boolean in AS_BOOLEAN.items()}


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer to grade. ``other_golds`` are right too: the best verdict counts."""

    question: str
    gold: str
    answer: str
    title: str = ""
    other_golds: tuple[str, ...] = ()

    @property
    def golds(self) -> tuple[str, ...]:
        """All gold answers that are not empty; the one empty gold answer of a question without one."""
        return tuple(gold for gold in (self.gold, *self.other_golds) if gold.strip()) or (self.gold,)


def answered_with(golds: Sequence[str], **fields: str) -> Answered:
    """An answer with all its gold answers, the first one first; ``fields`` are those of Answered."""
    return Answered(gold=golds[0], other_golds=tuple(golds[1:]), **fields)


class Grader(Protocol):
    """Grades answers one by one; the verdicts are in the order of the answers."""

    name: str

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]: ...


def without_asking(one: Answered) -> Verdict | None:
    """An empty answer is wrong by definition; no answer can be compared with an empty gold answer; None: grade it."""
    if not one.answer.strip():
        return Verdict.INCORRECT
    return None if any(gold.strip() for gold in one.golds) else Verdict.UNGRADED


@dataclass
class Rule:
    """A grader that computes each verdict from the texts alone. ``is_correct`` judges an answer and a gold answer that
    are not empty; None if it cannot tell. One gold answer that the answer gives is enough."""

    name: str
    is_correct: Callable[[Answered], bool | None]

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        return [without_asking(one) or self._best(one) for one in answered]

    def _best(self, one: Answered) -> Verdict:
        verdicts = {self.is_correct(replace(one, gold=gold, other_golds=())) for gold in one.golds}
        return IN_WORDS[next((verdict for verdict in (True, False) if verdict in verdicts), None)]


def asked_about(one: Answered) -> tuple[str, str]:
    """Title and bare question: the ``Topic: …`` line of published questions is a title."""
    topic, line_end, rest = one.question.partition("\n")
    if not (topic.startswith("Topic: ") and line_end and rest.strip()):
        return one.title, one.question
    return one.title or topic.removeprefix("Topic: "), rest

"""The interface of a grader: question, gold answer and given answer in, a verdict out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """One answer to grade."""

    question: str
    gold: str
    answer: str
    title: str = ""


class Grader(Protocol):
    """Grades answers one by one; the verdicts are in the order of the answers."""

    name: str

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]: ...


def without_asking(one: Answered) -> Verdict | None:
    """An empty answer is wrong by definition; no answer can be compared with an empty gold answer; None: grade it."""
    if not one.answer.strip():
        return Verdict.INCORRECT
    return None if one.gold.strip() else Verdict.UNGRADED


@dataclass
class Rule:
    """A grader that computes each verdict from the texts alone. ``is_correct`` judges an answer and a gold answer that
    are not empty; None if it cannot tell."""

    name: str
    is_correct: Callable[[Answered], bool | None]

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        return [without_asking(one) or IN_WORDS[self.is_correct(one)] for one in answered]


def asked_about(one: Answered) -> tuple[str, str]:
    """Title and bare question: the ``Topic: …`` line of published questions is a title."""
    topic, line_end, rest = one.question.partition("\n")
    if not (topic.startswith("Topic: ") and line_end and rest.strip()):
        return one.title, one.question
    return one.title or topic.removeprefix("Topic: "), rest

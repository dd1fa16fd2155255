"""What a grader is: question, gold answer and given answer in; a verdict out.

UNGRADED is a state of its own. Which grader to take, and how far to trust it, is not decided here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Verdict(StrEnum):
    """UNGRADED: nothing could be found out (an outage, an unreadable reply); never "wrong", never reward."""

    CORRECT = "CORRECT"
    INCORRECT = "INCORRECT"
    UNGRADED = "UNGRADED"


# How result files write a verdict, and back.
AS_BOOLEAN = {Verdict.CORRECT: True, Verdict.INCORRECT: False, Verdict.UNGRADED: None}
IN_WORDS = {boolean: verdict for verdict, boolean in AS_BOOLEAN.items()}


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer to be graded."""

    question: str
    gold: str
    answer: str
    title: str = ""


class Grader(Protocol):
    """Grades answers one by one; the order of verdicts is that of the answers."""

    name: str

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]: ...


def asked_about(one: Answered) -> tuple[str, str]:
    """Title and bare question: the ``Topic: ...`` line of published questions is a title, not asked."""
    topic, line_end, rest = one.question.partition("\n")
    if not (topic.startswith("Topic: ") and line_end and rest.strip()):
        return one.title, one.question
    return one.title or topic.removeprefix("Topic: "), rest

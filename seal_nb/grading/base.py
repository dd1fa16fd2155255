"""What a grader is: question, gold answer and given answer in; a verdict out. UNGRADED is a state of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from seal_nb.errors import SettingsError


class Verdict(StrEnum):
    """UNGRADED: nothing could be found out (an outage, an unreadable reply); never "wrong", never reward."""

    CORRECT = "CORRECT"
    INCORRECT = "INCORRECT"
    UNGRADED = "UNGRADED"


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


def make_grader(name: str) -> Grader:
    """The grader of this name. Raises SettingsError for an unknown one."""
    if name == "local":
        from seal_nb.grading.local import LocalGrader

        return LocalGrader()
    raise SettingsError(f"grader is {name!r}; known is 'local'")

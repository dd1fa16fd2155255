"""The door to the graders: their records, and each by its name."""

from seal_nb.errors import SettingsError
from seal_nb.grading.exact import ExactGrader, F1Grader
from seal_nb.grading.local import LocalGrader
from seal_nb.grading.recall_rule import RecallGrader
from seal_nb.grading.verdicts import Answered, Grader, Verdict

__all__ = ["GRADERS", "Answered", "Grader", "Verdict", "make_grader"]

GRADERS = ("local", "exact", "f1", "recall")


def make_grader(name: str) -> Grader:
    """The grader of this name. Raises SettingsError for an unknown one."""
    match name:
        case "local":
            return LocalGrader()
        case "exact":
            return ExactGrader()
        case "f1":
            return F1Grader()
        case "recall":
            return RecallGrader()
    raise SettingsError(f"grader is {name!r}; known are {', '.join(GRADERS)}")

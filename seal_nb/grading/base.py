"""The door to the graders: their records, and each by its name."""

from seal_nb.errors import SettingsError
from seal_nb.grading.exact import ExactGrader, F1Grader
from seal_nb.grading.local import LocalGrader
from seal_nb.grading.recall_rule import RecallGrader
from seal_nb.grading.verdicts import Answered, Grader, Verdict

__all__ = ["GRADERS", "Answered", "Grader", "Verdict", "make_grader"]

GRADERS = ("local", "exact", "f1", "recall")


def make_grader(name: str) -> Grader:
    """The grader of this name: one of GRADERS, or a judge (``grading.judge.judge_settings``).

    Raises SettingsError for an unknown one, and for a judge whose key is not there.
    """
    if name == "judge" or name.startswith(("judge:", "judge?")):
        # The client of such services takes a second to import, and the other graders need none.
        from seal_nb.grading.judge import JudgeGrader, judge_settings

        return JudgeGrader(judge_settings(name))
    match name:
        case "local":
            return LocalGrader()
        case "exact":
            return ExactGrader()
        case "f1":
            return F1Grader()
        case "recall":
            return RecallGrader()
    raise SettingsError(f"grader is {name!r}; known are {', '.join(GRADERS)}, judge:MODEL")

"""Graders by name."""

import re
from collections.abc import Mapping
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.grading.base import Grader
from seal_nb.grading.local import LocalGrader
from seal_nb.grading.rules import ExactGrader, F1Grader, RecallGrader

GRADERS = ("local", "exact", "f1", "recall")
# How `inner_loop.loop.served_identity` writes the grader into what a run calls its model.
_GRADER_IN_MODEL = re.compile(rf"-({'|'.join(GRADERS)}|judge:.+?)-\d+(?:-[a-z]+)*$")


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


def grader_of(run: Mapping[str, Any]) -> str:
    """Whose verdicts a file has, as it says itself or its model's identity does; empty where neither does."""
    found = _GRADER_IN_MODEL.search(str(run.get("model") or run.get("base_model") or ""))
    return str(run.get("grader") or (found[1] if found else ""))


def check_grader(grader: str, model_id: str, *, where: str) -> None:
    """Verdicts of two graders cannot be compared. ``grader``: as stated, options and all; empty: any.

    Raises: SettingsError where the server at ``where`` is known to grade by another.
    """
    stated, served = grader.partition("?")[0], grader_of({"model": model_id})
    if stated == "judge":
        from seal_nb.grading.judge import JudgeSettings

        stated = f"judge:{JudgeSettings.model}"
    if stated and served and stated != served:
        raise SettingsError(
            f"grader is {grader!r}, and the server at {where} grades by {served!r}; give grader {served!r}, "
            f"or start a server with {grader!r}"
        )

"""A grader by its name, and the name of a file's grader."""

import re
from collections.abc import Mapping
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.grading.base import Grader
from seal_nb.grading.local import LocalGrader
from seal_nb.grading.rules import ExactGrader, F1Grader, RecallGrader

_WITHOUT_NETWORK = {one.name: one for one in (LocalGrader, ExactGrader, F1Grader, RecallGrader)}
GRADERS = tuple(_WITHOUT_NETWORK)
# `inner_loop.loop.load_inner_loop` writes the grader into the name of a run's model in this form.
_GRADER_IN_MODEL = re.compile(rf"-({'|'.join(GRADERS)}|judge:.+?)-\d+(?:-[a-z]+)*$")


def make_grader(name: str) -> Grader:
    """The grader of this name.

    Args:
        name: one of GRADERS ("local", "exact", "f1", "recall"), or a judge such as "judge:gpt-4.1"
            (see ``grading.judge.judge_settings``).

    Raises:
        SettingsError: the name is unknown, or the judge's key is missing.
    """
    if name == "judge" or name.startswith(("judge:", "judge?")):
        from seal_nb.grading.judge import JudgeGrader, judge_settings  # imports the client of services: a second

        return JudgeGrader(judge_settings(name))
    if name not in GRADERS:
        raise SettingsError(f"grader is {name!r}; known are {', '.join(GRADERS)}, judge:MODEL")
    return _WITHOUT_NETWORK[name]()


def grader_of(run: Mapping[str, Any]) -> str:
    """The grader of a file's verdicts, from its ``grader`` or its model's identity; empty if it has neither."""
    found = _GRADER_IN_MODEL.search(str(run.get("model") or run.get("base_model") or ""))
    return str(run.get("grader") or (found[1] if found else ""))


def check_grader(grader: str, model_id: str, *, where: str) -> None:
    """Compare the wanted grader with the server's, because verdicts of two graders cannot be compared.

    Args:
        grader: the wanted one with its options; empty: any.
        model_id: identity of the model that the server at ``where`` serves.

    Raises:
        SettingsError: the server is known to use another grader.
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

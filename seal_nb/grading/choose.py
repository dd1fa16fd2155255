"""A grader by its name, and the name of a file's grader."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from seal_nb.errors import SettingsError, redacted
from seal_nb.grading.base import Answered, Grader, Rule, Verdict
from seal_nb.grading.rules import exact_match, is_likely_correct, is_recalled, token_f1

F1_NEEDED = 0.5
# SQuAD's measures, exact and f1, were made for short extracted spans; most full sentences fail them.
_RULES: dict[str, Callable[[Answered], bool | None]] = {
    "local": is_likely_correct,
    "exact": lambda one: exact_match(one.gold, one.answer),
    "f1": lambda one: token_f1(one.gold, one.answer) >= F1_NEEDED,
    "recall": is_recalled,
}
GRADERS = tuple(_RULES)
# `server.loop.load_inner_loop` writes the grader into the name of a run's model in this form.
_GRADER_IN_MODEL = re.compile(rf"-((?:first:)?(?:{'|'.join(GRADERS)}|judge:.+?))-\d+(?:-[a-z]+)*$")
FIRST = "first:"
# A full stop after one letter or one of these short words ends no sentence.
_SENTENCE_END = re.compile(r"(?<!\b\w)(?<!\b(?:Mr|Dr|St|Mt|No|vs|Jr|Sr))(?<!\bMrs)[.!?](?=\s|$)|[。！？\n]")


@dataclass
class FirstSentence:
    """A grader that reads the first sentence of each answer only, which leaves less room to recite."""

    name: str
    grader: Grader

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        return self.grader.grade([replace(one, answer=first_sentence(one.answer)) for one in answered])


def first_sentence(text: str) -> str:
    """Up to the first end of a sentence or line."""
    end = _SENTENCE_END.search(text := text.strip())
    return text[: end.end()].strip() if end else text


def make_grader(name: str) -> Grader:
    """One of GRADERS, or a judge such as "judge:gpt-4.1" (see ``grading.judge.judge_settings``); after "first:" one
    that reads the first sentence of each answer only. Raises: SettingsError for an unknown name, and for a judge whose
    key is missing."""
    if name.startswith(FIRST):
        return FirstSentence(stated_grader(name), make_grader(name.removeprefix(FIRST)))
    if (stated := stated_grader(name)) in _RULES:
        return Rule(stated, _RULES[stated])
    from seal_nb.grading.judge import JudgeGrader, judge_settings  # imports the client of services: a second

    return JudgeGrader(judge_settings(name))


def stated_grader(name: str) -> str:
    """The name without options, under which verdicts are kept. Raises: SettingsError for an unknown name, and for one
    that holds a key."""
    if name.startswith(FIRST) and not name.startswith(2 * FIRST):
        return FIRST + stated_grader(name.removeprefix(FIRST))
    if name == "judge" or name.startswith(("judge:", "judge?")):
        from seal_nb.grading.judge import judge_settings

        return f"judge:{judge_settings(name).model}"
    if name not in GRADERS:
        said = repr(name) if len(name) < 8 else "unknown (it is not shown, as it may hold a key)"
        raise SettingsError(f"grader is {said}; known are {', '.join(GRADERS)}, judge:MODEL")
    return name


def grader_of(run: Mapping[str, Any]) -> str:
    """The grader of a file's verdicts, from its ``grader`` or its model's identity; empty if it has neither."""
    found = _GRADER_IN_MODEL.search(str(run.get("model") or run.get("base_model") or ""))
    return redacted(str(run.get("grader") or (found[1] if found else "")))


def check_grader(grader: str, model_id: str, *, where: str) -> None:
    """Refuse a server with another grader, because verdicts of two graders cannot be compared. ``grader``: the wanted
    one with its options; empty: any. ``model_id``: of the server at ``where``. Raises: SettingsError."""
    stated, served = grader and stated_grader(grader), grader_of({"model": model_id})
    if stated and served and stated != served:
        remedy = f"give grader {served!r}, or start a server with {grader!r}"
        raise SettingsError(f"grader is {grader!r}, and the server at {where} grades by {served!r}; {remedy}")

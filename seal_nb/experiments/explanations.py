"""Why a verdict flipped, as far as the texts tell: who says the gold answer, and what was said instead.

Observations about texts that anybody can check, in a sentence; not causes. The gold answer counts as said
where its words stand in a row, after SQuAD's normalisation.
"""

from collections.abc import Sequence
from typing import Literal

from seal_nb.experiments.run_files import AnsweredQuestion
from seal_nb.grading.exact import normalised

Flip = Literal["gained", "lost", "stayed right", "stayed wrong", "ungraded"]
MOST_NAMED = 3  # train sequences named in one sentence


def flip_of(one: AnsweredQuestion) -> Flip:
    """What the adapter did to a verdict; without both verdicts there is nothing to compare."""
    if one.baseline_correct is None or one.adapter_correct is None:
        return "ungraded"
    if one.baseline_correct == one.adapter_correct:
        return "stayed right" if one.adapter_correct else "stayed wrong"
    return "gained" if one.adapter_correct else "lost"


def explanation(one: AnsweredQuestion, asked: Sequence[AnsweredQuestion], sequences: Sequence[str]) -> str:
    """One sentence; ``asked`` are all questions of the self-edit, ``sequences`` what it became."""
    if flip_of(one) == "ungraded":
        sides = [
            name
            for name, verdict in (("baseline", one.baseline_correct), ("adapter", one.adapter_correct))
            if verdict is None
        ]
        return f"no verdict on the {' and the '.join(sides)} answer"
    facts = [_taught(one, sequences)]
    if not one.adapter_answer.strip():
        facts.append("the adapter answered nothing")
    elif not one.adapter_correct:
        facts += _instead(one, asked)
    elif not says(one.adapter_answer, one.gold):
        facts.append("the answer says it in other words")
    return "; ".join(facts)


def says(text: str, gold: str) -> bool:
    """Whether the words of the gold answer stand in the text in a row."""
    words = normalised(gold)
    return bool(words) and f" {words} " in f" {normalised(text)} "


def _taught(one: AnsweredQuestion, sequences: Sequence[str]) -> str:
    """The last sequence is the passage itself."""
    if not sequences:
        return "nothing is known of the training"
    places = [number for number, text in enumerate(sequences[:-1], start=1) if says(text, one.gold)]
    if places:
        named = ", ".join(map(str, places[:MOST_NAMED])) + (" …" if len(places) > MOST_NAMED else "")
        many = len(places) > 1
        return f"train sequence{'s' * many} {named} of {len(sequences)} say{'' if many else 's'} it"
    if says(sequences[-1], one.gold):
        return "only the passage says it" if len(sequences) > 1 else "the passage says it"
    return "no train sequence has these words"


def _instead(one: AnsweredQuestion, asked: Sequence[AnsweredQuestion]) -> list[str]:
    """Whether a wrong answer gives another question's answer: what a model does that recites."""
    others = {other.gold for other in asked if other.gold.casefold() != one.gold.casefold()}
    recited = sorted(gold for gold in others if says(one.adapter_answer, gold))
    return [f"it answers another question: {recited[0]!r}"] if recited else []

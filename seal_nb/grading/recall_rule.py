"""The gold-recall rule: most of the gold words that the question does not say occur in the answer.

Described, and tuned on the published verdicts, in the notes to the reference data; here to the last of its
counts (kappa 0.7595 against GPT-4.1). The ``local`` grader grew out of it; it stays as the plain rule that
anything cleverer has to beat. It is strict on paraphrase, so accuracies come out too low, and lower
without an adapter than with one: it flatters gains.
"""

import re
from collections.abc import Sequence

from seal_nb.grading.verdicts import Answered, Verdict, asked_about
from seal_nb.grading.words import CARDINALS, cut_ending, without_accents

NEEDED = 0.6
_STOP_WORDS = (
    "a an the of in on at to for and or is are was were be been by with as that has have had his her their "
    "he she they"
)
_STOP = frozenset(_STOP_WORDS.split())
_WORD = re.compile("[a-z0-9]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_DASHES = re.compile("[-–—]")


class RecallGrader:
    """At least 60 % of the novel gold words, and every gold word with a digit, must be in the answer."""

    name = "recall"

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        return [_verdict(one) for one in answered]


def _verdict(one: Answered) -> Verdict:
    if not one.answer.strip():
        return Verdict.INCORRECT
    _, question = asked_about(one)
    gold, asked, said = _tokens(one.gold), set(_tokens(question)), set(_tokens(one.answer))
    novel = [token for token in gold if token not in asked] or gold
    if not novel:
        return Verdict.UNGRADED
    numbers_there = all(token in said for token in gold if not token.isalpha())
    there = sum(token in said for token in novel)
    return Verdict.CORRECT if numbers_there and there >= NEEDED * len(novel) - 1e-9 else Verdict.INCORRECT


def _tokens(text: str) -> list[str]:
    plain = _DASHES.sub(" ", _THOUSANDS.sub("", without_accents(text.lower())))
    words = (word for word in _WORD.findall(plain) if word not in _STOP)
    return [cut_ending(CARDINALS.get(word, word))[:5] for word in words]

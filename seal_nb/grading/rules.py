"""SQuAD's own measures of an answer (Rajpurkar et al. 2016, evaluate-v1.1): exact match and token F1.

Both look at the first line of the answer only, normalised as SQuAD does: lower case, no punctuation, no
articles. They were made for short extracted spans; a full sentence fails them however right it is. They
are here to compare with, not to be a reward.

The gold-recall rule: most of the gold words that the question does not say occur in the answer.

Described, and tuned on the published verdicts, in the notes to the reference data; here to the last of its
counts (kappa 0.7595 against GPT-4.1). The ``local`` grader grew out of it; it stays as the plain rule that
anything cleverer has to beat. It is strict on paraphrase, so accuracies come out too low, and lower
without an adapter than with one: it flatters gains.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from seal_nb.grading.base import Answered, Verdict, asked_about
from seal_nb.grading.words import CARDINALS, cut_ending, without_accents

F1_NEEDED = 0.5
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(gold: str, answer: str) -> bool:
    return normalised(gold) == normalised(_first_line(answer))


def token_f1(gold: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, counted with repetition; 1.0 for two empty texts."""
    wanted, given = normalised(gold).split(), normalised(_first_line(answer)).split()
    if not wanted or not given:
        return float(wanted == given)
    common = (Counter(wanted) & Counter(given)).total()
    if not common:
        return 0.0
    # In SQuAD's order of operations: at the border of 0.5 the last bit decides.
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


class ExactGrader:
    """CORRECT where the first line of the answer is the gold answer."""

    name = "exact"

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        return [_said(one, exact_match(one.gold, one.answer)) for one in answered]


class F1Grader:
    """CORRECT where the first line of the answer has a token F1 of at least 0.5 with the gold answer."""

    name = "f1"

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        return [_said(one, token_f1(one.gold, one.answer) >= F1_NEEDED) for one in answered]


def _said(one: Answered, is_match: bool) -> Verdict:
    if not one.answer.strip():
        return Verdict.INCORRECT
    if not one.gold.strip():
        return Verdict.UNGRADED
    return Verdict.CORRECT if is_match else Verdict.INCORRECT


def _first_line(answer: str) -> str:
    return answer.strip().partition("\n")[0]


NEEDED = 0.6
_STOP_WORDS = (
    "a an the of in on at to for and or is are was were be been by with as that has have had his her their he she they"
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

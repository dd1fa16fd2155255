"""SQuAD's own measures of an answer (Rajpurkar et al. 2016, evaluate-v1.1): exact match and token F1.

Both look at the first line of the answer only, normalised as SQuAD does: lower case, no punctuation, no
articles. They were made for short extracted spans; a full sentence fails them however right it is. They
are here to compare with, not to be a reward.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from seal_nb.grading.verdicts import Answered, Verdict

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

"""The local grader: a small logistic model over what can be seen of an answer, made to agree with GPT-4.1.

Its weights are data (``seal_nb/data/local_grader.json``, with where they come from and what was measured);
``benchmarks/fit_local_grader.py`` makes them. It knows no synonyms: half of its mistakes are answers that
say the right thing in other words, or contain the gold words and mean something else. It needs no
network and no numpy, and a verdict depends on its own answer alone.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from seal_nb.grading.features import Asked, Said, features, read_answer, read_question
from seal_nb.grading.verdicts import Answered, Verdict, asked_about
from seal_nb.grading.words import folded, sentences, words_of


@dataclass(frozen=True, kw_only=True)
class LogisticModel:
    """P(CORRECT) = 1 / (1 + exp(-(intercept + sum of weight * feature))); CORRECT above ``threshold``."""

    intercept: float
    weights: dict[str, float]
    threshold: float

    def probability(self, values: dict[str, float]) -> float:
        # One answer at a time and in a fixed order: the last bit must not depend on the batch.
        score = self.intercept + sum(weight * values[name] for name, weight in self.weights.items())
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, score))))


def shipped_model() -> LogisticModel:
    stored = json.loads(resources.files("seal_nb").joinpath("data/local_grader.json").read_text())
    return LogisticModel(**{name: stored[name] for name in ("intercept", "weights", "threshold")})


class LocalGrader:
    """Grades some 4,000 answers a second on one core.

    An empty answer is INCORRECT, one that is the gold answer CORRECT, one that has nothing of it or takes it
    back INCORRECT; the model decides the rest. A gold answer with nothing in it leaves an answer UNGRADED.
    """

    name = "local"

    def __init__(self, model: LogisticModel | None = None) -> None:
        self._model = model or shipped_model()

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        read: dict[tuple[str, str, str], Asked | None] = {}
        return [self._verdict(one, read) for one in answered]

    def _verdict(self, one: Answered, read: dict[tuple[str, str, str], Asked | None]) -> Verdict:
        if not one.answer.strip():
            return Verdict.INCORRECT
        if not one.gold.strip():
            return Verdict.UNGRADED
        key = (one.question, one.gold, one.title)
        if key not in read:
            read[key] = _read(one)
        asked = read[key]
        if asked is None:
            return _judged(one.gold.strip() in one.answer)
        said = read_answer(one.answer)
        return _judged(_is_gold(asked, said) or self._is_likely(asked, said))

    def _is_likely(self, asked: Asked, said: Said) -> bool:
        values = features(asked, said)
        if not values["recall"] and not values["letters"]:
            return False
        return self._model.probability(values) > self._model.threshold and not _is_taken_back(asked, said)


def _read(one: Answered) -> Asked | None:
    """None where the gold answer has no word, only signs."""
    title, question = asked_about(one)
    return read_question(question, one.gold, title) if words_of(folded(one.gold)) else None


def _is_gold(asked: Asked, said: Said) -> bool:
    return "".join(word.text for word in said.words) == asked.gold_letters


def _is_taken_back(asked: Asked, said: Said) -> bool:
    """Where the answer only asks, or a negation stands right before the gold words ("not Ilse").

    Too rare in the fitted answers for a weight: 4 of 23,659 get another verdict by it, all of them wrong.
    """
    words = said.words
    only_asks = said.text.rstrip().endswith("?") and len(sentences(words, said.text)) == 1
    novel_keys = {word.key for word in asked.novel}
    first = next((i for i, word in enumerate(words) if word.key in novel_keys), 0)
    near = words[max(0, first - 2) : first]
    is_denied = any(word.is_negation for word in near) and near[-1].text not in ("only", "just", "merely")
    return only_asks or (is_denied and not asked.negated)


def _judged(is_correct: bool) -> Verdict:
    return Verdict.CORRECT if is_correct else Verdict.INCORRECT

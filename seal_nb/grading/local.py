"""The local grader: a logistic model over features of the texts, fitted to the verdicts of GPT-4.1.

``benchmarks/fit_local_grader.py`` fits its weights (``seal_nb/data/local_grader.json``). The features compare letters
and words: how much of the gold answer is in the answer, and how. Most look at the *novel* gold words, those that are
not in the question, because the others prove nothing. docs/graders.md lists the mistakes it makes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import fmean
from typing import Any

from seal_nb.grading.base import Answered, asked_about
from seal_nb.grading.rules import EMPTY_WORDS, FUNCTION_WORDS, Word, folded, sentences, trigrams, words_of
from seal_nb.storage import data_file, read_json


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and its gold answer, analysed once for all answers."""

    question_keys: frozenset[str]
    gold: tuple[Word, ...]  # without function words; all words if there are no others
    novel: tuple[Word, ...]  # gold words that are not in the question; all gold words if there are none
    beyond_title: tuple[Word, ...]  # novel words that are not in the title; all novel words if there are none
    gold_letters: str
    gold_trigrams: frozenset[str]
    negated: bool  # question or gold answer
    constants: dict[str, float]  # the features that do not depend on the answer


@dataclass(frozen=True, slots=True)
class AnalysedAnswer:
    """An answer, analysed once."""

    text: str  # folded
    sentences: list[list[Word]]
    words: list[Word]
    keys: set[str]
    stems: set[str]


def read_answer(answer: str) -> AnalysedAnswer:
    text = folded(answer)
    cut = sentences(text)
    words = [word for sentence in cut for word in sentence]
    return AnalysedAnswer(text, cut, words, {word.key for word in words}, {word.stem for word in words})


@lru_cache(maxsize=2_000)
def read_question(question: str, gold: str, title: str = "") -> Asked | None:
    """None if the gold answer has no word in it."""
    gold_words, asked_words = words_of(folded(gold)), words_of(folded(question))
    if not gold_words:
        return None
    content = tuple(word for word in gold_words if word.text not in FUNCTION_WORDS) or tuple(gold_words)
    keys = frozenset(word.key for word in asked_words if word.text not in FUNCTION_WORDS)
    title_keys = {word.key for word in words_of(folded(title))}
    new = tuple(word for word in content if word.key not in keys)
    novel = new or content
    constants: dict[str, float] = {
        "gold_all_in_question": not new,
        "gold_length": len(gold_words),
        "gold_parts": gold.count(",") + gold.count(" and "),
    }
    return Asked(
        question_keys=keys,
        gold=content,
        novel=novel,
        beyond_title=tuple(word for word in novel if word.key not in title_keys) or novel,
        gold_letters="".join(word.text for word in gold_words),
        gold_trigrams=frozenset(trigrams(" ".join(word.text for word in gold_words))),
        negated=_negated(asked_words) or _negated(gold_words),
        constants=constants,
    )


def features(asked: Asked, answer: AnalysedAnswer) -> dict[str, float]:
    """All features of one answer. ``recall`` is the plain share of novel gold words that it contains."""
    values = asked.constants.copy()
    for part in (_recall, _letters, _sentences, _before):
        values |= part(asked, answer)
    return values


def _recall(asked: Asked, answer: AnalysedAnswer) -> dict[str, float]:
    """How many gold words are in the answer; words with the same key are the same word."""
    keys = answer.keys
    return {
        "recall": fmean(word.key in keys for word in asked.novel),
        "recall_beyond_title": fmean(word.key in keys for word in asked.beyond_title),
        "last_word": asked.novel[-1].key in keys,
        "missing_names": sum(word.capital and word.key not in keys for word in asked.novel),
        "missing_numbers": len({word.stem for word in asked.gold if word.is_number} - answer.stems),
    }


def _letters(asked: Asked, answer: AnalysedAnswer) -> dict[str, float]:
    """Likeness below the word: compounds, other spellings."""
    found = trigrams(" ".join(word.text for word in answer.words))
    weights = [_weight(word) for word in asked.novel]
    likeness = [_likeness(word, answer.keys, found) for word in asked.novel]
    return {
        "weighted_recall": sum(w * s for w, s in zip(weights, likeness, strict=True)) / sum(weights),
        "trigrams": len(asked.gold_trigrams & found) / len(asked.gold_trigrams),
        "letters": asked.gold_letters in "".join(word.text for word in answer.words),
    }


def _sentences(asked: Asked, answer: AnalysedAnswer) -> dict[str, float]:
    """How much of the question is repeated, and what the first sentence adds to it."""
    words, keys, cut = answer.words, asked.question_keys, answer.sentences or [[]]
    novel_keys = {word.key for word in asked.novel}
    best = max(cut, key=lambda sentence: len(novel_keys & {word.key for word in sentence}))
    said = [word for word in cut[0] if word.text not in EMPTY_WORDS and word.key not in keys]
    return {
        "question_beside_gold": len(keys & {word.key for word in best}) / len(keys) if keys else 0.0,
        "first_precision": fmean(word.key in novel_keys for word in said) if said else 0.0,
        "distinct_words": len(answer.stems) / len(words) if words else 0.0,
    }


def _before(asked: Asked, answer: AnalysedAnswer) -> dict[str, float]:
    """The words right before the first gold word: another word, a negation."""
    words, novel_keys = answer.words, {word.key for word in asked.novel}
    known = {word.key for word in asked.gold} | asked.question_keys
    first = next((i for i, word in enumerate(words) if word.key in novel_keys), 0)
    before = words[max(0, first - 6) : first]
    is_other = bool(before) and before[-1].text not in EMPTY_WORDS and before[-1].key not in known
    return {"other_before": is_other, "negation_before": _negated(before)}


def _negated(words: Iterable[Word]) -> bool:
    return any(word.is_negation for word in words)


def _weight(word: Word) -> float:
    kind = 2.0 if word.is_number else 1.5 if word.capital else 0.5 if word.text in EMPTY_WORDS else 1.0
    return float(kind * min(len(word.text), 8) ** 0.5)


def _likeness(word: Word, keys: set[str], found: set[str]) -> float:
    """1 if the word is there, else the share of its trigrams that are. A number is there or not."""
    if word.key in keys:
        return 1.0
    own = trigrams(word.stem)
    return 0.0 if word.is_number else len(own & found) / len(own)


@cache
def _model() -> dict[str, Any]:
    model: dict[str, Any] = read_json(data_file("local_grader.json"))
    return model


def is_likely_correct(one: Answered) -> bool:
    """The gold answer itself is correct. An answer that has nothing of it, or denies it, is not. The model decides the
    rest, some thousand answers a second on one core: P = 1 / (1 + exp(-(intercept + sum of weight * feature)))."""
    title, question = asked_about(one)
    asked = read_question(question, one.gold, title)
    if asked is None:  # the gold answer is a sign, such as "§"
        return one.gold.strip() in one.answer
    said, model = read_answer(one.answer), _model()
    if "".join(word.text for word in said.words) == asked.gold_letters:
        return True
    values = features(asked, said)
    if not values["recall"] and not values["letters"]:
        return False
    # One answer at a time and in a fixed order: the last bit must not depend on the batch.
    score = model["intercept"] + sum(weight * values[name] for name, weight in model["weights"].items())
    probability = 1 / (1 + math.exp(-max(-50.0, min(50.0, score))))
    return probability > model["threshold"] and not _is_denied(asked, said)


def _is_denied(asked: Asked, said: AnalysedAnswer) -> bool:
    """The answer is only a question, or has a negation right before the gold words ("not Ilse"). This is too rare for a
    weight: of the 23,659 fitted answers it changes the verdicts of 4, all of them wrong answers."""
    words = said.words
    only_asks = said.text.rstrip().endswith("?") and len(said.sentences) == 1
    novel_keys = {word.key for word in asked.novel}
    first = next((i for i, word in enumerate(words) if word.key in novel_keys), 0)
    near = words[max(0, first - 2) : first]
    is_denied = _negated(near) and near[-1].text not in ("only", "just", "merely")
    return only_asks or (is_denied and not asked.negated)

"""The local grader: a logistic model over features of the texts, fitted to the verdicts of GPT-4.1.

``benchmarks/fit_local_grader.py`` fits its weights (``seal_nb/data/local_grader.json``). The features compare letters
and words: how much of the gold answer is in the answer, and how. Most look at the *novel* gold words, those that are
not in the question, because the others prove nothing. docs/graders.md lists the mistakes it makes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import fmean
from typing import Any

from seal_nb.grading.base import Answered, asked_about
from seal_nb.grading.rules import (
    ALTERNATIVES,
    EMPTY_WORDS,
    FUNCTION_WORDS,
    INEXACT,
    OPPOSITES,
    Word,
    as_one_piece,
    contradicts,
    folded,
    one_spelling,
    quantities,
    sentences,
    trigrams,
    words_of,
)
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
    gold_negated: bool
    n_words: int  # of the gold answer
    n_parts: int  # commas and "and" in it


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
    novel = tuple(word for word in content if word.key not in keys) or content
    return Asked(
        question_keys=keys,
        gold=content,
        novel=novel,
        beyond_title=tuple(word for word in novel if word.key not in title_keys) or novel,
        gold_letters=_letters(gold_words),
        gold_trigrams=frozenset(trigrams(" ".join(word.text for word in gold_words))),
        negated=_negated(asked_words) or _negated(gold_words),
        gold_negated=_negated(gold_words),
        n_words=len(gold_words),
        n_parts=gold.count(",") + gold.count(" and "),
    )


def features(asked: Asked, answer: AnalysedAnswer) -> dict[str, float]:
    """All features of one answer: how many gold words are in it (words with the same key are the same word), how much
    of the others' letters, what stands beside and before them."""
    words, keys, asked_keys, cut = answer.words, answer.keys, asked.question_keys, answer.sentences or [[]]
    novel_keys = {word.key for word in asked.novel}
    found = trigrams(" ".join(word.text for word in words))
    weights = [_weight(word) for word in asked.novel]
    likeness = [_likeness(word, keys, found) for word in asked.novel]
    best = max(cut, key=lambda sentence: len(novel_keys & {word.key for word in sentence}))
    said = [word for word in cut[0] if word.text not in EMPTY_WORDS and word.key not in asked_keys]
    first = next((i for i, word in enumerate(words) if word.key in novel_keys), 0)
    before = words[max(0, first - 6) : first]
    known = {word.key for word in asked.gold} | asked_keys
    return {
        "gold_length": asked.n_words,
        "gold_parts": asked.n_parts,
        "recall_beyond_title": fmean(word.key in keys for word in asked.beyond_title),
        "last_word": asked.novel[-1].key in keys,
        "missing_names": sum(word.capital and word.key not in keys for word in asked.novel),
        "missing_numbers": len({word.stem for word in asked.gold if word.is_number} - answer.stems),
        "weighted_recall": sum(w * s for w, s in zip(weights, likeness, strict=True)) / sum(weights),
        "trigrams": len(asked.gold_trigrams & found) / len(asked.gold_trigrams),
        "question_beside_gold": len(asked_keys & {word.key for word in best}) / len(asked_keys) if asked_keys else 0.0,
        "first_precision": fmean(word.key in novel_keys for word in said) if said else 0.0,
        "distinct_words": len(answer.stems) / len(words) if words else 0.0,
        "other_before": bool(before) and before[-1].text not in EMPTY_WORDS and before[-1].key not in known,
        "negation_before": _negated(before),
    }


def _letters(words: Iterable[Word]) -> str:
    """In a row, so that "data base" is "database"; numbers stay apart."""
    return "".join(f" {word.text} " if word.is_number else word.text for word in words)


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
    """Texts that are no matter of degree are decided (``decided``). The model decides the rest, some thousand answers
    a second on one core: P = 1 / (1 + exp(-(intercept + sum of weight * feature)))."""
    title, question = asked_about(one)
    verdict, values = decided(question, one.gold, one.answer, title)
    if verdict is not None:
        return verdict
    model = _model()
    # One answer at a time and in a fixed order: the last bit must not depend on the batch.
    score = model["intercept"] + sum(weight * values[name] for name, weight in model["weights"].items())
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, score)))) > model["threshold"]


def decided(question: str, gold: str, answer: str, title: str) -> tuple[bool | None, dict[str, float]]:
    """The verdict where it needs no model, and the features. The gold answer itself is correct. An answer that has
    nothing of it, contradicts it or denies it is not."""
    if (is_written := as_one_piece(gold, answer)) is not None:
        return is_written, {}
    wanted, given = one_spelling(gold), one_spelling(answer)
    asked = read_question(one_spelling(question), wanted, title)
    if asked is None:
        return False, {}
    said = read_answer(_aligned(wanted, given))
    values = features(asked, said)
    if contradicts(gold, answer, question):
        return False, values
    letters = _letters(said.words)
    if letters == asked.gold_letters:
        return True, values
    has_nothing = asked.gold_letters not in letters and not any(word.key in said.keys for word in asked.novel)
    return (False if has_nothing or _is_other(asked, wanted, said, given) or _is_denied(asked, said) else None), values


def _is_other(asked: Asked, gold: str, said: AnalysedAnswer, answer: str) -> bool:
    """The answer has another date, or another number in place of one of the gold answer's, or the opposite of a word.
    In a long answer that has some of its numbers, another proves nothing."""
    dates, others = ([one for one in quantities(text) if one.dates] for text in (gold, answer))
    if dates and others and not any(one.same(other) for one in dates for other in others):
        return True
    numbers = {word.stem for word in asked.gold if word.stem[0].isdigit()}  # also Roman ones
    new = {word.stem for word in said.words if word.stem[0].isdigit() and word.key not in asked.question_keys} - numbers
    is_short = len(said.words) <= len(asked.gold) + 4
    is_range, is_missing = is_short and len(asked.gold) == len(numbers) > 1, bool(numbers - said.stems)
    if is_missing and (new or is_range) and (is_short or not numbers & said.stems) and not INEXACT.search(gold):
        return True
    keys, unsaid = {word.key for word in asked.gold}, said.keys - asked.question_keys
    return any(one in keys and other in unsaid and one not in said.keys for one, other in OPPOSITES)


def _aligned(gold: str, answer: str) -> str:
    """The answer with the quantities of the gold answer written as there."""
    for one in quantities(gold):
        for other in reversed(quantities(answer)):
            if one.text != other.text and one.same(other):
                answer = answer[: other.start] + one.text + answer[other.start + len(other.text) :]
    return answer


def _is_denied(asked: Asked, said: AnalysedAnswer) -> bool:
    """The answer is only a question, denies the gold words ("not Ilse", "Ilse did not") or names two ("Paris or
    London"). This is too rare for a weight."""
    words, novel_keys = said.words, {word.key for word in asked.novel}
    if said.text.rstrip().endswith("?") and len(said.sentences) == 1:
        return True
    first = next((i for i, word in enumerate(words) if word.key in novel_keys), 0)
    before, after = words[max(0, first - 3) : first], words[first + len(asked.novel) :][:2]
    # In "It isn't London, it's Paris" the negation is of the other name.
    others = [at for at, word in enumerate(before) if at and word.capital and word.key not in novel_keys]
    is_denied = _negated(before[max(others, default=0) :]) and before[-1].text not in ("only", "just", "merely")
    if all(word.capital for word in asked.gold):
        denials = [word.text in ("denied", "denies") or word.is_negation for word in after]
        is_denied |= any(denials) and after[0].text not in ("not", "nor", "nicht", "but", "except")
        is_either = "either" in said.stems or len(words) <= 2 * len(asked.gold) + 1
        if is_either and ALTERNATIVES & {word.text for word in (*before[-1:], *after[:1])}:
            return True
    texts = {word.text for word in words}
    is_denied |= f"non{asked.novel[0].text}" in texts and asked.novel[0].text not in texts
    is_missing = asked.gold_negated and len(asked.gold) < 5 and not _negated(words)  # "without sugar", "with sugar"
    return is_missing or (is_denied and not asked.negated)

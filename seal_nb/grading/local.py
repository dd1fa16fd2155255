"""The local grader: a small logistic model over what can be seen of an answer, made to agree with GPT-4.1.

Its weights are data (``seal_nb/data/local_grader.json``, with where they come from and what was measured);
``benchmarks/fit_local_grader.py`` makes them. It knows no synonyms: half of its mistakes are answers that
say the right thing in other words, or contain the gold words and mean something else. It needs no
network and no numpy, and a verdict depends on its own answer alone.

What a grader without a language model can see of an answer: how much of the gold answer is there, and how.

Every feature is a number between the texts alone (question, gold, answer), named once here and weighted in
``seal_nb/data/local_grader.json``. A gold word that already stands in the question proves nothing, so most
features look at the *novel* gold words, those that do not. Meaning is out of reach: "fragmentation" and
"divided by internal conflicts" have nothing in common here.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from seal_nb.grading.base import Answered, Verdict, asked_about
from seal_nb.grading.words import EMPTY_WORDS, FUNCTION_WORDS, Word, folded, sentences, trigrams, words_of

_KINDS_OF_QUESTION = {
    "asks_who": re.compile(r"\bwho(m|se)?\b"),
    "asks_when": re.compile(
        r"\bwhen\b|what (year|date|day|month|century|decade|period|time)|which (year|century|decade)"
    ),
    "asks_where": re.compile(r"\bwhere\b|(what|which) (city|country|state|place|region|county|town|continent)"),
    "asks_how": re.compile(r"\bhow\b(?! (many|much|long|old|large|big|far|tall|high|often|fast))"),
    "asks_which": re.compile(r"\bwhich\b"),
    "asks_kind": re.compile(r"(kind|type|form|sort)s? of"),
}
_HEDGE = re.compile(r"\b(could|may|might|likely|possibly|perhaps|either|various|several)\b")
_ARTICLES = frozenset(("a", "an", "the"))


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and its gold answer, read once for all answers to it."""

    question_keys: frozenset[str]
    gold: tuple[Word, ...]  # without function words; all words where there are no others
    novel: tuple[Word, ...]  # gold words that the question does not say; all gold words where it says them all
    beyond_title: tuple[Word, ...]  # of these, what the title does not say; all novel words where it says all
    gold_phrase: str  # the stems in order, without articles
    gold_letters: str
    gold_trigrams: frozenset[str]
    negated: bool  # question or gold answer
    constants: dict[str, float]  # the features that do not depend on the answer

    @property
    def gold_keys(self) -> set[str]:
        return {word.key for word in self.gold}


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, read once."""

    text: str  # folded
    words: list[Word]


def read_answer(answer: str) -> Said:
    text = folded(answer)
    return Said(text=text, words=words_of(text))


def read_question(question: str, gold: str, title: str = "") -> Asked:
    """Raises: ValueError where the gold answer has no word in it."""
    gold_words = words_of(folded(gold))
    if not gold_words:
        raise ValueError(f"gold answer {gold!r} has no word in it")
    content = tuple(word for word in gold_words if word.text not in FUNCTION_WORDS) or tuple(gold_words)
    asked_words = words_of(folded(question))
    keys = frozenset(word.key for word in asked_words if word.text not in FUNCTION_WORDS)
    title_keys = {word.key for word in words_of(folded(title))}
    new = tuple(word for word in content if word.key not in keys)
    novel = new or content
    return Asked(
        question_keys=keys,
        gold=content,
        novel=novel,
        beyond_title=tuple(word for word in novel if word.key not in title_keys) or novel,
        gold_phrase=_phrase(gold_words),
        gold_letters="".join(word.text for word in gold_words),
        gold_trigrams=frozenset(trigrams(" ".join(word.text for word in gold_words))),
        negated=_negated(asked_words) or _negated(gold_words),
        constants=_constants(question, gold, asked_words, gold_words, novel, all_in_question=not new),
    )


def _constants(
    question: str,
    gold: str,
    asked: Sequence[Word],
    gold_words: Sequence[Word],
    novel: Sequence[Word],
    *,
    all_in_question: bool,
) -> dict[str, float]:
    lower = question.lower()
    kinds = {name: float(bool(pattern.search(lower))) for name, pattern in _KINDS_OF_QUESTION.items()}
    numbers = {word.stem for word in gold_words if word.is_number}
    return kinds | {
        "gold_all_in_question": float(all_in_question),
        "gold_length": float(len(gold_words)),
        "gold_parts": float(gold.count(",") + gold.count(" and ")),
        "gold_names": float(sum(word.capital for word in novel)),
        "gold_numbers_in_question": float(len(numbers & {word.stem for word in asked})),
        "question_length": float(len(asked)),
    }


def features(asked: Asked, answer: Said) -> dict[str, float]:
    """All features of one answer. ``recall`` is the plain share of novel gold words that it contains."""
    text, words = answer.text, answer.words
    keys = {word.key for word in words}
    return (
        asked.constants
        | _recall(asked, words, keys)
        | _letters(asked, words, keys)
        | _sentences(asked, words, text)
        | _beside(asked, words, text)
        | _contradiction(asked, words, text)
    )


def _recall(asked: Asked, words: Sequence[Word], keys: set[str]) -> dict[str, float]:
    """How many gold words are there; a word counts as there if its key is."""
    stems = {word.stem for word in words}
    novel = asked.novel
    return {
        "recall": _share(word.key in keys for word in novel),
        "recall_beyond_title": _share(word.key in keys for word in asked.beyond_title),
        "recall_of_stems": _share(word.stem in stems for word in asked.gold),
        "last_word": float(novel[-1].key in keys),
        "missing_names": float(sum(word.capital and word.key not in keys for word in novel)),
        "missing_numbers": float(len({word.stem for word in asked.gold if word.is_number} - stems)),
    }


def _letters(asked: Asked, words: Sequence[Word], keys: set[str]) -> dict[str, float]:
    """Likeness below the word: compounds, other spellings; and the gold answer as one phrase."""
    found = trigrams(" ".join(word.text for word in words))
    phrase = _phrase(words)
    place = phrase.find(asked.gold_phrase)
    weights = [_weight(word) for word in asked.novel]
    likeness = [_likeness(word, keys, found) for word in asked.novel]
    common = len(asked.gold_trigrams & found)
    return {
        "weighted_recall": sum(w * s for w, s in zip(weights, likeness, strict=True)) / sum(weights),
        "trigrams": common / len(asked.gold_trigrams),
        "trigrams_precision": common / len(found) if found else 0.0,
        "letters": float(asked.gold_letters in "".join(word.text for word in words)),
        "phrase": float(place >= 0),
        "phrase_place": place / len(phrase) if place >= 0 else 1.0,
    }


def _sentences(asked: Asked, words: Sequence[Word], text: str) -> dict[str, float]:
    """What else is said: how much of the question is taken up, and what the first sentence adds to it."""
    cut = sentences(words, text) or [()]
    novel_keys = {word.key for word in asked.novel}
    best = max(cut, key=lambda sentence: len(novel_keys & {word.key for word in sentence}))
    first = cut[0]
    said = [word for word in first if word.text not in EMPTY_WORDS and word.key not in asked.question_keys]
    known = asked.gold_keys | asked.question_keys
    return {
        "question_taken_up": _overlap(asked.question_keys, words),
        "question_beside_gold": _overlap(asked.question_keys, best),
        "first_precision": sum(word.key in novel_keys for word in said) / len(said) if said else 0.0,
        "first_other_names": float(sum(word.capital and word.key not in known for word in first[1:])),
        "distinct_words": len({word.stem for word in words}) / len(words) if words else 0.0,
    }


def _beside(asked: Asked, words: Sequence[Word], text: str) -> dict[str, float]:
    """What stands right before and after the gold words: another name, "or", "and", a negation."""
    novel_keys = {word.key for word in asked.novel}
    hits = [i for i, word in enumerate(words) if word.key in novel_keys]
    if not hits:
        return dict.fromkeys(_BESIDE, 0.0)
    first = last = hits[0]
    for hit in hits[1:]:
        if hit - last > 3:
            break
        last = hit
    before = words[first - 1] if first else None
    after = words[last + 1] if last + 1 < len(words) else None
    known = asked.gold_keys | asked.question_keys
    left, right = _is_other(before, known), _is_other(after, known)
    values = (
        left,
        right,
        left and before is not None and before.capital,
        right and after is not None and after.capital,
        text[: words[first].start].rstrip().endswith(","),
        before is not None and before.text in ("and", "or"),
        after is not None and after.text in ("and", "or"),
        any(word.is_negation for word in words[max(0, first - 6) : first]),
    )
    return dict(zip(_BESIDE, map(float, values), strict=True))


_BESIDE = (
    "other_before", "other_after", "name_before", "name_after",
    "comma_before", "and_before", "and_after", "negation_before",
)  # fmt: skip


def _contradiction(asked: Asked, words: Sequence[Word], text: str) -> dict[str, float]:
    gold_numbers = {word.stem for word in asked.gold if word.is_number}
    numbers = {word.stem for word in words if word.is_number} - gold_numbers
    others = sum(number[:5] not in asked.question_keys for number in numbers)
    return {
        "other_numbers": float(others if gold_numbers else 0),
        "negation_differs": float(_negated(words) != _negated(asked.gold)),
        "is_a_question": float(text.rstrip().endswith("?")),
        "hedged": float(bool(_HEDGE.search(text.lower()))),
    }


def _negated(words: Iterable[Word]) -> bool:
    return any(word.is_negation for word in words)


def _is_other(word: Word | None, known: set[str]) -> bool:
    return word is not None and word.text not in EMPTY_WORDS and word.key not in known


def _weight(word: Word) -> float:
    kind = 2.0 if word.is_number else 1.5 if word.capital else 0.5 if word.text in EMPTY_WORDS else 1.0
    return float(kind * min(len(word.text), 8) ** 0.5)


def _likeness(word: Word, keys: set[str], found: set[str]) -> float:
    """1 where the word is there; else how many of its trigrams are. A number is there or it is not."""
    if word.key in keys:
        return 1.0
    own = trigrams(word.stem)
    return 0.0 if word.is_number else len(own & found) / len(own)


def _phrase(words: Sequence[Word]) -> str:
    return f" {' '.join(word.stem for word in words if word.text not in _ARTICLES)} "


def _share(there: Iterable[bool]) -> float:
    flags = list(there)
    return sum(flags) / len(flags)


def _overlap(keys: frozenset[str], words: Sequence[Word]) -> float:
    return len(keys & {word.key for word in words}) / len(keys) if keys else 0.0


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

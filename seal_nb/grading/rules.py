"""Words as graders compare them, and the rules that need nothing else.

A word has no case and no accents; numbers are digits, and endings are cut off: "two", "2" and "second" become one word.
The first five letters of its stem, its key, decide whether two words are the same. For short English answers this is as
good as a real stemmer.
"""

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from seal_nb.grading.base import Answered, asked_about

_CARDINALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
CARDINALS = {word: str(number) for number, word in enumerate(_CARDINALS.split())}
_NUMBERS = CARDINALS | {word: str(10 * number) for number, word in enumerate(_TENS.split(), start=3)}
_NUMBERS |= {word: str(at) for at, word in enumerate(_ORDINALS.split(), 1)} | {"once": "1", "single": "1", "twice": "2"}
ENDINGS = ("ing", "edly", "ed", "ies", "es", "ly", "s")

_FUNCTION = "a an the of in on at to for and or is are was were be been by with from as"
_EMPTY = (
    "that this it its they them their he his she her which who whom what when where why how has have had do does did "
    "will would can could may might must should there these those such also so than then into about but if not no we "
    "you i my your our"
)
_NEGATION = "not no never none nor neither cannot without nobody nothing"
FUNCTION_WORDS = frozenset(_FUNCTION.split())  # they carry nothing of an answer
EMPTY_WORDS = FUNCTION_WORDS | frozenset(_EMPTY.split())  # they also do not count as something said in addition
_NEGATIONS = frozenset(_NEGATION.split())

_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?")
_DASHES = re.compile("[-–—‐‑−]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d\d\d)")
_ORDINAL_MARK = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])|\n+")


class Word(NamedTuple):
    """One word of a text."""

    text: str
    stem: str
    key: str
    capital: bool
    is_number: bool
    is_negation: bool


def without_accents(text: str) -> str:
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def folded(text: str) -> str:
    """No accents, dashes as spaces, plain apostrophes, 10,000 as 10000, 31st as 31. Case is kept."""
    text = without_accents(text).replace("’", "'").replace("‘", "'")
    return _ORDINAL_MARK.sub("", _DASHES.sub(" ", _THOUSANDS.sub("", text)))


def cut_ending(word: str) -> str:
    """The word without the first English ending that leaves at least four letters."""
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


@lru_cache(maxsize=50_000)
def _word(written: str) -> Word:
    text = written.lower()
    stem = _NUMBERS.get(text) or cut_ending(text.removesuffix("'s").replace("'", "")) or text
    is_negation = text in _NEGATIONS or text.endswith("n't")
    return Word(text, stem, stem[:5], written[0].isupper(), stem[0].isdigit(), is_negation)


def words_of(folded_text: str) -> list[Word]:
    return [_word(written) for written in _WORD.findall(folded_text)]


def sentences(folded_text: str) -> list[list[Word]]:
    """The words of each sentence or line that has any."""
    return [words for part in _SENTENCE_END.split(folded_text) if (words := words_of(part))]


def trigrams(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


_SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """As SQuAD compares texts: lower case, no punctuation, no articles."""
    return " ".join(_SQUAD_ARTICLES.sub(" ", unicodedata.normalize("NFC", text.lower()).translate(_MARKS)).split())


def exact_match(gold: str, answer: str) -> bool:
    """Whether the first line of the answer is the gold answer (Rajpurkar et al. 2016, evaluate-v1.1)."""
    return normalised(gold) == normalised(answer.strip().partition("\n")[0])


def token_f1(gold: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words of the first line, with repetition; 1.0 for two empty texts."""
    wanted, given = normalised(gold).split(), normalised(answer.strip().partition("\n")[0]).split()
    if not wanted or not given:
        return float(wanted == given)
    common = (Counter(wanted) & Counter(given)).total()
    if not common:
        return 0.0
    # In SQuAD's order of operations: at the border of 0.5 the last bit decides.
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


RECALL_NEEDED = 0.6
_STOP = frozenset((_FUNCTION + " that has have had his her their he she they").split()) - {"from"}
_RECALL_WORD = re.compile("[a-z0-9]+")
_RECALL_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_RECALL_DASHES = re.compile("[-–—]")


def is_recalled(one: Answered) -> bool | None:
    """At least 60 % of the novel gold words, and every gold word with a digit, must be in the answer (kappa 0.7595
    against GPT-4.1). Strict on paraphrase, more so without an adapter: it overstates gains."""
    _, question = asked_about(one)
    gold, asked, said = _tokens(one.gold), set(_tokens(question)), set(_tokens(one.answer))
    novel = [token for token in gold if token not in asked] or gold
    has_numbers = all(token in said for token in gold if not token.isalpha())
    n_found = sum(token in said for token in novel)
    return (has_numbers and n_found >= RECALL_NEEDED * len(novel) - 1e-9) if novel else None


def _tokens(text: str) -> list[str]:
    plain = _RECALL_DASHES.sub(" ", _RECALL_THOUSANDS.sub("", without_accents(text.lower())))
    words = (word for word in _RECALL_WORD.findall(plain) if word not in _STOP)
    return [cut_ending(CARDINALS.get(word, word))[:5] for word in words]

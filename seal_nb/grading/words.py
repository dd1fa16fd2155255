"""Text as a grader compares it: words without case and accents, numbers as digits, endings cut off.

``two``, ``2`` and ``second`` become one word; ``forty-two`` stays two. The key of a word (the first five
letters of its stem) is what counts as the same word: crude, and for short English answers as good as a real
stemmer. There are no word lists beyond the few function words below, and nothing is downloaded.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

_CARDINALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
CARDINALS = {word: str(number) for number, word in enumerate(_CARDINALS.split())}
_NUMBERS = (
    CARDINALS
    | {word: str(10 * number) for number, word in enumerate(_TENS.split(), start=3)}
    | {word: str(number) for number, word in enumerate(_ORDINALS.split(), start=1)}
    | {"once": "1", "single": "1", "twice": "2"}
)
ENDINGS = ("ing", "edly", "ed", "ies", "es", "ly", "s")

# Words that carry nothing of an answer; the second list also does not count as something said beside it.
_FUNCTION = "a an the of in on at to for and or is are was were be been by with from as"
_EMPTY = (
    "that this it its they them their he his she her which who whom what when where why how has have had do "
    "does did will would can could may might must should there these those such also so than then into about "
    "but if not no we you i my your our"
)
_NEGATION = "not no never none nor neither cannot without nobody nothing"
FUNCTION_WORDS = frozenset(_FUNCTION.split())
EMPTY_WORDS = FUNCTION_WORDS | frozenset(_EMPTY.split())
_NEGATIONS = frozenset(_NEGATION.split())

_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?")
_DASHES = re.compile("[-–—‐‑−]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d\d\d)")
_ORDINAL_MARK = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])|\n+")


class Word(NamedTuple):
    """One word of a text; ``start`` and ``end`` are its place in the folded text."""

    text: str
    stem: str
    key: str
    capital: bool
    start: int
    end: int

    @property
    def is_number(self) -> bool:
        return self.stem[0].isdigit()

    @property
    def is_negation(self) -> bool:
        return self.text in _NEGATIONS or self.text.endswith("n't")


def without_accents(text: str) -> str:
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def folded(text: str) -> str:
    """Accents off, dashes to spaces, plain apostrophes; 10,000 to 10000 and 31st to 31. Case is kept."""
    text = without_accents(text).replace("’", "'").replace("‘", "'")
    return _ORDINAL_MARK.sub("", _DASHES.sub(" ", _THOUSANDS.sub("", text)))


def cut_ending(word: str) -> str:
    """The word without the first English ending that leaves four letters."""
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """Of a lower-case word; number words become digits."""
    if word in _NUMBERS:
        return _NUMBERS[word]
    return cut_ending(word.removesuffix("'s").replace("'", "")) or word


def words_of(folded_text: str) -> list[Word]:
    found = []
    for match in _WORD.finditer(folded_text):
        raw = match.group()
        text = raw.lower()
        root = stem(text)
        found.append(Word(text, root, root[:5], raw[0].isupper(), match.start(), match.end()))
    return found


def sentences(words: Sequence[Word], folded_text: str) -> list[Sequence[Word]]:
    """The words of each sentence or line that has any."""
    ends = [match.start() for match in _SENTENCE_END.finditer(folded_text)] + [len(folded_text)]
    cut, first = [], 0
    for end in ends:
        last = first
        while last < len(words) and words[last].start < end:
            last += 1
        if last > first:
            cut.append(words[first:last])
        first = last
    return cut


def trigrams(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}

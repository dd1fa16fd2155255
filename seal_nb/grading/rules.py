"""Names, numbers and words as graders compare them, the rules that need nothing else, and the local grader.

Texts come into one spelling first (``one_spelling``), and quantities and dates are read with all that they can mean. A
word has no case, accents and ending; the first five letters of its stem, its key, decide whether two words are equal.
"""

import math
import re
import string
import unicodedata
from calendar import month_name
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from itertools import islice, pairwise
from statistics import fmean
from typing import Any, NamedTuple

from text_to_num import alpha2digit

from seal_nb.grading.base import Answered, asked_about
from seal_nb.storage import data_file, read_json

_CARDINALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
CARDINALS = {word: str(number) for number, word in enumerate(_CARDINALS.split())}
# `one_spelling` makes digits of the other numbers in words.
_NUMBERS = {"one": "1", "once": "1", "single": "1", "two": "2", "twice": "2", "second": "2"}
ENDINGS = ("ing", "edly", "ed", "ies", "es", "ly", "s")

_FUNCTION = "a an the of in on at to for and or is are was were be been by with from as"
_EMPTY = (
    "that this it its they them their he his she her which who whom what when where why how has have had do does did "
    "will would can could may might must should there these those such also so than then into about but if not no we "
    "you i my your our"
)
FUNCTION_WORDS = frozenset(_FUNCTION.split())  # they carry nothing of an answer
EMPTY_WORDS = FUNCTION_WORDS | frozenset(_EMPTY.split())  # they also do not count as something said in addition
_SPELLINGS = read_json(data_file("spellings.json"))
_NEGATIONS = frozenset(_SPELLINGS["negations"])
ALTERNATIVES = frozenset(_SPELLINGS["alternatives"])  # "or"

_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?")
_DASHES = re.compile("[-–—‐‑−]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d\d\d)")
_ORDINAL_MARK = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b")
_ROMAN = re.compile(r"(?=[MDCLXVI]{4}|[LXVI]{2})(?:M{1,3}(?:CM|CD|D?C{0,3}))?(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
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
    plain = unicodedata.normalize("NFKD", text).translate(_LETTERS)
    return "".join(c for c in plain if not unicodedata.combining(c))


def folded(text: str) -> str:
    """No accents, dashes as spaces, plain apostrophes, 10,000 as 10000, 31st as 31. Case is kept."""
    return _ORDINAL_MARK.sub("", _DASHES.sub(" ", _THOUSANDS.sub("", without_accents(text))))


def cut_ending(word: str) -> str:
    """The word without the first English ending that leaves at least four letters."""
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


@lru_cache(maxsize=50_000)
def _word(written: str) -> Word:
    text = written.lower()
    if len(text) > 4:  # Müller, Mueller and Muller are one name
        text = re.sub("([aou])e", r"\1", text.replace("aa", "a"))
    stem = _NUMBERS.get(text) or cut_ending(text.removesuffix("'s").replace("'", "")) or text
    is_number, is_negation = stem[0].isdigit(), text in _NEGATIONS or text.endswith("n't")
    stem = _roman(written) if _ROMAN.fullmatch(written) else stem  # in "Louis XIV" it is no number, but 14 is the same
    stem = "not" if text.endswith("n't") else stem
    return Word(text, stem, stem[:5], written[0].isupper(), is_number, is_negation)


def words_of(folded_text: str) -> list[Word]:
    return [_word(written) for written in _WORD.findall(folded_text)]


_PAIRS = [tuple(word.key for word in words_of(pair)) for pair in _SPELLINGS["opposites"]]
OPPOSITES = [(one, other) for pair in _PAIRS for one, other in (pair, pair[::-1])]  # the keys of words


def sentences(folded_text: str) -> list[list[Word]]:
    """The words of each sentence or line that has any."""
    return [words for part in _SENTENCE_END.split(folded_text) if (words := words_of(part))]


def trigrams(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


_SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """As SQuAD compares texts: lower case, no punctuation, no articles."""
    plain = unicodedata.normalize("NFC", text.lower()).translate(_NO_PUNCTUATION)
    return " ".join(_SQUAD_ARTICLES.sub(" ", plain).split())


def exact_match(gold: str, answer: str) -> bool:
    """Whether the first line of the answer is the gold answer (Rajpurkar et al. 2016, evaluate-v1.1). A text that
    normalises to nothing ("A", "!!!") is compared as it is written, but for case."""
    said = answer.strip().partition("\n")[0]
    wanted, given = normalised(gold), normalised(said)
    is_same = wanted == given if wanted and given else _as_written(gold) == _as_written(said)
    return is_same and not contradicts(gold, said)


def _as_written(text: str) -> str:
    return text.casefold().strip(string.punctuation + string.whitespace) or text.strip()


def token_f1(gold: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words of the first line, with repetition; 0.0 for a contradiction."""
    said = answer.strip().partition("\n")[0]
    wanted, given = normalised(gold).split(), normalised(said).split()
    if not wanted or not given:
        return float(exact_match(gold, said))
    common = (Counter(wanted) & Counter(given)).total()
    if not common or contradicts(gold, said):
        return 0.0
    # In SQuAD's order of operations: at the border of 0.5 the last bit decides.
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


RECALL_NEEDED = 0.6
_STOP = frozenset((_FUNCTION + " that has have had his her their he she they").split()) - {"from"}
_RECALL_WORD = re.compile("[a-z0-9]+")
_RECALL_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")


def is_recalled(one: Answered) -> bool:
    """At least 60 % of the novel gold words, and every gold word with a digit, must be in the answer (kappa 0.7595
    against GPT-4.1). Strict on paraphrase, more so without an adapter: it overstates gains."""
    _, question = asked_about(one)
    if (is_written := as_one_piece(one.gold, one.answer)) is not None:
        return is_written
    gold, asked, said = _tokens(one.gold), set(_tokens(question)), set(_tokens(one.answer))
    novel = [token for token in gold if token not in asked] or gold
    has_numbers = all(token in said for token in gold if not token.isalpha())
    n_found = sum(token in said for token in novel)
    is_found = has_numbers and n_found >= RECALL_NEEDED * len(novel) - 1e-9 if novel else one.gold.strip() in one.answer
    return is_found and not contradicts(one.gold, one.answer, question)


@lru_cache(maxsize=1_000)
def _tokens(text: str) -> list[str]:
    plain = _DASHES.sub(" ", _RECALL_THOUSANDS.sub("", without_accents(text.lower())))
    words = (word for word in _RECALL_WORD.findall(plain) if word not in _STOP)
    return [cut_ending(CARDINALS.get(word, word))[:5] for word in words]


_NAMES: dict[str, str] = _SPELLINGS["names"]
_NAMES |= {name[0].upper() + name[1:]: written for name, written in _NAMES.items()}  # where a sentence begins with it
_NAME = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(_NAMES, key=len, reverse=True)))})(?!\w)")
_FORMS = [(re.compile(form), written) for form, written in _SPELLINGS["forms"]]
_NUMBER_FORMS = [(re.compile(form), written) for form, written in _SPELLINGS["forms_of_numbers"]]
_LETTERS = str.maketrans(_SPELLINGS["letters"])
_SCALES: dict[str, float] = _SPELLINGS["scales"]
_UNITS: dict[str, list[tuple[str, float]]] = {}  # by name: what it measures, and its size in a base unit
for _kind, _names in _SPELLINGS["units"].items():
    for _name, _size in _names.items():
        for _prefix, _factor in ({"": 1.0} | (_SPELLINGS["prefixes"] if _name[0] == "~" else {})).items():
            _UNITS.setdefault(_prefix + _name.removeprefix("~"), []).append((_kind, _factor * _size))
_UNITS |= {name.lower(): kinds for name, kinds in _UNITS.items() if len(name) > 1 and name.lower() not in _UNITS}

_COUNT = f"{'|'.join(CARDINALS)}|{_TENS.replace(' ', '|')}|hundred|thousand|[mb]illion"
_RANK = f"(?:{_ORDINALS.replace(' ', '|')}|(?:{'|'.join([*CARDINALS][13:20])}|hundred|thousand)th|[a-z]+tieth)s?"
_SPELLED = re.compile(
    rf"\b(?=[ZOTFSENAHMBzotfsenahmb])(?<!\d[ -])(?:(?<!of )[Aa]n? (?=hund|thou|mill|bill))?"
    rf"(?i:{_COUNT}|{_RANK})(?:(?: and |[ -])(?i:{_COUNT}|{_RANK}))*\b"
)
_ALONE = ("one", "second", "seconds", "hundred", "thousand", "million", "billion")  # often no numbers
_HAN = "[〇零一二两三四五六七八九十百千万亿萬億]"
_CHINESE = re.compile(rf"(?<!\d)\d{{0,18}}{_HAN}{{1,24}}(?!{_HAN})")
_POWER = re.compile(r"(?<![\w.])(?:(\d+(?:\.\d+)?)(?:\s?[×x*]\s?10\^?|e)|10\^)([+-]?\d{1,2})(?![\w.]*\d)")
_CLOCK = re.compile(r"\b(\d{1,2})(?:(?:[:.](\d\d)(?::\d\d)?)? ?([AaPp])[Mm]\b|:(\d\d)(?::00)?\b(?!:))")
_MONTHS = {name[:3].lower(): number for number, name in enumerate(month_name) if name}
_MONTH = "|".join(rf"{name}|{name[:3]}\b\.?" for name in month_name if name)
_DAY = r"\d\d?(?:st|nd|rd|th)?(?![\d:])"
_DATE = re.compile(
    r"(?<![\w/.-])(?:(?P<iso>\d{4}(?:-\d\d?(?:-\d\d?)?|/\d\d?/\d\d?))|"
    r"(?P<numeric>\d\d?(?P<mark>[./])\d\d?(?P=mark)\d\d(?:\d\d)?|\d\d?/\d{4})|"
    rf"(?:(?P<before>{_DAY}) (?:of )?)?(?P<month>{_MONTH})\b(?: (?:the )?(?P<after>{_DAY}))?(?:,? (?P<year>\d{{4}}))?)"
    r"(?!\w(?<!T))"
)
_CODES = "|".join(name for name in _UNITS if re.fullmatch("[A-Z]{3}", name))  # of currencies
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<!\))-|[Mm]inus )?(?P<currency>(?:US|HK|[ACR])?[$€£¥₹₽₩] ?|(?:{_CODES}) (?=\d))?"
    r"(?:(?:(?P<whole>\d+) )?(?P<part>\d+)/(?P<parts>[1-9]\d*)|"
    r"(?P<number>(?:\d{1,3}(?:,\d\d)*,|\d{1,3} (?=\d))\d{3}(?:[, ]\d{3})*(?:\.\d+)?|"
    r"\d{1,3}(?:\.\d{3})+(?:,\d+)|\d{1,3}(?:\.\d{3}){2,}|\d+(?:[.,]\d+)?))(?![.,/]?\d)"
    rf"(?:[ -]?(?P<scale>{'|'.join(_SCALES)})s?\b)?"
    r"(?: ?-?(?P<unit>(?:degrees? |° ?|square |cubic |US |percentage )?"
    r"(?:[^\W\d_]+[23]?(?:/[^\W\d_]+[23]?)?|[^\w\s.,;:!?()'\"/-])))?(?!\w)"
)
_SHORT_SCALES: dict[str, float] = _SPELLINGS["short_scales"]  # m: only of money
_MARKED = re.compile(r"(?<![\w.])\.?[^\W\d_](?:[^\W_]|-(?=\d))*(?:[#+]+|(?<![^\W_]{3})-(?![\w-]))?(?!\w)")
_DIGIT = re.compile("[0-9]")
_MARK = re.compile(r"[#+♯]|[A-Z]-?\d|\b[A-Za-z]-(?!\w)|(?<![\w.])\.\w")
_UNSPACED = re.compile("[\u0900-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_DENIAL = re.compile("|".join(_SPELLINGS["denials_without_spaces"]))
_NO_CHOICE = re.compile(  # "A dog" (but "grade A", "option A"), "not B", "B is wrong"
    r"(?i:\b(?:not|never|except)|n't)\W+(?:(?:option|answer) )?[A-Za-z]\b|\b[A-Za-z]\W+(?:is|was)(?:n't| not| wrong)|"
    r"\b(?<!rade )(?<!tion )(?<!swer )(?<!type )(?<!amin )(?<!lass )(?<!roup )[AI](?= [a-z])(?! (?:is|and|or)\b)"
)
INEXACT = re.compile(rf"(?i)\b(?:{'|'.join(_SPELLINGS['bounds'])})\b|\d0s\b")  # the number is not the exact one
MOST_NUMBERS = 60  # of a text; each of the gold answer is compared with each of the answer


class Quantity(NamedTuple):
    """A number or a date as it is written, and what it can mean."""

    text: str
    start: int
    number: float  # with sign and scale; NaN for a date
    meanings: tuple[tuple[str, float], ...] = ()  # what is measured, and the value in base units
    has_unit: bool = False
    dates: tuple[tuple[int, int, int], ...] = ()  # year, month and day; 0: not said

    @property
    def digits(self) -> set[str]:
        """The numbers in it without thousands; 3/4 and 4/3 are alike."""
        numbers = re.findall(r"\d+/\d+|\d+", re.sub(r"(?<=\d)[,.](?=\d)|(?<=\d) (?=\d{3})", "", self.text))
        return {"".join(sorted(one)) if "/" in one else re.sub("(000)+$", "", one) for one in numbers if not self.dates}

    def same(self, said: "Quantity") -> bool:
        """Whether both can mean the same. Either may leave out the unit, or the year; only this one the day."""
        if self.dates or said.dates:
            pairs = [(a, b) for a in self.dates for b in said.dates]
            return any((a[0] == b[0] or 0 in (a[0], b[0])) and a[1] == b[1] and a[2] in (0, b[2]) for a, b in pairs)
        if not (self.has_unit and said.has_unit) and math.isclose(self.number, said.number, rel_tol=1e-7):
            return True
        return any(a == b and math.isclose(x, y, rel_tol=1e-7) for a, x in self.meanings for b, y in said.meanings)


@lru_cache(maxsize=4_000)
def one_spelling(text: str) -> str:
    """Names and numbers in one spelling: "U.S." is US, "two thirds" 2/3, "5 pm" 1020 clock. Case is kept."""
    if not text.isascii():
        text = re.sub("(?<=[0-9])(?=[⁻⁰¹²³⁴-⁹]+(?![⁺⁻]))", "^", re.sub("(?=[¼-¾⅐-⅞])", " ", text))
        text = _CHINESE.sub(_chinese, re.sub(r"\d", lambda digit: str(int(digit[0])), without_accents(text)))
    for form, written in _FORMS:
        text = form.sub(written, text)
    text = _SPELLED.sub(_spelled, _NAME.sub(lambda name: _NAMES[name[0]], text))
    if not _DIGIT.search(text):
        return text
    text = _POWER.sub(lambda power: f"{Decimal(f'{power[1] or 1}e{power[2]}'):f}", text)
    for form, written in _NUMBER_FORMS:
        text = form.sub(written, text)
    return _CLOCK.sub(_clock, text)


def _spelled(words: re.Match[str]) -> str:
    """Two hundred and fifty: 250."""
    if words[0].lower() in _ALONE:
        return words[0]
    digits = alpha2digit(re.sub("^[Aa]n? |-", " ", words[0]).strip(), "en", threshold=0.0)
    return re.sub(r"^(1\d|20) (\d\d)$", r"\1\2", digits)  # a year


def _roman(numeral: str) -> str:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[letter] for letter in numeral]
    return str(sum(-one if one < after else one for one, after in pairwise([*values, 0])))


def _chinese(match: re.Match[str]) -> str:
    def value(numbers: list[int]) -> int:
        if (top := max(numbers, default=0)) < 10:
            return int("".join(map(str, numbers)) or 0)
        at = numbers.index(top)
        return max(value(numbers[:at]), 1) * top + value(numbers[at + 1 :])

    parts = re.findall(r"\d+|\D", match[0])
    return str(value([int(one) if one.isdecimal() else int(unicodedata.numeric(one, 2)) for one in parts]))


def _clock(match: re.Match[str]) -> str:
    """A time of day in minutes, as a quantity."""
    half, minute = (match[3] or "").lower(), int(match[2] or match[4] or 0)
    hour = int(match[1]) % 12 + 12 * (half == "p") if half else int(match[1])
    return f"{60 * hour + minute} clock"


@lru_cache(maxsize=2_000)
def quantities(text: str) -> list[Quantity]:
    """The dates and numbers of a text in ``one_spelling``."""
    found: list[Quantity] = []
    if not _DIGIT.search(text):
        return found
    for match in islice(_DATE.finditer(text), MOST_NUMBERS):
        if dates := tuple(_dates(match)):
            found.append(Quantity(match[0], match.start(), math.nan, dates=dates))
            text = text[: match.start()] + " " * len(match[0]) + text[match.end() :]
    return found + [_quantity(match) for match in islice(_NUMBER.finditer(text), MOST_NUMBERS)]


def _dates(match: re.Match[str]) -> Iterator[tuple[int, int, int]]:
    numbers = [int(one) for one in re.findall(r"\d+", match["iso"] or match["numeric"] or "")]
    if match["month"]:
        in_month = re.sub(r"\D", "", match["before"] or match["after"] or "")
        if in_month or match["year"]:
            yield int(match["year"] or 0), _MONTHS[match["month"][:3].lower()], int(in_month or 0)
        return
    year, *others = numbers if match["iso"] else numbers[::-1]
    year += (1900 if year > 30 else 2000) if year < 100 else 0
    for month, *days in (others,) if match["iso"] else (others, others[::-1]):  # 3/5/1990: in March or in May
        if 1 <= month <= 12 and all(1 <= day <= 31 for day in days):
            yield year, month, sum(days)


def _quantity(match: re.Match[str]) -> Quantity:
    unit, currency, end = match["unit"] or "", (match["currency"] or "").strip(), match.end()
    scale = _SCALES.get((match["scale"] or "").lower(), 1.0)
    is_attached = match.start("unit") in (match.end("number"), match.end("part")) and unit != "m"
    if unit in _SHORT_SCALES and (currency or is_attached):
        scale, unit = _SHORT_SCALES[unit], ""
    if match["part"]:
        number = float(match["whole"] or 0) + float(match["part"]) / float(match["parts"])
    else:
        plain = re.sub(r"[ ,](?=\d{3})", "", match["number"])
        number = float(re.sub(r"\.(?=\d*[.,])|(?<=\.\d{3})\.", "", plain).replace(",", "."))
    number *= -scale if match["sign"] else scale
    kinds = _measured(unit)
    if unit and not kinds:  # another word
        end = match.start("unit")
    kinds = kinds or _measured(currency)
    meanings = tuple((kind, number * size) for kind, size in kinds or [("share", 1.0)])
    return Quantity(match.string[match.start() : end].rstrip(" -"), match.start(), number, meanings, bool(kinds))


def _measured(unit: str) -> list[tuple[str, float]]:
    """What a unit measures, and its size; several if it is ambiguous; empty if it is no unit."""
    if rate := re.fullmatch("(.+)/(.+)", unit):
        over = _measured(rate[2])
        return [(f"{kind}/{per}", size / of) for kind, size in _measured(rate[1]) for per, of in over]
    parts = re.fullmatch(r"(?i)(square|cubic)? ?(?:degrees? |° ?)?(.+?)([23]?)", unit)
    if not parts:
        return []
    power = {"s": 2, "c": 3}[parts[1][0].lower()] if parts[1] else int(parts[3] or 1)
    names = (unit, parts[2], parts[2].removesuffix("s"), parts[2].lower(), parts[2].lower().removesuffix("s"))
    found = next((_UNITS[name] for name in names if name in _UNITS), [])
    if not found and not unit[0].isalnum():
        return [(unit, 1.0)]  # the sign of another currency
    return [(f"{kind}{power}", size**power) for kind, size in found] if power > 1 else found


def contradicts(gold: str, answer: str, question: str = "") -> bool:
    """Whether the answer has the digits of a quantity of the gold answer with another sign, scale or unit, or the
    letters of a name with other symbols or digits ("C#", "C++"). What it leaves out contradicts nothing, and a scale
    that the question names ("How many million …?") may be left out."""
    gold, answer, is_equal = one_spelling(gold), one_spelling(answer), gold.casefold() == answer.casefold()
    wanted, given = quantities(gold), quantities(answer)
    is_asked = any(len(scale) > 4 and scale in question.lower() for scale in _SCALES)
    for one in wanted if given and not is_asked else []:
        if not any(one.same(other) for other in given) and any(one.digits & other.digits for other in given):
            return True
    if is_equal or not (_MARK.search(gold) or _MARK.search(answer)):
        return False
    said = _marked(answer)
    return any(name in said and not forms & said[name] for name, forms in _marked(gold).items())


def _marked(text: str) -> dict[str, set[str]]:
    """The forms of each name with its signs and digits, by its letters and by its digits: "C#", "C++", "CO2". Digits
    belong to capitals only; behind a hyphen they may be left out ("COVID-19")."""
    found: dict[str, set[str]] = {}
    for written in _MARKED.findall(text):
        name = re.sub("(?<=[0-9])s$", "", written.lower())
        letters = re.sub("[0-9#+.-]", "", name)
        for key in {letters, re.sub("[^0-9]", "", name)} - {""}:
            loose = "-[0-9].*" if written.rstrip("s").isupper() else "-?[0-9].*"
            found.setdefault(key, set()).update({re.sub("-(?=[0-9])", "", name), re.sub(loose, "", name)})
    return found


def as_one_piece(gold: str, answer: str) -> bool | None:
    """The verdict on a gold answer that cannot be cut into words: in a script without spaces, a single letter, yes,
    no, or nothing but signs. It must be in the answer as it is written, and not denied. None: cut it into words."""
    spelled = unicodedata.normalize("NFC", one_spelling(gold))
    bare = spelled.strip(string.punctuation + string.whitespace)
    if _UNSPACED.search(spelled):
        wanted, given = _letters_only(gold), _letters_only(answer)
        if given and given in (wanted, "".join(re.findall(r"\A.*\d", wanted))):  # or without what is counted
            return True
        place = re.compile(rf"(?<!\d)(?=\d){re.escape(wanted)}(?!\d)|(?!\d){re.escape(wanted)}")
        denial = "$^" if _DENIAL.search(gold) else _DENIAL
        clauses = map(_letters_only, re.split(r"[,.;!?，。、；！？\n]", answer))
        return bool(wanted) and any(place.search(one) and not re.search(denial, one) for one in clauses)
    if bare.lower() in ("yes", "no") and (words := words_of(folded(answer))):
        is_yes = words[0].text in ("yes", "yeah", "yep", "true", "correct")
        if is_yes or words[0].text in ("nope", "false") or any(word.is_negation for word in words):
            return is_yes == (bare.lower() == "yes")
    if len(bare) == 1 and bare.isalpha() and gold.strip("()[].:'\" ") == bare:
        if (is_other := contradicts(gold, answer)) or _as_written(answer) == bare.casefold():
            return not is_other
        found = re.findall(rf"(?<![\w'’.°])(?:[A-Z]|{bare})(?![\w'’+#]|-\w)", _NO_CHOICE.sub("", one_spelling(answer)))
        return {*found} in ({bare}, {bare.upper()})
    if gold.strip() and not re.search(r"\w", gold):
        sign = f"[=<>!?+*/|&~^:{re.escape(gold.strip())}-]"  # "=" is not in "=="
        return bool(re.search(rf"(?<!{sign}){re.escape(gold.strip())}(?!{sign})", answer))
    return None


def _letters_only(text: str) -> str:
    plain = unicodedata.normalize("NFKC", re.sub(r"\d", lambda digit: str(int(digit[0])), text)).casefold()
    return _CHINESE.sub(_chinese, re.sub(r"[^\w\u0900-\u109f\u1780-\u17ff]+|_", "", plain))


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
    of the others' letters, what stands beside and before them. Most look at the *novel* gold words, those that are not
    in the question, because the others prove nothing."""
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
    """The local grader. Texts that are no matter of degree are decided (``decided``). A logistic model, fitted to the
    verdicts of GPT-4.1 (``benchmarks/fit_local_grader.py``), decides the rest, some thousand answers a second on one
    core: P = 1 / (1 + exp(-(intercept + sum of weight * feature))). docs/graders.md lists the mistakes it makes."""
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

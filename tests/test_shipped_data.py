"""The shipped passages keep their promises: short, answerable, and not rehearsed by their implications."""

import json
import re
from importlib import resources
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest

from seal_nb.passages import Passage, load_passages, to_item

SPLIT_SIZES = {"train": 18, "val": 12}
ALL = [passage for split in SPLIT_SIZES for passage in load_passages(f"shipped:{split}")]
GOLDS = [(passage.title, question.answer) for passage in ALL for question in passage.questions]

# Capitalised words that are ordinary English and may stand in more than one passage.
COMMON_CAPITALS = {"Mount"}
NUMBER = re.compile(
    r"\d+|zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"(thir|four|fif|six|seven|eigh|nine)teen|"
    r"((twen|thir|for|fif|six|seven|eigh|nine)ty(-[a-z]+)?)|hundred|thousand"
)
# Numbers of an implication that its passage does not hold, and how they follow from it.
DERIVED_NUMBERS = {
    "Oskavel Tide Clock": {"four", "36"},  # nine minutes a year, in four years
    "Kaldrovan Balloon Post": {"17"},  # 1871 - 1854
    "Treaty of Hobbermere": {"four"},  # leap years
    "Institute for Slow Weather": {"16"},  # 1977 - 1961
    "Ulmarrow Light": {"1820"},  # two years after 1818
    "Thrumbit": {"two", "sixty"},  # thirty pips, twice
}


def implications(passage: Passage) -> list[str]:
    return passage.hand_written.split("\n")


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['-]\w+)*", text)


def names(text: str) -> set[str]:
    """Capitalised words that do not begin a sentence."""
    sentences = re.split(r"(?<=[.:?])\s+", text)
    inner = (word for sentence in sentences for word in words(sentence)[1:])
    return {word.removesuffix("'s") for word in inner if word[0].isupper()}


def numbers(text: str) -> set[str]:
    return {word for word in words(text.lower()) if NUMBER.fullmatch(word)}


def ngrams(text: str, n: int, *, title: str) -> set[tuple[str, ...]]:
    """Runs of n words; the title counts as one word, since naming the subject rehearses nothing."""
    subject = re.escape(title.removeprefix("The "))
    tokens = words(re.sub(subject, "TITLE", text, flags=re.IGNORECASE).lower())
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def shared_with_implications(passage: Passage, question: str, n: int) -> float:
    """The share of the question's n-grams that some implication of its passage holds."""
    asked = ngrams(question, n, title=passage.title)
    told = set().union(*(ngrams(line, n, title=passage.title) for line in implications(passage)))
    return len(asked & told) / len(asked) if asked else 0.0


@pytest.mark.parametrize(("split", "n_passages"), SPLIT_SIZES.items())
def test_files_are_item_lists_as_written(split: str, n_passages: int) -> None:
    file = resources.files("seal_nb") / "data" / f"passages_{split}.json"
    text = file.read_text(encoding="utf-8")
    items = json.loads(text)
    assert len(items) == n_passages
    assert all(set(item) == {"title", "context", "questions", "hand_written"} for item in items)
    assert text == json.dumps(items, indent=1, ensure_ascii=False) + "\n"
    assert [to_item(passage) for passage in load_passages(f"shipped:{split}")] == items


def test_titles_are_unique() -> None:
    assert len({passage.title.lower() for passage in ALL}) == len(ALL)


def test_no_name_stands_in_two_passages() -> None:
    shared = {
        (a.title, b.title): both
        for a, b in combinations(ALL, 2)
        if (both := (names(a.context) & names(b.context)) - COMMON_CAPITALS)
    }
    assert shared == {}


@pytest.mark.parametrize("passage", ALL, ids=lambda passage: passage.title)
def test_a_passage_has_five_questions_with_short_distinctive_golds(passage: Passage) -> None:
    assert len(passage.questions) == 5
    assert len({question.question for question in passage.questions}) == 5
    for question in passage.questions:
        gold = question.answer
        assert gold in passage.context
        assert 1 <= len(words(gold)) <= 4
        assert len(gold) >= 3
        asked = {word.lower() for word in words(f"{passage.title} {question.question}")}
        assert not ({word.lower() for word in words(gold)} - {"of", "the"}) & asked
        assert question.question.endswith("?")


def test_no_gold_lies_within_another() -> None:
    nested = [(a, b) for a, b in combinations(GOLDS, 2) if a[1].lower() in b[1].lower() or b[1].lower() in a[1].lower()]
    assert nested == []


@pytest.mark.parametrize("passage", ALL, ids=lambda passage: passage.title)
def test_implications_are_sentences_and_not_questions(passage: Passage) -> None:
    lines = implications(passage)
    assert 6 <= len(lines) <= 10
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert re.fullmatch(r"[A-Z][^?\n]*[a-z0-9]\.", line)
        assert ". " not in line
        assert line not in passage.context


@pytest.mark.parametrize("passage", ALL, ids=lambda passage: passage.title)
def test_implications_tell_only_names_and_numbers_of_the_passage(passage: Passage) -> None:
    source = f"{passage.title} {passage.context}"
    known_words = {word.removesuffix("'s") for word in words(source)}
    derived = DERIVED_NUMBERS.get(passage.title, set())
    for line in implications(passage):
        assert names(line) <= known_words
        assert numbers(line) <= numbers(source) | derived


def test_no_question_repeats_a_run_of_five_words_of_an_implication() -> None:
    rehearsed = [q.question for p in ALL for q in p.questions if shared_with_implications(p, q.question, 5)]
    assert rehearsed == []


def test_questions_and_implications_hardly_share_trigrams() -> None:
    shares = [shared_with_implications(p, q.question, 3) for p in ALL for q in p.questions]
    assert fmean(shares) < 0.05  # measured: 0.037
    assert max(shares) <= 0.5


def test_a_rehearsed_question_would_be_noticed() -> None:
    passage = Passage(title="The Zorb", context="", questions=(), hand_written="Eight men built the Zorb in a shed.")
    assert shared_with_implications(passage, "Who built the Zorb in a shed?", 5) == 2 / 3
    assert shared_with_implications(passage, "Where was it made, and by whom?", 3) == 0.0


def test_passages_are_short() -> None:
    assert max(len(passage.context.split()) for passage in ALL) <= 62
    assert min(len(passage.context.split()) for passage in ALL) >= 40


def test_no_passage_with_its_title_is_longer_than_90_tokens(small_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    lengths = {p.title: len(tokenizer(f"{p.title}\n{p.context}")["input_ids"]) for p in ALL}
    assert {title: n for title, n in lengths.items() if n > 90} == {}

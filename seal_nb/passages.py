"""Passages with their questions: the forms they are read from, and the item files that are written.

A reader for each form gives items or rows with their places; one function checks and groups them (``_passages``). A
broken file is refused with its path, the item and the field. Nothing is repaired, and no text is changed."""

import contextlib
import csv
import io
import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, TypeAdapter
from pydantic_core import PydanticCustomError

from seal_nb import storage
from seal_nb.errors import DataError, SettingsError, brief, checked, pattern, redacted, visible
from seal_nb.metrics import counted
from seal_nb.storage import MOST_BYTES, parse_json

log = logging.getLogger(__name__)
COLUMNS = ("title", "context", "question", "answer")
SHIPPED_SPLITS = ("train", "val")
_LAYOUT = "give items of title, context and questions, or rows of title, context, question and answer"
_FORMS = "see the forms in docs/own_passages.md"
# Of files that are none of ours: what they are by how they start, and what an item is made of by a field that only
# they have.
_OTHER: dict[str, dict[str, str]] = storage.read_json(storage.data_file("others.json"))
_SEPARATOR = re.compile(r'"?sep=(?P<sign>.)"?\r?\n', re.IGNORECASE)  # a first line as Excel writes it
_RULE = re.compile(r"\s*:?-+:?\s*")  # a cell below the header of a Markdown table
_FRONT_MATTER = re.compile(r"\A(?P<mark>---|\+\+\+)[ \t]*\n.*?\n(?P=mark)[ \t]*(?=\n)", re.DOTALL)
_COMMENT = re.compile(r"(?P<code>`{3,}.*?`{3,}|~{3,}.*?~{3,})|<!--.*?-->", re.DOTALL)  # not in code
_ENTRY = pattern("question_line")
_WHY = {  # something is left out
    "questions": "without an answer",
    "sections": "of Markdown with questions in it (write the text above them, and the questions under ## Questions)",
}

Placed = tuple[int | str, Any]  # 0 or "line 3", and the item


def _csv_rows(text: str, path: Path) -> Iterator[Placed]:
    csv.field_size_limit(MOST_BYTES)  # csv's own limit is 128 KB, less than a long passage
    named = _SEPARATOR.match(text)
    sign = named["sign"] if named else _separator(text) or ("\t" if ".tsv" in path.suffixes else ",")
    lines = io.StringIO(text[named.end() if named else 0 :], newline="")
    table = csv.reader(lines, strict=True, delimiter=sign, skipinitialspace=sign != "\t")
    line = before = 1 + bool(named)  # where the row starts that is read
    try:
        header = next(filter(any, table), [])
        columns = _names(header)
        needed = [*COLUMNS[:3], "answers" if "answers" in columns and "answer" not in columns else "answer"]
        if missing := [name for name in needed if name not in columns]:
            problem = f"has no column {missing[0]!r} but {', '.join(columns)[:200]}"
            remedy = f"give a header with {', '.join(COLUMNS)}, and commas, semicolons, bars or tabs between them"
            raise DataError(problem, path=path, item=f"line {line}", field=missing[0], remedy=remedy)
        _check_names(columns, path, f"line {line}")
        line = before + table.line_num
        for cells in table:
            place, line = f"line {line}", before + table.line_num
            if {*needed} <= {*(names := _names(cells))}:  # files that were put together have a header each
                header, columns = cells, names
                continue
            if all(not cell.strip() or _RULE.fullmatch(cell) for cell in cells):
                continue
            row = dict(zip(columns, map(str.strip, cells), strict=False))
            # Below an optional last column, an empty cell too many may come from a text that was cut in two.
            is_shifted = len(cells) > len(header) and columns[-1] not in needed
            if not row.keys() >= {*needed} or is_shifted or any(map(str.strip, cells[len(columns) :])):
                problem = f"has {len(cells)} cells, and the header {len(columns)}"
                remedy = f"put a text with {sign!r} in it into double quotes, and fill in what is missing"
                raise DataError(problem, path=path, item=place, remedy=remedy)
            is_text_only = not row["question"] and not row[needed[3]]
            yield place, row | ({"question": None} if is_text_only else {})
    except csv.Error as error:
        problem = f"is not CSV or TSV: {error}"
        raise DataError(problem, path=path, item=f"line {line}", remedy="close the quotes") from error


def _names(cells: Iterable[str]) -> list[str]:
    return [name.strip(' "').lower() for name in "\0".join(cells).rstrip("\0 ").split("\0")]  # no empty last ones


def _check_names(columns: Sequence[str], path: Path, place: str | None = None) -> None:
    for name in {*COLUMNS, "answers", "other_answers", "questions"}:
        if (n := list(columns).count(name)) > 1:
            raise DataError(f"is the name of {n} columns", path=path, item=place, field=name, remedy="keep one of them")


def _separator(text: str) -> str:
    """The sign between the columns of a table's header; empty where the first line is no header."""
    line = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    for sign in ",;\t|":
        names = set(_names(line.split(sign)))
        if names >= set(COLUMNS[:3]) and names & {"answer", "answers"}:
            return sign
    return ""


def _markdown_items(text: str, path: Path, left_out: Counter[str]) -> Iterator[Placed]:
    """Lines of a paragraph are joined by spaces, paragraphs by a line break. A section (``##``) with questions is no
    part of the text, nor are comments, rules and front matter."""
    lines, code, headings = _markdown_lines(text, path)
    titles = [number for number, (level, _) in headings.items() if level == "#"]
    if before := [number for number, line in enumerate(lines[: min(titles, default=None)]) if line.strip()]:
        place, remedy = f"line {before[0] + 1}", "begin with '# title'"
        raise DataError("is before the first title", path=path, item=place, field="title", remedy=remedy)
    for start, end in pairwise([*titles, len(lines)]):
        sections, asked = [list[str]()], set[int]()  # the lines of each, and which have questions
        entries, is_told = list[list[str]](), False  # kind, text and place of each; whether the line above is one
        for number in range(start + 1, end):
            line, place = lines[number].strip(), f"line {number + 1}"
            level, heading = headings.get(number, ("", ""))
            if number not in code and (entry := _ENTRY.fullmatch(line)):
                is_whole = entry["mark"] and not (entry["before"] or entry["after"])  # **Q: Where?**
                text = entry["text"].removesuffix(entry["mark"] if is_whole else "")
                entries.append([entry["kind"][0].upper(), text, place])
                asked |= {len(sections) - 1} if entries[-1][0] == "Q" else set()
                is_told = True
            elif is_told and line and number not in code and not level:
                if not lines[number][0].isspace():
                    problem = f"is {brief(line)}, right below a question, an answer or an implication"
                    remedy = "indent it if it goes on, or put an empty line above it"
                    raise DataError(problem, path=path, item=place, remedy=remedy)
                entries[-1][1] = f"{entries[-1][1]} {line}".strip()
            else:
                is_told = False
                sections += [[]] if level else []
                sections[-1].append(f"{level} {heading}" if level else line)
        asked -= {0}
        left_out["sections"] += sum(any(sections[n][1:]) for n in asked)
        kept = "\n".join(line for n, section in enumerate(sections) if n not in asked for line in section).strip()
        place = f"line {start + 1}"
        if not kept:
            remedy = "write a text below the title; that of a section with questions is none"
            raise DataError("is empty", path=path, item=place, field="context", remedy=remedy)
        pairs = [entry for entry in entries if entry[0] != "I"]
        for n, (kind, _, at) in enumerate(pairs):
            if kind != "QA"[n % 2]:
                field, remedy = "question" if kind == "A" else "answer", "write Q: and A: in turn"
                raise DataError("is missing before this line", path=path, item=at, field=field, remedy=remedy)
        turns = zip_longest(*(iter(text for _, text, _ in pairs),) * 2)
        item = {"title": headings[start][1], "questions": [{"question": q, "answer": a} for q, a in turns]}
        item["context"] = "\n".join(paragraph.replace("\n", " ") for paragraph in re.split(r"\n{2,}", kept))
        item["hand_written"] = "\n".join(text for kind, text, _ in entries if kind == "I").rstrip("\n")
        yield place, item


def _markdown_lines(text: str, path: Path) -> tuple[list[str], set[int], dict[int, tuple[str, str]]]:
    """The lines, without comments, rules and front matter; which of them are code; and the headings, with their level
    as ``##``."""
    from markdown_it import MarkdownIt

    text = re.sub(r"\r\n?", "\n", text)
    for left_out in (_FRONT_MATTER, _COMMENT):
        text = left_out.sub(lambda found: found.groupdict().get("code") or "\n" * found[0].count("\n"), text)
    lines, blocks = text.split("\n"), MarkdownIt().parse(text)
    code, headings = set[int](), dict[int, tuple[str, str]]()
    for at, block in enumerate(blocks):
        first, end = block.map or (0, 0)
        last, is_heading = lines[end - 1].strip(), block.type == "heading_open"
        if block.type in ("fence", "code_block"):
            code |= {*range(first, end)}
        if is_heading and block.level == 0 and end - first <= 2 and last != "---":  # which is a rule
            headings[first] = ("#" * int(block.tag[1]), blocks[at + 1].content)
        if block.type == "hr" or (is_heading and block.markup in "=-"):
            lines[end - 1] = ""
        is_open = block.type == "fence" and (end == first + 1 or last.strip(block.markup[0]) or last < block.markup)
        if is_open or (block.type == "html_block" and block.content.startswith("<!--")):
            what, mark = (f"a code block ({block.markup})", block.markup) if is_open else ("a comment (<!--)", "-->")
            place, remedy = f"line {first + 1}", f"write {mark} below it"
            raise DataError(f"{what} does not end", path=path, item=place, remedy=remedy)
    return lines, code, headings


def _not_empty(value: Any) -> Any:
    if not (value.strip() if isinstance(value, str) else value):
        raise PydanticCustomError("empty", "is empty")
    return value


def _sendable(value: Any) -> Any:
    if isinstance(value, str) and (found := re.search("[\0\ud800-\udfff]", value)):
        kind = "the character NUL" if found[0] == "\0" else "half a surrogate pair"
        raise PydanticCustomError("refused", f"has {kind} ({ascii(found[0])[1:-1]}) at position {found.start()}")
    return value


def _from_cell(value: Any) -> Any:
    """Several golds. In a cell of a table they are JSON, as `datasets` writes them."""
    if not isinstance(value, str) or not value.startswith(("[", "{")):
        return None if value == "" else value
    try:
        return _plain(parse_json(value, as_written=True))
    except ValueError as error:
        raise PydanticCustomError("refused", 'is not JSON: write ["one", "two"]') from error


AnyText = Annotated[str, BeforeValidator(_sendable)]  # checked where a file is read
Text = Annotated[AnyText, AfterValidator(_not_empty)]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A closed-book question and its gold answer. ``other_answers`` are right too, and the best of all counts."""

    question: Text
    answer: Text
    other_answers: tuple[Text, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text to train on, and closed-book questions about it.

    Args:
        title: not empty.
        context: the text.
        questions: with a gold answer each.
        completions: self-edits of the passage.
        prompt: the prompt that they complete, as in the published item files.
        prompts: the prompt of each self-edit, if they differ (a prompt family); ``prompt_keys`` names each.
        hand_written: implications written by a person, one per line."""

    title: Text
    context: Text
    questions: tuple[Question, ...]
    completions: tuple[AnyText, ...] = ()
    prompt: AnyText = ""
    prompts: tuple[AnyText, ...] = ()
    prompt_keys: tuple[AnyText, ...] = ()
    hand_written: AnyText = ""


class Passages(list[Passage]):
    """The passages that were loaded. ``summary`` is one line: how many, and what was left out and why."""

    summary: str = ""


def load_passages(source: Any) -> Passages:
    """Read passages.

    Args:
        source: ``shipped:train`` or ``shipped:val`` (about things that do not exist), a file (``runs/`` is the
            project's, ``storage.runs_folder``), or rows or items in memory: a ``datasets.Dataset``, a DataFrame, a list
            of dicts or of passages. The content of a file tells its form, also with `.gz` (docs/own_passages.md):

            - JSON or JSON Lines: items (``{title, context, questions, completions?, prompt?}``), SQuAD v1.1 and v2,
              rows as ``datasets`` and pandas write them; Parquet with such rows
            - CSV, TSV: columns ``title``, ``context``, ``question``, ``answer``; one question per row
            - Markdown: a passage under each ``# title``; lines ``Q: …`` and ``A: …``, ``I: …`` for implications

    Returns: the passages in their order. Their ``summary`` is logged too, as a warning if something was left out.

    Raises: DataError with the path, the item (its index or line) and the wrong field."""
    left_out: Counter[str] = Counter()
    if not isinstance(source, str | Path):
        path = Path(type(source).__name__)
        records = _records(source, path)
    else:
        path = storage.runs_folder(source)
        if str(source).startswith("shipped:"):
            split = str(source).removeprefix("shipped:")
            if split not in SHIPPED_SPLITS:
                raise DataError(f"no shipped passages {split!r}", remedy=f"shipped are {', '.join(SHIPPED_SPLITS)}")
            path = storage.data_file(f"passages_{split}.json")
        records = _file_records(path, left_out)
    passages = _passages(records, path, left_out)
    golds = [1 + len(question.other_answers) for one in passages for question in one.questions]
    without = sum(not one.questions for one in passages)
    said = f"{path.name}: {counted(len(passages), 'passages')}, {counted(len(golds), 'questions')}"
    said += f", {counted(sum(golds), 'gold answers')}" if sum(golds) > len(golds) else ""
    if without:
        said += f"; {counted(without, 'passages')} without questions: trained on, in no mean or ranking"
    said += "".join(f"; left out: {counted(n, what)} {_WHY[what]}" for what, n in left_out.items() if n)
    passages.summary = visible(redacted(said))
    log.log(logging.WARNING if without or left_out.total() else logging.INFO, "%s", passages.summary)
    return passages


def _file_records(path: Path, left_out: Counter[str]) -> Iterable[Placed]:
    name = path.name.lower().removesuffix(".gz")
    with storage.open_regular(path) as file:
        start = file.peek(8)
    if start.startswith(b"PAR1"):
        return enumerate(parquet_rows(path))
    if kinds := [kind for mark, kind in _OTHER["files"].items() if start.startswith(mark.encode("latin-1"))]:
        raise DataError(f"is {kinds[0]}", path=path, remedy="unpack it, or save it as CSV UTF-8, Parquet or JSON Lines")
    text = storage.read_text(path)
    begin = text[:100_000].lstrip()
    if not begin:
        raise DataError("is empty", path=path, remedy=_FORMS)
    if begin.startswith(("{", "[")) or (name.endswith((".json", ".jsonl", ".ndjson")) and not _separator(begin)):
        return _json_records(text, name, path)
    if _separator(begin) or _SEPARATOR.match(text) or name.endswith((".csv", ".tsv")):
        return _csv_rows(text, path)
    if begin.startswith("# ") or name.endswith((".md", ".markdown")):
        return _markdown_items(text, path, left_out)
    problem = f"begins with {brief(begin)}: neither JSON, a header of CSV nor a '# title'"
    raise DataError(problem, path=path, remedy=_FORMS)


def _json_records(text: str, name: str, path: Path) -> Iterable[Placed]:
    """JSON Lines, whatever the file is called, if the first line is a whole value and others follow."""
    first, _, others = text.lstrip().partition("\n")
    is_lines = ".jsonl" in name and not first.startswith("[")
    with contextlib.suppress(ValueError):
        is_lines |= bool(others.strip()) and parse_json(first) is not None
    if is_lines:
        return storage.read_json_lines(path, text, as_written=True)
    return _records(storage.read_json(path, text, as_written=True), path)


def _records(source: Any, path: Path) -> Iterable[Placed]:
    """The items, articles or rows of a JSON value or of an object in memory."""
    if isinstance(source, Mapping):
        no_table = str | bytes | Mapping
        parts = [name for name, one in source.items() if isinstance(one, Iterable) and not isinstance(one, no_table)]
        if "articles" in source:
            raise DataError("is a run file, not an item file", path=path, remedy="give it to 05_rest_em_round")
        if all(isinstance(source.get(name), list | dict) for name in COLUMNS[:2]):  # columns, as pandas writes them
            source = _plain({name: [*one.values()] if isinstance(one, dict) else one for name, one in source.items()})
        elif {"context", "questions", "question", "paragraphs"} & source.keys():
            source = [source]
        elif len(parts) == 1 or "data" in parts:
            return _records(source["data" if "data" in parts else parts[0]], path)
        elif parts:
            problem = f"has the splits {', '.join(map(str, parts))[:200]}"
            raise DataError(problem, path=path, remedy=f"give one of them: dataset[{parts[0]!r}]")
    if hasattr(source, "iterrows"):  # pandas
        _check_names(source.columns, path)
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    _check_names(getattr(source, "column_names", ()), path)
    for method in ("to_pylist", "to_dicts"):  # pyarrow, polars
        source = getattr(source, method)() if hasattr(source, method) else source
    if not isinstance(source, Iterable) or isinstance(source, str | bytes | Mapping):
        remedy = "give a list of items, of rows or of SQuAD articles, a Dataset or a DataFrame"
        raise DataError(f"is {brief(source)}, not a list of items", path=path, remedy=remedy)
    return enumerate(source)


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, with the columns that are read. Raises: DataError."""
    from pyarrow import ArrowException, parquet

    wanted = {*Passage.__annotations__, *Question.__annotations__, "answers", "is_impossible", "paragraphs"}
    wanted |= _OTHER["layouts"].keys()
    size = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name in wanted]
            _check_names(names, path)
            for batch in file.iter_batches(batch_size=100, columns=names):
                size += batch.nbytes
                if size > MOST_BYTES * 5:  # a context is repeated in each row about it
                    raise DataError(f"holds more than {MOST_BYTES * 5 // 10**6} MB", path=path, remedy="split it")
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot be read as Parquet: {error}", path=path, remedy="write it again") from error


def text_key(*texts: str) -> tuple[str, ...]:
    """Texts, such as title and context, as they are compared with those of another file: macOS may write an é as two
    characters (NFD)."""
    return tuple(unicodedata.normalize("NFC", one) for one in texts)


def check_disjoint(training: Sequence[Passage], held_out: Sequence[Passage]) -> None:
    """Refuse passages that are trained or tuned on and also measure the result.

    Args:
        training: passages of rounds, or of tuning.
        held_out: passages of the evaluation.

    Raises:
        DataError: a title is in both, or half of the runs of eight words of a text are in the other one."""
    titles = {text_key(one.title)[0].casefold() for one in training} - {""}
    in_training = {words: one.title for one in training for words in _word_runs(one.context)}
    for at, one in enumerate(held_out):
        runs = _word_runs(one.context)
        shared = [in_training[words] for words in runs if words in in_training]
        is_known = text_key(one.title)[0].casefold() in titles
        if is_known or 2 * len(shared) > len(runs):
            problem = "is a title of the training passages" if is_known else f"shares its text with {shared[0]!r}"
            raise DataError(f"passage {one.title!r} {problem}", item=at, remedy="evaluate on other titles and texts")


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text_key(text)[0].casefold())
    return {tuple(words[at : at + 8]) for at in range(max(1, len(words) - 7))} if words else set()


def passage_at(passages: Sequence[Passage], index: int) -> Passage:
    """The passage with this index. Raises: SettingsError if there is none."""
    if not 0 <= index < len(passages):
        raise SettingsError(f"passage is {index}; the dataset has {len(passages)}, counted from 0")
    return passages[index]


def published_order(passages: Sequence[Passage], seed: int = 42) -> list[Passage]:
    """A shuffled copy, in the order of ``random.seed(seed); random.shuffle(items)`` (published: 42)."""
    shuffled = list(passages)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def to_item(passage: Passage) -> dict[str, Any]:
    """The passage as an entry of a published item file, without its empty fields."""
    return _PASSAGE.dump_python(passage, mode="json", exclude_defaults=True)


def asked(question: Question) -> dict[str, Any]:
    """The question and its gold answers as published files have them; ``other_answers`` only where there are some."""
    return _QUESTION.dump_python(question, mode="json", exclude_defaults=True)


class _SquadParagraph(BaseModel):
    context: Text
    qas: list[Any]


class _SquadArticle(BaseModel):
    title: Text
    paragraphs: list[_SquadParagraph]


_PASSAGE = TypeAdapter(Passage)
_QUESTION = TypeAdapter(Question)
_TEXT: TypeAdapter[str] = TypeAdapter(Text)
_GOLDS: TypeAdapter[Any] = TypeAdapter(Annotated[Any, BeforeValidator(_from_cell)])
_SQUAD_ARTICLE = TypeAdapter(_SquadArticle)


def _passages(records: Iterable[Placed], path: Path, left_out: Counter[str]) -> Passages:
    """One passage for each item and paragraph, and one for the rows of one title and context."""
    found: dict[object, tuple[int | str, dict[str, Any]]] = {}  # by title and context, if rows may share them
    for place, record in records:
        check = partial(checked, path=path, item=place)
        for item, asked, field in _items_of(place, record, path):
            if isinstance(asked, list):
                read = [_question(one, field.format(at=at), check) for at, one in enumerate(asked)]
                item["questions"] = [one for one in read if one is not None]
                left_out["questions"] += read.count(None)
            key = object() if field else text_key(item["title"], item["context"])
            if key in found:
                found[key][1]["questions"] += item["questions"]
            else:
                found[key] = place, item
    if not found:
        raise DataError("holds no passage", path=path, remedy=_FORMS)
    return Passages(_passage(item, path, place) for place, item in found.values())


def _passage(item: Any, path: Path, place: int | str) -> Passage:
    one = checked(_PASSAGE.validate_python, item, path=path, item=place)
    for name in ("prompts", "prompt_keys"):
        if (n := len(getattr(one, name))) not in (0, len(one.completions)):
            problem = f"has {n} entries for {len(one.completions)} completions"
            raise DataError(problem, path=path, item=place, field=name, remedy="correct it, or remove the item")
    return one


def _items_of(place: int | str, record: Any, path: Path) -> Iterator[tuple[dict[str, Any], Any, str]]:
    """(item, its questions as given, the field of one of them) of an item, a SQuAD article or a row of one question; a
    row has no such field."""
    refused = partial(DataError, path=path, item=place)
    record = asdict(record) if isinstance(record, Passage) else record
    if not isinstance(record, Mapping):
        raise refused(f"is {brief(record)}, not an object", remedy=_LAYOUT)
    is_row = "question" in record and "questions" not in record
    is_hub = "answers" in record  # as `datasets` has SQuAD, whose titles are written with _
    record = {name: _plain(value) for name, value in record.items() if value is not None}  # null means absent
    if "paragraphs" in record and not is_row:
        article = checked(_SQUAD_ARTICLE.validate_python, record, path=path, item=place)
        for n, paragraph in enumerate(article.paragraphs):  # the title with spaces, as in published items
            item = {"title": article.title.replace("_", " "), "context": paragraph.context}
            yield item, paragraph.qas, f"paragraphs[{n}].qas[{{at}}]"
        return
    if isinstance(record.get("context"), list | dict):
        remedy = "make a text of them: ' '.join(one for _, those in row['context'] for one in those), or of the hub's "
        remedy += "rows ' '.join(sum(row['context']['sentences'], [])), and give a title of your own"
        problem = "has parts, such as the titles with sentences of HotpotQA, and is no text"
        raise refused(problem, field="context", remedy=remedy)
    if missing := [name for name in ("title", "context", "questions")[: 2 if is_row else 3] if name not in record]:
        layouts = [f"this looks like {what}; " for name, what in _OTHER["layouts"].items() if name in record]
        problem = f"is missing; the item has {redacted(', '.join(map(str, record))[:4000])[:120] or 'no field'}"
        raise refused(problem, field=missing[0], remedy="".join(layouts[:1]) + _LAYOUT)
    if not is_row:
        yield record, record["questions"], "questions[{at}]"
    else:
        title, context = (
            checked(_TEXT.validate_python, record[name], path=path, item=place, field=name) for name in COLUMNS[:2]
        )
        title = title.replace("_", " ") if is_hub else title
        yield {"title": title, "context": context}, [record] if "question" in record else [], ""


def _plain(value: Any) -> Any:
    """Lists and dicts, without the arrays that a DataFrame from Parquet holds in its cells. A dict of lists becomes a
    list of dicts, as `datasets` takes the one for the other."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        value = {name: _plain(one) for name, one in value.items()}
        lengths = {len(one) if isinstance(one, list) else -1 for one in value.values()}
        if len(lengths) == 1 and lengths != {-1}:
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _question(value: Any, field: str, check: Callable[..., Any]) -> Question | None:
    """None if it has no answer, as some of SQuAD v2 and QuAC."""
    if isinstance(value, dict):
        if str(value.get("is_impossible")).lower() in ("true", "1"):
            return None
        golds: list[str] = []
        of = f"{field}." if field else ""
        given = {"answer": value.get("answer")}
        is_list = str(given["answer"]).startswith('["')  # in a cell
        for name in ("answer", "answers", "other_answers")[not is_list :]:
            given[name] = check(_GOLDS.validate_python, value.get(name), field=of + name)
        for name, those in given.items():
            for at, one in enumerate(those if isinstance(those, list) else [] if those is None else [those]):
                place = f"{of}{name}[{at}]" if isinstance(those, list) else of + name
                golds.append(check(_TEXT.validate_python, _gold(one), field=place))
        if {*golds} == {"CANNOTANSWER"} or (not golds and [] in (given["answer"], given["answers"])):
            return None
        value = {"question": value["question"]} if "question" in value else {}
        value |= {"answer": golds[0], "other_answers": [*dict.fromkeys(golds)][1:]} if golds else {}
    return check(_QUESTION.validate_python, value, field=field)


def _gold(one: Any) -> Any:
    """A number as it is written, but whole ones without a fraction: pandas makes 1990.0 of 1990 beside a gap."""
    one = one["text"] if isinstance(one, dict) and "text" in one else one
    one = int(one) if isinstance(one, float | Decimal) and one % 1 == 0 else one
    is_number = isinstance(one, int | float | Decimal) and not isinstance(one, bool)
    text = f"{one:f}" if isinstance(one, Decimal) else str(one)
    return text if is_number and text not in ("nan", "inf", "-inf") else one


REPOSITORY = "rajpurkar/squad"  # SQuAD v1.1 (Rajpurkar et al. 2016, CC BY-SA 4.0)
REVISION = "7b6d24c440a36b6815f21b70d25016731768db1f"  # of 2024-03, its last commit
OUT_NAMES = {"train": "squad_train.json", "validation": "squad_val.json"}  # SEAL's
FILES = {split: f"plain_text/{split}-00000-of-00001.parquet" for split in OUT_NAMES}


def fetch_squad(split: str, folder: Path, *, revision: str = REVISION) -> Path:
    """Write a split as an item file into ``folder``, with a record of its commit. ``revision``: a commit, branch or tag
    of the repository. Raises: DataError if it cannot be downloaded."""
    from huggingface_hub import hf_hub_download

    if split not in FILES:
        raise DataError(f"SQuAD has no split {split!r}", remedy=f"give {' or '.join(FILES)}")
    try:
        file = Path(hf_hub_download(REPOSITORY, FILES[split], repo_type="dataset", revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        remedy = "check the network or HF_ENDPOINT, or give train-v1.1.json from SQuAD's own site as the dataset"
        raise DataError(f"{REPOSITORY} could not be fetched from the hub ({why})", remedy=remedy) from error
    # The first answer is the gold, as in the published item files.
    rows = ({**row, "answers": {"text": row["answers"]["text"][:1]}} for row in parquet_rows(file))
    passages = _passages(enumerate(rows), Path(REPOSITORY), Counter())
    written = storage.write_json(folder / OUT_NAMES[split], [to_item(passage) for passage in passages])
    commit = file.parents[FILES[split].count("/")].name  # the hub's cache has a folder for each
    source = {"repository": REPOSITORY, "split": split, "revision": revision, "commit": commit}
    storage.write_record(written, stage="data squad", settings=source)
    return written

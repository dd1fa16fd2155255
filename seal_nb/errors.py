"""The errors of this package: one base class, and one class for each kind of failure; and texts without secrets.

Every class also inherits the standard-library error that it specialises, for callers that do not know this package. A
message says what happened, with the value, and what to do about it. It never holds a secret (``redacted``)."""

import json
import logging
import os
import re
import reprlib
import sys
import tomllib
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

_TEXTS = tomllib.loads((Path(__file__).parent / "data/patterns.toml").read_text(encoding="utf-8"))


def pattern(*names: str) -> re.Pattern[str]:
    """One of the regular expressions that are too long for a line of code (``data/patterns.toml`` has them with their
    comments), or the first of several that matches."""
    return re.compile("|".join(_TEXTS[name] for name in names), re.VERBOSE)


T = TypeVar("T")
_WANTED = {"string": "a text", "int": "a whole number", "bool": "true or false", "float": "a number"}
_WANTED |= {"list": "a list", "tuple": "a list", "value": "allowed here"}
_WANTED |= {"greater": "a count", "less": "a count", "large": "a plausible number"}
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 4_000  # far beyond what is shown: keys are hidden before the cut
_PACKAGE = Path(__file__).resolve().parent
# Characters that command a terminal, reorder text or have no UTF-8 form; tabs and ends of lines are none.
HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)


def visible(text: str) -> str:
    """The text with HIDDEN characters as ``\\u001b``, which is the same JSON: for terminals, logs and tables."""
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


PUT_AWAY = "put the key into an environment variable, and give the variable's name (api_key_env)"
_LEAST = 8  # characters: half a key is a secret too, from this length on
_MOST, _MARGIN = 30_000, 4_000  # characters that are looked at, from either end of a text; and at a cut, of a key
_kept: set[str] = set()  # secrets that are in use and not in the environment
SECRET_VARIABLE = pattern("secret_variable")
_ADDRESS = re.compile(r"(?:[\w+.-]*://|(?=[^\s:@/]*:))([^\s:@/]*)(:?)(\S*)@[^\s@]+")
_PLACE = re.compile(r"[~.]{0,2}/.*\.[a-z]{2,5}")  # of a file that need not exist
_FORMS = {  # by whether a text is prose
    False: pattern("user_of_address", "named_secret", "secret"),
    True: pattern("user_of_address", "secret"),
}
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_CHANGE = re.compile(r"[a-z](?=[A-Z0-9])|[0-9](?=[A-Za-z])|[A-Z](?=[0-9])")


def keep_secret(value: str) -> str:
    """``redacted`` finds this value from now on. Returns: the value."""
    _kept.add(value)
    return value


def redacted(text: str, *, is_prose: bool = False) -> str:
    """The text with ``***`` for each secret. Known are those of ``keep_secret``, of environment variables with names
    like ``HF_TOKEN``, and of addresses there, in parts of 8 characters and more; and what has the form of a secret
    (``sk-…``, ``Bearer …``, ``api_key=…``, ``user:password@``). ``is_prose``: a text that may say "password: …". Call
    it before a text is cut to what is shown. The middle of a very long text is left out."""
    if len(text) > 2 * _MOST and not is_prose:
        head, tail = redacted(text[:_MOST])[:-_MARGIN], redacted(text[-_MOST:])[_MARGIN:]
        return f"{head} … ({len(text):,} characters in all) … {tail}"
    # Forms come first, as they may begin with a part of a known secret ("sk-proj-").
    text = _FORMS[is_prose].sub(lambda form: f"{''.join(filter(None, form.groups()))}***", text)
    hidden = bytearray(len(text))
    for n, parts in _parts(tuple((one, os.environb.get(one, b"")) for one in os.environb), frozenset(_kept)).items():
        for at in range(len(text) - n + 1):
            if text[at : at + n] in parts:
                hidden[at : at + n] = b"*" * n
    return "".join("***" if run[0][0] else text[slice(*run.span())] for run in re.finditer(rb"\0+|\*+", hidden))


@lru_cache(maxsize=4)
def _parts(environment: tuple[tuple[bytes, bytes], ...], kept: frozenset[str]) -> dict[int, set[str]]:
    """What is looked for, by its length: of each secret, also as in a URL or in JSON, the parts of 8 characters. One
    without a digit, whose parts are words, is looked for as a whole. A short one (`local`) is no secret."""
    found, parts = set(kept), dict[int, set[str]]()
    for name, value in ((os.fsdecode(name), os.fsdecode(value)) for name, value in environment):
        is_secret = SECRET_VARIABLE.search(name) and not os.access(value, os.F_OK) and not _PLACE.fullmatch(value)
        for word in re.split(r"[\s,;=]+" if "HEADER" in name.upper() else r"\s+", value):
            address = _ADDRESS.fullmatch(word)
            found |= {address[3 if address[2] else 1] if address else "", word if is_secret else ""}
    for secret in found:
        has_digit = any(map(str.isdigit, secret))
        for form in {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}:
            n = _LEAST if has_digit else max(len(form), 2 * _LEAST)
            parts.setdefault(n, set()).update(form[at : at + n] for at in range(len(form) - n + 1))
    return {n: {part for part in those if "://" not in part or n > _LEAST} for n, those in parts.items() if those}


def holds_key(name: str) -> bool:
    """Whether a name (of a model, a variable) has the form of a secret, or a word that looks drawn at random."""
    words = re.findall(r"(?=[A-Za-z]*\d)[A-Za-z0-9]{12,}", name)
    return redacted(name) != name or bool(_UUID.search(name)) or any(len(_CHANGE.findall(one)) > 2 for one in words)


def shown(value: str) -> str:
    """A value that somebody gave, for a message."""
    return "(not shown: it looks like a key)" if holds_key(value) else repr(value)


def brief(value: object) -> str:
    """The start of any value, for a message."""
    return redacted(_BRIEF.repr(value))[:40]


def hide_secrets(record: logging.LogRecord) -> bool:
    """A filter of a logger: its messages and tracebacks are redacted."""
    record.msg, record.args = redacted(record.getMessage()), ()
    if record.exc_info:
        record.exc_text, record.exc_info = redacted("".join(traceback.format_exception(*record.exc_info))), None
    return True


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(redacted(super().format(record)))


def log_to_stderr(who: str) -> None:
    """The log of a server or worker process, without secrets and hidden characters. Its level: SEAL_NB_LOG_LEVEL."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SafeFormatter(f"%(asctime)s {who} %(levelname)s %(message)s"))
    logging.basicConfig(level=os.environ.get("SEAL_NB_LOG_LEVEL", "INFO"), handlers=[handler])


class SealError(Exception):
    """Base of all errors that seal_nb raises on purpose. Its texts are redacted."""

    exit_code = 2  # of a command that it ends

    def __init__(self, *texts: object) -> None:
        super().__init__(*(redacted(one) if isinstance(one, str) else one for one in texts))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook: the message with its remedy, then one line for each call that led to it.
        The traceback of the cause is left out; the message names the cause."""
        lines = [visible(f"{type(self).__name__}: {self}"), ""]
        for frame in traceback.extract_tb(self.__traceback__):
            path = Path(frame.filename)
            if _PACKAGE in path.parents:
                lines.append(f"  {path.relative_to(_PACKAGE.parent).as_posix()}:{frame.lineno} in {frame.name}")
            elif "ipykernel_" in frame.filename or frame.filename.startswith("<ipython-input"):
                lines.append(f"  cell, line {frame.lineno}: {redacted(frame.line or '')}")
        return lines


class DataError(SealError, ValueError):
    """A file or record is not what it should be; names the path, the item and the field."""

    def __init__(
        self, problem: str, *, path: str | Path = "", item: int | str | None = None, field: str = "", remedy: str = ""
    ) -> None:
        self.problem, self.item, self.field, self.remedy = redacted(problem), item, field, remedy
        self.path = "" if path == Path() else str(path)
        where = [self.path] if self.path else []
        where += [f"item {item}"] if item is not None else []
        where += [f"field {field!r}"] if field else []
        message = f"{', '.join(where)}: {problem}" if where else problem
        super().__init__(f"{message}; {remedy}" if remedy else message)


def checked(
    validate: Callable[[Any], T], value: object, *, path: str | Path, item: int | str | None = None, field: str = ""
) -> T:
    """What one of pydantic's validations makes of a value from a file; ``field``: where the value is in the item.
    Raises: DataError with item, field and value."""
    from pydantic import ValidationError

    try:
        return validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    place = [at for at in first["loc"] if at != "bool"]  # pydantic names a type of a verdict here, which is no field
    if item is None and place[:1] == ["articles"] and len(place) > 1:
        item, place = place[1], place[2:]
    given = brief(first["input"])
    kind = "value" if "pattern" in first["type"] else first["type"].partition("_")[0]
    problem = f"is {given}, not {_WANTED.get(kind, 'an object')}"
    problem = f"is {given}, which {first['msg']}" if first["type"] == "refused" else problem
    problem = {"missing": "is missing", "empty": "is empty"}.get(first["type"], problem)
    field = (field + "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in place)).removeprefix(".")
    raise DataError(problem, path=path, item=item, field=field, remedy="correct it, or remove the item")


class SettingsError(SealError, ValueError):
    """A setting or parameter is unknown, out of range, or contradicts another one."""


class ProtocolError(SealError, ValueError):
    """A message does not follow the wire format; ``field`` names the offending field, "" if none does."""

    def __init__(self, message: str, *, field: str = "") -> None:
        self.field = field
        super().__init__(message)


class RemoteError(SealError, RuntimeError):
    """The server answered with an error. It is a result of the request: asking again gives it again. ``ename`` and
    ``evalue`` are the remote type and message; the text ends with the remote traceback if the request asked for it.
    ``request_id`` is that of the request, if it had one."""

    def __init__(
        self, message: str, field: str | None = None, traceback: str | None = None, request_id: str | None = None
    ) -> None:
        message = redacted(message)
        self.ename, _, self.evalue = message.partition(": ")
        self.field, self.request_id = field or "", request_id or ""
        super().__init__(f"{message}\n{traceback}" if traceback else message)


class RoundTimeout(SealError, TimeoutError):
    """No reply came within the time given, or no reply of a round came for that long."""


class GradingError(SealError, RuntimeError):
    """A grader could not be made or used. A single answer it could not judge is UNGRADED, not an error."""


class EngineError(SealError, RuntimeError):
    """A text-generation engine failed or returned something unusable; never an empty answer instead."""


class RunMismatch(SealError, ValueError):
    """A run folder or file belongs to other settings, or to another run; it is not overwritten."""

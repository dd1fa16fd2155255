"""The errors of this package: one base class, and one class for each kind of failure.

Every class also inherits the standard-library error that it specialises, for callers that do not know this package. A
message says what happened, with the value, and what to do about it.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_WANTED = {"string": "a text", "int": "a whole number", "bool": "true or false", "float": "a number"}
_WANTED |= {"list": "a list", "tuple": "a list"}
_PACKAGE = Path(__file__).resolve().parent


class SealError(Exception):
    """Base of all errors that seal_nb raises on purpose."""

    exit_code = 2  # of a command that it ends

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook: the message with its remedy, then one line for each call that led to it.
        The traceback of the cause is left out; the message names the cause."""
        lines = [f"{type(self).__name__}: {self}", ""]
        for frame in traceback.extract_tb(self.__traceback__):
            path = Path(frame.filename)
            if _PACKAGE in path.parents:
                lines.append(f"  {path.relative_to(_PACKAGE.parent).as_posix()}:{frame.lineno} in {frame.name}")
            elif "ipykernel_" in frame.filename or frame.filename.startswith("<ipython-input"):
                lines.append(f"  cell, line {frame.lineno}: {frame.line}")
        return lines


class DataError(SealError, ValueError):
    """A file or record is not what it should be; names the path, the item and the field."""

    def __init__(
        self, problem: str, *, path: str | Path = "", item: int | str | None = None, field: str = "", remedy: str = ""
    ) -> None:
        self.problem, self.item, self.field, self.remedy = problem, item, field, remedy
        self.path = "" if path == Path() else str(path)
        where = [self.path] if self.path else []
        where += [f"item {item}"] if item is not None else []
        where += [f"field {field!r}"] if field else []
        message = f"{', '.join(where)}: {problem}" if where else problem
        super().__init__(f"{message}; {remedy}" if remedy else message)


def checked(validate: Callable[[Any], T], value: object, *, path: str | Path, item: int | str | None = None) -> T:
    """What one of pydantic's validations makes of a value from a file. Raises: DataError with item, field and value."""
    from pydantic import ValidationError

    try:
        return validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    place = [at for at in first["loc"] if at != "bool"]  # pydantic names a type of a verdict here, which is no field
    if item is None and place[:1] == ["articles"] and len(place) > 1:
        item, place = place[1], place[2:]
    problem = f"is {repr(first['input'])[:40]}, not {_WANTED.get(first['type'].partition('_')[0], 'an object')}"
    raise DataError(
        {"missing": "is missing", "empty": "is empty"}.get(first["type"], problem),
        path=path,
        item=item,
        field="".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in place).removeprefix("."),
        remedy="correct it, or remove the item",
    )


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

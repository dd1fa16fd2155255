"""Messages in: JSON to records of ``seal_nb.protocol``, or an error that names field, value and remedy."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from seal_nb.errors import ProtocolError
from seal_nb.protocol import (
    Command,
    ErrorReply,
    GenerateReply,
    GenerateRequest,
    Reply,
    Request,
    TTTReply,
    TTTRequest,
)


def read_json(message: bytes) -> dict[str, Any]:
    """The JSON object in ``message``; ProtocolError if it is anything else (NaN is not JSON)."""
    try:
        fields = from_json(message, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(
            f"the message of {len(message)} bytes is not JSON ({error}); send one UTF-8 JSON object"
        ) from error
    if not isinstance(fields, dict):
        raise ProtocolError(f"the message is a JSON {type(fields).__name__}; send one JSON object")
    return fields


def parse_request(message: bytes) -> Request:
    """The request in ``message``. Raises ProtocolError naming field, value and remedy."""
    fields = read_json(message)
    kind = _kind(fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _protocol_error(error, fields) from None


def _kind(fields: dict[str, Any]) -> type[TTTRequest] | type[GenerateRequest] | type[Command]:
    cmd = fields.get("cmd")
    if cmd is not None:
        return GenerateRequest if cmd == "generate" else Command
    if fields.get("train_sequences") is None and fields.get("eval_questions") is None:
        raise ProtocolError(
            "the request has neither train_sequences nor eval_questions nor cmd, but "
            f"{_shown(sorted(fields))}; send one of them",
            field="train_sequences",
        )
    return TTTRequest


def _protocol_error(error: ValidationError, fields: dict[str, Any]) -> ProtocolError:
    first = error.errors(include_url=False, include_context=False)[0]
    where, problem = ".".join(str(step) for step in first["loc"]), first["msg"].removeprefix("Value error, ")
    value: Any = fields
    for step in first["loc"]:
        inside = step in value if isinstance(value, dict) else isinstance(value, list)
        value = value[step] if inside else None
    said = "is missing" if first["type"] == "missing" else f"is {_shown(value)}"
    others = f" ({error.error_count() - 1} more fields are wrong)" if error.error_count() > 1 else ""
    remedy = f"correct {where!r} as docs/protocol.md describes it, or leave it out where it has a default"
    return ProtocolError(f"field {where!r} {said}: {problem}{others}; {remedy}", field=where)


def _shown(value: object, width: int = 80) -> str:
    text = ascii(value) if not isinstance(value, str) or len(value) <= width else ascii(value[:width])
    return text if len(text) <= width else f"{text[:width]}…"


def read_reply(message: bytes) -> Reply | dict[str, Any]:
    """A reply record, or the plain object that a command was answered with."""
    fields = read_json(message)
    kinds: dict[str, type[TTTReply] | type[GenerateReply] | type[ErrorReply]] = {
        "error": ErrorReply, "baseline_accuracy": TTTReply, "token_counts": GenerateReply
    }  # fmt: skip
    for mark, kind in kinds.items():
        if mark in fields:
            names = kind.model_fields.keys()
            known = {name: value for name, value in fields.items() if name in names}
            try:
                return kind.model_validate(known)
            except ValidationError as error:
                raise _protocol_error(error, fields) from None
    return fields

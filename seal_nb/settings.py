"""Dataclasses of settings. Types and bounds are checked when they are made; help texts become options of a command."""

import argparse
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from seal_nb.errors import SettingsError, redacted


class Parser(argparse.ArgumentParser):
    """A parser of a command line whose errors show no secret."""

    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))


def setting(default: Any, text: str = "", *, least: float | None = None) -> Any:
    """A field of settings with its help text and its lower bound."""
    return field(default=default, metadata={"text": text, "least": least})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Raises SettingsError, which names the field, for a value of another type or below its bound."""

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for one in fields(self):
            value, kind, least = getattr(self, one.name), kinds[one.name], one.metadata.get("least")
            if getattr(value, "shape", None) == ():  # a number of numpy, which no record can hold
                value = value.item()
            if kind in (Path, Path | None) and isinstance(value, str):
                value = Path(value)
            _check_kind(one.name, value, kind)
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingsError(f"{one.name}={value}: give a finite number")
            object.__setattr__(self, one.name, value)
            if least is not None and not value >= least:
                raise SettingsError(f"{one.name}={value}: must be at least {least}")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], **settings: Any) -> Self:
        """The settings that ``parameters`` name (a notebook's `globals()`, or the arguments of an experiment), and
        ``settings``, fields that are no parameters. Raises: SettingsError with the name of one of the wrong type."""
        named = {field.name: parameters[field.name] for field in fields(cls) if field.name in parameters}
        return cls(**named | settings)


_KINDS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number such as 32"),
    float: (Real, "a number such as 1e-3"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
    Path: (Path, "a path"),
    Path | None: (Path | None, "a path, or None"),
    Sequence[str]: ((list, tuple), 'a list of texts such as ["q_proj", "v_proj"]'),
}


def _check_kind(name: str, value: Any, kind: Any) -> None:
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise SettingsError(f"{name}={value!r}: known are {', '.join(typing.get_args(kind))}")
        return
    wanted, example = _KINDS.get(kind) or (origin, f"a {origin.__name__}")
    is_right = isinstance(value, wanted) and not (isinstance(value, bool) and kind in (int, float))
    if not is_right or (kind == Sequence[str] and not all(isinstance(one, str) for one in value)):
        raise SettingsError(f"{name}={value!r} is of type {type(value).__name__}; give {example}")

"""What is asked of an OpenAI-compatible service, what comes back, what may go wrong. Connects to nothing."""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values, find_dotenv
from pydantic import BaseModel

from seal_nb.engines.base import Prompt, Sampling
from seal_nb.errors import EngineError, SettingsError


class Refused(EngineError):
    """The service will not do this (4xx); asking again changes nothing. ``status`` is HTTP's."""

    def __init__(self, message: str, *, status: int) -> None:
        self.status = status
        super().__init__(message)


class Unavailable(EngineError):
    """Every attempt met a transient failure; asking again later may help."""


class UnusableReply(EngineError):
    """The service replied, but not with a finished text: junk, no choice, cut off by a filter."""


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Where the service is and how hard it may be pressed. The key itself is never a setting."""

    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"  # a variable of the environment or of .env; "" where no key is needed
    max_parallel: int = 16  # calls at a time
    timeout_s: float = 600.0  # of one attempt; 8192 tokens take minutes
    max_attempts: int = 6  # of one call; being told to slow down (429) is not counted
    first_wait_s: float = 1.0  # before the second attempt; doubled each time
    longest_wait_s: float = 60.0
    patience_s: float = 900.0  # a call that is told to slow down for longer is given up
    token_limit: str = "max_tokens"  # what the service calls it; OpenAI's newer models: max_completion_tokens

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.username or url.password:
            raise SettingsError(
                "base_url holds a user or a password; put the key into the environment instead"
            )
        if url.scheme not in ("http", "https") or not url.hostname:
            raise SettingsError(f"base_url={self.base_url!r}: give http://host:port/v1 or https://host/v1")
        for name in ("max_parallel", "max_attempts"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.timeout_s <= 0:
            raise SettingsError(f"timeout_s={self.timeout_s}: must lie above 0")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One text to ask for: ``prompt`` is a text to be continued, or chat messages to be answered."""

    model: str
    prompt: Prompt
    sampling: Sampling
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # more fields of the request's body


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished text. Token counts are 0 where the service does not say them."""

    text: str
    finish_reason: str  # "stop" or "length"
    n_tokens: int
    n_prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a client has used so far. Replies that were unusable count: they are paid for all the same."""

    n_replies: int = 0
    n_retries: int = 0
    n_prompt_tokens: int = 0
    n_tokens: int = 0

    def cost(self, *, per_million_prompt: float, per_million: float) -> float:
        """In the currency of the two prices, each for a million tokens."""
        return (self.n_prompt_tokens * per_million_prompt + self.n_tokens * per_million) / 1e6


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class TokenCounts(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ReplyBody(BaseModel):
    """What is read of a reply; other fields may be there."""

    choices: list[_Choice]
    usage: TokenCounts | None = None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``retry-after`` asks for, as a number or a date (RFC 9110, 10.2.3), or in milliseconds."""
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value) / per_second
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def api_key(variable: str) -> str:
    """The key in a variable of the environment, else of a ``.env`` here or above. Raises: SettingsError."""
    key = os.environ.get(variable) or dotenv_values(find_dotenv(usecwd=True)).get(variable) or ""
    if not key.strip():
        raise SettingsError(
            f"no key in {variable}: set it in the environment or in a .env file (git ignores that), name "
            'another variable, or "" where no key is needed'
        )
    return key.strip()

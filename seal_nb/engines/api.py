"""An OpenAI-compatible service: one text a call, many calls at once, asked again where that helps.

Engines and judges share this. The official client (https://github.com/openai/openai-python) speaks to any
base URL; added is what concerns many calls together. Asked again, later and later, is what is transient: no
connection, a cut one, a time-out, 429 and 5xx; where the service says ``retry-after``, all calls of the
client wait. Any other 4xx, and a reply without a finished text, is an error at once. An error is never a
text::

    client = ApiClient(ApiSettings(base_url="http://127.0.0.1:8000/v1", api_key_env=""))
    asks = [Ask(model="base", prompt="Once", sampling=Sampling(max_tokens=9))]
    with closing(client.each(asks)) as outcomes:
        for index, outcome in outcomes:  # a Reply, or the EngineError that stands for this one
            ...

What this module does not do: know prompts or verdicts, write files, import torch.

What is asked of an OpenAI-compatible service, what comes back, what may go wrong. Connects to nothing.

Calls to a service that belong together, and what Ctrl-C does to them.

An exception in the middle of handing over would lose an answer that is paid for, and one inside a lock would
leave it locked for ever. So while a round lasts Ctrl-C is only noted: what nobody has begun is not asked,
what is under way is handed over, and then the interrupt is raised. Knows nothing about services and replies.

The engine for any OpenAI-compatible service: OpenAI itself, a vLLM elsewhere, a gateway.

Many requests at a time (`engines.api`), counted and, where prices are given, in money. Such a service offers
models by name and has none of our adapters; a vLLM server that loads adapters is `engines.vllm`.
"""

import itertools
import os
import queue
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar
from urllib.parse import urljoin, urlsplit

import openai
from dotenv import dotenv_values, find_dotenv
from pydantic import BaseModel, ValidationError

from seal_nb.engines.base import Completion, NotAsked, OnText, Prompt, Sampling, adapter_of_each, contents, in_order
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
            raise SettingsError("base_url holds a user or a password; put the key into the environment instead")
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


POLL_S = 0.1  # of those who wait before they ask (again); stopping takes no lock that could wake them
T = TypeVar("T")


class Round(Generic[T]):
    """``n`` calls, whose outcomes come with their index. ``stopped``: the rest is not wanted (any more)."""

    def __init__(self, n: int = 1) -> None:
        self.n = n
        self.stopped = False  # plain: a signal handler must not wait for a lock that its own thread holds
        self.came: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
        self._indices = itertools.count()

    def turns(self) -> Iterator[int]:
        """Indices for whoever has time, each of them to one."""
        while (index := next(self._indices)) < self.n:
            yield index

    def wait(self, seconds: float) -> None:
        """Raises NotAsked as soon as the round is stopped."""
        until = time.monotonic() + seconds
        while not self.stopped:
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(left_s, POLL_S))
        raise NotAsked("not asked: others failed before it, or the run was interrupted")

    @contextmanager
    def interrupt_at_the_end(self) -> Iterator[None]:
        """The first Ctrl-C stops the round and is raised when the block is left, a second one at once."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield  # no interrupts come here, or somebody else deals with them
            return
        interrupted = False

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted
            if interrupted:
                signal.default_int_handler(number, frame)
            interrupted = self.stopped = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if interrupted:
                raise KeyboardInterrupt


LOOPBACK = {"127.0.0.1", "localhost", "::1"}
FINISHED = ("stop", "length")
CONCERNS_ALL = {401, 402, 403, 404}  # key, money, permission, address or model: all calls would hear the same
TRANSIENT = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
OUT_OF_MONEY = "insufficient_quota"  # OpenAI says it with status 429, and waiting does not help
MOST_FAILURES_IN_A_ROW = 16  # or as many as are under way at a time, if that is more
CONNECT_TIMEOUT_S = 10.0
LONGEST_MESSAGE = 400  # characters of what a service says in an error


class _Tries:
    """What one call has gone through."""

    def __init__(self) -> None:
        self.n_failed, self.n_limited, self._started_s = 0, 0, time.monotonic()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._started_s

    def count(self, *, limited: bool) -> int:
        """One more; which one of its kind it is, from 1."""
        if limited:
            self.n_limited += 1
            return self.n_limited
        self.n_failed += 1
        return self.n_failed


class ApiClient:
    """Asks one service; may be used from many threads. ``check`` is called before each attempt and may raise
    an EngineError: who runs the server itself knows that it is gone before any time-out does. ``key``: for
    who has one that is in no variable."""

    def __init__(
        self, settings: ApiSettings, *, key: str | None = None, check: Callable[[], None] | None = None
    ) -> None:
        self.settings, self.check = settings, check
        if key is None:
            key = api_key(settings.api_key_env) if settings.api_key_env else ""
        self._key = key
        self._client = _official_client(settings, self._key)
        self._lock = threading.Lock()
        self._usage = Usage()
        self._held_until_s = 0.0

    @property
    def usage(self) -> Usage:
        return self._usage

    def one(self, ask: Ask) -> Reply:
        """Raises: Refused, Unavailable, UnusableReply."""
        return self._answered(ask, Round())

    def control(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        """What the server says at ``path`` (from its root): GET, or POST with a body. Asked once.

        Raises: Refused with the status of any 4xx or 5xx, Unavailable without a connection.
        """
        url = urljoin(self.settings.base_url, path)
        try:
            if body is None:
                return self._client.get(url, cast_to=str)
            return self._client.post(url, cast_to=str, body=dict(body))
        except openai.APIStatusError as error:
            raise Refused(self._said(str(error)), status=error.status_code) from None
        except openai.APIConnectionError as error:
            raise Unavailable(self._said(f"{path}: {error}")) from None

    def each(self, asks: Sequence[Ask]) -> Generator[tuple[int, Reply | EngineError]]:
        """(index, outcome) as they come, ``max_parallel`` under way at a time, each index once.

        When a failure concerns all, or too many failed in a row, the rest is NotAsked. An interrupt (Ctrl-C)
        does the same, hands over what is under way and may be paid for, and is then raised; a second one ends
        at once.
        """
        calls: Round[Reply | BaseException] = Round(len(asks))
        pool = ThreadPoolExecutor(max_workers=self.settings.max_parallel, thread_name_prefix="ask")
        with calls.interrupt_at_the_end():
            try:
                for _ in range(min(self.settings.max_parallel, len(asks))):
                    pool.submit(self._work, asks, calls)
                yield from self._outcomes(calls)
            finally:
                calls.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, asks: Sequence[Ask], calls: Round[Reply | BaseException]) -> None:
        """One call after another, until none is left to begin."""
        for index in calls.turns():
            try:
                calls.came.put((index, self._answered(asks[index], calls)))
            except BaseException as error:  # noqa: BLE001 - raised by whoever waits for it
                calls.came.put((index, error))

    def _outcomes(self, calls: Round[Reply | BaseException]) -> Iterator[tuple[int, Reply | EngineError]]:
        n_in_a_row, most = 0, max(MOST_FAILURES_IN_A_ROW, self.settings.max_parallel)
        for _ in range(calls.n):
            index, outcome = calls.came.get()
            if not isinstance(outcome, Reply | EngineError):
                raise outcome
            # Who refuses a prompt is alive; the next prompt may be to its liking.
            answered = isinstance(outcome, Reply | Refused)
            n_in_a_row = 0 if answered else n_in_a_row + 1
            for_all = isinstance(outcome, Refused) and outcome.status in CONCERNS_ALL
            if for_all or n_in_a_row > most:
                calls.stopped = True
            yield index, outcome

    def _answered(self, ask: Ask, calls: Round[Any]) -> Reply:
        """The attempts of one call. Errors are not chained: what a service says may show the key."""
        tries = _Tries()
        while True:
            calls.wait(self._held_until_s - time.monotonic())
            if self.check is not None:
                self.check()
            try:
                return self._reply(self._sent(ask))
            except TRANSIENT as error:
                pause_s = self._pause_s(error, tries)
            except openai.APIStatusError as error:
                raise Refused(self._said(str(error)), status=error.status_code) from None
            self._count(n_retries=1)
            calls.wait(pause_s)

    def _sent(self, ask: Ask) -> bytes:
        """One HTTP request; the body of its reply, not yet believed."""
        fields: dict[str, Any] = {
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            self.settings.token_limit: ask.sampling.max_tokens,
        }
        if ask.sampling.stop:
            fields["stop"] = list(ask.sampling.stop)
        if ask.seed is not None:
            fields["seed"] = ask.seed
        fields |= ask.extra
        if isinstance(ask.prompt, str):
            texts = self._client.completions.with_raw_response
            return texts.create(model=ask.model, prompt=ask.prompt, extra_body=fields).content
        chats = self._client.chat.completions.with_raw_response
        messages: Any = [dict(message) for message in ask.prompt]
        return chats.create(model=ask.model, messages=messages, extra_body=fields).content

    def _reply(self, body: bytes) -> Reply:
        try:
            read = ReplyBody.model_validate_json(body)
        except ValidationError:
            shown = body[:LONGEST_MESSAGE].decode(errors="replace")
            raise UnusableReply(self._said(f"no completion but {shown!r}")) from None
        counts = read.usage or TokenCounts()
        n_prompt_tokens, n_tokens = counts.prompt_tokens or 0, counts.completion_tokens or 0
        self._count(n_replies=1, n_prompt_tokens=n_prompt_tokens, n_tokens=n_tokens)
        if len(read.choices) != 1:
            raise UnusableReply(self._said(f"{len(read.choices)} choices where one was asked for"))
        choice = read.choices[0]
        text = choice.message.content if choice.message else choice.text
        if text is None or choice.finish_reason not in FINISHED:
            what = "no text" if text is None else "an unfinished text"
            raise UnusableReply(self._said(f"{what}, finish_reason {choice.finish_reason!r}"))
        return Reply(
            text=text, finish_reason=str(choice.finish_reason), n_tokens=n_tokens, n_prompt_tokens=n_prompt_tokens
        )

    def _pause_s(self, error: openai.APIError, tries: _Tries) -> float:
        """How long to wait before the next attempt; raises where there is to be none.

        A pause that the service asks for holds for all calls. Being told to slow down is no failed attempt.
        """
        said = self._said(str(error))
        if error.code == OUT_OF_MONEY:
            raise Refused(said, status=429) from None
        limited = isinstance(error, openai.RateLimitError)
        nth = tries.count(limited=limited)
        if not limited and nth == self.settings.max_attempts:
            raise Unavailable(f"{said} ({nth} attempts)") from None
        pause_s = min(self.settings.first_wait_s * 2.0 ** (nth - 1), self.settings.longest_wait_s)
        asked_s = retry_after_s(error.response.headers) if isinstance(error, openai.APIStatusError) else None
        pause_s = pause_s if asked_s is None else asked_s
        told_to_wait = limited or asked_s is not None
        if told_to_wait and tries.age_s + pause_s > self.settings.patience_s:
            longer = f"asks to slow down for longer than patience_s={self.settings.patience_s:g}"
            raise Unavailable(f"{said}; {longer}; run again later, what is done is kept") from None
        self._hold(asked_s or 0.0)
        return pause_s * random.uniform(1.0, 1.25)  # calls that failed together come back apart

    def _hold(self, seconds: float) -> None:
        with self._lock:
            self._held_until_s = max(self._held_until_s, time.monotonic() + seconds)

    def _count(self, **more: int) -> None:
        with self._lock:
            added = {name: getattr(self._usage, name) + n for name, n in more.items()}
            self._usage = replace(self._usage, **added)

    def _said(self, message: str) -> str:
        """What the service said, bounded, with its address, without the key, which some repeat."""
        shown = message.replace(self._key, "***") if self._key else message
        shown = re.sub(r"\bsk-[\w*-]+", "***", shown)  # some repeat the two ends of it
        return f"{self.settings.base_url}: {shown[:LONGEST_MESSAGE]}"


def _official_client(settings: ApiSettings, key: str) -> openai.OpenAI:
    timeout = openai.Timeout(settings.timeout_s, connect=min(CONNECT_TIMEOUT_S, settings.timeout_s))
    # A proxy of the environment is for the world, not for a server on this machine.
    is_far = urlsplit(settings.base_url).hostname not in LOOPBACK
    transport = openai.DefaultHttpxClient(trust_env=is_far, timeout=timeout)
    return openai.OpenAI(
        base_url=settings.base_url, api_key=key or "none", timeout=timeout, max_retries=0, http_client=transport
    )


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Of a million tokens, in one currency."""

    prompt: float
    completion: float


class OpenAIEngine:
    """Completes prompts through a service, and counts what that takes.

    chat_only: send a plain prompt as the one message of a chat, as the published texts of GPT-4.1 were made;
    for services that have no other endpoint. Two services under one model name share a ``model_id``.
    """

    def __init__(
        self, settings: ApiSettings, *, model: str, chat_only: bool = False, prices: Prices | None = None
    ) -> None:
        self.client = ApiClient(settings)
        self.model, self.chat_only, self.prices = model, chat_only, prices

    @property
    def model_id(self) -> str:
        return f"openai-{self.model}"

    @property
    def cost(self) -> float | None:
        """Of everything so far; None without prices."""
        if self.prices is None:
            return None
        return self.client.usage.cost(per_million_prompt=self.prices.prompt, per_million=self.prices.completion)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        adapters: Sequence[Path | None] = (),
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """See Engine. Raises: Incomplete, SettingsError for an adapter."""
        if any(adapter_of_each(prompts, adapters)):
            raise SettingsError(f"{self.model_id} cannot load adapters; use the engine local or vllm")
        asks = [
            Ask(model=self.model, prompt=self._sent(prompt), sampling=sampling, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return completed(self.client, asks, on_text)

    def text_of(self, prompt: Prompt) -> str:
        """What is sent; the service's own template is not known here."""
        return contents(prompt)

    def _sent(self, prompt: Prompt) -> Prompt:
        if self.chat_only and isinstance(prompt, str):
            return ({"role": "user", "content": prompt},)
        return prompt


def completed(client: ApiClient, asks: Sequence[Ask], on_text: OnText | None) -> list[Completion]:
    """One completion for each, ``on_text`` told as they come. Raises: Incomplete with those that came."""
    came: dict[int, Completion] = {}
    failures: dict[int, EngineError] = {}
    with closing(client.each(asks)) as outcomes:
        for index, outcome in outcomes:
            if not isinstance(outcome, Reply):
                failures[index] = outcome
                continue
            came[index] = Completion(text=outcome.text, n_tokens=outcome.n_tokens, finish_reason=outcome.finish_reason)
            if on_text is not None:
                on_text(index, came[index])
    return in_order(came, failures)

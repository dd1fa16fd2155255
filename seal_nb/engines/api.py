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
"""

import random
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urljoin, urlsplit

import openai
from pydantic import ValidationError

from seal_nb.engines.api_records import (
    ApiSettings,
    Ask,
    Refused,
    Reply,
    ReplyBody,
    TokenCounts,
    Unavailable,
    UnusableReply,
    Usage,
    api_key,
    retry_after_s,
)
from seal_nb.engines.api_round import Round
from seal_nb.errors import EngineError

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
            text=text,
            finish_reason=str(choice.finish_reason),
            n_tokens=n_tokens,
            n_prompt_tokens=n_prompt_tokens,
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
        base_url=settings.base_url,
        api_key=key or "none",
        timeout=timeout,
        max_retries=0,
        http_client=transport,
    )

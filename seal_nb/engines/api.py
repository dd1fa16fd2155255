"""Texts from an OpenAI-compatible service: OpenAI itself, a vLLM server, a gateway.

The official async client (https://github.com/openai/openai-python) sends the requests and retries after connection
errors, time-outs, 429 and 5xx. Added here is what concerns many requests together: a limit of requests at a time,
patience with rate limits, the end of a round, Ctrl-C. Only a finished text counts as a reply. Engines and judges use
the same client. It runs on one event loop in a thread of its own, so that it works in plain code and in notebooks,
whose event loop is already running.
"""

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import openai
from dotenv import dotenv_values, find_dotenv
from openai import RequestOptions

from seal_nb.engines.base import Completion, NotAsked, OnText, Prompt, Sampling, adapter_of_each, contents, in_order
from seal_nb.errors import EngineError, SettingsError

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
FINISHED = ("stop", "length")
CONCERNS_ALL = {401, 402, 403, 404}  # key, money, permission, address or model: every request would fail alike
OUT_OF_MONEY = "insufficient_quota"  # OpenAI sends it with status 429, and waiting does not help
MOST_FAILURES_IN_A_ROW = 16  # or max_parallel, if that is more
CONNECT_TIMEOUT_S = 10.0
RATE_LIMIT_PAUSE_S = 10.0  # if the service does not say how long to wait
LONGEST_MESSAGE = 400  # characters of a service's message in an error

T = TypeVar("T")


class Refused(EngineError):
    """The service refuses the request, and would refuse it again. ``status`` is the HTTP status."""

    def __init__(self, message: str, *, status: int) -> None:
        self.status = status
        super().__init__(message)


class Unavailable(EngineError):
    """Every attempt failed for a reason that may pass; run again later."""


class UnusableReply(EngineError):
    """The reply has no finished text: not JSON, no choice, cut off by a filter."""


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """The address of a service and how to use it. The key itself is never a setting."""

    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"  # a variable of the environment or of .env; "" if no key is needed
    max_parallel: int = 16  # requests at a time
    timeout_s: float = 600.0  # of one attempt; 8192 tokens take minutes
    max_attempts: int = 6  # of one request; rate limits (429) have patience_s instead
    patience_s: float = 900.0  # a request that is rate-limited for longer is given up
    token_limit: str = "max_tokens"  # the service's name for it; OpenAI's newer models: max_completion_tokens

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
            raise SettingsError(f"timeout_s={self.timeout_s}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request for one text; ``extra`` are more fields of its body."""

    model: str
    prompt: Prompt
    sampling: Sampling
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Usage:
    """What a client has used so far. Unusable replies count, because they are paid for too."""

    n_replies: int = 0
    n_prompt_tokens: int = 0
    n_tokens: int = 0

    def cost(self, *, prompt: float, completion: float) -> float:
        """In the currency of the two prices, each for a million tokens."""
        return (self.n_prompt_tokens * prompt + self.n_tokens * completion) / 1e6


def api_key(variable: str) -> str:
    """The key in a variable of the environment, else of a ``.env`` here or above. Raises: SettingsError."""
    key = os.environ.get(variable) or dotenv_values(find_dotenv(usecwd=True)).get(variable) or ""
    if not key.strip():
        raise SettingsError(
            f"no key in {variable}: set it in the environment or in a .env file (git ignores that), name "
            'another variable, or "" if no key is needed'
        )
    return key.strip()


_starting = threading.Lock()  # `cache` alone would let two threads start two loops


@cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="http requests", daemon=True).start()
    return loop


def _event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all clients of this process."""
    with _starting:
        return _started_loop()


@dataclass
class _Round:
    """Requests of one call of ``ApiClient.each``. A stopped round sends no further request."""

    outcomes: dict[int, Completion | EngineError] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    n_failed_in_a_row: int = 0
    stopped: bool = False


class ApiClient:
    """Sends requests to one service; may be used from many threads.

    Args:
        settings: address and limits.
        key: the API key, if it is not in the variable that the settings name.
        check: is called before each attempt. It may raise an EngineError, such as "the server has ended".
    """

    def __init__(
        self, settings: ApiSettings, *, key: str | None = None, check: Callable[[], None] | None = None
    ) -> None:
        self.settings, self.check, self.usage = settings, check, Usage()
        if key is None:
            key = api_key(settings.api_key_env) if settings.api_key_env else ""
        self._key = key
        timeout = openai.Timeout(settings.timeout_s, connect=min(CONNECT_TIMEOUT_S, settings.timeout_s))
        transport = openai.DefaultAsyncHttpxClient(
            timeout=timeout,
            # A proxy of the environment is not for servers on this machine.
            trust_env=urlsplit(settings.base_url).hostname not in LOOPBACK,
            event_hooks={"request": [self._before_attempt], "response": [self._after_attempt]},
        )
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=key or "none",
            timeout=timeout,
            max_retries=settings.max_attempts - 1,
            http_client=transport,
        )
        self._free = asyncio.Semaphore(settings.max_parallel)
        self._between_attempts: set[asyncio.Task[Any] | None] = set()

    def one(self, ask: Ask) -> Completion:
        """The text of one request. Raises: Refused, Unavailable, UnusableReply."""
        return self._run(self._one(ask))

    def each(self, asks: Mapping[int, Ask], on_text: OnText | None = None) -> dict[int, Completion | EngineError]:
        """The outcome of each request, ``max_parallel`` at a time.

        ``on_text`` is called with each text as it comes, one at a time and in another thread, so that Ctrl-C cannot
        interrupt it. After a failure that concerns all requests, after many failures in a row, and after Ctrl-C no
        further request is sent, and the replies under way are waited for. A second Ctrl-C ends at once.
        """
        round_ = _Round()
        running = asyncio.run_coroutine_threadsafe(self._each(asks, on_text, round_), _event_loop())
        try:
            running.result()
        except KeyboardInterrupt:
            _event_loop().call_soon_threadsafe(self._stop, round_)
            running.result()
            raise
        finally:
            running.cancel()  # does nothing unless this is the second Ctrl-C
        return round_.outcomes

    def control(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        """The server's reply at ``path`` (from its root) to one GET, or to one POST with a body.

        Raises: Refused with the status of any 4xx or 5xx, Unavailable without a connection.
        """
        return self._run(self._control(path, body))

    def _run(self, request: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(request, _event_loop()).result()

    async def _control(self, path: str, body: Mapping[str, Any] | None) -> str:
        url, options = urljoin(self.settings.base_url, path), RequestOptions(max_retries=0)
        try:
            if body is None:
                return await self._client.get(url, cast_to=str, options=options)
            return await self._client.post(url, cast_to=str, body=dict(body), options=options)
        except openai.APIStatusError as error:
            raise Refused(self._shown(str(error)), status=error.status_code) from None
        except openai.APIConnectionError as error:
            raise Unavailable(self._shown(f"{path}: {error}")) from None

    async def _each(self, asks: Mapping[int, Ask], on_text: OnText | None, round_: _Round) -> None:
        calls = (self._outcome(index, ask, on_text, round_) for index, ask in asks.items())
        round_.tasks = {asyncio.create_task(call) for call in calls}
        try:
            await asyncio.gather(*round_.tasks)
        finally:
            for task in round_.tasks:
                task.cancel()

    async def _outcome(self, index: int, ask: Ask, on_text: OnText | None, round_: _Round) -> None:
        outcome: Completion | EngineError = NotAsked("not sent: earlier requests failed, or the user interrupted")
        try:
            async with self._free:
                if not round_.stopped:
                    outcome = await self._answer(ask)
        except EngineError as error:
            outcome = error
        except asyncio.CancelledError:
            if not round_.stopped:
                raise
        finally:
            self._between_attempts.discard(asyncio.current_task())
        round_.outcomes[index] = outcome
        if isinstance(outcome, Completion) and on_text is not None:
            async with round_.saving:
                await asyncio.to_thread(on_text, index, outcome)
        # A service that refuses one prompt still works for the next one.
        is_alive = isinstance(outcome, Completion | Refused)
        round_.n_failed_in_a_row = 0 if is_alive else round_.n_failed_in_a_row + 1
        concerns_all = isinstance(outcome, Refused) and outcome.status in CONCERNS_ALL
        if concerns_all or round_.n_failed_in_a_row > max(MOST_FAILURES_IN_A_ROW, self.settings.max_parallel):
            self._stop(round_)

    def _stop(self, round_: _Round) -> None:
        """Send nothing more. Requests that wait before another attempt are cancelled; the others go on."""
        round_.stopped = True
        for task in round_.tasks & self._between_attempts:
            task.cancel()

    async def _one(self, ask: Ask) -> Completion:
        async with self._free:
            return await self._answer(ask)

    async def _answer(self, ask: Ask) -> Completion:
        """One text. Errors are not chained, because a service's message may hold the key."""
        given_up_s = time.monotonic() + self.settings.patience_s
        is_text = isinstance(ask.prompt, str)
        body = {
            "model": ask.model,
            "prompt" if is_text else "messages": ask.prompt,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            self.settings.token_limit: ask.sampling.max_tokens,
            **({"stop": ask.sampling.stop} if ask.sampling.stop else {}),
            **({} if ask.seed is None else {"seed": ask.seed}),
            **ask.extra,
        }
        path = "/completions" if is_text else "/chat/completions"
        while True:
            try:
                return self._completion(await self._client.post(path, cast_to=str, body=body))
            except openai.RateLimitError as error:
                pause_s = _retry_after_s(error)
                if time.monotonic() + pause_s > given_up_s:
                    limit = f"rate-limited for longer than patience_s={self.settings.patience_s:g}"
                    raise Unavailable(f"{self._shown(str(error))}; {limit}; run again later") from None
                await asyncio.sleep(pause_s)
            except (openai.APIConnectionError, openai.InternalServerError) as error:
                attempts = f"up to {self.settings.max_attempts} attempts"
                raise Unavailable(f"{self._shown(str(error))} ({attempts})") from None
            except openai.APIStatusError as error:
                raise Refused(self._shown(str(error)), status=error.status_code) from None

    async def _before_attempt(self, request: Any) -> None:
        self._between_attempts.discard(asyncio.current_task())
        if self.check is not None:
            self.check()

    async def _after_attempt(self, response: Any) -> None:
        if response.status_code >= 400:
            self._between_attempts.add(asyncio.current_task())
        if response.status_code == 429 and OUT_OF_MONEY.encode() in (body := await response.aread()):
            raise Refused(self._shown(f"429: {body.decode(errors='replace')}"), status=402)

    def _completion(self, raw: str) -> Completion:
        """The text in the body of a reply. Raises: UnusableReply."""
        try:
            body = json.loads(raw)
            counts = body.get("usage") or {}  # some services do not count tokens
            n_tokens, n_prompt_tokens = counts.get("completion_tokens") or 0, counts.get("prompt_tokens") or 0
            self.usage.n_replies += 1
            self.usage.n_tokens += n_tokens
            self.usage.n_prompt_tokens += n_prompt_tokens
            (choice,) = body["choices"]
            text = choice["message"]["content"] if choice.get("message") else choice["text"]
            finish_reason = choice["finish_reason"]
        except (ValueError, KeyError, TypeError, AttributeError):
            text = finish_reason = None
        if not isinstance(text, str) or finish_reason not in FINISHED:
            raise UnusableReply(self._shown(f"the reply holds no finished text: {raw!r}"))
        return Completion(text=text, n_tokens=n_tokens, finish_reason=finish_reason)

    def _shown(self, message: str) -> str:
        """A service's message with its address, shortened, and without the key, which some services repeat."""
        shown = message.replace(self._key, "***") if self._key else message
        shown = re.sub(r"\bsk-[\w*-]+", "***", shown)  # some repeat the two ends of a key
        return f"{self.settings.base_url}: {shown[:LONGEST_MESSAGE]}"


def _retry_after_s(error: openai.APIStatusError) -> float:
    try:
        return max(0.0, float(error.response.headers.get("retry-after", "")))
    except ValueError:
        return RATE_LIMIT_PAUSE_S


class OpenAIEngine:
    """Completes prompts through a service.

    Args:
        settings: address and limits.
        model: the service's name for the model. Two services with one model name share a ``model_id``.
        chat_only: send a plain prompt as the one message of a chat, as the published texts of GPT-4.1 were made; for
            services without a completions endpoint.
    """

    def __init__(self, settings: ApiSettings, *, model: str, chat_only: bool = False) -> None:
        self.client, self.model, self.chat_only = ApiClient(settings), model, chat_only

    @property
    def model_id(self) -> str:
        return f"openai-{self.model}"

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        adapters: Sequence[Path | None] = (),
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """See Engine. Raises: SettingsError for an adapter, which a service cannot load."""
        if any(adapter_of_each(prompts, adapters)):
            raise SettingsError(f"{self.model_id} cannot load adapters; use the engine local or vllm")
        asks = {
            index: Ask(model=self.model, prompt=self._sent(prompt), sampling=sampling, seed=seed)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        }
        return in_order(self.client.each(asks, on_text))

    def text_of(self, prompt: Prompt) -> str:
        """The text that is sent; the service's own template is unknown."""
        return contents(prompt)

    def _sent(self, prompt: Prompt) -> Prompt:
        return ({"role": "user", "content": prompt},) if self.chat_only and isinstance(prompt, str) else prompt

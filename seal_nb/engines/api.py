"""Texts from an OpenAI-compatible service: OpenAI itself, a vLLM server, a gateway.

The official client sends the requests. Added here: other attempts after failures that may pass, patience with rate
limits, the end of a round, Ctrl-C. Only a finished text counts as a reply. Engines and judges use the same client.
"""

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import openai
from dotenv import dotenv_values

from seal_nb.engines.base import Ask, Completion, Engine, NotAsked, OnText
from seal_nb.errors import PUT_AWAY, EngineError, SettingsError, hide_secrets, holds_key, keep_secret, redacted, shown
from seal_nb.processes import DaemonThreads
from seal_nb.settings import Settings, setting

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
FINISHED = ("stop", "length")
CONCERNS_ALL = {401, 402, 403, 404}  # key, money, permission, address or model: every request would fail alike
OUT_OF_MONEY = "insufficient_quota"  # OpenAI sends it with status 429, and waiting does not help
MOST_FAILURES_IN_A_ROW = 16  # or max_parallel, if that is more
CONNECT_TIMEOUT_S = 10.0
MAY_PASS = {408, 409, 429}  # and 5xx
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # after a failure, if the service does not say how long to wait
LONGEST_ASKED_S = 60.0  # pause that a service with a fault may ask for; for rate limits patience_s counts
LONGEST_MESSAGE = 400  # characters of a service's message in an error
LONGEST_BODY = 2**16  # characters of it that are looked through for the key
DOTENV = Path(__file__).resolve().parents[2] / ".env"  # of the project; that of another folder may be anybody's
_CONVENTIONAL = re.compile(r"[A-Z][A-Z0-9]{0,15}|[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)+")
for _name in ("connection", "http11", "http2", "proxy", "socks"):  # a reply's headers may repeat the key
    logging.getLogger(f"httpcore2.{_name}").addFilter(hide_secrets)
for _name in ("httpx2", "openai._base_client", "openai._response", "openai._legacy_response"):
    logging.getLogger(_name).addFilter(hide_secrets)


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
class ApiSettings(Settings):
    """The address of a service and how to use it. The key itself is never a setting."""

    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"  # a variable of the environment or of .env; "" if no key is needed
    max_parallel: int = setting(16, least=1)  # requests at a time
    timeout_s: float = 600.0  # of one attempt; 8192 tokens take minutes
    max_attempts: int = setting(6, least=1)  # of one request; rate limits (429) have patience_s instead
    patience_s: float = 900.0  # a request that is rate-limited for longer is given up
    token_limit: str = "max_tokens"  # the service's name for it; OpenAI's newer models: max_completion_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if set("@?#") & set(self.base_url) or redacted(self.base_url) != self.base_url:
            raise SettingsError(f"base_url holds a user, a password, a key or a query; {PUT_AWAY}")
        try:
            url = urlsplit(self.base_url)
            is_address = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
        except ValueError:  # its text would show the address
            is_address = False
        if not is_address or not self.base_url.isprintable():
            raise SettingsError(f"base_url={shown(self.base_url)}: give http://host:port/v1 or https://host/v1")
        if self.api_key_env and not _names_variable(self.api_key_env):
            raise SettingsError(
                "api_key_env is not the name of an environment variable (it is not shown, as it may be the key "
                f"itself); {PUT_AWAY}"
            )
        if not re.fullmatch("[a-z_]{1,40}", self.token_limit):
            raise SettingsError("token_limit is no name of a field; give max_tokens or max_completion_tokens")
        if not self.timeout_s > 0:
            raise SettingsError(f"timeout_s={self.timeout_s}: must be above 0")

    @property
    def where(self) -> str:
        """The address, for messages; without its path if that looks like a key."""
        return "://".join(urlsplit(self.base_url)[:2]) if holds_key(self.base_url) else self.base_url


def _names_variable(name: str) -> bool:
    """One that is set, or a name as variables have it. No key is the name of a variable that is set."""
    if name in os.environ or name in dotenv_values(DOTENV):
        return True
    return bool(_CONVENTIONAL.fullmatch(name)) and not holds_key(name)


@dataclass(kw_only=True)
class Usage:
    """What a client has used so far. Unusable replies count, because they are paid for too."""

    n_replies: int = 0
    n_prompt_tokens: int = 0
    n_tokens: int = 0


def api_key(variable: str) -> str:
    """The key in a variable of the environment, else of ``.env`` in the project folder. Raises: SettingsError."""
    key = (os.environ.get(variable) or dotenv_values(DOTENV).get(variable) or "").strip()
    if not key:
        raise SettingsError(
            f"no key in {variable}: set it in the environment or in the file .env of the project folder (git ignores "
            'that), name another variable in api_key_env, or "" if no key is needed'
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError(f"the key in {variable} has a space or another character that no key has; set it again")
    return keep_secret(key)


class ApiClient:
    """Sends requests to one service; may be used from many threads. ``key``: if it is not in the variable that the
    settings name. ``check`` is called before each attempt; it may raise an EngineError ("the server has ended")."""

    def __init__(
        self, settings: ApiSettings, *, key: str | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        self.settings, self.check, self.usage = settings, check, Usage()
        self.threads, self._counting = DaemonThreads(settings.max_parallel), threading.Lock()
        if key is None:
            key = api_key(settings.api_key_env) if settings.api_key_env else ""
        self._key = keep_secret(key)
        timeout = openai.Timeout(settings.timeout_s, connect=min(CONNECT_TIMEOUT_S, settings.timeout_s))
        # A proxy of the environment is not for servers on this machine.
        trust_env = urlsplit(settings.base_url).hostname not in LOOPBACK
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=key or "none",
            max_retries=0,  # `one` repeats: it can be stopped, and waits longer for a rate limit
            timeout=timeout,
            # A redirect would take the prompts, and perhaps the key, to another service.
            http_client=openai.DefaultHttpxClient(timeout=timeout, trust_env=trust_env, follow_redirects=False),
        )

    def each(self, asks: Mapping[int, Ask], on_text: OnText | None = None) -> dict[int, Completion | EngineError]:
        """The outcome of each request, ``max_parallel`` at a time. ``on_text`` is called one at a time and in another
        thread, so that Ctrl-C cannot interrupt it. After the failures that a ``Round`` names and after Ctrl-C no
        further request is sent, and the replies under way are waited for. A second Ctrl-C ends at once."""
        sent, one_at_a_time = Round(self), threading.Lock()

        def outcome(index: int, ask: Ask) -> Completion | EngineError:
            try:
                found = sent.one(ask)
            except EngineError as error:
                return error
            if on_text is not None:
                try:
                    with one_at_a_time:
                        on_text(index, found)
                except BaseException:
                    sent.stopped.set()
                    raise
            return found

        calls: dict[int, Future[Completion | EngineError]] = {}
        try:
            for index, ask in asks.items():
                calls[index] = self.threads.submit(partial(outcome, index, ask))
            return {index: call.result() for index, call in calls.items()}
        except BaseException:
            sent.stopped.set()
            wait([call for call in calls.values() if not call.cancel()])
            raise

    def control(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        """The server's reply at ``path`` (from its root) to one GET, or to one POST with a body.
        Raises: Refused with the status of any 4xx or 5xx, Unavailable without a connection."""
        url = urljoin(self.settings.base_url, path)
        try:
            if body is None:
                return self._client.get(url, cast_to=str)
            return self._client.post(url, cast_to=str, body=dict(body))
        except openai.APIStatusError as error:
            failed: EngineError = Refused(self._shown(str(error)), status=error.status_code)
        except openai.APIConnectionError as error:
            failed = Unavailable(self._shown(f"{path}: {error}"))
        raise failed  # not chained: the cause holds the request with the key

    def one(self, ask: Ask, stopped: threading.Event | None = None) -> Completion:
        """The text of one request; ``stopped`` ends its attempts. Errors are not chained, because a service's message
        may hold the key. Raises: Refused, Unavailable, UnusableReply, NotAsked."""
        stopped = stopped or threading.Event()
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
        given_up_s, n_failed, pause_s = time.monotonic() + self.settings.patience_s, 0, FIRST_PAUSE_S
        while not stopped.is_set():
            self.check()
            try:
                return self._completion(self._client.post(path, cast_to=str, body=body))
            except openai.APIConnectionError as error:
                told, status, retry_after = self._shown(str(error)), 0, ""
            except openai.APIStatusError as error:
                told, status = self._shown(str(error)), error.status_code
                retry_after = error.response.headers.get("retry-after", "")
                if status == 429 and OUT_OF_MONEY in error.response.text:
                    status = 402
            if status and status not in MAY_PASS and status < 500:
                hint = "; redirects are not followed: give the new address as base_url" if status < 400 else ""
                raise Refused(f"{told}{hint}", status=status)
            is_seconds = re.fullmatch(r"\d+(\.\d+)?", retry_after)  # it may be a date
            wait_s = float(retry_after) if is_seconds else pause_s * random.uniform(0.75, 1)
            if status != 429:
                wait_s = min(wait_s, LONGEST_ASKED_S)
            elif time.monotonic() + wait_s > given_up_s:
                limit = f"rate-limited for longer than patience_s={self.settings.patience_s:g}"
                raise Unavailable(f"{told}; {limit}; run again later")
            n_failed += status != 429
            if n_failed == self.settings.max_attempts:
                raise Unavailable(f"{told} ({n_failed} attempts)")
            stopped.wait(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise NotAsked("not sent: earlier requests failed, or the user interrupted")

    def _completion(self, raw: str) -> Completion:
        """The text in the body of a reply. Raises: UnusableReply."""
        try:
            body = json.loads(raw)
            counts = body.get("usage") or {}  # some services do not count tokens
            n_tokens, n_prompt_tokens = counts.get("completion_tokens") or 0, counts.get("prompt_tokens") or 0
            with self._counting:
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
        # Answers are never changed, and no text of a usual answer has 16 characters in common with a key.
        if any(self._key[at : at + 16] in text for at in range(len(self._key) - 15)):
            raise UnusableReply(self._shown("the reply repeats the key"))
        return Completion(text=text, n_tokens=n_tokens, finish_reason=finish_reason)

    def _shown(self, message: str) -> str:
        """A service's message with its address, shortened, and without the key, which some services repeat."""
        return f"{self.settings.where}: {redacted(message[:LONGEST_BODY])[:LONGEST_MESSAGE]}"


class Round:
    """Requests of a client that stop together, from many threads: after a failure that concerns all of them, and after
    many failures in a row. Setting ``stopped`` stops them too."""

    def __init__(self, client: ApiClient) -> None:
        self.client, self.stopped, self._counting = client, threading.Event(), threading.Lock()
        self._n_failed_in_a_row, self._most = 0, max(MOST_FAILURES_IN_A_ROW, client.settings.max_parallel)

    def one(self, ask: Ask) -> Completion:
        """See ApiClient. Raises: NotAsked once the requests have stopped."""
        try:
            found = self.client.one(ask, self.stopped)
        except EngineError as error:
            # A service that refuses one prompt still works for the next one.
            self._count(has_failed=not isinstance(error, Refused))
            if isinstance(error, Refused) and error.status in CONCERNS_ALL:
                self.stopped.set()
            raise
        self._count(has_failed=False)
        return found

    def _count(self, *, has_failed: bool) -> None:
        with self._counting:
            self._n_failed_in_a_row = self._n_failed_in_a_row + 1 if has_failed else 0
            if self._n_failed_in_a_row > self._most:
                self.stopped.set()


class OpenAIEngine(Engine):
    """Completes prompts through a service. Two services with one model name share a ``model_id``. The text of a chat is
    its messages, because the service's own template is unknown."""

    def __init__(self, settings: ApiSettings, *, model: str) -> None:
        self.client, self.model, self.model_id = ApiClient(settings), model, f"openai-{model}"

    def outcomes(self, asks: Sequence[Ask], on_text: OnText | None) -> Mapping[int, Completion | EngineError]:
        """See Engine. Raises: SettingsError for an adapter, which a service cannot load."""
        if any(ask.adapter for ask in asks):
            raise SettingsError(f"{self.model_id} cannot load adapters; use the engine local or vllm")
        return self.client.each({i: replace(ask, model=self.model) for i, ask in enumerate(asks)}, on_text)

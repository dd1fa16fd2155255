"""Texts from an OpenAI-compatible service: OpenAI itself, a vLLM server, a gateway.

The official client sends the requests. Added here: other attempts after failures that may pass, patience with rate
limits, parameters that a service refuses, the end of a round, Ctrl-C. Only a finished text counts as a reply; what a
model thinks before it is cut off. Engines and judges use the same client."""

import contextlib
import json
import logging
import math
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
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import openai
from dotenv import dotenv_values

from seal_nb import errors
from seal_nb.engines.base import Ask, Completion, CutOff, Engine, NotAsked, OnText, UnusableReply, without_thinking
from seal_nb.errors import EngineError, SettingsError, pattern, redacted, shown
from seal_nb.processes import DaemonThreads
from seal_nb.settings import Settings, setting

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
CUT = re.compile(r"(?i)(model_)?length|max_\w*tokens")  # finish reasons of texts that reached the limit
UNFINISHED = pattern("unfinished")  # those of what is no text
CONCERNS_ALL = {401, 402, 403, 404, 405}  # key, money, permission, address or model: every request would fail alike
OUT_OF_MONEY = pattern("out_of_money")
MOST_FAILURES_IN_A_ROW = 16  # or max_parallel, if that is more
CONNECT_TIMEOUT_S = 10.0
MAY_PASS = {408, 409, 424, 425, 429}  # and 5xx; 424: text-generation-inference's "failed during generation"
LIMITS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}  # the other name
_NEEDED = {"model", "prompt", "messages", "add_special_tokens"}
_INSTEAD = {"seed": "the same text may not come again", "stop": "texts are cut here"}
_PLAIN = {"temperature": (0, 1), "top_p": (1,)}  # values that say little, and that some services refuse
_NAME = r"(?i)(?<![\w-]){0}(?![\w-])(?:(?<!stop)|(?<=[`'\"]stop)|(?<=: stop)|(?<=er stop))"  # "stop" is a word, too
_UNSUPPORTED, _VALUE = pattern("unsupported"), pattern("refused_value")
_DEFAULT = re.compile(r"(?i)(?:only|default)[^.\d\"]{0,30}(\d+(?:\.\d+)?)")
HAS_VERSION, ADD_V1 = re.compile(r"/v\d|/deployments/"), "most services want /v1 at the end of base_url"
_QUERY = re.compile(r"[A-Za-z][A-Za-z_.-]{0,29}=(?:\d{4}-\d\d-\d\d(?:-[a-z]{1,9})?|[\w.-]{1,7})")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # after a failure, if the service does not say how long to wait
LONGEST_ASKED_S = 60.0  # pause that a service with a fault may ask for; for rate limits patience_s counts
LONGEST_MESSAGE = 400  # characters of a service's message in an error
LONGEST_BODY = 2**16  # characters of it that are looked through for the key
DOTENV = Path(__file__).resolve().parents[2] / ".env"  # of the project; that of another folder may be anybody's
log = logging.getLogger(__name__)
_CONVENTIONAL = re.compile(r"[A-Z][A-Z0-9]{0,15}|[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)+")
_PARTS = [f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")]
for _name in ("httpx2", "openai._base_client", "openai._response", "openai._legacy_response", *_PARTS):
    logging.getLogger(_name).addFilter(errors.hide_secrets)  # a reply's headers may repeat the key


class Refused(EngineError):
    """The service refuses the request. ``status``: of HTTP; ``body``: of its reply; ``pause_s``: that it asks for."""

    def __init__(self, message: str, *, status: int, body: str = "", pause_s: float | None = None) -> None:
        self.status, self.body, self.pause_s = status, body, pause_s
        super().__init__(message)


class Unavailable(EngineError):
    """Every attempt failed for a reason that may pass; run again later."""


@dataclass(frozen=True, kw_only=True)
class ApiSettings(Settings):
    """The address of a service and how to use it. The key itself is never a setting."""

    base_url: str = "https://api.openai.com/v1"  # may end with a query such as ?api-version=2024-10-21
    api_key_env: str = "OPENAI_API_KEY"  # a variable of the environment or of .env; "" if no key is needed
    max_parallel: int = setting(16, least=1)  # requests at a time
    timeout_s: float = 600.0  # of one attempt; 8192 tokens take minutes
    max_attempts: int = setting(6, least=1)  # of one request; rate limits (429) have patience_s instead
    patience_s: float = 900.0  # a request that is rate-limited for longer is given up
    token_limit: str = "max_tokens"  # the service's name for it; the other one is tried if it refuses this one

    def __post_init__(self) -> None:
        super().__post_init__()
        query = self.base_url.split("?", 1)[1:]
        is_plain = all(_QUERY.fullmatch(one) for one in "&".join(query).split("&") if query)
        if set("@#") & set(self.base_url) or redacted(self.base_url) != self.base_url or not is_plain:
            what = "a user, a password, a key, or a query with more than short values or a version"
            raise SettingsError(f"base_url holds {what} such as ?api-version=2024-10-21; {errors.PUT_AWAY}")
        try:
            url = urlsplit(self.base_url)
            is_address = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
        except ValueError:  # its text would show the address
            is_address = False
        if not is_address or not self.base_url.isprintable() or " " in self.base_url:
            raise SettingsError(f"base_url={shown(self.base_url)}: give http://host:port/v1 or https://host/v1")
        if self.api_key_env and not _names_variable(self.api_key_env):
            raise SettingsError(
                "api_key_env is not the name of an environment variable (it is not shown, as it may be the key "
                f"itself); {errors.PUT_AWAY}"
            )
        if not re.fullmatch("[a-z_]{1,40}", self.token_limit):
            raise SettingsError("token_limit is no name of a field; give max_tokens or max_completion_tokens")
        if not self.timeout_s > 0:
            raise SettingsError(f"timeout_s={self.timeout_s}: must be above 0")

    @property
    def where(self) -> str:
        """The address, for messages; without its path if that looks like a key."""
        return "://".join(urlsplit(self.base_url)[:2]) if errors.holds_key(self.base_url) else self.base_url

    @property
    def address(self) -> str:
        """What paths of the API are added to: without query, and without the last path, which people paste too."""
        return re.sub(r"/+((chat/)?completions)?/*$", "", self.base_url.partition("?")[0])


def _names_variable(name: str) -> bool:
    """One that is set, or a name as variables have it. No key is the name of a variable that is set."""
    if name in os.environ or name in dotenv_values(DOTENV):
        return True
    return bool(_CONVENTIONAL.fullmatch(name)) and not errors.holds_key(name)


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
    return errors.keep_secret(key)


class ApiClient:
    """Sends requests to one service; may be used from many threads. ``key``: if it is not in the variable that the
    settings name. ``check`` is called before each attempt; it may raise an EngineError ("the server has ended")."""

    def __init__(
        self, settings: ApiSettings, *, key: str | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        self.settings, self.check = settings, check
        # So far. Unusable replies count, because they are paid for too.
        self.usage = SimpleNamespace(n_replies=0, n_prompt_tokens=0, n_tokens=0)
        self.threads, self._counting = DaemonThreads(settings.max_parallel), threading.Lock()
        self._refused: dict[str, dict[str, str]] = {}  # by model: parameters it refuses, and their other name or ""
        if key is None:
            key = api_key(settings.api_key_env) if settings.api_key_env else ""
        self._key = errors.keep_secret(key)
        timeout = openai.Timeout(settings.timeout_s, connect=min(CONNECT_TIMEOUT_S, settings.timeout_s))
        host = urlsplit(settings.base_url).hostname or ""
        # A proxy of the environment is not for servers on this machine.
        trust_env = host not in LOOPBACK
        # Azure takes its keys in a header of its own, and tokens of its sign-in (JWT) as others do.
        is_azure, is_key = host.endswith(".azure.com"), bool(key) and key[:3] != "eyJ"
        headers: dict[str, Any] = {"Authorization": openai.Omit()} if is_azure and is_key else {}
        headers |= {"api-key": key} if is_key and (is_azure or "api-version=" in settings.base_url) else {}
        self._options: Any = {"headers": headers}
        self._client = openai.OpenAI(
            base_url=settings.address,
            default_query=dict(parse_qsl(urlsplit(settings.base_url).query)),
            api_key=key or "none",
            max_retries=0,  # `one` repeats: it can be stopped, and waits longer for a rate limit
            timeout=timeout,
            # A redirect would take the prompts, and perhaps the key, to another service.
            http_client=openai.DefaultHttpxClient(timeout=timeout, trust_env=trust_env, follow_redirects=False),
        )

    def each(self, asks: Mapping[int, Ask], on_text: OnText = lambda *_: None) -> dict[int, Completion | EngineError]:
        """The outcome of each request, ``max_parallel`` at a time. ``on_text`` is called one at a time and in another
        thread, so that Ctrl-C cannot interrupt it. After the failures that a ``Round`` names and after Ctrl-C no
        further request is sent, and the replies under way are waited for. A second Ctrl-C ends at once."""
        sent, one_at_a_time = Round(self), threading.Lock()

        def outcome(index: int, ask: Ask) -> Completion | EngineError:
            try:
                found = sent.one(ask)
            except EngineError as error:
                return error
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
        """The server's reply at ``path`` (from where its /v1 is) to one GET, or to one POST with a body.
        Raises: Refused with the status of any 4xx or 5xx, Unavailable without a connection."""
        return self._reply(self.settings.address.removesuffix("/v1") + path, body, what=f"{path}: ")

    def _reply(self, url: str, body: Mapping[str, Any] | None, *, what: str = "") -> str:
        try:
            if body is None:
                return self._client.get(url, cast_to=str, options=self._options)
            return self._client.post(url, cast_to=str, body=dict(body), options=self._options)
        except openai.APIStatusError as error:
            raw, pause_s = error.response.text, self._client._parse_retry_after_header(error.response.headers)
            told = self._shown(f"{what}{error}" if " - " in str(error) else f"{what}{error} - {raw}")
            failed: EngineError = Refused(told, status=error.status_code, body=raw, pause_s=pause_s)
        except openai.APIConnectionError as error:
            failed = Unavailable(self._shown(f"{what}{error}"))
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
            known = self._refused.get(ask.model, {})
            sent = {known.get(name, name): value for name, value in body.items() if known.get(name, name)}
            try:
                found = self._completion(self._reply(path, sent), ask.sampling.stop, ask.sampling.max_tokens)
                return replace(found, not_sent=tuple(name for name in body if not known.get(name, name)))
            except Refused as error:
                told, status, raw, asked_s = str(error), error.status, error.body, error.pause_s
            except Unavailable as error:
                told, status, raw, asked_s = str(error), 0, "", None
            if status in (400, 429) and OUT_OF_MONEY.search(raw):
                status = 402
            if status in (400, 422) and self._learn(sent, raw):
                continue
            if status and status not in MAY_PASS and status < 500:
                raise Refused(told + self._hint(status, path), status=status)
            wait_s = asked_s if asked_s and 0 < asked_s < math.inf else pause_s * random.uniform(0.75, 1)
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

    def _learn(self, sent: Mapping[str, Any], told: str) -> bool:
        """Whether a refusal names a parameter that the service does not know; from now on it is left out or renamed. A
        refusal of a value (too large, out of range) is an error, unless the value is none that a user chooses."""
        with contextlib.suppress(ValueError):  # what it repeats of the request is no reason
            parts = json.loads(told, object_hook=lambda part: {name: part[name] for name in part if name != "input"})
            told = json.dumps(parts, ensure_ascii=False)
        names = [name for name in sent if name in LIMITS or name not in {*_NEEDED, self.settings.token_limit}]
        for part in re.split(r"(?<=[.;])\s(?!Only )|(?:\\n|\n)(?! )", told[:LONGEST_BODY]):
            found = [(at.start(), name) for name in names if (at := re.search(_NAME.format(name), part))]
            name = (max if re.search(r"both\b|nly one of", part) else min)(found, default=(0, ""))[1]
            is_plain = sent.get(name) in _PLAIN.get(name, ())
            if not name or not (is_plain if _VALUE.search(part) else _UNSUPPORTED.search(part)):
                continue
            other = LIMITS.get(name, "")
            with self._counting:
                known = self._refused.get(sent["model"], {})
                if name in known or other in known:  # by another thread since this request; or both names are refused
                    return name in known
                self._refused[sent["model"]] = known | {name: other}
            default = _DEFAULT.search(told)
            instead = _INSTEAD.get(name) or f"the service uses {default[1] if default else 'its own value'}"
            does = f"sent as {other}" if other else f"left out: {instead}"
            log.warning(self._shown(f"model {sent['model']} refuses {name}={sent[name]!r}; from now on it is {does}"))
            return True
        return False

    def _hint(self, status: int, path: str) -> str:
        """What to do about a refusal that may come from the address."""
        if status not in (404, 405):
            return "; redirects are not followed: give the new address as base_url" if status < 400 else ""
        asked = f"{self.settings.address}{path}{''.join(self.settings.base_url.partition('?')[1:])}"
        remedy = "check model and base_url" if HAS_VERSION.search(asked) else ADD_V1
        return f"; {remedy}" if errors.holds_key(asked) else f"; asked was {asked}: {remedy}"

    def _completion(self, raw: str, stop: Sequence[str] = (), max_tokens: int = 0) -> Completion:
        """The text in the body of a reply. Raises: UnusableReply; Refused for an error that came with status 200."""
        try:
            body = json.loads(raw)
            counts = body.get("usage") or {}  # some services do not count tokens
            n_tokens, n_prompt_tokens = counts.get("completion_tokens") or 0, counts.get("prompt_tokens") or 0
            with self._counting:
                self.usage.n_replies += 1
                self.usage.n_tokens += n_tokens
                self.usage.n_prompt_tokens += n_prompt_tokens
            if not body.get("choices"):
                status = 422 if body.get("error_type") == "validation" else int(body["error"]["code"])
                if 400 <= status < 600:
                    raise Refused(self._shown(raw), status=status, body=raw)
            (choice,) = body["choices"]
            message = choice.get("message") or {}
            text = message["content"] if message else choice["text"]
            if isinstance(text, list):  # of parts: thinking and texts
                text = "".join(part["text"] for part in text if part["type"] == "text")
            reason, answer = str(choice.get("finish_reason") or ""), without_thinking(text or "")
            is_cut, is_usable = CUT.fullmatch(reason), not UNFINISHED.search(reason) and not message.get("refusal")
            if not answer.strip():  # an empty text is one if nothing was thought and nothing cut
                if is_cut:
                    raise CutOff(self.settings.where, max_tokens)
                has_thought = text != answer or message.get("reasoning_content") or message.get("reasoning")
                is_usable = reason == "stop" and not has_thought
        except (ValueError, KeyError, TypeError, AttributeError):
            is_usable = False
        if not is_usable:
            told = self._shown(f"the reply holds no finished text: {raw!r}")
            is_page = "; a web page: base_url is not that of the API" if raw.lstrip()[:1] == "<" else ""
            raise UnusableReply(told + is_page + ("" if HAS_VERSION.search(self.settings.address) else f"; {ADD_V1}"))
        # Answers are never changed, and no text of a usual answer has 16 characters in common with a key.
        if any(self._key[at : at + 16] in answer for at in range(len(self._key) - 15)):
            raise UnusableReply(self._shown("the reply repeats the key"))
        ends = [at for one in stop if (at := answer.find(one)) >= 0]  # some services keep the stop text
        finish_reason = "length" if is_cut and not ends else "stop"
        return Completion(text=answer[: min(ends, default=None)], n_tokens=n_tokens, finish_reason=finish_reason)

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

    def outcomes(self, asks: Sequence[Ask], on_text: OnText) -> Mapping[int, Completion | EngineError]:
        """See Engine. Raises: SettingsError for an adapter, which a service cannot load."""
        if any(ask.adapter for ask in asks):
            raise SettingsError(f"{self.model_id} cannot load adapters; use the engine local or vllm")
        return self.client.each({i: replace(ask, model=self.model) for i, ask in enumerate(asks)}, on_text)

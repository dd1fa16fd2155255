"""A language model as grader: the published yes/no question, put to any OpenAI-compatible service.

SEAL (arXiv 2506.10943) takes its verdicts from GPT-4.1 in this way, one call after another, and counts an
outage as "wrong". Here many calls run at a time, transient failures are tried again (``engines.api``), a
reply is kept on disk so that no answer is paid for twice, and what gets no plain yes or no is UNGRADED. A
failed call is not kept: grading again asks again.

    make_grader("judge:gpt-4.1")
    make_grader("judge:qwen2.5-7b-instruct?base_url=http://127.0.0.1:8000/v1&api_key_env=")
"""

import logging
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from seal_nb.engines.api import CONCERNS_ALL, ApiClient
from seal_nb.engines.api_records import ApiSettings, Ask, Refused
from seal_nb.engines.base import Sampling
from seal_nb.errors import EngineError, SettingsError
from seal_nb.grading.reply_cache import Record, ReplyCache
from seal_nb.grading.threads import GradingThreads
from seal_nb.grading.verdicts import Answered, Verdict
from seal_nb.models import cache_dir
from seal_nb.prompts import grading_prompt
from seal_nb.runs import content_id

log = logging.getLogger(__name__)

TOLD_FAILURES = 10  # kinds of failures that are logged; an outage says the same again and again
_YES_OR_NO = re.compile(r"\b(yes|no)\b")
_IN_WORDS = {frozenset({"yes"}): Verdict.CORRECT, frozenset({"no"}): Verdict.INCORRECT}


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Which model judges. Its name should say which weights: the cache goes by it and the service."""

    model: str = "gpt-4.1"  # published
    max_tokens: int = 16  # of a reply; "yes" needs one, a model that argues first needs more
    cache_dir: Path = field(default_factory=lambda: cache_dir() / "judge")
    api: ApiSettings = field(default_factory=lambda: ApiSettings(timeout_s=60.0))

    def __post_init__(self) -> None:
        if not self.model:
            raise SettingsError("the judge has no model; write judge:MODEL, such as judge:gpt-4.1")


def judge_settings(name: str) -> JudgeSettings:
    """From ``judge:MODEL?field=value&…``; fields are those of JudgeSettings and ApiSettings.

    One text, because it travels through command lines and notebook parameters. Raises: SettingsError.
    """
    model, _, options = name.removeprefix("judge").removeprefix(":").partition("?")
    try:
        given = dict(parse_qsl(options, keep_blank_values=True, strict_parsing=bool(options)))
    except ValueError as error:
        raise SettingsError(
            f"grader is {name!r}: {error}; write judge:MODEL?field=value&field=value"
        ) from error
    own: dict[str, Any] = {"model": model} if name.startswith("judge:") else {}
    api: dict[str, Any] = {"timeout_s": 60.0}
    kinds = {one.name: type(one.default) for one in fields(ApiSettings)}
    for field_name, text in given.items():
        if field_name in kinds:
            api[field_name] = _read_as(kinds[field_name], field_name, text)
        elif field_name in ("max_tokens", "cache_dir"):
            own[field_name] = _read_as(int if field_name == "max_tokens" else Path, field_name, text)
        else:
            known = ", ".join(["max_tokens", "cache_dir", *kinds])
            raise SettingsError(f"grader is {name!r}: {field_name!r} is unknown; known are {known}")
    return JudgeSettings(**own, api=ApiSettings(**api))


def _read_as(kind: type, name: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise SettingsError(f"{name}={text!r} of the judge is no {kind.__name__}") from error


def read_verdict(reply: str) -> Verdict:
    """CORRECT or INCORRECT where exactly one of the words "yes" and "no" is said, else UNGRADED.

    Where there is one, it is what the published parser reads; that one takes everything else for "no".
    """
    return _IN_WORDS.get(frozenset(_YES_OR_NO.findall(reply.lower())), Verdict.UNGRADED)


class JudgeGrader:
    """Asks ``max_parallel`` answers at a time; may be used from many threads.

    ``failures`` counts what was said of calls that failed.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.name = f"judge:{settings.model}"
        self.client = ApiClient(settings.api)
        self.cache = ReplyCache(settings.cache_dir)
        self.failures: Counter[str] = Counter()
        self._threads = GradingThreads(settings.api.max_parallel)
        self._counting = threading.Lock()

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        """Raises: GradingError where the cache cannot be used. Interrupted, it asks nothing more."""
        hopeless = threading.Event()
        asked: dict[str, Future[Verdict]] = {}
        for one in answered:
            prompt = _prompt(one)
            if prompt and prompt not in asked:
                asked[prompt] = self._threads.submit(partial(self._verdict, prompt, hopeless))
        try:
            said = {prompt: future.result() for prompt, future in asked.items()}
        finally:
            for future in asked.values():
                future.cancel()
        return [said.get(_prompt(one)) or _without_asking(one) for one in answered]

    def _verdict(self, prompt: str, hopeless: threading.Event) -> Verdict:
        if hopeless.is_set():
            return Verdict.UNGRADED
        one = self.settings
        key = content_id([one.api.base_url, one.model, one.max_tokens, prompt])
        try:
            record = self.cache.get_or_make(key, partial(self._asked, prompt))
        except EngineError as error:
            if isinstance(error, Refused) and error.status in CONCERNS_ALL:
                hopeless.set()  # the key, the address or the model: others would be told the same
            self._count_failure(str(error))
            return Verdict.UNGRADED
        return read_verdict(str(record["reply"]))

    def _asked(self, prompt: str) -> Record:
        sampling = Sampling(max_tokens=self.settings.max_tokens, temperature=0.0, top_p=1.0)
        message = {"role": "user", "content": prompt}
        reply = self.client.one(Ask(model=self.settings.model, prompt=(message,), sampling=sampling))
        tokens = {"n_tokens": reply.n_tokens, "n_prompt_tokens": reply.n_prompt_tokens}
        return {"reply": reply.text, "model": self.settings.model, **tokens, "prompt": prompt}

    def _count_failure(self, said: str) -> None:
        with self._counting:
            is_new = said not in self.failures and len(self.failures) < TOLD_FAILURES
            self.failures[said] += 1
        if is_new:
            log.warning("an answer stays UNGRADED: %s", said)


def _prompt(one: Answered) -> str:
    """The question to the judge; empty where there is nothing to ask."""
    if not one.answer.strip() or not one.gold.strip():
        return ""
    return grading_prompt(one.title, one.question, one.gold, one.answer)


def _without_asking(one: Answered) -> Verdict:
    """An empty answer is wrong by definition; nothing can be held against an empty gold answer."""
    return Verdict.UNGRADED if one.answer.strip() else Verdict.INCORRECT

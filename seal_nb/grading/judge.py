"""A language model as grader: the published yes/no question, put to any OpenAI-compatible service.

SEAL (arXiv 2506.10943) takes its verdicts from GPT-4.1 in this way, one call after another, and counts an
outage as "wrong". Here many calls run at a time, transient failures are tried again (``engines.api``), a
reply is kept on disk so that no answer is paid for twice, and what gets no plain yes or no is UNGRADED. A
failed call is not kept: grading again asks again.

    make_grader("judge:gpt-4.1")
    make_grader("judge:qwen2.5-7b-instruct?base_url=http://127.0.0.1:8000/v1&api_key_env=")

Threads that grade beside the caller and end with the process, whatever they are waiting for.

A ``ThreadPoolExecutor`` keeps the interpreter alive until every call that was handed in is done; a worker
that is told to stop cannot wait for a thousand calls to a slow judge.

Replies that were paid for, on disk by what was asked: one small file each, which is its own lock.

Whoever wants a reply opens its file and locks it. If the file holds a reply, it was asked before; if not, the
holder of the lock asks, writes, and lets go, and whoever waited meanwhile (another thread, process or node)
finds the reply there. The lock goes with its holder, so nobody waits for the dead. An empty or torn file is
a reply that never came. Knows nothing of models, prompts or verdicts.
"""

import fcntl
import json
import logging
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from seal_nb.engines.api import CONCERNS_ALL, ApiClient, ApiSettings, Ask, Refused
from seal_nb.engines.base import Sampling
from seal_nb.errors import EngineError, GradingError, SettingsError
from seal_nb.grading.base import Answered, Verdict
from seal_nb.models import cache_dir
from seal_nb.prompts import grading_prompt
from seal_nb.storage import content_id

T = TypeVar("T")


class GradingThreads:
    """At most ``n_threads`` daemon threads, started as calls come. A call not yet begun can be cancelled."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._n_started = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, call))
        with self._starting:
            if self._n_started < self.n_threads:
                threading.Thread(target=self._run, name="grading", daemon=True).start()
                self._n_started += 1
        return future

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)


log = logging.getLogger(__name__)

Record = dict[str, Any]


class ReplyCache:
    """A folder of records by key, safe between threads, processes and nodes; keys are hexadecimal digits."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get_or_make(self, key: str, make: Callable[[], Record]) -> Record:
        """The record of this key; where there is none, exactly one of all who ask calls ``make``.

        What ``make`` raises is raised here, and nothing is kept. Raises: GradingError where the folder cannot
        be used.
        """
        path = self.folder / key[:2] / f"{key}.json"
        handle = self._locked(path)
        try:
            record = _read(handle)
            if record is None:
                record = make()
                self._keep(handle, record)
            return record
        finally:
            os.close(handle)

    def _locked(self, path: Path) -> int:
        handle = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException as error:
            if handle >= 0:
                os.close(handle)
            if not isinstance(error, OSError):
                raise
            raise GradingError(
                f"the cache of graded answers at {self.folder} cannot be used: {error}; "
                "give a folder that can be written and locked as cache_dir"
            ) from error
        return handle

    def _keep(self, handle: int, record: Record) -> None:
        """Write to the disk. On a full disk the reply is still good; only asking again will cost again."""
        raw = json.dumps(record).encode()
        try:
            os.ftruncate(handle, 0)
            written = 0
            while written < len(raw):
                written += os.pwrite(handle, raw[written:], written)
            os.fsync(handle)
        except OSError as error:
            log.warning("a graded answer could not be kept in %s: %s", self.folder.name, error)


def _read(handle: int) -> Record | None:
    """What stands in the file. A torn record is none: its closing brace is missing."""
    try:
        record = json.loads(os.pread(handle, os.fstat(handle).st_size, 0))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


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
        raise SettingsError(f"grader is {name!r}: {error}; write judge:MODEL?field=value&field=value") from error
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

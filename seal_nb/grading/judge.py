"""A language model as grader: the published yes/no question, sent to any OpenAI-compatible service.

SEAL (arXiv 2506.10943) takes its verdicts from GPT-4.1 in this way and counts a failed call as "wrong". Here an answer
without a plain yes or no is UNGRADED, and each whole reply is saved, so that no answer is paid for twice."""

import fcntl
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from seal_nb.engines.api import ApiClient, ApiSettings, Round
from seal_nb.engines.base import Ask, CutOff, Sampling, without_thinking
from seal_nb.errors import PUT_AWAY, EngineError, GradingError, SettingsError, holds_key, redacted
from seal_nb.grading.base import Answered, Verdict, without_asking
from seal_nb.models import cache_dir
from seal_nb.prompts import grading_prompt
from seal_nb.settings import setting
from seal_nb.storage import content_id

log = logging.getLogger(__name__)

_YES_OR_NO = re.compile(r"\b(yes|no)\b")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(ApiSettings):
    """Which model judges. Its name should identify the weights, because saved replies are found by it."""

    timeout_s: float = 60.0
    model: str = "gpt-4.1"  # published
    max_tokens: int = setting(16, least=1)  # of a reply; "yes" needs one, a model that argues first needs more
    cache_dir: Path = field(default_factory=lambda: cache_dir() / "judge")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise SettingsError("the judge has no model; write judge:MODEL, such as judge:gpt-4.1")


def judge_settings(name: str) -> JudgeSettings:
    """Settings from ``judge:MODEL?field=value&…``, such as "judge:qwen2.5-7b?base_url=http://127.0.0.1:8000/v1", a
    single text for command lines and notebook parameters. Raises: SettingsError."""
    model, _, options = name.removeprefix("judge").removeprefix(":").partition("?")
    given: dict[str, str] = {}
    with suppress(ValueError):  # its text, even as the cause of ours, would show what may be a key; below too
        given = dict(parse_qsl(options, keep_blank_values=True, strict_parsing=True))
    if options and not given:
        raise SettingsError("grader: an option has no value; write judge:MODEL?field=value&field=value")
    texts = (name, unquote(name), *given, *given.values())
    if holds_key(model) or any(redacted(text) != text for text in texts):
        raise SettingsError(f"grader holds a key (it is not shown); {PUT_AWAY}")
    values: dict[str, Any] = {"model": model} if name.startswith("judge:") else {}
    known: dict[str, Any] = {"max_tokens": int, "cache_dir": Path}
    known |= {one.name: type(one.default) for one in fields(ApiSettings)}
    for field_name, text in given.items():
        if field_name not in known:
            is_name = len(field_name) < 8 or get_close_matches(field_name, known)  # and no key, or too short a part
            what = repr(field_name) if is_name else "an option"
            raise SettingsError(f"grader: {what} is unknown; known are {', '.join(known)}")
        with suppress(ValueError):
            values[field_name] = known[field_name](text)
        if field_name not in values:
            said = repr(text) if len(text) < 8 else "(not shown)"
            raise SettingsError(f"grader: {field_name}={said} is no {known[field_name].__name__}")
    if "base_url" in values:
        values.setdefault("api_key_env", "")  # OpenAI's key is not for others
    return JudgeSettings(**values)


def read_verdict(reply: str) -> Verdict:
    """CORRECT or INCORRECT if the reply, without thinking, has exactly one of the words "yes" and "no", else UNGRADED.
    The published parser agrees where there is exactly one, and takes everything else that is not a yes for a no."""
    words = set(_YES_OR_NO.findall(without_thinking(reply).lower()))
    if len(words) != 1:
        return Verdict.UNGRADED
    return Verdict.CORRECT if words == {"yes"} else Verdict.INCORRECT


class JudgeGrader:
    """Grades ``max_parallel`` answers at a time, for many threads."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.name = f"judge:{settings.model}"
        self.client = ApiClient(settings)
        self._logged: set[tuple[type[EngineError], int]] = set()  # kinds of failures: an outage repeats the same one

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        """One verdict for each answer. After the failures that a ``Round`` names and after an interrupt nothing more is
        asked; replies under way are saved. Raises: GradingError if the folder of saved replies cannot be used."""
        sent = Round(self.client)
        calls: dict[str, Future[Verdict]] = {}
        settled = [without_asking(one) for one in answered]
        prompts = [grading_prompt(one.title, one.question, " or ".join(one.golds), one.answer) for one in answered]
        asked = [prompt for prompt, verdict in zip(prompts, settled, strict=True) if verdict is None]
        try:
            for prompt in dict.fromkeys(asked):
                calls[prompt] = self.client.threads.submit(partial(self._verdict, prompt, sent))
            verdicts = {prompt: call.result() for prompt, call in calls.items()}
        finally:
            sent.stopped.set()
            for call in calls.values():
                call.cancel()
        return [verdict or verdicts[prompt] for verdict, prompt in zip(settled, prompts, strict=True)]

    def _verdict(self, prompt: str, sent: Round) -> Verdict:
        key = content_id([self.settings.base_url, self.settings.model, self.settings.max_tokens, prompt])
        try:
            return read_verdict(self._saved_reply(key, prompt, sent))
        except EngineError as error:
            kind = type(error), getattr(error, "status", 0)
            if kind not in self._logged:
                self._logged.add(kind)
                log.warning("an answer stays UNGRADED: %s", error)
            return Verdict.UNGRADED

    def _saved_reply(self, key: str, prompt: str, sent: Round) -> str:
        """The reply on disk, or the model's, which is then saved. Each key has a file that is also its lock: of all
        threads, processes and nodes that need the same reply, one asks and the others wait. The system drops the lock
        of a dead process. An empty or torn file holds no reply. A reply that was cut before its verdict is none."""
        path = self.settings.cache_dir / key[:2] / f"{key}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise GradingError(
                f"the graded answers in {self.settings.cache_dir} cannot be used: {error}; "
                "set cache_dir to a folder that can be written and locked"
            ) from error
        with file:
            most = self.settings.max_tokens
            with suppress(ValueError, KeyError, TypeError):
                kept = json.loads(file.read())
                said = str(kept["reply"])
                # Older versions saved replies that were cut, too, and thinking without an answer.
                was_cut = "finish_reason" not in kept and kept.get("n_tokens", 0) >= most
                is_whole = without_thinking(said).strip() or not said.strip()
                if read_verdict(said) is not Verdict.UNGRADED or (is_whole and not was_cut):
                    return said
            sampling = Sampling(max_tokens=most, temperature=0.0, top_p=1.0)
            message = {"role": "user", "content": prompt}
            reply = sent.one(Ask(model=self.settings.model, prompt=(message,), sampling=sampling))
            if reply.finish_reason == "length" and read_verdict(reply.text) is Verdict.UNGRADED:
                raise CutOff(self.settings.where, most)
            about = {"reply": reply.text, "model": self.settings.model, "n_tokens": reply.n_tokens, "prompt": prompt}
            about |= {"finish_reason": reply.finish_reason}
            if reply.not_sent:
                about["not_sent"] = reply.not_sent
            try:
                file.seek(0)
                file.truncate()
                file.write(json.dumps(about).encode())
                os.fsync(file.fileno())
            except OSError as error:  # the reply is still good; asking again would cost again
                log.warning("a graded answer could not be saved in %s: %s", self.settings.cache_dir, error)
            return reply.text

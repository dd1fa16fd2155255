"""The interface of a text generation engine: prompts in, completions out.

An engine knows nothing of passages, self-edits or experiments. A failure is an EngineError, never an empty completion.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seal_nb.errors import EngineError, SettingsError, pattern
from seal_nb.settings import Settings, setting

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
Prompt = str | tuple[Message, ...]  # a text to continue, or a chat to answer
OnText = Callable[[int, "Completion"], None]  # called with (index of the prompt, completion)


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How to sample. The defaults are the published ones for self-edits (SEAL, arXiv 2506.10943)."""

    max_tokens: int = setting(8192, least=1)  # of one completion, at most
    temperature: float = setting(1.0, least=0)  # 0 is greedy
    top_p: float = 0.95  # probability mass that nucleus sampling keeps
    stop: tuple[str, ...] = ()  # texts that end a completion

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p={self.top_p}: must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request for one text. A text depends on nothing else."""

    prompt: Prompt
    sampling: Sampling
    seed: int | None = None
    adapter: Path | None = None  # the folder of a PEFT adapter; None: the base
    model: str = ""  # a service's name for it
    extra: Mapping[str, Any] = field(default_factory=dict)  # more fields of the request to a service


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One generated text without its prompt."""

    text: str
    n_tokens: int
    finish_reason: str  # "stop" or "length"
    not_sent: Sequence[str] = ()  # parameters that the service refused, so that its own values applied


class UnusableReply(EngineError):
    """The reply has no finished text: not JSON, no choice, cut off by a filter."""


class CutOff(UnusableReply):
    """The reply ended at its token limit before its text, as after long thinking."""

    def __init__(self, where: str, max_tokens: int) -> None:
        told = f"the reply was cut at max_tokens={max_tokens}, before an answer came (thinking counts)"
        super().__init__(f"{where}: {told}; raise max_tokens")


class NotAsked(EngineError):
    """This prompt was not sent: an earlier failure concerns all prompts, or the user interrupted."""


class Incomplete(EngineError):
    """Some prompts have no text: ``completions`` and ``failures`` by index of the prompt."""

    def __init__(self, outcomes: Mapping[int, Completion | EngineError]) -> None:
        self.completions = {i: one for i, one in outcomes.items() if isinstance(one, Completion)}
        self.failures = {i: one for i, one in outcomes.items() if isinstance(one, EngineError)}
        causes = [error for error in self.failures.values() if not isinstance(error, NotAsked)]
        reasons = list(dict.fromkeys(f"{type(error).__name__}: {error}" for error in causes))[:3]
        if n_not_sent := len(self.failures) - len(causes):
            reasons.append(f"{n_not_sent} were not sent after that")
        super().__init__(f"{len(self.failures)} of {len(outcomes)} texts are missing ({'; '.join(reasons)})")


class Engine(ABC):
    """Anything that completes prompts. ``model_id`` identifies the weights and the software that runs them."""

    model_id: str

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        adapters: Sequence[Path | None] = (),
        on_text: OnText = lambda *_: None,
    ) -> list[Completion]:
        """The completion of every prompt, in their order; without ``adapters`` all are the base's.

        ``on_text`` is called as soon as a text has come, so that the caller can save it. API engines call it from
        another thread, one call at a time. Raises: Incomplete if prompts have no text (it holds those that came),
        SettingsError for what the engine cannot do."""
        if adapters and len(adapters) != len(prompts):
            raise SettingsError(f"{len(adapters)} adapters for {len(prompts)} prompts; give one for each, or none")
        each = zip(prompts, seeds, adapters or [None] * len(prompts), strict=True)
        outcomes = self.outcomes([Ask(prompt=p, sampling=sampling, seed=s, adapter=a) for p, s, a in each], on_text)
        completions = [one for _, one in sorted(outcomes.items()) if isinstance(one, Completion)]
        if len(completions) < len(outcomes):
            raise Incomplete(outcomes)
        return completions

    @abstractmethod
    def outcomes(self, asks: Sequence[Ask], on_text: OnText) -> Mapping[int, Completion | EngineError]:
        """The text or the failure of each request, by its index."""

    def text_of(self, prompt: Prompt) -> str:
        """The text that the model sees: a chat goes through the model's template, where that is known."""
        return contents(prompt)


_THINKING = pattern("thinking")
# Templates may put the opening mark into the prompt. A mark in quotes is text.
_REST_OF_THINKING = re.compile(r"(?s).*?(?<![`'\"“‘])(?:</think(?:ing)?>|\[/THINK\])(?![`'\"”’])\s*")
_OPENING = re.compile(r"<think(?:ing)?>|\[THINK\]", re.IGNORECASE)


def without_thinking(text: str) -> str:
    """The text after the thinking that it begins with: "" if that never ends, the text itself if there is none."""
    at = 0
    while thought := _THINKING.match(text, at) or _REST_OF_THINKING.match(text, at):
        if thought.re is _REST_OF_THINKING and _OPENING.search(text, at, thought.end()):
            break  # opened and closed in the midst of a text
        at = thought.end()
    return re.sub(r"<\|(?:return|END_RESPONSE|END_TEXT)\|>\s*$", "", text[at:]) if at else text


def contents(prompt: Prompt) -> str:
    """A prompt as plain text: the messages of a chat, without the model's markup."""
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)

"""Text generation as the rest of the package sees it: prompts in, completions out.

One Protocol, so that transformers, vLLM or an API are interchangeable. What an engine does not do: know
self-edits, passages or seeds of experiments. A failure raises EngineError; it is never an empty completion.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from seal_nb.errors import EngineError, SettingsError

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
Prompt = str | tuple[Message, ...]  # a text to be continued, or a chat to be answered by its template
OnText = Callable[[int, "Completion"], None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample; temperature 0 is greedy. Defaults are the published ones for self-edits."""

    max_tokens: int = 8192
    temperature: float = 1.0
    top_p: float = 0.95
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SettingsError(f"max_tokens={self.max_tokens}: at least 1 token must be allowed")
        if self.temperature < 0:
            raise SettingsError(f"temperature={self.temperature}: use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p={self.top_p}: must lie above 0 and not above 1")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One generated text without its prompt; ``finish_reason`` is "stop" or "length"."""

    text: str
    n_tokens: int
    finish_reason: str


class Incomplete(EngineError):
    """Some prompts got no text: ``completions`` and ``failures`` by index of the prompt."""

    def __init__(self, completions: Mapping[int, Completion], failures: Mapping[int, EngineError]) -> None:
        self.completions, self.failures = dict(completions), dict(failures)
        # What was not even sent explains nothing.
        told = [error for error in failures.values() if not isinstance(error, NotAsked)]
        n_other = len(failures) - len(told)
        said = {f"{type(error).__name__}: {error}": None for error in told}
        why = "; ".join([*list(said)[:3], *([f"{n_other} were not sent after that"] if n_other else [])])
        super().__init__(f"{len(failures)} of {len(failures) + len(completions)} texts are missing ({why})")


class NotAsked(EngineError):
    """Not sent, because others had failed in a way that concerns all, or the run was interrupted."""


class Engine(Protocol):
    """Anything that completes prompts."""

    @property
    def model_id(self) -> str:
        """Names the weights and what computes with them, so that results of two are never mixed up."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        adapters: Sequence[Path | None] = (),
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in order; seeds: one a prompt.

        adapters: the folder of a PEFT adapter for each prompt, None for the model itself; empty: for all.
        ``on_text`` is told (index, completion) of each as it comes, so that nothing paid for is lost.
        A text depends on its own prompt, seed and adapter, not on what it is generated beside.

        Raises: Incomplete where only some could be had; EngineError.
        """
        ...

    def text_of(self, prompt: Prompt) -> str:
        """What the model sees of a prompt: a chat through the model's template, where that is known here."""
        ...


def in_order(completions: Mapping[int, Completion], failures: Mapping[int, EngineError]) -> list[Completion]:
    """The completions by index of their prompts. Raises: Incomplete where there are failures."""
    if failures:
        raise Incomplete(completions, failures)
    return [completions[index] for index in range(len(completions))]


def contents(prompt: Prompt) -> str:
    """A prompt as plain text: of a chat, what its messages say, without the model's marks."""
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def adapter_of_each(prompts: Sequence[Prompt], adapters: Sequence[Path | None]) -> list[Path | None]:
    """One entry a prompt. Raises: SettingsError where there is another number of them."""
    if adapters and len(adapters) != len(prompts):
        raise SettingsError(f"{len(adapters)} adapters for {len(prompts)} prompts; give one for each, or none")
    return list(adapters) or [None] * len(prompts)

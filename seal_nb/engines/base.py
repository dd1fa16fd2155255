"""Text generation as the rest of the package sees it: prompts in, completions out.

One Protocol, so that transformers, vLLM or an API are interchangeable. What an engine does not do: know
prompts, passages or seeds of experiments. A failure raises EngineError; it is never an empty completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from seal_nb.errors import SettingsError


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


class Engine(Protocol):
    """Anything that completes prompts."""

    @property
    def model_id(self) -> str:
        """Names the weights, so that results of two models are never mixed up."""
        ...

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion a prompt, in order; seeds: one a prompt. Raises: EngineError.

        A text depends on its own prompt and seed, not on what it is generated beside.
        """
        ...

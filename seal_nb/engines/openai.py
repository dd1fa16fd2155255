"""The engine for any OpenAI-compatible service: OpenAI itself, a vLLM elsewhere, a gateway.

Many requests at a time (`engines.api`), counted and, where prices are given, in money. Such a service offers
models by name and has none of our adapters; a vLLM server that loads adapters is `engines.vllm`.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from seal_nb.engines.api import ApiClient
from seal_nb.engines.api_records import ApiSettings, Ask, Reply
from seal_nb.engines.base import Completion, OnText, Prompt, Sampling, adapter_of_each, contents, in_order
from seal_nb.errors import EngineError, SettingsError


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Of a million tokens, in one currency."""

    prompt: float
    completion: float


class OpenAIEngine:
    """Completes prompts through a service, and counts what that takes.

    chat_only: send a plain prompt as the one message of a chat, as the published texts of GPT-4.1 were made;
    for services that have no other endpoint. Two services under one model name share a ``model_id``.
    """

    def __init__(
        self, settings: ApiSettings, *, model: str, chat_only: bool = False, prices: Prices | None = None
    ) -> None:
        self.client = ApiClient(settings)
        self.model, self.chat_only, self.prices = model, chat_only, prices

    @property
    def model_id(self) -> str:
        return f"openai-{self.model}"

    @property
    def cost(self) -> float | None:
        """Of everything so far; None without prices."""
        if self.prices is None:
            return None
        return self.client.usage.cost(
            per_million_prompt=self.prices.prompt, per_million=self.prices.completion
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        adapters: Sequence[Path | None] = (),
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """See Engine. Raises: Incomplete, SettingsError for an adapter."""
        if any(adapter_of_each(prompts, adapters)):
            raise SettingsError(f"{self.model_id} cannot load adapters; use the engine local or vllm")
        asks = [
            Ask(model=self.model, prompt=self._sent(prompt), sampling=sampling, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return completed(self.client, asks, on_text)

    def text_of(self, prompt: Prompt) -> str:
        """What is sent; the service's own template is not known here."""
        return contents(prompt)

    def _sent(self, prompt: Prompt) -> Prompt:
        if self.chat_only and isinstance(prompt, str):
            return ({"role": "user", "content": prompt},)
        return prompt


def completed(client: ApiClient, asks: Sequence[Ask], on_text: OnText | None) -> list[Completion]:
    """One completion for each, ``on_text`` told as they come. Raises: Incomplete with those that came."""
    came: dict[int, Completion] = {}
    failures: dict[int, EngineError] = {}
    with closing(client.each(asks)) as outcomes:
        for index, outcome in outcomes:
            if not isinstance(outcome, Reply):
                failures[index] = outcome
                continue
            came[index] = Completion(
                text=outcome.text, n_tokens=outcome.n_tokens, finish_reason=outcome.finish_reason
            )
            if on_text is not None:
                on_text(index, came[index])
    return in_order(came, failures)

"""The local engine: transformers in this process, through the grouped decoding of the inner loop."""

from collections.abc import Sequence
from pathlib import Path

import torch

from seal_nb.engines.base import Completion, OnText, Prompt, Sampling, adapter_of_each, in_order
from seal_nb.errors import EngineError, SettingsError
from seal_nb.models import model_identity, resolve_model
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow, GroupedDecoder
from seal_nb.ttt.lora import Adapter


class LocalEngine:
    """Completes prompts with a base, or with adapters on it. `rows`: texts generated at a time.

    `adapters` are a stack that is always on; `generate` takes one more for each prompt, in the same batch.
    """

    def __init__(self, base: FrozenBase, *, model_id: str, adapters: tuple[Adapter, ...] = (), rows: int = 64):
        self.base, self.model_id, self.adapters, self.rows = base, model_id, adapters, rows

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        adapters: Sequence[Path | None] = (),
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in order, each from the stream of its own seed. See Engine."""
        folders = adapter_of_each(prompts, adapters)
        loaded = {folder: self.base.load_adapter(folder) for folder in dict.fromkeys(folders) if folder}
        decoder = GroupedDecoder(self.base, max_rows=self.rows)
        for i, (prompt, seed, folder) in enumerate(zip(prompts, seeds, folders, strict=True)):
            own = (loaded[folder],) if folder else ()
            decoder.submit(self._row(i, prompt, seed, sampling, (*self.adapters, *own)))
        came: dict[int, Completion] = {}
        failures: dict[int, EngineError] = {}
        while decoder.busy:
            for decoded in decoder.step():
                self._take(decoded, came, failures, on_text)
        return in_order(came, failures)

    def text_of(self, prompt: Prompt) -> str:
        """Raises: SettingsError for a chat where the model has no chat template."""
        if isinstance(prompt, str):
            return prompt
        if not self.base.tokenizer.chat_template:
            raise SettingsError(
                "this model has no chat template; take a plain prompt (chat false), or an instruct model"
            )
        chat = [dict(message) for message in prompt]
        return str(self.base.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def _row(self, key: int, prompt: Prompt, seed: int, sampling: Sampling, adapters: tuple[Adapter, ...]) -> DecodeRow:
        # A template has put in the special tokens of a chat.
        token_ids = self.base.encode(self.text_of(prompt), special_tokens=isinstance(prompt, str))
        return DecodeRow(
            key=key,
            token_ids=token_ids,
            adapters=adapters,
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            stop=sampling.stop,
        )

    @staticmethod
    def _take(
        decoded: Decoded, came: dict[int, Completion], failures: dict[int, EngineError], on_text: OnText | None
    ) -> None:
        index = int(str(decoded.key))
        if decoded.error:
            failures[index] = EngineError(decoded.error)
            return
        came[index] = Completion(
            text=decoded.text, n_tokens=len(decoded.token_ids), finish_reason=decoded.finish_reason
        )
        if on_text is not None:
            on_text(index, came[index])


def load_local_engine(model: str, *, n_threads: int = 1, device: str = "auto", dtype: str = "auto") -> LocalEngine:
    """Load a folder, hub name or "embedded" for generation in this process."""
    torch.set_num_threads(n_threads)
    folder = resolve_model(model)
    base = FrozenBase.load(folder, device=device, dtype=dtype)
    return LocalEngine(base, model_id=model_identity(folder))

"""The local engine: transformers in this process, with the grouped decoding of the inner loop."""

from collections.abc import Mapping, Sequence

import torch

from seal_nb.engines.base import Ask, Completion, CutOff, Engine, OnText, Prompt, without_thinking
from seal_nb.errors import EngineError, SettingsError
from seal_nb.models import model_identity, resolve_model
from seal_nb.peft_files import adapter_for
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder

ROWS = 64  # texts that are generated at a time


class LocalEngine(Engine):
    """Completes prompts with a loaded model."""

    def __init__(self, base: FrozenBase, *, model_id: str) -> None:
        self.base, self.model_id = base, model_id

    def outcomes(self, asks: Sequence[Ask], on_text: OnText) -> Mapping[int, Completion | EngineError]:
        """See Engine. Prompts with different adapters share a batch."""
        folders = dict.fromkeys(ask.adapter for ask in asks if ask.adapter)
        loaded = {folder: adapter_for(self.base, folder) for folder in folders}
        decoder = GroupedDecoder(self.base, max_rows=ROWS)
        outcomes: dict[int, Completion | EngineError] = {}
        for index, ask in enumerate(asks):
            # The template has added the special tokens of a chat.
            ids = self.base.encode(self.text_of(ask.prompt), special_tokens=isinstance(ask.prompt, str))
            try:
                room = self.base.room_after(ids, "the prompt", n_new=1)
            except SettingsError as error:
                outcomes[index] = EngineError(str(error))
                continue
            row = DecodeRow(
                key=index,
                token_ids=ids,
                adapters=(loaded[ask.adapter],) if ask.adapter else (),
                max_new_tokens=min(ask.sampling.max_tokens, room),
                temperature=ask.sampling.temperature,
                top_p=ask.sampling.top_p,
                seed=ask.seed or 0,
                stop=ask.sampling.stop,
            )
            decoder.submit(row)
        while decoder.busy:
            for done in decoder.step():
                index, text = int(str(done.key)), without_thinking(done.text)
                if done.error:
                    outcomes[index] = EngineError(done.error)
                elif done.text.strip() and not text.strip():
                    outcomes[index] = CutOff(self.model_id, asks[index].sampling.max_tokens)
                else:
                    completion = Completion(text=text, n_tokens=len(done.token_ids), finish_reason=done.finish_reason)
                    outcomes[index] = completion
                    on_text(index, completion)
        return outcomes

    def text_of(self, prompt: Prompt) -> str:
        """See Engine. Raises: SettingsError for a chat if the model has no chat template."""
        if isinstance(prompt, str):
            return prompt
        if not self.base.tokenizer.chat_template:
            raise SettingsError("this model has no chat template; set chat to false, or use an instruct model")
        chat = [dict(message) for message in prompt]
        return str(self.base.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def load_local_engine(model: str, *, n_threads: int = 1, **how: str) -> LocalEngine:
    """Load a model (a folder, a hub name or "embedded") for this process; ``how``: see FrozenBase.load."""
    torch.set_num_threads(n_threads)
    folder = resolve_model(model)
    return LocalEngine(FrozenBase.load(folder, **how), model_id=model_identity(folder))

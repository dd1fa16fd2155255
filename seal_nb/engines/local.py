"""The local engine: transformers in this process, through the grouped decoding of the inner loop."""

from collections.abc import Sequence

import torch

from seal_nb.engines.base import Completion, Sampling
from seal_nb.models import model_identity, resolve_model
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder
from seal_nb.ttt.lora import Adapter


class LocalEngine:
    """Completes prompts with a base, or with kept adapters on it. `rows`: texts generated at a time."""

    def __init__(
        self, base: FrozenBase, *, model_id: str, adapters: tuple[Adapter, ...] = (), rows: int = 64
    ):
        self.base, self.model_id, self.adapters, self.rows = base, model_id, adapters, rows

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion a prompt, in order, each from the stream of its own seed."""
        decoder = GroupedDecoder(self.base, max_rows=self.rows)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            decoder.submit(
                DecodeRow(
                    key=i,
                    token_ids=self.base.encode(prompt),
                    adapters=self.adapters,
                    max_new_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=seed,
                    stop=sampling.stop,
                )
            )
        done = {d.key: d for d in decoder.run()}
        ordered = [done[i] for i in range(len(prompts))]
        return [
            Completion(text=d.text, n_tokens=len(d.token_ids), finish_reason=d.finish_reason) for d in ordered
        ]


def load_local_engine(
    model: str, *, n_threads: int = 1, device: str = "auto", dtype: str = "auto"
) -> LocalEngine:
    """Load a folder, hub name or "embedded" for generation in this process."""
    torch.set_num_threads(n_threads)
    folder = resolve_model(model)
    base = FrozenBase.load(folder, device=device, dtype=dtype)
    return LocalEngine(base, model_id=model_identity(folder))

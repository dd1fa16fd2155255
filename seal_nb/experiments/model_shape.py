"""Sizes of a decoder, for arithmetic on what a run takes: from its config.json, no weights and no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seal_nb.errors import DataError

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's, of Llama and Qwen2


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-like decoder (Llama, Qwen2, Qwen3, Mistral), from its config.json."""

    n_layers: int
    hidden: int
    intermediate: int
    q_out: int  # heads × head size
    kv_out: int
    vocabulary: int
    tied: bool

    @classmethod
    def of_folder(cls, folder: str | Path) -> "ModelShape":
        """Raises: DataError where the folder has no such configuration."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
            heads = config["num_attention_heads"]
            head_size = config.get("head_dim") or config["hidden_size"] // heads
            return cls(
                n_layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                q_out=heads * head_size,
                kv_out=config.get("num_key_value_heads", heads) * head_size,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"holds no sizes of a decoder: {error}", path=path, remedy="give a model folder"
            ) from error

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) of one layer's Linear."""
        outs = {"q_proj": self.q_out, "k_proj": self.kv_out, "v_proj": self.kv_out}
        if name == "o_proj":
            return self.q_out, self.hidden
        if name == "down_proj":
            return self.intermediate, self.hidden
        return self.hidden, outs.get(name, self.intermediate)

    @property
    def n_parameters(self) -> int:
        """Weights of embeddings and Linears; norms and biases are too few to matter."""
        in_layers = sum(n_in * n_out for n_in, n_out in map(self.linear, _LINEARS))
        return self.n_layers * in_layers + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int, target_modules: Sequence[str]) -> int:
        names = _LINEARS if "all-linear" in target_modules else (tuple(target_modules) or _DEFAULT_TARGETS)
        return self.n_layers * rank * sum(sum(self.linear(name)) for name in names if name in _LINEARS)


# Known before they are fetched: the small model, and the published one.
KNOWN = {
    "embedded": ModelShape(
        n_layers=30, hidden=576, intermediate=1536, q_out=576, kv_out=192, vocabulary=49152, tied=True
    ),
    "Qwen/Qwen2.5-7B": ModelShape(
        n_layers=28, hidden=3584, intermediate=18944, q_out=3584, kv_out=512, vocabulary=152064, tied=False
    ),
}


def shape_of(model: str) -> ModelShape | None:
    """Of a model folder, or of a name that is known; None where nothing is known of it without fetching."""
    if model in KNOWN:
        return KNOWN[model]
    if not model or not (Path(model) / "config.json").is_file():
        return None
    try:
        return ModelShape.of_folder(model)
    except DataError:  # a config of another kind: an estimate must not stop what can run
        return None

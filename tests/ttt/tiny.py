"""Random models of a few thousand parameters and a tokenizer that needs no download."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from seal_nb.ttt.base import FrozenBase

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


# On a GPU; from the allocator of a CPU (what torch 2.13 raises for `torch.empty(2**50)`); from Python.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


class AsciiTokenizer:
    """One token a character; 0 ends."""

    bos_token = None
    eos_token_id = 0
    pad_token_id = 0
    is_fast = True

    def __call__(self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> dict:
        return {"input_ids": [1 + ord(c) % 127 for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    def decode(self, ids, skip_special_tokens: bool = True) -> str:  # type: ignore[no-untyped-def]
        return "".join(chr(i - 1) for i in ids if not (skip_special_tokens and i == 0))


def refuse_tildes(base: FrozenBase, monkeypatch: pytest.MonkeyPatch, error: type[Exception] = RuntimeError) -> None:
    """Let every pass of `base` fail that has a "~" in it, as a kernel fails that does not take its input."""
    run, tilde = base.run, AsciiTokenizer()("~")["input_ids"][0]

    def strict(ids, *rest):  # type: ignore[no-untyped-def]
        if tilde in ids:
            raise error("a kernel does not take this")
        return run(ids, *rest)

    monkeypatch.setattr(base, "run", strict)


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A random Llama or Qwen2 (which has biases on q, k, v)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES))
    return model.to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 256 the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def save_tiny_model(folder: Path, *, seed: int = 0, **sizes: int) -> Path:
    """A model folder as from a hub: a random Llama that knows bytes."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    eos = tokenizer.eos_token_id
    config = LlamaConfig(**SIZES | {"vocab_size": 257, "eos_token_id": eos, "pad_token_id": eos} | sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Random models of a few thousand parameters and a tokenizer that needs no download."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
    initializer_range=0.3,
)


class AsciiTokenizer:
    """One token a character; 0 ends."""

    eos_token_id = 0
    pad_token_id = 0

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 127 for c in text]}

    def decode(self, ids, skip_special_tokens: bool = True) -> str:  # type: ignore[no-untyped-def]
        return "".join(chr(i - 1) for i in ids if not (skip_special_tokens and i == 0))


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A random Llama or Qwen2 (which has biases on q, k, v)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES))
    return model.to(dtype)

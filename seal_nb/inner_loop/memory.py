"""An estimate of the memory that an inner loop needs."""

from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.device import wide
from seal_nb.ttt.lora import features
from seal_nb.ttt.passes import CHUNK

LOSS_BYTES = 13  # of each logit of a chunk: the logit, its float32 value and gradient, and what softmax needs


def memory_needed(
    base: FrozenBase, *, rank: int, n_slots: int, token_budget: int, decode_rows: int, text_tokens: int
) -> dict[str, int]:
    """Bytes by use. Training in float32, with rows of 64 tokens on a CPU, took 1.06 times as much; decoding took up to
    1.4 times the cache, since it is copied as it grows.

    Args:
        base: its weights are counted as they are stored.
        rank: of adapters on all Linear layers.
        n_slots: adapters in training at the same time; as many trained ones are kept until they have answered.
        token_budget: tokens of a training pass.
        decode_rows: texts generated at a time, of ``text_tokens`` tokens with their prompts.
    """
    config, size, exact = base.config, base.dtype.itemsize, wide(base.dtype).itemsize
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    n_features = sum(sum(features(linear)) for linear in base.linears.values())
    adapter = rank * n_features * (exact + size * (size < exact))  # its weights, and a copy in the base's dtype
    return {
        "base": sum(t.nbytes for t in [*base.model.parameters(), *base.model.buffers()]),
        "training": n_slots * (adapter + 3 * rank * n_features * exact),  # with gradient and two moments
        "trained": n_slots * adapter,
        "pass": token_budget * n_features * size,  # it keeps about what goes into and comes out of each Linear
        "loss": min(CHUNK, token_budget) * config.vocab_size * LOSS_BYTES,
        "kv_cache": decode_rows * text_tokens * config.num_hidden_layers * 2 * kv_heads * head_size * size,
    }

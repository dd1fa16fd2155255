"""From texts to token ids: special tokens, the characters of each token, and the longest row that a model takes.

The only place that decides whether a text gets a BOS token. It does not import torch: the vLLM engine uses it too."""

import sys
from collections.abc import Sequence
from typing import Any

from seal_nb.errors import SettingsError

Spans = list[tuple[int, int]]  # of each token, its first character in the text and the one after its last


def wants_special_tokens(text: str, bos: str | None) -> bool:
    """Whether a tokenizer with this BOS token (None: no such token) should add its special tokens to a text. A text
    that begins with BOS, such as a chat that has gone through its template, already has them."""
    return not (bos and text.startswith(bos))


def decode(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """Text of token ids. Raises: RuntimeError if the tokenizer cannot do it."""
    return str(_without_panic(tokenizer.decode, ids, **options))


def _without_panic(call: Any, *arguments: Any, **options: Any) -> Any:
    """Result of `call`. A panic in the tokenizer's Rust code is no Exception, and would end the process."""
    try:
        return call(*arguments, **options)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:
        raise RuntimeError(f"the tokenizer failed: {panic}") from panic


def tokenize(
    tokenizer: Any, text: str, *, special_tokens: bool = True, with_spans: bool = False
) -> tuple[list[int], Spans]:
    """Token ids of a text and, if wanted, their spans; (0, 0) for added special tokens. special_tokens: False for a
    chat that has just gone through its template, which decides about them.
    Raises: SettingsError for a tokenizer that does not know spans."""
    if with_spans and not tokenizer.is_fast:
        problem = "the tokenizer of this model does not tell which characters a token spans"
        raise SettingsError(f"{problem}; use a model with a tokenizer.json, or no end_mask_substring and no scores")
    options = {"return_offsets_mapping": True} if with_spans else {}
    adds = special_tokens and wants_special_tokens(text, tokenizer.bos_token)
    encoded = _without_panic(tokenizer, text, add_special_tokens=adds, **options)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"]) if with_spans else []


def n_masked_tokens(tokenizer: Any, text: str, mask: str, ids: Sequence[int], spans: Spans) -> int:
    """Number of leading tokens up to and including the one with the last character of the first `mask` in the text. 0
    if it is not in the text. All tokens of that character count, and no special token that was added at the end."""
    at = text.find(mask) if mask else -1
    end = at + len(mask) if at >= 0 else 0
    n = reached = 0
    for i, (start, stop) in enumerate(spans):
        if reached < end <= start and not text[start:stop][:1].isspace():
            # No token so far has the last character. Some tokenizers leave the leading white space of a token out of
            # its span (ByteLevel with trim_offsets).
            piece = decode(tokenizer, ids[i : i + 1], clean_up_tokenization_spaces=False)
            start -= len(piece) - len(piece.lstrip())
        if start >= end:
            break
        if stop:  # an added special token has (0, 0)
            n, reached = i + 1, stop
    return n


def context_of(config: Any) -> int:
    """Most tokens of a row of a model with this transformers configuration. Rotary positions of type "dynamic" or
    "longrope" end at their original length: beyond it the longest row of a pass would change all others."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # one for all layers, or one for each type
    scaled = [one for one in kinds if one.get("rope_type") in ("dynamic", "longrope")]
    limits = [one.get("original_max_position_embeddings") for one in scaled]
    return min(filter(None, [getattr(config, "max_position_embeddings", None), *limits]), default=sys.maxsize)

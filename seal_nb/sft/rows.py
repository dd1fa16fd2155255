"""Training examples: from lines of {prompt, completion}, or of {text}, to token ids, and in which order.

A completion ends with EOS and carries the loss alone; a text is a train sequence, as the inner loop takes it:
no EOS, and loss on all of it.

The order is fixed beforehand for all epochs and filled up so that every step has the same number of
examples: what a step trains on then does not depend on how many processes share it. A filler carries no
loss. Knows no model.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seal_nb.errors import DataError

IGNORED = -100  # a label outside the loss
Example = dict[str, list[int]]


def read_sft_rows(path: Path) -> list[dict[str, str]]:
    """Rows {prompt, completion} or {text} of a file. Raises DataError with path, line and field."""
    rows = []
    text = path.read_text(encoding="utf-8")
    # Not splitlines: a row may hold characters that only look like the end of a line, as U+2028 does.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON ({error})", path=path, item=f"line {number}") from error
        is_text = isinstance(row, dict) and "text" in row
        for field in ("text",) if is_text else ("prompt", "completion"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise DataError("must be a text", path=path, item=f"line {number}", field=field)
        rows.append(row)
    if not rows:
        raise DataError("has no row", path=path, remedy="lower the selection's bar, or make more self-edits")
    return rows


def example(tokenizer: Any, row: dict[str, str], max_seq_length: int) -> Example:
    """Token ids of prompt + completion + EOS, labels -100 on the prompt; or of a text, all of it labels.

    Raises: DataError for a text that is too short to carry a loss.
    """
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"][:max_seq_length]
        if len(ids) < 2:
            raise DataError(f"{row['text']!r} has no token to predict", field="text", remedy="leave it out")
        return {"input_ids": ids, "labels": list(ids)}
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    return {"input_ids": ids[:max_seq_length], "labels": labels[:max_seq_length]}


def in_training_order(
    examples: Sequence[Example], *, epochs: int, examples_a_step: int, seed: int
) -> list[Example]:
    """All epochs end to end, each in a fresh shuffle and filled up to whole steps."""
    draws = random.Random(seed)
    ordered: list[Example] = []
    for _ in range(epochs):
        ordered += draws.sample(list(examples), len(examples))
        ordered += [_filler(examples[0])] * (-len(examples) % examples_a_step)
    return ordered


def _filler(one: Example) -> Example:
    return {"input_ids": one["input_ids"][:2], "labels": [IGNORED] * len(one["input_ids"][:2])}


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """(n, longest) ids, attention mask and labels, padded on the right outside the loss."""
    longest = max(len(e["input_ids"]) for e in examples)
    gaps = [longest - len(e["input_ids"]) for e in examples]
    pairs = list(zip(examples, gaps, strict=True))
    return {
        "input_ids": torch.tensor([e["input_ids"] + [0] * gap for e, gap in pairs]),
        "attention_mask": torch.tensor([[1] * len(e["input_ids"]) + [0] * gap for e, gap in pairs]),
        "labels": torch.tensor([e["labels"] + [IGNORED] * gap for e, gap in pairs]),
    }

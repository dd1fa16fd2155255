"""Training examples of a round: from lines of {prompt, completion} to token ids, and in which order.

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
    """Rows {prompt, completion} of an SFT file. Raises DataError with path, line and field."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON ({error})", path=path, item=f"line {number}") from error
        for field in ("prompt", "completion"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise DataError("must be a text", path=path, item=f"line {number}", field=field)
        rows.append(row)
    if not rows:
        raise DataError("has no row", path=path, remedy="lower the selection's bar, or make more self-edits")
    return rows


def example(tokenizer: Any, row: dict[str, str], max_seq_length: int) -> Example:
    """Token ids of prompt + completion + EOS; labels are -100 on the prompt."""
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

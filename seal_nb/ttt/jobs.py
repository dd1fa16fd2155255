"""Training jobs: settings, tokenised train sequences (`make_row`), and the order in which they are trained.

Defaults are those of the published inner loop (arXiv 2506.10943, section 3.1 and appendix B; `lora_params` of the
published run files). Rows are ordered and grouped into optimiser steps as in transformers' Trainer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seal_nb.errors import SettingsError
from seal_nb.tokens import n_masked_tokens, tokenize


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of an adapter. `protocol.TTTRequest` has the ranges of these values."""

    rank: int = 32  # published run files, lora_params.rank
    alpha: float = 64  # lora_params.alpha
    dropout: float = 0.0  # lora_params.dropout
    # Empty: PEFT's default; ("all-linear",): every Linear but the head; a string: a regular expression, as in PEFT.
    target_modules: tuple[str, ...] | str = ()

    @property
    def scaling(self) -> float:
        """Factor of the low-rank branch, alpha / rank (LoRA, arXiv 2106.09685, section 4.1)."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Training of an adapter: AdamW (0.9, 0.999, 1e-8, no decay), linear decay of the rate to 0, clipping. With
    `padding_in_loss` each sequence is padded on the right with EOS to `pad_to` tokens. Padding is not attended to but
    is part of the loss, as in the published training. By default there is no padding."""

    epochs: int = 10  # lora_params.epochs
    learning_rate: float = 1e-3  # lora_params.lr
    batch_size: int = 1  # lora_params.batch_size
    gradient_accumulation_steps: int = 1  # lora_params.grad_accum_steps
    max_grad_norm: float = 1.0  # transformers.TrainingArguments.max_grad_norm
    max_seq_length: int = 2048  # tokens; published server's max_seq_length
    end_mask_substring: str = ""  # tokens up to and including its first occurrence carry no loss
    padding_in_loss: bool = False
    pad_to: int = 2048  # tokens
    seed: int = 42  # of the initial weights, the order of rows, and dropout


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One tokenised train sequence, with padding if that is in the loss, without the last token, which has no label."""

    token_ids: Tensor  # (n,) int64
    n_real: int  # tokens before the padding, which attends to these only
    n_text: int  # tokens of the sequence
    n_masked: int  # of these, tokens up to and including the end mask; 0 if the sequence does not have it
    sources: Tensor  # (m,) int64, places in the row whose next token carries loss
    targets: Tensor  # (m,) int64, that token's id

    def __len__(self) -> int:
        return len(self.token_ids)


def make_row(tokenizer: Any, text: str, settings: TrainSettings) -> TrainRow:
    """Tokenise, cut, mask and pad one train sequence. Raises SettingsError if the text has no token, if padding is
    wanted and the tokenizer has no EOS token, or if a mask is wanted and it does not know the spans of tokens."""
    eos, mask = tokenizer.eos_token_id, settings.end_mask_substring
    whole, spans = tokenize(tokenizer, text, with_spans=bool(mask))
    longest = min(settings.max_seq_length, settings.pad_to) if settings.padding_in_loss else settings.max_seq_length
    if not (ids := whole[:longest]):
        raise SettingsError(f"train sequence {text!r} has no token; leave it out")
    n_text, n_masked = len(ids), n_masked_tokens(tokenizer, text, mask, whole, spans)
    n_masked = n_masked if n_masked <= n_text else 0  # published: a mask that was cut off does not count
    if settings.padding_in_loss:
        if eos is None:
            raise SettingsError("padding in the loss needs a tokenizer with an EOS token; use padding_in_loss=False")
        ids += [eos] * (settings.pad_to - n_text)
    token_ids = torch.tensor(ids)
    sources = torch.arange(max(n_masked - 1, 0), len(ids) - 1)  # nothing predicts the first token
    n = max(len(ids) - 1, 1)  # no other token attends to the last one, and it has no label: it is not passed
    counts = {"n_real": min(n_text, n), "n_text": n_text, "n_masked": n_masked}
    return TrainRow(token_ids=token_ids[:n], sources=sources, targets=token_ids[sources + 1], **counts)


@dataclass(frozen=True, kw_only=True)
class Window:
    """One optimiser step."""

    epoch: int
    batches: tuple[list[int], ...]  # indices of the rows of each micro-batch
    n_labels: int  # of all of them, the divisor of the loss


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One adapter to train on `texts`."""

    name: str
    texts: tuple[str, ...]
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @property
    def n_steps(self) -> int:
        """Optimiser steps. The last window of an epoch may be short, as in the Trainer."""
        n_batches = -(-len(self.texts) // self.train.batch_size)
        return -(-n_batches // self.train.gradient_accumulation_steps) * self.train.epochs

    def windows(self, n_labels_R: Sequence[int]) -> Iterator[Window]:
        """All optimiser steps in order. n_labels_R: labels of each row. The order of an epoch is that of accelerate's
        SeedableRandomSampler, which the Trainer uses."""
        size, accumulation = self.train.batch_size, self.train.gradient_accumulation_steps
        for epoch in range(self.train.epochs):
            generator = torch.Generator().manual_seed(self.train.seed + epoch)
            order = torch.randperm(len(self.texts), generator=generator).tolist()
            batches = [order[i : i + size] for i in range(0, len(order), size)]
            for first in range(0, len(batches), accumulation):
                window = tuple(batches[first : first + accumulation])
                n_labels = sum(n_labels_R[row] for batch in window for row in batch)
                yield Window(epoch=epoch, batches=window, n_labels=n_labels)


def learning_rate_at(settings: TrainSettings, step: int, n_steps: int) -> float:
    """Rate of optimiser step `step` (from 0): transformers' "linear" schedule without warm-up."""
    return settings.learning_rate * max(0.0, (n_steps - step) / max(1, n_steps))

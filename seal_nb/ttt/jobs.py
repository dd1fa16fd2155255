"""What one adapter is trained on and how: settings, tokenised rows, and the order they are seen in.

Settings and defaults are those of the published inner loop (arXiv 2506.10943, section 3.1 and appendix B;
run files' `lora_params`). The order of rows and the grouping into optimiser steps are those of
transformers' Trainer, so that a job can be checked against it. Knows nothing of models, devices or
adapters' weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from seal_nb.errors import SettingsError

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of an adapter. `target_modules` empty: PEFT's default for the architecture; ("all-linear",):
    all but the head."""

    rank: int = 32  # published run files, lora_params.rank
    alpha: float = 64  # lora_params.alpha
    dropout: float = 0.0  # lora_params.dropout
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora_rank", self.rank, "at least 1")
        _require(self.alpha > 0, "lora_alpha", self.alpha, "above 0")
        _require(0 <= self.dropout < 1, "lora_dropout", self.dropout, "in [0, 1)")

    @property
    def scaling(self) -> float:
        """The factor on the low-rank branch, alpha / rank (LoRA, arXiv 2106.09685, section 4.1)."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How an adapter is trained: AdamW (0.9, 0.999, 1e-8, no decay), linear decay to 0, clipping.

    `padding_in_loss` with `pad_to` is the published training: each sequence padded on the right with EOS,
    padding not attended to but part of the loss. `pad_samples` > 0 is that loss too, from so many randomly
    drawn padding positions a sequence, weighted to stay unbiased. Both off: padding does not exist."""

    epochs: int = 10  # lora_params.epochs
    learning_rate: float = 1e-3  # lora_params.lr
    batch_size: int = 1  # lora_params.batch_size
    gradient_accumulation_steps: int = 1  # lora_params.grad_accum_steps
    max_grad_norm: float = 1.0  # transformers.TrainingArguments.max_grad_norm
    max_seq_length: int = 2048  # published server's max_seq_length, tokens
    end_mask_substring: str = ""
    padding_in_loss: bool = False
    pad_to: int = 2048  # tokens
    pad_samples: int = 0  # padding positions a sequence
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            0 <= self.learning_rate < float("inf"), "finetune_lr", self.learning_rate, "a finite number, 0 or more"
        )
        _require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")
        _require(self.max_seq_length >= 2, "max_seq_length", self.max_seq_length, "at least 2 tokens")
        _require(self.pad_samples >= 0, "pad_samples", self.pad_samples, "0 (none) or more")
        _require(self.pad_to >= 2, "pad_to", self.pad_to, "at least 2 tokens")

    @property
    def padded(self) -> bool:
        return self.padding_in_loss or self.pad_samples > 0


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise SettingsError(f"{name} is {value!r}; it must be {remedy}")


class Tokenizer(Protocol):
    """The two things asked of a tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]: ...


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One tokenised train sequence.

    token_ids: (n,) int64, the real tokens that are passed, then the computed padding positions, if any
    positions:  (n,) int64
    n_real: tokens before the padding; padding attends to these only
    n_text: tokens of the sequence; the last one is not passed where it predicts nothing
    sources: (m,) int64, places in the row whose next token carries loss; targets: (m,) that token's id;
    weights: (m,) float64
    n_items: labels of the row, by which the Trainer divides (all padding counts, drawn or not)"""

    token_ids: torch.Tensor
    positions: torch.Tensor
    n_real: int
    n_text: int
    sources: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    n_items: int

    def __len__(self) -> int:
        return len(self.token_ids)


def masked_prefix(token_ids: Sequence[int], mark: Sequence[int]) -> int:
    """Number of leading tokens without loss: up to and including the first occurrence of `mark`; 0 where
    absent."""
    n = len(mark)
    starts = range(len(token_ids) - n + 1) if n else range(0)
    return next((i + n for i in starts if list(token_ids[i : i + n]) == list(mark)), 0)


def make_row(
    tokenizer: Tokenizer, text: str, settings: TrainSettings, *, draws: torch.Generator | None = None
) -> TrainRow:
    """Tokenise, truncate, mask and (where asked) pad one train sequence. `draws` gives the sampled padding
    positions."""
    padded = settings.padded
    longest = min(settings.max_seq_length, settings.pad_to) if padded else settings.max_seq_length
    ids = list(tokenizer(text)["input_ids"])[:longest]
    if not ids:
        raise SettingsError(f"train sequence {text!r} has no token; leave it out")
    mark = (
        tokenizer(settings.end_mask_substring, add_special_tokens=False)["input_ids"]
        if settings.end_mask_substring
        else []
    )
    start = max(masked_prefix(ids, mark), 1)  # the first token has nothing before it to be predicted from
    return _padded_row(tokenizer, ids, start, settings, draws) if padded else _plain_row(ids, start)


def _plain_row(ids: list[int], start: int) -> TrainRow:
    """The last token has no label and no other token sees it, so leaving it out changes nothing."""
    token_ids, n = torch.tensor(ids), max(len(ids) - 1, 1)
    sources = torch.arange(start - 1, len(ids) - 1)
    return TrainRow(
        token_ids=token_ids[:n],
        positions=torch.arange(n),
        n_real=n,
        n_text=len(ids),
        sources=sources,
        targets=token_ids[sources + 1],
        weights=torch.ones(len(sources), dtype=torch.float64),
        n_items=len(sources),
    )


def _padded_row(
    tokenizer: Tokenizer, ids: list[int], start: int, settings: TrainSettings, draws: torch.Generator | None
) -> TrainRow:
    """The published row: EOS to `pad_to`, every padding token a label. Padding tokens see only real ones,
    so they are independent of each other, and a sample of them is an unbiased estimate of their loss."""
    if tokenizer.eos_token_id is None:
        raise SettingsError("padding in the loss needs a tokenizer with an EOS token; use padding_in_loss=False")
    n_real, eos = len(ids), tokenizer.eos_token_id
    places = torch.arange(
        n_real, max(n_real, settings.pad_to - 1)
    )  # padding positions that predict another padding token
    weight = 1.0
    if settings.pad_samples and len(places) > settings.pad_samples:
        weight = len(places) / settings.pad_samples
        places = places[torch.randperm(len(places), generator=draws)[: settings.pad_samples]].sort().values
    real = torch.tensor(ids)
    own = torch.arange(start - 1, n_real - 1)
    borders = torch.arange(
        n_real - 1, n_real if settings.pad_to > n_real else n_real - 1
    )  # last real token predicts EOS
    padding = torch.arange(n_real, n_real + len(places))
    targets = torch.cat([real[own + 1], torch.full((len(borders) + len(padding),), eos)])
    weights = torch.ones(len(targets), dtype=torch.float64)
    weights[len(own) + len(borders) :] = weight
    return TrainRow(
        token_ids=torch.cat([real, torch.full((len(padding),), eos)]),
        positions=torch.cat([torch.arange(n_real), places]),
        n_real=n_real,
        n_text=n_real,
        sources=torch.cat([own, borders, padding]),
        targets=targets,
        weights=weights,
        n_items=len(own) + max(settings.pad_to - n_real, 0),
    )


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of one pass; `n_items` counts the labels of the whole accumulation window, the divisor of its
    loss."""

    row_indices: tuple[int, ...]
    epoch: int
    n_items: int
    opens_window: bool
    closes_window: bool


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One adapter to train. `rows(epoch)` draws padding afresh each epoch where it is sampled."""

    name: str
    texts: tuple[str, ...]
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        if not self.texts:
            raise SettingsError(f"job {self.name!r} has no train sequence; give one or ask for the baseline only")

    def rows(self, tokenizer: Tokenizer, epoch: int) -> list[TrainRow]:
        draws = torch.Generator().manual_seed(self.train.seed * 1_000_003 + epoch) if self.train.pad_samples else None
        return [make_row(tokenizer, text, self.train, draws=draws) for text in self.texts]

    def order(self, epoch: int) -> list[int]:
        """Row order of an epoch: that of accelerate's SeedableRandomSampler, which transformers' Trainer
        uses."""
        generator = torch.Generator().manual_seed(self.train.seed + epoch)
        return torch.randperm(len(self.texts), generator=generator).tolist()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; the last window of an epoch may be short, as in the Trainer."""
        n_batches = -(-len(self.texts) // self.train.batch_size)
        return -(-n_batches // self.train.gradient_accumulation_steps)

    @property
    def n_steps(self) -> int:
        return self.steps_per_epoch * self.train.epochs

    def micro_batches(self, n_items_R: Sequence[int]) -> Iterator[MicroBatch]:
        """All passes in order. n_items_R: labels of each row."""
        size, accumulation = self.train.batch_size, self.train.gradient_accumulation_steps
        for epoch in range(self.train.epochs):
            order = self.order(epoch)
            batches = [order[i : i + size] for i in range(0, len(order), size)]
            for w in range(0, len(batches), accumulation):
                window = batches[w : w + accumulation]
                n_items = sum(n_items_R[r] for batch in window for r in batch)
                for k, batch in enumerate(window):
                    yield MicroBatch(
                        row_indices=tuple(batch),
                        epoch=epoch,
                        n_items=n_items,
                        opens_window=k == 0,
                        closes_window=k == len(window) - 1,
                    )


def learning_rate_at(settings: TrainSettings, step: int, n_steps: int) -> float:
    """Rate of optimiser step `step` (from 0): linear decay to 0 without warm-up, as transformers' "linear"
    schedule."""
    return settings.learning_rate * max(0.0, (n_steps - step) / max(1, n_steps))

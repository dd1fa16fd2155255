"""LoRA adapters (memory layout, target modules, initial values) and the jobs that train them.

An adapter is one flat vector with a view A (rank, in) and B (out, rank) for each target Linear (Hu et al., arXiv
2106.09685). Targets and initial values are PEFT's (https://github.com/huggingface/peft). Defaults of a job are those of
the published inner loop (arXiv 2506.10943, section 3.1 and appendix B; `lora_params` of the published run files). Rows
are ordered and grouped into optimiser steps as in transformers' Trainer."""

import copy
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import regex
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from seal_nb.errors import SettingsError
from seal_nb.models import n_masked_tokens, tokenize

ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."
OF_A_MODULE = (".weight", ".bias")  # ends of the names of parameters that a Linear or a norm has
SPECIAL = re.compile(r"[*+?|()\[\]{}^$\\]")  # characters of regular expressions
Linears = Mapping[str, nn.Linear]


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


class Target(NamedTuple):
    """A Linear that gets a low-rank branch: module name, sizes, and offsets of its A and B in the flat vector."""

    name: str
    in_features: int
    out_features: int
    offset_a: int
    offset_b: int
    transposed: bool  # the weight is stored as (in, out)


@dataclass(frozen=True)
class Layout:
    """Memory layout of an adapter's flat vector. Adapters of the same shape have equal layouts."""

    rank: int
    targets: tuple[Target, ...]

    @cached_property
    def size(self) -> int:
        return sum(self.rank * (t.in_features + t.out_features) for t in self.targets)

    @cached_property
    def by_name(self) -> Mapping[str, Target]:
        return {t.name: t for t in self.targets}

    def a(self, flat: Tensor, t: Target) -> Tensor:
        """View (..., rank, in) of flat (..., size)."""
        return flat.narrow(-1, t.offset_a, self.rank * t.in_features).unflatten(-1, (self.rank, t.in_features))

    def b(self, flat: Tensor, t: Target) -> Tensor:
        """View (..., out, rank) of flat (..., size)."""
        return flat.narrow(-1, t.offset_b, t.out_features * self.rank).unflatten(-1, (t.out_features, self.rank))

    def b_transposed(self, flat: Tensor, t: Target) -> Tensor:
        """View (..., rank, out) of flat (..., size)."""
        return self.b(flat, t).transpose(-1, -2)


def features(linear: Any) -> tuple[int, int]:
    """(in, out) features. A Conv1D (GPT-2) is a Linear whose weight is stored as (in, out)."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def make_layout(linears: Linears, names: Iterable[str], rank: int) -> Layout:
    """Layout of an adapter on the Linear layers of these names."""
    targets, end = [], 0
    for name in names:
        n_in, n_out = features(linears[name])
        targets.append(Target(name, n_in, n_out, end, end + rank * n_in, isinstance(linears[name], Conv1D)))
        end += rank * (n_in + n_out)
    return Layout(rank, tuple(targets))


def target_names(model: PreTrainedModel, linears: Linears, wanted: Sequence[str]) -> tuple[str, ...]:
    """Names of the decoder's Linear layers that PEFT adapts with these `target_modules`: a list of names, a regular
    expression as one string, "all-linear", or () for PEFT's default. PEFT adapts a copy of the model without
    memory. Raises SettingsError if it finds none, or modules that cannot be adapted here."""
    # Here and below PEFT is imported when it is needed: with bitsandbytes its import takes a fifth of a worker's start.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    given = ALL_LINEAR if tuple(wanted) == (ALL_LINEAR,) else wanted if isinstance(wanted, str) else list(wanted)
    known = f"; the linear layers are {', '.join(sorted({n.rsplit('.', 1)[-1] for n in linears}))}, or {ALL_LINEAR!r}"
    for target in [] if isinstance(given, str) else given:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            hint = "; give a regular expression as a string, not in a list" if SPECIAL.search(target) else ""
            hint = hint or "; give it alone" * (target == ALL_LINEAR)
            raise SettingsError(f"target_modules has {target!r}, which is no Linear of this model{hint}{known}")
    try:
        with torch.device("meta"):
            skeleton = type(model)(copy.deepcopy(model.config))
            modules: Any = None if given == [] else given
            fused: list[str] = []  # parameters of experts, which PEFT also matches
            if isinstance(given, str) and SPECIAL.search(given):  # PEFT would match it without a time limit
                match = functools.partial(regex.fullmatch, given, timeout=1)
                modules = [name for name, _ in skeleton.named_modules() if match(name)]
                parameters = [name for name, _ in skeleton.named_parameters() if match(name)]
                fused = [name for name in parameters if not name.endswith(OF_A_MODULE)]
                if not modules and not fused:
                    raise ValueError("a module of such a name was not found")
            inject_adapter_in_model(LoraConfig(target_modules=modules), skeleton)
    except TimeoutError as error:
        problem = f"target_modules is {given!r}, which takes more than a second to match a name"
        raise SettingsError(f"{problem}; write it another way{known}") from error
    except Exception as error:  # PEFT and regex have many kinds
        raise SettingsError(f"target_modules is {given!r}, which PEFT refuses: {str(error)[:200]}{known}") from error
    inside = {*skeleton.get_decoder().modules(), skeleton.get_output_embeddings()}  # so no image encoder
    names = tuple(name for name, m in skeleton.named_modules() if isinstance(m, LoraLayer) and m in inside)
    others = dict.fromkeys([*fused, *(name.removesuffix(".base_layer") for name in names if name not in linears)])
    if others or not names:
        what = f"PEFT would train {', '.join(others) or 'nothing'}, and only linear layers are supported"
        raise SettingsError(f"target_modules is {given!r}: {what}; name some of them, such as the attention's{known}")
    return names


def initial_weights(layout: Layout, seed: int) -> Tensor:
    """Flat float32 vector as PEFT draws it after `torch.manual_seed(seed)`: A uniform (Kaiming), B zero. For each
    target PEFT first makes two nn.Linear, whose values it discards, and then draws A."""
    flat, stream = torch.zeros(layout.size), torch.Generator().manual_seed(seed)
    for t in layout.targets:
        for n_features in (t.in_features, t.out_features):
            torch.empty(layout.rank * n_features).uniform_(generator=stream)
        nn.init.kaiming_uniform_(layout.a(flat, t), a=math.sqrt(5), generator=stream)
    return flat


class Adapter:
    """A trained LoRA adapter. flat: (layout.size,) weights, float32 as a rule; compute: a copy in the base's dtype."""

    def __init__(self, layout: Layout, settings: LoraSettings, flat: Tensor, compute_dtype: torch.dtype):
        self.layout, self.settings, self.flat = layout, settings, flat
        self.kind: object = layout  # neighbours of one kind are a group; an adapter in training has its bank's
        self.compute = flat.to(compute_dtype)
        self.n_bytes = self.flat.nbytes + self.compute.nbytes

    def delta(self, name: str) -> Tensor:
        """Change of the weight of `name`, scale · B A, in the weight's shape and the adapter's dtype."""
        t = self.layout.by_name[name]
        change = self.settings.scaling * self.layout.b(self.flat, t) @ self.layout.a(self.flat, t)
        return change.t() if t.transposed else change


def peft_weights(layout: Layout, flat: Tensor) -> dict[str, Tensor]:
    """Views of a flat vector by the names of PEFT's files."""
    names = {f"{PEFT_PREFIX}{t.name}.lora_A.weight": layout.a(flat, t) for t in layout.targets}
    return names | {f"{PEFT_PREFIX}{t.name}.lora_B.weight": layout.b(flat, t) for t in layout.targets}


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The Linear layers of a model's decoder (not the head, not an image encoder), by name, in the model's order."""
    inside = set(model.get_decoder().modules())
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m in inside}


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

"""Settings and result of supervised fine-tuning, without torch.

The defaults are those of SEAL (arXiv 2506.10943, section 3.1 and appendix B). Full fine-tuning is ours, for CPT."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from seal_nb.errors import SettingsError
from seal_nb.settings import Settings, setting

SHARDINGS = ("fsdp", "deepspeed")  # how several GPUs share a model


@dataclass(frozen=True, kw_only=True)
class SftSettings(Settings):
    """How a model is fine-tuned on its best self-edits. A step is the same on any number of processes.

    Args:
        method: "lora" (published), or "full": all weights, without the settings of an adapter.
        lora_rank: rank of the adapter.
        lora_alpha: LoRA scale is `lora_alpha / lora_rank`.
        target_modules: names of layers; `["all-linear"]`: all.
        finetune_epochs: passes over the examples.
        finetune_lr: peak learning rate of AdamW, which falls linearly to zero.
        batch_size: examples of a micro-batch.
        gradient_accumulation_steps: micro-batches of a step, of all processes together (published: 5 on each of 2).
        max_seq_length: tokens of prompt and self-edit; the rest of a self-edit is cut.
        seed: of the adapter's initial weights and the order of examples.

    Raises:
        SettingsError: for a value that cannot be trained with."""

    method: Literal["lora", "full"] = "lora"
    lora_rank: int = setting(64, least=1)
    lora_alpha: float = 128
    target_modules: Sequence[str] = ("all-linear",)
    finetune_epochs: int = setting(2, least=1)
    finetune_lr: float = 3e-4
    batch_size: int = setting(1, least=1)
    gradient_accumulation_steps: int = setting(10, least=1)
    max_seq_length: int = setting(2048, least=1)
    seed: int = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        object.__setattr__(self, "lora_alpha", float(self.lora_alpha))  # as JSON gives it back to the processes
        for name in ("lora_alpha", "finetune_lr"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name}={getattr(self, name)}: must be above 0")

    @property
    def examples_a_step(self) -> int:
        """The global batch size."""
        return self.batch_size * self.gradient_accumulation_steps

    def n_steps(self, n_examples: int) -> int:
        """Optimiser steps of a training on so many examples."""
        return self.finetune_epochs * math.ceil(n_examples / self.examples_a_step)

    def accumulation_of(self, n_processes: int) -> int:
        """Micro-batches of a step in one of ``n_processes``. Raises: SettingsError if they cannot share it equally."""
        if n_processes < 1 or self.gradient_accumulation_steps % n_processes:
            what = f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, which {n_processes} processes"
            raise SettingsError(f"{what} cannot share; it counts the micro-batches of all processes: give a multiple")
        return self.gradient_accumulation_steps // n_processes


@dataclass(frozen=True, kw_only=True)
class SftResult:
    """A finished training. ``losses`` has the training loss of each optimiser step, in nats per token with a loss;
    ``n_tokens`` counts the tokens of all epochs."""

    model_dir: Path  # the new model
    losses: tuple[float, ...]
    n_steps: int
    n_examples: int
    n_tokens: int
    n_processes: int = 1


@dataclass(frozen=True, kw_only=True)
class SftJob:
    """One training: its rows, base model, folder of the new model and settings."""

    sft_file: Path
    model: str
    model_dir: Path
    settings: SftSettings
    n_threads: int = 1  # of torch in one process, on a CPU


JOB = TypeAdapter(SftJob)  # for its JSON, which the processes of a training get

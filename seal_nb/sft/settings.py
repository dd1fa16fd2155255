"""Settings and result of supervised fine-tuning, without torch.

The defaults are those of SEAL (arXiv 2506.10943, section 3.1 and appendix B). Full fine-tuning is ours, for CPT.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from seal_nb.errors import SettingsError

METHODS = ("lora", "full")
SHARDINGS = ("fsdp", "deepspeed")  # how several GPUs share a model


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """How to train. A step is the same on any number of processes."""

    method: str = "lora"  # published; "full": all weights, without lora_rank, lora_alpha and target_modules
    lora_rank: int = 64
    lora_alpha: int = 128
    target_modules: tuple[str, ...] = ("all-linear",)
    epochs: int = 2
    learning_rate: float = 3e-4
    batch_size: int = 1  # examples of a micro-batch
    gradient_accumulation_steps: int = 10  # micro-batches of a step, all processes; published: 5 on each of 2
    max_seq_length: int = 2048  # tokens
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.method not in METHODS:
            raise SettingsError(f"method is {self.method!r}; known are {', '.join(METHODS)}")
        for name in ("lora_rank", "lora_alpha", "epochs", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise SettingsError(f"finetune_lr is {self.learning_rate}; it must be above 0")

    @property
    def examples_a_step(self) -> int:
        """The global batch size."""
        return self.batch_size * self.gradient_accumulation_steps

    def accumulation_of(self, n_processes: int) -> int:
        """Micro-batches of a step in one of ``n_processes``. Raises: SettingsError if they cannot share it equally."""
        if n_processes < 1 or self.gradient_accumulation_steps % n_processes:
            raise SettingsError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, which {n_processes} "
                "processes cannot share; it counts the micro-batches of all processes: give a multiple"
            )
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

    def to_json(self) -> str:
        return TypeAdapter(SftJob).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return TypeAdapter(cls).validate_json(text)

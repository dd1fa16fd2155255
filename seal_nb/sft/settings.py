"""Settings and result of the supervised fine-tuning of a ReST-EM round, apart from torch.

Defaults are those of SEAL (arXiv 2506.10943, section 3.1 and appendix B). Full fine-tuning is ours: CPT
without an adapter (``experiments.cpt_full``). Trains nothing.
"""

import argparse
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from seal_nb.errors import SettingsError

METHODS = ("lora", "full")
SHARDINGS = ("fsdp", "deepspeed")  # how several GPUs share a model


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """Published settings; the small model takes smaller ones. A step is alike on any number of processes."""

    method: str = "lora"  # published; "full": all weights, and the lora_… and target_modules play no part
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
        """The global batch."""
        return self.batch_size * self.gradient_accumulation_steps

    def accumulation_of(self, n_processes: int) -> int:
        """Micro-batches a step in one of ``n_processes``. Raises: SettingsError where there is a rest."""
        if n_processes < 1 or self.gradient_accumulation_steps % n_processes:
            raise SettingsError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, which {n_processes} "
                "processes cannot share; it counts the micro-batches of all processes: give a multiple"
            )
        return self.gradient_accumulation_steps // n_processes


@dataclass(frozen=True, kw_only=True)
class SftResult:
    """model_dir: the new model; losses: training loss by optimiser step, nats per token in the loss;
    n_tokens: trained on, all epochs together; n_processes: that met for it.
    """

    model_dir: Path
    losses: tuple[float, ...]
    n_steps: int
    n_examples: int
    n_tokens: int
    n_processes: int = 1


@dataclass(frozen=True, kw_only=True)
class SftJob:
    """One training, as a command line states it."""

    sft_file: Path
    model: str
    model_dir: Path
    settings: SftSettings
    n_threads: int = 1  # of torch in one process, on a CPU

    def options(self) -> list[str]:
        """What ``parse_job`` reads as this job."""
        own = {"sft_file": self.sft_file, "model": self.model, "model_dir": self.model_dir}
        given = own | {f.name: getattr(self.settings, f.name) for f in fields(SftSettings)}
        given |= {"n_threads": self.n_threads, "target_modules": ",".join(self.settings.target_modules)}
        return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def parse_job(argv: Sequence[str] | None = None) -> SftJob:
    """``--sft-file F --model M --model-dir D`` and one option for each setting."""
    parser = argparse.ArgumentParser(
        prog="seal_nb.sft.train",
        description="Fine-tune a model on {prompt, completion} or {text} lines and write the new model; "
        "alone, or in several processes: accelerate launch --config_file C -m seal_nb.sft.train …",
    )
    for name in ("sft_file", "model", "model_dir"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=str, required=True)
    for field in fields(SftSettings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=_reader(field.type), default=field.default)
    parser.add_argument("--n-threads", type=int, default=1)
    given: dict[str, Any] = vars(parser.parse_args(argv))
    own = {name: given.pop(name) for name in ("sft_file", "model", "model_dir", "n_threads")}
    return SftJob(
        sft_file=Path(own["sft_file"]),
        model=own["model"],
        model_dir=Path(own["model_dir"]),
        n_threads=own["n_threads"],
        settings=SftSettings(**given),
    )


def _reader(kind: Any) -> Any:
    is_list = isinstance(kind, types.GenericAlias) or typing.get_origin(kind) is tuple
    return _names if is_list else kind


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())

"""What `benchmarks.gpu` measures with: how much of everything, and a base, its twin, a clock and memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from benchmarks.one_adapter import twin
from benchmarks.random_models import CONFIGS, JobMaker, NumberTokenizer, random_model
from seal_nb.ttt.base import FrozenBase


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured."""

    n_slots: tuple[int, ...]
    seconds_each: float  # of training at each number of slots
    round_seconds: float  # of training whole jobs
    matmul_size: int
    epochs: int
    pad_to: int  # tokens
    new_tokens: int  # of an answer; random weights hardly ever end one
    decode_rows: int


FULL = Settings(
    n_slots=(1, 2, 4, 8, 16, 32, 64),
    seconds_each=5.0,
    round_seconds=75.0,
    matmul_size=8192,
    epochs=10,
    pad_to=2048,
    new_tokens=64,
    decode_rows=128,
)
LITTLE = Settings(
    n_slots=(1, 4),
    seconds_each=0.2,
    round_seconds=0.5,
    matmul_size=256,
    epochs=2,
    pad_to=128,
    new_tokens=8,
    decode_rows=16,
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A base, its twin for the one-adapter path, jobs, and how much to measure."""

    name: str
    base: FrozenBase
    alone: PreTrainedModel
    maker: JobMaker
    settings: Settings

    @property
    def device(self) -> torch.device:
        return self.base.device

    def seconds(self, work: Callable[[], object]) -> float:
        """Of work and everything it has put on the device."""
        self.wait()
        start = time.monotonic()
        work()
        self.wait()
        return time.monotonic() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def peak_memory(self) -> Iterator[dict[str, float | None]]:
        """Fills in the peak in GiB; None where the device does not say."""
        found: dict[str, float | None] = {"peak_memory_gib": None}
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        if cuda:
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30


def make_machine(config: str, device: str, dtype: torch.dtype, settings: Settings) -> Machine:
    model = random_model(config, device=device, dtype=dtype)
    alone = twin(model)  # before the slots change the structure
    base = FrozenBase(model, NumberTokenizer(CONFIGS[config]["eos_token_id"]), name=config)
    maker = JobMaker(vocab_size=CONFIGS[config]["vocab_size"], epochs=settings.epochs)
    return Machine(name=config, base=base, alone=alone, maker=maker, settings=settings)

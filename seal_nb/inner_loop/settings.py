"""Settings of the inner loop. This module does not import torch, so a server's front end can use it."""

from dataclasses import dataclass
from pathlib import Path

from seal_nb.errors import SettingsError
from seal_nb.models import DTYPES


@dataclass(frozen=True, kw_only=True)
class InnerLoopSettings:
    """What one worker process runs. Raises SettingsError if a value is out of its range."""

    model: str = "embedded"  # folder, hub name, or "embedded": the small model
    device: str = "auto"  # "auto": CUDA if there is one
    dtype: str = "auto"  # of the base; adapters are float32. "auto": bfloat16 if the device multiplies it natively
    n_slots: int = 0  # adapters in training at a time; 0: 8 on a CPU, 88 on a GPU
    n_threads: int = 1  # of torch on a CPU
    grader: str = "local"
    adapters_dir: Path = Path("adapters")  # adapters kept by name, PEFT's format
    max_seq_length: int = 2048  # tokens; the upper bound of any request's
    token_budget: int = 4096  # tokens of one training pass
    decode_rows: int = 0  # texts generated at a time; 0: 64 on a CPU, 320 on a GPU
    deterministic: bool = False  # one adapter and one text at a time, so that passes always have the same content

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        for name in ("n_slots", "decode_rows"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be 1 or more, or 0 for the usual number")
        for name in ("n_threads", "max_seq_length", "token_budget"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.deterministic:
            object.__setattr__(self, "n_slots", 1)
            object.__setattr__(self, "decode_rows", 1)

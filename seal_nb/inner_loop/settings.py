"""Settings of the inner loop. This module does not import torch, so a server's front end can use it.

Each setting is declared once, with its help text. `seal_nb.server.settings` adds those of a server and of a worker."""

from dataclasses import dataclass
from pathlib import Path

from seal_nb.errors import SettingsError
from seal_nb.grading.choose import stated_grader
from seal_nb.models import DTYPES
from seal_nb.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The model, and how it is trained and graded."""

    model: str = setting("embedded", "model folder or hub name; embedded: the small model that the package fetches")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; auto: CUDA where there is a GPU")
    dtype: str = setting("auto", "of the base model: auto, float32, bfloat16, float64 or 4bit")
    deterministic: bool = setting(False, "true: one adapter and one text at a time, so results are equal bit by bit")
    n_slots: int = setting(0, "adapters trained at the same time in one worker; 0: 8 on a CPU, 88 on a GPU", least=0)
    n_threads: int = setting(1, "CPU threads of one worker", least=1)
    max_seq_length: int = setting(2048, "tokens; longer train sequences are cut", least=1)
    grader: str = setting("local", "local, exact, f1, recall, or a judge such as judge:gpt-4.1 (docs/graders.md)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        stated_grader(self.grader)  # before it stands in the command line of a worker


@dataclass(frozen=True, kw_only=True)
class InnerLoopSettings(ModelSettings):
    """What one worker process runs."""

    adapters_dir: Path = setting(Path("adapters"), "folder of kept adapters, in PEFT's format")  # noqa: RUF009
    token_budget: int = setting(4096, "tokens of one training pass", least=1)
    decode_rows: int = setting(0, "texts generated at a time; 0: 64 on a CPU, 320 on a GPU", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deterministic:
            object.__setattr__(self, "n_slots", 1)
            object.__setattr__(self, "decode_rows", 1)

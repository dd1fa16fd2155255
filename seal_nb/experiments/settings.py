"""How one adapter is trained and asked: the inner loop's settings as experiments state them.

Names are those of the published system and of ``protocol.TTTRequest``; defaults are the published ones for
single passages (SEAL, arXiv 2506.10943; ``lora_params`` of the published run files). Declared once: requests
and result files are both written from here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from seal_nb.errors import SettingsError

Arm = Literal["self_edits", "passage_only", "hand_written"]
ARMS: tuple[Arm, ...] = ("self_edits", "passage_only", "hand_written")
SingleArm = Literal[Arm, "in_context"]  # single passages also have a ceiling: the passage in the prompt
IN_CONTEXT: SingleArm = "in_context"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One adapter: LoRA, optimiser schedule and answering; every field is one of the request's."""

    lora_rank: int = 32
    lora_alpha: float = 64
    lora_dropout: float = 0.0
    target_modules: Sequence[str] = ()  # empty: PEFT's default for the architecture; ("all-linear",)
    finetune_epochs: int = 10
    finetune_lr: float = 1e-3
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    end_mask_substring: str = ""
    max_seq_length: int = 2048  # tokens
    padding_in_loss: bool = False  # True: the published training
    pad_to: int = 2048  # tokens, with padding_in_loss
    pad_samples: int = 0
    max_new_tokens: int = 64
    soft_scores: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        for name in ("lora_rank", "finetune_epochs", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: must be at least 1")
        if isinstance(self.target_modules, str):
            raise SettingsError(f"target_modules={self.target_modules!r}: give a list of module names")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))

    def request_fields(self) -> dict[str, Any]:
        """As fields of a TTTRequest."""
        return asdict(self) | {"target_modules": list(self.target_modules)}

    def lora_params(self) -> dict[str, Any]:
        """As result files state them: the published keys first, then ours."""
        return {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "epochs": self.finetune_epochs,
            "lr": self.finetune_lr,
            "batch_size": self.batch_size,
            "grad_accum_steps": self.gradient_accumulation_steps,
            "target_modules": list(self.target_modules),
            "end_mask_substring": self.end_mask_substring,
            "padding_in_loss": self.padding_in_loss,
        }

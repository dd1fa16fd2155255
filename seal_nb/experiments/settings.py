"""How one adapter is trained and asked: the inner loop's settings as experiments state them.

Names are those of the published system and of ``protocol.TTTRequest``; defaults are the published ones for
single passages (SEAL, arXiv 2506.10943; ``lora_params`` of the published run files). Declared once: requests
and result files are both written from here.

Which arms a notebook was asked for, and where each has its self-edits from.

An arm is one of ``passage_only``, ``self_edits``, ``hand_written``, ``in_context``, or a name with a file:
``gpt4_1:gpt4_1_val.json`` takes the self-edits of an item file, published or ours, for the same passages.
So another model's texts and another prompt key stand beside the model's own. Trains and asks nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from seal_nb.errors import DataError, SettingsError
from seal_nb.passages import Passage, load_passages

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


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # part of a file name


@dataclass(frozen=True, kw_only=True)
class ArmSource:
    """An arm, what it trains on, and the item file of its self-edits ("" : those of the dataset)."""

    name: str
    arm: SingleArm
    file: str = ""

    @property
    def settings_fields(self) -> dict[str, str]:
        """As SinglePassageSettings has them."""
        own = {"label": self.name, "texts_from": Path(self.file).name} if self.file else {}
        return {"arm": self.arm, **own}


def parse_arms(text: str) -> list[ArmSource]:
    """``passage_only,gpt4_1:FILE`` as arms, in order. Raises: SettingsError for what is no arm."""
    sources = [_parse(entry.strip()) for entry in text.split(",") if entry.strip()]
    names = [source.name for source in sources]
    if not sources or len(set(names)) < len(names):
        raise SettingsError(f"arms={text!r}: give at least one arm, each name once")
    return sources


def _parse(entry: str) -> ArmSource:
    known = (*ARMS, IN_CONTEXT)
    name, has_file, file = (part.strip() for part in entry.partition(":"))
    if not has_file and name in known:
        return ArmSource(name=name, arm=name)
    if has_file and file and _NAME.fullmatch(name) and name not in known:
        return ArmSource(name=name, arm="self_edits", file=file)
    raise SettingsError(
        f"arms has {entry!r}: known are {', '.join(known)}, or a name of your own with an item file: "
        "gpt4_1:gpt4_1_val.json"
    )


def unused_self_edits(
    sources: Sequence[ArmSource], texts: Mapping[str, Sequence[Passage]], k_completions: int
) -> list[str]:
    """A line for each arm whose file holds more self-edits of a passage than are asked for."""
    arms = [source.name for source in sources if source.arm == "self_edits"]
    most = {arm: max((len(one.completions) for one in texts[arm]), default=0) for arm in arms}
    return [
        f"{arm}: the file holds {n} self-edits of a passage; k_completions = {k_completions} takes the first"
        for arm, n in most.items()
        if n > k_completions
    ]


def passages_of_arm(passages: Sequence[Passage], source: ArmSource) -> list[Passage]:
    """The passages with the arm's own self-edits. Raises: DataError where its file lacks a passage."""
    if not source.file:
        return list(passages)
    texts = {(one.title, one.context): one for one in load_passages(source.file)}
    for at, passage in enumerate(passages):
        if (passage.title, passage.context) not in texts:
            raise DataError(
                f"has no item for passage {at} of the dataset, {passage.title!r} (same title and context)",
                path=source.file,
                remedy="give self-edits of these very passages, or lower n_articles",
            )
    own = [texts[passage.title, passage.context] for passage in passages]
    return [
        replace(passage, completions=one.completions, prompt=one.prompt)
        for passage, one in zip(passages, own, strict=True)
    ]

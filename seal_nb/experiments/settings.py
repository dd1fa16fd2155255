"""Settings of one adapter (`Training`), and the arms of an evaluation with the texts they train on.

Field names and defaults are the published ones for single passages (SEAL, arXiv 2506.10943; `lora_params` of the
published run files). They are declared here once: notebooks, requests and run files all take them from here.
"""

import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Self

from seal_nb.errors import DataError, SettingsError
from seal_nb.passages import Passage, load_passages

Arm = Literal["self_edits", "passage_only", "hand_written"]
ARMS: tuple[Arm, ...] = ("self_edits", "passage_only", "hand_written")
SingleArm = Literal[Arm, "in_context"]  # in_context trains nothing: the passage is in the prompt
IN_CONTEXT: SingleArm = "in_context"
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # becomes part of a file name


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one adapter is trained and how its answers are generated.

    Args:
        lora_rank: rank of the adapter.
        lora_alpha: LoRA scale is `lora_alpha / lora_rank`.
        lora_dropout: in [0, 1).
        target_modules: names of layers; empty: PEFT's default for the architecture; `["all-linear"]`: all.
        finetune_epochs: passes over the train sequences.
        finetune_lr: peak learning rate of AdamW, which falls linearly to zero.
        batch_size: train sequences of a micro-batch.
        gradient_accumulation_steps: micro-batches of an optimiser step.
        end_mask_substring: tokens of a sequence up to and including this text carry no loss.
        max_seq_length: tokens; longer sequences are cut.
        padding_in_loss: pad each sequence to `pad_to` tokens and train on the padding, as published.
        max_new_tokens: tokens of an answer.
        soft_scores: also compute log-probabilities of the gold answers, in nats.
        chat: ask questions through the model's chat template.

    Raises:
        SettingsError: for a value that cannot be trained with.

    Source: SEAL, arXiv 2506.10943, `lora_params` of the published run files.
    """

    lora_rank: int = 32
    lora_alpha: float = 64
    lora_dropout: float = 0.0
    target_modules: Sequence[str] = ()
    finetune_epochs: int = 10
    finetune_lr: float = 1e-3
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    end_mask_substring: str = ""
    max_seq_length: int = 2048
    padding_in_loss: bool = False
    pad_to: int = 2048
    max_new_tokens: int = 64
    soft_scores: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), kind)
        for name in ("lora_rank", "finetune_epochs", "batch_size", "gradient_accumulation_steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: must be at least 1")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], **settings: Any) -> Self:
        """The settings that a notebook's parameters name; the others keep their defaults.

        Args:
            parameters: the notebook's `globals()`.
            **settings: fields that are no parameters of the notebook.

        Raises:
            SettingsError: for a parameter of the wrong type; the message names it.
        """
        named = {field.name: parameters[field.name] for field in fields(cls) if field.name in parameters}
        return cls(**(named | settings))

    def request_fields(self) -> dict[str, Any]:
        """As fields of a `protocol.TTTRequest`."""
        return asdict(self) | {"target_modules": list(self.target_modules)}

    def lora_params(self) -> dict[str, Any]:
        """As run files state them: the published keys first, then ours."""
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


_KINDS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number such as 32"),
    float: (Real, "a number such as 1e-3"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
}


def _check_type(name: str, value: Any, kind: Any) -> None:
    if kind in _KINDS:
        wanted, example = _KINDS[kind]
        is_right = isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))
    else:
        is_right = isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
        example = 'a list of texts such as ["q_proj", "v_proj"]'
    if not is_right:
        raise SettingsError(f"{name}={value!r} is of type {type(value).__name__}; give {example}")


def names_in(parameter: str, value: str | Sequence[str]) -> list[str]:
    """The names in a comma list or a list. Raises: SettingsError for none, and for a name that occurs twice."""
    names = [one.strip() for one in (value.split(",") if isinstance(value, str) else value) if one.strip()]
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"{parameter}={value!r}: give at least one, each name once")
    return names


@dataclass(frozen=True, kw_only=True)
class ArmSource:
    """An arm by name, what it trains on, and the item file of its self-edits (empty: those of the dataset)."""

    name: str
    arm: SingleArm
    file: str = ""


def parse_arms(arms: str | Sequence[str]) -> list[ArmSource]:
    """Arms in order: `passage_only`, `self_edits`, `hand_written`, `in_context`, or `NAME:FILE` for the self-edits of
    another item file on the same passages, such as `gpt4_1:gpt4_1_val.json`.
    Raises: SettingsError for an unknown arm and for a name that occurs twice."""
    sources = [_parse(entry) for entry in names_in("arms", arms)]
    names_in("arms", [source.name for source in sources])  # two files under one name
    return sources


def _parse(entry: str) -> ArmSource:
    known = (*ARMS, IN_CONTEXT)
    name, has_file, file = (part.strip() for part in entry.partition(":"))
    if not has_file and name in known:
        return ArmSource(name=name, arm=name)
    if has_file and file and _ARM_NAME.fullmatch(name) and name not in known:
        return ArmSource(name=name, arm="self_edits", file=file)
    raise SettingsError(
        f"arms has {entry!r}: known are {', '.join(known)}, or a name of your own with an item file: "
        "gpt4_1:gpt4_1_val.json"
    )


def passages_of_arm(passages: Sequence[Passage], source: ArmSource) -> list[Passage]:
    """The passages with the self-edits of the arm. Raises: DataError where its file lacks a passage."""
    if not source.file:
        return list(passages)
    items, found = {(one.title, one.context): one for one in load_passages(source.file)}, []
    for at, passage in enumerate(passages):
        if (own := items.get((passage.title, passage.context))) is None:
            raise DataError(
                f"has no item for passage {at} of the dataset, {passage.title!r} (same title and context)",
                path=source.file,
                remedy="give self-edits of these very passages, or lower n_articles",
            )
        found.append(replace(own, questions=passage.questions))
    return found


def texts_of_arm(arm: str, passage: Passage, index: int, *, k_completions: int) -> tuple[str, ...]:
    """The texts an arm trains on besides the passage, one adapter each; `passage_only` has one empty text.
    Raises: DataError for a passage without such a text."""
    if arm in ("passage_only", IN_CONTEXT):
        return ("",)
    texts = passage.completions if arm == "self_edits" else (passage.hand_written,)
    if not texts or (arm == "hand_written" and not texts[0]):
        raise DataError(
            f"passage {passage.title!r} has nothing for the arm {arm!r}",
            item=index,
            field="completions" if arm == "self_edits" else "hand_written",
            remedy="run 01_create_self_edits on the items first, or choose another arm",
        )
    return texts[:k_completions]

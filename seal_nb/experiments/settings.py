"""Settings of one adapter (`Training`), and the arms of an evaluation with the texts they train on.

Field names and defaults are the published ones for single passages (SEAL, arXiv 2506.10943; `lora_params` of the
published run files). They are declared here once: notebooks, requests and run files all take them from here."""

import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from seal_nb.errors import DataError, ProtocolError, SettingsError
from seal_nb.metrics import counted
from seal_nb.passages import Passage, load_passages, text_key
from seal_nb.prompts import AnswerStyle
from seal_nb.protocol import GenerateRequest, TTTRequest, validated
from seal_nb.results.run import LORA_PARAMS
from seal_nb.settings import Settings, setting
from seal_nb.views.live import say

Arm = Literal["self_edits", "passage_only", "hand_written"]
ARMS: tuple[Arm, ...] = typing.get_args(Arm)
# Controls: passage_matched trains on the passage alone for as many steps as the longest arm, shuffled on the self-edit
# (and the passage) of another passage. in_context trains nothing: the passage is in the prompt.
CptArm = Literal[Arm, "passage_matched"]
CPT_ARMS: tuple[CptArm, ...] = typing.get_args(CptArm)
SingleArm = Literal[CptArm, "shuffled", "in_context"]
SINGLE_ARMS: tuple[SingleArm, ...] = typing.get_args(SingleArm)
CONTROLS = ("passage_matched", "shuffled")  # `tune` has settings for them, too
Match = Literal["none", "steps", "tokens"]
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # becomes part of a file name


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
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
        answer_style: "published", or "short": a sentence after each question asks for a few words.

    Raises:
        SettingsError: for a value that cannot be trained with.

    Source: SEAL, arXiv 2506.10943, `lora_params` of the published run files."""

    lora_rank: int = setting(32, least=1)
    lora_alpha: float = 64
    lora_dropout: float = 0.0
    target_modules: Sequence[str] = ()
    finetune_epochs: int = setting(10, least=1)
    finetune_lr: float = 1e-3
    batch_size: int = setting(1, least=1)
    gradient_accumulation_steps: int = setting(1, least=1)
    end_mask_substring: str = ""
    max_seq_length: int = 2048
    padding_in_loss: bool = False
    pad_to: int = 2048
    max_new_tokens: int = setting(64, least=1)
    soft_scores: bool = False
    chat: bool = False
    answer_style: AnswerStyle = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        check_limits(TTTRequest, self.request_fields())

    def request_fields(self) -> dict[str, Any]:
        """As fields of a `protocol.TTTRequest`."""
        fields = asdict(self) | {"target_modules": list(self.target_modules)}
        return {name: value for name, value in fields.items() if name != "answer_style"}  # part of the question

    def lora_params(self) -> dict[str, Any]:
        """As run files state them: the published keys first, then ours."""
        values = self.request_fields()
        return {name: values[ours] for name, ours in LORA_PARAMS.items()}


def check_limits(kind: type[TTTRequest] | type[GenerateRequest], values: dict[str, Any]) -> None:
    """Raises: SettingsError for a value that the server would refuse."""
    try:
        validated(kind, values)
    except ProtocolError as error:
        raise SettingsError(str(error)) from None


def names_in(parameter: str, value: str | Sequence[str]) -> list[str]:
    """The names in a comma list or a list. Raises: SettingsError for none, and for a name that occurs twice."""
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise SettingsError(f"{parameter}={value!r}: give a list of texts, or names with commas")
    names = [one.strip() for one in given if one.strip()]
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"{parameter}={value!r}: give at least one, each name once")
    return names


def parse_arms(arms: str | Sequence[str]) -> dict[str, str]:
    """The arms in order, each with the item file of its self-edits (empty: those of the dataset). An arm is
    `passage_only`, `self_edits`, `hand_written`, `in_context`, or `NAME:FILE` for the self-edits of another item file
    on the same passages, such as `gpt4_1:gpt4_1_val.json`.
    Raises: SettingsError for an unknown arm and for a name that occurs twice."""
    found = []
    for entry in names_in("arms", arms):
        name, has_file, file = (part.strip() for part in entry.partition(":"))
        is_own = name not in SINGLE_ARMS and file and _ARM_NAME.fullmatch(name)
        if not (is_own if has_file else name in SINGLE_ARMS):
            own = "a name of your own with an item file: gpt4_1:gpt4_1_val.json"
            raise SettingsError(f"arms has {entry!r}: known are {', '.join(SINGLE_ARMS)}, or {own}")
        found.append((name, file))
    names_in("arms", [name for name, _ in found])  # two files under one name
    return dict(found)


def check_asked(passages: Sequence[Passage]) -> None:
    """Says how many passages have no questions. Raises: DataError where all have none: nothing could be measured."""
    n = sum(not passage.questions for passage in passages)
    if n == len(passages):
        remedy = "give at least one of them questions with answers (docs/own_passages.md), or raise n_articles"
        raise DataError(f"none of {counted(n, 'passages')} has a question, so nothing can be asked", remedy=remedy)
    if n:
        say(f"{n} of {len(passages)} passages have no questions: trained on, in no mean or ranking")


def arm_passages(arm: str, passages: Sequence[Passage], file: str = "") -> list[Passage]:
    """The passages, with the self-edits of an item file if there is one. Raises: DataError where the file lacks one,
    and for a passage without a text for the arm."""
    items, found = {text_key(one.title, one.context): one for one in load_passages(file)} if file else {}, []
    for at, passage in enumerate(passages):
        own = items.get(text_key(passage.title, passage.context)) if file else passage
        if own is None:
            problem = f"has no item for passage {at} of the dataset, {passage.title!r} (same title and context)"
            raise DataError(problem, path=file, remedy="give self-edits of these very passages, or lower n_articles")
        arm_texts("self_edits" if file else arm, own, at, k_completions=1)
        found.append(replace(own, title=passage.title, context=passage.context, questions=passage.questions))
    return found


def arm_texts(arm: str, passage: Passage, index: int, *, k_completions: int) -> tuple[str, ...]:
    """The texts an arm trains on besides the passage, one adapter each; `passage_only` has one empty text. Those of
    `shuffled` are self-edits if the passage has some, else what was written by hand.
    Raises: DataError for a passage without such a text."""
    if arm in ("passage_only", "passage_matched", "in_context"):
        return ("",)
    field = "completions" if arm == "self_edits" or (arm == "shuffled" and passage.completions) else "hand_written"
    texts = passage.completions if field == "completions" else (passage.hand_written,)
    if not texts or (field == "hand_written" and not texts[0]):
        problem = f"passage {passage.title!r} has nothing for the arm {arm!r}"
        remedy = "run 01_create_self_edits on the items first, or choose another arm"
        raise DataError(problem, item=index, field=field, remedy=remedy)
    return texts[:k_completions]

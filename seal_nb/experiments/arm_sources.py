"""Which arms a notebook was asked for, and where each has its self-edits from.

An arm is one of ``passage_only``, ``self_edits``, ``hand_written``, ``in_context``, or a name with a file:
``gpt4_1:gpt4_1_val.json`` takes the self-edits of an item file, published or ours, for the same passages.
So another model's texts and another prompt key stand beside the model's own. Trains and asks nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.settings import ARMS, IN_CONTEXT, SingleArm
from seal_nb.passages import Passage, load_passages

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

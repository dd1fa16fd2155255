"""Unrelated knowledge before and after edits: twenty general questions that no passage is about.

The questions ship with the project. They are asked of the base and of kept adapters, without training. Twenty
questions show a collapse, not a change of a few points.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_nb.experiments.session import TTT, ask_named, loop_request
from seal_nb.experiments.settings import Training
from seal_nb.metrics import accuracy, paired_difference
from seal_nb.protocol import EvalQuestion, TTTReply
from seal_nb.storage import Journal, read_json

if TYPE_CHECKING:
    import pandas as pd


def general_questions() -> list[EvalQuestion]:
    """The shipped questions, without a title."""
    path = Path(str(resources.files("seal_nb") / "data" / "general_questions.json"))
    return [EvalQuestion(**entry) for entry in read_json(path)]


def ask_control(
    ttt: TTT, journal: Journal, stacks: Mapping[str, Sequence[str]], training: Training, *, seed: int
) -> dict[str, TTTReply]:
    """The general questions asked of the base ("never edited") and of each named stack of kept adapters.
    Raises: RemoteError where one failed."""
    how: dict[str, Any] = {"skip_training": True, "seed": seed}
    requests = {
        name: loop_request(ttt.model_id, training, questions=general_questions(), adapter_stack=list(stack), **how)
        for name, stack in {"never edited": (), **stacks}.items()
    }
    return ask_named(ttt, requests, journal, what="general questions")


def control_frame(replies: Mapping[str, TTTReply]) -> "pd.DataFrame":
    """One row for each model: accuracy on the general questions, answers lost and won, the paired change."""
    import pandas as pd

    columns = ["model", "questions", "accuracy", "lost", "won", "change"]
    if not replies:
        return pd.DataFrame(columns=columns)
    before = next(iter(replies.values())).adapter_correct
    rows: list[dict[str, Any]] = []
    for name, reply in replies.items():
        after = reply.adapter_correct
        pairs = list(zip(before, after, strict=True))
        graded = any(a is not None and b is not None for b, a in pairs)
        change = paired_difference([[a] for a in after], [[b] for b in before], unit="questions") if graded else None
        rows.append(
            {
                "model": name,
                "questions": len(after),
                "accuracy": accuracy(after),
                "lost": sum(b is True and a is False for b, a in pairs),
                "won": sum(b is False and a is True for b, a in pairs),
                "change": change.sentence() if change else None,
            }
        )
    return pd.DataFrame(rows, columns=columns)

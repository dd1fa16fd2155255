"""Unrelated knowledge before and after edits: twenty general questions that no passage is about.

Forgetting beyond the edited passages. The questions ship with the project; they are asked of the base and of
kept adapters through the server, without training. Twenty questions see a collapse, not a few points.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from seal_nb.experiments.session import Tell, run_requests
from seal_nb.experiments.settings import TrainingSettings
from seal_nb.experiments.single_passage import identified
from seal_nb.metrics import Verdicts, accuracy, paired_difference
from seal_nb.protocol import EvalQuestion, TTTReply, TTTRequest
from seal_nb.server.client import TTTClient
from seal_nb.storage import Journal, read_json


def general_questions() -> list[EvalQuestion]:
    """The shipped questions, without a title."""
    path = Path(str(resources.files("seal_nb") / "data" / "general_questions.json"))
    return [EvalQuestion(**entry) for entry in read_json(path)]


def control_request(stack: Sequence[str], training: TrainingSettings, *, seed: int, model_id: str) -> TTTRequest:
    """The general questions asked of the base with these kept adapters; none: of the untouched model."""
    request = TTTRequest(
        eval_questions=general_questions(),
        adapter_stack=list(stack),
        skip_training=True,
        seed=seed,
        **training.request_fields(),
    )
    return identified(request, model_id)


def ask_control(
    client: TTTClient,
    journal: Journal,
    stacks: Mapping[str, Sequence[str]],
    training: TrainingSettings,
    *,
    seed: int,
    model_id: str,
    tell: Tell = lambda _: None,
) -> dict[str, TTTReply]:
    """The reply of each named stack, "never edited" first. Raises: RemoteError where one failed."""
    named = {"never edited": (), **stacks}
    requests = {name: control_request(stack, training, seed=seed, model_id=model_id) for name, stack in named.items()}
    collected = run_requests(client, list(requests.values()), journal, what="general questions", tell=tell)
    return collected.all_replies(requests)


def control_rows(replies: Mapping[str, TTTReply]) -> list[dict[str, Any]]:
    """One line a stack: accuracy on the general questions, what changed, and an answer that was lost."""
    (_, before), *_ = replies.items()
    return [_row(name, reply.adapter_correct, before.adapter_correct) for name, reply in replies.items()]


def _row(name: str, after: Verdicts, before: Verdicts) -> dict[str, Any]:
    pairs = list(zip(before, after, strict=True))
    graded = any(a is not None and b is not None for b, a in pairs)
    change = paired_difference([[a] for a in after], [[b] for b in before], unit="questions") if graded else None
    return {
        "model": name,
        "questions": len(after),
        "accuracy": accuracy(after),
        "lost": sum(b is True and a is False for b, a in pairs),
        "won": sum(b is False and a is True for b, a in pairs),
        "change": change.sentence() if change else None,
    }

"""Continual self-edits: sequences of passages, each edited into the weights on top of the edits before it.

SEAL, arXiv 2506.10943, ``continual_self_edits.py``: the model as it is now writes a self-edit of the next
passage, an adapter is trained on it, and all passages so far are asked again. There the adapter is merged
into the weights; here it stays, frozen, in a stack of adapters on one base, which gives the same outputs, and
so all sequences advance side by side. Requests and records only: the loop over steps stands in the notebook,
the matrix and its numbers in ``continual_summary``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from seal_nb.errors import RemoteError, SettingsError
from seal_nb.experiments.cpt import split_by_passage
from seal_nb.experiments.settings import ARMS, Arm, TrainingSettings
from seal_nb.experiments.single_passage import (
    SinglePassageSettings,
    eval_questions,
    identified,
    self_edit_texts,
)
from seal_nb.metrics import Verdicts
from seal_nb.passages import Passage
from seal_nb.prompts import self_edit_prompt
from seal_nb.protocol import GenerateReply, GenerateRequest, TTTReply, TTTRequest
from seal_nb.runs import Journal, content_id, derived_seed
from seal_nb.self_edits import train_sequences
from seal_nb.service.client import TTTClient


@dataclass(frozen=True, kw_only=True)
class ContinualSettings:
    """What is run; defaults as published (one of its eight runs; run r has seed 42 + r)."""

    n_sequences: int = 8
    n_datapoints: int = 8  # passages of a sequence
    arm: Arm = "self_edits"  # written by the model with all edits so far; the other arms are given texts
    prompt_key: str = "implications"
    max_tokens: int = 8192  # of one self-edit
    temperature: float = 1.0
    top_p: float = 0.95
    split_newlines: bool = True
    seed: int = 42
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        if self.n_sequences < 1 or self.n_datapoints < 1:
            raise SettingsError(f"{self.n_sequences=}, {self.n_datapoints=}: both must be at least 1")
        if self.arm not in ARMS:
            raise SettingsError(f"arm={self.arm!r}: known are {', '.join(ARMS)}")


def draw_sequences(passages: Sequence[Passage], settings: ContinualSettings) -> list[list[Passage]]:
    """`n_sequences` random samples without repetition within a sequence. Raises: SettingsError."""
    if len(passages) < settings.n_datapoints:
        raise SettingsError(
            f"n_datapoints={settings.n_datapoints}, but the dataset has {len(passages)} passages; lower it"
        )
    generator = random.Random(settings.seed)
    return [generator.sample(list(passages), settings.n_datapoints) for _ in range(settings.n_sequences)]


def unedited_request(
    sequence: Sequence[Passage], settings: ContinualSettings, *, model_id: str
) -> TTTRequest:
    """Row 0: all passages of a sequence asked of the untouched model."""
    questions = [question for passage in sequence for question in eval_questions(passage)]
    request = TTTRequest(
        eval_questions=questions, skip_training=True, seed=settings.seed, **settings.training.request_fields()
    )
    return identified(request, model_id)


def self_edit_request(
    number: int, passage: Passage, stack: Sequence[str], settings: ContinualSettings, *, model_id: str
) -> GenerateRequest:
    """The model with all edits so far writes the next self-edit of sequence `number`."""
    request = GenerateRequest(
        prompts=[self_edit_prompt(settings.prompt_key, title=passage.title, context=passage.context)],
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        adapter_stack=list(stack),
        priority=0,
        seed=derived_seed(settings.seed, "write", number, passage.title, len(stack)),
    )
    content = request.model_dump(mode="json", exclude={"request_id", "priority", "traceback"})
    return request.model_copy(update={"request_id": content_id([model_id, content])})


def edit_request(
    number: int,
    sequence: Sequence[Passage],
    text: str,
    stack: Sequence[str],
    settings: ContinualSettings,
    *,
    model_id: str,
) -> TTTRequest:
    """Edit the next passage in on top of `stack`, keep the adapter, ask all passages so far."""
    step = len(stack) + 1
    passage = sequence[step - 1]
    request = TTTRequest(
        train_sequences=train_sequences(
            text, title=passage.title, context=passage.context, split_newlines=settings.split_newlines
        ),
        eval_questions=[question for seen in sequence[:step] for question in eval_questions(seen)],
        adapter_stack=list(stack),
        skip_baseline=True,  # the row before has already asked the model without this edit
        seed=derived_seed(settings.seed, "edit", number, passage.title, step),
        **settings.training.request_fields(),
    )
    # Named after what it is, so that no two edits share a name and a resumed run finds its own.
    name = f"edit-{identified(request, model_id).request_id}"
    return identified(request.model_copy(update={"adapter_name": name}), model_id)


def texts_of_step(
    client: TTTClient,
    journal: Journal,
    sequences: Sequence[Sequence[Passage]],
    stacks: Sequence[Sequence[str]],
    settings: ContinualSettings,
    *,
    model_id: str,
) -> list[str]:
    """What the next edit of each sequence is trained on: new self-edits, or the texts of the arm."""
    step = len(stacks[0])
    if settings.arm != "self_edits":
        given = SinglePassageSettings(arm=settings.arm)
        return [self_edit_texts(sequence[step], step, given)[0] for sequence in sequences]
    requests = [
        self_edit_request(number, sequence[step], stacks[number], settings, model_id=model_id)
        for number, sequence in enumerate(sequences)
    ]
    return write_self_edits(client, requests, journal)


def write_self_edits(client: TTTClient, requests: Sequence[GenerateRequest], journal: Journal) -> list[str]:
    """The text for each request, from the journal or from the server (all at once) and then into the journal.

    Raises: RemoteError for the first that failed, once the others are kept.
    """
    missing = [request for request in requests if str(request.request_id) not in journal]
    failures: list[RemoteError] = []
    for index, reply in client.run_indexed(missing):
        if isinstance(reply, RemoteError):
            failures.append(reply)
        else:
            journal.append(str(missing[index].request_id), reply.model_dump(mode="json"))
    if failures:
        raise failures[0]
    replies = [GenerateReply.model_validate(journal.get(str(request.request_id))) for request in requests]
    return [reply.texts[0].strip() for reply in replies]


def verdict_row(reply: TTTReply, sequence: Sequence[Passage], step: int) -> list[Verdicts | None]:
    """The verdicts of every passage after `step` edits; None for those that were not asked."""
    seen = sequence if step == 0 else sequence[:step]
    correct = split_by_passage(reply.adapter_correct, [len(passage.questions) for passage in seen])
    return [*correct, *[None] * (len(sequence) - len(seen))]


def sequence_record(
    sequence: Sequence[Passage],
    texts: Sequence[str],
    requests: Sequence[TTTRequest],
    replies: Sequence[TTTReply],
) -> dict[str, Any]:
    """What a summary keeps of one sequence: self-edits, answers and verdicts of every step."""
    return {
        "titles": [passage.title for passage in sequence],
        # Titles repeat: without its questions no answer could be graded again.
        "questions": [
            [{"question": one.question, "answer": one.answer} for one in passage.questions]
            for passage in sequence
        ],
        "self_edits": list(texts),
        "steps": [
            {
                "request_id": request.request_id,
                "seed": request.seed,
                "texts": reply.adapter_texts,
                "correct": reply.adapter_correct,
                "n_ungraded": sum(verdict is None for verdict in reply.adapter_correct),
            }
            for request, reply in zip(requests, replies, strict=True)
        ],
    }

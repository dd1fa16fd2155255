"""Continual self-edits: sequences of passages, each edited into the weights on top of the edits before it.

SEAL, arXiv 2506.10943, ``continual_self_edits.py``: the model as it is now writes a self-edit of the next
passage, an adapter is trained on it, and all passages so far are asked again. There the adapter is merged
into the weights; here it stays, frozen, in a stack of adapters on one base, which gives the same outputs, and
so all sequences advance side by side. Other strategies: merging as published (``continual_merged``), replay
of earlier self-edits with each edit, one adapter a passage chosen by retrieval (``continual_retrieval``).
Requests and records only: the loop over steps stands in the notebook, the matrix in ``continual_summary``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from seal_nb.errors import RemoteError, SettingsError
from seal_nb.experiments.settings import ARMS, Arm, TrainingSettings
from seal_nb.experiments.single_passage import SinglePassageSettings, eval_questions, identified, self_edit_texts
from seal_nb.metrics import Verdicts
from seal_nb.passages import Passage
from seal_nb.prompts import self_edit_prompt
from seal_nb.protocol import GenerateReply, GenerateRequest, TTTReply, TTTRequest
from seal_nb.results.cpt import split_by_passage
from seal_nb.self_edits import train_sequences
from seal_nb.server.client import TTTClient
from seal_nb.storage import Journal, content_id, derived_seed

Strategy = Literal["stacked", "merged", "replay", "retrieval"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, kw_only=True)
class ContinualSettings:
    """What is run; defaults as published (one of its eight runs; run r has seed 42 + r)."""

    n_sequences: int = 8
    n_datapoints: int = 8  # passages of a sequence
    strategy: Strategy = "stacked"  # how an edit is kept
    replay_passages: int = 0  # with "replay": earlier passages trained on again with each edit; 0: all
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
        if self.strategy not in STRATEGIES or self.replay_passages < 0:
            raise SettingsError(
                f"strategy={self.strategy!r}, {self.replay_passages=}: known are {', '.join(STRATEGIES)}, "
                "and 0 or more passages"
            )

    def under(self, stack: Sequence[str]) -> list[str]:
        """The adapters that lie under the next edit, and with which its self-edit is written."""
        return list(stack) if self.strategy in ("stacked", "replay") else []


@dataclass(kw_only=True)
class ContinualRun:
    """What has been done so far: for each sequence its adapters and self-edits, for each step all replies."""

    stacks: list[list[str]]
    written: list[list[str]]
    requests: list[list[TTTRequest]] = field(default_factory=list)
    replies: list[list[TTTReply]] = field(default_factory=list)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[Passage]]) -> "ContinualRun":
        """Nothing done yet."""
        return cls(stacks=[[] for _ in sequences], written=[[] for _ in sequences])

    def write(self, texts: Sequence[str]) -> None:
        """The next self-edit of each sequence."""
        for written, text in zip(self.written, texts, strict=True):
            written.append(text)

    def keep(self, requests: Sequence[TTTRequest], replies: Sequence[TTTReply]) -> None:
        """The edit of each sequence: its adapter goes on top of the sequence's others."""
        for stack, request in zip(self.stacks, requests, strict=True):
            stack.append(str(request.adapter_name))
        self.requests.append(list(requests))
        self.replies.append(list(replies))

    def replies_of(self, number: int) -> list[TTTReply]:
        """The replies of one sequence, in order of its edits."""
        return [replies[number] for replies in self.replies]

    def requests_of(self, number: int) -> list[TTTRequest]:
        return [requests[number] for requests in self.requests]


def draw_sequences(passages: Sequence[Passage], settings: ContinualSettings) -> list[list[Passage]]:
    """`n_sequences` random samples without repetition within a sequence. Raises: SettingsError."""
    if len(passages) < settings.n_datapoints:
        raise SettingsError(
            f"n_datapoints={settings.n_datapoints}, but the dataset has {len(passages)} passages; lower it"
        )
    generator = random.Random(settings.seed)
    return [generator.sample(list(passages), settings.n_datapoints) for _ in range(settings.n_sequences)]


def unedited_request(sequence: Sequence[Passage], settings: ContinualSettings, *, model_id: str) -> TTTRequest:
    """Row 0: all passages of a sequence asked of the untouched model."""
    questions = [question for passage in sequence for question in eval_questions(passage)]
    request = TTTRequest(
        eval_questions=questions, skip_training=True, seed=settings.seed, **settings.training.request_fields()
    )
    return identified(request, model_id)


def self_edit_request(
    number: int, passage: Passage, stack: Sequence[str], settings: ContinualSettings, *, model_id: str
) -> GenerateRequest:
    """The model with all edits so far writes the next self-edit of sequence `number`.

    `stack`: the adapters of the edits so far, whether or not they lie under the next one.
    """
    request = GenerateRequest(
        prompts=[self_edit_prompt(settings.prompt_key, title=passage.title, context=passage.context)],
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        adapter_stack=settings.under(stack),
        priority=0,
        seed=derived_seed(settings.seed, "write", number, passage.title, len(stack)),
    )
    content = request.model_dump(mode="json", exclude={"request_id", "priority", "traceback"})
    return request.model_copy(update={"request_id": content_id([model_id, content])})


def edit_request(
    number: int,
    sequence: Sequence[Passage],
    texts: Sequence[str],
    stack: Sequence[str],
    settings: ContinualSettings,
    *,
    model_id: str,
) -> TTTRequest:
    """Edit the next passage in, keep the adapter, ask all passages so far.

    `texts`: the self-edits of all steps so far, the next one last; `stack`: the adapters before it. With
    "retrieval" nothing is asked: which adapter answers is decided question by question.
    """
    step = len(texts)
    seen = [] if settings.strategy == "retrieval" else sequence[:step]
    request = TTTRequest(
        train_sequences=_edit_sequences(number, sequence, texts, settings),
        eval_questions=[question for passage in seen for question in eval_questions(passage)],
        adapter_stack=settings.under(stack),
        skip_baseline=True,  # the row before has already asked the model without this edit
        seed=derived_seed(settings.seed, "edit", number, sequence[step - 1].title, step),
        **settings.training.request_fields(),
    )
    # Named after what it is, so that no two edits share a name and a resumed run finds its own.
    name = f"edit-{identified(request, model_id).request_id}"
    return identified(request.model_copy(update={"adapter_name": name}), model_id)


def _edit_sequences(
    number: int, sequence: Sequence[Passage], texts: Sequence[str], settings: ContinualSettings
) -> list[str]:
    """Train sequences of the last text, and before them those of the earlier edits that are replayed."""
    last = len(texts) - 1
    earlier: list[int] = []
    if settings.strategy == "replay":
        draws = random.Random(derived_seed(settings.seed, "replay", number, last))
        earlier = sorted(draws.sample(range(last), min(last, settings.replay_passages or last)))
    return [
        line
        for at in (*earlier, last)
        for line in train_sequences(
            texts[at], title=sequence[at].title, context=sequence[at].context, split_newlines=settings.split_newlines
        )
    ]


def texts_of_step(
    client: TTTClient,
    journal: Journal,
    sequences: Sequence[Sequence[Passage]],
    stacks: Sequence[Sequence[str]],
    settings: ContinualSettings,
    *,
    model_id: str,
    numbers: Sequence[int] = (),
) -> list[str]:
    """What the next edit of each sequence is trained on: new self-edits, or the texts of the arm.

    `numbers`: which sequences of the experiment these are; empty: the first ones.
    """
    step = len(stacks[0])
    if settings.arm != "self_edits":
        given = SinglePassageSettings(arm=settings.arm)
        return [self_edit_texts(sequence[step], step, given)[0] for sequence in sequences]
    requests = [
        self_edit_request(number, sequence[step], stack, settings, model_id=model_id)
        for number, sequence, stack in zip(numbers or range(len(sequences)), sequences, stacks, strict=True)
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
    sequence: Sequence[Passage], texts: Sequence[str], requests: Sequence[TTTRequest], replies: Sequence[TTTReply]
) -> dict[str, Any]:
    """What a summary keeps of one sequence: self-edits, answers and verdicts of every step, row 0 first."""
    return {
        "titles": [passage.title for passage in sequence],
        # Titles repeat: without its questions no answer could be graded again.
        "questions": [
            [{"question": one.question, "answer": one.answer} for one in passage.questions] for passage in sequence
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


def run_records(
    run: ContinualRun,
    sequences: Sequence[Sequence[Passage]],
    row_zero: Sequence[TTTRequest],
    unedited: Sequence[TTTReply],
) -> list[dict[str, Any]]:
    """``sequence_record`` of every sequence."""
    return [
        sequence_record(
            sequence,
            run.written[number],
            [row_zero[number], *run.requests_of(number)],
            [unedited[number], *run.replies_of(number)],
        )
        for number, sequence in enumerate(sequences)
    ]


def summary_file_name(strategy: str) -> str:
    """`summary_continual.json` for stacked adapters, the published way; other strategies add their name."""
    return "summary_continual.json" if strategy == "stacked" else f"summary_continual_{strategy}.json"

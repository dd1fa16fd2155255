"""The requests of continual self-edits: sequences, self-edits, edits. `continual` sends them in order.

SEAL, arXiv 2506.10943, `continual_self_edits.py`: the model as it is now writes a self-edit of the next passage, an
adapter is trained on it, and all passages so far are asked again.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from seal_nb.errors import SettingsError
from seal_nb.experiments.session import TTT, ask, identified, loop_request
from seal_nb.experiments.settings import ARMS, Arm, Training, texts_of_arm
from seal_nb.experiments.single_passage import eval_questions
from seal_nb.passages import Passage
from seal_nb.prompts import self_edit_prompt
from seal_nb.protocol import GenerateRequest, TTTReply, TTTRequest
from seal_nb.self_edits import train_sequences
from seal_nb.storage import Journal, derived_seed

Strategy = Literal["stacked", "merged", "replay", "retrieval"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, kw_only=True)
class ContinualSettings:
    """One strategy; defaults as published (one of its eight runs; run r has seed 42 + r)."""

    n_sequences: int = 8
    n_datapoints: int = 8  # passages of a sequence
    strategy: Strategy = "stacked"  # how an edit is kept
    replay_passages: int = 0  # with "replay": earlier passages trained on again with each edit; 0: all
    arm: Arm = "self_edits"  # written by the model with all edits so far; the other arms have given texts
    prompt_key: str = "implications"
    max_tokens: int = 8192  # of one self-edit
    temperature: float = 1.0
    top_p: float = 0.95
    split_newlines: bool = True
    seed: int = 42
    training: Training = field(default_factory=Training)

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
        """The adapters below the next edit, which also write its self-edit."""
        return list(stack) if self.strategy in ("stacked", "replay") else []


@dataclass(kw_only=True)
class Edits:
    """The edits of one sequence so far: adapter, self-edit, request and reply of each step."""

    stack: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    requests: list[TTTRequest] = field(default_factory=list)
    replies: list[TTTReply] = field(default_factory=list)

    def add(self, text: str, request: TTTRequest, reply: TTTReply) -> None:
        self.stack.append(str(request.adapter_name))
        self.texts.append(text)
        self.requests.append(request)
        self.replies.append(reply)


def draw_sequences(passages: Sequence[Passage], settings: ContinualSettings) -> list[list[Passage]]:
    """`n_sequences` random samples without repetition within a sequence. Raises: SettingsError."""
    if len(passages) < settings.n_datapoints:
        raise SettingsError(
            f"n_datapoints={settings.n_datapoints}, but the dataset has {len(passages)} passages; lower it"
        )
    generator = random.Random(settings.seed)
    return [generator.sample(list(passages), settings.n_datapoints) for _ in range(settings.n_sequences)]


def unedited_request(sequence: Sequence[Passage], settings: ContinualSettings, *, model_id: str) -> TTTRequest:
    """Row 0: all passages of a sequence, asked of the untouched model."""
    questions = [question for passage in sequence for question in eval_questions(passage)]
    return loop_request(model_id, settings.training, questions=questions, skip_training=True, seed=settings.seed)


def edit_request(
    number: int,
    sequence: Sequence[Passage],
    texts: Sequence[str],
    stack: Sequence[str],
    settings: ContinualSettings,
    *,
    model_id: str,
) -> TTTRequest:
    """Train on the next passage's self-edit, keep the adapter, ask all passages so far.

    `texts`: the self-edits of all steps so far, the next one last; `stack`: the adapters before it. With retrieval
    nothing is asked here, since the adapter is chosen question by question.
    """
    step = len(texts)
    seen = [] if settings.strategy == "retrieval" else sequence[:step]
    return loop_request(
        model_id,
        settings.training,
        texts=_edit_sequences(number, sequence, texts, settings),
        questions=[question for passage in seen for question in eval_questions(passage)],
        keep="edit",
        adapter_stack=settings.under(stack),
        skip_baseline=True,  # the row before has already asked the model without this edit
        seed=derived_seed(settings.seed, "edit", number, sequence[step - 1].title, step),
    )


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
    ttt: TTT,
    journal: Journal,
    sequences: Sequence[Sequence[Passage]],
    edits_S: Sequence[Edits],
    settings: ContinualSettings,
    *,
    numbers: Sequence[int] = (),
) -> list[str]:
    """What the next edit of each sequence is trained on: new self-edits, or the texts of the arm.

    `numbers`: the sequences' numbers in the experiment; empty: from 0. Raises: RemoteError.
    """
    step = len(edits_S[0].texts)
    if settings.arm != "self_edits":
        return [texts_of_arm(settings.arm, sequence[step], step, k_completions=1)[0] for sequence in sequences]
    requests = [
        self_edit_request(number, sequence[step], edits.stack, settings, model_id=ttt.model_id)
        for number, sequence, edits in zip(numbers or range(len(sequences)), sequences, edits_S, strict=True)
    ]
    written = ask(ttt, requests, journal, what="self-edits")
    return [written.of(request).texts[0].strip() for request in requests]


def self_edit_request(
    number: int, passage: Passage, stack: Sequence[str], settings: ContinualSettings, *, model_id: str
) -> GenerateRequest:
    """The model with all edits so far (`stack`) writes the next self-edit of sequence `number`."""
    request = GenerateRequest(
        prompts=[self_edit_prompt(settings.prompt_key, title=passage.title, context=passage.context)],
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        adapter_stack=settings.under(stack),
        priority=0,
        seed=derived_seed(settings.seed, "write", number, passage.title, len(stack)),
    )
    return identified(request, model_id)

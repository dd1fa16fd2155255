"""The edits of continual self-edits: sequences, requests, and ways to keep an edit. `continual` sends them in order.

SEAL, arXiv 2506.10943, `continual_self_edits.py`: the model as it is now writes a self-edit of the next passage, an
adapter is trained on it, and all passages so far are asked again. `edit_and_merge` makes a model folder and a server
for each edit, as published. Stacked adapters give the same outputs without a copy of the model for every edit
(tests/test_continual_merged.py). `answers_by_retrieval` keeps one adapter for each passage on the untouched model;
BM25 (Robertson & Zaragoza 2009) chooses the adapter that answers a question, or the base where no word is shared.
Edits then cannot interfere, but the retriever is sometimes wrong, and the knowledge is not in one set of weights.
"""

import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from seal_nb.errors import RunMismatch, SettingsError
from seal_nb.experiments.session import TTT, ask, identified, loop_request
from seal_nb.experiments.settings import ARMS, Arm, Training, texts_of_arm
from seal_nb.experiments.single_passage import eval_questions
from seal_nb.grading.base import Answered, asked_about
from seal_nb.passages import Passage
from seal_nb.prompts import self_edit_prompt
from seal_nb.protocol import Answers, EvalQuestion, GenerateRequest, TTTReply, TTTRequest, build_reply
from seal_nb.self_edits import train_sequences
from seal_nb.storage import Journal, content_id, derived_seed
from seal_nb.views.live import Teller

Strategy = Literal["stacked", "merged", "replay", "retrieval"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
K1, B = 1.5, 0.75  # the customary values of BM25
_WORD = re.compile(r"\w+")


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
    """Train on the next passage's self-edit, keep the adapter, ask all passages so far. `texts`: the self-edits of all
    steps so far, the next one last; `stack`: the adapters before it. With retrieval nothing is asked here, since the
    adapter is chosen question by question."""
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
    """What the next edit of each sequence is trained on: new self-edits, or the texts of the arm. `numbers`: the
    sequences' numbers in the experiment; empty: from 0. Raises: RemoteError."""
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


def edit_and_merge(
    ttt: TTT, sequences: Sequence[Sequence[Passage]], settings: ContinualSettings, journal: Journal, *, folder: Path
) -> list[Edits]:
    """All edits of each sequence, each on the model that the edit before it was merged into.

    `ttt`: the server that row 0 was asked of; the servers of the merged models take its settings. `folder`: has models
    and servers, in a subfolder for each content of a sequence, so that a merged model is never used for other passages
    or settings. The last model of a sequence stays.

    Raises: RunMismatch where the server for the first edit holds another model, RemoteError, SettingsError.
    """
    edits_S = []
    for number, sequence in enumerate(sequences):
        content = content_of(number, sequence, settings, ttt.model_id)
        place, edits = folder / f"sequence_{number + 1}_{content}", Edits()
        now = ttt.settings.model if ttt.settings else ""  # without settings, `another` raises
        for step in range(1, len(sequence) + 1):
            key, run_dir = content_id(["merged", content, step]), place / f"server_{step}"
            if key not in journal:
                with ttt.another(now, folder=run_dir) as served:
                    if step == 1 and served.model_id != ttt.model_id:
                        raise RunMismatch(
                            f"row 0 was asked of model {ttt.model_id}, the server for the merged edits has "
                            f"{served.model_id}; give both the same model, dtype, grader and deterministic"
                        )
                    (text,) = texts_of_step(served, journal, [sequence], [edits], settings, numbers=[number])
                    texts = [*edits.texts, text]
                    request = edit_request(number, sequence, texts, edits.stack, settings, model_id=served.model_id)
                    # Not through the journal: a stacked run has the same first edit, with its adapter elsewhere.
                    reply = served.client.evaluate(request)
                record = {
                    "text": text,
                    "request": request.model_dump(mode="json"),
                    "reply": reply.model_dump(mode="json"),
                }
                journal.append(key, record)
            done = journal.get(key)
            edits.add(done["text"], TTTRequest.model_validate(done["request"]), TTTReply.model_validate(done["reply"]))
            now = _merged(now, run_dir / "adapters" / edits.stack[-1], place / f"model_{step}")
            Teller()(f"merged, sequence {number + 1}: edit {step} of {len(sequence)}")
        edits_S.append(edits)
    return edits_S


def content_of(number: int, sequence: Sequence[Passage], settings: ContinualSettings, model_id: str) -> str:
    """The id of everything that the edits of a sequence depend on. Titles alone do not tell passages apart."""
    own: list[object] = [settings.arm, settings.prompt_key, settings.max_tokens, settings.temperature, settings.top_p]
    own += [settings.split_newlines, settings.seed, settings.training.request_fields()]
    return content_id([model_id, number, [asdict(passage) for passage in sequence], own])


def _merged(model: str, adapter: Path, out: Path) -> str:
    """The folder of `model` with `adapter` merged in; the merged model before it is deleted."""
    from seal_nb.ttt.lora import merge_stack

    if not out.is_dir():
        merge_stack(model, [adapter], out)
    if Path(model).parent == out.parent:
        shutil.rmtree(model, ignore_errors=True)
    return str(out)


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


class Bm25:
    """Scores of a question against a few passages, title and text."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.counts_P = [Counter(words(f"{one.title} {one.context}")) for one in passages]
        lengths = [sum(counts.values()) for counts in self.counts_P]
        mean = sum(lengths) / len(lengths) if lengths else 0.0
        self.norms_P = [K1 * (1 - B + B * length / mean) if mean else K1 for length in lengths]

    def scores(self, question: str) -> list[float]:
        """One for each passage; 0.0 where they share no word."""
        totals = [0.0] * len(self.counts_P)
        for word in set(words(question)):
            holding = sum(word in counts for counts in self.counts_P)
            rarity = math.log(1 + (len(self.counts_P) - holding + 0.5) / (holding + 0.5))
            for at, (counts, norm) in enumerate(zip(self.counts_P, self.norms_P, strict=True)):
                totals[at] += rarity * counts[word] * (K1 + 1) / (counts[word] + norm)
        return totals

    def best(self, question: str) -> int | None:
        """The passage with the highest score, the first of equals; None where no word is shared."""
        scores = self.scores(question)
        top = max(scores, default=0.0)
        return scores.index(top) if top > 0 else None


def answers_by_retrieval(
    ttt: TTT,
    journal: Journal,
    sequences: Sequence[Sequence[Passage]],
    adapters_S: Sequence[Sequence[str]],
    *,
    settings: ContinualSettings,
) -> list[TTTReply]:
    """For each sequence one reply with the answers to all questions so far; `adapters_S[s][p]` is passage p's.
    Raises: RemoteError where one failed."""
    routed_S = [
        route(sequence, adapters, settings, model_id=ttt.model_id)
        for sequence, adapters in zip(sequences, adapters_S, strict=True)
    ]
    collected = ask(ttt, [request for routed in routed_S for _, request in routed], journal, what="answers")
    replies = []
    for routed in routed_S:
        found: dict[int, tuple[str, str]] = {}
        for places, request in routed:
            reply = collected.of(request)  # without training, its adapter side is that of base and stack
            found |= dict(zip(places, zip(reply.adapter_texts, reply.adapter_verdicts, strict=True), strict=True))
        ordered = [found[place] for place in sorted(found)]
        answers = Answers(texts=[text for text, _ in ordered], verdicts=[verdict for _, verdict in ordered])
        replies.append(build_reply(baseline=None, adapter=answers, model_id=ttt.model_id))
    return replies


def route(
    sequence: Sequence[Passage], adapters: Sequence[str], settings: ContinualSettings, *, model_id: str
) -> list[tuple[list[int], TTTRequest]]:
    """All questions so far, one request for each adapter that BM25 chooses, with the questions' places."""
    seen = sequence[: len(adapters)]
    index = Bm25(seen)
    questions = [question for passage in seen for question in eval_questions(passage)]
    places_of: dict[int | None, list[int]] = {}
    for place, question in enumerate(questions):
        places_of.setdefault(index.best(_without_topic(question)), []).append(place)
    how: dict[str, Any] = {"skip_training": True, "seed": settings.seed}
    routed = []
    for which, places in places_of.items():
        asked, stack = [questions[at] for at in places], [] if which is None else [adapters[which]]
        request = loop_request(model_id, settings.training, questions=asked, adapter_stack=stack, **how)
        routed.append((places, request))
    return routed


def _without_topic(question: EvalQuestion) -> str:
    """The question without its topic line: with the title in it, choosing would be no task."""
    return asked_about(Answered(question=question.question, gold=question.answer, answer=""))[1]


def retrieval_accuracy(sequences: Sequence[Sequence[Passage]]) -> float | None:
    """Share of all questions for which BM25 finds their own passage among all of the sequence."""
    right = [
        Bm25(sequence).best(question.question) == at
        for sequence in sequences
        for at, passage in enumerate(sequence)
        for question in passage.questions
    ]
    return sum(right) / len(right) if right else None

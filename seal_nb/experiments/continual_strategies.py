"""Continual edits merged into the weights after each step, as published: a model folder and a server an edit.

SEAL, arXiv 2506.10943, ``continual_self_edits.py``. Stacked adapters give the same outputs
(tests/test_continual_merged.py) without a copy of the model for every edit and without S × K starts of a
server; this is for who wants to see that, or wants the merged models. Resumes after the last finished edit.

Which passage a question is about: BM25 (Robertson & Zaragoza 2009), no index, no library.

For a handful of passages, as in a sequence of continual edits. The topic line of a question is left out:
with the title in it, choosing would be no task.

Closed-book answers of kept adapters through any engine: evaluation apart from training.

The inner loop answers where it trains; this asks adapters that lie in folders, with the same prompts and
settings (SEAL, arXiv 2506.10943: greedy, 64 tokens). Grades nothing: `grading` takes the answers.

Continual edits without interference: one adapter a passage on the untouched base, chosen by retrieval.

Each question goes to the adapter of the passage that BM25 finds for it among those edited so far, or
to the base where no word is shared. What that costs is a retriever that is sometimes wrong, and knowledge
that no longer lies in one set of weights.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seal_nb.engines.base import Engine, OnText, Sampling
from seal_nb.errors import RunMismatch
from seal_nb.experiments.continual import ContinualRun, ContinualSettings, edit_request, texts_of_step
from seal_nb.experiments.session import Tell, run_requests, served_model, ttt_client
from seal_nb.experiments.single_passage import eval_questions, identified
from seal_nb.grading.base import Answered, asked_about
from seal_nb.passages import Passage
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import Answers, EvalQuestion, TTTReply, TTTRequest, build_reply
from seal_nb.server.client import TTTClient
from seal_nb.storage import Journal, content_id


@dataclass(frozen=True, kw_only=True)
class MergedEdit:
    """One finished edit, as the journal keeps it."""

    text: str
    request: TTTRequest
    reply: TTTReply

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "MergedEdit":
        return cls(
            text=record["text"],
            request=TTTRequest.model_validate(record["request"]),
            reply=TTTReply.model_validate(record["reply"]),
        )

    def to_json(self) -> dict[str, Any]:
        request, reply = (part.model_dump(mode="json") for part in (self.request, self.reply))
        return {"text": self.text, "request": request, "reply": reply}


def edit_and_merge(
    sequences: Sequence[Sequence[Passage]],
    settings: ContinualSettings,
    journal: Journal,
    *,
    model: str,
    model_id: str,
    folder: Path,
    server: Mapping[str, Any],
    tell: Tell = lambda _: None,
) -> ContinualRun:
    """All edits of all sequences, each on the model that the one before it was merged into.

    `folder` takes models and servers, in a folder of its own for each content of a sequence, so that no
    merged model is taken for that of other passages or settings; its last model stays. `model_id`: of
    `model` on the server that row 0 was asked of. `server`: what TTTServer takes beside model and run_dir.

    Raises: RunMismatch where the server started for the first edit holds another model, RemoteError,
    SettingsError for an adapter that cannot be merged.
    """
    edits_S_T = []
    for number, sequence in enumerate(sequences):
        on: dict[str, Any] = {"settings": settings, "journal": journal, "model": model, "model_id": model_id}
        edits_S_T.append(_one_sequence(number, sequence, **on, folder=folder, server=server, tell=tell))
    run = ContinualRun.of(sequences)
    for edits_S in zip(*edits_S_T, strict=True):
        run.write([edit.text for edit in edits_S])
        run.keep([edit.request for edit in edits_S], [edit.reply for edit in edits_S])
    return run


def _one_sequence(
    number: int,
    sequence: Sequence[Passage],
    settings: ContinualSettings,
    journal: Journal,
    model: str,
    model_id: str,
    folder: Path,
    server: Mapping[str, Any],
    tell: Tell,
) -> list[MergedEdit]:
    done: list[MergedEdit] = []
    now, content = model, _content(number, sequence, settings, model_id)
    own = folder / f"sequence_{number + 1}_{content}"
    for step in range(1, len(sequence) + 1):
        key = content_id(["merged", content, step])
        run_dir = own / f"server_{step}"
        if key not in journal:
            with ttt_client("", run_dir=run_dir, model=now, **server) as client:
                served = served_model(client)
                if step == 1 and served != model_id:
                    raise RunMismatch(
                        f"row 0 was asked of model {model_id}, the server for the merged edits has {served}; "
                        "give both the same model, dtype, grader and deterministic"
                    )
                new = _next_edit(client, served, number, sequence, settings, journal, done)
            journal.append(key, new.to_json())
        done.append(MergedEdit.from_json(journal.get(key)))
        adapter = run_dir / "adapters" / str(done[-1].request.adapter_name)
        now = _merged(now, adapter, own / f"model_{step}")
        tell(f"merged, sequence {number + 1}: edit {step} of {len(sequence)}")
    return done


def _content(number: int, sequence: Sequence[Passage], settings: ContinualSettings, model_id: str) -> str:
    """Names what every edit of a sequence depends on: titles alone are not enough, passages share them."""
    return content_id([model_id, number, [asdict(passage) for passage in sequence], _said(settings)])


def _said(settings: ContinualSettings) -> list[Any]:
    """What an edit depends on, as plain values."""
    own = [settings.arm, settings.prompt_key, settings.max_tokens, settings.temperature, settings.top_p]
    return [*own, settings.split_newlines, settings.seed, settings.training.request_fields()]


def _next_edit(
    client: TTTClient,
    model_id: str,
    number: int,
    sequence: Sequence[Passage],
    settings: ContinualSettings,
    journal: Journal,
    done: Sequence[MergedEdit],
) -> MergedEdit:
    """One edit on a server of the model as it is now."""
    on: dict[str, Any] = {"settings": settings, "model_id": model_id}
    stack = [str(edit.request.adapter_name) for edit in done]  # merged already: they count, and lie under nothing
    (text,) = texts_of_step(client, journal, [sequence], [stack], numbers=[number], **on)
    request = edit_request(number, sequence, [*(edit.text for edit in done), text], stack, **on)
    # Not by the journal: the first edit is the stacked one's too, and its adapter lies with the other server.
    return MergedEdit(text=text, request=request, reply=client.evaluate(request))


def _merged(model: str, adapter: Path, out: Path) -> str:
    """The folder of `model` with `adapter` merged in; the folder before it is not needed any more."""
    from seal_nb.ttt.adapters import merge_stack

    if not out.is_dir():
        merge_stack(model, [adapter], out)
    if Path(model).parent == out.parent:
        shutil.rmtree(model, ignore_errors=True)
    return str(out)


K1, B = 1.5, 0.75  # the customary values
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


class Bm25:
    """Scores of a question against some passages, title and text."""

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


ANSWER_TOKENS = 64


def closed_book_answers(
    engine: Engine,
    passages: Sequence[Passage],
    adapters: Sequence[Path | None],
    *,
    max_tokens: int = ANSWER_TOKENS,
    on_text: OnText | None = None,
) -> list[list[str]]:
    """Of each adapter (None: the base) the answers to all questions of all passages, in their order,
    stripped.

    All are asked at once. ``on_text``: see Engine; the index counts questions, then adapters. Raises:
    Incomplete with those that came, EngineError.
    """
    prompts = [answer_prompt(passage.title, q.question) for passage in passages for q in passage.questions]
    n = len(prompts)
    completions = engine.generate(
        prompts * len(adapters),
        Sampling(max_tokens=max_tokens, temperature=0.0, top_p=1.0),
        seeds=[0] * (n * len(adapters)),
        adapters=[adapter for adapter in adapters for _ in range(n)],
        on_text=on_text,
    )
    answers = [completion.text.strip() for completion in completions]
    return [answers[at * n : (at + 1) * n] for at in range(len(adapters))]


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Questions by the adapter that answers them (None: the base), with their places in the whole list."""

    adapter: str | None
    places: tuple[int, ...]
    request: TTTRequest


def route(
    sequence: Sequence[Passage], adapters: Sequence[str], settings: ContinualSettings, *, model_id: str
) -> list[Routed]:
    """All questions so far, one request for each adapter that is chosen; ``adapters[i]`` is of passage i."""
    seen = sequence[: len(adapters)]
    index = Bm25(seen)
    questions = [question for passage in seen for question in eval_questions(passage)]
    places_of: dict[int | None, list[int]] = {}
    for place, question in enumerate(questions):
        places_of.setdefault(index.best(_bare(question)), []).append(place)
    return [
        _routed(None if which is None else adapters[which], places, questions, settings, model_id)
        for which, places in places_of.items()
    ]


def _routed(
    adapter: str | None,
    places: Sequence[int],
    questions: Sequence[EvalQuestion],
    settings: ContinualSettings,
    model_id: str,
) -> Routed:
    request = TTTRequest(
        eval_questions=[questions[at] for at in places],
        adapter_stack=[adapter] if adapter else [],
        skip_training=True,
        seed=settings.seed,
        **settings.training.request_fields(),
    )
    return Routed(adapter=adapter, places=tuple(places), request=identified(request, model_id))


def _bare(question: EvalQuestion) -> str:
    return asked_about(Answered(question=question.question, gold=question.answer, answer=""))[1]


def answers_by_retrieval(
    client: TTTClient,
    journal: Journal,
    sequences: Sequence[Sequence[Passage]],
    adapters_S: Sequence[Sequence[str]],
    *,
    settings: ContinualSettings,
    model_id: str,
) -> list[TTTReply]:
    """For each sequence one reply in the order of its questions so far, whichever adapter answered them.

    Raises: RemoteError where one failed.
    """
    routed_S = [
        route(sequence, adapters, settings, model_id=model_id)
        for sequence, adapters in zip(sequences, adapters_S, strict=True)
    ]
    collected = run_requests(client, [one.request for routed in routed_S for one in routed], journal)
    return [_together(routed, collected.in_order([one.request for one in routed])) for routed in routed_S]


def _together(routed: Sequence[Routed], replies: Sequence[TTTReply]) -> TTTReply:
    """An untrained request's answers are those of base and stack: its "adapter" side."""
    found: dict[int, tuple[str, str]] = {}
    for one, reply in zip(routed, replies, strict=True):
        found |= dict(zip(one.places, zip(reply.adapter_texts, reply.adapter_verdicts, strict=True), strict=True))
    ordered = [found[place] for place in sorted(found)]
    answers = Answers(texts=[text for text, _ in ordered], verdicts=[verdict for _, verdict in ordered])
    return build_reply(baseline=None, adapter=answers, model_id=replies[0].model_id if replies else "")


def retrieval_accuracy(sequences: Sequence[Sequence[Passage]]) -> float | None:
    """Share of all questions for which BM25 finds their own passage among all of the sequence."""
    right = [
        Bm25(sequence).best(question.question) == at
        for sequence in sequences
        for at, passage in enumerate(sequence)
        for question in passage.questions
    ]
    return sum(right) / len(right) if right else None

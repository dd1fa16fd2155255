"""Continual edits without interference: one adapter a passage on the untouched base, chosen by retrieval.

Each question goes to the adapter of the passage that BM25 finds for it among those edited so far, or
to the base where no word is shared. What that costs is a retriever that is sometimes wrong, and knowledge
that no longer lies in one set of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from seal_nb.experiments.continual import ContinualSettings
from seal_nb.experiments.retrieval import Bm25
from seal_nb.experiments.run_requests import run_requests
from seal_nb.experiments.single_passage import eval_questions, identified
from seal_nb.grading.verdicts import Answered, asked_about
from seal_nb.passages import Passage
from seal_nb.protocol import Answers, EvalQuestion, TTTReply, TTTRequest, build_reply
from seal_nb.runs import Journal
from seal_nb.service.client import TTTClient


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
        found |= dict(
            zip(one.places, zip(reply.adapter_texts, reply.adapter_verdicts, strict=True), strict=True)
        )
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

"""Requests as in a ReST-EM round (SEAL, arXiv 2506.10943, section 4): five self-edits a passage, three times
each.

From the published validation items where they lie beside the checkout, else from the shipped passages with
their hand-written implications. Passages of ordinary size are taken first, and of a passage its ordinary
self-edits, each once before any comes again: so two requests weigh about as much as sixteen, and ways of
which fewer are timed can be compared. Does not import torch and runs nothing.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from seal_nb.passages import Passage, load_passages
from seal_nb.protocol import EvalQuestion, TTTRequest
from seal_nb.self_edits import sequences_of_text
from seal_nb.storage import content_id

PUBLISHED_ITEMS = Path(__file__).resolve().parents[2] / "shared/golden/eval/iter2_val.json.gz"
ASKED_PER_PASSAGE = 15  # published: five self-edits, each tried three times when they are ranked


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Where requests come from, and the passages, ordinary ones first."""

    source: str
    passages: tuple[Passage, ...]

    def requests(self, share: int, n_shares: int, n: int) -> list[TTTRequest]:
        """The first n requests of one process; no two processes share a passage."""
        own = self.passages[share::n_shares]
        endless = (request for passage in own for request in _round_requests(passage))
        return [request for request, _ in zip(endless, range(n), strict=False)]


def load_workload(items: Path = PUBLISHED_ITEMS) -> Workload:
    if items.is_file():
        return Workload(
            source="published validation items, self-edits after round 2",
            passages=_ordinary_first(load_passages(items)),
        )
    passages = load_passages("shipped:train")
    return Workload(source="shipped passages, hand-written implications", passages=_ordinary_first(passages))


def _self_edits(passage: Passage) -> Sequence[str]:
    """Those nearest to the passage's mean number of characters first."""
    edits = passage.completions[:5] or (passage.hand_written,)
    sizes = {edit: sum(map(len, _sequences(passage, edit))) for edit in edits}
    mean = statistics.mean(sizes.values())
    return sorted(edits, key=lambda edit: abs(sizes[edit] - mean))


def _sequences(passage: Passage, self_edit: str) -> list[str]:
    return sequences_of_text(self_edit, title=passage.title, context=passage.context, split_newlines=True)


def _round_requests(passage: Passage) -> Iterator[TTTRequest]:
    edits = _self_edits(passage)
    questions = [
        EvalQuestion(title=passage.title, context=passage.context, question=q.question, answer=q.answer)
        for q in passage.questions
    ]
    for number in range(ASKED_PER_PASSAGE):
        yield TTTRequest(
            request_id=content_id([passage.title, passage.context, number]),
            seed=number,
            train_sequences=_sequences(passage, edits[number % len(edits)]),
            eval_questions=questions,
        )


def _ordinary_first(passages: Sequence[Passage]) -> tuple[Passage, ...]:
    """By distance from the mean numbers of sequences, characters and questions, each as a share of its
    mean."""
    shapes = [_shape(p) for p in passages]
    means = [statistics.mean(column) for column in zip(*shapes, strict=True)]
    distance = [sum(abs(value / mean - 1) for value, mean in zip(shape, means, strict=True)) for shape in shapes]
    order = sorted(range(len(passages)), key=lambda i: distance[i])
    return tuple(passages[i] for i in order)


def _shape(passage: Passage) -> tuple[float, float, float]:
    edits = [_sequences(passage, edit) for edit in _self_edits(passage)]
    return (
        statistics.mean(len(sequences) for sequences in edits),
        statistics.mean(sum(map(len, sequences)) for sequences in edits),
        float(len(passage.questions)),
    )

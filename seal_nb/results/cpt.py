"""CPT run files: accuracy overall and per passage."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from seal_nb.errors import DataError
from seal_nb.metrics import Verdicts, accuracy, gain
from seal_nb.passages import Passage


def per_passage_results(
    passages: Sequence[Passage], baseline_correct: Verdicts, adapter_correct: Verdicts
) -> list[dict[str, Any]]:
    """One entry a passage, by its index; titles repeat and are no key."""
    counts = [len(passage.questions) for passage in passages]
    baseline_P, adapter_P = (split_by_passage(baseline_correct, counts), split_by_passage(adapter_correct, counts))
    return [
        {
            "index": at,
            "title": passage.title,
            "n_questions": counts[at],
            "baseline_correct": list(baseline_P[at]),
            "adapter_correct": list(adapter_P[at]),
            "baseline_accuracy": _rounded(accuracy(baseline_P[at])),
            "adapter_accuracy": _rounded(accuracy(adapter_P[at])),
        }
        for at, passage in enumerate(passages)
    ]


def split_by_passage(verdicts: Verdicts, counts: Sequence[int]) -> list[Verdicts]:
    """A flat list of verdicts cut into passages of ``counts`` questions each. Raises: DataError."""
    if len(verdicts) != sum(counts):
        raise DataError(
            f"{len(verdicts)} verdicts for {sum(counts)} questions",
            remedy="give the passages of this run, in its order",
        )
    return [verdicts[end - n : end] for end, n in zip(accumulate(counts), counts, strict=True)]


def build_overall(baseline_correct: Verdicts, adapter_correct: Verdicts) -> dict[str, float | None]:
    """Published ``overall``: 4 decimals, the gain from unrounded accuracies."""
    return {
        "baseline_accuracy": _rounded(accuracy(baseline_correct)),
        "adapter_accuracy": _rounded(accuracy(adapter_correct)),
        "gain": _rounded(gain(baseline_correct, adapter_correct)),
    }


def by_title(per_passage: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[bool | None]]]:
    """Published ``per_article``: passages of one title together."""
    by_title: dict[str, dict[str, list[bool | None]]] = {}
    for entry in per_passage:
        mine = by_title.setdefault(entry["title"], {"baseline_correct": [], "adapter_correct": []})
        for name, verdicts in mine.items():
            verdicts += entry[name]
    return by_title


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

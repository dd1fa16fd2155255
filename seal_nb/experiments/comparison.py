"""Results side by side: which evaluations stand for an arm or a round, and which differences are real.

Takes the records of ``results`` and gives plain rows and estimates to tables and figures. Two arms are
compared only over the same passages in the same order, question by question. Reads no file, draws nothing.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from seal_nb.experiments.continual_summary import seen_so_far
from seal_nb.experiments.power import passage_differences, power_of
from seal_nb.experiments.published_statistics import mean
from seal_nb.experiments.results import ContinualResult, CptResult, Found, SinglePassageResult
from seal_nb.metrics import Difference, Estimate, accuracy, paired_difference


def evaluations(found: Found, *, prompt_key: str = "") -> dict[str, SinglePassageResult]:
    """One evaluation an arm, by its name; files with verdicts win over stored numbers, later over earlier.

    Rankings (rewards of a ReST-EM round) are left out, and other prompt keys where one is given.
    """
    arms: dict[str, SinglePassageResult] = {}
    for result in found.single:
        wanted = not result.is_ranking and prompt_key in ("", result.prompt_key)
        if wanted and result.adapter() is not None:
            earlier = arms.get(result.arm)
            if earlier is None or result.adapter_P_Q or not earlier.adapter_P_Q:
                arms[result.arm] = result
    return dict(sorted(arms.items(), key=lambda item: _place(item[1])))


def left_out(found: Found, *, prompt_key: str = "") -> list[tuple[str, str]]:
    """(file, reason) of every single-passage result that ``evaluations`` does not show."""
    shown = [(result.file, result.name) for result in evaluations(found, prompt_key=prompt_key).values()]
    return [
        (_source(result), _why_left_out(result, prompt_key))
        for result in found.single
        if (result.file, result.name) not in shown
    ]


def _source(result: SinglePassageResult) -> str:
    """The file, and the run's name where a file holds several."""
    return result.file if result.name in result.file else f"{result.file}: {result.name}"


def _why_left_out(result: SinglePassageResult, prompt_key: str) -> str:
    if result.is_ranking:
        return "rewards of a ReST-EM round"
    if prompt_key not in ("", result.prompt_key):
        return f"prompt {result.prompt_key}"
    return "another file stands for this arm" if result.adapter() else "no answer graded"


def _place(result: SinglePassageResult) -> tuple[int, str]:
    """Passage only first, self-edits by round, then texts that no round wrote."""
    if result.arm == "passage only":
        return 0, result.arm
    return (100 if result.rest_em_round is None else 1 + result.rest_em_round), result.arm


def prompt_keys(found: Found) -> list[str]:
    """The prompt keys of all evaluations, `implications` first."""
    keys = {result.prompt_key for result in found.single if not result.is_ranking}
    return sorted(keys, key=lambda key: (key != "implications", key))


def rounds(found: Found, prompt_key: str) -> list[SinglePassageResult | None]:
    """The evaluation of each ReST-EM round, None where one is missing; empty with fewer than two rounds."""
    by_round: dict[int, SinglePassageResult] = {
        result.rest_em_round: result
        for result in evaluations(found, prompt_key=prompt_key).values()
        if result.rest_em_round is not None
    }
    return [by_round.get(number) for number in range(max(by_round) + 1)] if len(by_round) > 1 else []


def round_estimates(results: Sequence[SinglePassageResult | None]) -> list[Estimate | None]:
    return [result.adapter() if result else None for result in results]


def passage_accuracies(results: Sequence[SinglePassageResult | None]) -> list[list[float]]:
    """For each passage its accuracy in each round; empty where rounds or passages are missing."""
    if not results or any(result is None or not result.adapter_P_Q for result in results):
        return []
    columns = [[accuracy(verdicts) for verdicts in result.adapter_P_Q] for result in results if result]
    if len({len(column) for column in columns}) != 1 or any(None in column for column in columns):
        return []
    return [[value for value in row if value is not None] for row in zip(*columns, strict=True)]


def baseline_of(results: Iterable[SinglePassageResult | None]) -> Estimate | None:
    """The model that was not adapted: of the first result that has it."""
    return next((b for result in results if result and (b := result.baseline())), None)


def comparison_rows(arms: dict[str, SinglePassageResult]) -> list[dict[str, Any]]:
    """Every pair of arms over the same passages: the paired difference and what it means, in a sentence."""
    rows = []
    for first, second, difference in comparable_pairs(arms):
        row = {"arm": first.arm, "against": second.arm, "difference": difference.sentence()}
        differences = passage_differences(first.adapter_P_Q, second.adapter_P_Q)
        power = power_of(differences) if len(differences) > 1 and not difference.is_real else None
        rows.append({**row, "to settle it": power.sentence() if power else None})
    return rows


def comparable_pairs(
    arms: dict[str, SinglePassageResult],
) -> list[tuple[SinglePassageResult, SinglePassageResult, Difference]]:
    """(an arm, an earlier one, how much higher the first is) for every two arms over the same passages."""
    return [
        (first, second, paired_difference(first.adapter_P_Q, second.adapter_P_Q))
        for second, first in combinations(arms.values(), 2)
        if _comparable(first, second)
    ]


def _comparable(first: SinglePassageResult, second: SinglePassageResult) -> bool:
    """Same passages in the same order; files that do not name them count as equal within one file."""
    same = first.passages == second.passages and (bool(first.passages) or first.file == second.file)
    return same and bool(first.adapter_P_Q) and len(first.adapter_P_Q) == len(second.adapter_P_Q)


def result_row(result: SinglePassageResult) -> dict[str, Any]:
    """One line of the table of evaluations."""
    adapter, baseline = result.adapter(), result.baseline()
    measured = bool(result.adapter_P_Q)
    return {
        "arm": result.arm,
        "prompt": result.prompt_key,
        "n": adapter.n if adapter else None,
        "accuracy": adapter.mean if adapter else None,
        "low": adapter.low if adapter and measured else None,
        "high": adapter.high if adapter and measured else None,
        "not adapted": baseline.mean if baseline else None,
        "file": result.file,
    }


def cpt_rows(results: Iterable[CptResult]) -> list[dict[str, Any]]:
    """One line for each multi-passage adapter."""
    return [
        {
            "arm": result.arm,
            "passages": result.n_passages,
            "questions": result.n_questions,
            "accuracy": result.adapter_accuracy,
            "not adapted": result.baseline_accuracy,
            "lr": (result.settings.get("lora_params") or {}).get("lr"),
            "file": result.file,
        }
        for result in results
    ]


def seen_rows(result: ContinualResult) -> list[dict[str, Any]]:
    """After each edit: accuracy on the passages so far, the same never edited, the passage just edited."""
    return [
        {
            "edits": step,
            "passages so far": mean(result.mean[step][:step]),
            "never edited": mean(result.mean[0][:step]),
            "just edited": result.mean[step][step - 1],
        }
        for step in range(1, len(result.mean))
    ]


def seen_estimates(result: ContinualResult) -> list[Estimate]:
    """As ``seen_rows``, with intervals over sequences where the file has each sequence's matrix.

    Without them a step of which nothing was graded has the mean NaN, a gap in a curve.
    """
    if result.sequences:
        return seen_so_far(result.sequences)
    known = [row["passages so far"] for row in seen_rows(result)]
    means = [math.nan if value is None else value for value in known]
    return [Estimate(mean=value, low=value, high=value, n=result.n_sequences) for value in means]

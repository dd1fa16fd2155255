"""Results side by side: which evaluations stand for an arm or a round, and which differences are real.

Takes the records of ``results`` and gives plain rows and estimates to tables and figures. Two arms are
compared only over the same passages in the same order, question by question. Reads no file, draws nothing.

The runs of a folder as a list, two of them compared, and how their settings differ (``seal-nb runs``).

Reads result files and the records beside them; a published file has no record and is listed all the same.

The few numbers of a folder of runs to look at first, one column for each source of runs.

Each comes from the records of ``comparison``; what is not there has no number. Computes nothing of its own.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError
from seal_nb.metrics import (
    Difference,
    Estimate,
    accuracy,
    paired_difference,
    passage_differences,
    power_of,
    settled_sentence,
)
from seal_nb.results.collect import (
    ContinualResult,
    CptResult,
    Found,
    Result,
    SinglePassageResult,
    collect_results,
    results_in,
)
from seal_nb.results.continual import aggregate_summaries, seen_so_far
from seal_nb.results.statistics import mean
from seal_nb.storage import read_json, record_path, write_json


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


CLOCKS = {"timestamp"}  # differ between all runs and say nothing


def catalog_rows(folder: str | Path) -> list[dict[str, Any]]:
    """One line a result below the folder, by path."""
    found = collect_results(folder)
    results: list[Result] = [*found.single, *found.cpt, *found.continual]
    return [_row(result) for result in results]


def _row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"file": result.file, "kind": "", "arm": "", "passages": None, "accuracy": None}
    if isinstance(result, SinglePassageResult):
        adapter = result.adapter()
        row |= {"kind": "ranking" if result.is_ranking else "single passage", "arm": result.arm}
        row |= {"passages": adapter.n, "accuracy": adapter.mean} if adapter else {}
    elif isinstance(result, CptResult):
        row |= {"kind": "CPT", "arm": str(result.settings.get("arm") or result.name)}
        row |= {"passages": result.n_passages, "accuracy": result.adapter_accuracy}
    elif isinstance(result, ContinualResult):
        last = [value for value in result.mean[-1] if value is not None]
        row |= {"kind": "continual", "arm": result.name, "passages": len(result.mean) - 1}
        row |= {"accuracy": sum(last) / len(last) if last else None}
    return row


def compare_runs(first: str | Path, second: str | Path) -> str:
    """How much higher the second run is than the first, over the passages that both have, in plain words.

    Raises: DataError where a file is no single-passage run with verdicts, or they share no passage.
    """
    a, b = _single(first), _single(second)
    at = {passage: place for place, passage in enumerate(a.passages)}
    pairs = [(at[passage], place) for place, passage in enumerate(b.passages) if passage in at]
    if not pairs:
        raise DataError("shares no passage with the other run", path=second, remedy="compare runs on the same passages")
    before, after = [a.adapter_P_Q[i] for i, _ in pairs], [b.adapter_P_Q[j] for _, j in pairs]
    difference = paired_difference(after, before)
    differences = passage_differences(after, before)
    said = difference.sentence()
    if len(differences) > 1:
        said = settled_sentence(difference, power_of(differences))
    return f"{_mean(before)} → {_mean(after)}: {said}"


def _mean(correct_P: list[Any]) -> str:
    known = [value for verdicts in correct_P if (value := accuracy(verdicts)) is not None]
    return f"{100 * sum(known) / len(known):.1f} %" if known else "nothing graded"


def _single(path: str | Path) -> SinglePassageResult:
    results = results_in(read_json(path), Path(path).name)
    if len(results) != 1 or not isinstance(results[0], SinglePassageResult) or not results[0].adapter_P_Q:
        raise DataError("is no single-passage run with verdicts", path=path, remedy="give a run_*.json")
    return results[0]


def pool_summaries(paths: Sequence[str | Path], out: str | Path) -> str:
    """Continual summaries of several runs as one file: published means of stds, the pooled one beside them.

    Raises: DataError for summaries of other sizes.
    """
    pooled = aggregate_summaries([read_json(path) for path in paths])
    write_json(out, pooled)
    last, n = pooled["n_datapoints"] - 1, pooled["n_datapoints"]
    stds = (pooled[name][n][last] for name in ("std_over_sequences", "pooled_std_over_sequences"))
    mean_of_stds, pooled_std = (f"{100 * std:.1f}" if std is not None else "–" for std in stds)
    return (
        f"{pooled['n_runs']} runs, {pooled['n_sequences']} sequences; last passage after the last edit: "
        f"standard deviation {mean_of_stds} points as published (mean over runs), {pooled_std} pooled"
    )


def settings_difference(first: str | Path, second: str | Path) -> list[dict[str, Any]]:
    """Every setting, seed and version that differs, by dotted name; a dash where one run has none."""
    a, b = _flat(_made_from(first)), _flat(_made_from(second))
    return [
        {"setting": name, "first": a.get(name, "–"), "second": b.get(name, "–")}
        for name in sorted({*a, *b})
        if a.get(name, "–") != b.get(name, "–")
    ]


def _made_from(path: str | Path) -> Mapping[str, Any]:
    """The record beside a result; for a file without one, what it says of itself."""
    if record_path(path).is_file():
        record: dict[str, Any] = read_json(record_path(path))
        return record
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError("is no result file", path=path, remedy="give a run file")
    plain = (str, int, float, bool, dict)
    told = {name: entry for name, entry in value.items() if isinstance(entry, plain) and name not in CLOCKS}
    return {name: entry for name, entry in told.items() if name not in ("overall", "server_reply", "per_article")}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= _flat(entry, f"{prefix}{name}.") if isinstance(entry, Mapping) else {f"{prefix}{name}": entry}
    return flat


def glance_rows(sources: Mapping[str, Found], *, prompt_key: str = "") -> list[dict[str, Any]]:
    """One row a number, one key a source; None where a source does not have it."""
    numbers: dict[str, Callable[[Found, str], str | None]] = {
        "best arm": _best_arm,
        "differences between arms": _real_differences,
        "ReST-EM rounds": _first_and_last_round,
        "best of many passages in one adapter": _best_cpt,
        "after the last continual edit": _last_edit,
    }
    return [
        {"at a glance": what} | {name: number(found, prompt_key) for name, found in sources.items()}
        for what, number in numbers.items()
    ]


def best_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The best of a notebook's arms (rows of ``arms.arm_row`` or ``arms.cpt_row``), for its top."""
    best = max(rows, key=lambda row: row["accuracy"] or 0.0)
    return {
        "best arm": "–" if best["accuracy"] is None else f"{best['arm']} {best['accuracy']:.1%}",
        "its gain": best["gain"] or "–",
        "ungraded answers": str(sum(row["ungraded"] for row in rows)),
    }


def _best_arm(found: Found, prompt_key: str) -> str | None:
    arms = evaluations(found, prompt_key=prompt_key)
    measured = {arm: estimate for arm, result in arms.items() if (estimate := result.adapter())}
    if not measured:
        return None
    most = max(estimate.n for estimate in measured.values())  # one passage tried by hand is no evaluation
    whole = [arm for arm in measured if measured[arm].n == most]
    best = max(whole, key=lambda arm: measured[arm].mean)
    unedited = baseline_of(arms[arm] for arm in whole)
    return f"{best} {_percent(measured[best])}, not adapted {_percent(unedited)}"


def _real_differences(found: Found, prompt_key: str) -> str | None:
    pairs = comparable_pairs(evaluations(found, prompt_key=prompt_key))
    real = sum(difference.is_real for _, _, difference in pairs)
    return f"{real} of {len(pairs)} are real" if pairs else None


def _first_and_last_round(found: Found, prompt_key: str) -> str | None:
    known = [one.adapter() for one in rounds(found, prompt_key) if one]
    return f"{_percent(known[0])} → {_percent(known[-1])}" if len(known) > 1 else None


def _best_cpt(found: Found, _: str) -> str | None:
    known = [row for row in cpt_rows(found.cpt) if row["accuracy"] is not None]
    best = max(known, key=lambda row: row["accuracy"], default=None)
    return f"{best['arm']} {best['accuracy']:.1%}, {best['passages']} passages" if best else None


def _last_edit(found: Found, _: str) -> str | None:
    last = [rows[-1] for result in found.continual if (rows := seen_rows(result))]
    known = [row for row in last if row["passages so far"] is not None and row["never edited"] is not None]
    best = max(known, key=lambda row: row["passages so far"], default=None)
    return f"{best['passages so far']:.1%}, never edited {best['never edited']:.1%}" if best else None


def _percent(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:.1%} (n = {estimate.n})"

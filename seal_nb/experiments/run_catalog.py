"""The runs of a folder as a list, two of them compared, and how their settings differ (``seal-nb runs``).

Reads result files and the records beside them; a published file has no record and is listed all the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError
from seal_nb.experiments.continual_summary import aggregate_summaries
from seal_nb.experiments.power import passage_differences, power_of, settled_sentence
from seal_nb.experiments.results import (
    ContinualResult,
    CptResult,
    Result,
    SinglePassageResult,
    collect_results,
    results_in,
)
from seal_nb.metrics import accuracy, paired_difference
from seal_nb.runs import read_json, record_path, write_json

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
        raise DataError(
            "shares no passage with the other run", path=second, remedy="compare runs on the same passages"
        )
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
    return {
        name: entry for name, entry in told.items() if name not in ("overall", "server_reply", "per_article")
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= _flat(entry, f"{prefix}{name}.") if isinstance(entry, Mapping) else {f"{prefix}{name}": entry}
    return flat

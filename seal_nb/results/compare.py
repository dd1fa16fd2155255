"""Two runs compared: paired difference of their accuracies, and the settings in which they differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_nb.errors import DataError
from seal_nb.metrics import Scores, mean_interval, paired_difference, to_settle
from seal_nb.results.run import Run, frame
from seal_nb.storage import read_json, record_path

if TYPE_CHECKING:
    import pandas as pd

COMPARED = ("arm", "against", "n", "difference", "low", "high", "p", "is_real", "sentence", "to_settle")
_NO_SETTINGS = {"timestamp", "overall", "server_reply", "per_article"}


def compare(a: Run, b: Run, *, shared_only: bool = False) -> "pd.DataFrame":
    """How much higher the accuracy of ``a`` is than that of ``b``, paired over passages.

    Args:
        a: a run of any form.
        b: a run of the same form over the same passages (a continual run: the same sequences).
        shared_only: compare the passages that both runs have, instead of refusing other passages.

    Returns:
        One row: ``arm``, ``against``, ``n`` (pairs), ``difference`` with its 95 % bootstrap interval ``low``, ``high``,
        the sign-flip ``p`` (exact up to 12 pairs), ``is_real`` (interval and test both exclude zero, at least 6 pairs),
        ``sentence``, and ``to_settle``: what would settle a difference that is not settled.

    Raises:
        DataError: the runs have different forms or passages, or a run has no verdicts.
    """
    return frame([comparison(a, b, shared_only=shared_only)])


def comparison(a: Run, b: Run, *, shared_only: bool = False) -> dict[str, Any]:
    """The row of ``compare``."""
    first, second = paired_scores(a, b, shared_only=shared_only)
    d = paired_difference(first, second, weighting=a.weighting, unit=a.unit)
    unsettled = None if d.is_real else to_settle(first, second) or None
    row = (a.arm, b.arm, d.n, d.mean, d.low, d.high, d.p_value, d.is_real, d.sentence(), unsettled)
    return dict(zip(COMPARED, row, strict=True))


def difference_sentence(first: Run, second: Run) -> str:
    """Second minus first run over the passages that both have, and both means, in one line. Raises: DataError."""
    row = comparison(second, first, shared_only=True)
    scores = paired_scores(first, second, shared_only=True)
    before, after = (mean_interval(of, weighting=first.weighting, n_resamples=1).mean for of in scores)
    said = "; ".join(filter(None, (row["sentence"], row["to_settle"])))
    return f"{100 * before:.1f} % → {100 * after:.1f} %: {said}"


def paired_scores(a: Run, b: Run, *, shared_only: bool = False) -> tuple[list[Scores], list[Scores]]:
    """The adapter scores of both runs, passage by passage. Raises: DataError if they cannot be paired."""
    if a.form != b.form:
        raise DataError(f"is a {b.form} run, not a {a.form} run", path=b.path, remedy="compare runs of one form")
    for run in (a, b):
        if not run.has_verdicts:
            raise DataError("has no verdicts of single passages", path=run.path, remedy="give a run file with answers")
    keys_a, keys_b = a.unit_keys(), b.unit_keys()
    if not keys_a and not keys_b and a.path == b.path and len(a.scores("adapter")) == len(b.scores("adapter")):
        return a.scores("adapter"), b.scores("adapter")  # one published file with several runs, no titles
    at = {key: place for place, key in enumerate(keys_a)}
    if len(at) < len(keys_a) and keys_a == keys_b:  # titles repeat: the order identifies a passage
        return a.scores("adapter"), b.scores("adapter")
    shared = [(at[key], place) for place, key in enumerate(keys_b) if key in at]
    if not shared:
        raise DataError(
            f"shares no {a.unit.removesuffix('s')} with the other run",
            path=b.path,
            remedy=f"compare runs on the same {a.unit}",
        )
    if not shared_only and not len(shared) == len(keys_a) == len(keys_b):
        raise DataError(
            f"shares {len(shared)} of {len(keys_b)} {a.unit} with the other run, which has {len(keys_a)}",
            path=b.path,
            remedy="compare runs on the same passages, or pass shared_only=True",
        )
    scores_a, scores_b = a.scores("adapter"), b.scores("adapter")
    return [scores_a[i] for i, _ in shared], [scores_b[j] for _, j in shared]


def settings_difference(first: str | Path, second: str | Path) -> "pd.DataFrame":
    """Every setting, seed and version that differs: ``setting`` (dotted name), ``first``, ``second`` ("–": absent)."""
    a, b = _flat(_settings_of(first)), _flat(_settings_of(second))
    rows = [
        {"setting": name, "first": str(a.get(name, "–")), "second": str(b.get(name, "–"))}
        for name in sorted({*a, *b})
        if a.get(name, "–") != b.get(name, "–")
    ]
    return frame(rows, ("setting", "first", "second"))


def _settings_of(path: str | Path) -> Mapping[str, Any]:
    """The record next to a result; without one, the settings in the file itself."""
    if record_path(path).is_file():
        record: dict[str, Any] = read_json(record_path(path))
        return record
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError("is not a result file", path=path, remedy="give a run file")
    return {
        name: entry
        for name, entry in value.items()
        if isinstance(entry, str | int | float | bool | dict) and name not in _NO_SETTINGS
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= _flat(entry, f"{prefix}{name}.") if isinstance(entry, Mapping) else {f"{prefix}{name}": entry}
    return flat

"""The few numbers of a folder of runs to look at first, one column for each source of runs.

Each comes from the records of ``comparison``; what is not there has no number. Computes nothing of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seal_nb.experiments.comparison import (
    baseline_of,
    comparable_pairs,
    cpt_rows,
    evaluations,
    rounds,
    seen_rows,
)
from seal_nb.experiments.results import Found
from seal_nb.metrics import Estimate


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

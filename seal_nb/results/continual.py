"""Continual self-edits in numbers: the (K+1)×K accuracy matrix, its summary files, forgetting.

Row t of a matrix is the accuracy on each passage after t edits, row 0 before any; passage j is edited in step
j + 1 and asked from then on. A cell that was not asked or not graded is None; the published files (SEAL,
arXiv 2506.10943, ``continual_self_edits.py``) write 0.0 where nothing was asked, and so do our summaries.
Sequences, not passages, are drawn again for intervals. Nothing is trained or asked here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from seal_nb.errors import DataError
from seal_nb.metrics import Difference, Estimate, Verdicts, accuracy, mean_interval, paired_difference
from seal_nb.results.statistics import mean, sample_std

Matrix = Sequence[Sequence[float | None]]


def continual_matrix(verdicts_T_P: Sequence[Sequence[Verdicts | None]]) -> list[list[float | None]]:
    """(K+1)×K accuracies from the verdicts of each step; None for a passage that was not asked."""
    n_passages = len(verdicts_T_P) - 1
    for step, verdicts_P in enumerate(verdicts_T_P):
        if len(verdicts_P) != n_passages:
            raise DataError(
                f"has {len(verdicts_P)} passages after {step} edits, not {n_passages}",
                field=f"verdicts[{step}]",
                remedy="give K + 1 steps over K passages",
            )
    return [
        [None if verdicts is None else accuracy(verdicts) for verdicts in verdicts_P] for verdicts_P in verdicts_T_P
    ]


def was_asked(step: int, passage: int) -> bool:
    """Whether a passage is asked after this many edits: before any, and from its own edit on."""
    return step == 0 or passage < step


def summarize_sequences(matrices: Sequence[Matrix], *, dataset: str, base_model: str) -> dict[str, Any]:
    """A ``summary_*.json``: published keys first, then every sequence's matrix and the derived numbers.

    Means and sample standard deviations over the sequences, 4 decimals; 0.0 where nothing was asked. (The
    released files do not show whether the published deviations are sample or population ones.)
    """
    n_passages = _check_equal_sizes(matrices)
    cells = [[[matrix[t][p] for matrix in matrices] for p in range(n_passages)] for t in range(n_passages + 1)]
    return {
        "mean_over_sequences": _cellwise(cells, mean),
        "std_over_sequences": _cellwise(cells, sample_std),
        "n_sequences": len(matrices),
        "n_datapoints": n_passages,
        "dataset": dataset,
        "base_model": base_model,
        "matrices": [[list(row) for row in matrix] for matrix in matrices],
    }


def aggregate_summaries(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as published: the mean of their means and the mean of their stds, 4 decimals.

    ``pooled_std_over_sequences`` (ours) is the standard deviation over all sequences of all runs; the mean of
    stds leaves out how much the runs differ among themselves. Raises: DataError for runs of other sizes,
    datasets, base models or strategies.
    """
    means = [_published_matrix(summary, "mean_over_sequences") for summary in summaries]
    stds = [_published_matrix(summary, "std_over_sequences") for summary in summaries]
    n_passages = _check_equal_sizes([*means, *stds])
    about = {name: _shared(summaries, name) for name in ("dataset", "base_model", "strategy")}
    counts = [int(summary["n_sequences"]) for summary in summaries]
    return {
        "mean_over_sequences": _over_runs(means),
        "std_over_sequences": _over_runs(stds),
        "n_sequences": sum(counts),
        "n_datapoints": n_passages,
        "dataset": about["dataset"],
        "base_model": about["base_model"],
        **({"strategy": about["strategy"]} if about["strategy"] else {}),
        "n_runs": len(summaries),
        "pooled_std_over_sequences": [
            [_pooled_std(counts, [m[t][p] for m in means], [s[t][p] for s in stds]) for p in range(n_passages)]
            for t in range(n_passages + 1)
        ],
        "matrices": [matrix for summary in summaries for matrix in summary.get("matrices") or []],
    }


def _shared(summaries: Sequence[dict[str, Any]], field: str) -> str:
    """What all summaries say of a field, "" where they say nothing."""
    said = list(dict.fromkeys(str(summary.get(field) or "") for summary in summaries))
    if len(said) > 1:
        raise DataError(
            f"differs between the summaries: {', '.join(map(repr, said))}",
            field=field,
            remedy="pool runs of one dataset, model and strategy",
        )
    return said[0]


def continual_estimates(matrices: Sequence[Matrix]) -> dict[str, Estimate | Difference]:
    """The numbers a continual experiment is about, each with its interval over sequences.

    ``never_edited`` row 0; ``after_own_edit`` each passage right after its edit; ``final`` the last row;
    ``final_minus_never_edited``; ``backward_transfer`` what later edits changed (final minus after own edit,
    the last passage left out); ``forgetting`` the best since its edit minus final, the same passages.
    """
    n_passages = _check_equal_sizes(matrices)
    never, own = [list(matrix[0]) for matrix in matrices], [_after_own_edit(matrix) for matrix in matrices]
    final = [list(matrix[n_passages]) for matrix in matrices]
    estimates: dict[str, Estimate | Difference] = {
        "never_edited": mean_interval(never, unit="sequences"),
        "after_own_edit": mean_interval(own, unit="sequences"),
        "final": mean_interval(final, unit="sequences"),
        "final_minus_never_edited": paired_difference(final, never, unit="sequences"),
    }
    if n_passages > 1:
        earlier = [row[:-1] for row in final]
        best = [_best_before_last(matrix) for matrix in matrices]
        own_earlier = [row[:-1] for row in own]
        estimates["backward_transfer"] = paired_difference(earlier, own_earlier, unit="sequences")
        estimates["forgetting"] = paired_difference(best, earlier, unit="sequences")
    return estimates


def strategy_rows(matrices_of: Mapping[str, Sequence[Matrix]]) -> list[dict[str, Any]]:
    """One line a strategy: accuracy on all passages after the last edit, paired difference to the first."""
    finals = {name: [list(matrix[-1]) for matrix in matrices] for name, matrices in matrices_of.items()}
    first = next(iter(finals.values()))
    return [
        {
            "strategy": name,
            "final": mean_interval(final, unit="sequences").mean,
            "against the first": None
            if final is first
            else paired_difference(final, first, unit="sequences").sentence(),
        }
        for name, final in finals.items()
    ]


def seen_so_far(matrices: Sequence[Matrix]) -> list[Estimate]:
    """After edit 1, 2, …: mean accuracy on the passages edited so far, with intervals over sequences."""
    return [
        mean_interval([list(matrix[step][:step]) for matrix in matrices], unit="sequences")
        for step in range(1, _check_equal_sizes(matrices) + 1)
    ]


def never_edited_so_far(matrices: Sequence[Matrix]) -> list[float | None]:
    """The same passages asked of the model before any edit: what editing is compared with."""
    return [
        mean([value for matrix in matrices for value in matrix[0][:step]])
        for step in range(1, _check_equal_sizes(matrices) + 1)
    ]


def _after_own_edit(matrix: Matrix) -> list[float | None]:
    return [matrix[passage + 1][passage] for passage in range(len(matrix) - 1)]


def _best_before_last(matrix: Matrix) -> list[float | None]:
    """For all passages but the last: the best accuracy from its edit to the last edit but one."""
    n_passages = len(matrix) - 1
    columns = [[row[p] for row in matrix[p + 1 : n_passages]] for p in range(n_passages - 1)]
    return [max((value for value in column if value is not None), default=None) for column in columns]


def _cellwise(cells: Sequence[Sequence[Sequence[float | None]]], statistic: Any) -> list[list[float | None]]:
    return [
        [_cell(statistic(values), was_asked(step, passage)) for passage, values in enumerate(row)]
        for step, row in enumerate(cells)
    ]


def _cell(value: float | None, asked: bool) -> float | None:
    if not asked:
        return 0.0
    return None if value is None else round(value, 4)


def _over_runs(matrices: Sequence[Matrix]) -> list[list[float | None]]:
    return [
        [_cell(mean([matrix[step][p] for matrix in matrices]), was_asked(step, p)) for p in range(len(matrices[0]) - 1)]
        for step in range(len(matrices[0]))
    ]


def _pooled_std(counts: Sequence[int], means: Sequence[float | None], stds: Sequence[float | None]) -> float | None:
    """Sample standard deviation over all sequences from each run's count, mean and sample deviation."""
    known = [(n, m, s) for n, m, s in zip(counts, means, stds, strict=True) if m is not None and s is not None]
    total = sum(n for n, _, _ in known)
    if total < 2:
        return 0.0 if total else None
    centre = sum(n * m for n, m, _ in known) / total
    squares = sum((n - 1) * s**2 + n * (m - centre) ** 2 for n, m, s in known)
    return round(math.sqrt(squares / (total - 1)), 4)


def _published_matrix(summary: dict[str, Any], field: str) -> Matrix:
    rows = summary.get(field)
    if not isinstance(rows, list) or not rows or any(not isinstance(row, list) for row in rows):
        raise DataError("is not a (K+1)×K matrix", field=field, remedy="give summaries of continual runs")
    return rows


def _check_equal_sizes(matrices: Sequence[Matrix]) -> int:
    """K, the number of passages, which all matrices must share."""
    sizes = {(len(matrix), *{len(row) for row in matrix}) for matrix in matrices}
    if len(sizes) != 1 or any(len(size) != 2 or size[0] != size[1] + 1 for size in sizes):
        raise DataError(
            f"matrices of sizes {sorted(sizes)} do not make one set",
            remedy="give (K+1)×K matrices of one K, at least one",
        )
    return len(matrices[0]) - 1

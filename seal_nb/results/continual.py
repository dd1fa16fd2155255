"""Continual self-edits: the (K+1)×K accuracy matrix, its summary files, forgetting.

Row t of a matrix is the accuracy on each passage after t edits, row 0 before any. Step j + 1 edits passage j, which
is asked from then on. A cell without an answer or a verdict is None in memory; the published files (SEAL, arXiv
2506.10943, ``continual_self_edits.py``) and our summaries store 0.0 for a passage that was not asked. Intervals are
over sequences.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel

from seal_nb.errors import DataError
from seal_nb.grading.base import Answered
from seal_nb.metrics import Difference, Estimate, Scores, Verdicts, accuracy, mean_interval, paired_difference
from seal_nb.protocol import rounded
from seal_nb.results.cpt import check_length, split_by_passage
from seal_nb.results.run import VERDICT_WORDS, Kind, Run, RunFields, StoredVerdict, frame, unequal
from seal_nb.results.statistics import mean, sample_std
from seal_nb.storage import read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

Matrix = Sequence[Sequence[float | None]]


class _Asked(BaseModel):
    question: str
    answer: str


class _Step(BaseModel):
    texts: list[str]
    correct: list[bool | None]


class _Sequence(BaseModel):
    titles: list[str]
    questions: list[list[_Asked]]
    steps: list[_Step]


class _File(RunFields):
    matrices: list[list[list[float | None]]] | None = None
    sequences: list[_Sequence] | None = None


@dataclass(kw_only=True, eq=False)
class ContinualRun(Run):
    """A ``summary_*.json``. Raises: DataError if its matrix is not (K+1)×K."""

    form: ClassVar[str] = "continual"
    unit: ClassVar[str] = "sequences"

    def __post_init__(self) -> None:
        self.checked(_File)
        # (K+1)×K accuracies, averaged over sequences; 0.0 where a passage was not asked.
        self.mean: Matrix = published_matrix(self.value, "mean_over_sequences", path=self.path)

    @property
    def matrices(self) -> list[Matrix]:
        """The (K+1)×K matrix of each sequence; empty in published files."""
        return list(self.value.get("matrices") or [])

    @property
    def n_sequences(self) -> int:
        return self.value.get("n_sequences") or 0

    @property
    def arm(self) -> str:
        return self.name

    def scores(self, kind: Kind) -> list[Scores]:
        return [matrix[0 if kind == "baseline" else -1] for matrix in self.matrices]

    def stored_mean(self, kind: Kind) -> float | None:
        return mean(self.mean[0 if kind == "baseline" else -1])

    def unit_keys(self) -> list[Any]:
        return [tuple(sequence["titles"]) for sequence in self.value.get("sequences") or []]

    def extra(self) -> dict[str, Any]:
        return {"passages": len(self.mean) - 1}

    def seen(self) -> list[Estimate]:
        """After each edit the accuracy on the passages edited so far; without matrices, means without intervals."""
        steps = range(1, len(self.mean))
        if self.matrices:
            return [mean_interval([matrix[step][:step] for matrix in self.matrices], unit=self.unit) for step in steps]
        means = [mean(self.mean[step][:step]) for step in steps]
        known = [math.nan if value is None else value for value in means]
        return [Estimate(mean=value, low=value, high=value, n=self.n_sequences, unit=self.unit) for value in known]

    def curve(self) -> "pd.DataFrame":
        """Accuracy after each edit.

        Returns:
            One row per number of edits: ``edits``, ``accuracy`` (mean over the passages edited so far) with ``low`` and
            ``high`` over sequences (missing without the matrices), ``never_edited`` (the same passages before any
            edit), ``just_edited`` (the passage of this edit), ``n`` (sequences).
        """
        rows = [
            {
                "edits": step,
                "accuracy": estimate.mean,
                "low": estimate.low if self.matrices else None,
                "high": estimate.high if self.matrices else None,
                "never_edited": mean(self.mean[0][:step]),
                "just_edited": self.mean[step][step - 1],
                "n": self.n_sequences,
            }
            for step, estimate in enumerate(self.seen(), 1)
        ]
        return frame(rows)

    def answers(self) -> "pd.DataFrame":
        """All answers of the sequences; empty for published files.

        Returns:
            One row per question and step: ``sequence``, ``edits`` (0: before any), ``passage``, ``question``, ``gold``,
            ``answer``, ``verdict``, ``correct`` (missing: ungraded).
        """
        return frame(
            [
                {
                    "sequence": number,
                    "edits": step,
                    "passage": asked.title,
                    "question": asked.question,
                    "gold": asked.gold,
                    "answer": record["texts"][at],
                    "verdict": VERDICT_WORDS[record["correct"][at]],
                    "correct": record["correct"][at],
                }
                for number, step, record, questions in self._steps()
                for at, asked in enumerate(questions)
            ]
        )

    def overall(self) -> dict[str, Any]:
        """The means of ``continual_estimates``; of the stored matrix in files without sequences."""
        stored = [[cell if was_asked(t, p) else None for p, cell in enumerate(row)] for t, row in enumerate(self.mean)]
        return {name: one.mean for name, one in continual_estimates(self.matrices or [stored]).items()}

    def counts(self) -> dict[str, Any]:
        verdicts = [(step, verdict) for _, step, record, _ in self._steps() for verdict in record["correct"]]
        return {
            "n_passages": len(self.mean) - 1,
            "n_sequences": self.n_sequences,
            "n_answers": len(verdicts),
            "n_ungraded_baseline": sum(verdict is None for step, verdict in verdicts if not step),
            "n_ungraded_adapter": sum(verdict is None for step, verdict in verdicts if step),
        }

    def notes(self) -> list[str]:
        return [] if self.matrices else ["the file has no matrix of each sequence: no intervals"]

    def disagreements(self) -> list[str]:
        if not self.matrices:
            return []
        names = ("mean_over_sequences", "std_over_sequences", "n_sequences", "n_datapoints")
        computed = summarize_sequences(self.matrices, dataset="", base_model="")
        return unequal("summary", self.value, {name: computed[name] for name in names})

    def stored_verdicts(self) -> list[StoredVerdict]:
        found = []
        for number, step, record, questions in self._steps():
            for name in ("texts", "correct"):
                field = f"sequences[{number}].steps[{step}].{name}"
                check_length(record.get(name), len(questions), path=self.path, field=field)
            found += [
                StoredVerdict(
                    kind="adapter" if step else "baseline",
                    answered=replace(one, answer=record["texts"][at]),
                    holder=record,
                    field="correct",
                    index=at,
                )
                for at, one in enumerate(questions)
            ]
        return found

    def _steps(self) -> list[tuple[int, int, dict[str, Any], list[Answered]]]:
        """(sequence, number of edits, the stored step, its questions) of every step."""
        return [
            (
                number,
                step,
                record,
                [
                    Answered(title=title, question=one["question"], gold=one["answer"], answer="")
                    for at, (title, asked) in enumerate(zip(sequence["titles"], sequence["questions"], strict=True))
                    if was_asked(step, at)
                    for one in asked
                ],
            )
            for number, sequence in enumerate(self.value.get("sequences") or [])
            for step, record in enumerate(sequence["steps"])
        ]

    def fill_statistics(self) -> None:
        for _, _, record, _ in self._steps():
            record["n_ungraded"] = record["correct"].count(None)
        about = {name: self.value.get(name, "") for name in ("dataset", "base_model")}
        self.value.update(summarize_sequences([continual_matrix(rows) for rows in self.verdicts()], **about))

    @classmethod
    def of(cls, sequences: Sequence[Mapping[str, Any]], *, dataset: str, base_model: str, strategy: str) -> Self:
        """The run of one strategy from its sequences, as files have them."""
        matrices = [continual_matrix(sequence_verdicts(sequence)) for sequence in sequences]
        summary = summarize_sequences(matrices, dataset=dataset, base_model=base_model)
        return cls(value=summary | {"strategy": strategy, "sequences": sequences})

    def verdicts(self) -> list[list[list[Verdicts | None]]]:
        """``verdicts()[s][t][p]`` are those on passage p of sequence s after t edits; None if it was not asked."""
        return [sequence_verdicts(sequence) for sequence in self.value.get("sequences") or []]


def sequence_verdicts(sequence: Mapping[str, Any]) -> list[list[Verdicts | None]]:
    """The verdicts of a sequence as a summary keeps it, by step and passage."""
    counts = [len(asked) for asked in sequence["questions"]]
    return [verdict_row(record["correct"], counts, step) for step, record in enumerate(sequence["steps"])]


def verdict_row(correct: Verdicts, counts: Sequence[int], step: int) -> list[Verdicts | None]:
    """The verdicts of every passage after ``step`` edits, from those of all questions; None if it was not asked.
    ``counts``: the number of questions of each passage."""
    n_asked = sum(was_asked(step, at) for at in range(len(counts)))
    return [*split_by_passage(correct, counts[:n_asked]), *[None] * (len(counts) - n_asked)]


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
    """A ``summary_*.json``: published keys first, then every sequence's matrix and the derived numbers. Means and
    sample standard deviations over the sequences, 4 decimals; 0.0 where nothing was asked. (The released files do not
    show whether the published deviations are sample or population ones.)"""
    return {
        "mean_over_sequences": _cellwise(mean, matrices),
        "std_over_sequences": _cellwise(sample_std, matrices),
        "n_sequences": len(matrices),
        "n_datapoints": _check_equal_sizes(matrices),
        "dataset": dataset,
        "base_model": base_model,
        "matrices": [[list(row) for row in matrix] for matrix in matrices],
    }


def _cellwise(
    statistic: Callable[[list[float | None]], float | None], matrices: Sequence[Matrix]
) -> list[list[float | None]]:
    """A statistic of each cell over several matrices, as files store it."""
    n_passages = _check_equal_sizes(matrices)
    return [
        [
            rounded(statistic([matrix[step][at] for matrix in matrices])) if was_asked(step, at) else 0.0
            for at in range(n_passages)
        ]
        for step in range(n_passages + 1)
    ]


def aggregate_summaries(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pool several runs as published: the mean of their means and the mean of their stds, 4 decimals.

    ``pooled_std_over_sequences`` (ours) is the standard deviation over all sequences of all runs; the mean of stds
    leaves out the differences between runs. Raises: DataError for different sizes, datasets, base models or
    strategies.
    """
    means = [published_matrix(summary, "mean_over_sequences") for summary in summaries]
    stds = [published_matrix(summary, "std_over_sequences") for summary in summaries]
    counts = [int(summary["n_sequences"]) for summary in summaries]
    n_passages = _check_equal_sizes([*means, *stds])
    about = {name: _shared(summaries, name) for name in ("dataset", "base_model", "strategy")}
    if not about["strategy"]:
        del about["strategy"]
    return {
        "mean_over_sequences": _cellwise(mean, means),
        "std_over_sequences": _cellwise(mean, stds),
        "n_sequences": sum(counts),
        "n_datapoints": n_passages,
        **about,
        "n_runs": len(summaries),
        "pooled_std_over_sequences": [
            [_pooled_std(counts, [m[t][p] for m in means], [s[t][p] for s in stds]) for p in range(n_passages)]
            for t in range(n_passages + 1)
        ],
        "matrices": [matrix for summary in summaries for matrix in summary.get("matrices") or []],
    }


def pool_summaries(paths: Sequence[str | Path], out: str | Path) -> str:
    """Write the pooled summary of several files; returns a sentence about the spread. Raises: DataError."""
    pooled = aggregate_summaries([read_json(path) for path in paths])
    write_json(out, pooled)
    last, n = pooled["n_datapoints"] - 1, pooled["n_datapoints"]
    stds = (pooled[name][n][last] for name in ("std_over_sequences", "pooled_std_over_sequences"))
    mean_of_stds, pooled_std = (f"{100 * std:.1f}" if std is not None else "–" for std in stds)
    return (
        f"{pooled['n_runs']} runs, {pooled['n_sequences']} sequences; last passage after the last edit: "
        f"standard deviation {mean_of_stds} points as published (mean over runs), {pooled_std} pooled"
    )


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
    never, final = [matrix[0] for matrix in matrices], [matrix[-1] for matrix in matrices]
    own = [[matrix[at + 1][at] for at in range(n_passages)] for matrix in matrices]
    estimates: dict[str, Estimate | Difference] = {
        "never_edited": mean_interval(never, unit="sequences"),
        "after_own_edit": mean_interval(own, unit="sequences"),
        "final": mean_interval(final, unit="sequences"),
        "final_minus_never_edited": paired_difference(final, never, unit="sequences"),
    }
    if n_passages > 1:
        earlier, own_earlier = ([row[:-1] for row in rows] for rows in (final, own))
        best = [[_best(row[at] for row in matrix[at + 1 : -1]) for at in range(n_passages - 1)] for matrix in matrices]
        estimates["backward_transfer"] = paired_difference(earlier, own_earlier, unit="sequences")
        estimates["forgetting"] = paired_difference(best, earlier, unit="sequences")
    return estimates


def _best(accuracies: Iterable[float | None]) -> float | None:
    return max((value for value in accuracies if value is not None), default=None)


def strategy_rows(matrices_of: Mapping[str, Sequence[Matrix]]) -> list[dict[str, Any]]:
    """One line a strategy: accuracy on all passages after the last edit, paired difference to the first."""
    finals = {name: [matrix[-1] for matrix in matrices] for name, matrices in matrices_of.items()}
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


def _pooled_std(counts: Sequence[int], means: Sequence[float | None], stds: Sequence[float | None]) -> float | None:
    """Sample standard deviation over all sequences from each run's count, mean and sample deviation."""
    known = [(n, m, s) for n, m, s in zip(counts, means, stds, strict=True) if m is not None and s is not None]
    total = sum(n for n, _, _ in known)
    if total < 2:
        return 0.0 if total else None
    centre = sum(n * m for n, m, _ in known) / total
    squares = sum((n - 1) * s**2 + n * (m - centre) ** 2 for n, m, s in known)
    return round(math.sqrt(squares / (total - 1)), 4)


def published_matrix(summary: Mapping[str, Any], field: str, *, path: str | Path = "") -> Matrix:
    """A matrix of a summary. Raises: DataError if it is not (K+1)×K."""
    rows = summary.get(field)
    if not isinstance(rows, list) or {len(row) if isinstance(row, list) else None for row in rows} != {len(rows) - 1}:
        raise DataError("is not a (K+1)×K matrix", path=path, field=field, remedy="give a summary of a continual run")
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

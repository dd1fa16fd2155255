"""Continual self-edits: the (K+1)×K accuracy matrix, its summary files, forgetting.

Row t of a matrix is the accuracy on each passage after t edits, row 0 before any. Step j + 1 edits passage j, which is
asked from then on. A cell without a verdict is None. In files (SEAL, arXiv 2506.10943) the mean is 0.0 if not asked."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from seal_nb import metrics
from seal_nb.errors import DataError, checked
from seal_nb.grading.base import answered_with
from seal_nb.protocol import rounded
from seal_nb.results import run as runs
from seal_nb.results.cpt import check_length, split_by_passage
from seal_nb.storage import read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

Matrix = Sequence[Sequence[float | None]]
_interval = partial(metrics.if_graded, metrics.mean_interval, unit="sequences")
_difference = partial(metrics.if_graded, metrics.paired_difference, unit="sequences")


class _Asked(runs.Part):
    question: str
    answer: str
    other_answers: runs.Many[str] = Field([])


class _Step(runs.Part):
    texts: runs.Many[str]
    correct: runs.Many[bool | None]
    earlier: dict[str, dict[str, runs.Many[bool | None]]] | None = None


class _Sequence(runs.Part):
    titles: runs.Many[str]
    questions: runs.Many[runs.Many[_Asked]]
    steps: runs.Many[_Step]


class _File(runs.RunFields):
    mean_over_sequences: runs.Many[runs.Many[runs.Number]]
    std_over_sequences: runs.Many[runs.Many[runs.Number]] | None = None
    matrices: runs.Many[runs.Many[runs.Many[runs.Number]]] | None = None
    sequences: runs.Many[_Sequence] | None = None
    n_sequences_of_runs: runs.Many[runs.Count] | None = None


@dataclass(kw_only=True, eq=False)
class ContinualRun(runs.Run):
    """A ``summary_*.json``. Raises: DataError if its matrices are not (K+1)×K.

    ``mean`` has (K+1)×K accuracies, averaged over sequences; 0.0 where a passage was not asked. ``matrices`` has those
    of each sequence; it is empty in published files."""

    form: ClassVar[str] = "continual"
    unit: ClassVar[str] = "sequences"
    key_fields: ClassVar[str] = "their titles"

    def __post_init__(self) -> None:
        read = checked(_File.model_validate, self.value, path=self.path)
        self.mean: Matrix = read.mean_over_sequences
        self.std: Matrix = read.std_over_sequences or []
        self.matrices: Sequence[Matrix] = read.matrices or []
        self.n_sequences = read.n_sequences or 0
        self.run_sizes = read.n_sequences_of_runs or []
        check_sizes([self.mean, *self.matrices], path=self.path, field="mean_over_sequences")
        if self.std:  # absent or empty: only pooling needs it
            check_sizes([self.mean, self.std], path=self.path, field="std_over_sequences")
        for number, sequence in enumerate(read.sequences or []):
            counts, place = [len(asked) for asked in sequence.questions], f"sequences[{number}]"
            check_length(counts, len(sequence.titles), path=self.path, field=f"{place}.questions", of="titles")
            check_length(sequence.steps, len(counts) + 1, path=self.path, field=f"{place}.steps", of="steps")
            for step, record in enumerate(sequence.steps):
                lists: dict[str, list[Any]] = {"texts": record.texts, "correct": record.correct}
                for grader, kept in (record.earlier or {}).items():
                    lists |= {f"earlier.{grader}.{name}": verdicts for name, verdicts in kept.items()}
                for name, values in lists.items():
                    n_asked = sum(counts[: step or None])
                    check_length(values, n_asked, path=self.path, field=f"{place}.steps[{step}].{name}")

    @property
    def arm(self) -> str:
        return self.name

    def scores(self, kind: runs.Kind) -> list[metrics.Scores]:
        return [matrix[0 if kind == "baseline" else -1] for matrix in self.matrices]

    def flat_verdicts(self, kind: runs.Kind) -> list[Any]:
        return [one.verdict() for one in self.stored_verdicts() if one.kind == kind]

    def stored_mean(self, kind: runs.Kind) -> float | None:
        return metrics.mean(self.mean[0 if kind == "baseline" else -1])

    def unit_keys(self) -> list[Any]:
        return [tuple(sequence["titles"]) for sequence in self.value.get("sequences") or []]

    def extra(self) -> dict[str, Any]:
        return {"passages": len(self.mean) - 1}

    def seen(self) -> list[metrics.Estimate]:
        """After each edit the accuracy on the passages edited so far; without matrices, or where nothing was graded,
        means without intervals."""
        found = []
        for step in range(1, len(self.mean)):
            known = metrics.mean(self.mean[step][:step])
            value = math.nan if known is None else known
            stored = metrics.Estimate(mean=value, low=value, high=value, n=self.n_sequences, unit=self.unit)
            found.append(_interval([matrix[step][:step] for matrix in self.matrices]) or stored)
        return found

    def curve(self) -> "pd.DataFrame":
        """Accuracy after each edit.
        Returns: one row per number of edits: ``edits``, ``accuracy`` (mean over the passages edited so far) with
        ``low`` and ``high`` over sequences (missing without the matrices), ``never_edited`` (the same passages before
        any edit), ``just_edited`` (the passage of this edit), ``n`` (sequences)."""
        rows = []
        for step, estimate in enumerate(self.seen(), 1):
            low, high = (estimate.low, estimate.high) if self.matrices else (None, None)
            edited = metrics.mean(self.mean[0][:step]), self.mean[step][step - 1]
            rows.append((step, estimate.mean, low, high, *edited, estimate.n))
        return runs.frame(rows, ("edits", "accuracy", "low", "high", "never_edited", "just_edited", "n"))

    def answers(self) -> "pd.DataFrame":
        """All answers of the sequences; empty for published files.
        Returns: one row per question and step: ``sequence``, ``edits`` (0: before any), ``passage``, ``question``,
        ``gold``, ``answer``, ``verdict``, ``correct`` (missing: ungraded)."""
        rows = []
        for sequence, edits, stored in self._placed_verdicts():
            one, verdict = stored.answered, stored.verdict()
            asked = one.title, one.question, one.gold, one.answer
            rows.append((sequence, edits, *asked, runs.VERDICT_WORDS[verdict], verdict))
        return runs.frame(rows, ("sequence", "edits", "passage", "question", "gold", "answer", "verdict", "correct"))

    def overall(self) -> dict[str, Any]:
        """The means of ``continual_estimates``; of the stored matrix in files without sequences."""
        stored = [[cell if was_asked(t, p) else None for p, cell in enumerate(row)] for t, row in enumerate(self.mean)]
        return {name: one and one.mean for name, one in continual_estimates(self.matrices or [stored]).items()}

    def counts(self) -> dict[str, Any]:
        about = {"n_passages": len(self.mean) - 1, "n_sequences": self.n_sequences}
        return super().counts() | about | {"n_answers": len(self.stored_verdicts())}

    def notes(self) -> list[str]:
        if not self.matrices:
            return ["the file has no matrix of each sequence: no intervals"]
        unchecked = "the matrices of each pooled run are not known: the means are not checked"
        return [*super().notes(), *([] if self._runs() else [unchecked])]

    def _runs(self) -> list[Self]:
        """The runs that were pooled, from their matrices; this run if it is not pooled; empty if not known."""
        sizes = self.run_sizes if "n_runs" in self.value else [len(self.matrices)]
        if not self.matrices or sum(sizes) != len(self.matrices):
            return []
        parts = (self.matrices[end - n : end] for end, n in zip(accumulate(sizes), sizes, strict=True))
        return [type(self)(value=self._summary(part)) for part in parts]

    def disagreements(self) -> list[str]:
        if not (parts := self._runs()):
            return []
        computed = aggregate_summaries(parts) if "n_runs" in self.value else parts[0].value
        return runs.unequal("summary", self.value, computed)

    def stored_verdicts(self) -> list[runs.StoredVerdict]:
        return [stored for _, _, stored in self._placed_verdicts()]

    def _placed_verdicts(self) -> Iterator[tuple[int, int, runs.StoredVerdict]]:
        """(sequence, number of edits, verdict) of every answer."""
        for number, sequence in enumerate(self.value.get("sequences") or []):
            passages = list(zip(sequence["titles"], sequence["questions"], strict=True))
            for step, record in enumerate(sequence["steps"]):
                asked = [(title, one) for title, questions in passages[: step or None] for one in questions]
                kind: runs.Kind = "adapter" if step else "baseline"
                for at, ((title, one), text) in enumerate(zip(asked, record["texts"], strict=True)):
                    golds = one["answer"], *(one.get("other_answers") or ())
                    answered = answered_with(golds, title=title, question=one["question"], answer=text)
                    yield number, step, runs.StoredVerdict(kind, answered, record, "correct", at)

    def fill_statistics(self) -> None:
        for sequence in self.value["sequences"]:
            for record in sequence["steps"]:
                record["n_ungraded"] = record["correct"].count(None)
        self.value.update(self._summary([continual_matrix(rows) for rows in self.verdicts()]))

    def _summary(self, matrices: Sequence[Matrix]) -> dict[str, Any]:
        about = {name: self.value.get(name, "") for name in ("dataset", "base_model")}
        return summarize_sequences(matrices, **about)

    @classmethod
    def of(cls, sequences: Sequence[Mapping[str, Any]], *, dataset: str, base_model: str, strategy: str) -> Self:
        """The run of one strategy from its sequences, as files have them."""
        matrices = [continual_matrix(rows) for rows in verdicts_of(sequences)]
        summary = summarize_sequences(matrices, dataset=dataset, base_model=base_model)
        return cls(value=summary | {"strategy": strategy, "sequences": sequences})

    def verdicts(self) -> list[list[list[metrics.Verdicts | None]]]:
        """``verdicts()[s][t][p]`` are those on passage p of sequence s after t edits; None if it was not asked."""
        return verdicts_of(self.value.get("sequences") or [])


def verdicts_of(sequences: Sequence[Mapping[str, Any]]) -> list[list[list[metrics.Verdicts | None]]]:
    """The verdicts of sequences as a summary keeps them, by step and passage."""
    return [
        [
            verdict_row(record["correct"], [len(asked) for asked in sequence["questions"]], step)
            for step, record in enumerate(sequence["steps"])
        ]
        for sequence in sequences
    ]


def was_asked(step: int, passage: int) -> bool:
    """Whether a passage is asked after this many edits: before any, and from its own edit on."""
    return step == 0 or passage < step


def verdict_row(correct: metrics.Verdicts, counts: Sequence[int], step: int) -> list[metrics.Verdicts | None]:
    """The verdicts of every passage after ``step`` edits, from those of all questions; None if it was not asked.
    ``counts``: the number of questions of each passage."""
    n_asked = step or len(counts)
    return [*split_by_passage(correct, counts[:n_asked]), *[None] * (len(counts) - n_asked)]


def continual_matrix(verdicts_T_P: Sequence[Sequence[metrics.Verdicts | None]]) -> list[list[float | None]]:
    """(K+1)×K accuracies from the verdicts of each step; None where a passage was not asked, or not graded."""
    return [[None if one is None else metrics.accuracy(one) for one in verdicts_P] for verdicts_P in verdicts_T_P]


def check_sizes(matrices: Sequence[Matrix], *, path: str | Path = "", field: str = "") -> int:
    """K, the number of passages, which all matrices must share. Raises: DataError."""
    sizes = {(len(matrix), *{len(row) for row in matrix}) for matrix in matrices}
    if len(sizes) != 1 or any(len(size) != 2 or size[0] != size[1] + 1 for size in sizes):
        remedy = "give (K+1)×K matrices of one K, at least one"
        raise DataError(f"matrices of sizes {sorted(sizes)} do not make one set", path=path, field=field, remedy=remedy)
    return len(matrices[0]) - 1


def summarize_sequences(matrices: Sequence[Matrix], *, dataset: str, base_model: str) -> dict[str, Any]:
    """A ``summary_*.json``: published keys first, then every sequence's matrix. Means and sample standard deviations
    over the sequences, 4 decimals; 0.0 where nothing was asked. (The released files do not show whether the published
    deviations are sample or population ones.)"""
    return {
        "mean_over_sequences": _cellwise(metrics.mean, matrices),
        "std_over_sequences": _cellwise(metrics.sample_std, matrices),
        "n_sequences": len(matrices),
        "n_datapoints": check_sizes(matrices),
        "dataset": dataset,
        "base_model": base_model,
        "matrices": [[list(row) for row in matrix] for matrix in matrices],
    }


def _cellwise(
    statistic: Callable[[list[float | None]], float | None], matrices: Sequence[Matrix]
) -> list[list[float | None]]:
    """A statistic of each cell over several matrices, as files store it."""
    places = range(check_sizes(matrices))
    return [
        [rounded(statistic([one[step][at] for one in matrices])) if was_asked(step, at) else 0.0 for at in places]
        for step in range(len(places) + 1)
    ]


def aggregate_summaries(runs: Sequence[ContinualRun]) -> dict[str, Any]:
    """Pool several runs as published: the mean of their means and the mean of their stds. ``pooled_std_over_sequences``
    (ours) is the standard deviation over all sequences; the mean of stds leaves out the differences between runs.
    ``n_sequences_of_runs`` (ours) is empty if one of the runs is pooled itself.
    Raises: DataError for different sizes, datasets, base models or strategies, and for a missing number."""
    for run in runs:
        for name in ("n_sequences", "std_over_sequences"):
            if not run.value.get(name):
                raise DataError("is missing", path=run.path, field=name, remedy="give a summary of a continual run")
    means, stds, counts = [run.mean for run in runs], [run.std for run in runs], [run.n_sequences for run in runs]
    about: dict[str, str] = {}
    for name in ("dataset", "base_model", "strategy"):
        said = list(dict.fromkeys(str(run.value.get(name) or "") for run in runs))
        if len(said) > 1:
            remedy = "pool runs of one dataset, model and strategy"
            raise DataError(f"differs between the summaries: {', '.join(map(repr, said))}", field=name, remedy=remedy)
        about |= {name: said[0]} if said[0] or name != "strategy" else {}
    return {
        "mean_over_sequences": _cellwise(metrics.mean, means),
        "std_over_sequences": _cellwise(metrics.mean, stds),
        "n_sequences": sum(counts),
        "n_datapoints": check_sizes([*means, *stds]),
        **about,
        "n_runs": len(runs),
        "n_sequences_of_runs": [] if any("n_runs" in run.value for run in runs) else counts,
        "pooled_std_over_sequences": _cellwise(partial(_pooled_std, counts), [*means, *stds]),
        "matrices": [matrix for run in runs for matrix in run.matrices],
    }


def _pooled_std(counts: Sequence[int], cells: Sequence[float | None]) -> float | None:
    """Sample standard deviation over all sequences; ``cells``: the means of the runs, then their sample deviations."""
    rows = zip(counts, cells[: len(counts)], cells[len(counts) :], strict=True)
    known = [(n, m, s) for n, m, s in rows if m is not None and s is not None]
    total = sum(n for n, _, _ in known)
    if total < 2:
        return 0.0 if total else None
    centre = sum(n * m for n, m, _ in known) / total
    return math.sqrt(sum((n - 1) * s**2 + n * (m - centre) ** 2 for n, m, s in known) / (total - 1))


def pool_summaries(paths: Sequence[str | Path], out: str | Path) -> str:
    """Write the pooled summary of several files; returns a sentence about the spread. Raises: DataError."""
    pooled = aggregate_summaries([ContinualRun(value=read_json(path), path=Path(path)) for path in paths])
    write_json(out, pooled)
    stds = (pooled[name][-1][-1] for name in ("std_over_sequences", "pooled_std_over_sequences"))
    mean_of_stds, pooled_std = (f"{100 * std:.1f}" if std is not None else "–" for std in stds)
    return (
        f"{pooled['n_runs']} runs, {pooled['n_sequences']} sequences; last passage after the last edit: "
        f"standard deviation {mean_of_stds} points as published (mean over runs), {pooled_std} pooled"
    )


def continual_estimates(matrices: Sequence[Matrix]) -> dict[str, metrics.Estimate | None]:
    """The numbers a continual experiment is about, each with its interval over sequences; None: nothing was graded.

    ``never_edited`` row 0; ``after_own_edit`` each passage right after its edit; ``final`` the last row;
    ``final_minus_never_edited``; ``backward_transfer`` what later edits changed (final minus after own edit,
    the last passage left out); ``forgetting`` the best since its edit minus final, the same passages."""
    places = range(check_sizes(matrices))
    never, final = [matrix[0] for matrix in matrices], [matrix[-1] for matrix in matrices]
    own = [[matrix[at + 1][at] for at in places] for matrix in matrices]
    estimates: dict[str, metrics.Estimate | None] = {
        "never_edited": _interval(never),
        "after_own_edit": _interval(own),
        "final": _interval(final),
        "final_minus_never_edited": _difference(final, never),
    }
    if len(places) > 1:
        earlier, own_earlier = ([row[:-1] for row in rows] for rows in (final, own))
        since = [[[row[at] for row in matrix[at + 1 : -1]] for at in places[:-1]] for matrix in matrices]
        best = [[max((one for one in cells if one is not None), default=None) for cells in rows] for rows in since]
        estimates |= {"backward_transfer": _difference(earlier, own_earlier), "forgetting": _difference(best, earlier)}
    return estimates

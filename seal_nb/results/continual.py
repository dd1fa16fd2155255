"""Continual self-edits: the (K+1)×K accuracy matrix, its summary files, forgetting.

Row t of a matrix is the accuracy on each passage after t edits, row 0 before any. Step j + 1 edits passage j, which is
asked from then on. A cell without a verdict is None. In files (SEAL, arXiv 2506.10943) the mean is 0.0 if not asked.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from seal_nb.errors import DataError, checked
from seal_nb.grading.base import answered_with
from seal_nb.metrics import (
    Difference,
    Estimate,
    Scores,
    Verdicts,
    accuracy,
    mean,
    mean_interval,
    paired_difference,
    sample_std,
)
from seal_nb.protocol import rounded
from seal_nb.results.cpt import check_length, split_by_passage
from seal_nb.results.run import (
    VERDICT_WORDS,
    Count,
    Kind,
    Many,
    Number,
    Part,
    Run,
    RunFields,
    StoredVerdict,
    frame,
    unequal,
)
from seal_nb.storage import read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

Matrix = Sequence[Sequence[float | None]]
_interval = partial(mean_interval, unit="sequences")
_difference = partial(paired_difference, unit="sequences")


class _Asked(Part):
    question: str
    answer: str
    other_answers: Many[str] = Field([])


class _Step(Part):
    texts: Many[str]
    correct: Many[bool | None]
    earlier: dict[str, dict[str, Many[bool | None]]] | None = None


class _Sequence(Part):
    titles: Many[str]
    questions: Many[Many[_Asked]]
    steps: Many[_Step]


class _File(RunFields):
    mean_over_sequences: Many[Many[Number]]
    std_over_sequences: Many[Many[Number]] | None = None
    matrices: Many[Many[Many[Number]]] | None = None
    sequences: Many[_Sequence] | None = None
    n_sequences_of_runs: Many[Count] | None = None


@dataclass(kw_only=True, eq=False)
class ContinualRun(Run):
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
            for step, record in enumerate(sequence.steps):
                n_questions = sum(n for at, n in enumerate(counts) if was_asked(step, at))
                kept = record.earlier or {}
                lists: dict[str, list[Any]] = {"texts": record.texts, "correct": record.correct}
                lists |= {f"earlier.{by}.{name}": own for by in kept for name, own in kept[by].items()}
                for name, values in lists.items():
                    check_length(values, n_questions, path=self.path, field=f"{place}.steps[{step}].{name}")

    @property
    def arm(self) -> str:
        return self.name

    def scores(self, kind: Kind) -> list[Scores]:
        return [matrix[0 if kind == "baseline" else -1] for matrix in self.matrices]

    def flat_verdicts(self, kind: Kind) -> list[Any]:
        return [one.verdict() for one in self.stored_verdicts() if one.kind == kind]

    def stored_mean(self, kind: Kind) -> float | None:
        return mean(self.mean[0 if kind == "baseline" else -1])

    def unit_keys(self) -> list[Any]:
        return [tuple(sequence["titles"]) for sequence in self.value.get("sequences") or []]

    def extra(self) -> dict[str, Any]:
        return {"passages": len(self.mean) - 1}

    def seen(self) -> list[Estimate]:
        """After each edit the accuracy on the passages edited so far; without matrices, or where nothing was graded,
        means without intervals."""
        found = []
        for step in range(1, len(self.mean)):
            cells = [matrix[step][:step] for matrix in self.matrices]
            if any(cell is not None for row in cells for cell in row):
                found.append(_interval(cells))
            else:
                known = mean(self.mean[step][:step])
                value = math.nan if known is None else known
                found.append(Estimate(mean=value, low=value, high=value, n=self.n_sequences, unit=self.unit))
        return found

    def curve(self) -> "pd.DataFrame":
        """Accuracy after each edit.

        Returns:
            One row per number of edits: ``edits``, ``accuracy`` (mean over the passages edited so far) with ``low`` and
            ``high`` over sequences (missing without the matrices), ``never_edited`` (the same passages before any
            edit), ``just_edited`` (the passage of this edit), ``n`` (sequences).
        """
        rows = []
        for step, estimate in enumerate(self.seen(), 1):
            low, high = (estimate.low, estimate.high) if self.matrices else (None, None)
            edited = mean(self.mean[0][:step]), self.mean[step][step - 1]
            rows.append((step, estimate.mean, low, high, *edited, self.n_sequences))
        return frame(rows, ("edits", "accuracy", "low", "high", "never_edited", "just_edited", "n"))

    def answers(self) -> "pd.DataFrame":
        """All answers of the sequences; empty for published files.

        Returns:
            One row per question and step: ``sequence``, ``edits`` (0: before any), ``passage``, ``question``, ``gold``,
            ``answer``, ``verdict``, ``correct`` (missing: ungraded).
        """
        rows = []
        for sequence, edits, stored in self._placed_verdicts():
            one, verdict = stored.answered, stored.verdict()
            asked = one.title, one.question, one.gold, one.answer
            rows.append((sequence, edits, *asked, VERDICT_WORDS[verdict], verdict))
        return frame(rows, ("sequence", "edits", "passage", "question", "gold", "answer", "verdict", "correct"))

    def overall(self) -> dict[str, Any]:
        """The means of ``continual_estimates``; of the stored matrix in files without sequences."""
        stored = [[cell if was_asked(t, p) else None for p, cell in enumerate(row)] for t, row in enumerate(self.mean)]
        return {name: one.mean for name, one in continual_estimates(self.matrices or [stored]).items()}

    def counts(self) -> dict[str, Any]:
        n_answers = len(self.stored_verdicts())
        about = {"n_passages": len(self.mean) - 1, "n_sequences": self.n_sequences, "n_answers": n_answers}
        return super().counts() | about

    def notes(self) -> list[str]:
        if not self.matrices:
            return ["the file has no matrix of each sequence: no intervals"]
        return [] if self._runs() else ["the matrices of each pooled run are not known: the means are not checked"]

    def _runs(self) -> list[Self]:
        """The runs that were pooled, from their matrices; this run if it is not pooled; empty if not known."""
        sizes = self.run_sizes if "n_runs" in self.value else [len(self.matrices)]
        if not self.matrices or sum(sizes) != len(self.matrices):
            return []
        parts = (self.matrices[end - n : end] for end, n in zip(accumulate(sizes), sizes, strict=True))
        return [type(self)(value=self._summary(part)) for part in parts]

    def disagreements(self) -> list[str]:
        if not (runs := self._runs()):
            return []
        return unequal("summary", self.value, aggregate_summaries(runs) if "n_runs" in self.value else runs[0].value)

    def stored_verdicts(self) -> list[StoredVerdict]:
        return [stored for _, _, stored in self._placed_verdicts()]

    def _placed_verdicts(self) -> Iterator[tuple[int, int, StoredVerdict]]:
        """(sequence, number of edits, verdict) of every answer."""
        for number, sequence in enumerate(self.value.get("sequences") or []):
            passages = list(zip(sequence["titles"], sequence["questions"], strict=True))
            for step, record in enumerate(sequence["steps"]):
                asked = [(title, one) for title, questions in passages[: step or None] for one in questions]
                kind: Kind = "adapter" if step else "baseline"
                for at, ((title, one), text) in enumerate(zip(asked, record["texts"], strict=True)):
                    golds = one["answer"], *(one.get("other_answers") or ())
                    answered = answered_with(golds, title=title, question=one["question"], answer=text)
                    yield number, step, StoredVerdict(kind, answered, record, "correct", at)

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


def was_asked(step: int, passage: int) -> bool:
    """Whether a passage is asked after this many edits: before any, and from its own edit on."""
    return step == 0 or passage < step


def verdict_row(correct: Verdicts, counts: Sequence[int], step: int) -> list[Verdicts | None]:
    """The verdicts of every passage after ``step`` edits, from those of all questions; None if it was not asked.
    ``counts``: the number of questions of each passage."""
    n_asked = step or len(counts)
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
    return [[None if one is None else accuracy(one) for one in verdicts_P] for verdicts_P in verdicts_T_P]


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
        "mean_over_sequences": _cellwise(mean, matrices),
        "std_over_sequences": _cellwise(sample_std, matrices),
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
    n_passages = check_sizes(matrices)
    return [
        [
            rounded(statistic([matrix[step][at] for matrix in matrices])) if was_asked(step, at) else 0.0
            for at in range(n_passages)
        ]
        for step in range(n_passages + 1)
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
    n_passages = check_sizes([*means, *stds])
    about = {name: _shared(runs, name) for name in ("dataset", "base_model", "strategy")}
    if not about["strategy"]:
        del about["strategy"]
    return {
        "mean_over_sequences": _cellwise(mean, means),
        "std_over_sequences": _cellwise(mean, stds),
        "n_sequences": sum(counts),
        "n_datapoints": n_passages,
        **about,
        "n_runs": len(runs),
        "n_sequences_of_runs": [] if any("n_runs" in run.value for run in runs) else counts,
        "pooled_std_over_sequences": _cellwise(partial(_pooled_std, counts), [*means, *stds]),
        "matrices": [matrix for run in runs for matrix in run.matrices],
    }


def _shared(runs: Sequence[ContinualRun], field: str) -> str:
    """What all summaries say of a field, "" where they say nothing."""
    said = list(dict.fromkeys(str(run.value.get(field) or "") for run in runs))
    if len(said) > 1:
        remedy = "pool runs of one dataset, model and strategy"
        raise DataError(f"differs between the summaries: {', '.join(map(repr, said))}", field=field, remedy=remedy)
    return said[0]


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


def continual_estimates(matrices: Sequence[Matrix]) -> dict[str, Estimate | Difference]:
    """The numbers a continual experiment is about, each with its interval over sequences.

    ``never_edited`` row 0; ``after_own_edit`` each passage right after its edit; ``final`` the last row;
    ``final_minus_never_edited``; ``backward_transfer`` what later edits changed (final minus after own edit,
    the last passage left out); ``forgetting`` the best since its edit minus final, the same passages.
    """
    n_passages = check_sizes(matrices)
    never, final = [matrix[0] for matrix in matrices], [matrix[-1] for matrix in matrices]
    own = [[matrix[at + 1][at] for at in range(n_passages)] for matrix in matrices]
    estimates: dict[str, Estimate | Difference] = {
        "never_edited": _interval(never),
        "after_own_edit": _interval(own),
        "final": _interval(final),
        "final_minus_never_edited": _difference(final, never),
    }
    if n_passages > 1:
        earlier, own_earlier = ([row[:-1] for row in rows] for rows in (final, own))
        best = [[_best(row[at] for row in matrix[at + 1 : -1]) for at in range(n_passages - 1)] for matrix in matrices]
        estimates |= {"backward_transfer": _difference(earlier, own_earlier), "forgetting": _difference(best, earlier)}
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
            "final": _interval(final).mean,
            "against the first": None if final is first else _difference(final, first).sentence(),
        }
        for name, final in finals.items()
    ]

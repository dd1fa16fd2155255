"""Continual self-edits: the (K+1)×K accuracy matrix, its summary files, forgetting.

Row t of a matrix is the accuracy on each passage after t edits, row 0 before any. Step j + 1 edits passage j, which is
asked from then on, and once after step j (ours). A cell without a verdict is None. In files (SEAL, arXiv 2506.10943)
the mean is 0.0 before the passage's own edit. Intervals are over sequences and over the passages that they share."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from seal_nb import metrics
from seal_nb.errors import DataError, checked
from seal_nb.grading.base import answered_with
from seal_nb.protocol import rounded
from seal_nb.results import run as runs
from seal_nb.results.single_passage import check_length, split_by_passage
from seal_nb.storage import content_id, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

Matrix = Sequence[Sequence[float | None]]
N_SHUFFLES = 2_000


class _Step(runs.GradedPart):
    texts: runs.Many[str]
    correct: runs.Many[bool | None]


class _Sequence(runs.Part):
    titles: runs.Many[str]
    questions: runs.Many[runs.Many[runs.AskedQuestion]]
    steps: runs.Many[_Step]


class _File(runs.RunFields):
    mean_over_sequences: runs.Many[runs.Many[runs.Number]]
    std_over_sequences: runs.Many[runs.Many[runs.Number]] | None = None
    matrices: runs.Many[runs.Many[runs.Many[runs.Number]]] | None = None
    sequences: runs.Many[_Sequence] | None = None
    passages: runs.Many[runs.Many[str]] | None = None
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
        self.run_passages = read.passages or []
        check_sizes([self.mean, *self.matrices], path=self.path, field="mean_over_sequences")
        if self.std:  # absent or empty: only pooling needs it
            check_sizes([self.mean, self.std], path=self.path, field="std_over_sequences")
        for number, sequence in enumerate(read.sequences or []):
            counts, place = [len(asked) for asked in sequence.questions], f"sequences[{number}]"
            check_length(counts, len(sequence.titles), path=self.path, field=f"{place}.questions", of="titles")
            check_length(sequence.steps, len(counts) + 1, path=self.path, field=f"{place}.steps", of="steps")
            for step, record in enumerate(sequence.steps):
                n_asked = sum(counts[: n_passages_asked(step, counts, len(record.correct))])
                for name, values in record.lists().items():
                    check_length(values, n_asked, path=self.path, field=f"{place}.steps[{step}].{name}")

    @property
    def arm(self) -> str:
        return self.name

    def own_scores(self, kind: runs.Kind) -> list[metrics.Scores]:
        return [matrix[0 if kind == "baseline" else -1] for matrix in self.matrices]

    def labels(self) -> list[list[Any]]:
        """The passage of each cell: sequences that are drawn from the same passages are not independent."""
        keys = self.run_passages or [
            [content_id([title, asked]) for title, asked in zip(one["titles"], one["questions"], strict=True)]
            for one in self.value.get("sequences") or []
        ]
        return keys if len(keys) == len(self.matrices) else []

    def groups(self) -> dict[str, Any]:
        counts = [len(asked) for one in self.value.get("sequences") or [] for asked in one["questions"]]
        of_passage = sum(counts) / len(counts) if sum(counts) else self.value.get("questions_of_a_passage")
        how = {"n_each": of_passage} if of_passage else {}
        return how | ({"groups_P_Q": keys, "group": "passages"} if (keys := self.labels()) else {})

    def cost(self) -> tuple[float | None, float | None]:
        edits = [step for one in self.value.get("sequences") or [] for step in one["steps"][1:]]
        steps, tokens = (metrics.mean([edit.get(name) for edit in edits]) for name in ("train_steps", "train_tokens"))
        return steps, tokens

    def cells(self, kind: runs.Kind) -> list[list[runs.Cell]]:
        of_step, found = 0 if kind == "baseline" else len(self.mean) - 1, list[list[runs.Cell]]()
        stored = [(number, one) for number, step, one in self._placed_verdicts() if step == of_step]
        for number, sequence in enumerate(self.value.get("sequences") or []):
            own = [(one.answered, one.verdict()) for of_sequence, one in stored if of_sequence == number]
            parts = split_by_passage(own, [len(asked) for asked in sequence["questions"]])
            found.append([runs.Cell(*(zip(*part, strict=True) if part else ((), ()))) for part in parts])
        return found

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
            rows = [matrix[step][:step] for matrix in self.matrices]
            found.append(metrics.if_graded(metrics.mean_interval, rows, **self._how(0, step)) or stored)
        return found

    def _how(self, start: int, stop: int | None) -> dict[str, Any]:
        """``how`` for the cells of some passages."""
        how = self.how
        return how | {name: [row[start:stop] for row in how[name]] for name in ("groups_P_Q",) if name in how}

    def estimates(self) -> dict[str, metrics.Estimate | None]:
        """The numbers a continual experiment is about, each with its interval; None: nothing was graded.

        ``never_edited`` row 0; ``after_own_edit`` each passage right after its edit; ``final`` the last row;
        ``final_minus_never_edited``; ``backward_transfer`` what later edits changed (final minus after own edit, the
        last passage left out); ``forward_transfer`` what earlier edits changed before a passage's own (the first left
        out); ``forgetting`` and ``forgetting_by_chance`` (see ``forgetting``)."""

        def difference(first: Sequence[Any], second: Sequence[Any], start: int = 0, stop: int | None = None) -> Any:
            sides = ([row[start:stop] for row in rows] for rows in (first, second))
            return metrics.if_graded(metrics.paired_difference, *sides, **self._how(start, stop))

        matrices, places = self.matrices, range(len(self.mean) - 1)
        never, final = [matrix[0] for matrix in matrices], [matrix[-1] for matrix in matrices]
        own = [[matrix[at + 1][at] for at in places] for matrix in matrices]
        before_own = [[matrix[at][at] for at in places] for matrix in matrices]
        found: dict[str, metrics.Estimate | None] = {
            name: metrics.if_graded(metrics.mean_interval, rows, **self.how)
            for name, rows in (("never_edited", never), ("after_own_edit", own), ("final", final))
        }
        found["final_minus_never_edited"] = difference(final, never)
        if len(places) > 1:
            found["backward_transfer"] = difference(final, own, stop=-1)
            found["forward_transfer"] = difference(before_own, never, start=1)
            found |= forgetting(matrices, self._how(0, -1))
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
        """The means of ``estimates``; of the stored matrix in files without sequences."""
        if not self.matrices:
            rows = enumerate(self.mean)
            stored = [[cell if was_asked(t, p) else None for p, cell in enumerate(row)] for t, row in rows]
            return type(self)(value=self.value | {"matrices": [stored]}).overall()
        return {name: one and one.mean for name, one in self.estimates().items()}

    def counts(self) -> dict[str, Any]:
        about = {"n_passages": len(self.mean) - 1, "n_sequences": self.n_sequences}
        return super().counts() | about | {"n_answers": len(self.stored_verdicts())}

    def gaps(self) -> list[str]:
        if not self.matrices:
            return ["the file has no matrix of each sequence: no intervals"]
        unchecked = "the matrices of each pooled run are not known: the means are not checked"
        return [*super().gaps(), *([] if self._runs() else [unchecked])]

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
        unchecked = {"passages", "questions_of_a_passage"}  # the parts have matrices only
        return runs.unequal("summary", self.value, {k: v for k, v in computed.items() if k not in unchecked})

    def stored_verdicts(self) -> list[runs.StoredVerdict]:
        return [stored for _, _, stored in self._placed_verdicts()]

    def _placed_verdicts(self) -> Iterator[tuple[int, int, runs.StoredVerdict]]:
        """(sequence, number of edits, verdict) of every answer."""
        for number, sequence in enumerate(self.value.get("sequences") or []):
            passages = list(zip(sequence["titles"], sequence["questions"], strict=True))
            for step, record in enumerate(sequence["steps"]):
                n_passages = n_passages_asked(step, [len(asked) for _, asked in passages], len(record["correct"]))
                asked = [(title, one) for title, questions in passages[:n_passages] for one in questions]
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


def n_passages_asked(step: int, counts: Sequence[int], n_answers: int) -> int:
    """Passages that ``n_answers`` after ``step`` edits are about: all before any edit, then the edited ones, and the
    next one in files that have its answers."""
    return step + (n_answers > sum(counts[:step])) if step else len(counts)


def verdict_row(correct: metrics.Verdicts, counts: Sequence[int], step: int) -> list[metrics.Verdicts | None]:
    """The verdicts of every passage after ``step`` edits, from those of all questions; None if it was not asked.
    ``counts``: the number of questions of each passage."""
    n_asked = n_passages_asked(step, counts, len(correct))
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
        "passages": [keys for run in runs for keys in run.labels()],
        "questions_of_a_passage": metrics.mean([run.groups().get("n_each") for run in runs]),
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


def forgetting(matrices: Sequence[Matrix], how: Mapping[str, Any]) -> dict[str, metrics.Estimate | None]:
    """How far each passage fell from its best accuracy since its edit, the last passage left out. The best of several
    noisy cells is too high, so this is positive without any forgetting: ``forgetting_by_chance`` is the mean over all
    orders of a passage's cells. Where any order is as likely, p is how often a random one gives as much."""
    drops_S_P: list[list[list[float]]] = []  # of each passage: were this cell the last one
    for matrix in matrices:
        drops_S_P.append([])
        for at in range(len(matrix) - 2):
            cells = [row[at] for row in matrix[at + 1 :]]
            known = [] if cells[-1] is None else [cell for cell in cells if cell is not None]
            drops = [max(known[:last] + known[last + 1 :]) - cell for last, cell in enumerate(known) if len(known) > 1]
            drops_S_P[-1].append(drops)
    every = [drops for of_sequence in drops_S_P for drops in of_sequence if drops]
    observed, chance = (
        [[of(drops) if drops else None for drops in of_sequence] for of_sequence in drops_S_P]
        for of in (lambda drops: drops[-1], metrics.mean)
    )
    if not every:
        return dict.fromkeys(("forgetting", "forgetting_by_chance"))
    generator, total = np.random.default_rng(0), sum(drops[-1] for drops in every)
    shuffled = sum(generator.choice(drops, size=N_SHUFFLES) for drops in every)
    p = (1 + int(np.sum(shuffled >= total - 1e-9))) / (1 + N_SHUFFLES)
    measured = metrics.if_graded(metrics.paired_difference, observed, [[0.0] * len(row) for row in observed], **how)
    return {
        "forgetting": measured and replace(measured, p_value=p),
        "forgetting_by_chance": metrics.if_graded(metrics.mean_interval, chance, **how),
    }

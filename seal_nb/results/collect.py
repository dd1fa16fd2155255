"""Read one run file, or everything that a folder holds about finished experiments, ours and published.

Result files are recognised by their content. Two collections from the release count as run files too: verdicts of
published evaluations, and the overall numbers of published runs."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from seal_nb import metrics
from seal_nb.errors import DataError, SealError, redacted
from seal_nb.passages import Passage
from seal_nb.results import run as shared
from seal_nb.results.continual import ContinualRun
from seal_nb.results.single_passage import CptRun, SinglePassageRun
from seal_nb.storage import data_file, read_json, runs_folder

if TYPE_CHECKING:
    import pandas as pd

SomeRun = TypeVar("SomeRun", bound=shared.Run)
SKIPPED_FOLDERS = {".ipynb_checkpoints", ".done", ".git", ".venv", "adapters", "server"}
MOST_PARTS = 100_000  # objects of one file, and texts in lists; a run over all of SQuAD's validation has 60,000
MOST_RUNS = 200  # of one file
MOST_NAMES = 1_000  # of models and graders in one file
NAMES = {"grader", "model", "base_model", "earlier"}  # fields with names of models and graders
MOST_ARMS = 20  # that are compared with each other
SHIPPED_RUNS = {"shipped:ranking": "run_example.json", "shipped:example": "inspector_run.json.gz"}
SUMMARY_LINES = ("best arm", "differences between arms", "ReST-EM rounds", "best of many passages in one adapter",
               "after the last continual edit")  # fmt: skip


def read_run(path: str | Path, *, passages: Sequence[Passage] = ()) -> shared.Run:
    """Read one run file of this package or of the release, plain or gzip-compressed.

    Args:
        path: ``run_*.json``, ``cpt_run_*.json`` or ``summary_*.json``. Two runs come with the project:
            "shipped:ranking" has three passages, two self-edits each, two repeats; "shipped:example" is that of the
            passage inspector, with scores of tokens.
        passages: the passages that a CPT run was asked about, in order. Without them it has no questions to grade, and
            a published file no intervals.

    Returns:
        A SinglePassageRun, CptRun or ContinualRun, with ``accuracy()``, ``answers()`` and ``summary()``.

    Raises:
        DataError: the file is missing, broken (with item and field), or not one run."""
    shipped = SHIPPED_RUNS.get(str(path))
    path = data_file(shipped) if shipped else runs_folder(path)
    return run_of(read_json(path), path=path, passages=passages)


def run_of(value: Any, *, path: str | Path = "", file: str = "", passages: Sequence[Passage] = ()) -> shared.Run:
    """The run in a JSON value. Raises: DataError."""
    if not is_run(value):
        problem = "is neither a single-passage run (articles), a CPT run (server_reply) nor a continual summary"
        raise DataError(problem, path=path, remedy="give a run_*.json, cpt_run_*.json or summary_*.json")
    _hide_keys(value, path)
    about: dict[str, Any] = {"value": value, "path": Path(path), "file": file, "passages": passages}
    form = SinglePassageRun if "articles" in value else CptRun if "server_reply" in value else ContinualRun
    return form(**about)


def _hide_keys(value: Any, path: str | Path) -> None:
    """In place: models and graders that the file names, in which an older version let a key stand.
    Raises: DataError for a file with so many objects, texts in lists, or names that reading it would not end."""
    inside, n_parts, hide = [value], 0, lru_cache(None)(redacted)
    while inside:
        one = inside.pop()
        n_parts += isinstance(one, dict | str)
        for name in NAMES & one.keys() if isinstance(one, dict) else ():
            if isinstance(one[name], str):
                one[name] = hide(one[name])
            elif isinstance(one[name], dict) and name == "earlier":
                one[name] = {hide(grader): verdicts for grader, verdicts in one[name].items()}
        if n_parts > MOST_PARTS or hide.cache_info().currsize > MOST_NAMES:
            problem = f"has more than {MOST_PARTS} objects and texts, or {MOST_NAMES} models and graders"
            raise DataError(problem, path=path, remedy="split it")
        inside += one if isinstance(one, list) else []
        inside += [part for part in one.values() if isinstance(part, dict | list)] if isinstance(one, dict) else []


def is_run(value: Any) -> bool:
    """Whether a JSON value is a file of one of the three forms."""
    return isinstance(value, dict) and bool(value.keys() & {"articles", "server_reply", "mean_over_sequences"})


def collect(folder: str | Path) -> "Collection":
    """Read every result file below a folder, in the order of their paths.

    Args:
        folder: such as "runs", or a checkout of the published repository.

    Returns:
        A Collection: the runs by form, tables over them, and ``unread``: files that could not be read, with the reason
            (broken, too large, no regular file).

    Raises:
        DataError: there is no such folder."""
    root = runs_folder(folder)
    if not root.is_dir():
        raise DataError("no such folder", path=root, remedy="give a folder of runs")
    runs, unread = [], []
    for path in sorted(_json_files(root)):
        file = path.relative_to(root).as_posix()
        try:
            found = runs_in(read_json(path), path=path, file=file)
            for run in found:
                _ = run.row  # the tables need it: what cannot be computed is found here, where the file is known
            runs += found
        except SealError as error:
            unread.append((file, getattr(error, "problem", str(error))))
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError) as error:
            unread.append((file, f"has no statistics: {type(error).__name__}: {redacted(str(error))[:200]}"))
    return Collection(runs=tuple(runs), unread=tuple(unread))


def _json_files(root: Path) -> Iterator[Path]:
    """Links to folders are followed, each folder once; but not those that lead to a folder around this one."""
    seen: set[tuple[int, int]] = set()
    for at, folders, files in os.walk(root, followlinks=True):
        about = Path(at).stat()
        is_new, here = (about.st_dev, about.st_ino) not in seen, Path(at)
        seen.add((about.st_dev, about.st_ino))
        is_around = here.is_symlink() and here != root and root.resolve().is_relative_to(here.resolve())
        names = [*folders, *files] if is_new and not is_around else []
        folders[:] = sorted({*folders} - SKIPPED_FOLDERS) if names else []
        for name in names:
            if name.endswith((".json", ".json.gz")) and not name.endswith(".record.json"):
                yield here / name


def runs_in(value: Any, *, path: str | Path = "", file: str = "") -> list[shared.Run]:
    """The runs in one JSON value; none if it is something else."""
    if is_run(value):
        return [run_of(value, path=path, file=file)]
    forms: list[tuple[str, Any]] = []
    runs = value.get("runs") if isinstance(value, dict) else None
    if isinstance(runs, dict) and all(isinstance(run, dict) and "passages" in run for run in runs.values()):
        if sum(len(passage["baseline"]) + 1 for run in runs.values() for passage in run["passages"]) > MOST_PARTS:
            problem = f"has more than {MOST_PARTS} passages and verdicts"
            raise DataError(problem, path=path, field="runs", remedy="split it")
        for name, run in runs.items():
            marks_P = [zip(one["baseline"], one["adapter"], strict=True) for one in run["passages"]]  # of 0 and 1
            rows_P = [[{"baseline_correct": b == "1", "adapter_correct": a == "1"} for b, a in one] for one in marks_P]
            articles = [{"completions": [{"questions": rows}]} for rows in rows_P]
            about = {"overall": run.get("overall"), "n_articles": len(articles)}
            forms.append((name, {**about, "articles": articles}))
    elif isinstance(value, dict) and {"query_server", "continual_overall_results"} <= value.keys():
        no_verdicts: dict[str, list[bool]] = {"baseline_correct": [], "adapter_correct": []}
        forms = [(run["file"], {**run, "articles": []}) for run in value["query_server"]]
        forms += [(run["file"], {**run, "server_reply": no_verdicts}) for run in value.get("cpt") or []]
        forms += [("continual_overall_results", value["continual_overall_results"])]
    if len(forms) > MOST_RUNS:
        raise DataError(f"has more than {MOST_RUNS} runs", path=path, remedy="split it")
    return [run_of(run, path=path, file=f"{file}: {name}") for name, run in forms]


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The runs of a folder. ``unread``: (file, reason) of files that look like results and could not be read. Runs of
    an arm that differ by their seeds alone are pooled; runs with other settings are arms of their own. Rewards of
    ReST-EM rounds are not evaluations and are left out."""

    runs: tuple[shared.Run, ...]
    unread: tuple[tuple[str, str], ...] = ()

    @property
    def single_passage(self) -> list[SinglePassageRun]:
        return [run for run in self.runs if isinstance(run, SinglePassageRun)]

    @property
    def cpt(self) -> list[CptRun]:
        return [run for run in self.runs if isinstance(run, CptRun)]

    @property
    def continual(self) -> list[ContinualRun]:
        return [run for run in self.runs if isinstance(run, ContinualRun)]

    def overview(self) -> "pd.DataFrame":
        """One row per run: ``file``, ``kind``, ``arm``, ``n`` (passages or sequences), ``accuracy``."""
        rows = []
        for run in self.runs:
            is_ranking, estimate = isinstance(run, SinglePassageRun) and run.is_ranking, run.estimate()
            kind = "ranking" if is_ranking else run.form.replace("_", " ")
            rows.append((run.file, kind, run.arm, estimate and estimate.n, estimate and estimate.mean))
        return shared.frame(rows, ("file", "kind", "arm", "n", "accuracy"))

    def arms(self, prompt_key: str = "") -> dict[str, SinglePassageRun]:
        """One evaluation per arm, by its name (see ``pooled``); with ``prompt_key``, only those with this prompt."""
        wanted = [run for run in self.single_passage if not run.is_ranking and prompt_key in ("", run.prompt_key)]
        measured = [run for run in wanted if run.has_verdicts or run.stored_mean("adapter") is not None]

        def order(named: tuple[str, SinglePassageRun]) -> tuple[float, str]:
            """Passage only first, self-edits by round, then texts that no round wrote."""
            name, run = named
            number = math.inf if run.rest_em_round is None else run.rest_em_round
            return -1 if run.arm == "passage only" else number, name

        return dict(sorted(pooled(measured).items(), key=order))

    def best_answered(self) -> SinglePassageRun | None:
        """Of the arms with answers, those on the most passages; of these, the most accurate one."""
        measured = [(run, run.estimate()) for run in self.arms().values() if run.stored_verdicts()]
        found = [(estimate.n_asked, estimate.mean, run) for run, estimate in measured if estimate]
        return max(found, key=lambda one: one[:2])[2] if found else None

    def accuracy(self, prompt_key: str = "", *, form: str = "single_passage") -> "pd.DataFrame":
        """The ``accuracy()`` of every arm as one DataFrame, or of all runs of the form "cpt" or "continual"."""
        if form == "single_passage":
            return stacked(self.arms(prompt_key).items())
        if form == "cpt":
            return stacked(pooled(self.cpt).items())
        return stacked((run.arm, run) for run in self.continual)  # of other seeds: see ``pool_summaries``

    def left_out(self, prompt_key: str = "") -> "pd.DataFrame":
        """``file`` and ``reason`` of every single-passage run that ``arms`` does not hold."""
        rows, arms = [], self.arms(prompt_key).values()
        shown = {one.file for run in arms for one in (run, *run.others)}
        for run in self.single_passage:
            reason = "another file has this arm with the same seed, or with verdicts"
            if not run.estimate():
                reason = "no answer graded"
            if run.is_ranking:
                reason = "rewards of a ReST-EM round"
            elif prompt_key not in ("", run.prompt_key):
                reason = f"prompt {run.prompt_key}"
            rows += [(run.file, reason)] if run.file not in shown else []
        return shared.frame(rows, ("file", "reason"))

    def prompt_keys(self) -> list[str]:
        """The prompt keys of all evaluations, `implications` first."""
        keys = {run.prompt_key for run in self.single_passage if not run.is_ranking}
        return sorted(keys, key=lambda key: (key != "implications", key))

    def rounds(self, prompt_key: str) -> list[SinglePassageRun | None]:
        """The evaluation of each ReST-EM round, None for a missing one; empty with fewer than two rounds."""
        arms = self.arms(prompt_key).items()
        by_round = {run.rest_em_round: run for name, run in arms if name == run.arm and run.rest_em_round is not None}
        return [by_round.get(number) for number in range(max(by_round) + 1)] if len(by_round) > 1 else []

    def rounds_by_prompt(self) -> dict[str, list[SinglePassageRun | None]]:
        """``rounds`` of every prompt that has some."""
        return {key: runs for key in self.prompt_keys() if (runs := self.rounds(key))}

    def rounds_accuracy(self) -> "pd.DataFrame":
        """One row per prompt and round, as ``accuracy()`` of its run. Each round has its own model and so its own
        baseline: ``more_gain`` is how much more its adapters gain than those of the first round of this prompt, paired
        over passages (the difference in differences), in words."""
        rows = {key: [run for run in runs if run] for key, runs in self.rounds_by_prompt().items()}
        more = [one for runs in rows.values() for one in _more_gain(runs)]
        return stacked((run.arm, run) for runs in rows.values() for run in runs).assign(more_gain=more)

    def passage_accuracies(self, prompt_key: str) -> list[list[float]]:
        """For each passage its accuracy in each round; empty if rounds, passages or verdicts are missing."""
        rounds = self.rounds(prompt_key)
        columns = [[metrics.accuracy(verdicts) for verdicts in run.scores("adapter")] if run else [] for run in rounds]
        if len(set(map(len, columns))) != 1:
            return []
        rows = [[value for value in row if value is not None] for row in zip(*columns, strict=True)]
        return [row for row in rows if len(row) == len(columns)]

    def published_arms(self, prompt_key: str = "") -> dict[str, float]:
        """The published accuracy of every arm that was run on exactly the published passages."""
        arms = [arm for arm, run in self.arms(prompt_key).items() if shared.are_published_passages(run.unit_keys())]
        return {arm: shared.SINGLE_PASSAGE[arm] for arm in arms if arm in shared.SINGLE_PASSAGE}

    def published_rounds(self) -> dict[str, tuple[float, ...]]:
        """The published accuracy of every round by prompt, if the rounds were run on the published passages."""
        runs = [run for rounds in self.rounds_by_prompt().values() for run in rounds if run]
        return shared.ROUNDS_BY_PROMPT if runs and shared.are_published_passages(runs[0].unit_keys()) else {}

    def baseline(self, prompt_key: str = "") -> metrics.Estimate | None:
        """The model without adapter, from the first arm that has it."""
        return next((found for run in self.arms(prompt_key).values() if (found := run.estimate("baseline"))), None)

    def differences(
        self, prompt_key: str = "", *, compare: Sequence[str] = (), margin: float | None = None
    ) -> "pd.DataFrame":
        """Differences between arms over the same passages, as ``compare`` gives them, with Holm's p for all of them
        together. ``compare``: "arm > against", as it was declared beforehand; empty: every two arms, of more than
        MOST_ARMS only the first, and a last row without numbers says so. Pairs that cannot be compared, such as
        runs with different graders, have no numbers and a reason. ``margin``: see ``compare``.
        Raises: DataError for an arm that is not there."""
        arms, rows, found = self.arms(prompt_key), [], []
        declared = [compare] if isinstance(compare, str) else compare
        pairs = list(dict.fromkeys(tuple(map(str.strip, one.split(" > "))) for one in declared))
        for pair in pairs or [(one, other) for other, one in combinations(list(arms)[:MOST_ARMS], 2)]:
            if len(pair) != 2 or len({*pair} & arms.keys()) < 2:
                problem = f"{' > '.join(pair)!r} are not two arms of: {'; '.join(arms) or 'no arm was found'}"
                raise DataError(problem, field="compare", remedy='write "arm > against" as in the table of arms')
            try:
                found.append((pair[0], pair[1], shared.difference_of(arms[pair[0]], arms[pair[1]])))
            except DataError as error:
                about = {"arm": pair[0], "against": pair[1], "is_real": False}
                rows.append(about | {"sentence": f"not compared: {error.problem}"})
        of_pairs = zip(found, metrics.adjusted([one for *_, one in found]), strict=True)
        compared = [
            shared.compared_row(arms[arm], arms[against], one, margin) | {"arm": arm, "against": against}
            for (arm, against, _), one in of_pairs
            if one
        ]
        if not compare and (n_more := len(arms) - MOST_ARMS) > 0:
            said = f"not compared: only the first {MOST_ARMS} arms are"
            rows.append({"arm": metrics.counted(n_more, "more arms"), "is_real": False, "sentence": said})
        return shared.frame([*compared, *rows], shared.COMPARED)

    def summary(self, prompt_key: str = "") -> dict[str, str | None]:
        """The few numbers to look at first; None where there are no runs for one."""
        said: dict[str, str | None] = dict.fromkeys(SUMMARY_LINES)
        arms = [(one, name, run) for name, run in self.arms(prompt_key).items() if (one := run.estimate())]
        most = max((estimate.n_asked for estimate, *_ in arms), default=0)  # one passage by hand is no evaluation
        if whole := [arm for arm in arms if arm[0].n_asked == most]:
            best, name, _ = max(whole, key=lambda arm: arm[0].mean)
            baseline = next((one for *_, run in whole if (one := run.estimate("baseline"))), None)
            said["best arm"] = f"{name} {_percent(best)}, baseline {_percent(baseline)}"
        if len(pairs := self.differences(prompt_key).dropna(subset="n")):
            said["differences between arms"] = f"{sum(pairs['is_real'])} of {len(pairs)} are real (Holm's p)"
        if known := [run for run in self.rounds(prompt_key) if run]:
            said["ReST-EM rounds"] = " → ".join(_percent(run.estimate()) for run in (known[0], known[-1]))
        if cpt := [(estimate, arm) for arm, run in pooled(self.cpt).items() if (estimate := run.estimate())]:
            best, name = max(cpt, key=lambda pair: pair[0].mean)
            said["best of many passages in one adapter"] = f"{name} {best.mean:.1%}, {best.n} passages"
        ends = [(run.stored_mean("adapter"), run.stored_mean("baseline")) for run in self.continual]
        if ends := [(after, before) for after, before in ends if after is not None and before is not None]:
            said["after the last continual edit"] = "{:.1%}, never edited {:.1%}".format(*max(ends))
        return said


def pooled(runs: Sequence[SomeRun]) -> dict[str, SomeRun]:
    """The runs by arm. Files with verdicts go before stored numbers. Runs of an arm on the same passages with the same
    conditions and other seeds become one run with ``others``; of runs with the same seed the last file stays. Other
    conditions or passages make an arm of its own, whose name says what differs from the one with the most passages."""
    by_arm: dict[str, list[SomeRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    found = dict[str, SomeRun]()
    for arm, own in by_arm.items():
        groups: list[dict[str, SomeRun]] = []  # by seed, alike in everything else
        for run in [one for one in own if one.has_verdicts] or own[-1:]:
            group = next((one for one in groups if _are_alike(run, next(iter(one.values())))), None)
            if group is None:
                groups.append(group := {})
            group[str(run.value.get("seed"))] = run
        for group in sorted(groups, key=lambda one: len(next(iter(one.values())).unit_keys()), reverse=True):
            run, *others = group.values()
            first = found.get(arm)
            name = f"{arm} ({shared.differing(run, first) or run.file})" if first else arm
            name = name if name not in found else f"{arm} ({run.file})"
            found[name] = replace(run, others=tuple(others)) if others else run
    return found


def _are_alike(one: shared.Run, other: shared.Run) -> bool:
    """Whether two runs of an arm differ by nothing but their seeds. Each run of a ReST-EM round has its own model."""
    runs = (one, other)
    units = [(run.unit_keys(), len(run.own_scores("adapter")), run.value.get("seed") is None) for run in runs]
    is_round = isinstance(one, SinglePassageRun) and one.rest_em_round
    return units[0] == units[1] and shared.differing(one, other) in ("", "model" if is_round else "")


def stacked(named: Iterable[tuple[str, shared.Run]]) -> "pd.DataFrame":
    """The ``accuracy()`` rows of several runs with their names, with ``p_holm``: the p of all gains together."""
    pairs = list(named)
    rows = [row | {"arm": name} for name, run in pairs for row in run.accuracy().to_dict("records")]
    table, gains = shared.frame(rows), metrics.adjusted([run.gain() for _, run in pairs])
    if rows:
        table.insert(table.columns.get_loc("p") + 1, "p_holm", [one.p_value if one else None for one in gains])
    return table


def _more_gain(runs: Sequence[SinglePassageRun]) -> list[str | None]:
    """How much more each run gains than the first, over passages that both have; None where that cannot be said."""
    found: list[metrics.Difference | None] = []
    for run in runs[1:]:
        one = None
        with suppress(DataError):  # other passages or graders
            one = shared.difference_of(run, runs[0], shared_only=True, scores=_gains)
        found.append(one)
    return [None, *(one.sentence() if one else None for one in metrics.adjusted(found))]


def _gains(run: shared.Run) -> list[metrics.Scores]:
    pairs_P = [zip(*rows, strict=True) for rows in zip(run.scores("baseline"), run.scores("adapter"), strict=True)]
    return [[metrics.gain([before], [after]) for before, after in pairs] for pairs in pairs_P]


def _percent(estimate: metrics.Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:.1%} (n = {estimate.n})"

"""Read one run file, or everything that a folder holds about finished experiments, ours and published.

Result files are recognised by their content. Two collections from the release count as run files too: verdicts of
published evaluations, and the overall numbers of published runs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from seal_nb.errors import DataError, SealError, checked
from seal_nb.metrics import Estimate, accuracy
from seal_nb.passages import Passage
from seal_nb.results.continual import ContinualRun
from seal_nb.results.cpt import CptRun, check_length
from seal_nb.results.published import ROUNDS_BY_PROMPT, SINGLE_PASSAGE, are_published_passages
from seal_nb.results.run import COMPARED, Run, comparison, frame
from seal_nb.results.single_passage import SinglePassageRun
from seal_nb.storage import data_file, read_json, runs_folder

if TYPE_CHECKING:
    import pandas as pd

SKIPPED_FOLDERS = {".ipynb_checkpoints", ".done", ".git", ".venv", "adapters", "server"}
SHIPPED_RUNS = {"shipped:ranking": "run_example.json", "shipped:example": "inspector_run.json.gz"}
MOST_BYTES = 200_000_000  # no result file is larger
SUMMARY_LINES = ("best arm", "differences between arms", "ReST-EM rounds", "best of many passages in one adapter",
               "after the last continual edit")  # fmt: skip


def read_run(path: str | Path, *, passages: Sequence[Passage] = ()) -> Run:
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
        DataError: the file is missing, broken (with item and field), or not one run.
    """
    shipped = SHIPPED_RUNS.get(str(path))
    path = data_file(shipped) if shipped else runs_folder(path)
    return run_of(read_json(path), path=path, passages=passages)


def run_of(value: Any, *, path: str | Path = "", file: str = "", passages: Sequence[Passage] = ()) -> Run:
    """The run in a JSON value. Raises: DataError."""
    if not is_run(value):
        raise DataError(
            "is neither a single-passage run (articles), a CPT run (server_reply) nor a continual summary "
            "(mean_over_sequences)",
            path=path,
            remedy="give a run_*.json, cpt_run_*.json or summary_*.json",
        )
    about: dict[str, Any] = {"value": value, "path": Path(path), "file": file}
    if "articles" in value:
        return SinglePassageRun(**about)
    return CptRun(**about, passages=passages) if "server_reply" in value else ContinualRun(**about)


def is_run(value: Any) -> bool:
    """Whether a JSON value is a file of one of the three forms."""
    return isinstance(value, dict) and bool(value.keys() & {"articles", "server_reply", "mean_over_sequences"})


def collect(folder: str | Path) -> "Collection":
    """Read every result file below a folder, in the order of their paths.

    Args:
        folder: such as "runs", or a checkout of the published repository.

    Returns:
        A Collection: the runs by form, tables over them, and ``unread``: files that could not be read, with the reason.

    Raises:
        DataError: there is no such folder.
    """
    root = runs_folder(folder)
    if not root.is_dir():
        raise DataError("no such folder", path=root, remedy="give a folder of runs")
    runs, unread = [], []
    for path in sorted(_json_files(root)):
        file = path.relative_to(root).as_posix()
        try:
            runs += runs_in(read_json(path), path=path, file=file)
        except SealError as error:
            unread.append((file, getattr(error, "problem", str(error))))
    return Collection(runs=tuple(runs), unread=tuple(unread))


def _json_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.json*"):
        is_json = path.name.endswith((".json", ".json.gz")) and not path.name.endswith(".record.json")
        is_skipped = bool(SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))
        if is_json and not is_skipped and path.is_file() and path.stat().st_size <= MOST_BYTES:
            yield path


def runs_in(value: Any, *, path: str | Path = "", file: str = "") -> list[Run]:
    """The runs in one JSON value; none if it is something else."""
    if is_run(value):
        return [run_of(value, path=path, file=file)]
    if not isinstance(value, dict):
        return []
    forms: list[tuple[str, dict[str, Any]]] = []
    runs = value.get("runs")
    if isinstance(runs, dict) and all(isinstance(run, dict) and "passages" in run for run in runs.values()):
        forms = [(name, _from_verdict_strings(run, path=path, item=name)) for name, run in runs.items()]
    elif "query_server" in value and "continual_overall_results" in value:
        checked(_Overalls.model_validate, value, path=path)
        no_verdicts: dict[str, list[bool]] = {"baseline_correct": [], "adapter_correct": []}
        forms = [(run["file"], {**run, "articles": []}) for run in value["query_server"]]
        forms += [(run["file"], {**run, "server_reply": no_verdicts}) for run in value.get("cpt", [])]
        forms += [("continual_overall_results", value["continual_overall_results"])]
    return [run_of(run, path=path, file=f"{file}: {name}") for name, run in forms]


class _Marks(BaseModel):
    baseline: str
    adapter: str


class _Passages(BaseModel):
    passages: list[_Marks]


class _Named(BaseModel):
    file: str


class _Overalls(BaseModel):
    query_server: list[_Named]
    cpt: list[_Named] = []
    continual_overall_results: dict[str, Any]


def _from_verdict_strings(run: Mapping[str, Any], *, path: str | Path, item: str) -> dict[str, Any]:
    """A single-passage run from the verdicts of each passage as a string of 0 and 1."""
    articles = []
    checked(_Passages.model_validate, run, path=path, item=item)
    for at, passage in enumerate(run["passages"]):
        field = f"runs.{item}.passages[{at}].adapter"
        check_length(passage["adapter"], len(passage["baseline"]), path=path, field=field)
        marks = zip(passage["baseline"], passage["adapter"], strict=True)
        questions = [{"baseline_correct": before == "1", "adapter_correct": after == "1"} for before, after in marks]
        articles.append({"completions": [{"questions": questions}]})
    return {"overall": run.get("overall") or {}, "n_articles": len(articles), "articles": articles}


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The runs of a folder. ``unread``: (file, reason) of files that look like results and could not be read. Several
    files may hold the same arm. ``arms`` picks one: files with verdicts before stored numbers, later before earlier
    paths. Rewards of ReST-EM rounds are not evaluations and are left out."""

    runs: tuple[Run, ...]
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
        return frame(rows, ("file", "kind", "arm", "n", "accuracy"))

    def arms(self, prompt_key: str = "") -> dict[str, SinglePassageRun]:
        """One evaluation per arm, by its name; with ``prompt_key``, only those with this prompt."""
        wanted = [run for run in self.single_passage if not run.is_ranking and prompt_key in ("", run.prompt_key)]
        measured = [run for run in wanted if run.has_verdicts or run.stored_mean("adapter") is not None]
        arms = {run.arm: run for run in sorted(measured, key=lambda run: run.has_verdicts)}  # the last one stays
        return dict(sorted(arms.items(), key=lambda item: _order(item[1])))

    def best_answered(self) -> SinglePassageRun | None:
        """Of the arms with answers, those on the most passages; of these, the most accurate one."""
        measured = [(run, run.estimate()) for run in self.arms().values() if run.stored_verdicts()]
        found = [(estimate.n, estimate.mean, run) for run, estimate in measured if estimate]
        return max(found, key=lambda one: one[:2])[2] if found else None

    def accuracy(self, prompt_key: str = "", *, form: str = "single_passage") -> "pd.DataFrame":
        """The ``accuracy()`` of every arm as one DataFrame, or of all runs of the form "cpt" or "continual"."""
        if form == "single_passage":
            return stacked(self.arms(prompt_key).values())
        return stacked(run for run in self.runs if run.form == form)

    def left_out(self, prompt_key: str = "") -> "pd.DataFrame":
        """``file`` and ``reason`` of every single-passage run that ``arms`` does not hold."""
        shown = self.arms(prompt_key).values()
        rows = [(run.file, _why_left_out(run, prompt_key)) for run in self.single_passage if run not in shown]
        return frame(rows, ("file", "reason"))

    def prompt_keys(self) -> list[str]:
        """The prompt keys of all evaluations, `implications` first."""
        keys = {run.prompt_key for run in self.single_passage if not run.is_ranking}
        return sorted(keys, key=lambda key: (key != "implications", key))

    def rounds(self, prompt_key: str) -> list[SinglePassageRun | None]:
        """The evaluation of each ReST-EM round, None for a missing one; empty with fewer than two rounds."""
        arms = self.arms(prompt_key).values()
        by_round = {run.rest_em_round: run for run in arms if run.rest_em_round is not None}
        return [by_round.get(number) for number in range(max(by_round) + 1)] if len(by_round) > 1 else []

    def rounds_by_prompt(self) -> dict[str, list[SinglePassageRun | None]]:
        """``rounds`` of every prompt that has some."""
        return {key: runs for key in self.prompt_keys() if (runs := self.rounds(key))}

    def rounds_accuracy(self) -> "pd.DataFrame":
        """One row per prompt and round, as ``accuracy()`` of its run."""
        return stacked(run for runs in self.rounds_by_prompt().values() for run in runs if run)

    def passage_accuracies(self, prompt_key: str) -> list[list[float]]:
        """For each passage its accuracy in each round; empty if rounds, passages or verdicts are missing."""
        rounds = self.rounds(prompt_key)
        columns = [[accuracy(verdicts) for verdicts in run.scores("adapter")] if run else [None] for run in rounds]
        if not columns or len(set(map(len, columns))) != 1 or any(None in column for column in columns):
            return []
        return [[value for value in row if value is not None] for row in zip(*columns, strict=True)]

    def published_arms(self, prompt_key: str = "") -> dict[str, float]:
        """The published accuracy of every arm that was run on exactly the published passages."""
        arms = [arm for arm, run in self.arms(prompt_key).items() if are_published_passages(run.unit_keys())]
        return {arm: SINGLE_PASSAGE[arm] for arm in arms if arm in SINGLE_PASSAGE}

    def published_rounds(self) -> dict[str, tuple[float, ...]]:
        """The published accuracy of every round by prompt, if the rounds were run on the published passages."""
        runs = [run for rounds in self.rounds_by_prompt().values() for run in rounds if run]
        return ROUNDS_BY_PROMPT if runs and are_published_passages(runs[0].unit_keys()) else {}

    def baseline(self, prompt_key: str = "") -> Estimate | None:
        """The model without adapter, from the first arm that has it."""
        return next((found for run in self.arms(prompt_key).values() if (found := run.estimate("baseline"))), None)

    def differences(self, prompt_key: str = "") -> "pd.DataFrame":
        """Every two arms over the same passages, as ``compare`` gives them."""
        rows = []
        for second, first in combinations(self.arms(prompt_key).values(), 2):
            with suppress(DataError):  # other passages
                rows.append(comparison(first, second))
        return frame(rows, COMPARED)

    def summary(self, prompt_key: str = "") -> dict[str, str | None]:
        """The few numbers to look at first; None where there are no runs for one."""
        said: dict[str, str | None] = dict.fromkeys(SUMMARY_LINES)
        arms = [(estimate, run) for run in self.arms(prompt_key).values() if (estimate := run.estimate())]
        most = max((estimate.n for estimate, _ in arms), default=0)  # one passage tried by hand is no evaluation
        if whole := [(estimate, run) for estimate, run in arms if estimate.n == most]:
            best, of_best = max(whole, key=lambda pair: pair[0].mean)
            baseline = next((one for _, run in whole if (one := run.estimate("baseline"))), None)
            said["best arm"] = f"{of_best.arm} {_percent(best)}, baseline {_percent(baseline)}"
        if len(differences := self.differences(prompt_key)):
            said["differences between arms"] = f"{sum(differences['is_real'])} of {len(differences)} are real"
        if known := [run for run in self.rounds(prompt_key) if run]:
            said["ReST-EM rounds"] = " → ".join(_percent(run.estimate()) for run in (known[0], known[-1]))
        if cpt := [(estimate, run) for run in self.cpt if (estimate := run.estimate())]:
            best, of_cpt = max(cpt, key=lambda pair: pair[0].mean)
            said["best of many passages in one adapter"] = f"{of_cpt.arm} {best.mean:.1%}, {best.n} passages"
        ends = [(run.stored_mean("adapter"), run.stored_mean("baseline")) for run in self.continual]
        if ends := [(after, before) for after, before in ends if after is not None and before is not None]:
            said["after the last continual edit"] = "{:.1%}, never edited {:.1%}".format(*max(ends))
        return said


def stacked(runs: Iterable[Run]) -> "pd.DataFrame":
    """The ``accuracy()`` rows of several runs as one DataFrame."""
    return frame([row for run in runs for row in run.accuracy().to_dict("records")])


def _why_left_out(run: SinglePassageRun, prompt_key: str) -> str:
    if run.is_ranking:
        return "rewards of a ReST-EM round"
    if prompt_key not in ("", run.prompt_key):
        return f"prompt {run.prompt_key}"
    return "another file is shown for this arm" if run.estimate() else "no answer graded"


def _order(run: SinglePassageRun) -> tuple[float, str]:
    """Passage only first, self-edits by round, then texts that no round wrote."""
    if run.arm == "passage only":
        return -1, run.arm
    return math.inf if run.rest_em_round is None else run.rest_em_round, run.arm


def _percent(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:.1%} (n = {estimate.n})"

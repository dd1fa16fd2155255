"""Everything a folder holds about finished experiments, ours and published alike, as records to draw.

Walks a folder, tells result files by their content and leaves the others alone: single-passage runs, CPT
runs, continual summaries, and two collections made from the release (verdicts of published evaluations,
overall numbers of published runs). A file that looks like a result and cannot be read is named with its
reason, never silently left out. Computes nothing but accuracies and intervals, draws nothing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError, SealError
from seal_nb.metrics import Estimate, Verdicts, accuracy, mean_interval
from seal_nb.prompts import DEFAULT_PROMPT_KEY, recorded_key
from seal_nb.results.single_passage import SinglePassageRun, run_from_json
from seal_nb.storage import read_json

SKIPPED_FOLDERS = {".ipynb_checkpoints", ".done", ".git", ".venv", "adapters", "server"}
MOST_BYTES = 200_000_000  # no result file is larger
ROUND = re.compile(r"(?:iter|round)[_-]?(\d+)")
RANKING = re.compile(r"(^|_)rank(_|$|\.)")
PROMPT = re.compile(r"prompt-([a-z-]+)")
PROMPT_NAMES = {"long": "implications-long", "very-long": "implications-very-long"}  # in published file names
ARM_NAMES = {
    "naive": "passage only",
    "passage_only": "passage only",
    "base": "self-edits, base model",
    "gpt4_1": "texts of GPT-4.1",
    "hand_written": "hand-written",
    "in_context": "passage in the prompt",
    "self_edits": "self-edits",
}


@dataclass(frozen=True, kw_only=True)
class SinglePassageResult:
    """One evaluated arm: for each passage the verdicts of all its answers, without and with the adapter.

    ``rest_em_round`` is 0 for the base model's self-edits and None for arms that no model wrote. Where a file
    has no verdicts the two lists are empty and only the stored accuracies are known.
    """

    name: str
    file: str
    arm: str
    prompt_key: str
    rest_em_round: int | None
    passages: tuple[tuple[str, str], ...]  # (title, context); empty where the file does not say
    baseline_P_Q: tuple[Verdicts, ...]
    adapter_P_Q: tuple[Verdicts, ...]
    stored_baseline: float | None
    stored_adapter: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_ranking(self) -> bool:
        """A reward measurement on training passages, not an evaluation.

        No file says so: its name does, or that several self-edits were each measured several times. Several
        self-edits alone are an evaluation over more texts.
        """
        n_edits, n_repeats = (int(self.settings.get(key) or 1) for key in ("k_completions", "eval_times"))
        return bool(RANKING.search(self.name)) or (n_edits > 1 and n_repeats > 1)

    def adapter(self) -> Estimate | None:
        return estimate(self.adapter_P_Q, self.stored_adapter, self.settings)

    def baseline(self) -> Estimate | None:
        return estimate(self.baseline_P_Q, self.stored_baseline, self.settings)


@dataclass(frozen=True, kw_only=True)
class CptResult:
    """One multi-passage adapter; verdicts are of all questions in order."""

    name: str
    file: str
    arm: str
    n_passages: int
    n_questions: int
    baseline_accuracy: float | None
    adapter_accuracy: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ContinualResult:
    """(K+1)×K mean accuracies and their standard deviations; the matrix of each sequence if known."""

    name: str
    file: str
    n_sequences: int
    mean: tuple[tuple[float | None, ...], ...]
    std: tuple[tuple[float | None, ...], ...]
    sequences: tuple[tuple[tuple[float | None, ...], ...], ...] = ()


Result = SinglePassageResult | CptResult | ContinualResult


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a folder holds; ``unread`` is (file, reason)."""

    single: tuple[SinglePassageResult, ...]
    cpt: tuple[CptResult, ...]
    continual: tuple[ContinualResult, ...]
    unread: tuple[tuple[str, str], ...]


def collect_results(folder: str | Path) -> Found:
    """Every result file below a folder, by path. Raises: DataError where there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError("no such folder", path=root, remedy="give a folder of runs")
    results: list[Result] = []
    unread: list[tuple[str, str]] = []
    for path in sorted(_json_files(root)):
        file = path.relative_to(root).as_posix()
        try:
            results += results_in(read_json(path), file)
        except SealError as error:
            unread.append((file, getattr(error, "problem", str(error))))
    return Found(
        single=tuple(r for r in results if isinstance(r, SinglePassageResult)),
        cpt=tuple(r for r in results if isinstance(r, CptResult)),
        continual=tuple(r for r in results if isinstance(r, ContinualResult)),
        unread=tuple(unread),
    )


def _json_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.json*"):
        is_json = path.name.endswith((".json", ".json.gz")) and not path.name.endswith(".record.json")
        is_skipped = bool(SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))
        if is_json and not is_skipped and path.is_file() and path.stat().st_size <= MOST_BYTES:
            yield path


def results_in(value: Any, file: str) -> list[Result]:
    """The results in one JSON value, none where it is something else."""
    if not isinstance(value, dict):
        return []
    if "articles" in value:
        return [single_passage_result(run_from_json(value, path=file), file)]
    if isinstance(value.get("server_reply"), dict):
        return [_cpt(value, file)]
    if "mean_over_sequences" in value:
        return [_continual(value, file)]
    if "query_server" in value and "continual_overall_results" in value:
        return _overall_numbers(value, file)
    runs = value.get("runs")
    if isinstance(runs, dict) and all(isinstance(run, dict) and "passages" in run for run in runs.values()):
        return [_verdict_strings(name, run, file) for name, run in runs.items()]
    return []


def estimate(correct_P_Q: Sequence[Verdicts], stored: float | None, settings: Mapping[str, Any]) -> Estimate | None:
    """Mean with its interval from verdicts, else the stored mean without one (no width); None of nothing."""
    if any(verdict is not None for verdicts in correct_P_Q for verdict in verdicts):
        return mean_interval(correct_P_Q)
    if stored is None:
        return None
    return Estimate(mean=stored, low=stored, high=stored, n=int(settings.get("n_articles") or 0))


def single_passage_result(run: SinglePassageRun, file: str) -> SinglePassageResult:
    """A run file as a result: verdicts of all self-edits and repeats of a passage together."""
    name = _stem(file)
    graded = any(edit.is_graded for passage in run.passages for edit in passage.self_edits)
    return SinglePassageResult(
        name=name,
        file=file,
        arm=_arm(str(run.settings.get("arm") or ""), name),
        prompt_key=str(run.settings.get("prompt_key") or _named_prompt(name) or _recorded_prompt(run)),
        rest_em_round=_round(str(run.settings.get("arm") or ""), name),
        passages=tuple((passage.title, passage.context) for passage in run.passages),
        baseline_P_Q=_verdicts(run, "baseline_correct") if graded else (),
        adapter_P_Q=_verdicts(run, "adapter_correct") if graded else (),
        stored_baseline=run.stored_overall.get("baseline_mean_accuracy"),
        stored_adapter=run.stored_overall.get("adapter_mean_accuracy"),
        settings=run.settings,
    )


def _verdicts(run: SinglePassageRun, which: str) -> tuple[Verdicts, ...]:
    return tuple(
        [getattr(answered, which) for edit in passage.self_edits for answered in edit.questions]
        for passage in run.passages
    )


def _verdict_strings(name: str, run: Mapping[str, Any], file: str) -> SinglePassageResult:
    """Verdicts written as a string of 0 and 1 for each passage."""
    stored = run.get("overall") or {}
    return SinglePassageResult(
        name=name,
        file=file,
        arm=_arm("", name),
        prompt_key=_prompt_key(name),
        rest_em_round=_round("", name),
        passages=(),
        baseline_P_Q=tuple([c == "1" for c in passage["baseline"]] for passage in run["passages"]),
        adapter_P_Q=tuple([c == "1" for c in passage["adapter"]] for passage in run["passages"]),
        stored_baseline=stored.get("baseline_mean_accuracy"),
        stored_adapter=stored.get("adapter_mean_accuracy"),
        settings={"n_articles": len(run["passages"])},
    )


def _overall_numbers(value: Mapping[str, Any], file: str) -> list[Result]:
    """Published runs of which only the overall numbers are at hand."""
    single: list[Result] = []
    for run in value["query_server"]:
        name = _stem(run["file"])
        single.append(
            SinglePassageResult(
                name=name,
                file=f"{file}: {run['file']}",
                arm=_arm("", name),
                prompt_key=_prompt_key(name),
                rest_em_round=_round("", name),
                passages=(),
                baseline_P_Q=(),
                adapter_P_Q=(),
                stored_baseline=run["overall"].get("baseline_mean_accuracy"),
                stored_adapter=run["overall"].get("adapter_mean_accuracy"),
                settings={key: entry for key, entry in run.items() if key != "overall"},
            )
        )
    cpt = [
        _cpt({**run, "server_reply": {}}, f"{file}: {run['file']}", n_questions=run.get("eval_questions"))
        for run in value.get("cpt", [])
    ]
    return [*single, *cpt, _continual(value["continual_overall_results"], file)]


def _cpt(value: Mapping[str, Any], file: str, n_questions: int | None = None) -> CptResult:
    reply, stored = value["server_reply"], value.get("overall") or {}
    before, after = reply.get("baseline_correct") or [], reply.get("adapter_correct") or []
    name, full = _stem(file), value.get("method") == "full"
    return CptResult(
        name=name,
        file=file,
        arm=_arm(str(value.get("arm") or ""), name) + (", all weights" if full else ""),
        n_passages=int(value.get("n_articles") or 0),
        n_questions=n_questions or len(after),
        baseline_accuracy=accuracy(before) if before else stored.get("baseline_accuracy"),
        adapter_accuracy=accuracy(after) if after else stored.get("adapter_accuracy"),
        settings={key: entry for key, entry in value.items() if key not in ("server_reply", "per_article")},
    )


def _continual(value: Mapping[str, Any], file: str) -> ContinualResult:
    rows = value.get("mean_over_sequences")
    if not isinstance(rows, list) or not rows or len(rows) != len(rows[0]) + 1:
        raise DataError("is not a (K+1)×K matrix", path=file, field="mean_over_sequences")
    return ContinualResult(
        name=_stem(file),
        file=file,
        n_sequences=int(value.get("n_sequences") or 0),
        mean=_matrix(rows),
        std=_matrix(value.get("std_over_sequences") or []),
        sequences=tuple(_matrix(sequence) for sequence in value.get("matrices") or []),
    )


def _matrix(rows: Iterable[Sequence[float | None]]) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _stem(file: str) -> str:
    return Path(file.split(": ")[-1]).name.removesuffix(".gz").removesuffix(".json")


def _round(arm: str, name: str) -> int | None:
    """Which ReST-EM round's model wrote the self-edits: "iter2" and "round_2" are 2, "base" is 0."""
    if arm not in ("", "self_edits"):
        return None
    found = ROUND.search(name)
    return int(found[1]) if found else (0 if re.search(r"(^|_)base(_|$)", name) else None)


def _prompt_key(name: str) -> str:
    return _named_prompt(name) or DEFAULT_PROMPT_KEY


def _named_prompt(name: str) -> str:
    found = PROMPT.search(name)
    return PROMPT_NAMES.get(found[1], found[1]) if found else ""


def _recorded_prompt(run: SinglePassageRun) -> str:
    """What the first prompt of a file that states no key is; the published one where it has none."""
    if run.settings.get("arm") not in (None, "", "self_edits") or not run.passages:
        return DEFAULT_PROMPT_KEY
    first = run.passages[0]
    keys = [str(edit.made["prompt_key"]) for edit in first.self_edits if edit.made.get("prompt_key")]
    about = {"title": first.title, "context": first.context}
    return recorded_key(first.prompt or "", keys, **about) or DEFAULT_PROMPT_KEY


def _arm(arm: str, name: str) -> str:
    """The arm in words: told by the file, else by a published file name."""
    number = _round(arm, name)
    if arm in ("", "self_edits") and number is not None:
        return ARM_NAMES["base"] if number == 0 else f"self-edits, round {number}"
    return ARM_NAMES.get(arm or name, arm or name)

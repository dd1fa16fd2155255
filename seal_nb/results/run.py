"""What the three forms of run files share: estimates, tables, recomputed statistics; and the comparison of two runs.

A run keeps the JSON value of its file with all fields, known and unknown, and knows where the verdicts are in it."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from seal_nb import metrics
from seal_nb.errors import DataError, SettingsError, redacted
from seal_nb.grading.base import AS_BOOLEAN, Answered
from seal_nb.grading.choose import grader_of, make_grader
from seal_nb.passages import text_key
from seal_nb.storage import data_file, read_json, record_path, write_json

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["baseline", "adapter"]
KINDS: tuple[Kind, ...] = ("baseline", "adapter")
VERDICT_WORDS = {True: "right", False: "wrong", None: "ungraded"}
ARM_NAMES = {
    "naive": "passage only",
    "passage_only": "passage only",
    "base": "self-edits, base model",
    "gpt4_1": "texts of GPT-4.1",
    "hand_written": "hand-written",
    "passage_matched": "passage only, as many steps",
    "shuffled": "self-edits of another passage",
    "in_context": "passage in the prompt",
    "live_edit": "edited by hand",
    "self_edits": "self-edits",
}

# Published accuracies, fractions over one set of 200 SQuAD validation passages (974 questions); Qwen2.5-7B, verdicts by
# GPT-4.1. Figures draw them as dashed lines, beside runs over exactly these passages only (`are_published_passages`).
_PUBLISHED = read_json(data_file("published.json"))
SINGLE_PASSAGE: dict[str, float] = _PUBLISHED["single_passage"]  # prompt key `implications`
# Accuracy of self-edits written by the base model, after round 1, after round 2.
ROUNDS_BY_PROMPT = {key: tuple(accuracies) for key, accuracies in _PUBLISHED["rounds_by_prompt"].items()}
CPT: dict[str, float] = _PUBLISHED["cpt"]  # these runs differ from one another in learning rate and accumulation
CONTINUAL: dict[str, float] = _PUBLISHED["continual"]  # 64 sequences of 8 passages, model after round 2
COMPARED = ("arm", "against", "n", "difference", "low", "high", "p", "is_real", "sentence", "differs", "sd")
SHARES = ("accuracy", "low", "high", "baseline", "gain", "gain_low", "gain_high", "p", "steps", "tokens")
# The settings of a training as run files name them under `lora_params`: the published names first, then ours.
LORA_PARAMS = {
    "rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "epochs": "finetune_epochs",
    "lr": "finetune_lr", "batch_size": "batch_size", "grad_accum_steps": "gradient_accumulation_steps",
    "target_modules": "target_modules", "end_mask_substring": "end_mask_substring",
    "padding_in_loss": "padding_in_loss",
}  # fmt: skip
RECITATION = ("not_recited", "not_recited_low", "not_recited_high", "recited", "baseline_recited", "parrot")
MOST_ASKED = 50  # questions of a passage whose gold answers are looked for
MOST_CHARACTERS = 4_000_000  # of texts that are graded: some 10 s
LONGEST = 2_000  # characters of a text that is read
PARROT_WORDS = 45  # about the 64 tokens of a published answer
LONG_GOLDS = "questions have gold answers of seven words or more, on which the local grader agrees less with GPT-4.1"
USUAL = {"match": "none", "answer_style": "published"}  # of files that do not say
MOST = 1e6  # no accuracy, gain or log-probability is beyond; sums of larger numbers could overflow
T = TypeVar("T")
_NO_SETTINGS = {"timestamp", "overall", "server_reply", "per_article"}


def _plausible(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    if abs(value) > MOST:
        raise PydanticCustomError("large", "is not plausible")
    return value


Number = Annotated[float | None, AfterValidator(_plausible)]  # NaN and infinity are absent
Count = Annotated[int, Field(ge=0, le=10**9)]
Many = Annotated[list[T], Field(fail_fast=True)]  # a list whose first wrong entry is enough: a file may have millions


class Part(BaseModel):
    """A part of a run file. Nothing is converted, because statistics use the stored values."""

    model_config = ConfigDict(strict=True)


class GradedPart(Part):
    """A part with lists of answers and verdicts, and the verdicts of other graders."""

    earlier: dict[str, dict[str, Many[bool | None]]] | None = None

    def lists(self) -> dict[str, Any]:
        """Each list by its place in the part."""
        own = {name: values for name, values in self if name != "earlier"}
        graders = (self.earlier or {}).items()
        return own | {f"earlier.{grader}.{name}": values for grader, kept in graders for name, values in kept.items()}


class AskedQuestion(Part):
    """A question with its gold answers, as files keep it."""

    question: str
    answer: str
    other_answers: Annotated[Many[str], AfterValidator(tuple)] = Field([])


class RunFields(Part):
    """The fields of a run file that are read, whatever its form; null means absent."""

    overall: dict[str, Number] | None = None
    lora_params: dict[str, Any] | None = None
    n_articles: Count | None = None
    n_sequences: Count | None = None
    k_completions: Count | None = None
    eval_times: Count | None = None


def frame(rows: Iterable[Any], columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """A DataFrame of rows. pandas is imported where a table is made, so that commands without tables start fast."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=columns)


def verdict_change(before: bool | None, after: bool | None) -> str:
    """Two verdicts in words, such as "wrong → right"."""
    return f"{VERDICT_WORDS[before]} → {VERDICT_WORDS[after]}"


class StoredVerdict(NamedTuple):
    """One verdict of a run file, at ``holder[field]``, or at ``holder[field][place]`` if that is a list."""

    kind: Kind
    answered: Answered
    holder: dict[str, Any]
    field: str
    place: int | None = None

    def verdict(self, grader: str = "") -> bool | None:
        """The verdict, or the one that this grader gave before the answer was graded again."""
        holder = (self.holder.get("earlier") or {}).get(grader, {}) if grader else self.holder
        found: Any = holder.get(self.field)
        verdict: bool | None = found if self.place is None or found is None else found[self.place]
        return verdict

    def replace(self, verdict: bool | None) -> None:
        if self.place is None:
            self.holder[self.field] = verdict
        else:
            self.holder[self.field][self.place] = verdict


class Cell(NamedTuple):
    """The answers about one passage, with their verdicts; ``context`` is the passage, if the file has it."""

    answers: Sequence[Answered]
    verdicts: metrics.Verdicts
    context: str = ""


def joined(cells: Sequence[Cell]) -> Cell:
    """The answers of several runs about one passage."""
    answers, verdicts = ([one for cell in cells for one in getattr(cell, name)] for name in ("answers", "verdicts"))
    return Cell(answers, verdicts, cells[0].context)


@dataclass(kw_only=True, eq=False)
class Run(ABC):
    """One run file. ``file`` is its name in tables: its path below a collected folder. ``others``: more runs of the arm
    over the same units, with other seeds; their answers count too, and intervals are over units and runs. ``passages``
    are what it was asked about, in order; a CPT file may not have them."""

    value: dict[str, Any] = field(repr=False)
    path: Path = Path()
    file: str = ""
    others: Sequence["Run"] = ()
    passages: Sequence[Any] = ()
    _estimates: dict[Kind, metrics.Estimate | None] = field(init=False, repr=False, default_factory=dict)

    form: ClassVar[str]
    unit: ClassVar[str] = "passages"  # what intervals are over
    key_fields: ClassVar[str] = "title and context"  # of ``unit_keys``
    weighting: ClassVar[metrics.Weighting] = "passage"

    @property
    def name(self) -> str:
        """The file name without folder and ending."""
        file = self.file or self.path.name
        return Path(file.split(": ")[-1]).name.removesuffix(".gz").removesuffix(".json")

    @property
    def arm(self) -> str:
        """The arm in words, from the file or its name."""
        arm = str(self.value.get("arm") or "") or self.name
        return ARM_NAMES.get(arm, arm)

    @abstractmethod
    def own_scores(self, kind: Kind) -> list[metrics.Scores]:
        """For each unit (passage or sequence) its verdicts or accuracies; empty if the file has none."""

    def scores(self, kind: Kind) -> list[metrics.Scores]:
        """``own_scores`` and those of the other runs of the arm, unit by unit."""
        of_runs = [run.own_scores(kind) for run in (self, *self.others)]
        return [[score for row in rows for score in row] for rows in zip(*of_runs, strict=True)]

    def flat_verdicts(self, kind: Kind) -> list[Any]:
        """Of all answers, in the order of the file."""
        return [score for scores in self.own_scores(kind) for score in scores]

    @abstractmethod
    def stored_mean(self, kind: Kind) -> float | None:
        """The accuracy that the file states, used where it has no verdicts."""

    @abstractmethod
    def stored_verdicts(self) -> list[StoredVerdict]:
        """All verdicts in the order of the file. Raises: DataError if it is not known what was asked."""

    @abstractmethod
    def fill_statistics(self) -> None:
        """Compute every statistic in ``value`` from its verdicts by the published rule."""

    @abstractmethod
    def overall(self) -> dict[str, Any]:
        """The published ``overall`` numbers, computed from the verdicts; None where there are none."""

    @abstractmethod
    def unit_keys(self) -> list[Any]:
        """What identifies each unit, so that two runs can be paired; empty if the file does not say."""

    def disagreements(self) -> list[str]:
        """Stored numbers that differ from the computed ones."""
        return unequal("overall", self.value.get("overall") or {}, self.overall())

    def groups(self) -> dict[str, Any]:
        """What answers of different units share (``mean_interval``); empty: nothing."""
        return {"groups_P_Q": self.labels(), "group": "runs"} if self.others else {}

    def labels(self) -> list[list[Any]]:
        """The run of each score."""
        of_runs = [run.own_scores("adapter") for run in (self, *self.others)]
        return [[at for at, row in enumerate(rows) for _ in row] for rows in zip(*of_runs, strict=True)]

    @property
    def how(self) -> dict[str, Any]:
        """How its numbers are averaged, and what intervals are over."""
        return {"weighting": self.weighting, "unit": self.unit, **self.groups()}

    def cost(self) -> tuple[float | None, float | None]:
        """Optimiser steps and trained tokens of one adapter, on average; None: the file does not say."""
        return None, None

    def cells(self, kind: Kind) -> list[list[Cell]]:
        """For each unit its passages with the answers; empty where the file does not have the answers."""
        try:
            stored = [one for one in self.stored_verdicts() if one.kind == kind]
        except DataError:
            stored = []
        rest, found = iter(stored), list[list[Cell]]()
        if not any(one.answered.question for one in stored):
            return found
        for passage, scores in zip(self.passages, self.own_scores(kind), strict=True):
            own = list(islice(rest, len(scores)))
            found.append([Cell([one.answered for one in own], [one.verdict() for one in own], passage.context)])
        return found

    @cached_property
    def recitation(self) -> dict[str, float | None]:
        """See ``recitation``."""
        of_runs = {kind: [run.cells(kind) for run in (self, *self.others)] for kind in KINDS}
        if not all(cells for own in of_runs.values() for cells in own):  # one of the runs has no answers
            of_runs = {kind: [[]] for kind in KINDS}
        adapter_U, baseline_U = (
            [list(map(joined, zip(*cells, strict=True))) for cells in zip(*of_runs[kind], strict=True)]
            for kind in ("adapter", "baseline")
        )
        return recitation(adapter_U, baseline_U, **self.how)

    def conditions(self) -> dict[str, Any]:
        """What a comparison should hold fixed: the grader, the model, and the settings of the training."""
        model = self.value.get("model") or self.value.get("base_model")
        stated: dict[str, Any] = {"grader": grader_of(self.value) or "not stated", "model": model}
        training = self.value.get("training") or self.value.get("lora_params") or {}
        stated |= {LORA_PARAMS.get(name, name): value for name, value in training.items()}
        stated |= {one: self.value.get(one) for one in ("split_newlines", "k_completions", "eval_times", "prompt_key")}
        stated |= {name: self.value.get(name) or usual for name, usual in USUAL.items()}
        return {name: value for name, value in stated.items() if value not in (None, "")}

    def notes(self) -> list[str]:
        """``gaps``, and a warning of long gold answers, by which the local grader judges worse."""
        cells_U = self.cells("adapter") if grader_of(self.value) in ("local", "first:local") else []
        golds_Q = {(one.title, one.question): one.golds for cells in cells_U for cell in cells for one in cell.answers}
        n_long = sum(all(len(gold.split()) >= 7 for gold in golds) for golds in golds_Q.values())
        return [*self.gaps(), *([f"{n_long} of {len(golds_Q)} {LONG_GOLDS} (docs/graders.md)"] if n_long else [])]

    def gaps(self) -> list[str]:
        """What the file cannot give, and what is left out."""
        if not (found := self.estimate()) or not found.n_left_out:
            return []
        return [f"{found.n_left_out} of {found.n_asked} {self.unit} have no graded answer and are left out"]

    def extra(self) -> dict[str, Any]:
        """Columns of ``accuracy`` that only this form has."""
        return {}

    @cached_property
    def has_verdicts(self) -> bool:
        return any(score is not None for scores in self.scores("adapter") for score in scores)

    def estimate(self, kind: Kind = "adapter") -> metrics.Estimate | None:
        """Mean accuracy with its 95 % interval; the stored mean without a width if there are no verdicts."""
        if kind not in self._estimates:  # a change of ``value`` makes a new run (``graded``)
            found = metrics.if_graded(metrics.mean_interval, self.scores(kind), **self.how)
            stored, n = self.stored_mean(kind), self.value.get("n_articles") or self.value.get("n_sequences") or 0
            if not found and stored is not None:
                found = metrics.Estimate(mean=stored, low=stored, high=stored, n=n, unit=self.unit)
            self._estimates[kind] = found
        return self._estimates[kind]

    def gain(self) -> metrics.Difference | None:
        """Adapter minus baseline accuracy, paired; None if no unit was graded on both sides."""
        return metrics.if_graded(metrics.paired_difference, self.scores("adapter"), self.scores("baseline"), **self.how)

    def accuracy(self) -> "pd.DataFrame":
        """Accuracy of the run.

        Returns:
            One row: ``arm``, ``n`` (passages, or sequences of a continual run), ``accuracy`` with its 95 % interval
            ``low`` and ``high``, ``baseline`` (the model without adapter), ``gain`` (adapter − baseline) with
            ``gain_low``, ``gain_high`` and the ``p`` of the paired t test, ``steps`` and ``tokens`` (optimiser steps
            and trained tokens of one adapter), those of ``recitation``, ``ungraded`` (adapter answers without a
            verdict), the columns of its form (``prompt``; ``questions``, ``lr``; ``passages``), ``file``. Accuracies
            are fractions. Intervals are missing if the file has no verdicts."""
        files = " + ".join(one.file or one.path.name for one in (self, *self.others))
        row = self.row | self.recitation | {"file": files}
        return frame([row]).astype(dict.fromkeys((*SHARES, *RECITATION), float))  # None is missing, as in longer tables

    @cached_property
    def row(self) -> dict[str, Any]:
        """Of ``accuracy``, what takes no time."""
        adapter, baseline, gain = self.estimate("adapter"), self.estimate("baseline"), self.gain()
        measured = adapter if self.has_verdicts else None
        stored_gain = adapter.mean - baseline.mean if adapter and baseline else None
        return {
            "arm": self.arm,
            "n": adapter.n if adapter else 0,
            "accuracy": adapter and adapter.mean,
            "low": measured and measured.low,
            "high": measured and measured.high,
            "baseline": baseline and baseline.mean,
            "gain": gain.mean if gain else stored_gain,
            "gain_low": gain and gain.low,
            "gain_high": gain and gain.high,
            "p": gain and gain.p_value,
            **dict(zip(("steps", "tokens"), self.cost(), strict=True)),
            "ungraded": self.counts()["n_ungraded_adapter"],
            **self.extra(),
        }

    def summary(self) -> dict[str, Any]:
        """What ``seal-nb summarize`` prints, as one JSON-able object: recomputed numbers, intervals, disagreements."""
        sides = {kind: asdict(estimate) for kind in KINDS if (estimate := self.estimate(kind))}
        gain = self.gain()
        intervals = sides | {"gain": asdict(gain) | {"sentence": gain.sentence()}} if gain else None
        return {
            "kind": self.form,
            "file": self.path.name,
            "overall": self.overall(),
            **self.counts(),
            "intervals": intervals,
            "disagreements": self.disagreements(),
            "notes": self.notes(),
        }

    def counts(self) -> dict[str, Any]:
        """Number of answers (question × repeat × self-edit), and of those without a verdict."""
        verdicts = {kind: [v for run in (self, *self.others) for v in run.flat_verdicts(kind)] for kind in KINDS}
        n_ungraded = {f"n_ungraded_{kind}": verdicts[kind].count(None) for kind in KINDS}
        return {"n_passages": len(self.scores("adapter")), "n_answers": len(verdicts["adapter"]), **n_ungraded}

    def graded(self, verdicts: Sequence[bool | None], *, grader: str, keep_as: str = "") -> Self:
        """A copy with the verdicts of ``grader``, one per entry of ``stored_verdicts()``, and the statistics that
        follow from them. The old verdicts are kept in ``earlier`` under the grader name ``keep_as``, if it is given."""
        copy = replace(self, value=deepcopy(self.value))
        places = copy.stored_verdicts()
        if keep_as:
            for holder, name in {(id(one.holder), one.field): (one.holder, one.field) for one in places}.values():
                holder["earlier"] = holder.get("earlier") or {}
                holder["earlier"].setdefault(keep_as, {})[name] = deepcopy(holder.get(name))
        for place, verdict in zip(places, verdicts, strict=True):
            place.replace(verdict)
        copy.value["grader"] = grader
        copy.fill_statistics()
        return replace(copy)

    def write(self, path: str | Path) -> Path:
        """Write the run in its published form, whole or not at all."""
        return write_json(path, self.value)


def unequal(where: str, stored: Mapping[str, Any], computed: Mapping[str, Any]) -> list[str]:
    """Stored numbers that differ from the computed ones in any bit; numbers that are not stored do not count."""
    return [
        f"{where}: {name} is stored as {stored[name]}, computed {computed[name]}"
        for name in computed
        if stored.get(name) is not None and stored[name] != computed[name]
    ]


def compare(a: Run, b: Run, *, shared_only: bool = False, margin: float | None = None) -> "pd.DataFrame":
    """How much higher the accuracy of ``a`` is than that of ``b``, paired over passages.

    Args:
        a: a run of any form.
        b: a run of the same form over the same passages (a continual run: the same sequences), with the same grader.
        shared_only: compare the passages that both runs have, instead of refusing other passages.
        margin: the largest loss that does not matter, such as 0.02: the sentence then says whether ``a`` is shown to be
            less than that much worse, or both to be equal within it.

    Returns:
        One row: ``arm``, ``against``, ``n`` (pairs), ``difference`` with its 95 % interval ``low``, ``high``, the ``p``
        of the paired t test (below 0.05 exactly if the interval excludes zero), ``is_real`` (p below 0.05, at least 6
        passages), ``sentence``, ``differs`` (settings that differ between the runs) and ``sd`` (standard deviation of
        the difference between passages, for ``metrics.passages_needed``).

    Raises:
        DataError: the runs have different forms, passages or graders, or a run has no verdicts, or passages that
            repeat.

    Source: docs/statistics.md."""
    return frame([compared_row(a, b, difference_of(a, b, shared_only=shared_only), margin)], COMPARED)


def compared_row(a: Run, b: Run, d: metrics.Difference, margin: float | None = None) -> dict[str, Any]:
    """The row of ``compare`` for a difference between two runs."""
    if margin is not None and not (isinstance(margin, float) and 0 < margin < 1):
        raise SettingsError(f"margin is {margin!r}; give a fraction between 0 and 1, such as 0.02 for 2 points")
    row = a.arm, b.arm, d.n, d.mean, d.low, d.high, d.p_value, d.is_real, d.sentence(margin), differing(a, b), d.sd
    return dict(zip(COMPARED, row, strict=True))


def difference_of(
    a: Run, b: Run, *, shared_only: bool = False, scores: Callable[[Run], list[metrics.Scores]] | None = None
) -> metrics.Difference:
    """Accuracy (or other ``scores``) of ``a`` minus that of ``b``. Raises: DataError (see ``compare``)."""
    graders = [run.conditions()["grader"] for run in (a, b)]
    if graders[0] != graders[1]:
        problem = f"was graded by {graders[1]}, the other run by {graders[0]}"
        raise DataError(problem, path=b.path, remedy="grade both with one grader (seal-nb grade)")
    sides = list(zip((a, b), paired_places(a, b, shared_only=shared_only), strict=True))
    rows = [[(scores(run) if scores else run.scores("adapter"))[at] for at in places] for run, places in sides]
    how, labels = b.how | a.how, [run.labels() for run in (a, b)]
    if "groups_P_Q" in how and all(labels):
        of_sides = [[own[at] for at in places] for own, (_, places) in zip(labels, sides, strict=True)]
        how |= dict(zip(("groups_P_Q", "minus_groups_P_Q"), of_sides, strict=True))
    return metrics.paired_difference(*rows, **how)


def differing(a: Run, b: Run) -> str:
    """The settings that differ between two runs, with both values (of models only that they differ)."""
    ours, theirs = a.conditions(), b.conditions()
    names = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    return ", ".join(name if name == "model" else f"{name} {ours[name]} / {theirs[name]}" for name in names)


def against_first(runs: Sequence[Run]) -> list[str | None]:
    """How far each run is from the first, over the same units in the same order, as comparisons that are looked at
    together; None for the first itself, and if no unit was graded in both."""
    first = runs[0].scores("adapter")
    found = [metrics.if_graded(metrics.paired_difference, run.scores("adapter"), first, **run.how) for run in runs[1:]]
    return [None, *(one.sentence() if one else None for one in metrics.adjusted(found))]


def difference_sentence(first: Run, second: Run) -> str:
    """Second minus first run over the passages that both have, and both means, in one line. Raises: DataError."""
    found = difference_of(second, first, shared_only=True)
    after, before = found.means
    differs = differing(second, first)
    said = f"{100 * before:.1f} % → {100 * after:.1f} %: {found.sentence()}"
    return f"{said}; the runs differ in {differs}" if differs else said


def paired_places(a: Run, b: Run, *, shared_only: bool = False) -> tuple[list[int], list[int]]:
    """Which passages of both runs are pairs, by index. Raises: DataError if they cannot be paired."""
    if a.form != b.form:
        raise DataError(f"is a {b.form} run, not a {a.form} run", path=b.path, remedy="compare runs of one form")
    for run in (a, b):
        if not run.has_verdicts:
            raise DataError("has no verdicts of single passages", path=run.path, remedy="give a run file with answers")
    n_a, n_b = len(a.scores("adapter")), len(b.scores("adapter"))
    keys_a, keys_b = (
        [tuple(text_key(one)[0] if isinstance(one, str) else one for one in key) for key in run.unit_keys()]
        for run in (a, b)
    )
    # Without titles, only the runs of one published file have the same passages.
    if keys_a == keys_b and (keys_a or (a.path == b.path and n_a == n_b)):
        return list(range(n_a)), list(range(n_a))
    for run, keys in ((a, keys_a), (b, keys_b)):
        if repeated := [key for key, n in Counter(keys).items() if n > 1]:
            such = f"several {a.unit} share {a.key_fields}, such as {str(repeated[0])[:60]}"
            remedy = f"compare runs on the same {a.unit} in the same order"
            raise DataError(f"{such}, so they cannot be paired", path=run.path, remedy=remedy)
    at = {key: place for place, key in enumerate(keys_a)}
    shared = [(at[key], place) for place, key in enumerate(keys_b) if key in at]
    if not shared or (not shared_only and not len(shared) == len(keys_a) == len(keys_b)):
        problem = f"shares {len(shared)} of {len(keys_b)} {a.unit} with the other run, which has {len(keys_a)}"
        remedy = f"compare runs on the same {a.unit}" + (", or pass shared_only=True" if shared else "")
        raise DataError(problem, path=b.path, remedy=remedy)
    return [i for i, _ in shared], [j for _, j in shared]


def settings_difference(first: str | Path, second: str | Path) -> "pd.DataFrame":
    """Every setting, seed and version that differs: ``setting`` (dotted name), ``first``, ``second`` ("–": absent)."""
    import pandas as pd

    a, b = ((pd.json_normalize(_settings_of(path)).to_dict("records") or [{}])[0] for path in (first, second))
    both = [(name, a.get(name, "–"), b.get(name, "–")) for name in sorted({*a, *b})]
    rows = [tuple(redacted(str(one)) for one in row) for row in both if row[1] != row[2]]
    return frame(rows, ("setting", "first", "second"))


def _settings_of(path: str | Path) -> dict[str, Any]:
    """The record next to a result; without one, the settings in the file itself."""
    has_record = record_path(path).is_file()
    value = read_json(record_path(path) if has_record else path)
    if not isinstance(value, dict):
        raise DataError("is not a result file", path=path, remedy="give a run file")
    kinds = object if has_record else str | int | float | bool | dict
    return {name: one for name, one in value.items() if isinstance(one, kinds) and name not in _NO_SETTINGS}


def are_published_passages(titles_and_contexts: Iterable[tuple[str, str]]) -> bool:
    """Whether these are exactly the 200 passages of the published evaluation, in any order."""
    lines = sorted("\0".join(text_key(*texts)) for texts in titles_and_contexts)
    digest = hashlib.sha256("\n".join(lines).encode(errors="backslashreplace")).hexdigest()
    return bool(digest == _PUBLISHED["passages_sha256"])


def recitation(
    adapter_U: Sequence[Sequence[Cell]], baseline_U: Sequence[Sequence[Cell]], **how: Any
) -> dict[str, float | None]:
    """RECITATION by name, from the cells of each unit; None where the run has no such answers.

    An answer is recited if it contains the gold answer of another question of the passage: a grader that looks for the
    gold answer in a text overrates it. That is an upper bound: a good sentence may name two things that were asked
    about. The parrot is a control: the first words of the passage as the answer to each of its questions. The local
    grader decides what a text contains. Of a large run, an even share of the answers is read. `how`: keywords of
    ``mean_interval``; the scores of a sequence are the means of its passages, those of a passage all its answers."""
    judge = make_grader("local").grade

    @cache
    def is_in(question: str, gold: str, answer: str) -> bool:
        (verdict,) = judge([Answered(question=question, gold=gold, answer=answer)])
        return AS_BOOLEAN[verdict] is True

    found: dict[str, float | None] = dict.fromkeys(RECITATION)
    recited_U = _recited(adapter_U, is_in)
    for name, flags_U in (("recited", recited_U), ("baseline_recited", _recited(baseline_U, is_in))):
        found[name] = metrics.mean([flag for flags_C in flags_U for flags in flags_C for flag in flags])
    rows_U: list[list[metrics.Scores]] = []
    for cells, flags_C in zip(adapter_U, recited_U, strict=True):
        pairs_C = [zip(cell.verdicts, flags, strict=True) for cell, flags in zip(cells, flags_C, strict=True)]
        rows_U.append([[None if None in (v, f) else bool(v and not f) for v, f in pairs] for pairs in pairs_C])
    scores_U = [[metrics.mean(row) for row in rows] if how["unit"] != "passages" else rows[0] for rows in rows_U]
    if found["recited"] is not None and (right := metrics.if_graded(metrics.mean_interval, scores_U, **how)):
        found |= dict(zip(RECITATION, (right.mean, right.low, right.high), strict=False))
    contexts = [cell for cells in adapter_U for cell in cells if cell.context]
    parrots = [
        replace(one, answer=" ".join(cell.context.split()[:PARROT_WORDS]))
        for cell in contexts
        for one in {one.question: one for one in cell.answers}.values()
    ]
    found["parrot"] = metrics.mean([AS_BOOLEAN[verdict] for verdict in judge(parrots)])
    return found


def _recited(
    cells_U: Sequence[Sequence[Cell]], is_in: Callable[[str, str, str], bool]
) -> list[list[list[bool | None]]]:
    """Whether each answer is recited; None for one that is not read."""
    every_cell = [cell for cells in cells_U for cell in cells]
    asked = [dict.fromkeys((one.question[:LONGEST], one.gold[:LONGEST]) for one in cell.answers) for cell in every_cell]
    golds = {id(cell): list(own)[:MOST_ASKED] for cell, own in zip(every_cell, asked, strict=True)}
    n_each = [(len(one.answer[:LONGEST]) + LONGEST // 20, cell) for cell in every_cell for one in cell.answers]
    every = 1 + sum(n * len(golds[id(cell)]) for n, cell in n_each) // MOST_CHARACTERS
    number = count()

    def of_answer(cell: Cell, one: Answered) -> bool | None:
        if next(number) % every:
            return None
        own = {gold.casefold() for gold in one.golds}
        others = [(asked, gold) for asked, gold in golds[id(cell)] if gold.casefold() not in own]
        return any(is_in(asked, gold, one.answer[:LONGEST]) for asked, gold in others)

    return [[[of_answer(cell, one) for one in cell.answers] for cell in cells] for cells in cells_U]

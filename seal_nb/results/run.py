"""What the three forms of run files share: estimates, tables, recomputed statistics; and the comparison of two runs.

A run keeps the JSON value of its file with all fields, known and unknown, and knows where the verdicts are in it."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from seal_nb.errors import DataError, redacted
from seal_nb.grading.base import Answered
from seal_nb.metrics import Difference, Estimate, Scores, Weighting, if_graded, mean_interval, paired_difference
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
COMPARED = ("arm", "against", "n", "difference", "low", "high", "p", "is_real", "sentence")
SHARES = ("accuracy", "low", "high", "baseline", "gain", "gain_low", "gain_high", "p")
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


class RunFields(Part):
    """The fields of a run file that are read, whatever its form; null means absent."""

    overall: dict[str, Number] | None = None
    lora_params: dict[str, Any] | None = None
    n_articles: Count | None = None
    n_sequences: Count | None = None
    k_completions: Count | None = None
    eval_times: Count | None = None


def frame(rows: Sequence[Any], columns: Sequence[str] | None = None) -> "pd.DataFrame":
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


@dataclass(kw_only=True, eq=False)
class Run(ABC):
    """One run file. ``file`` is its name in tables: its path below a collected folder."""

    value: dict[str, Any] = field(repr=False)
    path: Path = Path()
    file: str = ""
    _estimates: dict[Kind, Estimate | None] = field(init=False, repr=False, default_factory=dict)

    form: ClassVar[str]
    unit: ClassVar[str] = "passages"  # what intervals are over
    key_fields: ClassVar[str] = "title and context"  # of ``unit_keys``
    weighting: ClassVar[Weighting] = "passage"

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
    def scores(self, kind: Kind) -> list[Scores]:
        """For each unit (passage or sequence) its verdicts or accuracies; empty if the file has none."""

    def flat_verdicts(self, kind: Kind) -> list[Any]:
        """Of all answers, in the order of the file."""
        return [score for scores in self.scores(kind) for score in scores]

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

    def notes(self) -> list[str]:
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

    def estimate(self, kind: Kind = "adapter") -> Estimate | None:
        """Mean accuracy with its 95 % interval; the stored mean without a width if there are no verdicts."""
        if kind not in self._estimates:  # a change of ``value`` makes a new run (``graded``)
            found = if_graded(mean_interval, self.scores(kind), weighting=self.weighting, unit=self.unit)
            stored, n = self.stored_mean(kind), self.value.get("n_articles") or self.value.get("n_sequences") or 0
            if not found and stored is not None:
                found = Estimate(mean=stored, low=stored, high=stored, n=n, unit=self.unit)
            self._estimates[kind] = found
        return self._estimates[kind]

    def gain(self) -> Difference | None:
        """Adapter minus baseline accuracy, paired; None if no unit was graded on both sides."""
        sides = self.scores("adapter"), self.scores("baseline")
        return if_graded(paired_difference, *sides, weighting=self.weighting, unit=self.unit)

    def sentence_against(self, first: "Run") -> str | None:
        """How far it is from a run over the same units in the same order; None for that run itself, or if no unit was
        graded in both."""
        sides = self.scores("adapter"), first.scores("adapter")
        found = if_graded(paired_difference, *sides, weighting=self.weighting, unit=self.unit)
        return found.sentence() if found and self is not first else None

    def accuracy(self) -> "pd.DataFrame":
        """Accuracy of the run.

        Returns:
            One row: ``arm``, ``n`` (passages, or sequences of a continual run), ``accuracy`` with its 95 % interval
            ``low`` and ``high``, ``baseline`` (the model without adapter), ``gain`` (adapter − baseline) with
            ``gain_low``, ``gain_high`` and the sign-flip ``p``, ``ungraded`` (adapter answers without a verdict), the
            columns of its form (``prompt``, ``recited``; ``questions``, ``lr``; ``passages``), ``file``. Accuracies are
            fractions. Intervals are missing if the file has no verdicts."""
        return frame([self._row]).astype(dict.fromkeys(SHARES, float))  # None is missing, as in longer tables

    @cached_property
    def _row(self) -> dict[str, Any]:
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
            "ungraded": self.counts()["n_ungraded_adapter"],
            **self.extra(),
            "file": self.file or self.path.name,
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
        n_ungraded = {f"n_ungraded_{kind}": self.flat_verdicts(kind).count(None) for kind in KINDS}
        n_answers = len(self.flat_verdicts("adapter"))
        return {"n_passages": len(self.scores("adapter")), "n_answers": n_answers, **n_ungraded}

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


def compare(a: Run, b: Run, *, shared_only: bool = False) -> "pd.DataFrame":
    """How much higher the accuracy of ``a`` is than that of ``b``, paired over passages.

    Args:
        a: a run of any form.
        b: a run of the same form over the same passages (a continual run: the same sequences).
        shared_only: compare the passages that both runs have, instead of refusing other passages.

    Returns:
        One row: ``arm``, ``against``, ``n`` (pairs), ``difference`` with its 95 % bootstrap interval ``low``, ``high``,
        the sign-flip ``p`` (exact up to 12 pairs), ``is_real`` (interval and test both exclude zero, at least 6 pairs)
        and ``sentence``.

    Raises:
        DataError: the runs have different forms or passages, or a run has no verdicts, or passages that repeat."""
    return frame([comparison(a, b, shared_only=shared_only)], COMPARED)


def comparison(a: Run, b: Run, *, shared_only: bool = False) -> dict[str, Any]:
    """The row of ``compare``, and ``means``: those of both runs over the answers that are compared."""
    scores = paired_scores(a, b, shared_only=shared_only)
    d = paired_difference(*scores, weighting=a.weighting, unit=a.unit)
    row = (a.arm, b.arm, d.n, d.mean, d.low, d.high, d.p_value, d.is_real, d.sentence())
    return dict(zip(COMPARED, row, strict=True)) | {"means": d.means}


def difference_sentence(first: Run, second: Run) -> str:
    """Second minus first run over the passages that both have, and both means, in one line. Raises: DataError."""
    row = comparison(second, first, shared_only=True)
    after, before = row["means"]
    return f"{100 * before:.1f} % → {100 * after:.1f} %: {row['sentence']}"


def paired_scores(a: Run, b: Run, *, shared_only: bool = False) -> tuple[list[Scores], list[Scores]]:
    """The adapter scores of both runs, passage by passage. Raises: DataError if they cannot be paired."""
    if a.form != b.form:
        raise DataError(f"is a {b.form} run, not a {a.form} run", path=b.path, remedy="compare runs of one form")
    for run in (a, b):
        if not run.has_verdicts:
            raise DataError("has no verdicts of single passages", path=run.path, remedy="give a run file with answers")
    scores_a, scores_b = a.scores("adapter"), b.scores("adapter")
    keys_a, keys_b = (
        [tuple(text_key(one)[0] if isinstance(one, str) else one for one in key) for key in run.unit_keys()]
        for run in (a, b)
    )
    # Without titles, only the runs of one published file have the same passages.
    if keys_a == keys_b and (keys_a or (a.path == b.path and len(scores_a) == len(scores_b))):
        return scores_a, scores_b
    for run, keys in ((a, keys_a), (b, keys_b)):
        if repeated := [key for key, n in Counter(keys).items() if n > 1]:
            problem = (
                f"several {a.unit} share {a.key_fields}, such as {str(repeated[0])[:60]}, so they cannot be paired"
            )
            raise DataError(problem, path=run.path, remedy=f"compare runs on the same {a.unit} in the same order")
    at = {key: place for place, key in enumerate(keys_a)}
    shared = [(at[key], place) for place, key in enumerate(keys_b) if key in at]
    if not shared or (not shared_only and not len(shared) == len(keys_a) == len(keys_b)):
        problem = f"shares {len(shared)} of {len(keys_b)} {a.unit} with the other run, which has {len(keys_a)}"
        remedy = f"compare runs on the same {a.unit}" + (", or pass shared_only=True" if shared else "")
        raise DataError(problem, path=b.path, remedy=remedy)
    return [scores_a[i] for i, _ in shared], [scores_b[j] for _, j in shared]


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

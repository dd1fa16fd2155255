"""What the three forms of run files share: estimates with intervals, DataFrames, recomputed statistics.

The forms are `single_passage.SinglePassageRun`, `cpt.CptRun` and `continual.ContinualRun`. A run keeps the JSON value
of its file with all fields, known and unknown, and knows where the verdicts are in it. This package trains and grades
nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from seal_nb.errors import DataError, refused
from seal_nb.grading.base import Answered
from seal_nb.metrics import Difference, Estimate, Scores, Weighting, mean_interval, paired_difference
from seal_nb.storage import write_json

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


class RunFields(BaseModel):
    """The fields of a run file that are read, whatever its form; null means absent."""

    model_config = ConfigDict(strict=True)

    overall: dict[str, float | None] | None = None
    lora_params: dict[str, Any] | None = None
    n_articles: int | None = None
    n_sequences: int | None = None
    k_completions: int | None = None
    eval_times: int | None = None


F = TypeVar("F", bound=RunFields)


def frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """A DataFrame of rows. pandas is imported here only, so that commands without tables start fast."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=None if columns is None else list(columns))


@dataclass(frozen=True, kw_only=True)
class StoredVerdict:
    """One verdict of a run file, at ``holder[field]``, or at ``holder[field][index]`` if that is a list."""

    kind: Kind
    answered: Answered
    holder: dict[str, Any]
    field: str
    index: int | None = None

    @property
    def verdict(self) -> bool | None:
        return self._in(self.holder)

    def earlier(self, grader: str) -> bool | None:
        """The verdict that this grader gave before the answer was graded again."""
        return self._in(self.holder.get("earlier", {}).get(grader, {}))

    def replace(self, verdict: bool | None) -> None:
        if self.index is None:
            self.holder[self.field] = verdict
        else:
            self.holder[self.field][self.index] = verdict

    def _in(self, holder: Mapping[str, Any]) -> bool | None:
        found: Any = holder.get(self.field)
        verdict: bool | None = found[self.index] if self.index is not None and found is not None else found
        return verdict


@dataclass(kw_only=True, eq=False)
class Run(ABC):
    """One run file. ``file`` is its name in tables: its path below a collected folder."""

    value: dict[str, Any] = field(repr=False)
    path: Path = Path()
    file: str = ""

    form: ClassVar[str]
    unit: ClassVar[str] = "passages"  # what intervals are over
    weighting: ClassVar[Weighting] = "passage"

    def checked(self, kind: type[F]) -> F:
        """The fields that this form reads. Raises: DataError with path, item and field for a value of another kind."""
        try:
            return kind.model_validate(self.value)
        except ValidationError as error:
            raise refused(error, path=self.path) from None

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

    @abstractmethod
    def answers(self) -> "pd.DataFrame":
        """One row per answered question."""

    def disagreements(self) -> list[str]:
        """Stored numbers that differ from the computed ones."""
        return unequal("overall", self.value.get("overall") or {}, self.overall())

    def notes(self) -> list[str]:
        """What the file cannot give."""
        return []

    def extra(self) -> dict[str, Any]:
        """Columns of ``accuracy`` that only this form has."""
        return {}

    @property
    def has_verdicts(self) -> bool:
        return any(score is not None for scores in self.scores("adapter") for score in scores)

    def estimate(self, kind: Kind = "adapter") -> Estimate | None:
        """Mean accuracy with its 95 % interval; the stored mean without a width if there are no verdicts."""
        scores = self.scores(kind)
        if any(score is not None for unit in scores for score in unit):
            return mean_interval(scores, weighting=self.weighting, unit=self.unit)
        stored = self.stored_mean(kind)
        n = self.value.get("n_articles") or self.value.get("n_sequences") or 0
        return None if stored is None else Estimate(mean=stored, low=stored, high=stored, n=n, unit=self.unit)

    def gain(self) -> Difference | None:
        """Adapter minus baseline accuracy, paired; None if no unit was graded on both sides."""
        try:
            return paired_difference(
                self.scores("adapter"), self.scores("baseline"), weighting=self.weighting, unit=self.unit
            )
        except DataError:
            return None

    def accuracy(self) -> "pd.DataFrame":
        """Accuracy of the run.

        Returns:
            One row: ``arm``, ``n`` (passages, or sequences of a continual run), ``accuracy`` with its 95 % interval
            ``low`` and ``high``, ``baseline`` (the model without adapter), ``gain`` (adapter − baseline) with
            ``gain_low``, ``gain_high`` and the sign-flip ``p``, ``ungraded`` (adapter answers without a verdict), the
            columns of its form (``prompt``, ``recited``; ``questions``, ``lr``; ``passages``), ``file``. Accuracies are
            fractions. Intervals are missing if the file has no verdicts.
        """
        adapter, baseline, gain = self.estimate("adapter"), self.estimate("baseline"), self.gain()
        measured = adapter if self.has_verdicts else None
        stored_gain = adapter.mean - baseline.mean if adapter and baseline else None
        row = {
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
        return frame([row])

    def summary(self) -> dict[str, Any]:
        """What ``seal-nb summarize`` prints, as one JSON-able object: recomputed numbers, intervals, disagreements."""
        gain = self.gain()
        estimates = {kind: self.estimate(kind) for kind in KINDS}
        intervals: dict[str, Any] = {kind: asdict(estimate) for kind, estimate in estimates.items() if estimate}
        if gain:
            intervals["gain"] = asdict(gain) | {"sentence": gain.sentence()}
        return {
            "kind": self.form,
            "file": self.path.name,
            "overall": self.overall(),
            **self.counts(),
            "intervals": intervals if gain else None,
            "disagreements": self.disagreements(),
            "notes": self.notes(),
        }

    def counts(self) -> dict[str, Any]:
        """Answers (one question in one repeat of one self-edit), and those without a verdict."""
        before, after = ([score for scores in self.scores(kind) for score in scores] for kind in KINDS)
        return {
            "n_passages": len(self.scores("adapter")),
            "n_answers": len(after),
            "n_ungraded_baseline": sum(score is None for score in before),
            "n_ungraded_adapter": sum(score is None for score in after),
        }

    def graded(self, verdicts: Sequence[bool | None], *, grader: str, keep_as: str = "") -> Self:
        """A copy with other verdicts and the statistics that follow from them.

        Args:
            verdicts: one per entry of ``stored_verdicts()``, in that order; None is ungraded.
            grader: the name of the grader, written to the field ``grader``.
            keep_as: if given, the old verdicts are kept in ``earlier`` under this grader name.
        """
        copy = replace(self, value=deepcopy(self.value))
        places = copy.stored_verdicts()
        for holder, name in {(id(one.holder), one.field): (one.holder, one.field) for one in places}.values():
            if keep_as:
                holder.setdefault("earlier", {}).setdefault(keep_as, {})[name] = deepcopy(holder.get(name))
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

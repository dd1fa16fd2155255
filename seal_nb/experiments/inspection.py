"""A single-passage run as a reader goes through it: passages to choose from, self-edits, answers, and why.

Plain records for a notebook's tables and widgets. Opening a run computes what the list of passages shows and
nothing else; the answers of a passage are judged by the other graders when that passage is looked at. Draws
nothing, trains nothing, changes no file.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from seal_nb.errors import SettingsError
from seal_nb.experiments.inspection_rows import (
    AnswerRow,
    ComparedRow,
    PassageRow,
    SelfEditRow,
    SequenceRow,
    answer_row,
    by_question,
    passage_row,
    self_edit_row,
    sequence_rows,
    sequences_of,
    verdict_pairs,
)
from seal_nb.experiments.run_files import EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun, read_run
from seal_nb.grading.base import Grader, make_grader

Show = Literal["all", "gains", "losses", "ties", "ungraded", "graders disagree"]
Sort = Literal["file order", "largest gain", "largest loss", "most ungraded", "most disagreement"]
SHOWN: tuple[Show, ...] = ("all", "gains", "losses", "ties", "ungraded", "graders disagree")
SORTED: tuple[Sort, ...] = (
    "file order", "largest gain", "largest loss", "most ungraded", "most disagreement"
)  # fmt: skip
EXAMPLE = "shipped:example"  # the run that comes with the project
OTHER_GRADERS = ("local", "recall")  # beside the verdicts of the file; both need no network
FLIP_ORDER = (
    "gained",
    "lost",
    "ungraded",
    "stayed wrong",
    "stayed right",
)  # what a reader wants to see first


def open_run(source: str | Path) -> SinglePassageRun:
    """A single-passage run file, published or ours; "shipped:example" is one that comes with the project.

    Raises: DataError.
    """
    if str(source) == EXAMPLE:
        return read_run(Path(str(resources.files("seal_nb") / "data" / "inspector_run.json.gz")))
    return read_run(source)


class Inspection:
    """A run opened for looking at. ``graders`` judge beside the file's own verdicts."""

    def __init__(self, run: SinglePassageRun, *, graders: Sequence[str] = OTHER_GRADERS) -> None:
        self.run = run
        self.graders: dict[str, Grader] = {name: make_grader(name) for name in graders}
        self._answers: dict[tuple[int, int], tuple[AnswerRow, ...]] = {}

    @cached_property
    def passages(self) -> tuple[PassageRow, ...]:
        return tuple(passage_row(passage) for passage in self.run.passages)

    def select(self, show: Show = "all", sort: Sort = "file order", search: str = "") -> list[PassageRow]:
        """Passages that fit, in order. "graders disagree" and "most disagreement" grade the whole run."""
        wanted = search.casefold().strip()
        rows = [
            row
            for row in self.passages
            if self._fits(row, show) and (not wanted or wanted in self._text_of(row.index))
        ]
        return sorted(rows, key=self._order(sort))

    def self_edits(self, passage: int) -> tuple[SelfEditRow, ...]:
        """All self-edits of a passage, in file order."""
        edits = self.run.passages[passage].self_edits
        best = max((m for edit in edits if (m := edit.stats()["adapter_mean"]) is not None), default=None)
        return tuple(self_edit_row(edit, best) for edit in edits)

    def answers(self, passage: int, self_edit: int) -> tuple[AnswerRow, ...]:
        """Every question of every repeat: flips to right first, then to wrong, then the others."""
        key = passage, self_edit
        if key not in self._answers:
            self._answers[key] = self._judged(self.run.passages[passage], self_edit)
        return self._answers[key]

    def n_disagreements(self, passage: int) -> int:
        """Answers over all self-edits that the graders judge differently."""
        n_edits = len(self.run.passages[passage].self_edits)
        return sum(row.graders_disagree for edit in range(n_edits) for row in self.answers(passage, edit))

    def sequences(self, passage: int, self_edit: int) -> list[SequenceRow]:
        """What the adapter was trained on, as the run's settings make it of the self-edit."""
        evaluated = self.run.passages[passage]
        edit = evaluated.self_edits[self_edit]
        params = edit.made.get("lora_params") or self.run.settings.get("lora_params") or {}
        return sequence_rows(
            sequences_of(evaluated, edit.text or "", split_newlines=self._splits(edit)),
            end_mask_substring=str(params.get("end_mask_substring") or ""),
        )

    def compare(self, passage: int, first: int, second: int) -> list[ComparedRow]:
        """Two self-edits of a passage, question by question."""
        edits = self.run.passages[passage].self_edits
        of_first, of_second = (by_question(edits[one].questions) for one in (first, second))
        return [
            ComparedRow(
                question=question,
                gold=asked[0].gold,
                baseline_answer=asked[0].baseline_answer,
                first_answers=tuple(one.adapter_answer for one in asked),
                second_answers=tuple(one.adapter_answer for one in of_second.get(question, ())),
                first_correct=tuple(one.adapter_correct for one in asked),
                second_correct=tuple(one.adapter_correct for one in of_second.get(question, ())),
            )
            for question, asked in of_first.items()
        ]

    def with_self_edit(self, passage: int, edit: EvaluatedSelfEdit) -> "Inspection":
        """The same run with one more self-edit of a passage; nothing is written."""
        evaluated = self.run.passages[passage]
        added = replace(edit, index=len(evaluated.self_edits))
        grown = replace(evaluated, self_edits=(*evaluated.self_edits, added))
        passages = (*self.run.passages[:passage], grown, *self.run.passages[passage + 1 :])
        one = Inspection(replace(self.run, passages=passages), graders=())
        one.graders, one._answers = self.graders, dict(self._answers)
        return one

    def _judged(self, passage: EvaluatedPassage, self_edit: int) -> tuple[AnswerRow, ...]:
        edit = passage.self_edits[self_edit]
        sequences = sequences_of(passage, edit.text or "", split_newlines=self._splits(edit))
        said = {name: verdict_pairs(grader, passage, edit.questions) for name, grader in self.graders.items()}
        rows = [
            answer_row(one, {name: pairs[at] for name, pairs in said.items()}, edit.questions, sequences)
            for at, one in enumerate(edit.questions)
        ]
        return tuple(sorted(rows, key=lambda row: FLIP_ORDER.index(row.flip)))

    def _splits(self, edit: EvaluatedSelfEdit) -> bool:
        told = edit.made.get("split_newlines", self.run.settings.get("split_newlines"))
        return True if told is None else bool(told)

    def _fits(self, row: PassageRow, show: Show) -> bool:
        tests: dict[Show, Callable[[], bool]] = {
            "all": lambda: True,
            "gains": lambda: (row.gain or 0.0) > 0,
            "losses": lambda: (row.gain or 0.0) < 0 or row.n_lost > 0,
            "ties": lambda: row.n_tied_best > 1,
            "ungraded": lambda: row.n_ungraded > 0,
            "graders disagree": lambda: self.n_disagreements(row.index) > 0,
        }
        if show not in tests:
            raise SettingsError(f"show is {show!r}; known are {', '.join(SHOWN)}")
        return tests[show]()

    def _order(self, sort: Sort) -> Callable[[PassageRow], Any]:
        keys: dict[Sort, Callable[[PassageRow], Any]] = {
            "file order": lambda row: row.index,
            "largest gain": lambda row: (row.gain is None, -(row.gain or 0.0), row.index),
            "largest loss": lambda row: (row.gain is None, row.gain or 0.0, -row.n_lost, row.index),
            "most ungraded": lambda row: (-row.n_ungraded, row.index),
            "most disagreement": lambda row: (-self.n_disagreements(row.index), row.index),
        }
        if sort not in keys:
            raise SettingsError(f"sort is {sort!r}; known are {', '.join(SORTED)}")
        return keys[sort]

    def _text_of(self, passage: int) -> str:
        one = self.run.passages[passage]
        questions = (asked.question for edit in one.self_edits[:1] for asked in edit.questions)
        return "\n".join([one.title, one.context, *questions]).casefold()

"""The selection step of ReST-EM: from an evaluated run to the self-edits the model is fine-tuned on.

As published (SEAL, arXiv 2506.10943, ``build_SFT_dataset.py``): the best self-edits of each passage by mean
adapter accuracy, the first in the file among equal means, in a file of {prompt, completion} lines. Options
of ours drop passages that gain nothing and break ties by the soft score. How much such a ranking knows is
in ``ranking``. Does not train.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.run_files import EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun
from seal_nb.prompts import self_edit_prompt
from seal_nb.runs import write_text

TieBreak = Literal["order", "soft"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One decision on a passage: a self-edit that was picked, or why none was (``self_edit`` is None)."""

    passage: int
    title: str
    self_edit: int | None
    text: str
    adapter_mean: float | None
    gain_mean: float | None
    reason: str

    @property
    def is_kept(self) -> bool:
        return self.self_edit is not None


def select_best(
    run: SinglePassageRun, *, k_best: int = 1, drop_no_gain: bool = False, tie_break: TieBreak = "order"
) -> list[Choice]:
    """The ``k_best`` self-edits of each passage, best first, passages in file order; each with its reason.

    ``tie_break`` "order" is as published; "soft" takes the larger mean change in log-probability of the gold
    answers among equal means, and file order where there is none. ``drop_no_gain`` leaves out a passage whose
    best self-edit gains nothing. A self-edit without a graded answer or stored mean cannot be ranked, nor one
    with an UNGRADED answer: the mean of the others would be a reward for what nobody could judge.
    """
    if k_best < 1 or tie_break not in ("order", "soft"):
        raise SettingsError(f"{k_best=}, {tie_break=}: k_best is at least 1, tie_break is 'order' or 'soft'")
    choices: list[Choice] = []
    for passage in run.passages:
        best_first = ranked(passage, tie_break)
        if not best_first:
            why = _ungraded_said(passage) or "no graded answer, no stored mean"
            choices.append(_left_out(passage, f"no self-edit can be ranked: {why}"))
        elif drop_no_gain and gains_nothing(best_first[0]):
            gain = 100 * (mean_gain(best_first[0]) or 0.0)
            choices.append(_left_out(passage, f"its best self-edit gains nothing ({gain:+.1f} points)"))
        else:
            choices += [
                _picked(passage, best_first, place, tie_break)
                for place in range(min(k_best, len(best_first)))
            ]
    return choices


def ranked(passage: EvaluatedPassage, tie_break: TieBreak = "order") -> list[EvaluatedSelfEdit]:
    """Best first; the sort is stable, so the first of equals stays first, as published."""
    rankable = [
        edit
        for edit in passage.self_edits
        if edit.text is not None and mean_reward(edit) is not None and not is_partly_graded(edit)
    ]
    if tie_break == "soft":
        rankable.sort(key=_soft_or_last, reverse=True)
    return sorted(rankable, key=lambda edit: mean_reward(edit) or 0.0, reverse=True)


def is_partly_graded(edit: EvaluatedSelfEdit) -> bool:
    """Whether some adapter answers have a verdict and some have none."""
    return edit.is_graded and any(answered.adapter_correct is None for answered in edit.questions)


def _ungraded_said(passage: EvaluatedPassage) -> str:
    """Which self-edits UNGRADED answers keep out, and what to do; empty for none."""
    out = [
        str(edit.index)
        for edit in passage.self_edits
        if any(answered.adapter_correct is None for answered in edit.questions)
        and (edit.is_graded or mean_reward(edit) is None)
    ]
    if not out:
        return ""
    return f"UNGRADED answers in self-edit {', '.join(out)}; grade it again: seal-nb grade --only-ungraded"


def mean_reward(edit: EvaluatedSelfEdit) -> float | None:
    """Accuracy of its adapters over the repeats, as published; None where nothing was graded or stored."""
    return edit.stats()["adapter_mean"]


def mean_gain(edit: EvaluatedSelfEdit) -> float | None:
    return edit.stats()["gain_mean"]


def gains_nothing(edit: EvaluatedSelfEdit) -> bool:
    """A gain that is not known is not "nothing"."""
    gain = mean_gain(edit)
    return gain is not None and gain <= 0


def _soft_or_last(edit: EvaluatedSelfEdit) -> float:
    soft = edit.soft_gain()
    return -float("inf") if soft is None else soft


def _picked(
    passage: EvaluatedPassage, best_first: Sequence[EvaluatedSelfEdit], place: int, tie_break: TieBreak
) -> Choice:
    edit = best_first[place]
    equals = [other for other in best_first if mean_reward(other) == mean_reward(edit)]
    reason = f"mean {100 * (mean_reward(edit) or 0.0):.1f} %, place {place + 1} of {len(best_first)}"
    if len(equals) > 1:
        by_soft = tie_break == "soft" and len({_soft_or_last(other) for other in equals}) > 1
        reason += f", equal to {len(equals) - 1} more, " + ("by soft score" if by_soft else "by file order")
    if not edit.is_graded:
        reason += ", from the stored mean (no verdicts in the file)"
    if ungraded := _ungraded_said(passage):
        reason += f"; left out: {ungraded}"
    return Choice(
        passage=passage.index,
        title=passage.title,
        self_edit=edit.index,
        text=edit.text or "",
        adapter_mean=mean_reward(edit),
        gain_mean=mean_gain(edit),
        reason=reason,
    )


def _left_out(passage: EvaluatedPassage, reason: str) -> Choice:
    return Choice(
        passage=passage.index,
        title=passage.title,
        self_edit=None,
        text="",
        adapter_mean=None,
        gain_mean=None,
        reason=reason,
    )


def sft_rows(
    run: SinglePassageRun, choices: Iterable[Choice], *, prompt_key: str | None = None
) -> list[dict[str, str]]:
    """The kept choices as {prompt, completion}, completions stripped.

    ``prompt_key`` fills in the prompt of a passage whose file has none. Raises: DataError where neither has.
    """
    return [
        {"prompt": _prompt(run, choice, prompt_key), "completion": choice.text.strip()}
        for choice in choices
        if choice.is_kept
    ]


def _prompt(run: SinglePassageRun, choice: Choice, prompt_key: str | None) -> str:
    """What the self-edit completes: its own prompt, else its passage's, else that of the key."""
    passage = run.passages[choice.passage]
    if own := next((edit.prompt for edit in passage.self_edits if edit.index == choice.self_edit), None):
        return own
    if passage.prompt:
        return passage.prompt
    if prompt_key is None or not passage.context:
        raise DataError(
            "is missing",
            path=run.path,
            item=passage.index,
            field="prompt",
            remedy="give the prompt_key the self-edits were written with",
        )
    return self_edit_prompt(prompt_key, title=passage.title, context=passage.context)


def sft_file_name(run: SinglePassageRun, *, k_best: int, exp_name: str = "") -> str:
    """``sft_best1of5_iter0.jsonl``: named after the experiment, else after the run's time stamp."""
    stamp = exp_name or run.settings.get("timestamp") or run.path.name.split(".")[0] or "run"
    return f"sft_best{k_best}of{run.n_completions}_{stamp}.jsonl"


def write_sft_file(path: str | Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """One JSON object a line, real characters, whole or not at all: the published file byte for byte."""
    return write_text(path, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))

"""The selection step of ReST-EM: from an evaluated run to the self-edits the model is fine-tuned on.

As published (SEAL, arXiv 2506.10943, ``build_SFT_dataset.py``): the best self-edits of each passage by mean
adapter accuracy, the first in the file among equal means, in a file of {prompt, completion} lines. Options
of ours drop passages that gain nothing and break ties by the soft score. Says how much the ranking knows
before anything is trained on it. Does not train.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.run_files import EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun
from seal_nb.metrics import accuracy
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
    best self-edit gains nothing. A self-edit without a graded answer or stored mean cannot be ranked.
    """
    if k_best < 1 or tie_break not in ("order", "soft"):
        raise SettingsError(f"{k_best=}, {tie_break=}: k_best is at least 1, tie_break is 'order' or 'soft'")
    choices: list[Choice] = []
    for passage in run.passages:
        ranked = _ranked(passage, tie_break)
        if not ranked:
            choices.append(_left_out(passage, "no self-edit can be ranked: no graded answer, no stored mean"))
        elif drop_no_gain and _gains_nothing(ranked[0]):
            gain = 100 * (_gain(ranked[0]) or 0.0)
            choices.append(_left_out(passage, f"its best self-edit gains nothing ({gain:+.1f} points)"))
        else:
            choices += [
                _picked(passage, ranked, place, tie_break) for place in range(min(k_best, len(ranked)))
            ]
    return choices


def _ranked(passage: EvaluatedPassage, tie_break: TieBreak) -> list[EvaluatedSelfEdit]:
    """Best first; the sort is stable, so the first of equals stays first, as published."""
    rankable = [edit for edit in passage.self_edits if edit.text is not None and _mean(edit) is not None]
    if tie_break == "soft":
        rankable.sort(key=_soft_or_last, reverse=True)
    return sorted(rankable, key=lambda edit: _mean(edit) or 0.0, reverse=True)


def _mean(edit: EvaluatedSelfEdit) -> float | None:
    return edit.stats()["adapter_mean"]


def _gain(edit: EvaluatedSelfEdit) -> float | None:
    return edit.stats()["gain_mean"]


def _gains_nothing(edit: EvaluatedSelfEdit) -> bool:
    """A gain that is not known is not "nothing"."""
    gain = _gain(edit)
    return gain is not None and gain <= 0


def _soft_or_last(edit: EvaluatedSelfEdit) -> float:
    soft = edit.soft_gain()
    return -float("inf") if soft is None else soft


def _picked(
    passage: EvaluatedPassage, ranked: Sequence[EvaluatedSelfEdit], place: int, tie_break: TieBreak
) -> Choice:
    edit = ranked[place]
    equals = [other for other in ranked if _mean(other) == _mean(edit)]
    reason = f"mean {100 * (_mean(edit) or 0.0):.1f} %, place {place + 1} of {len(ranked)}"
    if len(equals) > 1:
        by_soft = tie_break == "soft" and len({_soft_or_last(other) for other in equals}) > 1
        reason += f", equal to {len(equals) - 1} more, " + ("by soft score" if by_soft else "by file order")
    return Choice(
        passage=passage.index,
        title=passage.title,
        self_edit=edit.index,
        text=edit.text or "",
        adapter_mean=_mean(edit),
        gain_mean=_gain(edit),
        reason=reason + ("" if edit.is_graded else ", from the stored mean (no verdicts in the file)"),
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


@dataclass(frozen=True, kw_only=True)
class RankingSummary:
    """How much a ranking knows: where it is a coin toss, training on it teaches noise.

    Variances are of adapter accuracy within a passage: between self-edits (the repeats' share taken out) and
    between repeats of one self-edit. ``share_between`` is the first over both, the share of one measurement
    that belongs to the self-edit; ``reliability`` is that of the mean over the repeats. None where a run has
    a single repeat, a single self-edit, or no verdicts.
    """

    n_passages: int
    n_ranked: int
    n_tied_best: int
    n_best_without_gain: int
    n_unrankable_self_edits: int
    variance_between_self_edits: float | None
    variance_between_repeats: float | None
    share_between: float | None
    reliability: float | None


def ranking_summary(run: SinglePassageRun) -> RankingSummary:
    """Ties, empty gains and variance components of a run."""
    ranked_P = [_ranked(passage, "order") for passage in run.passages]
    bests = [ranked for ranked in ranked_P if ranked]
    n_self_edits = sum(len(passage.self_edits) for passage in run.passages)
    between, within, n_repeats = _variances(run)
    whole = None if between is None or within is None else between + within
    of_mean = None if between is None or within is None else between + within / n_repeats
    return RankingSummary(
        n_passages=len(run.passages),
        n_ranked=len(bests),
        n_tied_best=sum(len(r) > 1 and _mean(r[0]) == _mean(r[1]) for r in bests),
        n_best_without_gain=sum(_gains_nothing(ranked[0]) for ranked in bests),
        n_unrankable_self_edits=n_self_edits - sum(map(len, ranked_P)),
        variance_between_self_edits=between,
        variance_between_repeats=within,
        share_between=between / whole if whole and between is not None else None,
        reliability=between / of_mean if of_mean and between is not None else None,
    )


def _variances(run: SinglePassageRun) -> tuple[float | None, float | None, float]:
    """Variance between self-edits, between repeats, and repeats a self-edit (mean), pooled over passages."""
    of_means, of_repeats, n_repeats = [], [], []
    for passage in run.passages:
        repeats_E = [
            [a for _, verdicts in edit.repeats() if (a := accuracy(verdicts)) is not None]
            for edit in passage.self_edits
            if edit.is_graded
        ]
        of_repeats += [statistics.variance(repeats) for repeats in repeats_E if len(repeats) > 1]
        n_repeats += [len(repeats) for repeats in repeats_E]
        if len(repeats_E) > 1:
            of_means.append(statistics.variance([statistics.mean(repeats) for repeats in repeats_E]))
    if not of_means or not of_repeats:
        return None, None, 1.0
    within, per_mean = statistics.mean(of_repeats), statistics.mean(n_repeats)
    return max(0.0, statistics.mean(of_means) - within / per_mean), within, per_mean

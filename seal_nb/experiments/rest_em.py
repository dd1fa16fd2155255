"""A ReST-EM round: keep the best self-edits of an evaluated run, and fine-tune the model on them (`rest_em_round`).

As published (SEAL, arXiv 2506.10943, `build_SFT_dataset.py`): the best self-edits of each passage by mean adapter
accuracy, the first in the file among equal means. `RankingSummary` says how reliable the ranking is: where repeats of
one self-edit differ as much as two self-edits do, the choice is random."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seal_nb.errors import DataError, SettingsError
from seal_nb.metrics import MIN_PASSAGES, Estimate, counted, if_graded, paired_difference, ratio_interval
from seal_nb.prompts import self_edit_prompt
from seal_nb.results.single_passage import EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun
from seal_nb.sft.settings import SftJob, SftResult, SftSettings
from seal_nb.storage import file_name, runs_folder, write_record, write_text
from seal_nb.views import plots

TieBreak = Literal["order", "soft"]
QUANTITIES = {  # of `RankingSummary`, in words
    "n_passages": "passages",
    "n_ranked": "passages with a self-edit that can be ranked",
    "n_tied_best": "passages with a tie for the best",
    "n_best_without_gain": "passages whose best self-edit gains nothing",
    "n_unrankable_self_edits": "self-edits that cannot be ranked",
    "n_repeats": "repeats of a self-edit, on average",
    "reliability": "reliability for the same questions",
    "reliability_elsewhere": "reliability for other questions of the passage",
    "most_elsewhere": "… with any number of repeats",
    "own_advantage": "advantage of the winner on the questions that chose it",
    "audit_advantage": "advantage of the winner on the other half of the questions",
}
N_HALVES = 100  # random halves of the questions


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A self-edit that is kept, or a passage that is left out (`self_edit` is None), and why."""

    passage: int
    title: str
    self_edit: int | None = None
    reward: float | None = None
    gain: float | None = None
    reason: str


@dataclass(eq=False)
class RestEmRound:
    """The choice of a round: which self-edits are kept and why, and the training on them. `rows` are the {prompt,
    completion} examples, `sft_file` is where they were written."""

    run: SinglePassageRun
    _choices: Sequence[Choice]
    rows: list[dict[str, str]]
    sft_file: Path

    def choices(self) -> pd.DataFrame:
        """One row for each kept self-edit or left-out passage, with the reason."""
        frame = pd.DataFrame(self._choices, columns=[field.name for field in fields(Choice)])
        return frame.astype({"self_edit": "Int64"})

    def ranking(self) -> pd.DataFrame:
        """How much the ranking knows: ties, reliabilities, audit (see `RankingSummary`), with 95 % intervals."""
        summary = RankingSummary(self.run)
        values = [getattr(summary, name) for name in QUANTITIES]
        columns = {"quantity": QUANTITIES.values(), "value": [getattr(one, "mean", one) for one in values]}
        columns |= {name: [getattr(one, name, None) for one in values] for name in ("low", "high")}
        return pd.DataFrame(columns, dtype=object)  # counts stay whole beside the fractions

    def sentences(self) -> list[str]:
        """How reliable the rewards are, and whether questions that did not choose the winner agree."""
        summary = RankingSummary(self.run)
        return [summary.sentence(), summary.audit_sentence()]

    def plot_rewards(self) -> Figure:
        """The rewards of each passage's self-edits, the kept ones marked, with the baseline."""
        passages = [one for one in self.run.passages if any(mean_reward(edit) is not None for edit in one.self_edits)]
        kept = [(one.passage, one.self_edit) for one in self._choices if one.self_edit is not None]
        return plots.plot_rewards(
            [passage.title for passage in passages],
            [[mean_reward(edit) for edit in passage.self_edits] for passage in passages],
            [[edit for at, edit in kept if at == passage.index] for passage in passages],
            [passage.self_edits[0].stats()["baseline_mean"] for passage in passages],
        )

    def train(
        self,
        model: str,
        *,
        settings: SftSettings,
        model_dir: str | Path = "",
        n_processes: int = 1,
        n_threads: int = 1,
        sharding: str = "fsdp",
    ) -> SftResult:
        """Fine-tune the model on the kept self-edits (LoRA, merged) and write the new model.

        Args:
            model: folder or hub name of the model that wrote the self-edits.
            settings: schedule and adapter of the training.
            model_dir: folder for the new model; `model` in the folder of the training set unless given.
            n_processes: one GPU each, started by accelerate on all nodes of the job.
            n_threads: CPU threads of one of them.
            sharding: "fsdp" or "deepspeed" (ZeRO-3), how several GPUs share the model.

        Returns:
            The new model's folder, the loss by optimiser step (nats per token), and counts.

        Raises:
            SettingsError: for settings that do not fit.
            DataError: for a prompt that leaves no room for its self-edit.
            EngineError: when a training process failed; the message has the end of its log."""
        from seal_nb.sft.train import run_job

        place = runs_folder(model_dir or self.sft_file.parent / "model")
        job = SftJob(sft_file=self.sft_file, model=model, model_dir=place, settings=settings, n_threads=n_threads)
        result = run_job(job, n_processes=n_processes, sharding=sharding)
        made = {"model": model, "n_processes": n_processes, "sharding": sharding, **asdict(settings)}
        seeds = {"seed": settings.seed}
        write_record(place.resolve().with_suffix(".json"), stage="05_rest_em_round", settings=made, seeds=seeds)
        return result


def rest_em_round(
    run: SinglePassageRun,
    *,
    k_best: int = 1,
    drop_no_gain: bool = False,
    tie_break: TieBreak = "order",
    prompt_key: str | None = "implications",
    folder: str | Path = "runs/rest_em",
    exp_name: str = "",
) -> RestEmRound:
    """Keep the best self-edits of each passage and write the training set; `.train(...)` then fine-tunes on it.

    Args:
        run: an evaluated single-passage run (`read_run`), published or ours.
        k_best: self-edits kept of each passage.
        drop_no_gain: leave out passages whose best self-edit gains nothing (published: kept).
        tie_break: "order" (the first in the file, as published) or "soft" (log-probability of the gold answers).
        prompt_key: prompt of the examples where the run file does not have it.
        folder: for the training set (`sft_best<k>of<n>_<name>.jsonl`), its record, and later the model.
        exp_name: in the name of the training set; the run's time stamp unless given.

    Returns:
        The choice and the examples.

    Raises:
        SettingsError: for settings that do not fit.
        DataError: where the prompt of a self-edit is unknown.

    Source: SEAL, arXiv 2506.10943, section 3.1."""
    choices = select_best(run, k_best=k_best, drop_no_gain=drop_no_gain, tie_break=tie_break)
    rows = sft_rows(run, choices, prompt_key=prompt_key)
    stamp = exp_name or run.settings.get("timestamp") or run.path.name.split(".")[0] or "run"
    n_completions = max((len(passage.self_edits) for passage in run.passages), default=0)
    path = runs_folder(folder) / file_name(f"sft_best{k_best}of{n_completions}_{stamp}", ".jsonl")
    # One JSON object a line, real characters: the published file byte for byte.
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    rule = {"run_json": run.path.name, "k_best": k_best, "drop_no_gain": drop_no_gain, "tie_break": tie_break}
    write_record(path, stage="05_rest_em_round", settings=rule)
    return RestEmRound(run, choices, rows, path)


def select_best(
    run: SinglePassageRun, *, k_best: int = 1, drop_no_gain: bool = False, tie_break: TieBreak = "order"
) -> list[Choice]:
    """The `k_best` self-edits of each passage, best first, passages in file order; each with its reason. A self-edit
    without a graded answer or stored mean cannot be ranked. Neither can one with an UNGRADED answer: the mean of the
    other answers would be a reward for an answer that was not graded."""
    if k_best < 1 or tie_break not in ("order", "soft"):
        raise SettingsError(f"{k_best=}, {tie_break=}: k_best is at least 1, tie_break is 'order' or 'soft'")
    choices: list[Choice] = []
    for passage in run.passages:
        about: dict[str, Any] = {"passage": passage.index, "title": passage.title}
        best_first, edits = ranked(passage, tie_break), [one for one in passage.self_edits if one.questions]
        unranked = ", ".join(str(one.index) for one in edits if is_partly_graded(one) or mean_reward(one) is None)
        remedy = "grade it again: seal-nb grade --only-ungraded"
        ungraded = unranked and f"UNGRADED answers in self-edit {unranked}; {remedy}"
        gain = best_first[0].stats()["gain_mean"] if best_first else None
        if not best_first:
            why = ungraded or ("no graded answer, no stored mean" if passage.questions() else "no questions")
            choices.append(Choice(**about, reason=f"no self-edit can be ranked: {why}"))
        elif drop_no_gain and gain is not None and gain <= 0:
            choices.append(Choice(**about, reason=f"its best self-edit gains nothing ({100 * gain:+.1f} points)"))
        else:
            for place, edit in enumerate(best_first[:k_best]):
                reason = _reason(best_first, place, tie_break) + (f"; left out: {ungraded}" if ungraded else "")
                own = {"self_edit": edit.index, "reward": mean_reward(edit), "gain": edit.stats()["gain_mean"]}
                choices.append(Choice(**about | own, reason=reason))
    return choices


def ranked(passage: EvaluatedPassage, tie_break: TieBreak = "order") -> list[EvaluatedSelfEdit]:
    """Best first. The sort is stable, so the first of equals stays first, as published. With `tie_break` "soft", the
    larger mean change in log-probability of the gold answers is first among equal means."""

    def rank(edit: EvaluatedSelfEdit) -> tuple[float, float]:
        soft = edit.soft_gain() if tie_break == "soft" else None
        return mean_reward(edit) or 0.0, -math.inf if soft is None else soft

    has_reward = [one for one in passage.self_edits if one.text is not None and mean_reward(one) is not None]
    return sorted((one for one in has_reward if not is_partly_graded(one)), key=rank, reverse=True)


def mean_reward(edit: EvaluatedSelfEdit) -> float | None:
    """Accuracy of its adapters over the repeats, as published; None where nothing was graded or stored."""
    return edit.stats()["adapter_mean"]


def is_partly_graded(edit: EvaluatedSelfEdit) -> bool:
    """Some adapter answers have a verdict and some have none."""
    return edit.is_graded and any(answered.adapter_correct is None for answered in edit.questions)


def _reason(best_first: Sequence[EvaluatedSelfEdit], place: int, tie_break: TieBreak) -> str:
    edit = best_first[place]
    equals = [other for other in best_first if mean_reward(other) == mean_reward(edit)]
    reason = f"mean {100 * (mean_reward(edit) or 0.0):.1f} %, place {place + 1} of {len(best_first)}"
    if len(equals) > 1:
        by_soft = tie_break == "soft" and len({other.soft_gain() for other in equals}) > 1
        reason += f", equal to {len(equals) - 1} more, by {'soft score' if by_soft else 'file order'}"
    return reason if edit.is_graded else f"{reason}, from the stored mean (no verdicts in the file)"


def sft_rows(
    run: SinglePassageRun, choices: Iterable[Choice], *, prompt_key: str | None = None
) -> list[dict[str, str]]:
    """The kept choices as {prompt, completion}. The prompt is that of the self-edit, else of its passage, else of
    ``prompt_key``. Raises: DataError where there is none."""
    rows, kept = [], [(run.passages[one.passage], one.self_edit) for one in choices if one.self_edit is not None]
    for passage, at in kept:
        edit = passage.self_edits[at]
        prompt = edit.prompt or passage.prompt
        if not prompt:
            if prompt_key is None or not passage.context:
                remedy = "give the prompt_key the self-edits were written with"
                raise DataError("is missing", path=run.path, item=passage.index, field="prompt", remedy=remedy)
            prompt = self_edit_prompt(prompt_key, title=passage.title, context=passage.context)
        rows.append({"prompt": prompt, "completion": (edit.text or "").strip()})
    return rows


class RankingSummary:
    """How much a ranking knows: ties, empty gains, and what its rewards say about other repeats and other questions.

    ``reliability``: share of the variance of the rewards within a passage that stays for the same questions with other
    adapters. ``reliability_elsewhere``: the share that stays for other questions of the passage; ``most_elsewhere`` is
    what any number of repeats can bring it to. ``own_advantage``: reward of the winner minus the mean of its passage.
    ``audit_advantage``: the same where one half of the questions chooses the winner and the other half measures it,
    the mean over both ways and many halves. None where a run has a single repeat, self-edit or question."""

    def __init__(self, run: SinglePassageRun) -> None:
        ranked_P = [ranked(passage) for passage in run.passages]
        bests = [best_first for best_first in ranked_P if best_first]
        gains = [best_first[0].stats()["gain_mean"] for best_first in bests]
        self.n_passages, self.n_ranked = len(run.passages), len(bests)
        self.n_tied_best = sum(len(r) > 1 and mean_reward(r[0]) == mean_reward(r[1]) for r in bests)
        self.n_best_without_gain = sum(gain is not None and gain <= 0 for gain in gains)
        self.n_unrankable_self_edits = sum(len(p.self_edits) for p in run.passages) - sum(map(len, ranked_P))
        correct_P = [one for passage in run.passages if len(one := _correct(passage)) > 1 and one.size]  # (E, R, Q)
        self.n_repeats: float = statistics.mean(one.shape[1] for one in correct_P) if correct_P else 1.0
        repeated = [one for one in correct_P if one.shape[1] > 1]
        total_P = [float(one.mean(axis=(1, 2)).var(ddof=1)) for one in repeated]
        noise_P = [float((one.mean(axis=2).var(axis=1, ddof=1) / one.shape[1]).mean()) for one in repeated]
        same_P = [total - noise for total, noise in zip(total_P, noise_P, strict=True)]
        self.reliability = ratio_interval(same_P, total_P)
        several = [at for at, one in enumerate(repeated) if one.shape[2] > 1]  # questions
        elsewhere_P = [_shared_by_questions(repeated[at]) for at in several]
        self.reliability_elsewhere = ratio_interval(elsewhere_P, [total_P[at] for at in several])
        same_P = [same_P[at] for at in several]
        share = ratio_interval(elsewhere_P, same_P) if sum(same_P) > 0 else None
        self.most_elsewhere = share and min(1.0, max(0.0, share.mean))
        own_P = [[float(one.mean(axis=(1, 2)).max())] * one.shape[2] for one in correct_P]
        mean_P = [[float(one.mean())] * one.shape[2] for one in correct_P]
        self.own_advantage = if_graded(paired_difference, own_P, mean_P)
        audited = [one for one in correct_P if one.shape[2] > 1]
        audit_P = [[_audit_advantage(one)] * one.shape[2] for one in audited]
        self.audit_advantage = if_graded(paired_difference, audit_P, [[0.0] * len(row) for row in audit_P])

    def sentence(self) -> str:
        """How reliable the rewards are, in words."""
        if self.n_repeats <= 1:
            return "it is not known how much the ranking knows: that takes two self-edits and two repeats (eval_times)"
        n = counted(self.n_ranked, "passages")
        if self.n_ranked < 2:
            return f"{n}: too few to tell how much the ranking knows (at least {MIN_PASSAGES})"
        if self.reliability is None or self.reliability.mean <= 0:
            return f"self-edits of {n} do not differ beyond the noise between repeats, so the choice is random"
        has = f"{self.n_repeats:g} repeats on {n}: reliability {_ratio(self.reliability)} for the same questions"
        if self.reliability_elsewhere is None:
            return f"{has}; with one question a passage nothing is known about other questions"
        has += f" and {_ratio(self.reliability_elsewhere)} for other questions of the passage"
        if self.n_ranked < MIN_PASSAGES:
            return f"{has}, but {n} are too few to tell"
        return f"{has} ({self.most_elsewhere:.2f} with any number of repeats, more with more questions)"

    def audit_sentence(self) -> str:
        """Whether the chosen self-edits are better on questions that did not choose them."""
        if self.audit_advantage is None or self.own_advantage is None:
            return "no passage has two self-edits and two questions, so no half of them can audit the choice"
        return (
            "winner by half of the questions minus its passage's mean, on the other half: "
            f"{self.audit_advantage.sentence()}; on the questions that chose it: {100 * self.own_advantage.mean:+.1f}"
        )


def _ratio(one: Estimate) -> str:
    return f"{one.mean:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _correct(passage: EvaluatedPassage) -> np.ndarray:
    """(E, R, Q) verdicts of the self-edits whose answers are all graded, over the repeats that all have."""
    edits = [one for one in passage.self_edits if one.is_graded and not is_partly_graded(one)]
    repeats_E = [[list(map(bool, adapter)) for _, adapter in edit.repeats()] for edit in edits]
    n_repeats = min(map(len, repeats_E), default=0)
    n_questions = min((len(answers) for repeats in repeats_E for answers in repeats), default=0)
    return np.array([[answers[:n_questions] for answers in repeats[:n_repeats]] for repeats in repeats_E], dtype=float)


def _shared_by_questions(correct_E_R_Q: np.ndarray) -> float:
    """The variance between self-edits that two questions of two repeats share: the mean covariance over such pairs."""
    n_edits, n_repeats, n_questions = correct_E_R_Q.shape
    own = correct_E_R_Q - correct_E_R_Q.mean(axis=0)
    sums = own.sum(axis=(1, 2)) ** 2 - (own.sum(axis=1) ** 2).sum(axis=1) - (own.sum(axis=2) ** 2).sum(axis=1)
    pairs = n_repeats * (n_repeats - 1) * n_questions * (n_questions - 1)
    return float((sums + (own**2).sum(axis=(1, 2))).sum() / (n_edits - 1) / pairs)


def _audit_advantage(correct_E_R_Q: np.ndarray) -> float:
    """How much better the winner on half of the questions (the first of equals) is on the other half."""
    generator, found = np.random.default_rng(0), []
    by_question = correct_E_R_Q.mean(axis=1)  # (E, Q)
    for _ in range(N_HALVES):
        order = generator.permutation(by_question.shape[1])
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        for reward, audit in (halves, halves[::-1]):
            winner = by_question[:, reward].mean(axis=1).argmax()
            found.append(by_question[winner, audit].mean() - by_question[:, audit].mean())
    return float(np.mean(found))

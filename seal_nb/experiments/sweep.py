"""A sweep over inner-loop settings: every combination on the same passages, all in one batch on the server.

Each point is a single-passage arm with its own settings and the same seeds, so that points differ by their
settings alone. Points are requests and rows here; the figure is in ``views.sweep_plots``. A best point of
many is partly luck: evaluate it on other passages before believing it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.experiments.settings import TrainingSettings
from seal_nb.experiments.single_passage import PlannedLoop, SinglePassageSettings, requests_for_run
from seal_nb.metrics import Estimate, mean_interval, paired_difference, written_value
from seal_nb.passages import Passage
from seal_nb.protocol import TTTReply

MOST_POINTS = 200
GRID_REMEDY = 'write settings with their values, such as {"lora_rank": [8, 32]}'


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One combination: the values that are swept, and all settings."""

    values: Mapping[str, Any]
    settings: SinglePassageSettings

    @property
    def label(self) -> str:
        """Such as "finetune_lr 0.001, lora_rank 32"."""
        return ", ".join(f"{name} {written_value(value)}" for name, value in self.values.items())


def grid_of(text: str) -> dict[str, list[Any]]:
    """The grid that a notebook's parameter says as JSON. Raises: SettingsError where it says none."""
    try:
        grid = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"grid is no JSON ({error}): {text!r}; {GRID_REMEDY}") from None
    if not isinstance(grid, dict) or not all(isinstance(values, list) for values in grid.values()):
        raise SettingsError(f"grid is {text!r}; {GRID_REMEDY}")
    return grid


def sweep_points(settings: SinglePassageSettings, grid: Mapping[str, Sequence[Any]]) -> list[SweepPoint]:
    """Every combination of the grid's values, the last name varying fastest.

    ``grid``: field of TrainingSettings → values. ``lora_alpha`` follows ``lora_rank`` at the ratio of
    ``settings`` where it is not swept itself, so that another rank is not another learning rate as well.
    Raises: SettingsError for a name that is no setting, or too many points.
    """
    known = {field.name for field in fields(TrainingSettings)}
    if unknown := sorted(set(grid) - known):
        raise SettingsError(f"cannot sweep {unknown[0]!r}; inner-loop settings are {', '.join(sorted(known))}")
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if not grid or not 1 <= len(combinations) <= MOST_POINTS:
        raise SettingsError(f"the grid has {len(combinations)} points; 1 to {MOST_POINTS} can be run")
    return [
        SweepPoint(values=values, settings=replace(settings, training=_training(settings.training, values)))
        for values in combinations
    ]


def _training(base: TrainingSettings, values: Mapping[str, Any]) -> TrainingSettings:
    changed = dict(values)
    if "lora_rank" in values and "lora_alpha" not in values:
        changed["lora_alpha"] = base.lora_alpha / base.lora_rank * values["lora_rank"]
    return replace(base, **changed)


def sweep_loops(passages: Sequence[Passage], points: Iterable[SweepPoint], *, model_id: str) -> list[list[PlannedLoop]]:
    """The inner loops of each point."""
    return [requests_for_run(passages, point.settings, model_id=model_id) for point in points]


def sweep_rows(
    points: Sequence[SweepPoint],
    loops_of_points: Sequence[Sequence[PlannedLoop]],
    replies: Mapping[str, TTTReply],
    n_passages: int,
) -> list[dict[str, Any]]:
    """One line a point: its values, accuracy with interval, soft gain, difference from the first point.

    ``passages`` have a graded answer; ``ungraded`` counts answers, ``missing`` inner loops without a reply.
    """
    answered = [_correct_P(loops, replies, n_passages) for loops in loops_of_points]
    return [
        {
            **point.values,
            "label": point.label,
            "estimate": (estimate := _estimate(correct_P)),
            "accuracy": estimate and estimate.mean,
            "low": estimate and estimate.low,
            "high": estimate and estimate.high,
            "soft gain": _soft_gain(loops, replies),
            "passages": estimate.n if estimate else 0,
            "ungraded": sum(verdict is None for verdicts in correct_P for verdict in verdicts),
            "missing": sum(loop.request_id not in replies for loop in loops),
            "against the first": _against(correct_P, answered[0]) if at and estimate else None,
        }
        for at, (point, loops, correct_P) in enumerate(zip(points, loops_of_points, answered, strict=True))
    ]


def _correct_P(
    loops: Sequence[PlannedLoop], replies: Mapping[str, TTTReply], n_passages: int
) -> list[list[bool | None]]:
    correct_P: list[list[bool | None]] = [[] for _ in range(n_passages)]
    for loop in loops:
        if loop.request_id in replies:
            correct_P[loop.passage] += replies[loop.request_id].adapter_correct
    return correct_P


def _estimate(correct_P: Sequence[Sequence[bool | None]]) -> Estimate | None:
    known = any(verdict is not None for verdicts in correct_P for verdict in verdicts)
    return mean_interval(correct_P) if known else None


def _against(correct_P: Sequence[Sequence[bool | None]], first_P: Sequence[Sequence[bool | None]]) -> str | None:
    return paired_difference(correct_P, first_P).sentence() if _estimate(first_P) else None


def _soft_gain(loops: Sequence[PlannedLoop], replies: Mapping[str, TTTReply]) -> float | None:
    """Mean change in log-probability of the gold answers, nats; None where none was taken."""
    gains = [
        after - before
        for loop in loops
        if (reply := replies.get(loop.request_id)) is not None
        for before, after in zip(reply.baseline_gold_logprobs, reply.adapter_gold_logprobs, strict=True)
        if before is not None and after is not None
    ]
    return sum(gains) / len(gains) if gains else None

"""A sweep over settings of the inner loop: every combination on the same passages, all in one batch (`sweep`).

Each point is a single-passage arm with its own settings and the same seeds, so points differ by their settings alone.
The best of many points is partly luck: evaluate it on other passages."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.session import TTT, ask
from seal_nb.experiments.settings import ARMS, Training, arm_passages, check_asked, names_in
from seal_nb.experiments.single_passage import SinglePassageSettings, build_run, requests_for_run
from seal_nb.metrics import mean, written_value
from seal_nb.passages import Passage, check_disjoint
from seal_nb.results.run import against_first
from seal_nb.results.single_passage import SinglePassageRun
from seal_nb.storage import Journal, parse_json, runs_folder, write_record
from seal_nb.views import plots
from seal_nb.views.live import say
from seal_nb.views.tables import write_csv

MOST_POINTS = 200
GRID_REMEDY = 'write settings with their values, such as {"lora_rank": [8, 32]}'
Point = tuple[Mapping[str, Any], SinglePassageSettings]  # one combination: the swept values, and all settings


class Sweep:
    """The swept values of each point (`points`) with its accuracy; `frame` and `plot` show them."""

    def __init__(self, points: Sequence[Mapping[str, Any]], runs: Sequence[SinglePassageRun]) -> None:
        self.points = points
        self.rows: list[dict[str, Any]] = []
        for values, run, sentence in zip(points, runs, against_first(runs), strict=True):
            errors = [one["error"] for one in run.value["missing"]]
            row = {
                **values,
                "label": ", ".join(f"{name} {written_value(value)}" for name, value in values.items()),
                "estimate": run.estimate(),
                **{name: run.row[name] for name in ("accuracy", "low", "high")},
                "soft gain": mean([edit.soft_gain() for passage in run.passages for edit in passage.self_edits]),
                "passages": run.row["n"],
                "ungraded": run.row["ungraded"],
                "missing": len(errors),
                "first error": errors[0] if errors else None,
                **{name: run.row[name] for name in ("steps", "tokens")},
                "not_recited": run.recitation["not_recited"],
                "against the first": sentence,
            }
            self.rows.append(row)

    def frame(self) -> pd.DataFrame:
        """One row for each point: its values, accuracy with 95 % interval, soft gain (nats), difference from the first.
        `passages` have a graded answer; `ungraded` counts answers; `missing` counts inner loops without a reply, and
        `first error` says why one failed, if any did."""
        unused = [] if any(row["missing"] for row in self.rows) else ["first error"]
        return pd.DataFrame(self.rows).drop(columns=["label", "estimate", *unused])

    def best(self) -> dict[str, Any]:
        """The row of the point with the highest accuracy, the first of equals."""
        return max(self.rows, key=lambda row: row["accuracy"] or 0.0)

    def plot(self) -> Figure:
        """Accuracy of each point with its interval."""
        return plots.plot_sweep(self.rows, list(self.points[0]))


def sweep(
    ttt: TTT,
    passages: Sequence[Passage],
    grid: str | Mapping[str, Sequence[Any]],
    *,
    arm: str = "hand_written",
    training: Training | None = None,
    eval_times: int = 1,
    seed: int = 42,
    folder: str | Path = "runs/sweep",
    dataset: str = "",
) -> Sweep:
    """Evaluate every combination of some training settings on the same passages.

    Args:
        ttt: the server (`ttt_server` or `connect`).
        passages: with questions.
        grid: field of `Training` → values, or the same as JSON. `lora_alpha` follows `lora_rank` at the ratio of
            `training` unless it is swept itself, so that another rank is not another learning rate as well.
        arm: what adapters are trained on: passage_only, self_edits (the first of each passage), hand_written.
        training: settings that are not swept.
        eval_times: adapters trained for each point and passage.
        seed: every inner loop derives its own from it, the same at every point.
        folder: for `sweep.csv`, `sweep.png`, their record and the journal.
        dataset: name of the data, for the record.

    Returns:
        The points with their accuracies.

    Raises:
        DataError: for a passage without what the arm needs, and for passages without any question.
        SettingsError: for a name that is no setting, and for more than 200 points.
        RoundTimeout: when the server went away and did not come back."""
    check_asked(passages)
    training = training or Training()
    fixed = SinglePassageSettings.from_parameters(locals(), k_completions=1)
    folder, values = runs_folder(folder), grid_of(grid) if isinstance(grid, str) else grid
    points, passages = sweep_points(fixed, values), arm_passages(arm, passages)
    with Journal(folder / "journal.jsonl") as journal:
        loops = [requests_for_run(passages, settings, model_id=ttt.model_id) for _, settings in points]
        collected = ask(ttt, [loop.request for of_point in loops for loop in of_point], journal, work="to do")
    runs = [
        SinglePassageRun(value=build_run(passages, of_point, collected.replies, settings, failures=collected.failures))
        for (_, settings), of_point in zip(points, loops, strict=True)
    ]
    result = Sweep([values for values, _ in points], runs)
    write_csv(result.frame(), folder / "sweep.csv")
    result.plot().savefig(folder / "sweep.png")
    made = {"dataset": Path(dataset).name, "n_articles": len(passages), "model": ttt.model_id, **asdict(fixed)}
    write_record(folder / "sweep.csv", stage="09_sweep", settings={"grid": values, **made}, seeds={"seed": seed})
    return result


def tune(
    ttt: TTT,
    passages: Sequence[Passage],
    *,
    arms: str | Sequence[str] = ("passage_only", "self_edits"),
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    held_out: Sequence[Passage] = (),
    training: Training | None = None,
    eval_times: int = 1,
    seed: int = 42,
    folder: str | Path = "runs/tune",
) -> dict[str, Training]:
    """The learning rate that gives each arm its highest accuracy on training passages, for ``evaluate(training=…)``.

    Args:
        ttt: the server (`ttt_server` or `connect`).
        passages: training passages with questions.
        arms: of passage_only, self_edits (the first of each passage), hand_written.
        learning_rates: of AdamW, to choose from.
        held_out: the passages of the evaluation; those that overlap with `passages` are refused.
        training: the settings that stay; the published ones unless given.
        eval_times: adapters trained for each learning rate and passage.
        seed: as in `sweep`.
        folder: for a sweep of each arm, in a folder of its own.

    Returns:
        Settings by arm. passage_matched has those of passage_only, shuffled those of the last other arm.

    Raises:
        DataError: for passages that overlap with `held_out`; and as `sweep`."""
    check_disjoint(passages, held_out)
    if unknown := {*names_in("arms", arms)} - {*ARMS}:
        raise SettingsError(f"arms has {', '.join(sorted(unknown))}; those that can be tuned are {', '.join(ARMS)}")
    training, found = training or Training(), dict[str, Training]()
    for arm in names_in("arms", arms):
        how: dict[str, Any] = {"arm": arm, "training": training, "eval_times": eval_times, "seed": seed}
        run = sweep(ttt, passages, {"finetune_lr": list(learning_rates)}, folder=Path(folder) / arm, **how)
        if run.best()["accuracy"] is None:
            raise DataError(f"no learning rate of arm {arm!r} has a graded answer", remedy="see its sweep.csv")
        found[arm] = replace(training, finetune_lr=run.best()["finetune_lr"])
        say(f"{arm}: learning rate {found[arm].finetune_lr:g} of {', '.join(f'{one:g}' for one in learning_rates)}")
    last_other = next((one for arm, one in reversed(found.items()) if arm != "passage_only"), training)
    return found | {"passage_matched": found.get("passage_only", training), "shuffled": last_other}


def grid_of(text: str) -> dict[str, list[Any]]:
    """The grid in a JSON text. Raises: SettingsError."""
    try:
        grid = parse_json(text)
    except ValueError as error:
        raise SettingsError(f"grid is no JSON ({error}): {text!r}; {GRID_REMEDY}") from None
    if not isinstance(grid, dict) or not all(isinstance(values, list) for values in grid.values()):
        raise SettingsError(f"grid is {text!r}; {GRID_REMEDY}")
    return grid


def sweep_points(settings: SinglePassageSettings, grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the grid's values, the last name varying fastest. Raises: SettingsError."""
    known = {field.name for field in fields(Training)}
    if unknown := sorted(set(grid) - known):
        raise SettingsError(f"cannot sweep {unknown[0]!r}; settings of the inner loop are {', '.join(sorted(known))}")
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if not grid or not 1 <= len(combinations) <= MOST_POINTS:
        raise SettingsError(f"the grid has {len(combinations)} points; 1 to {MOST_POINTS} can be run")
    base = settings.training
    points: list[Point] = []
    for values in combinations:
        training = replace(base, **values)
        if "lora_rank" in values and "lora_alpha" not in values:
            training = replace(training, lora_alpha=base.lora_alpha / base.lora_rank * training.lora_rank)
        points.append((values, replace(settings, training=training)))
    return points

"""The demo's table fits the notebooks: every stage can be started as the table says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from seal_nb.chain import RUN, Stage
from seal_nb.chain_tables import DEMO, rest_em_chain
from seal_nb.notebook_runner import (
    declared_parameters,
    default_notebooks_dir,
    find_notebook,
    format_value,
    parse_parameters,
)

CHAIN = rest_em_chain(DEMO)
STAGES = list(CHAIN)


def paths_in(stage: Stage) -> list[str]:
    """What the stage's parameters name in other folders of the run."""
    values = [value for value in stage.parameters.values() if isinstance(value, str)]
    return [value for value in values if RUN in value and not value.startswith(f"{RUN}/{stage.name}/")]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_notebook_has_every_parameter_in_its_type(stage: Stage) -> None:
    declared = declared_parameters(find_notebook(stage.notebook, default_notebooks_dir()))
    values = stage.values(Path("runs/x"))
    pairs = [(name, format_value(value)) for name, value in values.items()]
    assert parse_parameters(pairs, declared) == values


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_what_a_stage_reads_is_made_by_one_that_it_needs(stage: Stage) -> None:
    for path in paths_in(stage):
        maker, file = re.fullmatch(re.escape(RUN) + r"(?:/([^/]+)/(.+))?", path).groups()
        if maker is None:
            continue  # the whole run folder: 08_results
        assert maker in {*stage.needs, *(far for near in stage.needs for far in CHAIN[near].needs)}
        assert file in CHAIN[maker].produces


def test_demo_has_two_rest_em_rounds_and_three_evaluations() -> None:
    names = [stage.name for stage in STAGES]
    assert [name for name in names if name.endswith("_train")] == [
        "round1_self_edits_train",
        "round1_train",
        "round2_self_edits_train",
        "round2_train",
    ]
    assert [name for name in names if name.endswith("_evaluate")] == [
        "base_evaluate",
        "round1_evaluate",
        "round2_evaluate",
    ]


def test_rounds_train_on_different_passages() -> None:
    assert [CHAIN[f"round{n}_self_edits_train"].parameters["start"] for n in (1, 2)] == [0, 4]


def test_one_server_at_a_time_is_up() -> None:
    users = [{server.name for server in CHAIN.servers_of(stage)} for stage in STAGES if not stage.background]
    order = [name for names in users for name in names]
    assert all(len(names) <= 1 for names in users)
    assert order == sorted(order, key=["base_server", "round1_server", "round2_server"].index)


def test_change_of_a_count_reruns_what_depends_on_it_and_nothing_else() -> None:
    other = rest_em_chain(replace(DEMO, n_sequences=3))
    changed = [stage.name for stage in other if other.identity(stage) != CHAIN.identity(CHAIN[stage.name])]
    assert changed == ["continual", "results"]

"""The table fits the notebooks: every stage can be started as it says, for the demo and as published."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seal_nb.chain.stages import DEMO, RUN, ExperimentSettings, Stage, make_chain
from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.settings import arm_texts
from seal_nb.notebook_runner import (
    declared_parameters,
    default_notebooks_dir,
    find_notebook,
    format_value,
    parse_parameters,
)
from seal_nb.passages import load_passages

CHAIN = make_chain("rest_em", DEMO)
STAGES = list(CHAIN)
PUBLISHED = make_chain(
    "rest_em",
    ExperimentSettings(
        model="Qwen/Qwen2.5-7B",
        train_dataset="squad_train.json",
        val_dataset="squad_val.json",
        shuffle=True,
        n_workers=2,
        n_threads=1,
        sft_processes=2,
    ),
)
BOTH = [*STAGES, *PUBLISHED]
NAMES = [f"{chain}-{stage.name}" for chain, stages in (("demo", STAGES), ("published", PUBLISHED)) for stage in stages]


def asked(stage: Stage) -> dict[str, Any]:
    """Every parameter that the stage's notebook runs with: its own defaults under what the table says."""
    declared = declared_parameters(find_notebook(stage.notebook, default_notebooks_dir()))
    return {name: parameter.default for name, parameter in declared.items()} | dict(stage.parameters)


def paths_in(stage: Stage) -> list[str]:
    """What the stage's parameters name in other folders of the run."""
    values = [value for value in stage.parameters.values() if isinstance(value, str)]
    return [value for value in values if RUN in value and not value.startswith(f"{RUN}/{stage.name}/")]


@pytest.mark.parametrize("stage", BOTH, ids=NAMES)
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
    other = make_chain("rest_em", replace(DEMO, n_sequences=3))
    changed = [stage.name for stage in other if stage.identity != CHAIN[stage.name].identity]
    assert changed == ["continual", "results"]


def test_number_of_processes_of_a_training_reaches_it_and_undoes_nothing() -> None:
    chain = make_chain("rest_em", replace(DEMO, sft_accumulation=4, sft_processes=2))
    trainings = [stage for stage in chain if stage.notebook == "05_rest_em_round"]
    assert [asked(stage)["n_processes"] for stage in trainings] == [2, 2]
    assert all("in 2 processes" in stage.title for stage in trainings)
    other = make_chain("rest_em", replace(DEMO, sft_accumulation=4, sft_processes=4))
    assert [stage.identity for stage in chain] == [stage.identity for stage in other]


def test_prompt_and_engine_reach_every_stage_that_writes_self_edits() -> None:
    chain = make_chain("rest_em", replace(DEMO, prompt_key="rewrite", engine="vllm"))
    writers = [asked(stage) for stage in chain if stage.notebook == "01_create_self_edits"]
    assert [(values["prompt_key"], values["engine"]) for values in writers] == [("rewrite", "vllm")] * 5
    assert asked(chain["continual"])["prompt_key"] == asked(chain["results"])["prompt_key"] == "rewrite"


def test_edited_file_is_another_experiment_under_its_old_name(tmp_path: Path) -> None:
    (file := tmp_path / "mine.txt").write_text("About {title}: {context}")
    chain = make_chain("rest_em", replace(DEMO, prompt_key=str(file)))
    assert asked(chain["results"])["prompt_key"] == "mine", "as results call its self-edits"
    before = chain["base_self_edits"].identity
    file.rename(tmp_path / "renamed.txt")
    moved = make_chain("rest_em", replace(DEMO, prompt_key=str(tmp_path / "renamed.txt")))
    assert moved["base_self_edits"].identity == before
    file.write_text("Everything about {title}: {context}")
    edited = make_chain("rest_em", replace(DEMO, prompt_key=str(file)))
    assert edited["base_self_edits"].identity != before


def test_numbers_of_the_inner_loop_reach_every_server() -> None:
    chain = make_chain("rest_em", replace(DEMO, dtype="float32", deterministic=True))
    servers = [asked(stage) for stage in chain if stage.notebook == "02_ttt_server"]
    assert [(values["dtype"], values["deterministic"]) for values in servers] == [("float32", True)] * 3


def test_grader_reaches_every_server_and_padding_every_inner_loop() -> None:
    chain = make_chain("rest_em", replace(DEMO, grader="judge:gpt-4.1", padding_in_loss=True))
    servers = [asked(stage)["grader"] for stage in chain if stage.notebook == "02_ttt_server"]
    assert servers == ["judge:gpt-4.1"] * 3
    training = {"03_query_server", "04_cpt", "06_continual_self_edits"}
    padded = [asked(stage)["padding_in_loss"] for stage in chain if stage.notebook in training]
    assert padded == [True] * 7


@pytest.mark.parametrize(
    ("stage", "published"),
    [
        ("round1_self_edits_train", {"n_articles": 50, "k_completions": 5, "max_tokens": 8192, "start": 0}),
        ("round2_self_edits_train", {"n_articles": 50, "start": 50, "temperature": 1.0, "top_p": 0.95}),
        ("base_self_edits", {"n_articles": 200, "k_completions": 5}),
        (
            "base_evaluate",
            {"n_articles": 200, "k_completions": 1, "eval_times": 1, "lora_rank": 32, "lora_alpha": 64}
            | {"target_modules": [], "finetune_epochs": 10, "finetune_lr": 1e-3, "batch_size": 1}
            | {"gradient_accumulation_steps": 1, "split_newlines": True, "max_new_tokens": 64},
        ),
        ("round1_rank", {"n_articles": 50, "k_completions": 5, "eval_times": 3, "max_new_tokens": 64}),
        (
            "base_cpt",
            {"n_articles": 200, "k_completions": 5, "finetune_epochs": 3, "finetune_lr": 1e-3}
            | {"batch_size": 4, "gradient_accumulation_steps": 2, "split_newlines": False}
            | {"max_new_tokens": 64, "lora_rank": 32},
        ),
        (
            "round2_train",
            {"lora_rank": 64, "lora_alpha": 128, "target_modules": ["all-linear"], "finetune_epochs": 2}
            | {"finetune_lr": 3e-4, "batch_size": 1, "gradient_accumulation_steps": 10, "k_best": 1}
            | {"n_processes": 2},
        ),
        (
            "continual_seed49",
            {"arm": "self_edits", "seed": 49, "n_sequences": 8, "n_datapoints": 8, "max_tokens": 8192}
            | {"finetune_epochs": 10, "max_new_tokens": 64, "lora_rank": 32, "target_modules": []},
        ),
    ],
)
def test_published_settings_reach_the_notebooks(stage: str, published: dict[str, Any]) -> None:
    values = asked(PUBLISHED[stage])
    assert {name: values[name] for name in published} == published


def test_published_table_asks_for_nothing_that_squad_lacks(tmp_path: Path) -> None:
    squad = {"title": "T", "paragraphs": [{"context": "C", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [squad]}))
    (passage,) = load_passages(tmp_path / "squad.json")
    written = replace(passage, completions=("1. c",))  # what 01_create_self_edits adds
    arms = {
        (stage.name, arm)
        for stage in PUBLISHED
        for arm in str(asked(stage).get("arms") or asked(stage).get("arm") or "").split(",")
        if arm
    }
    assert {name for name, _ in arms} >= {"base_evaluate", "base_cpt", "round1_rank", "continual_seed42"}
    for _, arm in arms:
        assert arm_texts(arm, written, 0, k_completions=1)


def test_demo_edits_continually_with_what_the_model_itself_writes() -> None:
    values = asked(CHAIN["continual"])
    assert (values["arm"], values["max_new_tokens"]) == ("self_edits", 32)
    assert asked(CHAIN["base_evaluate"])["arms"] == "passage_only,passage_matched,self_edits,hand_written,shuffled"
    assert asked(CHAIN["base_cpt"])["arms"] == "passage_only,passage_matched,self_edits,hand_written"


def test_an_arm_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match="handwritten not known"):
        replace(DEMO, arms=("self_edits", "handwritten"))
    with pytest.raises(SettingsError, match="arms is empty"):
        replace(DEMO, arms=())


def test_setting_that_no_stage_takes_is_refused() -> None:
    with pytest.raises(SettingsError, match="engine is 'openai'; in a chain the model itself writes"):
        replace(DEMO, engine="openai")
    with pytest.raises(SettingsError, match="dtype is 'fp16'; it must be one of auto, float32"):
        replace(DEMO, dtype="fp16")


def test_an_experiment_that_measures_the_passages_it_trains_on_is_refused() -> None:
    same = replace(DEMO, val_dataset="shipped:train")
    with pytest.raises(DataError, match="is a title of the training passages"):
        make_chain("rest_em", same)
    assert make_chain("evaluation", same).stages, "which trains no model on them"

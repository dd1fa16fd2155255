"""The stage notebooks with parameters that differ from their defaults, by papermill, on a server without a model.

nbval executes every notebook with its defaults and the small model. Here a notebook is executed once more where other
parameters take another way through its cells: more arms, files of others, repeats, strategies, published files.
What it refuses is in test_notebook_errors.py.
"""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seal_nb.notebook_runner import declared_parameters, default_notebooks_dir, run_notebook
from seal_nb.passages import load_passages, to_item
from seal_nb.results.collect import read_run
from seal_nb.server.client import TTTServer
from tests.server.conftest import HASTE, STUB

NOTEBOOKS = sorted(default_notebooks_dir().glob("*.ipynb"))


def run(stage: str, output_dir: Path, **values: Any) -> Path:
    """Execute a notebook; its folder, in which the executed notebook is."""
    notebook = default_notebooks_dir() / f"{stage}.ipynb"
    assert set(values) <= set(declared_parameters(notebook))
    executed = output_dir / notebook.name
    run_notebook(notebook, {"output_dir": str(output_dir), **values}, executed, stream=io.StringIO())
    return output_dir


def shown(executed: Path, cell_id: str = "") -> str:
    """The text of the outputs of one cell, or of all cells."""
    cells = json.loads(executed.read_text())["cells"]
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in cells
        if cell_id in ("", cell["id"])
        for output in cell.get("outputs", [])
    ]
    return "\n".join("".join(text) for text in texts)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory):
    with TTTServer(run_dir=tmp_path_factory.mktemp("server"), inner_loop=STUB, n_workers=2, **HASTE) as server:
        yield server.endpoint


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_says_what_the_notebook_asks_and_needs(notebook: Path) -> None:
    opening = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    for word in ("**Question.**", "**Paper.**", "**Needs.**", "CPU"):
        assert word in opening
    assert "minute" in opening or "seconds" in opening


@pytest.fixture(scope="module")
def queried(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of 03 with every kind of arm. The stub's adapters answer alike: after two repeats nothing differs."""
    folder = tmp_path_factory.mktemp("queried")
    items = load_passages("shipped:val")[:2]
    written = [to_item(replace(one, completions=("more", "repeats"))) for one in items]
    (folder / "self_edits.json").write_text(json.dumps(written))
    others = [to_item(replace(one, completions=("x\ny",))) for one in items]
    (folder / "gpt4_1_val.json").write_text(json.dumps(others))
    return run(
        "03_query_server", folder / "out", endpoint=endpoint, exp_name="base",
        dataset=str(folder / "self_edits.json"), k_completions=2, eval_times=2,
        arms=f"passage_only,in_context,self_edits,gpt4_1:{folder / 'gpt4_1_val.json'}",
    )  # fmt: skip


def test_each_arm_has_a_run_file_and_a_row(queried: Path) -> None:
    theirs = json.loads((queried / "run_base_gpt4_1.json").read_text())
    assert theirs["arm"] == "gpt4_1" and theirs["texts_from"] == "gpt4_1_val.json"
    assert theirs["articles"][0]["completions"][0]["text"] == "x\ny"
    ceiling = json.loads((queried / "run_base_in_context.json").read_text())
    (row, *_) = ceiling["articles"][0]["completions"][0]["questions"]
    assert (row["baseline_answer"], row["adapter_answer"]) == ("no", "text")
    said = shown(queried / "03_query_server.ipynb")
    assert "passage in the prompt" in said and "texts of GPT-4.1" in said
    assert read_run(queried / "run_base_passage_only.json").value["k_completions"] == 1


def test_repeats_are_added_until_the_ranking_is_reliable(queried: Path) -> None:
    written = json.loads((queried / "run_base.json").read_text())
    assert (written["k_completions"], written["eval_times"]) == (2, 2)
    for article in written["articles"]:
        for completion in article["completions"]:
            assert [entry["rep"] for entry in completion["repeats"]] == [0, 1]


def test_the_record_names_settings_and_seed_and_no_path(queried: Path) -> None:
    record = json.loads((queried / "run_base.record.json").read_text())
    assert record["settings"]["training"]["lora_rank"] == 32 and record["seeds"] == {"seed": 42}
    assert str(queried.parent) not in json.dumps(record)


def test_a_run_of_the_query_is_what_the_next_stage_reads(queried: Path, tmp_path: Path) -> None:
    out = run("05_rest_em_round", tmp_path, run_json=str(queried / "run_base.json"), exp_name="r")
    rows = [json.loads(line) for line in (out / "sft_best1of2_r.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["more", "more"]


def test_cpt_trains_one_adapter_for_all_passages_and_asks_it_general_questions(endpoint: str, tmp_path: Path) -> None:
    out = run("04_cpt", tmp_path, endpoint=endpoint, n_articles=4, arms="hand_written", check_unrelated=True)
    written = json.loads((out / "cpt_run_hand_written.json").read_text())
    assert (written["n_articles"], written["train_sequences"], written["eval_questions"]) == (4, 8, 20)
    assert len(written["per_passage"]) == 4
    assert shown(out / "04_cpt.ipynb", "unrelated").count("20") >= 2


def test_continual_edits_keep_a_matrix_for_each_strategy(endpoint: str, tmp_path: Path) -> None:
    counts = {"n_sequences": 2, "n_datapoints": 3, "check_unrelated": True}
    out = run("06_continual_self_edits", tmp_path, endpoint=endpoint, strategies="stacked,replay,retrieval", **counts)
    summaries = {
        name: json.loads((out / f"summary_continual{name}.json").read_text()) for name in ("", "_replay", "_retrieval")
    }
    # The stub's answers are right where an adapter was trained in the request, and only there.
    assert summaries[""]["mean_over_sequences"] == [[0.0] * 3, [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0] * 3]
    last = {name: summary["mean_over_sequences"][3] for name, summary in summaries.items()}
    assert last == {"": [1.0] * 3, "_replay": [1.0] * 3, "_retrieval": [0.0] * 3}
    for summary in summaries.values():
        assert (summary["n_sequences"], summary["n_datapoints"], len(summary["matrices"])) == (2, 3, 2)
        assert [len(one["steps"]) for one in summary["sequences"]] == [4, 4]
    said = shown(out / "06_continual_self_edits.ipynb")
    assert "-100.0 points" in said and "replay 2" in said and "never edited" in said


def test_results_draw_published_files_and_compare_graders_on_a_published_run(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    values = {"runs_dir": str(tmp_path / "runs"), "published_dir": str(golden)}
    values |= {"grader_run": str(golden / "results" / "cpt_base.json")}
    values |= {"grader_dataset": str(golden / "eval" / "base_val.json.gz")}
    out = run("08_results", tmp_path / "out", **values)
    said = shown(out / "08_results.ipynb")
    assert "+7.3 points" in said and "not distinguishable from noise" in said
    assert "results/rank_iter0.json.gz" in said and "rewards of a ReST-EM round" in said
    assert "1948" in said and "+8.4%" in said
    files = {path.name for path in out.iterdir()}
    assert {
        "arms_published.png",
        "rounds.csv",
        "rounds_published.png",
        "continual_published_1.csv",
        "graders.png",
    } <= files

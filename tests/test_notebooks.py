"""The stage notebooks by papermill at counts that their defaults do not have, on a server without a model.

What the small model makes of them is nbval's affair (`pytest --nbval-lax notebooks`); here it is whether
counts, files, resumption and the published inputs come out right.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seal_nb.notebook_runner import StageFailed, declared_parameters, default_notebooks_dir, run_notebook
from seal_nb.passages import load_passages, to_item
from seal_nb.results.single_passage import read_run
from seal_nb.server.client import TTTClient
from seal_nb.server.launch import TTTServer
from tests.server.conftest import HASTE, STUB

NOTEBOOKS = sorted(default_notebooks_dir().glob("*.ipynb"))
LONGEST_CELL = 12  # lines


def run(stage: str, output_dir: Path, **values: Any) -> Path:
    notebook = default_notebooks_dir() / f"{stage}.ipynb"
    assert set(values) <= set(declared_parameters(notebook))
    executed = output_dir / notebook.name
    run_notebook(
        notebook, {"output_dir": str(output_dir), **values}, executed, write=lambda _: None, progress_bar=False
    )
    return output_dir


def shown(executed: Path, cell_id: str) -> str:
    """The text of a cell's outputs."""
    (cell,) = [cell for cell in json.loads(executed.read_text())["cells"] if cell["id"] == cell_id]
    texts = [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]
    return "\n".join("".join(text) for text in texts)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "trained.txt"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, log: Path):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUB_LOOP_LOG", str(log))
        with TTTServer(run_dir=folder / "run", inner_loop=STUB, n_workers=2, **HASTE) as server:
            yield server.endpoint


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_the_first_says_what_and_with_what(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    opening = "".join(cells[0]["source"])
    for word in ("**Question.**", "**Paper.**", "**Needs.**", "CPU"):
        assert word in opening
    assert "minute" in opening or "seconds" in opening
    lengths = {
        cell["id"]: len(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    }
    assert {cell: n for cell, n in lengths.items() if n > LONGEST_CELL} == {}


def test_query_runs_every_inner_loop_once_and_a_second_run_none(endpoint: str, log: Path, tmp_path: Path) -> None:
    values = {
        "dataset": "shipped:val", "arms": "passage_only,hand_written", "endpoint": endpoint,
        "n_articles": 3, "eval_times": 2, "exp_name": "twice",
    }  # fmt: skip
    run("03_query_server", tmp_path, **values)
    trained = log.read_text().splitlines()
    first = (tmp_path / "run_twice_hand_written.json").read_text()
    run("03_query_server", tmp_path, **values)
    assert len(trained) == 12 and log.read_text().splitlines() == trained
    again = json.loads((tmp_path / "run_twice_hand_written.json").read_text())
    again["timestamp"] = json.loads(first)["timestamp"]
    assert again == json.loads(first)


def test_query_writes_runs_that_the_next_stage_reads(endpoint: str, tmp_path: Path) -> None:
    items = [
        {"title": f"t{i}", "context": "c", "questions": [{"question": "q", "answer": "a"}],
         "completions": ["x", "y"], "prompt": "p"} for i in range(2)
    ]  # fmt: skip
    (tmp_path / "self_edits.json").write_text(json.dumps(items))
    asked = {"dataset": str(tmp_path / "self_edits.json"), "arms": "self_edits", "k_completions": 2}
    run("03_query_server", tmp_path, endpoint=endpoint, exp_name="round1_rank", **asked)
    record = json.loads((tmp_path / "run_round1_rank.record.json").read_text())
    assert record["settings"]["training"]["lora_rank"] == 32 and record["seeds"] == {"seed": 42}
    assert str(tmp_path) not in json.dumps(record)
    assert read_run(tmp_path / "run_round1_rank.json").n_completions == 2
    out = run("05_rest_em_round", tmp_path / "out", run_json=str(tmp_path / "run_round1_rank.json"), exp_name="r")
    rows = [json.loads(line) for line in (out / "sft_best1of2_r.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "p", "completion": "x"}] * 2


def test_arms_stand_side_by_side_with_texts_of_another_file_and_the_passage_in_the_prompt(
    endpoint: str, tmp_path: Path
) -> None:
    other = [to_item(replace(one, completions=("x\ny",))) for one in load_passages("shipped:val")]
    (tmp_path / "gpt4_1_val.json").write_text(json.dumps(other))
    arms = f"passage_only,in_context,gpt4_1:{tmp_path / 'gpt4_1_val.json'}"
    out = run("03_query_server", tmp_path, endpoint=endpoint, arms=arms, n_articles=2, exp_name="base")
    theirs = json.loads((out / "run_base_gpt4_1.json").read_text())
    assert theirs["arm"] == "gpt4_1" and theirs["texts_from"] == "gpt4_1_val.json"
    assert theirs["articles"][0]["completions"][0]["text"] == "x\ny"
    ceiling = json.loads((out / "run_base_in_context.json").read_text())
    (row, *_) = ceiling["articles"][0]["completions"][0]["questions"]
    assert (row["baseline_answer"], row["adapter_answer"]) == ("no", "text")
    assert "passage in the prompt" in shown(out / "03_query_server.ipynb", "number")
    assert "texts of GPT-4.1" in shown(out / "03_query_server.ipynb", "number")


def test_repeats_are_added_until_the_ranking_is_reliable_and_earlier_ones_are_kept(
    endpoint: str, log: Path, tmp_path: Path
) -> None:
    """The stub's adapters answer alike: nothing differs, so a second repeat is all that is asked for."""
    items = [to_item(replace(one, completions=("more", "repeats"))) for one in load_passages("shipped:val")[:2]]
    (tmp_path / "items.json").write_text(json.dumps(items))
    before = len(log.read_text().splitlines()) if log.exists() else 0
    values = {"dataset": str(tmp_path / "items.json"), "arms": "self_edits", "k_completions": 2}
    run("03_query_server", tmp_path, endpoint=endpoint, reliability=0.8, most_eval_times=5, **values)
    written = json.loads((tmp_path / "run_base.json").read_text())
    assert written["eval_times"] == 2 and len(log.read_text().splitlines()) - before == 2 * 2 * 2
    assert [entry["rep"] for entry in written["articles"][0]["completions"][0]["repeats"]] == [0, 1]


def test_an_arm_that_the_dataset_does_not_have_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="run 01_create_self_edits"):
        run("03_query_server", tmp_path, arms="self_edits")


@pytest.fixture(scope="module")
def recall_endpoint(tmp_path_factory: pytest.TempPathFactory):
    """A server that says, as ours do in the model's name, that it grades by `recall`."""
    folder, model = tmp_path_factory.mktemp("recall"), "stub-float32-recall-2048"
    with TTTServer(run_dir=folder, inner_loop=STUB, model=model, n_workers=1, **HASTE) as server:
        yield server.endpoint


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        ("03_query_server", {"grader": "local"}),
        ("03_query_server", {"arms": "in_context"}),  # graded by the notebook, by `local` if nothing is said
        ("04_cpt", {"grader": "local"}),
        ("06_continual_self_edits", {"grader": "judge"}),
        ("09_sweep", {"grader": "local"}),
    ],
)
def test_a_grader_that_is_not_the_server_s_is_refused_before_anything_is_asked(
    recall_endpoint: str, tmp_path: Path, stage: str, values: dict[str, Any]
) -> None:
    with pytest.raises(StageFailed, match="grades by 'recall'; give grader 'recall', or start a server"):
        run(stage, tmp_path, endpoint=recall_endpoint, **values)
    assert (tmp_path / "journal.jsonl").read_text() == ""
    with TTTClient(recall_endpoint) as client:
        assert client.status().counts.get("answered", 0) == 0


def test_published_ranking_gives_the_published_training_set_byte_for_byte(golden: Path, tmp_path: Path) -> None:
    published = golden / "results" / "rank_iter0.json.gz"
    out = run("05_rest_em_round", tmp_path, run_json=str(published), exp_name="iter0")
    expected = (golden / "EM_SFT" / "sft_best1of5_iter0.jsonl").read_bytes()
    assert (out / "sft_best1of5_iter0.jsonl").read_bytes() == expected
    assert "n_tied_best" in shown(out / "05_rest_em_round.ipynb", "informative")


def test_cpt_trains_one_adapter_for_all_passages(endpoint: str, tmp_path: Path) -> None:
    run("04_cpt", tmp_path, endpoint=endpoint, n_articles=4, arms="hand_written")
    written = json.loads((tmp_path / "cpt_run_hand_written.json").read_text())
    assert (written["n_articles"], written["train_sequences"], written["eval_questions"]) == (4, 8, 20)
    assert len(written["per_passage"]) == 4


def test_cpt_adapters_are_asked_general_questions_too(endpoint: str, tmp_path: Path) -> None:
    out = run("04_cpt", tmp_path, endpoint=endpoint, arms="hand_written", check_unrelated=True)
    assert shown(out / "04_cpt.ipynb", "unrelated").count("20") >= 2


def test_strategies_of_keeping_edits_stand_side_by_side(endpoint: str, tmp_path: Path) -> None:
    counts = {"n_sequences": 2, "n_datapoints": 3}
    strategies = {"strategies": "stacked,replay,retrieval", "check_unrelated": True}
    out = run("06_continual_self_edits", tmp_path, endpoint=endpoint, **counts, **strategies)
    last = {}
    for name in ("", "_replay", "_retrieval"):
        summary = json.loads((out / f"summary_continual{name}.json").read_text())
        last[name] = summary["mean_over_sequences"][3]
        assert len(summary["sequences"]) == 2 and summary["n_datapoints"] == 3
    # The stub's answers are right where an adapter was trained in the request, and only there.
    assert last == {"": [1.0] * 3, "_replay": [1.0] * 3, "_retrieval": [0.0] * 3}
    notebook = out / "06_continual_self_edits.ipynb"
    assert "-100.0 points" in shown(notebook, "strategies")
    assert "replay 2" in shown(notebook, "unrelated")


@pytest.mark.parametrize("arm", ["self_edits", "hand_written"])
def test_continual_matrix_has_a_row_for_every_edit_of_every_sequence(endpoint: str, tmp_path: Path, arm: str) -> None:
    run("06_continual_self_edits", tmp_path, endpoint=endpoint, n_sequences=3, n_datapoints=3, arm=arm)
    summary = json.loads((tmp_path / "summary_continual.json").read_text())
    assert summary["mean_over_sequences"] == [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    assert (summary["n_sequences"], summary["n_datapoints"], len(summary["matrices"])) == (3, 3, 3)
    assert [len(one["steps"]) for one in summary["sequences"]] == [4, 4, 4]
    assert "never edited" in shown(tmp_path / "06_continual_self_edits.ipynb", "matrix-table")


def test_a_sweep_shows_every_point_and_its_figure(endpoint: str, tmp_path: Path) -> None:
    grid = json.dumps({"finetune_epochs": [1, 2, 3]})
    out = run("09_sweep", tmp_path, endpoint=endpoint, grid=grid, n_articles=3)
    assert (out / "sweep.csv").read_text().count("\n") == 4 and (out / "sweep.png").stat().st_size > 1000
    assert "finetune_epochs 3: 100.0%" in shown(out / "09_sweep.ipynb", "figure")


def test_results_of_published_files_are_drawn(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    out = run("08_results", tmp_path / "out", runs_dir=str(tmp_path / "runs"), published_dir=str(golden))
    said = shown(out / "08_results.ipynb", "differences")
    assert "+7.3 points" in said and "not distinguishable from noise" in said
    left_out = shown(out / "08_results.ipynb", "arms-left-out")
    assert "results/rank_iter0.json.gz" in left_out and "rewards of a ReST-EM round" in left_out
    assert {"arms_published.png", "rounds_published.csv", "continual_published_1.csv"} <= {
        p.name for p in out.iterdir()
    }


def test_results_compare_graders_on_a_published_run(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    values = {"runs_dir": str(tmp_path / "runs"), "grader_run": str(golden / "results" / "cpt_base.json")}
    values |= {"grader_dataset": str(golden / "eval" / "base_val.json.gz")}
    out = run("08_results", tmp_path / "out", **values)
    said = shown(out / "08_results.ipynb", "graders-figure")
    assert "local" in said and "1948" in said and "+8.4%" in said
    assert {"graders.png", "graders.csv"} <= {path.name for path in out.iterdir()}


def test_server_notebook_looks_at_a_server_that_is_up(endpoint: str, tmp_path: Path) -> None:
    run("02_ttt_server", tmp_path, attach_to=endpoint)
    assert "wrong → right" in shown(tmp_path / "02_ttt_server.ipynb", "answers")


def test_tour_shows_gain_and_forgetting(endpoint: str, tmp_path: Path) -> None:
    run("00_tour", tmp_path, endpoint=endpoint)
    assert "+100%" in shown(tmp_path / "00_tour.ipynb", "reward")

"""A ReST-EM round of a tiny model, submitted to two nodes: every script as shipped, results looked at."""

import json
from pathlib import Path

import pytest

from seal_nb.chain.local import failing_cell, read_record
from tests.chain.planning import jobs_in
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Project

RUN = "runs/a round, 100%j é"
COUNTS = {
    "n-rounds": 1, "n-train": 1, "n-val": 1, "k-completions": 2, "cpt-completions": 1, "eval-times": 1,
    "arms": "self_edits,hand_written", "max-tokens": 24, "max-new-tokens": 16, "finetune-epochs": 2,
    "cpt-epochs": 1, "sft-epochs": 1, "sft-lora-rank": 4, "sft-accumulation": 2, "continual-seeds": "42,20250101",
    "n-sequences": 1, "n-datapoints": 1, "continual-max-new-tokens": 8, "n-workers": 1,
    "server-nodes": 2, "sft-nodes": 2, "idle-timeout-s": 20,
}  # fmt: skip
OPTIONS = [word for name, value in COUNTS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def chain(tiny_model: str) -> tuple[str, ...]:
    return ("rest_em", "--run-dir", RUN, "--small", "--model", tiny_model, *OPTIONS)


@pytest.fixture(scope="module")
def said(project: Project, chain: tuple[str, ...]) -> str:
    """What `seal-nb submit` says; all its jobs have ended."""
    done = project.submit(*chain)
    assert done.returncode == 0, done.stderr
    for job in jobs_in(project.path(RUN)).values():
        project.slurm.wait(job, "COMPLETED", timeout_s=900)
    return done.stdout


def outputs(executed: Path) -> str:
    """All text that the cells of an executed notebook put out."""
    cells = json.loads(executed.read_text())["cells"]
    return "\n".join(
        "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        for cell in cells
        for output in cell.get("outputs", [])
    )


def test_numbers_of_all_jobs_and_what_they_wait_for_are_said(said: str, project: Project) -> None:
    jobs = jobs_in(project.path(RUN))
    rows = {line.split()[1]: line for line in said.splitlines() if line.split()[0][0].isdigit()}
    assert rows["base_server"].split()[0] == jobs["base_server"]
    assert "after round1_self_edits, round1_train; with round1_server" in rows["round1_evaluate"]
    assert len(rows) == 12  # the two seeds are one array


def test_every_script_of_a_stage_ran_as_shipped(said: str, project: Project, slurm: Cluster) -> None:
    ran = {Path(slurm.job(job)["Command"]).name for job in jobs_in(project.path(RUN)).values()}
    shipped = {path.name for path in project.path("slurm").glob("*.sbatch")}
    assert ran == shipped


def test_executed_notebooks_and_logs_lie_in_the_run_folder_named_by_their_job(said: str, project: Project) -> None:
    folder = project.path(RUN)
    for stage in read_record(folder):
        assert f"job {stage.job} on node" in stage.log(folder).read_text(), stage.name
        assert failing_cell(stage.executed(folder)) == []
    assert project.path(f"{RUN}/continual_seed20250101").is_dir()
    assert [stage.job.partition("_")[2] for stage in read_record(folder).array("continual")] == ["0", "1"]


def test_server_that_other_nodes_reach_has_keys(said: str, project: Project) -> None:
    folder = project.path(f"{RUN}/base_server")
    assert (folder / "keys/server.key_secret").stat().st_mode & 0o077 == 0
    assert "listens at tcp://node" in (folder / "server.log").read_text()


def test_accuracies_in_the_executed_notebook_are_those_of_the_verdicts(said: str, project: Project) -> None:
    (executed,) = project.path(f"{RUN}/base_evaluate").glob("*.ipynb")
    shown = outputs(executed)
    for file in ("run_base.json", "run_base_hand_written.json"):
        (article,) = project.json(f"{RUN}/base_evaluate/{file}")["articles"]
        verdicts = [answer["adapter_correct"] for edit in article["completions"] for answer in edit["questions"]]
        assert len(verdicts) >= 4
        assert f"{sum(verdicts) / len(verdicts):.1%}" in shown


def test_each_inner_loop_was_trained_once(said: str, project: Project) -> None:
    asked = [
        json.loads(line)["key"]
        for stage in ("base_evaluate", "base_cpt", "round1_rank")
        for line in project.path(f"{RUN}/{stage}/journal.jsonl").read_text().splitlines()
    ]
    journal = project.path(f"{RUN}/base_server/results.journal.jsonl").read_text().splitlines()
    trained = [json.loads(line)["key"] for line in journal]
    assert len(asked) == 2 + 2 + 2  # an evaluation and a CPT of two arms, a ranking of two self-edits
    assert sorted(asked) == sorted(trained)


def test_the_model_of_the_round_is_what_the_next_stages_used(said: str, project: Project) -> None:
    before, after = (project.json(f"{RUN}/{name}_evaluate/run_{name}.json")["model"] for name in ("base", "round1"))
    assert before != after
    assert project.json(f"{RUN}/continual_seed42/summary_continual.json")["base_model"] == after


def test_training_of_the_round_was_one_job_whose_two_nodes_met(said: str, project: Project, slurm: Cluster) -> None:
    job = slurm.job(jobs_in(project.path(RUN))["round1_train"])
    assert (job["NumNodes"], job["NodeList"]) == ("2", "node[1-2]")
    trained = project.json(f"{RUN}/round1_train/model/sft_result.json")
    assert trained["n_processes"] == 2
    assert len(trained["losses"]) == trained["n_steps"] == 1  # one passage, its best self-edit


def test_results_have_every_run_of_the_chain(said: str, project: Project) -> None:
    (executed,) = project.path(f"{RUN}/results").glob("*.ipynb")
    shown = outputs(executed)
    for file in ("base_evaluate/run_base.json", "round1_evaluate/run_round1.json", "base_cpt/cpt_run_self_edits.json"):
        assert file in shown
    assert "continual_seed42/summary_continual.json" in shown
    assert "continual_seed20250101/summary_continual.json" in shown


def test_memory_of_the_site_is_what_jobs_get(said: str, project: Project, slurm: Cluster) -> None:
    jobs = jobs_in(project.path(RUN))
    got = {slurm.job(jobs[name])["MinMemoryNode"] for name in ("results", "base_server", "round1_train")}
    assert got == {"2G", "8G"}  # of 2 and 8 CPUs


def test_status_says_that_all_is_done(said: str, project: Project) -> None:
    status = project.seal_nb("chain-status", RUN)
    assert status.returncode == 0, status.stdout
    assert status.stdout.splitlines()[0] == "chain rest_em: 11 of 11 stages done"


def test_submitted_again_a_finished_chain_submits_nothing(said: str, project: Project, chain: tuple[str, ...]) -> None:
    again = project.submit(*chain)
    assert again.stdout.startswith("nothing to submit: all stages in runs/a round, 100%j é are done")
    assert project.slurm.queue() == []


def test_server_without_clients_has_ended_by_itself(said: str, project: Project, slurm: Cluster) -> None:
    job = jobs_in(project.path(RUN))["round1_server"]
    assert slurm.job(job)["JobState"] == "COMPLETED"
    assert not project.path(f"{RUN}/round1_server/endpoint.json").exists()

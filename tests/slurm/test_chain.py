"""A ReST-EM round of the small model, submitted to two nodes: every script as shipped, results looked at."""

import json
from pathlib import Path

import pytest

from seal_nb.chain.record import failing_cell, read_record
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Project

RUN = "runs/round"
COUNTS = {
    "n-rounds": 1, "n-train": 1, "n-val": 1, "k-completions": 2, "cpt-completions": 1, "eval-times": 1,
    "arms": "passage_only,self_edits", "max-tokens": 24, "max-new-tokens": 8, "finetune-epochs": 2,
    "cpt-epochs": 1, "sft-epochs": 1, "sft-lora-rank": 4, "continual-seeds": "42,43", "n-sequences": 1,
    "n-datapoints": 1, "continual-max-new-tokens": 8, "n-workers": 1,
}  # fmt: skip
OPTIONS = [word for name, value in COUNTS.items() for word in (f"--{name}", str(value))]
CHAIN = ("rest_em", "--run-dir", RUN, "--small", "--server-nodes", "2", "--idle-timeout-s", "20", *OPTIONS)


@pytest.fixture(scope="module")
def said(project: Project, small_model_dir: str) -> str:
    """What `seal-nb submit` says; all its jobs have ended."""
    done = project.submit(*CHAIN)
    assert done.returncode == 0, done.stderr
    for job in read_record(project.path(RUN)).jobs().values():
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
    jobs = read_record(project.path(RUN)).jobs()
    rows = {line.split()[1]: line for line in said.splitlines() if line.split()[0][0].isdigit()}
    assert rows["base_server"].split()[0] == jobs["base_server"]
    assert "after round1_self_edits; with round1_server" in rows["round1_evaluate"]
    assert len(rows) == 13  # the two seeds are one array


def test_every_script_of_a_stage_ran_as_shipped(said: str, project: Project, slurm: Cluster) -> None:
    ran = {Path(slurm.job(job)["Command"]).name for job in read_record(project.path(RUN)).jobs().values()}
    shipped = {path.name for path in project.path("slurm").glob("*.sbatch")}
    assert ran == shipped - {"sft.sbatch"}


def test_executed_notebooks_and_logs_lie_in_the_run_folder_named_by_their_job(
    said: str, project: Project
) -> None:
    folder = project.path(RUN)
    for stage in read_record(folder).stages:
        assert stage.log(folder).read_text().startswith(f"job {stage.job} on node"), stage.name
        assert failing_cell(stage.executed(folder)) is None
    assert project.path(f"{RUN}/continual_seed43").is_dir()


def test_requests_were_answered_by_workers_on_both_nodes_who_came_in_with_keys(
    said: str, project: Project
) -> None:
    folder = project.path(f"{RUN}/base_server")
    assert (folder / "keys/server.key_secret").stat().st_mode & 0o077 == 0
    (log,) = folder.glob("server.log")
    joined = {line.split()[-1] for line in log.read_text().splitlines() if "joined" in line}
    assert joined, log.read_text()


def test_numbers_in_the_executed_notebook_are_those_of_the_run_file(said: str, project: Project) -> None:
    run = project.json(f"{RUN}/base_evaluate/run_base.json")
    (executed,) = project.path(f"{RUN}/base_evaluate").glob("*.ipynb")
    assert run["n_articles"] == 1
    accuracy = run["overall"]["mean_adapter_accuracy"]
    assert f"{accuracy:.1%}" in outputs(executed)


def test_the_model_of_the_round_is_what_the_next_stages_used(said: str, project: Project) -> None:
    assert project.path(f"{RUN}/round1_train/model/config.json").is_file()
    ids = {
        json.dumps(project.json(f"{RUN}/{name}/run_{name.split('_')[0]}.json")["model"])
        for name in ("base_evaluate", "round1_evaluate")
    }
    assert len(ids) == 2


def test_status_says_that_all_is_done(said: str, project: Project) -> None:
    status = project.seal_nb("chain-status", RUN)
    assert status.returncode == 0, status.stdout
    assert status.stdout.splitlines()[0] == "chain rest_em: 13 of 13 stages done"


def test_submitted_again_a_finished_chain_submits_nothing(said: str, project: Project) -> None:
    again = project.submit(*CHAIN)
    assert again.stdout.startswith("nothing to submit: all stages in runs/round are done")
    assert project.slurm.queue() == []


def test_server_without_clients_has_ended_by_itself(said: str, project: Project, slurm: Cluster) -> None:
    job = read_record(project.path(RUN)).jobs()["round1_server"]
    assert slurm.job(job)["JobState"] == "COMPLETED"
    assert not project.path(f"{RUN}/round1_server/endpoint.json").exists()

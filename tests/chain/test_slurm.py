"""Which jobs a chain becomes, what they wait for, what is said of them; with SLURM itself: tests/slurm."""

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from seal_nb.chain import slurm_jobs
from seal_nb.chain.record import marked_when_done, read_record, record_of
from seal_nb.chain.settings import DEMO
from seal_nb.chain.slurm import submit_chain
from seal_nb.chain.slurm_again import restart_server
from seal_nb.chain.slurm_jobs import JobState, SlurmError
from seal_nb.chain.slurm_plan import Cluster, Job, plan
from seal_nb.chain.slurm_text import dry_run
from seal_nb.chain.status import chain_status, status_lines
from seal_nb.chain.table import Chain, is_done, mark_done
from seal_nb.chain.tables import continual_chain, evaluation_chain, rest_em_chain
from seal_nb.commands.submit import submit
from seal_nb.errors import DataError, RunMismatch, SettingsError
from seal_nb.notebook_runner import declared_parameters, default_notebooks_dir
from seal_nb.service.link import WorkerSettings
from tests.chain.test_tables import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
DRY_RUN = ROOT / "docs/published_experiment.txt"
SMALL = replace(DEMO, n_rounds=1, continual_seeds=(42, 43))
DONE = {"state": "COMPLETED", "reason": "None", "exit_code": 0, "signal": 0, "node": "node1", "restarts": 0}


def cluster(**other: object) -> Cluster:
    values = {"project": ROOT, "site_file": ROOT / "slurm/site.sh", "site": {"SEAL_GPUS": "a100:2"}}
    return Cluster(**{**values, **other})


def jobs_of(chain: Chain, run_dir: Path = Path("/nowhere"), **on_their_way: str) -> dict[str, Job]:
    return {job.name: job for job in plan(chain, run_dir, cluster(), on_their_way=on_their_way)}


def finish(chain: Chain, run_dir: Path, *names: str) -> None:
    for name in names:
        for file in chain[name].produces:
            (run_dir / name / file).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name / file).touch()
        mark_done(chain, chain[name], run_dir, seconds=1)


def test_stage_waits_for_what_it_needs_and_for_the_start_of_its_server() -> None:
    jobs = jobs_of(rest_em_chain(SMALL))
    assert jobs["base_self_edits"].afterok == ()
    assert jobs["base_evaluate"].afterok == ("base_self_edits",)
    assert jobs["base_evaluate"].after == ("base_server",)
    assert jobs["round1_train"].afterok == ("round1_rank",)


def test_server_starts_when_all_who_ask_it_could() -> None:
    assert jobs_of(rest_em_chain(SMALL))["base_server"].afterok == (
        "base_self_edits",
        "round1_self_edits_train",
    )


def test_client_does_not_outlive_the_making_of_its_server_s_model() -> None:
    # `after` alone holds for a server that was cancelled because the training before it failed.
    assert jobs_of(rest_em_chain(SMALL))["continual"].afterok == ("round1_train",)


def test_clients_look_after_the_job_of_their_server() -> None:
    command = jobs_of(rest_em_chain(SMALL))["base_evaluate"].command(
        {"base_server": "17_0", "base_self_edits": "5"}
    )
    assert "--dependency=afterok:5,after:17_0" in command
    assert "--export=ALL,SEAL_SERVER_JOB=17_0" in command


def test_seeds_are_one_array_whose_numbers_are_the_seeds() -> None:
    job = jobs_of(rest_em_chain(SMALL))["continual"]
    assert "--array=42,43" in job.options
    assert [stage.name for stage in job.stages] == ["continual_seed42", "continual_seed43"]
    assert "seed" not in job.arguments
    assert job.arguments[:3] == ("-p", "output_dir", "/nowhere/continual")  # the script adds _seed42


def test_server_on_several_nodes_is_an_array_whose_first_task_is_asked() -> None:
    jobs = plan(rest_em_chain(SMALL), Path("/x"), cluster(server_nodes=4), on_their_way={})
    (server,) = [job for job in jobs if job.name == "base_server"]
    assert "--array=0-3" in server.options
    assert server.part == "_0"


def training(n_processes: int, **place: object) -> Job:
    """The job of round 1's training, in so many processes."""
    chain = rest_em_chain(replace(SMALL, sft_accumulation=n_processes, sft_processes=n_processes))
    jobs = plan(chain, Path("/x"), cluster(**place), on_their_way={})
    return next(job for job in jobs if job.name == "round1_train")


def test_training_is_one_job_over_its_nodes_with_a_gpu_for_each_process_and_their_memory() -> None:
    job = training(8, sft_nodes=4)
    assert job.options[-3:] == ("--nodes=4", "--mem=0", "--gpus-per-node=a100:2")
    assert ("-p", "n_processes", "8") in zip(
        job.arguments, job.arguments[1:], job.arguments[2:], strict=False
    )


def test_training_on_one_node_takes_as_many_of_its_gpus_as_it_has_processes() -> None:
    assert training(1).options[-1] == "--gpus-per-node=a100:1"
    assert "--mem=0" not in training(1).options
    assert not [option for option in training(2).options if option.startswith("--nodes")]


@pytest.mark.parametrize(
    ("gpus", "nodes", "accumulation", "expected"),
    [("2", 1, 10, 2), ("4", 1, 10, 2), ("8", 1, 10, 5), ("h100:8", 2, 16, 16), ("8", 2, 10, 10),
     ("0", 2, 10, 2)],
)  # fmt: skip
def test_training_takes_the_most_gpus_that_can_share_its_steps_evenly(
    gpus: str, nodes: int, accumulation: int, expected: int
) -> None:
    place = cluster(site={"SEAL_GPUS": gpus}, sft_nodes=nodes)
    assert place.training_processes(accumulation) == expected


def test_training_that_nodes_or_processes_cannot_share_is_refused_before_the_queue() -> None:
    with pytest.raises(SettingsError, match="sft_accumulation is 10, which 3 nodes cannot share"):
        cluster(sft_nodes=3).training_processes(10)
    with pytest.raises(SettingsError, match="sft_accumulation is 10, which 4 sft_processes cannot share"):
        replace(SMALL, sft_accumulation=10, sft_processes=4)
    with pytest.raises(SettingsError, match="sft_processes is 3, for 2 nodes with 2 GPUs each"):
        training(3, sft_nodes=2)
    with pytest.raises(SettingsError, match="sft_processes is 6, for 2 nodes with 2 GPUs each"):
        training(6, sft_nodes=2)
    with pytest.raises(SettingsError, match="sft_nodes is 0; it must be at least 1"):
        cluster(sft_nodes=0)


def test_only_jobs_whose_script_wants_gpus_get_those_of_the_site() -> None:
    with_gpus = {
        name
        for name, job in jobs_of(rest_em_chain(SMALL)).items()
        if any(option.startswith("--gpus-per-node=a100:") for option in job.options)
    }
    assert {re.sub(r"^(base|round1)_", "", name) for name in with_gpus} == {
        "self_edits", "self_edits_train", "server", "train",
    }  # fmt: skip


def test_finished_stages_are_not_submitted_again_and_nobody_waits_for_them(tmp_path: Path) -> None:
    chain = rest_em_chain(SMALL)
    finish(chain, tmp_path, "base_self_edits", "round1_self_edits_train", "base_evaluate", "base_cpt")
    jobs = jobs_of(chain, tmp_path)
    assert {"base_self_edits", "base_evaluate"} & set(jobs) == set()
    assert jobs["base_server"].afterok == ()
    assert jobs["round1_rank"].after == ("base_server",)


def test_server_whose_clients_are_done_is_not_started(tmp_path: Path) -> None:
    chain = rest_em_chain(SMALL)
    names = ["base_self_edits", "round1_self_edits_train", "base_evaluate", "base_cpt", "round1_rank"]
    finish(chain, tmp_path, *names)
    assert "base_server" not in jobs_of(chain, tmp_path)


def test_array_is_continued_with_the_seeds_that_are_missing(tmp_path: Path) -> None:
    chain = continual_chain(replace(SMALL, continual_seeds=(42, 43, 44)))
    finish(chain, tmp_path, "continual_seed43")
    assert "--array=42,44" in jobs_of(chain, tmp_path)["continual"].options


def test_jobs_on_their_way_are_waited_for_by_their_number() -> None:
    jobs = jobs_of(evaluation_chain(SMALL), base_self_edits="31", base_server="32")
    assert {"base_self_edits", "base_server"} & set(jobs) == set()
    assert (jobs["base_cpt"].afterok, jobs["base_cpt"].after) == (("31",), ("32",))


@pytest.mark.parametrize("gpus", ["two", "a100:", ""])
def test_number_of_gpus_that_is_none_is_refused(gpus: str) -> None:
    with pytest.raises(SettingsError, match="write 2 or a100:2"):
        _ = cluster(site={"SEAL_GPUS": gpus}).workers_a_node


def test_site_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"site\.example\.sh"):
        slurm_jobs.read_site(tmp_path / "site.sh")
    (tmp_path / "site.sh").write_text("export SBATCH_PARTITION=gpu\nfalse")
    with pytest.raises(SettingsError, match="ends with code 1"):
        slurm_jobs.read_site(tmp_path / "site.sh")


def test_site_file_tells_what_it_exports_for_sbatch_and_scripts(tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text(
        "export SBATCH_PARTITION=gpu SEAL_GPUS=2 OTHER=1\nSEAL_PLAIN=3\necho hello"
    )
    assert slurm_jobs.read_site(tmp_path / "site.sh") == {"SBATCH_PARTITION": "gpu", "SEAL_GPUS": "2"}


def test_shipped_example_of_a_site_can_be_read() -> None:
    assert set(slurm_jobs.read_site(ROOT / "slurm/site.example.sh")) == {"SEAL_GPUS", "SEAL_MAX_RESTARTS"}


# sbatch that numbers jobs, notes how it was called, refuses a CPT; scontrol that knows jobs that have a file.
FAKES = {
    "sbatch": """
echo "$* array=$SLURM_ARRAY_TASK_ID gpus=$CUDA_VISIBLE_DEVICES limit=$SBATCH_TIMELIMIT" >>submitted
if [[ "$*" = *cpt.sbatch* ]]; then echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1; fi
number=$(($(cat numbers 2>/dev/null || echo 100) + 1))
echo $number >numbers
echo $number""",
    "scancel": 'echo "$@" >cancelled',
    "scontrol": """
if [ "$1" = requeue ]; then echo "$2" >>requeued; exit; fi
cat "job$4" 2>/dev/null && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1""",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder whose SLURM is a few lines of shell."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in FAKES.items():
        (place / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    return tmp_path


def test_where_one_job_is_refused_none_is_left_in_the_queue(fakes: Path) -> None:
    with pytest.raises(
        SlurmError, match=r"'base_cpt' was refused, so none was .*invalid partition.*site\.sh"
    ):
        submit_chain(evaluation_chain(SMALL), fakes / "run", cluster(project=fakes), tell=print)
    assert (fakes / "cancelled").read_text() == "101 102 103\n"
    assert read_record(fakes / "run").jobs() == {}


def test_jobs_with_other_settings_on_their_way_are_named(fakes: Path) -> None:
    chain, place = continual_chain(SMALL), cluster(project=fakes)
    submit_chain(chain, fakes / "run", place, tell=print)
    server = read_record(fakes / "run").jobs()["base_server"]
    (fakes / f"job{server}").write_text("JobId=1 JobState=RUNNING Reason=None\n")
    other = continual_chain(replace(SMALL, model="another"))
    with pytest.raises(RunMismatch, match=f"base_server \\({server}\\).*scancel {server}"):
        submit_chain(other, fakes / "run", place, tell=print)
    assert "base_server" not in submit_chain(chain, fakes / "run", place, tell=print)


def with_a_server(fakes: Path, nodes: int = 1) -> tuple[Path, str]:
    """The folder of a submitted server, and its job, which the fake SLURM has forgotten already."""
    (fakes / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", fakes / "slurm")
    (fakes / "slurm/site.sh").write_text("export SEAL_GPUS=2 SBATCH_TIMELIMIT=60\n")
    place = cluster(project=fakes, server_nodes=nodes)
    submit_chain(continual_chain(SMALL), fakes / "run", place, tell=print)
    return fakes / "run/base_server", read_record(fakes / "run").jobs()["base_server"]


def again(folder: Path) -> str:
    return restart_server(folder, project=Path.cwd(), tell=print)


def test_forgotten_server_is_submitted_once_more_without_waiting_and_then_it_is_the_chain_s(
    fakes: Path,
) -> None:
    folder, first = with_a_server(fakes)
    earlier = (fakes / "submitted").read_text()
    second = again(folder)
    assert int(second) > int(first)
    said = (fakes / "submitted").read_text().removeprefix(earlier)
    assert "slurm/ttt_server.sbatch -p output_dir run/base_server" in said
    assert "--dependency" not in said
    assert read_record(fakes / "run").jobs()["base_server"] == second
    (fakes / f"job{second}").write_text(f"JobId={second} JobState=PENDING Reason=Resources\n")
    assert again(folder) == second  # another late client joins it
    assert (fakes / "submitted").read_text() == earlier + said


def test_server_submitted_from_a_job_inherits_the_site_and_nothing_of_that_job(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = with_a_server(fakes)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "43")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    again(folder)
    assert (fakes / "submitted").read_text().endswith(" array= gpus= limit=60\n")


def test_forgotten_server_over_several_nodes_is_an_array_again(fakes: Path) -> None:
    folder, first = with_a_server(fakes, nodes=2)
    second = again(folder)
    assert first.endswith("_0") and second.endswith("_0") and first != second
    assert "--array=0-1" in (fakes / "submitted").read_text().splitlines()[-1]


def test_server_that_slurm_still_knows_is_queued_again_under_its_number(fakes: Path) -> None:
    folder, job = with_a_server(fakes, nodes=2)
    (fakes / f"job{job}").write_text("JobId=1 JobState=COMPLETED Reason=None\n")
    assert again(folder) == job
    assert (fakes / "requeued").read_text() == job.removesuffix("_0") + "\n"


def test_server_whose_record_is_of_an_older_version_is_queued_again_as_long_as_slurm_knows_it(
    fakes: Path,
) -> None:
    folder, job = with_a_server(fakes)
    record = json.loads((fakes / "run/chain.json").read_text())
    for stage in record["stages"]:
        stage.pop("command", None)
    (fakes / "run/chain.json").write_text(json.dumps(record))
    (fakes / f"job{job}").write_text("JobId=1 JobState=COMPLETED Reason=None\n")
    assert again(folder) == job
    (fakes / f"job{job}").unlink()
    with pytest.raises(SettingsError, match="submitted by an older version; submit the chain again"):
        again(folder)


def test_server_that_failed_is_not_started_again(fakes: Path) -> None:
    folder, job = with_a_server(fakes)
    (fakes / f"job{job}").write_text("JobId=1 JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0\n")
    with pytest.raises(SlurmError, match=f"job {job} is FAILED; look at .*02_ttt_server-{job}.log"):
        again(folder)


def test_folder_of_no_server_is_not_started_again(fakes: Path) -> None:
    folder, _ = with_a_server(fakes)
    with pytest.raises(SettingsError, match="not that of a submitted server"):
        again(folder.parent / "results")
    with pytest.raises(DataError, match="no chain was submitted here"):
        again(fakes / "elsewhere/base_server")
    assert not (fakes / "elsewhere").exists()


def test_command_of_a_server_is_kept_when_the_rest_is_submitted_again(fakes: Path) -> None:
    _, job = with_a_server(fakes)
    before = read_record(fakes / "run").commands()
    (fakes / f"job{job}").write_text(f"JobId={job} JobState=RUNNING Reason=None\n")
    submit_chain(continual_chain(SMALL), fakes / "run", cluster(project=fakes), tell=print)
    assert read_record(fakes / "run").commands() == before
    assert set(before) == {"base_server"}


def test_without_slurm_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="no scontrol here"):
        slurm_jobs.look_up("1")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("JobId=7 JobState=RUNNING Reason=None Restarts=2 ExitCode=0:0 NodeList=node2 BatchHost=node2",
         {"state": "RUNNING", "node": "node2", "restarts": 2}),
        ("JobId=7 JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0 NodeList=node1 BatchHost=node1",
         {"state": "FAILED", "reason": "NonZeroExitCode", "exit_code": 3, "node": "node1"}),
        ("JobId=7 JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15 NodeList=n BatchHost=n",
         {"state": "TIMEOUT", "reason": "TimeLimit", "signal": 15, "node": "n"}),
        ("JobId=7 JobState=RUNNING Reason=None ReqNodeList=n9 NodeList=node[1-2] BatchHost=node1",
         {"state": "RUNNING", "node": "node[1-2]"}),
        ("JobId=7 JobState=PENDING Reason=Dependency ExitCode=0:0 NodeList=(null)",
         {"state": "PENDING", "reason": "Dependency", "node": ""}),
    ],
)  # fmt: skip
def test_what_slurm_says_of_a_job_is_read(line: str, expected: dict[str, object]) -> None:
    assert slurm_jobs.read_job(line) == JobState(**{**DONE, "node": "", **expected})


def test_stage_marks_itself_as_done_under_the_identity_of_its_chain(tmp_path: Path) -> None:
    chain = evaluation_chain(SMALL)
    record_of(chain, executor="slurm", jobs={}).write(tmp_path)
    with marked_when_done(tmp_path, str(tmp_path / "results")):
        assert not is_done(chain, chain["results"], tmp_path)
    assert is_done(chain, chain["results"], tmp_path)


def test_stage_that_raises_or_writes_nothing_is_not_done(tmp_path: Path) -> None:
    chain = evaluation_chain(SMALL)
    record_of(chain, executor="slurm", jobs={}).write(tmp_path)
    with pytest.raises(ValueError, match="cell"), marked_when_done(tmp_path, str(tmp_path / "results")):
        raise ValueError("a cell")
    with (
        pytest.raises(DataError, match=r"did not write self_edits\.json"),
        marked_when_done(tmp_path, str(tmp_path / "base_self_edits")),
    ):
        pass
    assert not (tmp_path / ".done").exists()


def test_folder_of_no_stage_is_refused_before_anything_runs(tmp_path: Path) -> None:
    record_of(evaluation_chain(SMALL), executor="slurm", jobs={}).write(tmp_path)
    with pytest.raises(SettingsError, match="folder of no stage"), marked_when_done(tmp_path, "elsewhere"):
        raise AssertionError("ran")


def status_of(run_dir: Path, states: dict[str, JobState | None]) -> list[str]:
    """Lines about an evaluation whose jobs are numbered by their stage's name."""
    chain = evaluation_chain(SMALL)
    record = record_of(chain, executor="slurm", jobs={name: f"7{name}" for name in states})
    statuses = chain_status(record, run_dir, look_up=lambda job: states[job.removeprefix("7")])
    return list(status_lines(record, statuses, run_dir))


def test_status_tells_done_from_running_waiting_failed_cancelled_lost_and_not_started(tmp_path: Path) -> None:
    finish(evaluation_chain(SMALL), tmp_path, "base_self_edits")
    lines = status_of(
        tmp_path,
        {
            "base_self_edits": None,
            "base_server": JobState(**DONE | {"state": "RUNNING", "restarts": 1}),
            "base_evaluate": JobState(**DONE | {"state": "TIMEOUT", "reason": "TimeLimit"}),
            "base_cpt": None,
        },
    )
    assert lines[0] == "chain evaluation: 1 of 4 stages done, 1 failed, 1 lost, 1 not started"
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:6]}
    assert found["base_self_edits"] == "done in 1 s"
    assert found["base_server"] == "running job 7base_server on node1, run 2"
    assert found["base_evaluate"].endswith("on node1: TIMEOUT, exit code 0 (TimeLimit)")
    assert found["base_cpt"] == "lost job 7base_cpt, which SLURM has forgotten"
    assert found["results"] == "not started"


def test_status_shows_why_a_stage_failed(tmp_path: Path) -> None:
    folder = tmp_path / "base_cpt"
    folder.mkdir()
    (folder / "04_cpt-7base_cpt.log").write_text("\n".join(f"line {n}" for n in range(9)) + "\n")
    traceback = [
        "Cell In[3], line 2\n\x1b[32m      1\x1b[39m x = 1\n\x1b[32m----> 2\x1b[39m load(dataset)\n",
        "File passages.py:9, in load(path)\n\x1b[32m----> 9\x1b[39m raise DataError(path)",
    ]
    error = nbformat.v4.new_output("error", ename="DataError", evalue="no such file", traceback=traceback)
    cell = nbformat.v4.new_code_cell("x = 1\nload(dataset)", outputs=[error], execution_count=3)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "04_cpt-7base_cpt.ipynb")
    failed = JobState(**DONE | {"state": "FAILED", "reason": "NonZeroExitCode", "exit_code": 1})
    lines = status_of(tmp_path, {"base_cpt": failed})
    about = lines[lines.index("base_cpt: job 7base_cpt on node1: FAILED, exit code 1") :]
    assert "  cell [3] raised DataError: no such file" in about
    assert "  at: load(dataset)" in about
    assert [line.strip() for line in about if line.startswith("      line")] == [
        f"line {n}" for n in range(4, 9)
    ]
    assert about[-1] == f"  executed notebook: {folder / '04_cpt-7base_cpt.ipynb'}"


def test_status_of_a_chain_that_ran_here_needs_no_slurm(tmp_path: Path) -> None:
    chain = evaluation_chain(SMALL)
    finish(chain, tmp_path, "base_self_edits")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/base_cpt.log").write_text("half way\n")
    error = nbformat.v4.new_output("error", ename="DataError", evalue="no such file", traceback=[])
    (tmp_path / "base_evaluate").mkdir()
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("load()", outputs=[error])])
    nbformat.write(executed, tmp_path / "base_evaluate/03_query_server.ipynb")

    def nobody(job: str) -> None:
        raise AssertionError(f"SLURM was asked for {job}")

    statuses = chain_status(record_of(chain, executor="local", jobs={}), tmp_path, look_up=nobody)
    states = {status.stage.name: status.state for status in statuses if not status.stage.background}
    assert states == {
        "base_self_edits": "done", "base_evaluate": "failed", "base_cpt": "running", "results": "not started",
    }  # fmt: skip


def test_status_of_a_folder_without_a_chain_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chain was submitted here"):
        read_record(tmp_path)
    (tmp_path / "chain.json").write_text(json.dumps({"stages": [{}]}))
    with pytest.raises(DataError, match="not a chain's record"):
        read_record(tmp_path)


def test_dataset_that_is_no_file_is_refused_before_the_queue(fakes: Path) -> None:
    (fakes / "slurm").unlink()
    (fakes / "slurm").mkdir()
    (fakes / "slurm/site.sh").write_text("true\n")
    words = ["evaluation", "--run-dir", "run", "--small", "--val-dataset", "squad.json"]
    with pytest.raises(SettingsError, match="val_dataset is 'squad.json', which is no file"):
        submit([*words, "--project", str(fakes)])


def test_prompt_that_there_is_not_is_refused_before_the_queue(fakes: Path) -> None:
    with_a_server(fakes)
    words = ["evaluation", "--run-dir", "other", "--small", "--project", str(fakes)]
    with pytest.raises(SettingsError, match="unknown prompt_key 'implicatons'"):
        submit([*words, "--prompt-key", "implicatons"])
    with pytest.raises(SettingsError, match="prompt_key 'spa' is a family of 7 prompts"):
        submit(["continual", *words[1:], "--prompt-key", "spa"])
    (fakes / "mine.txt").write_text("{title}\n{context}\nIn short:")
    with pytest.raises(SlurmError, match="'base_cpt' was refused"):
        submit([*words, "--prompt-key", "mine.txt"])
    assert "-p prompt_key mine.txt" in (fakes / "submitted").read_text()


def test_setting_without_a_default_is_asked_for(fakes: Path) -> None:
    with pytest.raises(SettingsError, match="--model, --train-dataset, --val-dataset not given"):
        submit(["rest_em", "--run-dir", "run", "--executor", "local"])


def published() -> str:
    """The dry run of the published experiment, on a cluster with two GPUs a node."""
    return dry_run(PUBLISHED, ROOT / "runs/qwen", cluster(site={"SEAL_GPUS": "2"}))


def test_published_experiment_becomes_the_jobs_that_the_documentation_shows() -> None:
    assert published() == DRY_RUN.read_text().rstrip("\n"), (
        f"if the change is meant, write what tests.chain.test_slurm.published() gives to {DRY_RUN}"
    )


def test_job_that_the_readme_shows_is_one_of_the_published_experiment() -> None:
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"^```sh\n(# ReST-EM.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert shown in published()


def test_command_that_the_readme_shows_is_the_published_experiment(
    capsys: pytest.CaptureFixture[str], fakes: Path
) -> None:
    (command,) = re.findall(r"^seal-nb submit (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    (fakes / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", fakes / "slurm")
    (fakes / "slurm/site.sh").write_text("export SEAL_GPUS=2\n")
    submit([*shlex.split(command), "--dry-run", "--project", str(fakes)])
    assert capsys.readouterr().out.rstrip("\n") == published()


def test_chain_is_not_run_here_while_its_jobs_are_on_their_way(fakes: Path) -> None:
    submit_chain(continual_chain(DEMO), fakes / "run", cluster(project=fakes), tell=print)
    (fakes / "job102").write_text("JobId=102 JobState=PENDING Reason=Resources\n")
    with pytest.raises(RunMismatch, match="SLURM jobs 102 work here"):
        submit(["continual", "--run-dir", "run", "--small", "--executor", "local"])


def shown_calls() -> list[tuple[str, list[str]]]:
    """(script, words behind it) of each sbatch that the page or a script's head shows."""
    texts = [(ROOT / "docs/slurm.md").read_text()]
    texts += [
        path.read_text().replace("# sbatch", "sbatch") for path in sorted((ROOT / "slurm").glob("*.sbatch"))
    ]
    found = re.findall(r"^(?:.*: )?sbatch .*?slurm/(\w+)\.sbatch(.*)$", "\n".join(texts), re.MULTILINE)
    return [(script, rest.split()) for script, rest in found]


@pytest.mark.parametrize(("script", "words"), shown_calls())
def test_shown_call_of_a_script_has_parameters_of_its_notebook(script: str, words: list[str]) -> None:
    assert (ROOT / f"slurm/{script}.sbatch").is_file()
    notebooks = [path for path in default_notebooks_dir().glob("*.ipynb") if path.stem[3:] == script]
    names = {words[at + 1]: "1" for at, word in enumerate(words) if word == "-p"}
    (notebook,) = notebooks
    declared = declared_parameters(notebook)
    assert set(names) <= set(declared)


def test_defaults_that_scripts_pass_are_parameters_of_their_notebooks() -> None:
    for path in sorted((ROOT / "slurm").glob("*.sbatch")):
        text = path.read_text()
        for notebook, rest in re.findall(r"^ *run_stage (\w+) (.*)$", text, re.MULTILINE):
            declared = declared_parameters(default_notebooks_dir() / f"{notebook}.ipynb")
            passed = re.findall(r"-p (\w+) (\S+)", rest)
            assert {name for name, _ in passed} <= set(declared), path.name
    server = declared_parameters(default_notebooks_dir() / "02_ttt_server.ipynb")
    passed_on = re.search(r"for name in (.*); do", (ROOT / "slurm/ttt_server.sbatch").read_text())[1].split()
    assert {"n_workers", "idle_timeout_s", *passed_on} <= set(server)


def test_workers_of_other_nodes_are_told_all_that_a_result_depends_on() -> None:
    passed_on = re.search(r"for name in (.*); do", (ROOT / "slurm/ttt_server.sbatch").read_text())[1].split()
    assert set(passed_on) >= {"model", "max_seq_length", "grader", "dtype", "deterministic"}
    assert set(passed_on) <= set(WorkerSettings.__dataclass_fields__)


def test_dry_run_here_shows_a_command_a_stage_and_starts_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(["rest_em", "--small", "--executor", "local", "--run-dir", str(tmp_path / "run"), "--dry-run"])
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(shown) == len(list(rest_em_chain(DEMO)))
    assert all(line.startswith("seal-nb run ") for line in shown)
    assert not (tmp_path / "run").exists()

"""What goes wrong on a cluster, in mid-round: no result is lost or made twice, and it is said what happened.

A tiny random model answers nonsense, but the same nonsense each time: whatever happens to its jobs, a run
must end with the results of a run to which nothing happened.
"""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chain.planning import jobs_in
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Project, eventually, lines_of

N_LOOPS = 8
ROUND = {
    "dataset": "shipped:val", "arms": "hand_written", "n_articles": "4", "eval_times": "2",
    "finetune_epochs": "12", "max_new_tokens": "16", "soft_scores": "false", "wait_s": "120",
}  # fmt: skip

# What a server that was killed has left behind.
OLDER_SERVER = {
    "endpoint": "tcp://10.77.0.11:5555", "worker_endpoint": "tcp://10.77.0.11:5556", "host": "10.77.0.11",
    "port": 5555, "pid": 1, "job_id": "1", "started_at": "2026-01-01T00:00:00+00:00", "server_id": "older",
}  # fmt: skip


def parameters(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in ("-p", name, value)]


class Round:
    """A server of the tiny model and a client with N_LOOPS inner loops, in a folder of their own."""

    def __init__(self, project: Project, name: str, model: str) -> None:
        self.project, self.slurm, self.model = project, project.slurm, model
        self.folder = f"runs/{name}"

    def start_server(self, *options: str) -> str:
        # Both GPUs of a node, so that another task of the array goes to the other node.
        values = {"output_dir": f"{self.folder}/server", "model": self.model, "n_workers": "1", "n_slots": "1"}
        asked = ("--gpus-per-node=2", *options)
        return self.project.sbatch("ttt_server", *parameters(values), options=asked)

    def start_client(self, *options: str, **other: str) -> str:
        values = {"output_dir": f"{self.folder}/client", "endpoint": f"{self.folder}/server/endpoint.json"}
        return self.project.sbatch("query_server", *parameters({**values, **ROUND, **other}), options=options)

    @property
    def journal(self) -> Path:
        return self.project.path(f"{self.folder}/client/journal.jsonl")

    def wait_until_in_the_middle(self) -> None:
        eventually(lambda: lines_of(self.journal) >= 2, "no inner loop is answered")
        self.must_not_be_over()

    def must_not_be_over(self) -> None:
        """By the server's own record: the client learns of a result later."""
        n_done = lines_of(self.project.path(f"{self.folder}/server/results.journal.jsonl"))
        assert n_done < N_LOOPS, "the round is over before anything could happen to it"

    @contextlib.contextmanager
    def standing_still_in_the_middle(self) -> Iterator[None]:
        """Meanwhile no inner loop goes on, but the server answers."""
        eventually(lambda: lines_of(self.journal), "no inner loop is answered")
        workers = self.workers()  # before it is urgent: looking for them takes a while
        assert workers
        self.wait_until_in_the_middle()
        for worker in workers:
            worker.suspend()
        try:
            time.sleep(1)  # what was on its way is written
            self.must_not_be_over()
            yield
        finally:
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.resume()

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.slurm.processes() if "seal_nb.server.worker" in p.cmdline()]

    def nodes_of_workers(self) -> set[str]:
        """Where the workers run that the server has welcomed."""
        log = self.project.path(f"{self.folder}/server/server.log")
        return set(re.findall(r"worker (node\d)-\S+ is ready", log.read_text())) if log.exists() else set()

    def results(self) -> list[Any]:
        """All answers and verdicts of the client's run file."""
        return answers(self.project, self.folder)

    def keys_in(self, journal: str) -> list[str]:
        lines = self.project.path(f"{self.folder}/{journal}").read_text().splitlines()
        return [json.loads(line)["key"] for line in lines]

    def has_each_result_once(self) -> bool:
        asked, trained = self.keys_in("client/journal.jsonl"), self.keys_in("server/results.journal.jsonl")
        return len(asked) == len(set(asked)) == N_LOOPS and sorted(trained) == sorted(asked)


def answers(project: Project, folder: str) -> list[Any]:
    run = project.json(f"{folder}/client/run_base_hand_written.json")
    return [completion["questions"] for article in run["articles"] for completion in article["completions"]]


@pytest.fixture(scope="module")
def new_round(project: Project, tiny_model: str) -> Callable[[str], Round]:
    return lambda name: Round(project, name, tiny_model)


@pytest.fixture(scope="module")
def undisturbed(new_round: Callable[[str], Round]) -> list[Any]:
    """The results of a run to which nothing happened."""
    one = new_round("undisturbed")
    server, client = one.start_server(), one.start_client()
    one.slurm.wait(client, "COMPLETED")
    one.slurm.run("scancel", server)
    assert one.has_each_result_once()
    return one.results()


def test_lost_node_of_client_and_worker_costs_nothing_that_was_answered(
    new_round: Callable[[str], Round], undisturbed: list[Any], slurm: Cluster
) -> None:
    one = new_round("lost_node")
    server = one.start_server("--array=0-1")
    front = slurm.wait(f"{server}_0", "RUNNING")["BatchHost"]
    node = slurm.wait(f"{server}_1", "RUNNING")["BatchHost"]
    assert node != front
    eventually(lambda: one.nodes_of_workers() == {front, node}, "the workers of both nodes are not at the server")
    client = one.start_client(f"--exclude={front}")
    one.wait_until_in_the_middle()
    before = one.keys_in("client/journal.jsonl")
    slurm.cut_power(node)
    eventually(lambda: slurm.job(client)["Restarts"] == "1", "the lost client is not queued again")
    slurm.restore(node)
    slurm.wait(client, "COMPLETED")
    slurm.wait(f"{server}_1", "RUNNING")  # the worker, too, is there again
    slurm.run("scancel", server)
    assert one.keys_in("client/journal.jsonl")[: len(before)] == before
    assert one.has_each_result_once()
    assert one.results() == undisturbed


def test_server_that_is_queued_again_to_another_node_is_waited_for(
    new_round: Callable[[str], Round], undisturbed: list[Any], slurm: Cluster
) -> None:
    one = new_round("lost_server")
    stale = one.project.path(f"{one.folder}/server/endpoint.json")
    stale.parent.mkdir(parents=True)
    stale.write_text(json.dumps(OLDER_SERVER))
    client = one.start_client("--nodelist=node2")  # before there is a server
    slurm.wait(client, "RUNNING")
    server = one.start_server("--exclude=node2")
    one.wait_until_in_the_middle()
    first = json.loads(stale.read_text())
    slurm.cut_power("node1")
    slurm.run("scontrol", "update", "nodename=node1", "state=down", "reason=test")
    eventually(lambda: slurm.job(server)["JobState"] == "PENDING", "the server is not queued again")
    slurm.run("scontrol", "update", f"jobid={server}", "excnodelist=")
    slurm.wait(client, "COMPLETED")
    second = json.loads(stale.read_text())
    slurm.run("scancel", server)
    slurm.restore("node1")
    assert (first["host"], second["host"]) == ("node1", "node2")
    assert first["server_id"] != second["server_id"]
    assert first["job_id"] == second["job_id"] == server
    assert slurm.job(client)["Restarts"] == "0"
    assert one.has_each_result_once()
    assert one.results() == undisturbed


def test_client_and_server_out_of_time_are_queued_again_and_go_on(
    new_round: Callable[[str], Round], undisturbed: list[Any], slurm: Cluster
) -> None:
    one = new_round("time_limit")
    server, client = one.start_server(), one.start_client()
    with one.standing_still_in_the_middle():  # SLURM looks at time limits twice a minute
        # Their scripts want a signal five minutes before, which is now. One call, so one look finds both.
        slurm.run("scontrol", "update", f"jobid={client},{server}", "timelimit=4")
        eventually(lambda: slurm.job(client)["Restarts"] == "1", "the client is not queued again")
        # At once, since the next run would get its signal half a minute later.
        slurm.run("scontrol", "update", f"jobid={client}", "timelimit=60")
    eventually(lambda: slurm.job(server)["Restarts"] == "1", "the server is not queued again")
    slurm.run("scontrol", "update", f"jobid={server}", "timelimit=60")
    slurm.wait(client, "COMPLETED")
    slurm.run("scancel", server)
    for log in one.project.path(one.folder).glob("*/0*.log"):
        assert "out of time, queued again" in log.read_text()
        assert "KeyboardInterrupt" in log.read_text()
    assert one.has_each_result_once()
    assert one.results() == undisturbed


def test_client_that_makes_room_for_an_urgent_job_goes_on_after_it(
    new_round: Callable[[str], Round], undisturbed: list[Any], slurm: Cluster
) -> None:
    one = new_round("preempted")
    server = one.start_server("--exclude=node2")
    client = one.start_client("--nodelist=node2")
    one.wait_until_in_the_middle()
    words = ("--partition=urgent", "--nodelist=node2", "--exclusive", "--output=/dev/null", "--wrap=true")
    urgent = slurm.sbatch(*words, cwd=one.project.folder)
    slurm.wait(urgent, "COMPLETED")
    slurm.wait(client, "COMPLETED")
    slurm.run("scancel", server)
    assert int(slurm.job(client)["Restarts"]) == 1
    assert one.has_each_result_once()
    assert one.results() == undisturbed


def test_job_without_a_site_file_says_what_to_do(project: Project, slurm: Cluster) -> None:
    site = project.path("slurm/site.sh")
    site.rename(site.with_name("site.away"))
    try:
        job = project.sbatch("results")
        assert slurm.wait(job, "FAILED")["ExitCode"] == "2:0"
    finally:
        site.with_name("site.away").rename(site)
    assert "cp slurm/site.example.sh slurm/site.sh" in slurm.output(job)


def chain_of(project: Project, name: str, model: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Submit an evaluation of the tiny model."""
    counts = {
        "run-dir": f"runs/{name}", "model": model, "n-val": "4", "cpt-completions": "1", "max-tokens": "8",
        "finetune-epochs": "12", "max-new-tokens": "16", "arms": "hand_written", "n-workers": "1",
        "n-slots": "1", "cpt-epochs": "1", "idle-timeout-s": "25",
    }  # fmt: skip
    options = [word for option, value in counts.items() for word in (f"--{option}", value)]
    return project.submit("evaluation", "--small", *options, *words)


def test_chain_with_a_raising_cell_and_a_cancelled_job_says_so_and_is_continued(
    project: Project, tiny_model: str, slurm: Cluster
) -> None:
    run = project.path("runs/broken")
    first = chain_of(project, "broken", tiny_model, "--cpt-epochs", "0")  # refused in a cell
    assert first.returncode == 0, first.stderr
    jobs = jobs_in(run)
    eventually(lambda: lines_of(run / "base_evaluate/journal.jsonl") >= 1, "no inner loop is answered")
    slurm.run("scancel", jobs["base_evaluate"])
    assert slurm.wait(jobs["base_evaluate"])["JobState"] == "CANCELLED"
    slurm.wait(jobs["base_cpt"], "FAILED")
    assert slurm.wait(jobs["results"])["JobState"] == "CANCELLED"  # it can never start
    before = (run / "base_evaluate/journal.jsonl").read_text()

    status = project.seal_nb("chain-status", "runs/broken")
    assert status.returncode == 1
    rows = {line.split()[0]: line.split()[2] for line in status.stdout.splitlines() if line.startswith("  base")}
    assert rows["base_self_edits"] == "done"
    assert rows["base_evaluate"] == "cancelled"
    assert rows["base_cpt"] == "failed"
    assert "exit code 1" in status.stdout
    assert "raised SettingsError: finetune_epochs" in status.stdout
    assert f"04_cpt-{jobs['base_cpt']}.ipynb" in status.stdout

    second = chain_of(project, "broken", tiny_model)
    assert second.returncode == 0, second.stderr
    assert "base_self_edits" not in second.stdout.replace("after base_self_edits", "")
    for job in jobs_in(run).values():
        slurm.wait(job, "COMPLETED")
    assert (run / "base_evaluate/journal.jsonl").read_text().startswith(before)
    assert project.seal_nb("chain-status", "runs/broken").stdout.startswith("chain evaluation: 4 of 4 stages done")


def test_server_that_cannot_start_ends_its_clients_and_what_needs_them(project: Project, slurm: Cluster) -> None:
    nothing = str(project.path("no_model"))
    Path(nothing).mkdir(exist_ok=True)
    words = ("--run-dir", "runs/no_server", "--model", nothing, "--n-workers", "1", "--idle-timeout-s", "25")
    done = project.submit("continual", "--small", *words)
    assert done.returncode == 0, done.stderr
    jobs = jobs_in(project.path("runs/no_server"))
    assert slurm.wait(jobs["base_server"])["JobState"] == "FAILED"
    assert slurm.wait(jobs["continual"])["JobState"] == "FAILED"
    assert slurm.wait(jobs["results"])["JobState"] == "CANCELLED"
    status = project.seal_nb("chain-status", "runs/no_server").stdout
    assert f"the server (job {jobs['base_server']}) has ended" in status
    assert "ServerFailed" in status


@pytest.fixture
def forgetful(slurm: Cluster) -> Iterator[Cluster]:
    """A SLURM that forgets jobs soon after their end; on a busy cluster that takes some minutes."""
    file = slurm.folder / "slurm.conf"
    before = file.read_text()
    file.write_text(re.sub("^MinJobAge=.*", "MinJobAge=2", before, flags=re.MULTILINE))
    slurm.run("scontrol", "reconfigure")
    yield slurm
    file.write_text(before)
    slurm.run("scontrol", "reconfigure")


def test_clients_that_come_after_slurm_has_forgotten_their_idle_server_have_it_submitted_once_more(
    project: Project, tiny_model: str, forgetful: Cluster
) -> None:
    run, slurm = project.path("runs/forgotten"), forgetful
    done = chain_of(project, "forgotten", tiny_model, "--idle-timeout-s", "8")
    assert done.returncode == 0, done.stderr
    first = jobs_in(run)
    clients = f"{first['base_evaluate']},{first['base_cpt']}"
    slurm.run("scontrol", "hold", clients)  # as if the cluster were full
    server = ("scontrol", "show", "job", first["base_server"])
    eventually(lambda: "Invalid job id" in slurm.run(*server).stderr, "the idle server is not forgotten", 240)
    slurm.run("scontrol", "release", clients)
    eventually(lambda: not slurm.queue(), "the chain has not ended", 240)

    status = project.seal_nb("chain-status", "runs/forgotten").stdout
    assert status.startswith("chain evaluation: 4 of 4 stages done")
    second = jobs_in(run)
    assert {name for name in first if first[name] != second[name]} == {"base_server"}
    logs = {path.name for path in (run / "base_server").glob("02_ttt_server-*.log")}
    assert logs == {f"02_ttt_server-{job}.log" for job in (first["base_server"], second["base_server"])}
    log = (run / f"base_evaluate/03_query_server-{first['base_evaluate']}.log").read_text()
    assert f"it is started again as job {second['base_server']}" in log


def test_job_that_is_refused_late_takes_the_earlier_ones_back(project: Project, slurm: Cluster) -> None:
    script = project.path("slurm/ttt_server.sbatch")
    before = script.read_text()
    script.write_text(before.replace("#SBATCH", "#SBATCH --reservation=nowhere\n#SBATCH", 1))
    try:
        done = project.submit("evaluation", "--small", "--run-dir", "runs/late")
    finally:
        script.write_text(before)
    assert done.returncode == 2
    assert "job 'base_server' was refused, so none was submitted" in done.stderr
    assert "reservation" in done.stderr
    assert slurm.queue() == []

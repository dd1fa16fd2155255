"""Which jobs a chain becomes, where they run and what they wait for."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from seal_nb.chain import slurm as slurm_jobs
from seal_nb.chain.slurm import Job, plan
from seal_nb.chain.stages import make_chain
from seal_nb.errors import SettingsError
from tests.chain.planning import ROOT, SMALL, cluster, finish, jobs_of


def test_stage_waits_for_what_it_needs_and_for_the_start_of_its_server() -> None:
    jobs = jobs_of(make_chain("rest_em", SMALL))
    assert jobs["base_self_edits"].afterok == ()
    assert jobs["base_evaluate"].afterok == ("base_self_edits",)
    assert jobs["base_evaluate"].after == ("base_server",)
    assert jobs["round1_train"].afterok == ("round1_rank",)


def test_server_starts_when_all_who_ask_it_could() -> None:
    assert jobs_of(make_chain("rest_em", SMALL))["base_server"].afterok == (
        "base_self_edits",
        "round1_self_edits_train",
    )


def test_client_does_not_outlive_the_making_of_its_server_s_model() -> None:
    # `after` alone holds for a server that was cancelled because the training before it failed.
    assert "round1_train" in jobs_of(make_chain("rest_em", SMALL))["continual"].afterok


def test_clients_look_after_the_job_of_their_server() -> None:
    job = jobs_of(make_chain("rest_em", SMALL))["base_evaluate"]
    words = job.command({"base_server": "17_0", "base_self_edits": "5"})
    at = words.index(job.script)
    assert words[at - 2 : at] == ["--dependency=afterok:5,after:17_0", "--export=ALL,SEAL_SERVER_JOB=17_0"]


def test_seeds_are_one_array_whose_numbers_are_their_places_so_that_a_seed_may_be_any_number() -> None:
    job = jobs_of(make_chain("rest_em", replace(SMALL, continual_seeds=(42, 20250101))))["continual"]
    assert "--array=0-1" in job.options
    assert job.arguments[:2] == ("--seeds", "42,20250101")
    job = jobs_of(make_chain("rest_em", SMALL))["continual"]
    assert [stage.name for stage in job.stages] == ["continual_seed42", "continual_seed43"]
    assert "seed" not in job.arguments
    assert job.arguments[2:5] == ("-p", "output_dir", "/nowhere/continual")  # the script adds _seed42


def test_server_on_several_nodes_is_an_array_whose_first_task_is_asked() -> None:
    jobs = plan(make_chain("rest_em", SMALL), Path("/x"), cluster(server_nodes=4), on_their_way={})
    (server,) = [job for job in jobs if job.name == "base_server"]
    assert "--array=0-3" in server.options
    assert server.part == "_0"


def training(n_processes: int, **place: object) -> Job:
    """The job of round 1's training, in so many processes."""
    chain = make_chain("rest_em", replace(SMALL, sft_accumulation=n_processes, sft_processes=n_processes))
    jobs = plan(chain, Path("/x"), cluster(**place), on_their_way={})
    return next(job for job in jobs if job.name == "round1_train")


def test_training_is_one_job_over_its_nodes_with_a_gpu_for_each_process_and_their_memory() -> None:
    job = training(8, sft_nodes=4)
    assert job.options[-3:] == ("--nodes=4", "--mem=0", "--gpus-per-node=a100:2")
    assert ("-p", "n_processes", "8") in zip(job.arguments, job.arguments[1:], job.arguments[2:], strict=False)


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
    with pytest.raises(SettingsError, match="sft_nodes=0: must be at least 1"):
        cluster(sft_nodes=0)


def test_only_jobs_whose_script_wants_gpus_get_those_of_the_site() -> None:
    with_gpus = {
        name
        for name, job in jobs_of(make_chain("rest_em", SMALL)).items()
        if any(option.startswith("--gpus-per-node=a100:") for option in job.options)
    }
    assert {re.sub(r"^(base|round1)_", "", name) for name in with_gpus} == {
        "self_edits", "self_edits_train", "server", "train",
    }  # fmt: skip


def test_only_a_server_and_a_training_get_several_gpus() -> None:
    jobs = jobs_of(make_chain("rest_em", replace(SMALL, sft_accumulation=2, sft_processes=2)))
    several = {name for name, job in jobs.items() if "--gpus-per-node=a100:2" in job.options}
    assert several == {"base_server", "round1_server", "round1_train"}
    on_cpus = plan(make_chain("rest_em", SMALL), Path("/x"), cluster(site={"SEAL_GPUS": "0"}), on_their_way={})
    assert [job.name for job in on_cpus if "--gpus-per-node=0" in job.options][:2] == [
        "base_self_edits",
        "round1_self_edits_train",
    ]


def test_finished_stages_are_not_submitted_again_and_nobody_waits_for_them(tmp_path: Path) -> None:
    chain = make_chain("rest_em", SMALL)
    finish(chain, tmp_path, "base_self_edits", "round1_self_edits_train", "base_evaluate", "base_cpt")
    jobs = jobs_of(chain, tmp_path)
    assert {"base_self_edits", "base_evaluate"} & set(jobs) == set()
    assert jobs["base_server"].afterok == ()
    assert jobs["round1_rank"].after == ("base_server",)


def test_server_whose_clients_are_done_is_not_started(tmp_path: Path) -> None:
    chain = make_chain("rest_em", SMALL)
    names = ["base_self_edits", "round1_self_edits_train", "base_evaluate", "base_cpt", "round1_rank"]
    finish(chain, tmp_path, *names)
    assert "base_server" not in jobs_of(chain, tmp_path)


def test_array_is_continued_with_the_seeds_that_are_missing(tmp_path: Path) -> None:
    chain = make_chain("continual", replace(SMALL, continual_seeds=(42, 43, 44)))
    finish(chain, tmp_path, "continual_seed43")
    job = jobs_of(chain, tmp_path)["continual"]
    assert "--array=0,2" in job.options and job.arguments[:2] == ("--seeds", "42,43,44")
    chain = make_chain("continual", replace(SMALL, continual_seeds=(42, 43, 44, 7)))
    assert "--array=0,2,3" in jobs_of(chain, tmp_path)["continual"].options


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1, 2)])
def test_seeds_that_are_none_the_same_or_negative_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="continual_seeds is .*each once, from 0 on"):
        replace(SMALL, continual_seeds=seeds)


@pytest.mark.parametrize(
    ("site", "server", "client"),
    [
        ({"SBATCH_MEM_PER_CPU": "8G"}, ["--mem=64G"], ["--mem=16G"]),  # of 8 and 2 CPUs
        ({"SBATCH_MEM_PER_GPU": "64G", "SEAL_GPUS": "2"}, ["--mem=128G", "--gpus-per-node=2"], []),
        ({"SBATCH_MEM_PER_NODE": "0"}, ["--mem=0"], ["--mem=0"]),
    ],
)
def test_memory_of_the_site_wins_over_that_of_the_scripts(
    site: dict[str, str], server: list[str], client: list[str]
) -> None:
    chain = make_chain("continual", SMALL)
    assert cluster(site=site).resources(chain["base_server"]) == server
    assert cluster(site=site).resources(chain["continual_seed42"]) == client


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"SBATCH_MEM_PER_CPU": "lots"}, "SBATCH_MEM_PER_CPU=lots; write one of"),
        ({"SBATCH_GPUS": "2"}, "exports SBATCH_GPUS=2; write SEAL_GPUS there instead"),
        ({"SBATCH_GRES": "gpu:a100:2"}, "exports SBATCH_GRES=gpu:a100:2; write SEAL_GPUS"),
        (
            {"SBATCH_MEM_PER_CPU": "1G", "SBATCH_MEM_PER_NODE": "1G"},
            "SBATCH_MEM_PER_CPU=1G SBATCH_MEM_PER_NODE=1G; write one of",
        ),
    ],
)
def test_variables_of_the_site_that_contradict_the_scripts_are_refused(site: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        cluster(site=site).resources(make_chain("continual", SMALL)["base_server"])
    assert cluster(site={"SBATCH_GRES": "lscratch:10"}).resources(make_chain("continual", SMALL)["base_server"]) == []


def test_jobs_on_their_way_are_waited_for_by_their_number() -> None:
    jobs = jobs_of(make_chain("evaluation", SMALL), base_self_edits="31", base_server="32")
    assert {"base_self_edits", "base_server"} & set(jobs) == set()
    assert (jobs["base_cpt"].afterok, jobs["base_cpt"].after) == (("31",), ("32",))


@pytest.mark.parametrize("gpus", ["two", "a100:", ""])
def test_number_of_gpus_that_is_none_is_refused(gpus: str) -> None:
    with pytest.raises(SettingsError, match="write 2 or a100:2"):
        _ = cluster(site={"SEAL_GPUS": gpus}).gpus_a_node


def test_site_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"site\.example\.sh"):
        slurm_jobs.read_site(tmp_path / "site.sh")
    (tmp_path / "site.sh").write_text("export SBATCH_PARTITION=gpu\nfalse")
    with pytest.raises(SettingsError, match="ends with code 1"):
        slurm_jobs.read_site(tmp_path / "site.sh")


def test_site_file_tells_what_it_exports_for_sbatch_and_scripts(tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("export SBATCH_PARTITION=gpu SEAL_GPUS=2 OTHER=1\nSEAL_PLAIN=3\necho hello")
    assert slurm_jobs.read_site(tmp_path / "site.sh") == {"SBATCH_PARTITION": "gpu", "SEAL_GPUS": "2"}


def test_shipped_example_of_a_site_can_be_read() -> None:
    assert set(slurm_jobs.read_site(ROOT / "slurm/site.example.sh")) == {"SEAL_GPUS", "SEAL_MAX_RESTARTS"}

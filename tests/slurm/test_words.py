"""What the real sbatch makes of unusual run folders and of a site's memory; no script of ours runs."""

from dataclasses import replace

import pytest

from seal_nb.chain.slurm import Cluster, Job, plan, read_site
from seal_nb.chain.stages import make_chain
from tests.chain.planning import SMALL
from tests.slurm import cluster
from tests.slurm.conftest import Project

FOLDERS = ["100% %j %u %%A", 'a b it\'s "x" $HOME `id` $(id) ;&| *?[x] #~ é 北京', "-dash"]


def jobs_in(project: Project, folder: str, **site: str) -> list[Job]:
    """The jobs of a server and of an array of seeds."""
    given = {**read_site(project.path("slurm/site.sh")), **site}
    place = Cluster(project=project.folder, site={name: value for name, value in given.items() if value})
    chain = make_chain("continual", replace(SMALL, continual_seeds=(7, 20250101)))
    return plan(chain, project.path("runs") / folder, place, on_their_way={})[:2]


@pytest.mark.parametrize("folder", FOLDERS)
def test_log_of_a_job_goes_into_a_run_folder_of_any_name(project: Project, slurm: cluster.Cluster, folder: str) -> None:
    for job in jobs_in(project, folder):
        place = project.path("runs") / folder / job.name
        place.mkdir(parents=True)
        log = [option for option in job.options if option.startswith(("--output", "--array"))]
        number = slurm.sbatch("--wait", "--wrap", "echo here", *log, cwd=project.folder)
        logs = {f"{job.stages[0].notebook}-{number}{task}.log" for task in (["_0", "_1"] if len(log) == 2 else [""])}
        assert {path.name: path.read_text() for path in place.iterdir()} == dict.fromkeys(logs, "here\n")


@pytest.mark.parametrize(
    ("site", "server"),
    [
        ({"SBATCH_MEM_PER_CPU": "1G"}, "8G"), ({"SBATCH_MEM_PER_CPU": "", "SBATCH_MEM_PER_GPU": "3G"}, "6G"),
        ({"SBATCH_MEM_PER_CPU": "", "SBATCH_MEM_PER_NODE": "5G"}, "5G"),
    ],
)  # fmt: skip
def test_memory_of_the_site_in_each_of_its_forms_is_what_a_job_asks_for(
    project: Project, slurm: cluster.Cluster, site: dict[str, str], server: str
) -> None:
    job, _ = jobs_in(project, "memory", **site)
    number = slurm.sbatch("--hold", *job.command({})[2:], cwd=project.folder)
    assert slurm.job(number)["MinMemoryNode"] == server
    slurm.run("scancel", number)

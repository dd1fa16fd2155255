"""What tests of chains on SLURM share: a small experiment, a cluster, the jobs of a chain."""

import shutil
from dataclasses import replace
from pathlib import Path

from seal_nb.chain.local import read_record
from seal_nb.chain.slurm import Cluster, Job, plan, submit_chain
from seal_nb.chain.stages import DEMO, Chain, make_chain

ROOT = Path(__file__).resolve().parents[2]
SMALL = replace(DEMO, n_rounds=1, continual_seeds=(42, 43))


def cluster(**other: object) -> Cluster:
    values = {"project": ROOT, "site": {"SEAL_GPUS": "a100:2"}}
    return Cluster(**{**values, **other})


def jobs_of(chain: Chain, run_dir: Path = Path("/nowhere"), **on_their_way: str) -> dict[str, Job]:
    return {job.name: job for job in plan(chain, run_dir, cluster(), on_their_way=on_their_way)}


def jobs_in(run_dir: Path) -> dict[str, str]:
    """Stage → job, of the stages that have one."""
    return {stage.name: stage.job for stage in read_record(run_dir) if stage.job}


def finish(chain: Chain, run_dir: Path, *names: str) -> None:
    for name in names:
        for file in chain[name].produces:
            (run_dir / name / file).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name / file).touch()
        chain[name].mark_done(run_dir, seconds=1)


def with_a_server(fakes: Path, nodes: int = 1) -> tuple[Path, str]:
    """The folder of a submitted server, and its job, which the fake SLURM has forgotten already."""
    (fakes / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", fakes / "slurm")
    (fakes / "slurm/site.sh").write_text("export SEAL_GPUS=2 SBATCH_TIMELIMIT=60\n")
    place = cluster(project=fakes, server_nodes=nodes)
    submit_chain(make_chain("continual", SMALL), fakes / "run", place, tell=print)
    return fakes / "run/base_server", jobs_in(fakes / "run")["base_server"]

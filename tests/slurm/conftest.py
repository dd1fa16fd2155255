"""One cluster for all tests of this folder, and a project on it: the scripts as shipped, and a site file."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]
# What a user would change in slurm/site.sh for this cluster.
SITE = """
export SBATCH_PARTITION=day
export SEAL_GPUS=2
export SBATCH_MEM_PER_CPU=1G
export SEAL_WATCH_S=1
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if why := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no SLURM to test on: {why}")
    with Cluster() as cluster:
        yield cluster


class Project:
    """A project's folder on the cluster, as a user has it."""

    def __init__(self, folder: Path, slurm: Cluster) -> None:
        self.folder, self.slurm = folder, slurm
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.sh", "*.log"))
        site = (ROOT / "slurm/site.example.sh").read_text() + SITE
        (folder / "slurm/site.sh").write_text(site)
        (folder / ".venv").symlink_to(sys.prefix)
        # The package under test, and no thread beyond the two cores of a small machine.
        slurm.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        slurm.env |= {"SBATCH_PARTITION": "day"}  # `. slurm/site.sh` before a plain sbatch

    def sbatch(self, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """``sbatch [options] slurm/NAME.sbatch [arguments]``; the job's number."""
        return self.slurm.sbatch(*options, f"slurm/{script}.sbatch", *arguments, cwd=self.folder)

    def seal_nb(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """The console command on the login node."""
        command = (sys.executable, "-m", "seal_nb.cli", *words)
        return self.slurm.run(*command, cwd=self.folder)

    def submit(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self.seal_nb("submit", *words, "--project", str(self.folder))

    def path(self, name: str) -> Path:
        return self.folder / name

    def json(self, name: str) -> object:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="session")
def project(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"), slurm)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of a few thousand parameters that answers nonsense at once."""
    from tests.ttt.tiny import save_tiny_model

    return str(save_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(autouse=True)
def no_job_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test ends what it started; one that left a job waiting or running fails."""
    yield
    if "slurm" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("slurm")
        try:
            eventually(lambda: not cluster.queue(), "jobs are left in the queue", 30)
        finally:
            cluster.run("scancel", "--user=root")


def eventually(condition: Callable[[], object], problem: str, timeout_s: float = 120.0) -> object:
    """The first true value of ``condition()``."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{problem} after {timeout_s:g} s"
        time.sleep(0.2)
    return value


def lines_of(path: Path) -> int:
    """Lines of a journal; 0 where there is none yet."""
    return len(path.read_text().splitlines()) if path.exists() else 0

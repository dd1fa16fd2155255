"""A SLURM of a few lines of shell, for tests of what is asked of it; the real one: tests/slurm."""

import os
from pathlib import Path

import pytest

from tests.chain.planning import ROOT

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

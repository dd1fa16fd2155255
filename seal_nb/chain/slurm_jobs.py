"""What SLURM says, and what it is told: sbatch, scontrol and scancel as they are, their answers as records.

Plain commands, no accounting: ``sacct`` needs a database that not every cluster has. SLURM forgets a finished
job after some minutes (``MinJobAge``), so who wants to know later reads the run's folder.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seal_nb.errors import SealError, SettingsError

TIMEOUT_S = 60.0
OF_A_JOB = re.compile("SLURM|SRUN_|SEAL_SERVER_JOB$|(CUDA|ROCR|ZE)_|GPU_DEVICE_ORDINAL$")
# Everything else is an end. man squeue, JOB STATE CODES.
LIVE = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING",
    "STAGE_OUT", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip


class SlurmError(SealError, RuntimeError):
    """SLURM refused what it was told, or cannot be asked."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """One job as ``scontrol show job`` tells it. ``signal`` is 0 unless a signal ended it."""

    state: str
    reason: str  # why it waits or failed; "None" where there is no reason
    exit_code: int
    signal: int
    node: str  # or nodes: node[1-2]
    restarts: int

    @property
    def is_live(self) -> bool:
        return self.state in LIVE


def submit(command: Sequence[str], *, folder: Path, env: Mapping[str, str]) -> str:
    """The number of the new job. Raises: SlurmError with what sbatch says."""
    return (
        _call(command, folder=folder, env=env).strip().split(";")[0]
    )  # NUMBER;CLUSTER where there are several


def requeue(job: str) -> None:
    """A job that runs or has ended, under its number; with ``_0`` the whole array."""
    _call(["scontrol", "requeue", job.partition("_")[0]])


def cancel(jobs: Iterable[str]) -> None:
    if numbers := list(jobs):
        _call(["scancel", *numbers])


def look_up(job: str) -> JobState | None:
    """None for a job that SLURM does not know (any more). Raises: SlurmError if it cannot be asked."""
    try:
        said = _call(["scontrol", "-o", "show", "job", job])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return read_job(said.splitlines()[0])


def read_job(line: str) -> JobState:
    """One line of ``scontrol -o show job``."""
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    code, _, signal = fields.get("ExitCode", "0:0").partition(":")
    node = fields.get("NodeList", "")
    return JobState(
        state=fields["JobState"],
        reason=fields.get("Reason", "None"),
        exit_code=int(code),
        signal=int(signal or 0),
        node="" if node == "(null)" else node,
        restarts=int(fields.get("Restarts", 0)),
    )


def outside_of_jobs(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` without what SLURM told the job that we are in: a job submitted from here would inherit it."""
    return {
        name: value
        for name, value in env.items()
        if name in ("SLURM_CONF", "SLURM_CLUSTERS") or not OF_A_JOB.match(name)
    }


def read_site(path: Path) -> dict[str, str]:
    """What the site file exports: variables that it sets or changes. Raises: SettingsError."""
    if not path.is_file():
        example = path.with_name("site.example.sh")
        raise SettingsError(f"no {path}; cp {example} {path}, and edit it for your cluster")
    ours = ("SBATCH_", "SLURM_", "SEAL_")
    # Without what the same file has set already, where it was sourced by hand.
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("SBATCH_", "SEAL_"))}
    source = ["bash", "-c", 'source "$1" >&2 && env -0', "bash", str(path)]
    done = subprocess.run(source, capture_output=True, text=True, env=clean)
    if done.returncode:
        raise SettingsError(f"{path} ends with code {done.returncode}: {done.stderr.strip()}")
    pairs = (entry.partition("=") for entry in done.stdout.split("\0") if entry)
    return {name: value for name, _, value in pairs if name.startswith(ours) and clean.get(name) != value}


def _call(command: Sequence[str], *, folder: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError as error:
        raise SlurmError(
            f"no {command[0]} here; run this where SLURM is, or with --executor local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]} did not answer within {TIMEOUT_S:g} s; is the controller up?"
        ) from error
    if done.returncode:
        raise SlurmError(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout

"""The same training in several processes: `accelerate launch` as a child, for a notebook.

On GPUs the shipped configuration shards the model over them (FSDP, or DeepSpeed ZeRO-3); on CPUs the
processes talk over gloo and each holds a whole model. In a SLURM job over several nodes `srun` starts it on
each of them. A single process of its own gives its memory back when it ends."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from seal_nb.errors import EngineError, SettingsError
from seal_nb.processes import end_tree, ending_with_me
from seal_nb.sft.settings import SHARDINGS, SftJob, SftResult
from seal_nb.sft.train import finished, train_sft, training_id

MODULE = "seal_nb.sft.train"
LOG_TAIL_LINES = 15


def run_job(job: SftJob, *, n_processes: int = 1, sharding: str = "fsdp") -> SftResult:
    """Train here where one process is asked for, else as `train_in_processes` does."""
    config = launch_config(sharding)
    if n_processes > 1:
        return train_in_processes(job, n_processes=n_processes, config=config)
    return train_sft(
        job.sft_file, model=job.model, model_dir=job.model_dir, settings=job.settings, n_threads=job.n_threads
    )


def train_in_processes(job: SftJob, *, n_processes: int, config: Path | None = None) -> SftResult:
    """Train in `n_processes` on this machine, or on the nodes of this job; what they say goes to
    `<model_dir>.log`.

    A model folder that this very training made is taken as it is. Raises: SettingsError before the start,
    EngineError with the end of the log if a process failed.
    """
    job.settings.accumulation_of(n_processes)
    made_from = training_id(job.sft_file, job.model, job.settings)
    if (done := finished(job.model_dir, made_from)) is not None:
        return done
    job.model_dir.parent.mkdir(parents=True, exist_ok=True)
    log_path = job.model_dir.with_name(f"{job.model_dir.name}.log")
    with log_path.open("wb") as log:
        line = command(job, n_processes, config)
        process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:  # an interrupt must not leave ranks behind that hold GPUs and write checkpoints
            end_tree(process.pid)
            process.wait()
            raise
    result = finished(job.model_dir, made_from)
    if code:  # who watches over the processes may have been killed alone
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    if code or result is None:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        where = "a process" if n_processes == 1 else f"{n_processes} processes"
        raise EngineError(f"training in {where} ended with code {code}; the end of {log_path}:\n{tail}")
    return result


def command(job: SftJob, n_processes: int, config: Path | None = None) -> list[str]:
    """The command line; `config` is an accelerate configuration, by default the shipped one that fits.

    Raises: SettingsError where the nodes of this job cannot share the processes.
    """
    if n_processes == 1:
        return ending_with_me([sys.executable, "-m", MODULE, *job.options()])
    options = {
        "config_file": config or launch_config("fsdp"),
        "num_processes": n_processes,
        "num_cpu_threads_per_process": job.n_threads,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    n_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    launch = _on_nodes(n_nodes, n_processes) if n_nodes > 1 else _here()
    return ending_with_me([*launch, *given, "-m", MODULE, *job.options()])


def launch_config(sharding: str) -> Path:
    """The shipped configuration for this machine: on GPUs that of `sharding`, on CPUs there is one.

    Raises: SettingsError for an unknown one, and for DeepSpeed where it is not installed.
    """
    if sharding not in SHARDINGS:
        raise SettingsError(f"sharding is {sharding!r}; known are {', '.join(SHARDINGS)}")
    if sharding == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise SettingsError(
            "sharding is 'deepspeed', which is not installed; pip install -e '.[deepspeed]', or take fsdp"
        )
    return shipped_config(sharding if torch.cuda.is_available() else "cpu")


def _here() -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]  # a free one


def _on_nodes(n_nodes: int, n_processes: int) -> list[str]:
    """One `accelerate launch` on each node; slurm/accelerate.sh tells it which one it is on."""
    if n_processes % n_nodes:
        raise SettingsError(
            f"n_processes is {n_processes}, which this job's {n_nodes} nodes cannot share; give a multiple"
        )
    place = [f"--nodes={n_nodes}", f"--ntasks={n_nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun itself does not take it over
        place.append(f"--cpus-per-task={cpus}")
    return ["srun", *place, str(_shipped("accelerate.sh"))]


def shipped_config(name: str) -> Path:
    """`slurm/accelerate_<name>.yaml` of the checkout. Raises: SettingsError where there is none."""
    return _shipped(f"accelerate_{name}.yaml")


def _shipped(name: str) -> Path:
    path = Path(__file__).resolve().parents[2] / "slurm" / name
    if not path.is_file():
        raise SettingsError(f"no {path.name} in {path.parent}; run from a checkout, or give a configuration")
    return path

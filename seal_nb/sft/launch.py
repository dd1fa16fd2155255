"""Starts the training, in this process or in several: `accelerate launch` as a child process.

On GPUs the shipped configuration shards the model over them (FSDP, or DeepSpeed ZeRO-3). On CPUs the processes
communicate by gloo, and each holds the whole model. In a SLURM job over several nodes `srun` starts it on each of them.
A single process of its own frees its memory when it ends.
"""

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
    """Train a new model, in this process if `n_processes` is 1, otherwise see `train_in_processes`.

    Args:
        job: what to train.
        n_processes: GPUs, or processes on CPUs; it must divide the settings' gradient_accumulation_steps.
        sharding: how several GPUs share the model, "fsdp" or "deepspeed".

    Raises:
        SettingsError: the processes cannot share a step, or the sharding is unknown or not installed.
        DataError: a row of the file is no training example.
        EngineError: a process failed; the message has the end of the log.
    """
    config = launch_config(sharding)
    if n_processes > 1:
        return train_in_processes(job, n_processes=n_processes, config=config)
    return train_sft(
        job.sft_file, model=job.model, model_dir=job.model_dir, settings=job.settings, n_threads=job.n_threads
    )


def train_in_processes(job: SftJob, *, n_processes: int, config: Path | None = None) -> SftResult:
    """Train in `n_processes` on this machine, or on the nodes of this SLURM job.

    Their output goes to `<model_dir>.log`. A model folder that the same training made is used again. `config` is an
    accelerate configuration; None: the shipped one. Raises: see `run_job`.
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
        except BaseException:  # an interrupt must not leave processes that hold GPUs and write checkpoints
            end_tree(process.pid)
            process.wait()
            raise
    if code:  # the parent of the processes may have been killed alone
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    result = finished(job.model_dir, made_from)
    if code or result is None:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        where = "a process" if n_processes == 1 else f"{n_processes} processes"
        raise EngineError(f"training in {where} ended with code {code}; the end of {log_path}:\n{tail}")
    return result


def command(job: SftJob, n_processes: int, config: Path | None = None) -> list[str]:
    """The command line of a training. Raises: SettingsError if the nodes of this job cannot share the processes."""
    program = ["-m", MODULE, job.to_json()]
    if n_processes == 1:
        return ending_with_me([sys.executable, *program])
    options = [
        f"--config_file={config or launch_config('fsdp')}",
        f"--num_processes={n_processes}",
        f"--num_cpu_threads_per_process={job.n_threads}",
    ]
    n_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if n_nodes == 1:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]  # 0: a free port
    else:
        if n_processes % n_nodes:
            raise SettingsError(
                f"n_processes is {n_processes}, which this job's {n_nodes} nodes cannot share; give a multiple"
            )
        # One `accelerate launch` on each node; slurm/accelerate.sh gives it the node's number.
        start = ["srun", f"--nodes={n_nodes}", f"--ntasks={n_nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit"]
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not inherit it
            start.append(f"--cpus-per-task={cpus}")
        start.append(str(shipped("accelerate.sh")))
    return ending_with_me([*start, *options, *program])


def launch_config(sharding: str) -> Path:
    """The shipped configuration for this machine: that of `sharding` on GPUs, the only one on CPUs.

    Raises: SettingsError if the sharding is unknown, or DeepSpeed is not installed.
    """
    if sharding not in SHARDINGS:
        raise SettingsError(f"sharding is {sharding!r}; known are {', '.join(SHARDINGS)}")
    if sharding == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise SettingsError(
            "sharding is 'deepspeed', which is not installed; run pip install -e '.[deepspeed]', or use fsdp"
        )
    return shipped(f"accelerate_{sharding if torch.cuda.is_available() else 'cpu'}.yaml")


def shipped(name: str) -> Path:
    """A file of the checkout's `slurm` folder. Raises: SettingsError if it is missing."""
    path = Path(__file__).resolve().parents[2] / "slurm" / name
    if not path.is_file():
        raise SettingsError(f"no {path.name} in {path.parent}; run from a checkout, or give a configuration")
    return path

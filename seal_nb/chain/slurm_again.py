"""A server that has ended for want of clients, once more: for a client that comes late.

Its job is queued again under its number as long as SLURM remembers it (``MinJobAge``), and after that
submitted anew by the command in the chain's record. The client's job calls this (``slurm/job.sh``).
"""

import os
from pathlib import Path

from seal_nb.chain import slurm_jobs
from seal_nb.chain.local import Tell, sole_use
from seal_nb.chain.record import StageRecord, read_record, stage_in
from seal_nb.chain.slurm_jobs import SlurmError
from seal_nb.errors import SettingsError


def restart_server(folder: Path, *, project: Path, tell: Tell) -> str:
    """The number of the server's job, which waits or runs when this returns. One of many callers starts it.

    folder: the server's in its run (``RUN/base_server``); project: where jobs start.

    Raises:
        DataError: no chain was submitted in ``RUN``.
        ChainBusy: others work on its record.
        SettingsError: the folder is not that of a server's job.
        SlurmError: the server has failed or was cancelled, or SLURM refuses.
    """
    run_dir = folder.parent
    read_record(run_dir)  # before the lock, which would make the folder
    with sole_use(run_dir, tell):
        server = stage_in(run_dir, str(folder))
        if not server.background:
            raise SettingsError(f"{folder} is not that of a submitted server; give RUN/…_server")
        state = slurm_jobs.look_up(server.job) if server.job else None
        if state is not None and state.is_live:
            return server.job
        if state is not None and state.state != "COMPLETED":
            raise SlurmError(
                f"job {server.job} is {state.state}; look at {server.log(run_dir)}, submit again"
            )
        if state is not None:
            slurm_jobs.requeue(server.job)
            return server.job
        if not server.command:
            raise SettingsError(f"{folder} was submitted by an older version; submit the chain again")
        job = _submit(server, project)
        read_record(run_dir).with_job(server.name, job).write(run_dir)
        return job


def _submit(server: StageRecord, project: Path) -> str:
    env = slurm_jobs.outside_of_jobs(os.environ) | slurm_jobs.read_site(project / "slurm/site.sh")
    part = "_0" if "_" in server.job else ""  # the front end among the tasks of an array
    return slurm_jobs.submit(server.command, folder=project, env=env) + part

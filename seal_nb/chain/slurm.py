"""Run a chain on a cluster: submit the jobs that are missing, and remember their numbers.

What is done, or is still on its way, is not submitted again, so the same call continues a chain. Which jobs
there are is ``slurm_plan``'s.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from seal_nb.chain import slurm_jobs
from seal_nb.chain.local import Tell, sole_use
from seal_nb.chain.record import RECORD_FILE, read_record, record_of
from seal_nb.chain.slurm_jobs import SlurmError
from seal_nb.chain.slurm_plan import Cluster, Job, plan
from seal_nb.chain.table import Chain
from seal_nb.errors import RunMismatch


def submit_chain(chain: Chain, run_dir: Path, cluster: Cluster, *, tell: Tell) -> list[str]:
    """Submit what is missing; the names of the new jobs. All or, where SLURM refuses one, none.

    Raises:
        RunMismatch: jobs of the same folder with other settings are on their way.
        SlurmError: SLURM refused a job.
    """
    with sole_use(run_dir, tell):
        on_their_way = jobs_on_their_way(chain, run_dir)
        jobs = plan(chain, run_dir, cluster, on_their_way=on_their_way)
        for stage in chain:
            (run_dir / stage.name).mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for a log
        before = read_record(run_dir) if (run_dir / RECORD_FILE).exists() else None
        known = {**(before.jobs() if before else {}), **on_their_way}
        commands = {**(before.commands() if before else {}), **_commands(jobs)}
        # Before there are numbers: a job that starts at once finds its stage in the record.
        record_of(chain, executor="slurm", jobs=known, commands=commands).write(run_dir)
        known |= _by_stage(jobs, numbers := _submit_all(jobs, cluster, tell))
        record_of(chain, executor="slurm", jobs=known, commands=commands).write(run_dir)
    return list(numbers)


def _commands(jobs: Iterable[Job]) -> dict[str, tuple[str, ...]]:
    return {stage.name: job.later_command for job in jobs for stage in job.stages if stage.background}


def _by_stage(jobs: Iterable[Job], numbers: Mapping[str, str]) -> dict[str, str]:
    return {
        stage.name: numbers[job.name] + (f"_{stage.parameters['seed']}" if stage.array else "")
        for job in jobs
        for stage in job.stages
    }


def jobs_on_their_way(chain: Chain, run_dir: Path) -> dict[str, str]:
    """Stage → number, of jobs of an earlier call that wait or run. Raises: RunMismatch, SlurmError."""
    if not (run_dir / RECORD_FILE).exists():
        return {}
    found, other = {}, []
    identities = {stage.name: chain.identity(stage) for stage in chain}
    for stage in read_record(run_dir).stages:
        state = slurm_jobs.look_up(stage.job) if stage.job else None
        if state is not None and state.is_live:
            found[stage.name] = stage.job
            if identities.get(stage.name) != stage.identity:
                other.append(stage)
    if other:
        raise RunMismatch(
            f"{run_dir}: jobs with other settings are on their way: "
            f"{', '.join(f'{stage.name} ({stage.job})' for stage in other)}; wait for them, give another "
            f"--run-dir, or end them: scancel {' '.join(stage.job for stage in other)}"
        )
    return found


def _submit_all(jobs: Sequence[Job], cluster: Cluster, tell: Tell) -> dict[str, str]:
    numbers: dict[str, str] = {}
    env = {**os.environ, **cluster.site}
    try:
        for job in jobs:
            number = slurm_jobs.submit(job.command(numbers), folder=cluster.project, env=env)
            numbers[job.name] = number + job.part
            tell(_line(job, numbers))
    except BaseException as error:  # also Ctrl-C: jobs that no record names would be submitted twice
        slurm_jobs.cancel(number.partition("_")[0] for number in numbers.values())
        if not isinstance(error, SlurmError):
            raise
        raise SlurmError(
            f"job {job.name!r} was refused, so none was submitted; {error}. "
            f"Look at {cluster.site_file} and at the options of {job.script}"
        ) from error
    return numbers


def _line(job: Job, numbers: Mapping[str, str]) -> str:
    number = numbers[job.name] + (f" × {len(job.stages)}" if len(job.stages) > 1 else "")
    waits = [f"after {', '.join(job.afterok)}"] if job.afterok else []
    waits += [f"with {', '.join(job.after)}"] if job.after else []
    return f"{number:>10}  {job.name:<24}  {'; '.join(waits)}".rstrip()

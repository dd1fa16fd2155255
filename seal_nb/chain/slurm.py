"""Run a chain on a cluster: submit the jobs that are missing, and remember their numbers.

What is done, or is still on its way, is not submitted again, so the same call continues a chain. Which jobs
there are is ``slurm_plan``'s.

What SLURM says, and what it is told: sbatch, scontrol and scancel as they are, their answers as records.

Plain commands, no accounting: ``sacct`` needs a database that not every cluster has. SLURM forgets a finished
job after some minutes (``MinJobAge``), so who wants to know later reads the run's folder.

A chain as jobs: a job for each stage, an array for stages that differ in their seed only. Submits nothing.

A stage starts when what it needs has ended well (``afterok``); one that can never start is cancelled
(``--kill-on-invalid-dep``). A server starts when all who ask it could start, and they when it has started
(``after``): they wait for its endpoint file, and it ends by itself when nobody asks it. Scripts are those of
``slurm/``.

A server that has ended for want of clients, once more: for a client that comes late.

Its job is queued again under its number as long as SLURM remembers it (``MinJobAge``), and after that
submitted anew by the command in the chain's record. The client's job calls this (``slurm/job.sh``).

What would be submitted, as the text of a shell script: each job's command, and what its script wants.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from seal_nb.chain.local import Tell, sole_use
from seal_nb.chain.record import RECORD_FILE, StageRecord, read_record, record_of, stage_in
from seal_nb.chain.stages import Chain, Stage, is_done
from seal_nb.errors import RunMismatch, SealError, SettingsError
from seal_nb.notebook_runner import format_value

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
    return _call(command, folder=folder, env=env).strip().split(";")[0]  # NUMBER;CLUSTER where there are several


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
        raise SlurmError(f"no {command[0]} here; run this where SLURM is, or with --executor local") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {TIMEOUT_S:g} s; is the controller up?") from error
    if done.returncode:
        raise SlurmError(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where jobs come from, and over how many nodes servers and trainings go."""

    project: Path  # the checkout; jobs start in it
    site_file: Path
    site: Mapping[str, str]  # what the site file exports
    server_nodes: int = 1
    sft_nodes: int = 1  # of a ReST-EM training
    idle_timeout_s: float = 1800.0  # a server without a client ends itself

    def __post_init__(self) -> None:
        for name in ("server_nodes", "sft_nodes"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def gpus_a_node(self) -> int:
        gpus = self.site.get("SEAL_GPUS", "1").rpartition(":")[2]  # 2 or a100:2
        if not gpus.isdecimal():
            raise SettingsError(f"SEAL_GPUS of {self.site_file} is {self.site['SEAL_GPUS']!r}; write 2 or a100:2")
        return int(gpus)

    @property
    def workers_a_node(self) -> int:
        """One for each GPU; on CPUs one."""
        return max(1, self.gpus_a_node)

    def training_processes(self, accumulation: int) -> int:
        """On all nodes together: as many GPUs of each as can share ``accumulation`` micro-batches evenly."""
        for a_node in range(self.workers_a_node, 0, -1):
            if accumulation % (a_node * self.sft_nodes) == 0:
                return a_node * self.sft_nodes
        raise SettingsError(
            f"sft_accumulation is {accumulation}, which {self.sft_nodes} nodes cannot share; it counts the "
            "micro-batches of all processes: give a multiple, or other --sft-nodes"
        )

    def training_place(self, n_processes: int) -> list[str]:
        """The options of sbatch for a training: nodes, and on each a GPU for each of its processes."""
        a_node, rest = divmod(n_processes, self.sft_nodes)
        if rest or (self.gpus_a_node and a_node > self.gpus_a_node):
            raise SettingsError(
                f"sft_processes is {n_processes}, for {self.sft_nodes} nodes with {self.gpus_a_node} GPUs "
                "each; give all nodes the same number, and each process a GPU"
            )
        nodes = [f"--nodes={self.sft_nodes}"] if self.sft_nodes > 1 else []
        if a_node > 1:
            nodes.append("--mem=0")  # all of a node's: each process loads the whole model first
        if "SEAL_GPUS" not in self.site:
            return nodes
        kind = self.site["SEAL_GPUS"].rpartition(":")[0]
        gpus = f"{kind}:{a_node}" if kind else str(a_node)
        return [*nodes, f"--gpus-per-node={gpus if self.gpus_a_node else 0}"]

    def script(self, stage: Stage) -> str:
        """``03_query_server`` is run by ``slurm/query_server.sbatch``."""
        script = f"slurm/{stage.notebook.partition('_')[2]}.sbatch"
        if not (self.project / script).is_file():
            raise SettingsError(f"no {script} in {self.project} for stage {stage.name!r}; run from a checkout")
        return script

    def asks_for(self, script: str) -> list[str]:
        """The options that a script states."""
        return re.findall(r"^#SBATCH (.+)$", (self.project / script).read_text(), flags=re.MULTILINE)

    def place(self, path: Path) -> str:
        """As jobs call it: relative to the project if it lies there."""
        path = path.resolve()
        return str(path.relative_to(self.project) if path.is_relative_to(self.project) else path)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of sbatch. ``afterok`` and ``after``: names of jobs of the same plan, numbers of others.

    part: what others wait for, behind the number; ``_0`` is the front end among the tasks of a server.
    """

    name: str
    stages: tuple[Stage, ...]
    options: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]
    afterok: tuple[str, ...]
    after: tuple[str, ...]
    part: str = ""

    def command(self, numbers: Mapping[str, str]) -> list[str]:
        """``numbers``: of the jobs that were submitted before, by name."""
        return self._sbatch([*self._dependency(numbers), *self._watch(numbers)])

    @property
    def later_command(self) -> tuple[str, ...]:
        """The same once more, when all that it waits for is there."""
        return tuple(self._sbatch([]))

    def _sbatch(self, waits: Sequence[str]) -> list[str]:
        return ["sbatch", "--parsable", *self.options, *waits, self.script, *self.arguments]

    def _dependency(self, numbers: Mapping[str, str]) -> list[str]:
        kinds = (("afterok", self.afterok), ("after", self.after))
        said = [":".join([kind, *(numbers.get(job, job) for job in jobs)]) for kind, jobs in kinds if jobs]
        return [f"--dependency={','.join(said)}"] if said else []

    def _watch(self, numbers: Mapping[str, str]) -> list[str]:
        """A server that fails satisfies `after`, too: its clients look whether its job still lives."""
        return [f"--export=ALL,SEAL_SERVER_JOB={numbers.get(job, job)}" for job in self.after]


def plan(chain: Chain, run_dir: Path, cluster: Cluster, *, on_their_way: Mapping[str, str]) -> list[Job]:
    """The jobs that are missing, in an order in which each comes after what it waits for.

    on_their_way: stage → number, of the jobs of an earlier call that wait or run.
    """
    done = {stage.name for stage in chain if not stage.background and is_done(chain, stage, run_dir)}
    open_stages = [stage for stage in chain if not stage.background and stage.name not in done]
    servers = [
        stage for stage in chain if stage.background and any(user in open_stages for user in chain.users_of(stage))
    ]
    groups: dict[str, list[Stage]] = {}
    for stage in [*open_stages, *servers]:
        if stage.name not in on_their_way:
            groups.setdefault(stage.array or stage.name, []).append(stage)
    planned = [_Planned(chain, run_dir, cluster, done, on_their_way, group) for group in groups.values()]
    return _without_implied(_in_order([one.job() for one in planned]))


@dataclass(frozen=True)
class _Planned:
    """The stages of one job, and what is known of the others."""

    chain: Chain
    run_dir: Path
    cluster: Cluster
    done: set[str]
    on_their_way: Mapping[str, str]
    stages: list[Stage]

    def job(self) -> Job:
        first = self.stages[0]
        script = self.cluster.script(first)
        afterok, after = self._waits_for()
        return Job(
            name=self._job_of(first),
            stages=tuple(self.stages),
            options=tuple(self._options(first, script)),
            script=script,
            arguments=tuple(self._arguments(first)),
            afterok=afterok,
            after=after,
            part="_0" if self._is_server_array(first) else "",
        )

    def _job_of(self, stage: Stage) -> str:
        return self.on_their_way.get(stage.name) or stage.array or stage.name

    def _waits_for(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        first = self.stages[0]
        servers = self.chain.servers_of(first)
        # A server is of use only once those who ask it can start; before that its GPUs would idle. They too
        # wait for what made its model: `after` holds also for a server that was cancelled for want of it.
        askers = self.chain.users_of(first) if first.background else []
        needs = [name for stage in [first, *askers, *servers] for name in stage.needs if name != first.name]
        makers = [self.chain[name] for name in dict.fromkeys(needs) if not self.chain[name].background]
        afterok = [self._job_of(stage) for stage in makers if stage.name not in self.done]
        return tuple(dict.fromkeys(afterok)), tuple(self._job_of(server) for server in servers)

    def _is_server_array(self, stage: Stage) -> bool:
        return stage.background and self.cluster.server_nodes > 1

    def _options(self, first: Stage, script: str) -> list[str]:
        is_array = bool(first.array) or self._is_server_array(first)
        number = "%A_%a" if is_array else "%j"
        folder = self.cluster.place(self.run_dir / (first.array or first.name))
        if first.array:
            folder += "_seed%a"
        options = [
            "--kill-on-invalid-dep=yes",
            f"--job-name={first.array or first.name}",
            f"--output={folder}/{first.notebook}-{number}.log",
        ]
        if first.array:
            options.append(f"--array={','.join(str(stage.parameters['seed']) for stage in self.stages)}")
        elif is_array:
            options.append(f"--array=0-{self.cluster.server_nodes - 1}")
        return options + self._place(first, script)

    def _place(self, first: Stage, script: str) -> list[str]:
        if "n_processes" in first.parameters:
            return self.cluster.training_place(int(str(first.parameters["n_processes"])))
        asked = self.cluster.asks_for(script)
        if any(option.startswith("--gpus-per-node") for option in asked) and "SEAL_GPUS" in self.cluster.site:
            return [f"--gpus-per-node={self.cluster.site['SEAL_GPUS']}"]
        return []

    def _arguments(self, first: Stage) -> list[str]:
        values = first.values(Path(self.cluster.place(self.run_dir)))
        if first.array:  # the script makes both of the task's number
            del values["seed"]
            values["output_dir"] = self.cluster.place(self.run_dir / first.array)
        if first.background:
            values["idle_timeout_s"] = self.cluster.idle_timeout_s
        words = [word for name, value in values.items() for word in ("-p", name, format_value(value))]
        return words if first.background else [*words, "--chain", self.cluster.place(self.run_dir)]


def _without_implied(jobs: list[Job]) -> list[Job]:
    """Without the waiting for what another one that is waited for has waited for: the graph to read."""
    before: dict[str, set[str]] = {}
    short = []
    for job in jobs:
        earlier = {name for other in job.afterok for name in before.get(other, ())}
        before[job.name] = earlier | set(job.afterok)
        short.append(replace(job, afterok=tuple(name for name in job.afterok if name not in earlier)))
    return short


def _in_order(jobs: list[Job]) -> list[Job]:
    """Each after the jobs that it waits for, else as they were."""
    ordered: list[Job] = []
    names = {job.name for job in jobs}
    while len(ordered) < len(jobs):
        placed = {job.name for job in ordered}
        ordered.append(
            next(job for job in jobs if job.name not in placed and ({*job.afterok, *job.after} & names) <= placed)
        )
    return ordered


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
        state = look_up(server.job) if server.job else None
        if state is not None and state.is_live:
            return server.job
        if state is not None and state.state != "COMPLETED":
            raise SlurmError(f"job {server.job} is {state.state}; look at {server.log(run_dir)}, submit again")
        if state is not None:
            requeue(server.job)
            return server.job
        if not server.command:
            raise SettingsError(f"{folder} was submitted by an older version; submit the chain again")
        job = _submit(server, project)
        read_record(run_dir).with_job(server.name, job).write(run_dir)
        return job


def _submit(server: StageRecord, project: Path) -> str:
    env = outside_of_jobs(os.environ) | read_site(project / "slurm/site.sh")
    part = "_0" if "_" in server.job else ""  # the front end among the tasks of an array
    return submit(server.command, folder=project, env=env) + part


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
        state = look_up(stage.job) if stage.job else None
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
            number = submit(job.command(numbers), folder=cluster.project, env=env)
            numbers[job.name] = number + job.part
            tell(_line(job, numbers))
    except BaseException as error:  # also Ctrl-C: jobs that no record names would be submitted twice
        cancel(number.partition("_")[0] for number in numbers.values())
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


WIDTH = 110


def dry_run(chain: Chain, run_dir: Path, cluster: Cluster) -> str:
    """What ``submit_chain`` would do in an empty queue, as the text of a shell script."""
    jobs = plan(chain, run_dir, cluster, on_their_way={})
    kept = [stage.name for stage in chain if not stage.background and is_done(chain, stage, run_dir)]
    site = " ".join(f"{name}={value}" for name, value in sorted(cluster.site.items()))
    lines = [
        f"# chain {chain.name}: {sum(len(job.stages) for job in jobs)} stages in {len(jobs)} jobs",
        f"# site: {cluster.place(cluster.site_file)} {site}",
        *([f"# finished before, kept: {', '.join(kept)}"] if kept else []),
    ]
    for script in dict.fromkeys(job.script for job in jobs):
        lines += _packed(f"# {script}", cluster.asks_for(script), indent="#    ", end="")
    variables = {job.name: f"${{{job.name}}}{job.part}" if job.part else f"${job.name}" for job in jobs}
    for job in jobs:
        lines += ["", *(f"# {stage.title}" for stage in job.stages)]
        head, *rest = job.command(variables)
        lines += _packed(f"{job.name}=$({head}", _pairs(rest), indent="    ", end=" \\")
        lines[-1] += ")"
    return "\n".join(lines)


def _pairs(words: Iterable[str]) -> list[str]:
    """Quoted for a shell (but for the variables), an option and its value together."""
    text = " ".join(word if "$" in word else shlex.quote(word) for word in words)
    return re.findall(r"-p \w+ (?:'[^']*'|\S+)|--chain \S+|\S+", text)


def _packed(head: str, words: Sequence[str], *, indent: str, end: str) -> list[str]:
    lines = [head]
    for word in words:
        if len(lines[-1]) + 1 + len(word) + len(end) > WIDTH:
            lines[-1] += end
            lines.append(indent + word)
        else:
            lines[-1] += f" {word}"
    return lines

"""Run a chain on a SLURM cluster: a job for each stage, one job array for stages that differ in their seed only.

The scripts are in ``slurm/``. Commands used: sbatch, scontrol, scancel. Not ``sacct``, whose database not every cluster
has. SLURM forgets a job some minutes after its end (``MinJobAge``); the run's folder knows what became of it."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seal_nb.chain.local import RECORD_FILE, Status, Tell, read_record, sole_use, stage_in, write_record
from seal_nb.chain.stages import ENDPOINT_FILE, SERVER, SERVER_PARAMETERS, Chain, Stage, as_options, in_run
from seal_nb.errors import SECRET_VARIABLE, RunMismatch, SealError, SettingsError, keep_secret, redacted
from seal_nb.settings import Settings, setting

SITE_FILE = "slurm/site.sh"  # in the project
TIMEOUT_S = 60.0  # of one command
# Variables that SLURM sets in a job. A job that is submitted from there must not inherit them.
OF_A_JOB = re.compile("SLURM(?!_CONF$|_CLUSTERS$)|SRUN_|SEAL_SERVER_JOB$|(CUDA|ROCR|ZE)_|GPU_DEVICE_ORDINAL$")
# States of a job that has not ended (man squeue, JOB STATE CODES).
LIVE = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING",
    "STAGE_OUT", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip


class SlurmError(SealError, RuntimeError):
    """SLURM refused a command, or does not answer."""


def look_up(job: str) -> dict[str, str]:
    """What ``scontrol show job`` says of a job, such as its ``JobState``; nothing if SLURM does not know it (any more).
    Raises: SlurmError if SLURM does not answer."""
    try:
        shown = _call(["scontrol", "-o", "show", "job", job])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    about = re.search("^JobId=.*", shown, re.MULTILINE)  # a site may print a greeting before it
    if not about:
        raise SlurmError(f"scontrol says nothing of job {job}, but {shown[:200]!r}")
    return dict(re.findall(r"(\w+)=(\S*)", about[0]))


def job_status(stage: Stage) -> Status:
    """State and note of a stage with a job that has not marked itself as done. Raises: SlurmError."""
    job = {"Reason": "None", "NodeList": "", "Restarts": "0", "ExitCode": "0:0", **look_up(stage.job)}
    state, reason, where = job.get("JobState"), job["Reason"], f"job {stage.job}"
    if state is None:
        # A server that ended leaves no mark. Without a mark any other stage has no result.
        return ("ended" if stage.background else "lost"), f"{where}, which SLURM has forgotten"
    where += f" on {job['NodeList']}" if job["NodeList"] not in ("", "(null)") else ""
    where += f", run {int(job['Restarts']) + 1}" if job["Restarts"].strip("0").isdecimal() else ""
    because = f" ({reason})" if reason not in ("None", "NonZeroExitCode") else ""
    if state == "PENDING":
        return "waiting", f"{where} ({reason})"
    if state in LIVE:
        return "running", where
    if state == "CANCELLED":
        return "cancelled", where + because
    if state == "COMPLETED":
        return ("ended", where) if stage.background else ("failed", f"{where} ended without its results")
    code, _, signal = job["ExitCode"].partition(":")
    return "failed", f"{where}: {state}, {f'exit code {code}' if signal == '0' else f'signal {signal}'}{because}"


def _call(command: Sequence[str], folder: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    try:
        how: Any = {"capture_output": True, "text": True, "errors": "replace", "timeout": TIMEOUT_S}
        done = subprocess.run(command, cwd=folder, env=env, **how)
    except FileNotFoundError as error:
        raise SlurmError(f"no {command[0]} here; run this where SLURM is, or with --executor local") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {TIMEOUT_S:g} s; is the controller up?") from error
    if done.returncode:
        raise SlurmError(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def read_site(path: Path) -> dict[str, str]:
    """The variables for sbatch and the scripts that the site file exports. Raises: SettingsError."""
    if not path.is_file():
        raise SettingsError(f"no {path}; cp {path.with_name('site.example.sh')} {path}, and edit it for your cluster")
    # The user may have sourced the same file already; its variables would then not count as set by it.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "SEAL_"))}
    # The variables are wanted after a failure too, because its messages may show the values of keys.
    script = 'exec 19>&1 >&2; trap "env -0 >&19" EXIT; source "$1" && env -0 >&19'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(path)], capture_output=True, text=True, errors="surrogateescape", env=clean
    )
    pairs = [entry.partition("=") for entry in done.stdout.split("\0") if entry]
    told = re.findall(r"(\w+)(=)['\"]?([^\s'\";$()]+)", path.read_text(errors="replace") + done.stderr)  # by `set -x`
    for name, _, value in [*pairs, *told]:
        if SECRET_VARIABLE.search(name) and not os.access(value, os.F_OK):
            keep_secret(value)
    if done.returncode:
        raise SettingsError(f"{path} ends with code {done.returncode}: {done.stderr.strip()}")
    ours = ("SBATCH_", "SLURM_", "SEAL_")
    return {name: value for name, _, value in pairs if name.startswith(ours) and clean.get(name) != value}


@dataclass(frozen=True, kw_only=True)
class Cluster(Settings):
    """Where jobs start, and over how many nodes servers and trainings are spread."""

    project: Path  # the checkout; jobs start in it
    site: Mapping[str, str]  # variables that its SITE_FILE exports
    server_nodes: int = setting(1, "nodes of a TTT server", least=1)
    sft_nodes: int = setting(1, "nodes of a ReST-EM training", least=1)
    idle_timeout_s: float = setting(1800.0, "a server without clients ends after so many seconds", least=0)

    @property
    def gpus_a_node(self) -> int:
        value = self.site.get("SEAL_GPUS", "1")
        gpus = value.rpartition(":")[2]
        if not gpus.isdecimal():
            raise SettingsError(f"SEAL_GPUS of {self.project / SITE_FILE} is {value!r}; write 2 or a100:2")
        return int(gpus)

    def memory(self, script: str, gpus: int) -> list[str]:
        """The site's memory for a job with so many GPUs on a node, as the option that a script has already: sbatch ends
        at another one beside it, and drops a variable. Raises: SettingsError."""
        given = {name: self.site[name] for name in self.site if name.startswith("SBATCH_MEM_PER_")}
        cpus = re.findall("--cpus-per-task=([0-9]+)", " ".join(self.script_options(script)))
        counts = {
            "SBATCH_MEM_PER_CPU": int(cpus[0]) if cpus else 1,
            "SBATCH_MEM_PER_GPU": gpus,
            "SBATCH_MEM_PER_NODE": 1,
        }
        found = re.fullmatch("([0-9]+)([KMGTkmgt]?)[Bb]?", " ".join(given.values()))
        if given and (not found or not given.keys() <= counts.keys()):
            told = " ".join(f"{name}={value}" for name, value in given.items())
            raise SettingsError(f"{self.project / SITE_FILE} exports {told}; write one of {', '.join(counts)}, as 8G")
        n = sum(counts[name] for name in given)
        return [f"--mem={int(found[1]) * n}{found[2]}"] if found and n else []

    def gpus(self, most: int) -> list[str]:
        """The option of sbatch for at most so many GPUs of each node; nothing if the site file does not set them."""
        # SLURM would add these to --gpus-per-node of the scripts, or drop them.
        for name, value in self.site.items():
            if name.startswith("SBATCH_GPUS") or (name == "SBATCH_GRES" and "gpu" in value):
                remedy = "write SEAL_GPUS there instead, the GPUs of a node: 2 or a100:2"
                raise SettingsError(f"{self.project / SITE_FILE} exports {name}={value}; {remedy}")
        if "SEAL_GPUS" not in self.site:
            return []
        kind, n = self.site["SEAL_GPUS"].rpartition(":")[0], min(most, self.gpus_a_node)
        return [f"--gpus-per-node={kind}:{n}" if kind and n else f"--gpus-per-node={n}"]

    def training_processes(self, accumulation: int) -> int:
        """The most processes, one a GPU and equally many on each node, that divide ``accumulation`` micro-batches."""
        for a_node in range((self.gpus_a_node or 1), 0, -1):
            if accumulation % (a_node * self.sft_nodes) == 0:
                return a_node * self.sft_nodes
        raise SettingsError(
            f"sft_accumulation is {accumulation}, which {self.sft_nodes} nodes cannot share; it counts the "
            "micro-batches of all processes: give a multiple, or other --sft-nodes"
        )

    def resources(self, stage: Stage) -> list[str]:
        """The options of sbatch for nodes, memory and GPUs. A training has a GPU for each process, a server a worker on
        each GPU of its node; any other job uses at most one GPU."""
        if "n_processes" not in stage.parameters:
            needs_gpus = any(option.startswith("--gpus-per-node") for option in self.script_options(self.script(stage)))
            n_gpus = min(self.gpus_a_node, self.gpus_a_node if stage.background else 1) if needs_gpus else 0
            return [*self.memory(self.script(stage), n_gpus), *(self.gpus(n_gpus) if needs_gpus else [])]
        n_processes = int(str(stage.parameters["n_processes"]))
        a_node, rest = divmod(n_processes, self.sft_nodes)
        if rest or (self.gpus_a_node and a_node > self.gpus_a_node):
            raise SettingsError(
                f"sft_processes is {n_processes}, for {self.sft_nodes} nodes with {self.gpus_a_node} GPUs "
                "each; give all nodes the same number, and each process a GPU"
            )
        nodes = [f"--nodes={self.sft_nodes}"] if self.sft_nodes > 1 else []
        # By default the whole node's: each process first loads the whole model.
        memory = self.memory(self.script(stage), a_node) or (["--mem=0"] if a_node > 1 else [])
        return [*nodes, *memory, *self.gpus(a_node)]

    def script(self, stage: Stage) -> str:
        """``03_query_server`` is run by ``slurm/query_server.sbatch``."""
        script = f"slurm/{stage.notebook.partition('_')[2]}.sbatch"
        if not (self.project / script).is_file():
            raise SettingsError(f"no {script} in {self.project} for stage {stage.name!r}; run from a checkout")
        return script

    def script_options(self, script: str) -> list[str]:
        """The options of sbatch that a script states."""
        return re.findall(r"^#SBATCH (.+)$", (self.project / script).read_text(), flags=re.MULTILINE)

    def place(self, path: Path) -> str:
        """A path as a job uses it: relative to the project if it is there, so that scripts are short."""
        path = path.resolve()
        is_inside = path.is_relative_to(self.project) and "SEAL_RUNS" not in {**os.environ, **self.site}
        return str(path.relative_to(self.project) if is_inside else path)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of sbatch."""

    name: str
    stages: tuple[Stage, ...]
    options: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]
    afterok: tuple[str, ...] = ()  # jobs that must have ended well: names in the same plan, or numbers
    after: tuple[str, ...] = ()  # jobs that must have started
    part: str = ""  # added to its number for others that wait; ``_0``: the front end of a server on several nodes

    def command(self, numbers: Mapping[str, str], quoted: Callable[[str], str] = str) -> list[str]:
        """The words of the command. ``numbers``: of the jobs submitted before, by name. All other words are quoted."""
        kinds = (("afterok", self.afterok), ("after", self.after))
        before = [":".join([kind, *(numbers.get(job, job) for job in jobs)]) for kind, jobs in kinds if jobs]
        waits = [f"--dependency={','.join(before)}"] if before else []
        # A server that fails satisfies `after` too. Its clients therefore watch its job (slurm/job.sh).
        waits += [f"--export=ALL,SEAL_SERVER_JOB={numbers.get(job, job)}" for job in self.after]
        front, end = ["sbatch", "--parsable", *self.options], [self.script, *self.arguments]
        return [*map(quoted, front), *waits, *map(quoted, end)]

    def submit(self, cluster: Cluster, numbers: Mapping[str, str]) -> str:
        """Returns: its number, with its ``part``. Raises: SlurmError."""
        env = {name: value for name, value in os.environ.items() if not OF_A_JOB.match(name)}
        said = _call(self.command(numbers), cluster.project, env | {**cluster.site})
        # Among what the site prints; NUMBER;CLUSTER where there are several clusters.
        found = re.findall(r"^([0-9]+)(?:;\S+)?\s*$", said, re.MULTILINE)
        if not found:
            raise SlurmError(f"sbatch gave {said[:200]!r} for the number of a job")
        return f"{found[-1]}{self.part}"


def plan(chain: Chain, run_dir: Path, cluster: Cluster, *, on_their_way: Mapping[str, str]) -> list[Job]:
    """The jobs to submit, in the chain's order. A job starts when the jobs before it have ended well (``afterok``), a
    server's job when all its clients could start. They start after it (``after``). ``on_their_way``: stage → number,
    of jobs that wait or run."""
    done = {stage.name for stage in chain if stage.is_done(run_dir)}
    groups: dict[str, list[Stage]] = {}
    for stage in chain:
        wanted = chain.users_of(stage) if stage.background else [stage]
        if any(one.name not in done for one in wanted) and stage.name not in on_their_way:
            groups.setdefault(stage.array or stage.name, []).append(stage)

    def job_of(stage: Stage) -> str:
        return on_their_way.get(stage.name) or stage.array or stage.name

    jobs = []
    for name, stages in groups.items():
        first, servers = stages[0], chain.servers_of(stages[0])
        # A server waits for what its clients need: before that its GPUs would idle. They wait for what made the
        # server's model: `after` also holds for a server that was cancelled because its model was not made.
        clients = chain.users_of(first) if first.background else []
        needs = [chain[need] for stage in [first, *clients, *servers] for need in stage.needs if need != first.name]
        afterok = [job_of(stage) for stage in needs if not stage.background and stage.name not in done]
        job = _job(stages, run_dir, cluster, chain.array(name))
        after = tuple(job_of(server) for server in servers)
        jobs.append(replace(job, afterok=tuple(dict.fromkeys(afterok)), after=after))
    return jobs


def _job(stages: list[Stage], run_dir: Path, cluster: Cluster, array: Sequence[Stage] = ()) -> Job:
    """The job of ``stages``, which waits for none. ``array``: all stages of its array, of which these are submitted."""
    first, name, place = stages[0], stages[0].array or stages[0].name, cluster.place(run_dir)
    values, words, tasks = first.values(Path(place)), list[str](), ""
    if first.array:
        places = [array.index(stage) for stage in stages]
        tasks = f"0-{len(array) - 1}" if len(places) == len(array) else ",".join(map(str, places))
        # From the number of the task the script derives the folder, and the seed: seeds may be above MaxArraySize.
        words = ["--seeds", ",".join(str(stage.parameters["seed"]) for stage in array)]
        del values["seed"]
        values["output_dir"] = f"{place}/{name}"
    elif first.background:
        tasks = f"0-{cluster.server_nodes - 1}" if cluster.server_nodes > 1 else ""
        values["idle_timeout_s"] = cluster.idle_timeout_s
    log = f"{place}/{name}".replace("%", "%%")  # sbatch reads %j and its like as patterns
    log += f"/{first.notebook}-{'%A_%a' if tasks else '%j'}.log"
    options = ["--kill-on-invalid-dep=yes", f"--job-name={name}"]
    # In a name with a backslash SLURM reads no pattern. Then the script's own place of the log counts.
    options += [] if "\\" in log else [f"--output={log}"]
    options += [f"--array={tasks}"] if tasks else []
    words += as_options(values) + ([] if first.background else ["--chain", place])
    return Job(
        name=name,
        stages=tuple(stages),
        options=(*options, *cluster.resources(first)),
        script=cluster.script(first),
        arguments=tuple(words),
        part="_0" if first.background and tasks else "",
    )


def submit_chain(chain: Chain, run_dir: Path, cluster: Cluster, *, tell: Tell) -> list[str]:
    """Submit the missing jobs: all of them, or none if SLURM refuses one. Returns: the names of the new jobs.
    Raises: RunMismatch where jobs of the same folder with other settings wait or run; SlurmError."""
    with sole_use(run_dir, tell):
        on_their_way = jobs_on_their_way(chain, run_dir)
        jobs = plan(chain, run_dir, cluster, on_their_way=on_their_way)
        for stage in chain:
            (run_dir / (stage.array or stage.name)).mkdir(parents=True, exist_ok=True)  # SLURM makes none for a log
        before = list(read_record(run_dir)) if (run_dir / RECORD_FILE).exists() else []
        kept = ("job", "nodes", "idle_timeout_s")
        chain = chain.with_fields({stage.name: {name: getattr(stage, name) for name in kept} for stage in before})
        new = [(job, stage) for job in jobs for stage in job.stages]
        again = {"nodes": cluster.server_nodes, "idle_timeout_s": cluster.idle_timeout_s}
        chain = chain.with_fields({stage.name: again for _, stage in new if stage.background})
        # Written before there are numbers: a job that starts at once finds its stage in the record.
        write_record(chain, run_dir)
        numbers = _submit_all(jobs, cluster, tell)
        tasks = {one.name: f"_{chain.array(one.array).index(one)}" if one.array else "" for one in chain}
        chain = chain.with_fields({stage.name: {"job": numbers[job.name] + tasks[stage.name]} for job, stage in new})
        write_record(chain, run_dir)
    return list(numbers)


def jobs_on_their_way(chain: Chain, run_dir: Path) -> dict[str, str]:
    """Stage → number, of jobs of an earlier call that wait or run. Raises: RunMismatch, SlurmError."""
    if not (run_dir / RECORD_FILE).exists():
        return {}
    jobs = [stage for stage in read_record(run_dir) if stage.job]
    live = [stage for stage in jobs if look_up(stage.job).get("JobState") in LIVE]
    identities = {stage.name: stage.identity for stage in chain}
    if other := [stage for stage in live if identities.get(stage.name) != stage.identity]:
        found = ", ".join(f"{stage.name} ({stage.job})" for stage in other)
        remedy = "wait for them, give another --run-dir, or end them: scancel"
        ended = " ".join(stage.job for stage in other)
        raise RunMismatch(f"{run_dir}: jobs with other settings wait or run: {found}; {remedy} {ended}")
    return {stage.name: stage.job for stage in live}


def _submit_all(jobs: Sequence[Job], cluster: Cluster, tell: Tell) -> dict[str, str]:
    numbers: dict[str, str] = {}
    _check_arrays(jobs)
    try:
        for job in jobs:
            numbers[job.name] = job.submit(cluster, numbers)
            number = numbers[job.name] + (f" × {len(job.stages)}" if len(job.stages) > 1 else "")
            waits = [f"after {', '.join(job.afterok)}"] if job.afterok else []
            waits += [f"with {', '.join(job.after)}"] if job.after else []
            tell(f"{number:>10}  {job.name:<24}  {job.stages[0].notebook:<24}  {'; '.join(waits)}".rstrip())
    except BaseException as error:  # also Ctrl-C: jobs that are not in the record would be submitted twice
        if numbers:
            _call(["scancel", *(number.partition("_")[0] for number in numbers.values())])
        if not isinstance(error, SlurmError):
            raise
        remedy = f"Look at {cluster.project / SITE_FILE} and at the options of {job.script}"
        raise SlurmError(f"job {job.name!r} was refused, so none was submitted; {error}. {remedy}") from error
    return numbers


def _check_arrays(jobs: Sequence[Job]) -> None:
    """Raises: SettingsError for an array that is larger than the cluster allows, where it tells what it allows."""
    with suppress(SlurmError):
        (allowed,) = re.findall(r"^MaxArraySize\s*=\s*([0-9]+)", _call(["scontrol", "show", "config"]), re.M) or ["1e9"]
        for name, tasks in ((job.name, one) for job in jobs for one in job.options if one.startswith("--array=")):
            if int(re.findall("[0-9]+", tasks)[-1]) >= float(allowed):
                remedy = "give fewer --continual-seeds (or --server-nodes), and the others with another --run-dir"
                raise SettingsError(f"{name} is an array of over {allowed} jobs (MaxArraySize); {remedy}")


def restart_server(folder: Path, *, project: Path, tell: Tell) -> str:
    """Start a server's job again that ended because it had no clients; gives the number of the job that waits or runs
    now. SLURM queues the job again under its number as long as it knows it; later it is submitted again and waits for
    nothing. Of several callers only one starts it. Raises: SettingsError, SlurmError, DataError, RunMismatch."""
    run_dir = folder.parent
    read_record(run_dir)  # before the lock, which would make the folder
    with sole_use(run_dir, tell):
        server = stage_in(run_dir, folder)
        if not server.job or not server.background or server.notebook != SERVER:
            raise SettingsError(f"{folder} is not the folder of a submitted server; give RUN/…_server")
        known = look_up(server.job)
        state = known.get("JobState")
        if known.get("JobName", server.name) != server.name:
            raise SlurmError(f"job {server.job} is {known['JobName']}, not {server.name}; submit the chain again")
        if state is None:
            number = _submit_again(server, run_dir, project)
            write_record(read_record(run_dir).with_fields({server.name: {"job": number}}), run_dir)
            return number
        if state == "COMPLETED":
            _call(["scontrol", "requeue", server.job.partition("_")[0]])  # the whole array
        elif state not in LIVE:
            raise SlurmError(f"job {server.job} is {state}; look at {server.log(run_dir)}, submit again")
        return server.job


def _submit_again(server: Stage, run_dir: Path, project: Path) -> str:
    """The command is made anew: the record of a folder that comes from elsewhere must not choose what runs."""
    again: dict[str, Any] = {"server_nodes": server.nodes, "idle_timeout_s": server.idle_timeout_s}
    cluster = Cluster(project=project, site=read_site(project / SITE_FILE), **again)
    given = {name: value for name, value in server.parameters.items() if name in SERVER_PARAMETERS}
    server = replace(server, parameters=given | {"endpoint_file": in_run(server.name, ENDPOINT_FILE)})
    return _job([server], run_dir, cluster).submit(cluster, {})


def dry_run(chain: Chain, run_dir: Path, cluster: Cluster) -> str:
    """What ``submit_chain`` would do with an empty queue, as the text of a shell script."""
    jobs = plan(chain, run_dir, cluster, on_their_way={})
    kept = [stage.name for stage in chain if stage.is_done(run_dir)]
    hidden = {name: "***" for name in cluster.site if SECRET_VARIABLE.search(name)}
    site = redacted(" ".join(f"{name}={value}" for name, value in sorted({**cluster.site, **hidden}.items())))
    lines = [
        f"# chain {chain.name}: {sum(len(job.stages) for job in jobs)} stages in {len(jobs)} jobs",
        f"# site: {SITE_FILE} {' '.join(site.splitlines())}",
        *([f"# finished before, kept: {', '.join(kept)}"] if kept else []),
    ]
    for script in dict.fromkeys(job.script for job in jobs):
        lines.append(" ".join([f"# {script}", *cluster.script_options(script)]))
    variables = {job.name: f"${{{job.name}}}{job.part}" if job.part else f"${job.name}" for job in jobs}
    for job in jobs:
        lines += ["", *(f"# {stage.title} ({stage.notebook})" for stage in job.stages)]
        lines.append(f"{job.name}=$({' '.join(job.command(variables, shlex.quote))})")
    return "\n".join(lines)

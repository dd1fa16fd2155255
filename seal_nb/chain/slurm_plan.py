"""A chain as jobs: a job for each stage, an array for stages that differ in their seed only. Submits nothing.

A stage starts when what it needs has ended well (``afterok``); one that can never start is cancelled
(``--kill-on-invalid-dep``). A server starts when all who ask it could start, and they when it has started
(``after``): they wait for its endpoint file, and it ends by itself when nobody asks it. Scripts are those of
``slurm/``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from seal_nb.chain.table import Chain, Stage, is_done
from seal_nb.errors import SettingsError
from seal_nb.notebook_runner import format_value


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
            raise SettingsError(
                f"SEAL_GPUS of {self.site_file} is {self.site['SEAL_GPUS']!r}; write 2 or a100:2"
            )
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
            raise SettingsError(
                f"no {script} in {self.project} for stage {stage.name!r}; run from a checkout"
            )
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
        stage
        for stage in chain
        if stage.background and any(user in open_stages for user in chain.users_of(stage))
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
            next(
                job
                for job in jobs
                if job.name not in placed and ({*job.afterok, *job.after} & names) <= placed
            )
        )
    return ordered

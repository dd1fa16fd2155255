"""A real SLURM on this machine in seconds: a controller and nodes, each in a network namespace of its own.

For tests, as root, with Debian's slurm-wlm and munge, without systemd and cgroups. Each node has its own host
name, its own address (10.77.0.1N) and its own loopback, so that a server that listens on 127.0.0.1 cannot be
reached from another node. GPUs are pretended: they set CUDA_VISIBLE_DEVICES. Commands go in through
``Cluster.run``, as from a login node. Everything lies under one short folder in /tmp, since a unix socket's
path is limited to 108 bytes.
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from seal_nb.chain.slurm import LIVE

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "unshare", "setpriv")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# The namespace's own /etc/hosts and host name, then the command.
ENTER = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
MailProg=/bin/true
ReturnToService=2
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MinJobAge=86400
KillWait=3
CompleteWait=0
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
GresTypes=gpu
"""
PARTITIONS = """\
PartitionName=day Nodes=ALL Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""
GRES_CONF = "AutoDetect=off\nNodeName=node[1-{n_nodes}] Name=gpu File={folder}/dev/gpu[0-{last_gpu}]\n"


def missing() -> str:
    """Why no cluster can be started here; "" if one can."""
    if absent := [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]:
        return f"{', '.join(absent)} not found; install them: .ci/slurm.sh"
    return "it needs root" if os.geteuid() else ""


class Cluster:
    """``with Cluster() as cluster: cluster.sbatch(…)``."""

    def __init__(self, *, n_nodes: int = 2, cpus: int = 32, gpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))
        self.nodes = [f"node{number}" for number in range(1, n_nodes + 1)]
        self._sizes = {"n_nodes": n_nodes, "cpus": cpus, "gpus": gpus, "last_gpu": gpus - 1}
        self._spaces = {name: f"{self.folder.name}-{name}" for name in ("ctl", *self.nodes)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SEAL_"))}
        self.env = {**kept, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        try:
            self._write_configuration()
            self._make_network()
            self._start_munge()
            self._start("slurmctld", "ctl", ["slurmctld", "-D", "-c"])
            for node in self.nodes:
                self._start_node(node)
            self._until(self._all_up, "nodes are not up", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("slurmctld", *self.nodes):  # the controller first: it would queue again what is ended
            if name in self._daemons:
                self._kill(self._daemons.pop(name))
        for process in self._job_processes():
            _kill(process)
        for daemon in self._daemons.values():
            self._kill(daemon)
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "del", space], env=self.env, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # What a user does

    def run(
        self, *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        command = self._inside("ctl", [str(word) for word in words])
        full = {**self.env, **(env or {})}
        return subprocess.run(command, cwd=cwd, env=full, text=True, capture_output=True, stdin=subprocess.DEVNULL)

    def sbatch(self, *words: str | Path, cwd: Path) -> str:
        """The number of the new job."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of the job."""
        said = self.run("scontrol", "-o", "show", "job", number).stdout.splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def wait(self, number: str, state: str = "", timeout_s: float = 300.0) -> dict[str, str]:
        """The job once it is in ``state``, or has ended. An end in another state fails."""

        def there() -> bool:
            now = self.job(number)["JobState"]
            assert not state or now == state or now in LIVE, f"job {number} is {now}\n{self.output(number)}"
            return now == state if state else now not in LIVE

        self._until(there, f"job {number} is not {state or 'ended'}", timeout_s, number=number)
        return self.job(number)

    def output(self, number: str) -> str:
        """What the job has written to SLURM's file for it."""
        path = Path(self.job(number).get("StdOut", ""))
        return f"{path}:\n{path.read_text()[-3000:]}" if path.is_file() else f"{path}: no such file"

    def queue(self) -> list[str]:
        """Numbers of all jobs that wait or run."""
        return self.run("squeue", "--noheader", "--format=%i").stdout.split()

    # What happens to a machine room

    def is_up(self, node: str) -> bool:
        said = self.run("scontrol", "-o", "show", "node", node).stdout
        return re.search(r"State=(IDLE|MIXED|ALLOCATED)[^*\s]*\s", said) is not None

    def cut_power(self, node: str) -> None:
        """Everything on the node ends at once; nobody tells the controller."""
        self._kill(self._daemons.pop(node))
        for process in self._job_processes(node):
            _kill(process)

    def restore(self, node: str) -> None:
        self._start_node(node)
        self._until(lambda: self.is_up(node), f"{node} is not up again", 60)

    def processes(self, node: str = "") -> list[psutil.Process]:
        """Job processes of the node, or of all; SLURM's own are not among them."""
        return [process for process in self._job_processes(node) if _name(process) != "slurmstepd"]

    def _job_processes(self, node: str = "") -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                env = process.environ()
                ours = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURMD_NODENAME" in env
                if ours and node in ("", env["SLURMD_NODENAME"]):
                    parent = process.parent()
                    if parent is not None and _name(parent) == "slurmstepd":
                        yield parent
                    yield process
            except psutil.Error:
                continue

    # How it is made

    def _write_configuration(self) -> None:
        self.folder.chmod(0o755)
        for name in ("munge", "state", "spool", "log", "dev"):
            (self.folder / name).mkdir(mode=0o755)
        values = {"folder": self.folder, **self._sizes}
        sizes = "CPUs={cpus} RealMemory=512000 Gres=gpu:{gpus} State=UNKNOWN".format(**values)
        addresses = {node: f"10.77.0.{10 + number}" for number, node in enumerate(self.nodes, 1)}
        nodes = [f"NodeName={node} NodeAddr={address} {sizes}\n" for node, address in addresses.items()]
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**values) + "".join(nodes) + PARTITIONS)
        (self.folder / "gres.conf").write_text(GRES_CONF.format(**values))
        # slurmd 22.05 looks for cgroups at its start even where none are used, and ends where it finds none.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for gpu in range(self._sizes["gpus"]):  # GPUs must be character devices; these are /dev/null once more
            os.mknod(self.folder / f"dev/gpu{gpu}", 0o20666, os.makedev(1, 3))
        hosts = {"localhost": "127.0.0.1", "ctl": "10.77.0.1", **addresses}
        lines = [f"{address} {name}\n" for name, address in hosts.items()]
        (self.folder / "hosts").write_text("".join(lines))

    def _make_network(self) -> None:
        """A namespace for the controller with a bridge, one for each node, cables between."""
        for space in self._spaces.values():
            self._ip("netns", "add", space)
            self._ip("-n", space, "link", "set", "lo", "up")
        hub = self._spaces["ctl"]
        self._ip("-n", hub, "link", "add", "br0", "type", "bridge")
        self._ip("-n", hub, "addr", "add", "10.77.0.1/24", "dev", "br0")
        self._ip("-n", hub, "link", "set", "br0", "up")
        for number, node in enumerate(self.nodes, 1):
            space, cable = self._spaces[node], f"v{number}"
            self._ip("link", "add", cable, "netns", hub, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("-n", hub, "link", "set", cable, "master", "br0", "up")
            self._ip("-n", space, "addr", "add", f"10.77.0.{10 + number}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], env=self.env, check=True, capture_output=True, text=True)

    def _inside(self, host: str, words: Sequence[str]) -> list[str]:
        hosts = str(self.folder / "hosts")
        return ["ip", "netns", "exec", self._spaces[host], "unshare", "-um", "sh", "-c", ENTER, hosts, host, *words]

    def _start_munge(self) -> None:
        place = self.folder / "munge"
        key = place / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key, "socket": place / "socket", "pid-file": place / "pid"}
        files |= {"log-file": place / "log", "seed-file": place / "seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._daemons["munge"] = self._popen("munge", ["munged", "--foreground", *options])
        self._until((place / "socket").exists, "munge is not up", 20)

    def _start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._start(node, node, ["slurmd", "-D", "-N", node])

    def _start(self, name: str, host: str, words: list[str]) -> None:
        self._daemons[name] = self._popen(name, self._inside(host, [*words, "-f", self.env["SLURM_CONF"]]))

    def _popen(self, name: str, words: Sequence[str]) -> "subprocess.Popen[bytes]":
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            # It ends with this process, however that ends.
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words], cwd="/", env=self.env,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def _kill(self, daemon: "subprocess.Popen[bytes]") -> None:
        daemon.kill()
        daemon.wait()

    def _until(self, there: Callable[[], bool], problem: str, timeout_s: float, number: str = "") -> None:
        deadline = time.monotonic() + timeout_s
        while not there():
            if time.monotonic() > deadline:
                said = f"{self.job(number)}\n{self.output(number)}" if number else self._logs()
                raise TimeoutError(f"{problem} after {timeout_s:g} s\n{said}")
            time.sleep(0.1)

    def _all_up(self) -> bool:
        ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
        if ended:
            raise RuntimeError(f"{', '.join(ended)} ended at the start\n{self._logs()}")
        return all(self.is_up(node) for node in self.nodes)

    def _logs(self) -> str:
        parts = [(path, path.read_text(errors="replace")) for path in sorted((self.folder / "log").iterdir())]
        return "\n".join(f"{path}:\n{text[-1500:]}" for path, text in parts)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.kill()

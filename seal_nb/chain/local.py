"""Run a chain on this machine: one stage after another, each in a process of its own, servers in the background.

After an interruption of any kind the same call continues: finished stages are kept, and an unfinished one goes on
from its own journal. No process outlives the chain, not even after a `kill -9` (``processes.end_with_parent``)."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from seal_nb.chain.record import Tell, sole_use, write_record
from seal_nb.chain.stages import ENDPOINT_FILE, Chain, Stage, as_options
from seal_nb.errors import SealError, visible
from seal_nb.notebook_runner import StageFailed
from seal_nb.processes import LoggedProcess, end_tree

QUIET_S = 30.0  # after such a silence a line says that a stage is still running
POLL_S = 0.2
READY_TIMEOUT_S = 600.0  # of a server that loads a 7B model from a network disk
STOP_TIMEOUT_S = 30.0


def shut_down(endpoint_file: Path) -> None:
    """Ask the server to end."""
    from seal_nb.server.client import TTTClient

    with TTTClient(str(endpoint_file), wait_s=10) as client:
        client.shutdown()


def run_chain(chain: Chain, run_dir: Path, *, notebooks: Path, tell: Tell) -> None:
    """Run the stages that are not done yet. Raises: StageFailed (later stages are not started), RunMismatch."""
    with sole_use(run_dir, tell) as lock, contextlib.ExitStack() as at_the_end:
        for number in (signal.SIGTERM, signal.SIGHUP):  # child processes are then ended on the way out
            before = signal.signal(number, lambda number, _: sys.exit(128 + number))
            at_the_end.callback(signal.signal, number, before)
        write_record(chain, run_dir)
        run = _Run(chain=chain, run_dir=run_dir, notebooks=notebooks, tell=tell, lock=lock)
        try:
            run.stages()
        finally:
            for child in reversed(run.children.values()):
                end_tree(child.pid)


class _Child(LoggedProcess):
    """A stage's process. It writes into a log file, which is read while it grows."""

    def __init__(self, command: list[str], log: Path, lock: int) -> None:
        # Ctrl-C reaches only the chain, which ends its children in order.
        super().__init__(command, log, is_new=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, pass_fds=(lock,))
        self.started = time.monotonic()
        self._log, self._rest = log.open(encoding="utf-8", errors="replace"), ""

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def new_lines(self) -> list[str]:
        """The whole lines written since the last call."""
        *lines, self._rest = (self._rest + self._log.read()).split("\n")
        return [visible(line.rstrip().rpartition("\r")[2]) for line in lines if line.strip()]


@dataclass(kw_only=True)
class _Run:
    """One call of run_chain."""

    chain: Chain
    run_dir: Path
    notebooks: Path
    tell: Tell
    lock: int
    children: dict[str, _Child] = field(default_factory=dict)  # that run: servers, and one stage
    started: float = field(default_factory=time.monotonic)

    def stages(self) -> None:
        foreground = [stage for stage in self.chain if not stage.background]
        pending = [stage for stage in foreground if not stage.is_done(self.run_dir)]
        for k, stage in enumerate(foreground, 1):
            place = f"[{k:>{len(str(len(foreground)))}}/{len(foreground)}] {stage.name} ({stage.notebook})"
            if stage not in pending:
                self.tell(f"{place}: finished before, kept")
                continue
            self.stage(stage, place)
            pending.remove(stage)
            self.stop_servers_except(pending)

    def stage(self, stage: Stage, place: str) -> None:
        for server in self.chain.servers_of(stage):
            if server.name not in self.children:
                self.start_server(server)
        self.tell(f"{place}: {stage.title}")
        child = self.start(stage)
        self.follow(child, stage)
        if code := self.children.pop(stage.name).wait():
            raise self.failure(f"stage {stage.name!r} ended with exit code {code}", stage)
        if missing := stage.missing(self.run_dir):
            raise self.failure(f"stage {stage.name!r} did not write {', '.join(missing)}", stage)
        stage.mark_done(self.run_dir, seconds=child.seconds())
        total = clock(time.monotonic() - self.started)
        self.tell(f"{place}: done in {clock(child.seconds())} ({total} in all)")

    def start(self, stage: Stage) -> _Child:
        command = run_command(stage, self.run_dir, self.notebooks)
        child = self.children[stage.name] = _Child(command, stage.log(self.run_dir), self.lock)
        return child

    def follow(self, child: _Child, stage: Stage) -> None:
        """Pass on the stage's output until it ends; raise if a server that it needs ends earlier."""
        last_told, running = time.monotonic(), True
        while running:
            running = child.poll() is None
            lines = child.new_lines()
            if not lines and time.monotonic() - last_told > QUIET_S:
                lines = [f"{stage.name}: still running after {clock(child.seconds())}"]
            for line in lines:
                self.tell(f"    {line}")
                last_told = time.monotonic()
            for server in self.chain.servers_of(stage):
                self.check_server(server)
            if running and not lines:
                time.sleep(POLL_S)

    def start_server(self, stage: Stage) -> None:
        """Start a server and wait until it is ready."""
        ready = self.run_dir / stage.name / ENDPOINT_FILE
        ready.unlink(missing_ok=True)
        self.tell(f"{stage.name} ({stage.notebook}): {stage.title}")
        child = self.start(stage)
        while not ready.exists():
            self.check_server(stage)
            if child.seconds() > READY_TIMEOUT_S:
                raise self.failure(f"server {stage.name!r} not ready in {READY_TIMEOUT_S:.0f} s", stage)
            time.sleep(POLL_S)
        self.tell(f"{stage.name}: ready after {clock(child.seconds())}")

    def check_server(self, stage: Stage) -> None:
        if (code := self.children[stage.name].poll()) is not None:
            raise self.failure(f"server {stage.name!r} ended early with exit code {code}", stage)

    def stop_servers_except(self, pending: list[Stage]) -> None:
        """Stop the servers that no pending stage needs."""
        needed = {server.name for stage in pending for server in self.chain.servers_of(stage)}
        for name in self.children.keys() - needed:
            child = self.children.pop(name)
            # A server that does not answer is ended below.
            with contextlib.suppress(SealError, OSError, subprocess.TimeoutExpired):
                shut_down(self.run_dir / name / ENDPOINT_FILE)
                child.wait(STOP_TIMEOUT_S)
            end_tree(child.pid)
            self.tell(f"{name}: stopped")

    def failure(self, problem: str, stage: Stage) -> StageFailed:
        return StageFailed(
            f"{problem}; its output is in {stage.log(self.run_dir)}, its notebook is "
            f"{stage.executed(self.run_dir)}. The same command continues: finished stages are kept"
        )


def run_command(stage: Stage, run_dir: Path, notebooks: Path) -> list[str]:
    """The command that runs ``stage`` as a child of this process."""
    command = [sys.executable, "-m", "seal_nb.cli", "run", stage.notebook, "--notebooks", str(notebooks)]
    return [*command, "--parent-pid", str(os.getpid()), *as_options(stage.values(run_dir))]


def clock(seconds: float) -> str:
    """``seconds`` as minutes and seconds: 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

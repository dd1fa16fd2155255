"""Run a chain on this machine: stage after stage, each a process of its own, servers in the background.

Started again after an interruption of any kind it continues: finished stages are kept, and an unfinished one
goes on from its own journal. No process outlives the chain: ended normally, by Ctrl-C or SIGTERM the trees of
processes are ended here; if the chain is killed outright its children notice (``lifeline``).
What is told goes through ``tell``, line by line; nothing is printed here.
"""

import contextlib
import fcntl
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from seal_nb.chain.stages import Chain, Stage, is_done, mark_done
from seal_nb.errors import SealError
from seal_nb.notebook_runner import format_value
from seal_nb.processes import end_tree

QUIET_S = 30.0  # silence after which a line says that a stage is still running
READY_TIMEOUT_S = 600.0  # a server that loads a 7B model from a network disk
STOP_TIMEOUT_S = 30.0
TAKEOVER_TIMEOUT_S = 20.0  # what children of a killed chain may need to end
Tell = Callable[[str], None]
StopServer = Callable[[Path], None]
AtWork = Callable[[Path], str]


class ChainFailed(SealError, RuntimeError):
    """A stage ended with an error, or a server it needs did."""


class ChainBusy(SealError, RuntimeError):
    """Another process works in the run's folder."""


def run_chain(
    chain: Chain,
    run_dir: Path,
    *,
    notebooks: Path,
    tell: Tell,
    stop_server: StopServer,
    at_work: AtWork = lambda _: "",
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """Run what is not done yet. ``stop_server`` gets a server's ready file and asks that server to end,
    ``at_work`` gets it and says what the server does; ``prepare`` is called once the folder is ours.

    Raises:
        ChainFailed: a stage failed; those after it were not started.
        ChainBusy: the folder is in use.
    """
    with sole_use(run_dir, tell) as lock, _terminate_raises():
        prepare()
        _LocalRun(
            chain=chain, run_dir=run_dir, notebooks=notebooks, tell=tell, stop_server=stop_server,
            at_work=at_work, lock=lock,
        ).run()  # fmt: skip


@contextlib.contextmanager
def sole_use(run_dir: Path, tell: Tell) -> Iterator[int]:
    """Hold the folder's lock. Children inherit it, so it also shows what a killed chain has left running."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / ".chain.lock"
    with path.open("a+") as file:
        _wait_for_lock(file.fileno(), path, tell)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def in_use_since(run_dir: Path) -> float | None:
    """When the chain that runs in this folder began (seconds, as files have it); None where none does.

    What a killed chain left behind counts, and so does a lock that cannot be looked at.
    """
    path = run_dir / ".chain.lock"
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError:
        return path.stat().st_mtime
    return None


def _wait_for_lock(descriptor: int, path: Path, tell: Tell) -> None:
    deadline = time.monotonic() + TAKEOVER_TIMEOUT_S
    told = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ChainBusy(
                    f"{path.parent} is in use by process {path.read_text() or '?'} or a child of it; "
                    "wait for it, end it, or give another run folder"
                ) from None
        if not told:
            tell(f"waiting for what process {path.read_text() or '?'} left running in {path.parent}")
            told = True
        time.sleep(0.5)


@contextlib.contextmanager
def _terminate_raises() -> Iterator[None]:
    """SIGTERM and SIGHUP become an exception here, so that children are ended on the way out."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(kw_only=True)
class _Child:
    """A stage's process; its lines come through ``lines`` and are kept in a log."""

    process: subprocess.Popen[str]
    log: Path
    started: float
    lines: queue.SimpleQueue[str]

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def next_line(self, timeout_s: float) -> str | None:
        try:
            return self.lines.get(timeout=timeout_s)
        except queue.Empty:
            return None


@dataclass(kw_only=True)
class _LocalRun:
    chain: Chain
    run_dir: Path
    notebooks: Path
    tell: Tell
    stop_server: StopServer
    at_work: AtWork
    lock: int
    servers: dict[str, _Child] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        foreground = [stage for stage in self.chain if not stage.background]
        pending = [stage for stage in foreground if not is_done(self.chain, stage, self.run_dir)]
        try:
            for k, stage in enumerate(foreground, 1):
                place = f"[{k:>{len(str(len(foreground)))}}/{len(foreground)}]"
                if stage not in pending:
                    self.tell(f"{place} {stage.name}: finished before, kept")
                    continue
                self.run_stage(stage, place)
                pending.remove(stage)
                self.stop_servers_but(pending)
        finally:
            for child in self.servers.values():
                end_tree(child.process.pid)

    def run_stage(self, stage: Stage, place: str) -> None:
        for server in self.chain.servers_of(stage):
            if server.name not in self.servers:
                self.start_server(server)
        self.tell(f"{place} {stage.name}: {stage.title}")
        child = self.start(stage)
        try:
            self.follow(child, stage)
        finally:
            end_tree(child.process.pid)
        if code := child.process.wait():
            raise ChainFailed(self.failure(f"stage {stage.name!r} ended with exit code {code}", child))
        missing = [name for name in stage.produces if not (self.run_dir / stage.name / name).exists()]
        if missing:
            raise ChainFailed(self.failure(f"stage {stage.name!r} did not write {', '.join(missing)}", child))
        mark_done(self.chain, stage, self.run_dir, seconds=child.seconds())
        total = clock(time.monotonic() - self.started)
        self.tell(f"{place} {stage.name}: done in {clock(child.seconds())} ({total} in all)")

    def start(self, stage: Stage) -> _Child:
        """Start the stage's notebook in a process of its own."""
        log = self.run_dir / "logs" / f"{stage.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            run_command(stage, self.run_dir, self.notebooks),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A terminal's Ctrl-C is for the chain, which then ends its children in order.
            start_new_session=True,
            pass_fds=(self.lock,),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        child = _Child(process=process, log=log, started=time.monotonic(), lines=queue.SimpleQueue())
        threading.Thread(target=_read_lines, args=(child,), daemon=True).start()
        return child

    def follow(self, child: _Child, stage: Stage) -> None:
        """Tell the stage's lines until it ends; raise if a server it needs ends before."""
        last_told = time.monotonic()
        running = True
        while (line := child.next_line(0.5)) is not None or running:
            running = child.process.poll() is None
            if line is not None and line.strip():
                self.tell(f"    {line.rstrip()}")
                last_told = time.monotonic()
            elif time.monotonic() - last_told > QUIET_S:
                self.tell(self.still_running(child, stage))
                last_told = time.monotonic()
            for server in self.chain.servers_of(stage):
                self.check_server(server)

    def still_running(self, child: _Child, stage: Stage) -> str:
        """With what the servers do for it, where they say."""
        said = [self.at_work(self.ready_file(server)) for server in self.chain.servers_of(stage)]
        text = f"    {stage.name}: still running after {clock(child.seconds())}"
        return ", ".join([text, *filter(None, said)])

    def start_server(self, stage: Stage) -> None:
        """Start a background stage and wait until it says that it is ready."""
        ready = self.ready_file(stage)
        ready.unlink(missing_ok=True)
        self.tell(f"{stage.name}: {stage.title}")
        child = self.servers[stage.name] = self.start(stage)
        while not ready.exists():
            self.check_server(stage)
            if child.seconds() > READY_TIMEOUT_S:
                raise ChainFailed(self.failure(f"server {stage.name!r} not ready in {READY_TIMEOUT_S:.0f} s", child))
            time.sleep(0.2)
        self.tell(f"{stage.name}: ready after {clock(child.seconds())}")

    def ready_file(self, stage: Stage) -> Path:
        return self.run_dir / stage.name / stage.produces[0]

    def check_server(self, stage: Stage) -> None:
        child = self.servers[stage.name]
        if (code := child.process.poll()) is not None:
            raise ChainFailed(self.failure(f"server {stage.name!r} ended early with exit code {code}", child))

    def stop_servers_but(self, pending: list[Stage]) -> None:
        """Stop the servers that no pending stage needs."""
        wanted = {server.name for stage in pending for server in self.chain.servers_of(stage)}
        for name in [name for name in self.servers if name not in wanted]:
            child = self.servers.pop(name)
            # One that cannot be asked is ended all the same.
            with contextlib.suppress(SealError, OSError, subprocess.TimeoutExpired):
                self.stop_server(self.ready_file(self.chain[name]))
                child.process.wait(STOP_TIMEOUT_S)
            end_tree(child.process.pid)
            self.tell(f"{name}: stopped")

    def failure(self, problem: str, child: _Child) -> str:
        executed = self.run_dir / child.log.stem / f"{self.chain[child.log.stem].notebook}.ipynb"
        return (
            f"{problem}; its output is in {child.log}, its notebook is {executed}. "
            "The same command again continues: finished stages are kept"
        )


def run_command(stage: Stage, run_dir: Path, notebooks: Path) -> list[str]:
    """The command that runs ``stage`` as a child of this process."""
    command = [sys.executable, "-m", "seal_nb.cli", "run", stage.notebook, "--notebooks", str(notebooks)]
    command += ["--parent-pid", str(os.getpid())]
    for name, value in stage.values(run_dir).items():
        command += ["-p", name, format_value(value)]
    return command


def _read_lines(child: _Child) -> None:
    assert child.process.stdout is not None
    with child.log.open("w", encoding="utf-8") as log:
        for line in child.process.stdout:
            log.write(line)
            log.flush()
            child.lines.put(line)


def clock(seconds: float) -> str:
    """``seconds`` as minutes and seconds: 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

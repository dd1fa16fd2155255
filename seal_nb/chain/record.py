"""What a run's folder knows of its chain: ``chain.json``, the marks of finished stages, and the folder's lock.

`submit` and the local executor write ``chain.json``. A job finds in it the identity under which it marks its stage
as done, and `chain-status` finds the stages and their jobs. All paths follow from names, so the folder can be moved.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from seal_nb.chain.stages import Chain, Stage
from seal_nb.errors import DataError, SealError, SettingsError
from seal_nb.storage import read_json, write_json

RECORD_FILE = "chain.json"
LOCK_FILE = ".chain.lock"
TAKEOVER_TIMEOUT_S = 20.0  # the processes of a killed chain need some seconds to end
Tell = Callable[[str], None]  # receives progress, line by line


class ChainBusy(SealError, RuntimeError):
    """Another process works in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage of a chain that was started.

    Args:
        identity: what the stage computes (``Chain.identity``).
        job: SLURM's number, ``12`` or ``12_43`` in an array; empty without SLURM.
        command: submits a server's job again; empty for other stages.
    """

    name: str
    title: str
    notebook: str
    identity: str
    needs: tuple[str, ...]
    produces: tuple[str, ...]
    background: bool
    job: str = ""
    command: tuple[str, ...] = ()

    def missing(self, run_dir: Path) -> list[str]:
        """Result files that the stage has not written."""
        return [file for file in self.produces if not (run_dir / self.name / file).exists()]

    def mark(self, run_dir: Path) -> dict[str, Any]:
        """``identity``, ``notebook`` and ``seconds`` of the last run that finished; empty if none did."""
        path = self._mark_path(run_dir)
        value = read_json(path) if path.exists() else {}
        return value if isinstance(value, dict) else {}

    def is_done(self, run_dir: Path) -> bool:
        """Whether the stage finished here with the same identity, and its results are still there."""
        return self.mark(run_dir).get("identity") == self.identity and not self.missing(run_dir)

    def mark_done(self, run_dir: Path, *, seconds: float) -> None:
        value = {"identity": self.identity, "notebook": self.notebook, "seconds": round(seconds, 1)}
        write_json(self._mark_path(run_dir), value)

    def _mark_path(self, run_dir: Path) -> Path:
        return run_dir / ".done" / f"{self.name}.json"

    def log(self, run_dir: Path) -> Path:
        return run_dir / (f"{self.name}/{self.notebook}-{self.job}.log" if self.job else f"logs/{self.name}.log")

    def executed(self, run_dir: Path) -> Path:
        return run_dir / self.name / (f"{self.notebook}-{self.job}.ipynb" if self.job else f"{self.notebook}.ipynb")


def stage_record(chain: Chain, stage: Stage, job: str = "", command: tuple[str, ...] = ()) -> StageRecord:
    return StageRecord(
        name=stage.name, title=stage.title, notebook=stage.notebook, identity=chain.identity(stage),
        needs=stage.needs, produces=stage.produces, background=stage.background, job=job, command=command,
    )  # fmt: skip


def is_done(chain: Chain, stage: Stage, run_dir: Path) -> bool:
    """Whether ``stage`` finished in this folder with these parameters and its results are still there."""
    return stage_record(chain, stage).is_done(run_dir)


@dataclass(frozen=True, kw_only=True)
class ChainRecord:
    """The chain of a run's folder."""

    chain: str
    stages: tuple[StageRecord, ...]

    def jobs(self) -> dict[str, str]:
        """Stage → job, of the stages that have one."""
        return {stage.name: stage.job for stage in self.stages if stage.job}

    def with_job(self, name: str, job: str) -> "ChainRecord":
        """A copy in which stage ``name`` has another job."""
        return replace(self, stages=tuple(replace(one, job=job) if one.name == name else one for one in self.stages))

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / RECORD_FILE, asdict(self))


def record_of(
    chain: Chain, jobs: Mapping[str, str] | None = None, commands: Mapping[str, tuple[str, ...]] | None = None
) -> ChainRecord:
    """The record of a chain with its jobs and its servers' commands, both by stage."""
    jobs, commands = jobs or {}, commands or {}
    stages = (stage_record(chain, one, jobs.get(one.name, ""), commands.get(one.name, ())) for one in chain)
    return ChainRecord(chain=chain.name, stages=tuple(stages))


def read_record(run_dir: Path) -> ChainRecord:
    """Raises: DataError where no chain was started in the folder, or its record is broken."""
    path = run_dir / RECORD_FILE
    if not path.exists():
        raise DataError("no chain was submitted here", path=run_dir, remedy="give the run folder of a `seal-nb submit`")
    value = read_json(path)
    try:
        lists = [
            {name: tuple(one.get(name, ())) for name in ("needs", "produces", "command")} for one in value["stages"]
        ]
        stages = [StageRecord(**{**one, **own}) for one, own in zip(value["stages"], lists, strict=True)]
        return ChainRecord(chain=value["chain"], stages=tuple(stages))
    except (TypeError, KeyError) as error:
        raise DataError(f"not a chain's record ({error})", path=path, remedy="submit the chain again") from error


def stage_in(run_dir: Path, output_dir: str | Path) -> StageRecord:
    """The stage whose folder is ``output_dir``. Raises: SettingsError where there is none, DataError."""
    for stage in read_record(run_dir).stages:
        if (run_dir / stage.name).resolve() == Path(output_dir).resolve():
            return stage
    raise SettingsError(f"output_dir {str(output_dir)!r} is not the folder of a stage of the chain in {run_dir}")


@contextlib.contextmanager
def marked_when_done(run_dir: Path | None, output_dir: str) -> Iterator[None]:
    """Mark the stage of ``output_dir`` as done in ``run_dir`` if the block ends without an error.

    Args:
        run_dir: None: do nothing.

    Raises:
        SettingsError, DataError: before the block, where there is no such stage; after it, where the stage did
            not write its results.
    """
    if run_dir is None:
        yield
        return
    stage, began = stage_in(run_dir, output_dir), time.monotonic()
    yield
    if missing := stage.missing(run_dir):
        raise DataError(f"stage {stage.name!r} did not write {', '.join(missing)}", path=run_dir / stage.name)
    stage.mark_done(run_dir, seconds=time.monotonic() - began)


@contextlib.contextmanager
def sole_use(run_dir: Path, tell: Tell) -> Iterator[int]:
    """Lock the folder; gives the lock's file descriptor. Children that inherit it keep the lock until they end.

    Raises: ChainBusy if the lock is not free within TAKEOVER_TIMEOUT_S.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path, deadline, waits = run_dir / LOCK_FILE, time.monotonic() + TAKEOVER_TIMEOUT_S, False
    with path.open("a+") as file:
        while not _locked(file.fileno(), fcntl.LOCK_EX):
            holder = path.read_text() or "?"
            if time.monotonic() > deadline:
                remedy = "wait for it, end it, or give another run folder"
                raise ChainBusy(f"{run_dir} is in use by process {holder} or a child of it; {remedy}")
            if not waits:
                tell(f"waiting for what process {holder} left running in {run_dir}")
            waits = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def in_use_since(run_dir: Path) -> float | None:
    """When the chain that runs in this folder began (a file's time stamp, in seconds); None where none runs."""
    path = run_dir / LOCK_FILE
    try:
        with path.open() as file:
            return None if _locked(file.fileno(), fcntl.LOCK_SH) else path.stat().st_mtime
    except FileNotFoundError:
        return None


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except OSError:
        return False

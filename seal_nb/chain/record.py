"""What a run's folder knows of the chain that was started in it: ``chain.json``, written by who starts it.

Jobs find here the identity under which they mark their stage as done, and ``chain-status`` the whole
picture, without the settings that made the chain. Paths follow from names, so that the folder can be moved.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from seal_nb.chain.stages import Chain, is_finished, mark_finished
from seal_nb.errors import DataError, SettingsError
from seal_nb.storage import read_json, write_json

RECORD_FILE = "chain.json"


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage; ``job`` is SLURM's number (``12``, or ``12_43`` in an array), empty where it has none.

    command: of a server's job, without what it waited for; who needs it later submits it once more.
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

    def is_done(self, run_dir: Path) -> bool:
        return is_finished(run_dir, self.name, self.identity, self.produces)

    def log(self, run_dir: Path) -> Path:
        return run_dir / (f"{self.name}/{self.notebook}-{self.job}.log" if self.job else f"logs/{self.name}.log")

    def executed(self, run_dir: Path) -> Path:
        suffix = f"-{self.job}" if self.job else ""
        return run_dir / self.name / f"{self.notebook}{suffix}.ipynb"


@dataclass(frozen=True, kw_only=True)
class ChainRecord:
    chain: str
    executor: str  # local, slurm
    stages: tuple[StageRecord, ...]

    def jobs(self) -> dict[str, str]:
        """Stage → job, of the stages that have one."""
        return {stage.name: stage.job for stage in self.stages if stage.job}

    def commands(self) -> dict[str, tuple[str, ...]]:
        """Stage → command, of the stages that have one."""
        return {stage.name: stage.command for stage in self.stages if stage.command}

    def with_job(self, name: str, job: str) -> "ChainRecord":
        """The same, where stage ``name`` has another job."""
        stages = (replace(stage, job=job) if stage.name == name else stage for stage in self.stages)
        return replace(self, stages=tuple(stages))

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / RECORD_FILE, asdict(self))


def record_of(
    chain: Chain,
    *,
    executor: str,
    jobs: Mapping[str, str],
    commands: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> ChainRecord:
    stages = tuple(
        StageRecord(
            name=stage.name,
            title=stage.title,
            notebook=stage.notebook,
            identity=chain.identity(stage),
            needs=stage.needs,
            produces=stage.produces,
            background=stage.background,
            job=jobs.get(stage.name, ""),
            command=commands.get(stage.name, ()),
        )
        for stage in chain
    )
    return ChainRecord(chain=chain.name, executor=executor, stages=stages)


def read_record(run_dir: Path) -> ChainRecord:
    """Raises: DataError where no chain was started in the folder, or the file is another one."""
    path = run_dir / RECORD_FILE
    if not path.exists():
        raise DataError("no chain was submitted here", path=run_dir, remedy="give the run folder of a `seal-nb submit`")
    value = read_json(path)
    try:
        stages = tuple(_stage(one) for one in value["stages"])
        return ChainRecord(chain=value["chain"], executor=value["executor"], stages=stages)
    except (TypeError, KeyError) as error:
        raise DataError(f"not a chain's record ({error})", path=path, remedy="submit the chain again") from error


def _stage(fields: dict[str, Any]) -> StageRecord:
    lists = {name: tuple(fields[name]) for name in ("needs", "produces")}
    return StageRecord(**{**fields, **lists, "command": tuple(fields.get("command", ()))})


def stage_in(run_dir: Path, output_dir: str) -> StageRecord:
    """The stage whose folder is ``output_dir``. Raises: SettingsError where there is none, DataError."""
    for stage in read_record(run_dir).stages:
        if (run_dir / stage.name).resolve() == Path(output_dir).resolve():
            return stage
    raise SettingsError(f"output_dir {output_dir!r} is the folder of no stage of the chain in {run_dir}")


@contextlib.contextmanager
def marked_when_done(run_dir: Path | None, output_dir: str) -> Iterator[None]:
    """If the block ends well, mark the stage of ``output_dir`` as done in ``run_dir`` (None: mark nothing).

    Raises: before the block SettingsError, DataError where there is no such stage; after it DataError if the
        stage did not write its results.
    """
    if run_dir is None:
        yield
        return
    stage, began = stage_in(run_dir, output_dir), time.monotonic()
    yield
    missing = [file for file in stage.produces if not (run_dir / stage.name / file).exists()]
    if missing:
        raise DataError(f"stage {stage.name!r} did not write {', '.join(missing)}", path=run_dir / stage.name)
    seconds = time.monotonic() - began
    mark_finished(run_dir, stage.name, stage.identity, notebook=stage.notebook, seconds=seconds)

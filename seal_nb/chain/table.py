"""One table of stages: which notebook, with which parameters, after which others.

A chain says what an experiment consists of; an executor runs it (``local`` on this machine, ``slurm`` on a
cluster). Paths in parameters are written relative to the run's folder with ``in_run``, so that the same
table serves any folder and any executor. What identifies a stage is its content: notebook, parameters and
what it is made from; a finished stage with the same identity need not run again.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.notebook_runner import Value
from seal_nb.runs import content_id, write_json

RUN = "{run}"  # stands for the run's folder in a parameter
DONE_DIR = ".done"
# How a stage computes, not what: fewer slots after an OUT_OF_MEMORY undo nothing that is finished.
MACHINE = frozenset({"n_workers", "n_threads", "n_slots", "n_processes", "endpoint_file", "idle_timeout_s"})
INPUT_FILES = frozenset({"dataset", "prompt_key"})  # parameters that may name a file of the user's


def in_run(stage: str = "", file: str = "") -> str:
    """A path in the folder of ``stage``, for use as a parameter of another stage."""
    return "/".join(part for part in (RUN, stage, file) if part)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One notebook run. Its results lie in the folder of its name; ``output_dir`` need not be given.

    A background stage is a server: it is started before the first stage that needs it and stopped after the
    last; ``produces`` names the file whose appearance means that it is ready. Stages of one ``array`` differ
    in their seed only and are named by it: on a cluster they are one job array, whose task numbers are seeds.
    """

    name: str
    notebook: str
    title: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    produces: tuple[str, ...] = ()
    background: bool = False
    array: str = ""

    def __post_init__(self) -> None:
        if self.array and self.name != f"{self.array}_seed{self.parameters.get('seed')}":
            raise SettingsError(
                f"stage {self.name!r} of array {self.array!r}: name it {self.array}_seed<seed>"
            )
        if self.background and len(self.produces) != 1:
            raise SettingsError(
                f"background stage {self.name!r}: name the one file that means ready in `produces`"
            )

    def values(self, run_dir: Path) -> dict[str, Value]:
        """The notebook's parameters with real paths."""
        return {
            name: value.replace(RUN, str(run_dir)) if isinstance(value, str) else value
            for name, value in {"output_dir": in_run(self.name), **self.parameters}.items()
        }


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Stages in an order in which they can run one after another."""

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        earlier: set[str] = set()
        for stage in self.stages:
            if stage.name in earlier:
                raise SettingsError(f"chain {self.name!r} has two stages named {stage.name!r}")
            if missing := [name for name in stage.needs if name not in earlier]:
                raise SettingsError(
                    f"stage {stage.name!r} needs {', '.join(missing)}; "
                    "put it after what it needs, and check the names"
                )
            earlier.add(stage.name)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def users_of(self, server: Stage) -> list[Stage]:
        """The stages during which ``server`` must be up."""
        return [stage for stage in self if server.name in stage.needs]

    def servers_of(self, stage: Stage) -> list[Stage]:
        """The background stages that must be up while ``stage`` runs."""
        return [self[name] for name in stage.needs if self[name].background]

    def identity(self, stage: Stage) -> str:
        """Depends on what the stage computes and from what, not on where the run's folder lies."""
        made_from = [self.identity(self[name]) for name in stage.needs]
        own = {
            name: _content(value) if name in INPUT_FILES else value
            for name, value in stage.parameters.items()
            if name not in MACHINE
        }
        return content_id([stage.notebook, own, made_from])


def is_done(chain: Chain, stage: Stage, run_dir: Path) -> bool:
    """Whether ``stage`` finished in this folder with these parameters and its results are still there."""
    return is_finished(run_dir, stage.name, chain.identity(stage), stage.produces)


def mark_done(chain: Chain, stage: Stage, run_dir: Path, *, seconds: float) -> None:
    """Remember that ``stage`` finished, and how long it took."""
    mark_finished(run_dir, stage.name, chain.identity(stage), notebook=stage.notebook, seconds=seconds)


def is_finished(run_dir: Path, name: str, identity: str, produces: Iterable[str]) -> bool:
    """``is_done``, for who knows a stage by its identity alone."""
    marker = read_marker(run_dir, name)
    return marker.get("identity") == identity and all((run_dir / name / file).exists() for file in produces)


def mark_finished(run_dir: Path, name: str, identity: str, *, notebook: str, seconds: float) -> None:
    marker = {"identity": identity, "notebook": notebook, "seconds": round(seconds, 1)}
    write_json(run_dir / DONE_DIR / f"{name}.json", marker)


def read_marker(run_dir: Path, name: str) -> dict[str, Any]:
    """What was remembered of the stage of that name; empty if nothing was."""
    try:
        marker = json.loads((run_dir / DONE_DIR / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _content(value: Value) -> Value:
    """A file's content for its name: edited, it is another experiment."""
    path = Path(str(value))
    if not path.is_file():
        return value
    about = path.stat()
    return _digest(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=64)
def _digest(path: Path, _mtime_ns: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

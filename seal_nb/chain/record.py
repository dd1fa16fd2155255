"""What a run's folder knows of its chain: ``chain.json``, the folder's lock, and what has become of each stage.

A job finds in ``chain.json`` the identity under which it marks its stage as done. All paths follow from names, so the
folder can be moved."""

import contextlib
import fcntl
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from seal_nb.chain.stages import Chain, Stage
from seal_nb.errors import DataError, SettingsError, checked
from seal_nb.processes import last_lines
from seal_nb.storage import lock, open_regular, read_json, write_json

RECORD_FILE = "chain.json"
LOCK_FILE = ".chain.lock"
TAKEOVER_TIMEOUT_S = 20.0  # the processes of a killed chain need some seconds to end
BAD = ("failed", "lost")  # states of a stage
LOG_LINES = 5
MESSAGE_LINES = 4
Status = tuple[str, str]  # state and note of a stage
Tell = Callable[[str], None]  # receives progress, line by line


def write_record(chain: Chain, run_dir: Path) -> None:
    write_json(run_dir / RECORD_FILE, asdict(chain))


def read_record(run_dir: Path) -> Chain:
    """The folder may come from elsewhere: names lead to no other folder, numbers are numbers, and nothing is a command.
    Raises: DataError with the field where no chain was started in the folder, or its record is broken."""
    path = run_dir / RECORD_FILE
    if not path.is_file():
        raise DataError("no chain was submitted here", path=run_dir, remedy="give the run folder of a `seal-nb submit`")
    if not is_inside(path, run_dir):
        raise DataError("not a chain's record", path=path, remedy="submit the chain again")
    chain: Chain = checked(TypeAdapter(Chain).validate_python, read_json(path), path=path)
    names = [stage.name for stage in chain]
    for number, stage in enumerate(chain):
        if unknown := set(stage.needs) - set(names[:number]):
            problem, where = f"names {min(unknown)!r}, which is no stage before it", f"stages[{number}].needs"
            raise DataError(problem, path=path, field=where, remedy="submit the chain again")
    return chain


def is_inside(path: Path, folder: Path) -> bool:
    """Whether it is a file whose real place is in ``folder``: a link may lead out of it."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def stage_in(run_dir: Path, output_dir: str | Path) -> Stage:
    """The stage whose folder is ``output_dir``. Raises: SettingsError where there is none, DataError."""
    for stage in read_record(run_dir):
        if (run_dir / stage.name).resolve() == Path(output_dir).resolve():
            return stage
    raise SettingsError(f"output_dir {str(output_dir)!r} is not the folder of a stage of the chain in {run_dir}")


@contextlib.contextmanager
def marked_when_done(run_dir: Path, output_dir: str) -> Iterator[None]:
    """Mark the stage of ``output_dir`` as done in ``run_dir`` if the block ends without an error.
    Raises: SettingsError before the block, where there is no such stage; DataError, also for missing results."""
    stage, began = stage_in(run_dir, output_dir), time.monotonic()
    yield
    if missing := stage.missing(run_dir):
        raise DataError(f"stage {stage.name!r} did not write {', '.join(missing)}", path=run_dir / stage.name)
    stage.mark_done(run_dir, seconds=time.monotonic() - began)


def sole_use(run_dir: Path, tell: Tell) -> contextlib.AbstractContextManager[int]:
    """Lock the folder for a block (`storage.lock`), once the processes of a killed chain have ended.
    Raises: RunMismatch if the lock is not free within TAKEOVER_TIMEOUT_S; DataError."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{run_dir} cannot be a run folder: {error}; give another --run-dir") from error
    return lock(run_dir / LOCK_FILE, of=run_dir, wait_s=TAKEOVER_TIMEOUT_S, tell=tell)


def in_use_since(run_dir: Path) -> float | None:
    """When the chain that runs in this folder began (a file's time stamp, in seconds); None where none runs."""
    try:
        with open_regular(run_dir / LOCK_FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        return (run_dir / LOCK_FILE).stat().st_mtime
    except (OSError, DataError):  # no such file, or no locks on this file system
        return None


def chain_status(chain: Chain, run_dir: Path, *, job_status: Callable[[Stage], Status]) -> dict[str, Status]:
    """The status of each stage, by name. ``job_status`` asks SLURM about a stage with a job. States: done, running,
    waiting, ended (a server), interrupted (here), failed, cancelled, lost, not started."""
    since = in_use_since(run_dir)

    def one(stage: Stage) -> Status:
        if stage.is_done(run_dir):
            mark = stage.mark(run_dir)
            return "done", f"in {mark.seconds:.0f} s" if mark else ""
        return job_status(stage) if stage.job else _without_job(stage, run_dir, since)

    return {stage.name: one(stage) for stage in chain}


def _without_job(stage: Stage, run_dir: Path, since: float | None) -> Status:
    """``since``: when the local chain that runs now began. It has not reached a stage whose log is older."""
    log, executed = stage.log(run_dir), stage.executed(run_dir)
    if is_inside(executed, run_dir) and failing_cell(executed):
        return "failed", "a cell raised"
    if not log.exists():
        return "not started", ""
    if since is None:
        return ("ended", "") if stage.background else ("interrupted", "the same command continues it")
    if log.stat().st_mtime < since:
        return "waiting", ""
    return "running", "or ended" if stage.background else ""


def status_lines(chain: Chain, statuses: Mapping[str, Status], run_dir: Path) -> Iterator[str]:
    """A line for each stage, then what is known of each stage that failed; nothing from outside the folder."""
    rows = [(stage, *statuses[stage.name]) for stage in chain]
    counts = Counter(state for stage, state, _ in rows if not stage.background)
    others = "".join(f", {number} {state}" for state, number in counts.most_common() if state != "done")
    yield f"chain {chain.name}: {counts['done']} of {counts.total()} stages done{others}"
    name, notebook = (max(len(getattr(stage, field)) for stage in chain) for field in ("name", "notebook"))
    for stage, state, note in rows:
        yield f"  {stage.name:<{name}}  {stage.notebook:<{notebook}}  {state:<11}  {note}".rstrip()
    for stage, state, note in rows:
        if state not in BAD:
            continue
        executed, log = stage.executed(run_dir), stage.log(run_dir)
        is_there = is_inside(executed, run_dir)
        yield from ("", f"{stage.name}: {note}", *(failing_cell(executed) if is_there else []))
        if is_inside(log, run_dir):
            yield from (f"  the end of {log}:", *(f"      {line}" for line in last_lines(log, LOG_LINES)))
        if is_there:
            yield f"  executed notebook: {executed}"


def first_error(cells: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first cell of an executed notebook that raised, and the output with its error."""
    errors = ((cell, one) for cell in cells for one in cell.get("outputs", []) if one["output_type"] == "error")
    return next(errors, None)


def failing_cell(executed: Path) -> list[str]:
    """Lines about the cell of an executed notebook that raised; none if there is no such notebook or cell."""
    try:
        if not (failed := first_error(read_json(executed)["cells"])):
            return []
        cell, error = failed
        first, *rest = f"raised {error['ename']}: {error['evalue']}".splitlines()
        # IPython's traceback marks the line of the cell; of several exceptions the last one counts.
        text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error["traceback"])).rpartition("Cell In[")[2]
        marked = re.search(r"^-+> *\d+ (.*)$", text, flags=re.MULTILINE)
        line = marked[1].strip() if marked else "".join(cell["source"]).split("\n")[0]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    about = [f"      {line}" for line in rest[: MESSAGE_LINES - 1]]
    return [f"  cell [{cell.get('execution_count')}] {first}", *about, f"  at: {line}"]

"""What a run's folder knows of its chain: ``chain.json``, the marks of finished stages, and the folder's lock.

`submit` and the local executor write ``chain.json``. A job finds in it the identity under which it marks its stage
as done, and `chain-status` finds the stages and their jobs. All paths follow from names, so the folder can be moved.
"""

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from seal_nb.chain.stages import Chain, Stage
from seal_nb.errors import DataError, RunMismatch, SettingsError
from seal_nb.storage import lock, read_json, write_json

RECORD_FILE = "chain.json"
LOCK_FILE = ".chain.lock"
TAKEOVER_TIMEOUT_S = 20.0  # the processes of a killed chain need some seconds to end
Tell = Callable[[str], None]  # receives progress, line by line


def write_record(chain: Chain, run_dir: Path) -> None:
    write_json(run_dir / RECORD_FILE, asdict(chain))


def read_record(run_dir: Path) -> Chain:
    """Raises: DataError where no chain was started in the folder, or its record is broken."""
    path = run_dir / RECORD_FILE
    if not path.exists():
        raise DataError("no chain was submitted here", path=run_dir, remedy="give the run folder of a `seal-nb submit`")
    try:
        return TypeAdapter(Chain).validate_python(read_json(path))
    except ValidationError as error:
        raise DataError(f"not a chain's record ({error})", path=path, remedy="submit the chain again") from error


def stage_in(run_dir: Path, output_dir: str | Path) -> Stage:
    """The stage whose folder is ``output_dir``. Raises: SettingsError where there is none, DataError."""
    for stage in read_record(run_dir):
        if (run_dir / stage.name).resolve() == Path(output_dir).resolve():
            return stage
    raise SettingsError(f"output_dir {str(output_dir)!r} is not the folder of a stage of the chain in {run_dir}")


@contextlib.contextmanager
def marked_when_done(run_dir: Path | None, output_dir: str) -> Iterator[None]:
    """Mark the stage of ``output_dir`` as done in ``run_dir``, if there is one, and the block ends without an error.
    Raises: SettingsError before the block, where there is no such stage; DataError, also for missing results."""
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
    Raises: RunMismatch if the lock is not free within TAKEOVER_TIMEOUT_S; DataError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for second in itertools.count():
        try:
            handle = lock(run_dir / LOCK_FILE, of=run_dir)
            break
        except RunMismatch as busy:
            if second >= TAKEOVER_TIMEOUT_S:
                raise
            if second == 0:
                tell(f"waiting: {busy}")
            time.sleep(1)
    try:
        yield handle
    finally:
        os.close(handle)


def in_use_since(run_dir: Path) -> float | None:
    """When the chain that runs in this folder began (a file's time stamp, in seconds); None where none runs."""
    try:
        with (run_dir / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        return (run_dir / LOCK_FILE).stat().st_mtime
    except OSError:  # no such file, or no locks on this file system
        return None

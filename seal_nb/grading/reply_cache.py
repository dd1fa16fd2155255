"""Replies that were paid for, on disk by what was asked: one small file each, which is its own lock.

Whoever wants a reply opens its file and locks it. If the file holds a reply, it was asked before; if not, the
holder of the lock asks, writes, and lets go, and whoever waited meanwhile (another thread, process or node)
finds the reply there. The lock goes with its holder, so nobody waits for the dead. An empty or torn file is
a reply that never came. Knows nothing of models, prompts or verdicts.
"""

import fcntl
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seal_nb.errors import GradingError

log = logging.getLogger(__name__)

Record = dict[str, Any]


class ReplyCache:
    """A folder of records by key, safe between threads, processes and nodes; keys are hexadecimal digits."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get_or_make(self, key: str, make: Callable[[], Record]) -> Record:
        """The record of this key; where there is none, exactly one of all who ask calls ``make``.

        What ``make`` raises is raised here, and nothing is kept. Raises: GradingError where the folder cannot
        be used.
        """
        path = self.folder / key[:2] / f"{key}.json"
        handle = self._locked(path)
        try:
            record = _read(handle)
            if record is None:
                record = make()
                self._keep(handle, record)
            return record
        finally:
            os.close(handle)

    def _locked(self, path: Path) -> int:
        handle = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException as error:
            if handle >= 0:
                os.close(handle)
            if not isinstance(error, OSError):
                raise
            raise GradingError(
                f"the cache of graded answers at {self.folder} cannot be used: {error}; "
                "give a folder that can be written and locked as cache_dir"
            ) from error
        return handle

    def _keep(self, handle: int, record: Record) -> None:
        """Write to the disk. On a full disk the reply is still good; only asking again will cost again."""
        raw = json.dumps(record).encode()
        try:
            os.ftruncate(handle, 0)
            written = 0
            while written < len(raw):
                written += os.pwrite(handle, raw[written:], written)
            os.fsync(handle)
        except OSError as error:
            log.warning("a graded answer could not be kept in %s: %s", self.folder.name, error)


def _read(handle: int) -> Record | None:
    """What stands in the file. A torn record is none: its closing brace is missing."""
    try:
        record = json.loads(os.pread(handle, os.fstat(handle).st_size, 0))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None

"""Kept adapters that nobody needs any more: their folders go, what was answered with them stays.

Workers write an adapter's folder and read it when a request names it; who deletes is the front end, which
sees the same disk. A name is the protocol's (``protocol.Name``): it cannot lead out of the folder.
"""

import contextlib
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path


def forget_adapters(folder: Path, names: Sequence[str]) -> list[str]:
    """Delete the adapters in ``folder`` that are called so; the names of those that were there."""
    return [name for name in names if _forget(folder / name)]


def _forget(adapter: Path) -> bool:
    """Out of the way at once, so that no worker finds half of it; then deleted."""
    doomed = adapter.with_name(f".{adapter.name}.{uuid.uuid4().hex}.old")
    with contextlib.suppress(FileNotFoundError):
        adapter.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return True
    return False

from pathlib import Path
from typing import Any

from seal_nb.storage import _journal_lines


def read_journal(path: Path) -> dict[str, Any]:
    """The latest record of each key, without the lock: also while a run is written."""
    return {key: record for key, record, _ in _journal_lines(path)}

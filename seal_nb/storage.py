"""What a run leaves on disk: whole result files, a journal of paid-for work, and a record of what made them.

A result is written whole or not at all. A journal grows by one line for each finished unit of work,
so that a run that died resumes from it. A record beside a result holds settings, seeds, package
versions and the git revision. Keys and seeds are derived from content, never from a clock. What this
module does not do: know any experiment, or keep anything that names a place (absolute paths, host
names, environment variables). POSIX only: the journal's lock is ``flock``.

Kept adapters that nobody needs any more: their folders go, what was answered with them stays.

Workers write an adapter's folder and read it when a request names it; who deletes is the front end, which
sees the same disk. A name is the protocol's (``protocol.Name``): it cannot lead out of the folder.
"""

import contextlib
import fcntl
import gzip
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from seal_nb.errors import DataError, RunMismatch

RECORDED_PACKAGES = (
    "seal-nb", "torch", "transformers", "peft", "trl", "accelerate", "vllm", "gguf",
    "numpy", "pyzmq", "pydantic", "papermill",
)  # fmt: skip
_PROJECT_ROOT = Path(__file__).resolve().parent.parent


def canonical_json(obj: object) -> str:
    """One spelling per value: sorted keys, no spaces, ASCII; 1 and 1.0 stay different.

    Raises: DataError for what JSON cannot hold (NaN, objects).
    """
    try:
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot be written as JSON: {error}", remedy="pass plain finite values") from error


def content_id(obj: object) -> str:
    """24 hexadecimal digits that depend on the content alone: request ids, resume keys."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()[:24]


def derived_seed(*parts: object) -> int:
    """A seed below 2**31 for one unit of work, from what identifies it (run seed, indices, titles)."""
    return int(hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:8], 16) & 0x7FFFFFFF


def write_text(path: str | Path, text: str) -> Path:
    """Write a file whole or not at all; an existing one stays as it was if anything fails (a full disk)."""
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        # Half a surrogate pair has no UTF-8; as an escape it is still the same JSON.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return Path(path)


def write_json(path: str | Path, obj: object) -> Path:
    """``write_text`` of the published layout: two spaces, real characters. NaN and infinity become null."""
    return write_text(path, json.dumps(_finite(obj), indent=2, ensure_ascii=False, allow_nan=False))


def read_json(path: str | Path) -> Any:
    """The JSON value in a file, plain or gzip-compressed.

    Raises: DataError with the path for a missing, unreadable or broken file.
    """
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
        return json.loads(text)
    except FileNotFoundError as error:
        raise DataError("no such file", path=path, remedy="check the path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path, remedy="copy the file again") from error
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", path=path, remedy="write the file again") from error


class Journal:
    """Append-only JSON lines ``{"key", "record"}`` for one writer; an append that returned survives a crash.

    A torn last line (the writer died in it) is dropped; a broken line before it is refused. A key that
    is appended again gets the new record. Without ``in_memory``, memory holds only where each record is,
    for one that grows without end. Use it as a context manager.

    Raises: DataError for a broken line, RunMismatch while another writer has the journal.
    """

    def __init__(self, path: str | Path, *, in_memory: bool = True) -> None:
        self.path, self._in_memory = Path(path), in_memory
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        try:
            self._records: dict[str, Any] = {}  # or (offset, bytes) of the record's line
            self._size = 0
            for key, record, place in _journal_lines(self.path):
                self._records[key] = record if in_memory else place
                self._size = sum(place)
            self._file = self.path.open("a+b", buffering=0)
            self._file.truncate(self._size)
        except BaseException:
            os.close(self._lock)
            raise
        _sync_folder(self.path.parent)

    def append(self, key: str, record: object) -> None:
        """Add one record; on return it is on the disk. A failed write leaves no half line behind."""
        line = f"{json.dumps({'key': key, 'record': record})}\n".encode()
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._size)
            raise
        self._records[key] = json.loads(line)["record"] if self._in_memory else (self._size, len(line))
        self._size += len(line)

    def get(self, key: str) -> Any:
        """The latest record of a key. Raises: KeyError."""
        record = self._records[key]
        if self._in_memory:
            return record
        offset, n_bytes = record
        return json.loads(os.pread(self._file.fileno(), n_bytes, offset))["record"]

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def close(self) -> None:
        """Let another writer in; what is in memory can still be read."""
        if not self._file.closed:
            self._file.close()
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_journal(path: str | Path) -> dict[str, Any]:
    """The latest record of each key, without the lock: for looking at a run while it is being written."""
    return {key: record for key, record, _ in _journal_lines(Path(path))}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What made a result: enough to make it again. Holds no place and no clock."""

    stage: str
    settings: Mapping[str, Any]
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    git_revision: str = field(default_factory=lambda: git_revision())

    def to_json(self) -> dict[str, Any]:
        """As written, with absolute paths cut to their last part and host names left out."""
        return {**asdict(self), "settings": _without_places(dict(self.settings))}


def record_path(result: str | Path) -> Path:
    """Where the record of a result lies: ``run_x.json`` → ``run_x.record.json``."""
    name = Path(result).name.removesuffix(".gz")
    return Path(result).with_name(f"{name.rsplit('.', 1)[0]}.record.json")


def write_record(result: str | Path, record: RunRecord) -> Path:
    """Write a record beside its result."""
    return write_json(record_path(result), record.to_json())


def package_versions() -> dict[str, str]:
    """Versions of what is installed of RECORDED_PACKAGES, and Python's; imports none of them."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_revision(root: Path = _PROJECT_ROOT) -> str:
    """The commit of the project's own checkout, ``-dirty`` if files differ from it; else "unknown"."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # installed inside somebody else's checkout
        return "unknown"
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _journal_lines(path: Path) -> Iterator[tuple[str, Any, tuple[int, int]]]:
    """(key, record, (offset, bytes)) of each sound line; one line in memory at a time."""
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn
            try:
                entry = json.loads(line)
                key, record = str(entry["key"]), entry["record"]
            except (ValueError, KeyError, TypeError) as error:
                if not file.read(1):
                    return  # a crash of the machine can lose the bytes before a newline
                raise DataError(
                    f"line {number} is broken: {line[:60]!r}",
                    path=path,
                    remedy="delete that line; its work is then done again",
                ) from error
            yield key, record, (offset, len(line))
            offset += len(line)


def _lock(path: Path) -> int:
    """An exclusive lock that the system gives back when its holder dies."""
    handle = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 100).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise RunMismatch(
            f"{path} is being written by another run (process {holder}); wait for it, end it, "
            "or close its journal if it is in this notebook"
        ) from error
    except OSError as error:  # some network file systems have no locks
        os.close(handle)
        raise DataError(f"cannot be locked: {error}", path=path, remedy="use another folder") from error
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    return handle


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _finite(obj: object) -> object:
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, Mapping):
        return {str(key): _finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(value) for value in obj]
    return str(obj) if isinstance(obj, Path) else obj


def _without_places(obj: object) -> object:
    if isinstance(obj, Mapping):
        return {str(key): _without_places(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_without_places(value) for value in obj]
    if isinstance(obj, Path) or (isinstance(obj, str) and obj.startswith(("/", "~"))):
        path = Path(obj)
        return path.name if path.is_absolute() or str(obj).startswith("~") else str(obj)
    if isinstance(obj, str):
        return re.sub(r"^(tcp|ipc|http)://.*", r"\1://...", obj)
    return obj


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

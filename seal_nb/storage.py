"""Files of a run: where they are, results written whole, a journal of finished work, and a record of the settings.

Keys and seeds are derived from content, never from a clock. POSIX only: the journal's lock is ``flock``.
"""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError, RunMismatch

RECORDED_PACKAGES = (
    "seal-nb", "torch", "transformers", "peft", "trl", "accelerate", "vllm", "gguf",
    "numpy", "pyzmq", "pydantic", "papermill",
)  # fmt: skip
_PROJECT_ROOT = Path(__file__).resolve().parent.parent


def runs_folder(path: str | Path = "") -> Path:
    """The real place of a path under ``runs``, the same for JupyterLab, papermill, the command line and jobs.

    Args:
        path: a notebook's ``output_dir`` or ``runs_dir``, or a file in one, such as ``runs/03_query_server``.
            Empty: the ``runs`` folder itself.

    Returns:
        A relative path whose first part is ``runs`` goes under ``$SEAL_RUNS``, or else under ``runs`` of the project:
        the nearest parent of the current folder that is a checkout of seal-nb, or the current folder. It is
        relative to the current folder where the project contains it. Any other path is returned unchanged, and so is
        one that was returned before.
    """
    given = Path(path or "runs")
    if given.parts[:1] != ("runs",):
        return given
    here = Path.cwd()
    project = next((folder for folder in (here, *here.parents) if _is_project(folder)), here)
    chosen = os.environ.get("SEAL_RUNS", "")
    place = (project / Path(chosen or "runs").expanduser()).joinpath(*given.parts[1:])
    shown = Path(os.path.relpath(place))
    moves_again = chosen and shown.parts[0] == "runs"
    return shown if place.is_relative_to(project) and not moves_again else place


def data_file(name: str) -> Path:
    """A file that the package brings along."""
    return Path(__file__).parent / "data" / name


def _is_project(folder: Path) -> bool:
    settings = folder / "pyproject.toml"
    return (folder / "notebooks").is_dir() and settings.is_file() and 'name = "seal-nb"' in settings.read_text()


def content_id(obj: object) -> str:
    """24 hexadecimal digits that depend only on the content, for request ids and journal keys; 1 and 1.0 differ.
    Raises: DataError for NaN and for objects that JSON does not have."""
    try:
        canonical = json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot be written as JSON: {error}", remedy="pass plain finite values") from error
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


def derived_seed(*parts: object) -> int:
    """A seed below 2**31 for one unit of work, derived from its run seed, indices and titles."""
    return int(content_id(parts)[:8], 16) & 0x7FFFFFFF


def write_text(path: str | Path, text: str) -> Path:
    """Write a file whole or not at all: if anything fails (a full disk), an existing file stays as it was."""
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        # Half a surrogate pair has no UTF-8 form; its escape is the same JSON.
        with temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return Path(path)


def write_json(path: str | Path, obj: object) -> Path:
    """``write_text`` of the published layout: two spaces, real characters. NaN and infinity become null. A path is
    written as text; other values that are not JSON's raise TypeError."""
    finite = json.loads(json.dumps(obj, default=os.fspath), parse_constant=lambda _: None)
    return write_text(path, json.dumps(finite, indent=2, ensure_ascii=False))


def read_text(path: str | Path) -> str:
    """A UTF-8 file, plain or gzip-compressed. Raises: DataError with the path for a missing or unreadable file."""
    try:
        raw = Path(path).read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("no such file", path=path, remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", path=path, remedy="save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path, remedy="copy the file again") from error


def read_json(path: str | Path) -> Any:
    """The JSON value in a file, plain or gzip-compressed. Raises: DataError with the path."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error}", path=path, remedy="write the file again") from error


def read_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The place (such as "line 3") and the JSON value of each line that is not blank, in a file as in ``read_text``.
    Raises: DataError with the path and the line."""
    # Not splitlines: a text may hold characters such as U+2028, which splitlines takes for the end of a line.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        place = f"line {number}"
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                remedy = "write one JSON value a line"
                raise DataError(f"not valid JSON: {error}", path=path, item=place, remedy=remedy) from error
            yield place, value


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Append-only JSON lines ``{"key", "record"}`` for one writer; an append that returned survives a crash.

    A torn last line (the writer died in it) is dropped; a broken line before it is refused. A key that is appended
    again gets the new record. Memory holds only where each record is. Use it as a context manager.

    Raises: DataError for a broken line, RunMismatch if another writer still has the journal after ``wait_s``.
    """

    def __init__(self, path: str | Path, *, wait_s: float = 0.0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            lock_file = self.path.with_name(f"{self.path.name}.lock")
            opened.enter_context(lock(lock_file, of=self.path, wait_s=wait_s))
            self._places = {key: place for key, _, place in _journal_lines(self.path)}
            self._size = max(map(sum, self._places.values()), default=0)
            self._file = opened.enter_context(self.path.open("a+b", buffering=0))
            self._file.truncate(self._size)
            _sync_folder(self.path.parent)
            self._opened = opened.pop_all()

    def append(self, key: str, record: object) -> None:
        """Add one record; on return it is on the disk. A failed write leaves no half line behind."""
        self.append_json(key, json.dumps(record).encode())

    def append_json(self, key: str, record: bytes) -> None:
        """``append`` of a record that is JSON already, in one line."""
        line = b"%b%b}\n" % (_line_start(key), record)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._size)
            raise
        self._places[key] = self._size, len(line)
        self._size += len(line)

    def get(self, key: str) -> Any:
        """The latest record of a key. Raises: KeyError."""
        return json.loads(self._line(key))["record"]

    def get_json(self, key: str) -> bytes:
        """The latest record of a key as the JSON in the file. Raises: KeyError."""
        line, start = self._line(key), _line_start(key)
        # Another program may have written the line with other spaces.
        return line[len(start) : -2] if line.startswith(start) else json.dumps(json.loads(line)["record"]).encode()

    def _line(self, key: str) -> bytes:
        offset, n_bytes = self._places[key]
        return os.pread(self._file.fileno(), n_bytes, offset)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Let another writer in. Its records can then be read by ``read_journal`` only."""
        self._opened.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_journal(path: str | Path) -> dict[str, Any]:
    """The latest record of each key, without the lock: for looking at a run while it is being written."""
    return {key: record for key, record, _ in _journal_lines(Path(path))}


def record_path(result: str | Path) -> Path:
    """The path of a result's record: ``run_x.json`` → ``run_x.record.json``."""
    name = Path(result).name.removesuffix(".gz")
    return Path(result).with_name(f"{name.rsplit('.', 1)[0]}.record.json")


def write_record(
    result: str | Path, *, stage: str, settings: Mapping[str, Any], seeds: Mapping[str, int] | None = None
) -> Path:
    """Write the settings, seeds and versions of a result next to it, without folders and host names."""
    record = {
        "stage": stage,
        "settings": _without_places(settings),
        "seeds": seeds or {},
        "versions": package_versions(),
        "git_revision": git_revision(),
    }
    return write_json(record_path(result), record)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed RECORDED_PACKAGES; imports none of them."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_revision(root: Path = _PROJECT_ROOT) -> str:
    """The commit of the project's checkout, with ``-dirty`` if files differ from it; "unknown" without a checkout."""
    own = [f"--git-dir={root / '.git'}", f"--work-tree={root}"]  # not another project's, in which this one is installed
    command = ["git", *own, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _line_start(key: str) -> bytes:
    return f'{{"key": {json.dumps(key)}, "record": '.encode()


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
                remedy = "delete that line; its work is then done again"
                raise DataError(f"line {number} is broken: {line[:60]!r}", path=path, remedy=remedy) from error
            yield key, record, (offset, len(line))
            offset += len(line)


@contextlib.contextmanager
def lock(path: Path, *, of: Path, wait_s: float = 0.0, tell: Callable[[str], object] = lambda _: None) -> Iterator[int]:
    """An exclusive lock on ``of``, for a block; gives the descriptor of the lock file. Children that inherit it keep
    the lock until they end. ``tell`` receives a line that names the holder.
    Raises: RunMismatch if another process still has the lock after ``wait_s``; DataError."""
    deadline, told = time.monotonic() + wait_s, ""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                holder = os.pread(handle, 100, 0).decode(errors="replace").strip() or "unknown"
                busy = f"{of} is in use by another run (process {holder}, or a child of it)"
                busy += "; wait for it, end it, or close its journal if it is in this notebook"
                if time.monotonic() >= deadline:
                    raise RunMismatch(busy) from error
                if told != busy:
                    tell(f"waiting: {busy}")
                told = busy
                time.sleep(0.2)
            except OSError as error:  # some network file systems have no locks
                raise DataError(f"cannot be locked: {error}", path=of, remedy="use another folder") from error
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield handle
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _without_places(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _without_places(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(one) for one in value]
    if not isinstance(value, str | Path):
        return value
    if str(value).startswith(("/", "~")):
        return Path(value).name
    return re.sub(r"^(tcp|ipc|http)://.*", r"\1://...", str(value))


def forget_adapters(folder: Path, names: Sequence[str]) -> list[str]:
    """Delete kept adapters. ``names`` are ``protocol.Name``s, which cannot lead out of ``folder``.
    Returns: the names of those that existed."""
    found = []
    for name in names:
        doomed = folder / f".{name}.{uuid.uuid4().hex}.old"
        with contextlib.suppress(FileNotFoundError):
            (folder / name).rename(doomed)  # first: no worker may find half of an adapter
            shutil.rmtree(doomed, ignore_errors=True)
            found.append(name)
    return found


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to. At the end it replaces `folder`; if the block fails, `folder` stays as it was. If
    several processes write the same folder at once, the last one wins."""
    partial, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{kind}") for kind in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        for _ in range(10):
            with contextlib.suppress(OSError):  # one is there
                partial.rename(folder)
                return
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        raise OSError(f"{folder.name!r} could not be written: other processes keep writing it")
    finally:
        shutil.rmtree(partial, ignore_errors=True)

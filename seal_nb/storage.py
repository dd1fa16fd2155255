"""Files of a run: where they are, results written whole, a journal of finished work, and a record of the settings.

Keys and seeds are derived from content, never from a clock. POSIX only: the journal's lock is ``flock``."""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

from seal_nb.errors import HIDDEN, DataError, RunMismatch, SettingsError, pattern, redacted

RECORDED_PACKAGES = (
    "seal-nb", "torch", "transformers", "peft", "trl", "accelerate", "vllm", "gguf",
    "numpy", "pyzmq", "pydantic", "papermill",
)  # fmt: skip
_PROJECT_ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 200_000_000  # of a file that is read whole, and of what it holds decompressed
MOST_TIMES, FREE_BYTES = 200, 2**24  # what a compressed file may hold: so many times its size, or so little
MOST_VALUES = 5_000_000  # of JSON: each takes 70 bytes and more
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(  # each escape of a text, so that the second of two backslashes begins none
    r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
MOST_LINE = 2**29  # bytes of a journal's line: a reply has at most half of that
MOST_DIGITS, MOST_LEVELS = 40, 100  # of a whole number, and of lists in lists, in a JSON file
MARK = ".seal_nb.json"  # in a folder that this package may remove again: the files that it put there
CHECKPOINTS = "checkpoint-*"  # in a mark
_OF_SYSTEM = re.compile(r"(.*/)?(\.nfs[0-9a-f]+|\.DS_Store|\.ipynb_checkpoints/.*)", re.DOTALL)
_OF_TRAINER = pattern("files_of_trainer")
_NO_NAME = re.compile(rf"[/\\\t\r\n]|{HIDDEN.pattern}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)?(\..*)?|.*\.record", re.IGNORECASE | re.DOTALL)
_LONGEST_NAME = 229  # bytes of a stem; file systems take 255, with what is added here and for records


def runs_folder(path: str | Path = "") -> Path:
    """The real place of a path under ``runs``, the same for JupyterLab, papermill, the command line and jobs.

    Args:
        path: a notebook's ``output_dir`` or ``runs_dir``, or a file in one, such as ``runs/03_query_server``.
            Empty: the ``runs`` folder itself.

    Returns:
        A relative path whose first part is ``runs`` goes under ``$SEAL_RUNS``, or else under ``runs`` of the project:
        the nearest parent of the current folder that is a checkout of seal-nb; else the current folder, or the one
        above it where it is called ``notebooks``. It is relative to the current folder where the project contains it.
        Any other path is returned as it is, but for ``~``, and so is one that was returned before."""
    given = Path(os.path.expanduser(path or "runs"))  # noqa: PTH111 - leaves an unknown user as it is
    chosen = os.environ.get("SEAL_RUNS", "")
    for one in (path, chosen):
        refuse_address(one)
    if given.parts[:1] != ("runs",):
        return given
    project = _project_of(Path.cwd())
    place = (project / Path(chosen or "runs").expanduser()).joinpath(*given.parts[1:])
    shown = Path(os.path.relpath(place))
    moves_again = chosen and shown.parts[0] == "runs"
    return shown if place.is_relative_to(project) and not moves_again else place


def command_runs_folder(path: str | Path = "", *, home: Path = _PROJECT_ROOT) -> Path:
    """``runs_folder`` of a command, which may be called in any folder. Where that is in no project and has no ``runs``,
    they are those of the project of ``home``, from now on and also for processes that this one starts."""
    here, project = _project_of(Path.cwd()), _project_of(home.resolve())
    has_own = _is_project(here) or (here / "runs").is_dir() or here == project
    if not has_own and (_is_project(project) or home != _PROJECT_ROOT):
        os.environ["SEAL_RUNS"] = os.environ.get("SEAL_RUNS") or str(project / "runs")
    return runs_folder(path)


def refuse_address(path: str | Path) -> None:
    """Raises: SettingsError for an address, such as s3://bucket/x: it would become a folder of that name."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise SettingsError(f"{redacted(str(path))!r} is an address; give a file or folder of this machine")


def data_file(name: str) -> Path:
    """A file that the package brings along."""
    return Path(__file__).parent / "data" / name


def file_name(stem: str, ending: str) -> str:
    """A file name from text that may come from elsewhere, such as a title or a field of a run file. An ordinary name
    stays as it is. Any other (with a slash, control characters, a leading dot or dash, too long) becomes one that lies
    in its folder, and ends with a hash, so that different texts stay different."""
    safe = _NO_NAME.sub("_", stem).lstrip(".-~ ").encode()[:_LONGEST_NAME].decode(errors="ignore")
    if safe != stem or _RESERVED.fullmatch(stem):
        safe = f"{safe or 'unnamed'}-{content_id(stem)[:8]}"
    return safe + ending


def _project_of(folder: Path) -> Path:
    above = folder.parent if folder.name == "notebooks" else folder
    return next((one for one in (folder, *folder.parents) if _is_project(one)), above)


def _is_project(folder: Path) -> bool:
    settings = folder / "pyproject.toml"
    is_checkout = settings.is_file() and 'name = "seal-nb"' in settings.read_text(errors="replace")
    return (is_checkout and (folder / "notebooks").is_dir()) or (folder / "slurm/job.sh").is_file()


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
    """Write a file whole or not at all: if anything fails (a full disk), an existing file stays as it was. A link to a
    file is replaced, because a folder from elsewhere may link to a file of the user; links to folders are followed."""
    target = Path(path).parent.resolve() / Path(path).name
    if target.exists() and not target.is_file():  # it would be replaced, a device such as /dev/null as well
        raise DataError("is not a regular file", path=path, remedy="give a file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:50]}.{uuid.uuid4().hex[:8]}.tmp")
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


def open_regular(path: str | Path) -> io.BufferedReader:
    """A file opened for reading. Raises: DataError for a missing one, and for what is no regular file: a FIFO would
    wait for a writer, and a device may never end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise DataError("no such file", path=path, remedy="check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", path=path, remedy="check the path") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DataError("is not a regular file", path=path, remedy="give a file")
    return os.fdopen(handle, "rb")


def open_own(path: str | Path) -> io.FileIO:
    """A file opened to read it and to append to it, made where there is none. Raises: DataError for what is no regular
    file, and for a link and a file with a second name: the user may have the same file elsewhere."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise DataError("is a link, a folder or a socket, not a file", path=path, remedy="remove it") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise DataError("is not a file of one name", path=path, remedy="put a copy of the file in its place")
    return io.FileIO(handle, "a+b")


def read_text(path: str | Path) -> str:
    """A file in UTF-8 (or UTF-16, as spreadsheets write), plain or gzip-compressed. Byte-order marks are left out: at
    the start, and at the start of a line, where files were put together.
    Raises: DataError with the path for a missing or unreadable file, for more than MOST_BYTES, and for a small file
    that holds much (MOST_TIMES), before it is in memory."""
    try:
        with open_regular(path) as file, contextlib.ExitStack() as opened:
            is_compressed = file.peek(2)[:2] == b"\x1f\x8b"
            content = opened.enter_context(gzip.GzipFile(fileobj=file)) if is_compressed else file
            allowed = max(FREE_BYTES, MOST_TIMES * os.fstat(file.fileno()).st_size) if is_compressed else MOST_BYTES
            raw = content.read(min(allowed, MOST_BYTES) + 1)
        encoding = json.detect_encoding(raw)
        text = raw.decode(encoding) if len(raw) <= min(allowed, MOST_BYTES) else None
    except UnicodeDecodeError as error:
        named = "UTF-8, perhaps Windows-1252" if encoding.startswith("utf-8") else encoding.upper()
        raise DataError(f"not {named}: {error}", path=path, remedy="save it as UTF-8 (in Excel: CSV UTF-8)") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path, remedy="copy the file again") from error
    if text is None:
        problem = f"holds more than {min(allowed, MOST_BYTES) // 10**6} MB"
        raise DataError(problem, path=path, remedy="unpack it" if allowed < MOST_BYTES else "split it")
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")


def read_json(path: str | Path, text: str | None = None, *, as_written: bool = False) -> Any:
    """The JSON value in a file, plain or gzip-compressed, as `parse_json`; ``text``: what `read_text` gave already.
    Raises: DataError with the path."""
    text = read_text(path) if text is None else text
    try:
        return parse_json(text, as_written=as_written)
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", path=path, remedy="write the file again") from error


def parse_json(text: str, *, as_written: bool = False) -> Any:
    """A JSON value. NaN and infinity are null, as `write_json` writes them. Half a surrogate pair, which no table can
    hold, is U+FFFD. Raises: ValueError, also for a key that occurs twice, for a whole number of over MOST_DIGITS
    digits, and for over MOST_LEVELS levels: Python could not compute with that number, nor copy such a value; and for
    over MOST_VALUES objects, lists and commas. ``as_written``: half a pair stays, and a fraction keeps its digits."""
    if sum(map(text.count, "{[,")) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} objects, lists and commas")
    if not as_written and _HALF.search(text):
        text = _ESCAPE.sub(lambda found: "\\ufffd" if found["half"] else found[0], text)
    try:
        to_float, null = Decimal if as_written else _finite, lambda _: None
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, parse_float=to_float, parse_constant=null)
    except RecursionError as error:
        raise ValueError(f"it has more than {MOST_LEVELS} levels") from error
    level = [value]
    for _ in range(MOST_LEVELS):
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, list | dict))
        level = [child for children in inside for child in children if isinstance(child, list | dict)]
        if not level:
            return value
    raise ValueError(f"it has more than {MOST_LEVELS} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {Counter(names).most_common(1)[0][0][:40]!r} occurs twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float | None:
    return value if math.isfinite(value := float(digits)) else None


def read_json_lines(
    path: str | Path, text: str | None = None, *, as_written: bool = False
) -> Iterator[tuple[str, Any]]:
    """The place (such as "line 3") and the JSON value of each line that is not blank; arguments as of ``read_json``.
    Raises: DataError with the path and the line."""
    # Not splitlines: a text may hold characters such as U+2028, which splitlines takes for the end of a line.
    for number, line in enumerate((read_text(path) if text is None else text).split("\n"), start=1):
        place = f"line {number}"
        if line.strip():
            try:
                value = parse_json(line, as_written=as_written)
            except ValueError as error:
                remedy = "write one JSON value a line"
                raise DataError(f"not valid JSON: {error}", path=path, item=place, remedy=remedy) from error
            yield place, value


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Append-only JSON lines ``{"key", "record"}`` for one writer; an append that returned survives a crash.

    A torn last line (the writer died in it) is dropped; a broken line before it is refused. A key that is appended
    again gets the new record. Memory holds only where each record is. Use it as a context manager. Raises: DataError
    for what is no sound journal, RunMismatch if another writer still has it after ``wait_s``."""

    def __init__(self, path: str | Path, *, wait_s: float = 0.0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            lock_file = self.path.with_name(f"{self.path.name}.lock")
            opened.enter_context(lock(lock_file, of=self.path, wait_s=wait_s))
            self._places = {key: place for key, _, place in _journal_lines(self.path)}
            self._size = max(map(sum, self._places.values()), default=0)
            self._file = opened.enter_context(open_own(self.path))
            if not self._size and not b'{"key"'.startswith(start := os.pread(self._file.fileno(), 6, 0)):
                raise DataError(f"begins with {start!r}, as no journal does", path=self.path, remedy="move it away")
            self._file.truncate(self._size)
            _sync_folder(self.path.parent)
            self._opened = opened.pop_all()

    def append(self, key: str, record: object) -> None:
        """Add one record; on return it is on the disk. A failed write leaves no half line behind."""
        self.append_json({key: json.dumps(record).encode()})

    def append_json(self, records: Mapping[str, bytes]) -> None:
        """``append`` of records that are JSON already, in one line each, at the price of one: all or none."""
        places, size = {}, self._size
        try:
            for key, record in records.items():
                line = b"%b%b}\n" % (_line_start(key), record)
                places[key] = size, len(line)
                size += len(line)
                while line:
                    line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._size)
            raise
        self._places |= places
        self._size = size

    def get(self, key: str) -> Any:
        """The latest record of a key. Raises: KeyError."""
        return json.loads(self._line(key))["record"]

    def get_json(self, key: str) -> bytes:
        """The latest record of a key as the JSON in the file. Raises: KeyError."""
        start, line = _line_start(key), self._line(key)
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
        """Let another writer in. The records can then be read no more."""
        self._opened.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def record_path(result: str | Path) -> Path:
    """The path of a result's record: ``run_x.json`` → ``run_x.record.json``."""
    name = Path(result).name.removesuffix(".gz")
    return Path(result).with_name(f"{name.rsplit('.', 1)[0]}.record.json")


def write_record(
    result: str | Path, *, stage: str, settings: Mapping[str, Any], seeds: Mapping[str, int] | None = None
) -> Path:
    """Write the settings, seeds and versions of a result next to it, without folders, addresses and secrets."""
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
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE), b""), start=1):
            if len(line) == MOST_LINE:
                raise DataError(f"line {number} has over {MOST_LINE:,} bytes", path=path, remedy="move the file away")
            if not line.endswith(b"\n"):
                return  # torn
            try:
                entry = json.loads(line)
                key, record = str(entry["key"]), entry["record"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
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
    with open_own(path) as file:
        handle = file.fileno()
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
                remedy = f"give a folder on another disk, or mount this one with locks (flock); {path.name} is its lock"
                raise DataError(f"this file system locks no files: {error}", path=of, remedy=remedy) from error
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield handle


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _without_places(value: object) -> object:
    if isinstance(value, Mapping):
        return {redacted(str(key)): _without_places(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(one) for one in value]
    if not isinstance(value, str | Path):
        return value
    if str(value).startswith(("/", "~")):
        return redacted(Path(value).name)
    text = re.sub(r"\b([A-Za-z][A-Za-z0-9+.-]*)://[^\s'\"<>&]*", r"\1://...", redacted(str(value)))
    return re.sub(r"=[/~][^\s'\"<>&]*/", "=", text)  # a folder among a grader's options


def forget_adapters(folder: Path, names: Sequence[str]) -> list[str]:
    """Delete kept adapters. ``names`` are ``protocol.Name``s, which cannot lead out of ``folder``. A folder that
    `whole_folder` did not write, such as a copied adapter, stays.
    Returns: the names of those that were deleted."""
    found = []
    for name in names:
        doomed = folder / f".{name}.{uuid.uuid4().hex}.old"
        if is_own(folder / name):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).rename(doomed)  # first: no worker may find half of an adapter
                shutil.rmtree(doomed, ignore_errors=True)
                found.append(name)
    return found


def is_own(folder: Path) -> bool:
    """Whether this package made the folder and nobody added to it: its mark names all its files, at any depth, but for
    what systems and Jupyter add."""
    try:
        known = set(read_json(folder / MARK))
        of_trainer = _OF_TRAINER if CHECKPOINTS in known else _OF_SYSTEM
        names = _files(folder)
        return not folder.is_symlink() and all(
            name in known or _OF_SYSTEM.fullmatch(name) or of_trainer.fullmatch(name) for name in names
        )
    except (DataError, OSError, TypeError):
        return False


def _files(folder: Path) -> Iterator[str]:
    """The path below the folder of everything in it, at any depth, that is no folder itself. Links are not followed."""
    below = (one for one in folder.rglob("*") if one.is_symlink() or not one.is_dir())
    return (one.relative_to(folder).as_posix() for one in below)


def write_mark(folder: Path, names: Iterable[str]) -> None:
    """Make `is_own` true of a folder with files of these names, which are paths below it. CHECKPOINTS stands for what
    the Trainer writes there."""
    write_json(folder / MARK, sorted({*names, MARK}))


def new_place(folder: str | Path, *, replace_own: bool = False, apart_from: Iterable[str | Path] = ()) -> Path:
    """The real path of a folder that is to be written: a new or an empty one. Raises: SettingsError for any other,
    and for one that is, contains or lies in a folder of ``apart_from``. ``replace_own``: it may hold what this package
    wrote (`is_own`)."""
    try:
        place = Path(os.path.expanduser(folder)).resolve()  # noqa: PTH111 - leaves an unknown user as it is
        free = not place.exists() or (place.is_dir() and (not any(place.iterdir()) or (replace_own and is_own(place))))
        others = [Path(one).resolve() for one in apart_from]
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is none
        raise SettingsError(f"{str(folder)!r} cannot be a folder: {error}; give a new folder") from error
    if not free:
        why = "and is not empty" if place.is_dir() else "and is a file"
        raise SettingsError(f"{folder} exists {why}, so nothing is written there; give a new folder")
    for other in others:
        if place.is_relative_to(other) or other.is_relative_to(place):
            raise SettingsError(f"{folder} and {other}, which is read, are not apart; give a folder elsewhere")
    return place


@contextlib.contextmanager
def whole_folder(folder: Path, *, replace_own: bool = False, apart_from: Iterable[str | Path] = ()) -> Iterator[Path]:
    """A new folder to write to. At the end it becomes `folder`; if the block fails, `folder` stays as it was. If
    several processes replace the same folder at once, the last one wins. Raises: SettingsError as `new_place`."""
    place = new_place(folder, replace_own=replace_own, apart_from=apart_from)
    partial, old = (place.with_name(f".{place.name[:50]}.{uuid.uuid4().hex}.{kind}") for kind in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise SettingsError(f"{folder} cannot be made: {error}; give another folder") from error
    try:
        yield partial
        write_mark(partial, _files(partial))
        for _ in range(10):
            with contextlib.suppress(OSError):  # one is there
                partial.rename(place)
                return
            new_place(place, replace_own=replace_own)
            with contextlib.suppress(FileNotFoundError):
                place.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        raise OSError(f"{folder.name!r} could not be written: other processes keep writing it")
    finally:
        shutil.rmtree(partial, ignore_errors=True)

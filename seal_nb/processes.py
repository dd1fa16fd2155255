"""Start a process with a log, end a tree of them, end one with its parent; threads that keep no process alive.

A stage is a tree: runner, Jupyter kernel, TTT server, workers. Some of them have a session of their own, so neither
Ctrl-C in a terminal nor the death of the root reaches all of them by itself."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import psutil

from seal_nb.storage import open_own

POLL_S = 0.5
END_BYTES = 64 * 2**10  # of a log that are read for its last lines: a log may have gigabytes
T = TypeVar("T")


class LoggedProcess(subprocess.Popen[bytes]):
    """A process that writes into `log`, in a session of its own: Ctrl-C does not reach it. `options` are Popen's.
    Raises: DataError for a log that is a link or no file (`storage.open_own`)."""

    def __init__(self, command: list[str], log: Path, *, is_new: bool = False, **options: Any) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open_own(log) as out:
            if is_new:
                out.truncate(0)
            self.log, self._offset = log, out.seek(0, os.SEEK_END)
            options |= {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "start_new_session": True}
            super().__init__(command, **options)

    def lines(self, n: int = 1000) -> list[str]:
        """The last lines that it has written."""
        return last_lines(self.log, n, start=self._offset)

    def ending(self) -> str:
        """The end of its log, for the message of an error."""
        return f"the end of {self.log}:\n" + "\n".join(self.lines(15))


def last_lines(path: Path, n: int, *, start: int = 0) -> list[str]:
    """The last ``n`` lines after byte ``start`` of a log that are not blank, or fewer if they have over 64 KiB."""
    with path.open("rb") as log:
        log.seek(max(start, path.stat().st_size - END_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-n:]


def end_tree(pid: int, *, grace_s: float = 10.0) -> None:
    """Terminate ``pid`` and all its descendants; kill those that still run after ``grace_s`` seconds."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    _send(signal.SIGTERM, tree)
    _, alive = psutil.wait_procs(tree, timeout=grace_s)
    _send(signal.SIGKILL, alive)


def _send(what: int, processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(what)


def end_with_parent(parent_pid: int) -> None:
    """From now on this process and its descendants end when ``parent_pid`` is no longer its parent: a parent that is
    killed with signal 9 cannot end its children."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(POLL_S)
        # Kill at once: when its kernel dies, the main thread would end this process before a slower end is done.
        _send(signal.SIGKILL, psutil.Process().children(recursive=True))
        os._exit(143)  # sys.exit would end only this thread

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def ending_with_me(command: list[str]) -> list[str]:
    """The command line of another program that ends with this process: by SIGTERM, so that `srun` can end its processes
    on other nodes, and ten seconds later by force. Where a signal kills it, its exit code is 128 + the signal."""
    return [sys.executable, "-m", "seal_nb.processes", str(os.getpid()), *command]


def _run(parent_pid: int, command: list[str]) -> int:
    child = subprocess.Popen(command)
    while True:
        try:
            code = child.wait(POLL_S)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if os.getppid() != parent_pid:
                end_tree(child.pid)
                return 143


class DaemonThreads:
    """At most ``n_threads`` daemon threads, started as calls come; each ends when no call waits. Those of a
    ThreadPoolExecutor would keep the process alive until a slow service has answered every call."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()
        self._n_running = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            self._calls.append((future, call))
            if self._n_running < self.n_threads:
                self._n_running += 1
                threading.Thread(target=self._run, name="requests", daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._n_running -= 1
                    return
                future, call = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - the caller of result() gets it
                    future.set_exception(error)


if __name__ == "__main__":
    raise SystemExit(_run(int(sys.argv[1]), sys.argv[2:]))

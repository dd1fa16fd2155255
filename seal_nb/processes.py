"""No process is left behind: end a tree of processes, and end with one's parent.

A stage is a tree (runner, Jupyter kernel, TTT server, workers), and each of them may live in a session of its
own, so that neither a terminal's Ctrl-C nor the death of the root reaches the leaves by itself.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time

import psutil

POLL_S = 0.5


def end_tree(pid: int, *, grace_s: float = 10.0) -> None:
    """Terminate ``pid`` and all its descendants, and kill after ``grace_s`` what is still there."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=grace_s)
    _kill(alive)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def end_with_parent(parent_pid: int) -> threading.Thread:
    """From now on this process and its descendants end when ``parent_pid`` is no longer its parent.

    A parent that is killed outright (kill -9) tells nobody; the change of the parent's number does.
    """
    watch = threading.Thread(target=_watch, args=(parent_pid,), name="end-with-parent", daemon=True)
    watch.start()
    return watch


def ending_with_me(command: list[str]) -> list[str]:
    """The command line of a program that knows nothing of this, which then ends with this process too.

    It ends in order (SIGTERM, then ten seconds), so that `srun` can take its nodes' processes with it. Killed
    by a signal its exit code is 128 and the signal, as a shell has it.
    """
    return [sys.executable, "-m", "seal_nb.processes", str(os.getpid()), *command]


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    # At once: with a dead kernel the main thread would end this process before anything slower is done.
    _kill(psutil.Process().children(recursive=True))
    # Not sys.exit, which would end this thread alone.
    os._exit(143)


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


if __name__ == "__main__":
    raise SystemExit(_run(int(sys.argv[1]), sys.argv[2:]))

"""The worker processes that a server starts on its own machine: started, watched, started again, ended.

Each is ``python -m seal_nb.service.worker`` in a process of its own with its own device. One that dies is
replaced, later and later the more often it happens; where the very first ones cannot even load, that is
told, since no waiting will help.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seal_nb.service.settings import ServeSettings

log = logging.getLogger(__name__)

STEADY_S = 60.0  # a worker that lived so long did not die of its start


@dataclass(kw_only=True)
class Place:
    """One worker of this machine: its process, and what happens when that ends."""

    index: int
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    n_early_deaths: int = 0


class Pool:
    """See the module. ``exited(pid, why)`` is called for each process that ended by itself."""

    def __init__(self, settings: ServeSettings, connect: str, exited: Callable[[int, str], None]) -> None:
        self.settings, self.connect, self.exited = settings, connect, exited
        self.places = [Place(index=index) for index in range(settings.n_workers)]
        self._gpus = visible_gpus()

    @property
    def pids(self) -> list[int]:
        return [place.process.pid for place in self.places if place.process is not None]

    def most_early_deaths(self) -> int:
        return max((place.n_early_deaths for place in self.places), default=0)

    def watch(self, now: float) -> None:
        """Notice who ended; start who is due."""
        for place in self.places:
            if place.process is not None and place.process.poll() is not None:
                self._ended(place, now)
            if place.process is None and now >= place.start_at:
                place.process = self._start(place.index)
                place.started_at = now

    def kill(self, pids: list[int]) -> None:
        """Those of them that are ours; they are replaced as any that died."""
        for place in self.places:
            if place.process is not None and place.process.pid in pids:
                log.warning("worker process %d is killed: it got nowhere", place.process.pid)
                place.process.kill()

    def end(self, told: set[int], timeout_s: float = 10.0) -> None:
        """Those in ``told`` know that they are to stop. Who is late, or still loading, is killed."""
        deadline = time.monotonic() + timeout_s
        for place in self.places:
            if place.process is None:
                continue
            if place.process.pid not in told:
                place.process.kill()
            try:
                place.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                place.process.kill()
                place.process.wait()
            place.process = None

    def _ended(self, place: Place, now: float) -> None:
        assert place.process is not None
        code = place.process.returncode
        early = now - place.started_at < STEADY_S
        place.n_early_deaths = place.n_early_deaths + 1 if early else 0
        place.start_at = now + min(30.0, 0.1 * 2**place.n_early_deaths)
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        log.warning("worker process %d ended (%s)", place.process.pid, why)
        self.exited(place.process.pid, why)
        place.process = None

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        threads = str(self.settings.n_threads)
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._gpus and self.settings.n_workers > 1 and self.settings.device in ("auto", "cuda"):
            env["CUDA_VISIBLE_DEVICES"] = self._gpus[index % len(self._gpus)]
        return subprocess.Popen(self._command(), env=env, stdin=subprocess.DEVNULL)

    def _command(self) -> list[str]:
        s = self.settings
        options = {
            "connect": self.connect, "model": s.model, "n-slots": s.n_slots, "n-threads": s.n_threads,
            "device": s.device, "dtype": s.dtype, "max-seq-length": s.max_seq_length, "grader": s.grader,
            "deterministic": s.deterministic,
            "adapters-dir": s.adapters_dir.resolve(), "inner-loop": s.inner_loop, "lease-s": s.lease_s,
            "beat-s": min(1.0, s.lease_s / 5), "parent-pid": os.getpid(),
        }  # fmt: skip
        if not self.connect:
            options |= {"endpoint-file": s.endpoint_path}
        return [sys.executable, "-m", "seal_nb.service.worker", *(f"--{k}={v}" for k, v in options.items())]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lets this process see, or all GPUs of the machine; asks no library."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    cards = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(cards.iterdir())] if cards.is_dir() else []

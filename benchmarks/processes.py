"""The same work in several processes at once, each with its own threads, all starting together.

Processes are forked from a server that has imported torch once and run nothing, so that each has a peak of
memory of its own. Knows nothing of models.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

START_TIMEOUT_S = 600.0  # loading the model in all processes

_barrier: list[Barrier] = []


def _prepare(barrier: Barrier, n_threads: int) -> None:
    import torch

    torch.set_num_threads(n_threads)
    _barrier.append(barrier)


def wait_for_all() -> float:
    """Wait until every process has come here; the time, in seconds of one clock for all."""
    _barrier[0].wait(START_TIMEOUT_S)
    return time.monotonic()


def peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_together(
    work: Callable[..., dict[str, Any]], arguments_P: Sequence[tuple[Any, ...]], *, n_threads: int
) -> list[dict[str, Any]]:
    """One process for each tuple of arguments; what `work` returns in each, with `peak_rss_mb`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peft_alone", "benchmarks.slots"])
    n = len(arguments_P)
    with ProcessPoolExecutor(
        max_workers=n, mp_context=context, initializer=_prepare, initargs=(context.Barrier(n), n_threads)
    ) as pool:
        futures = [pool.submit(_run, work, arguments) for arguments in arguments_P]
        return [future.result() for future in futures]


def _run(work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    result = work(*arguments)
    return result | {"peak_rss_mb": round(peak_rss_mb())}

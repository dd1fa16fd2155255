"""Threads that grade beside the caller and end with the process, whatever they are waiting for.

A ``ThreadPoolExecutor`` keeps the interpreter alive until every call that was handed in is done; a worker
that is told to stop cannot wait for a thousand calls to a slow judge.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class GradingThreads:
    """At most ``n_threads`` daemon threads, started as calls come. A call not yet begun can be cancelled."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._n_started = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, call))
        with self._starting:
            if self._n_started < self.n_threads:
                threading.Thread(target=self._run, name="grading", daemon=True).start()
                self._n_started += 1
        return future

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)

"""Calls to a service that belong together, and what Ctrl-C does to them.

An exception in the middle of handing over would lose an answer that is paid for, and one inside a lock would
leave it locked for ever. So while a round lasts Ctrl-C is only noted: what nobody has begun is not asked,
what is under way is handed over, and then the interrupt is raised. Knows nothing about services and replies.
"""

import itertools
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Generic, TypeVar

from seal_nb.engines.base import NotAsked

POLL_S = 0.1  # of those who wait before they ask (again); stopping takes no lock that could wake them
T = TypeVar("T")


class Round(Generic[T]):
    """``n`` calls, whose outcomes come with their index. ``stopped``: the rest is not wanted (any more)."""

    def __init__(self, n: int = 1) -> None:
        self.n = n
        self.stopped = False  # plain: a signal handler must not wait for a lock that its own thread holds
        self.came: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
        self._indices = itertools.count()

    def turns(self) -> Iterator[int]:
        """Indices for whoever has time, each of them to one."""
        while (index := next(self._indices)) < self.n:
            yield index

    def wait(self, seconds: float) -> None:
        """Raises NotAsked as soon as the round is stopped."""
        until = time.monotonic() + seconds
        while not self.stopped:
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(left_s, POLL_S))
        raise NotAsked("not asked: others failed before it, or the run was interrupted")

    @contextmanager
    def interrupt_at_the_end(self) -> Iterator[None]:
        """The first Ctrl-C stops the round and is raised when the block is left, a second one at once."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield  # no interrupts come here, or somebody else deals with them
            return
        interrupted = False

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted
            if interrupted:
                signal.default_int_handler(number, frame)
            interrupted = self.stopped = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if interrupted:
                raise KeyboardInterrupt

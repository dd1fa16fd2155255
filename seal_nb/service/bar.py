"""The progress of a round: one bar that is redrawn on a terminal, a line now and then anywhere else."""

import sys
import time
from typing import TextIO

WIDTH = 30
LINE_EVERY_S = 10.0  # where lines cannot be redrawn (a notebook's log, a batch job's output)


class Bar:
    """Call ``step`` once a reply."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done = total, 0
        self.stream = stream or sys.stderr
        self._started_at = time.monotonic()
        self._shown_at = self._started_at

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.stream.isatty():
            self.stream.write(f"\r{self._line(now)}" + "\n" * (self.done == self.total))
        elif self.done == self.total or now - self._shown_at >= LINE_EVERY_S:
            self._shown_at = now
            self.stream.write(f"{self._line(now)}\n")
        self.stream.flush()

    def _line(self, now: float) -> str:
        filled = WIDTH * self.done // max(1, self.total)
        took_s = now - self._started_at
        left_s = took_s / self.done * (self.total - self.done)
        bar = "█" * filled + "·" * (WIDTH - filled)
        return f"{bar} {self.done} of {self.total} replies, {took_s:.0f} s, about {left_s:.0f} s left"

"""How a headless stage tells its progress: a bar of cells on a terminal, plain lines anywhere else."""

import sys
from collections.abc import Callable
from typing import Any, TextIO

LINE_EVERY_S = 30.0  # at most one line about cells in this time, where there is no terminal


def for_stream(stream: TextIO) -> tuple[Callable[[str], object], dict[str, Any]]:
    """(where printed text goes, settings of papermill's progress bar) that suit ``stream``."""
    if stream.isatty():
        return _above_the_bar, {"file": sys.stderr, "leave": False}
    return _flushed(stream), {
        "file": _Lines(stream),
        "bar_format": "cell {n_fmt} of {total_fmt} after {elapsed}",
        "mininterval": LINE_EVERY_S,
        "delay": LINE_EVERY_S,
        "leave": False,
    }


def _above_the_bar(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, end="")


def _flushed(stream: TextIO) -> Callable[[str], object]:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


class _Lines:
    """Turns a bar that is redrawn in place into lines, each once."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:
            self.stream.write(f"{line}\n")
            self.stream.flush()
            self.last = line

    def flush(self) -> None:
        """Each line is flushed as it is written."""

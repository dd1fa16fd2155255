"""Processes with a log: its end is read without the rest."""

import sys
import tracemalloc
from pathlib import Path

from seal_nb.processes import LoggedProcess, last_lines

MIB = 2**20


def test_the_end_of_a_long_log_is_read_without_the_rest(tmp_path: Path) -> None:
    code = f"for _ in range(20): print('x' * {MIB})\nfor i in range(20): print(i)"
    process = LoggedProcess([sys.executable, "-c", code], tmp_path / "log")
    process.wait()
    tracemalloc.start()
    ending = process.ending()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ending.splitlines()[1:] == [str(i) for i in range(5, 20)]
    assert peak < MIB


def test_lines_of_an_earlier_process_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("earlier\n")
    process = LoggedProcess([sys.executable, "-c", "print('own')"], tmp_path / "log")
    process.wait()
    assert process.lines() == ["own"]
    assert last_lines(tmp_path / "log", 5) == ["earlier", "own"]
    assert last_lines(tmp_path / "log", 1) == last_lines(tmp_path / "log", 5, start=8) == ["own"]

"""These checks run in an environment of their own, in which torch is built for CUDA (`make cuda-check`)."""

import pytest

HEAD = ("Qwen2.5-7B, one step", "in a layer", "outside", "launched", "waits", "peak GiB", "branches", "padded")
NOTE = """\
in a layer, outside: operations, forward and backward. launched: by the host, beside a graph if one is replayed.
waits: of the host. branches: tokens that a branch multiplies for each real one; padded: if each slot were padded to
the longest."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [value for report in reports for name, value in report.user_properties if name == "row"]
    for name, *numbers in [HEAD, *rows] if rows else []:
        terminalreporter.write_line(f"{name:<36}" + "".join(f"{number:>11}" for number in numbers))
    if rows:
        terminalreporter.write_line(NOTE)

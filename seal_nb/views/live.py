"""What depends on whether somebody looks on: displays that change in place in JupyterLab only.

A notebook that runs in JupyterLab may redraw, sort and ask; the same notebook under papermill, nbval or
nbconvert shows the same content as static output, so that what is committed is small and the same every time.
"""

import html
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from seal_nb.views.tables import Table, somebody_looks_on

COUNTED = re.compile(r"(\d+) of (\d+)")
NOT_YET = "not run yet"
LONGEST_SENTENCE = 200  # characters; what a number lacks often stands at the end of its sentence


class Teller:
    """Progress of a long cell: ``tell=Teller()``. One bar in place where somebody looks on, else a line each.

    A text such as "inner loops: 3 of 10" moves the bar. Seconds are told where they are not saved.
    """

    def __init__(self, *, live: bool | None = None, stream: TextIO | None = None) -> None:
        self.live = somebody_looks_on() if live is None else live
        self.stream = stream or sys.stdout
        self._handle: Any = None
        self._began_at = time.monotonic()

    def __call__(self, text: str) -> None:
        if not self.live:
            self.stream.write(f"{text}\n")
            self.stream.flush()
            return
        from IPython.display import HTML, display

        page = HTML(_bar(text, time.monotonic() - self._began_at))
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)


class Glance:
    """The few numbers to look at first: shown at the top of a notebook, filled in by a cell further down.

    ``Glance("gain", "accuracy")`` as the last line of an early cell, ``glance.fill(gain="+12 %", …)`` when
    they are known. Works headless too: the display of the early cell is updated.
    """

    def __init__(self, *names: str) -> None:
        self.values: dict[str, str] = dict.fromkeys(names, NOT_YET)
        self._handle: Any = None

    def fill(self, values: Mapping[str, str]) -> None:
        """Set what is known now; names that are new come at the end."""
        self.values |= values
        if self._handle is not None:
            self._handle.update(self._table())

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._handle = display(self._table(), display_id=True)

    def _table(self) -> Table:
        return Table(
            rows=[{"at a glance": name, "": value} for name, value in self.values.items()],
            columns={"at a glance": "", "": ""},
            longest_cell=LONGEST_SENTENCE,
        )


def right_of(correct: Sequence[bool | None]) -> str:
    """Right answers of those that could be graded, for a glance: "3 of 5"."""
    graded = [one for one in correct if one is not None]
    return f"{sum(graded)} of {len(graded)}"


def _bar(text: str, elapsed_s: float) -> str:
    counted = COUNTED.search(text)
    bar = ""
    if counted:
        done, total = counted.groups()
        bar = f'<progress value="{done}" max="{total}" aria-label="progress"></progress> '
    return f'<div role="status">{bar}{html.escape(text)}, {elapsed_s:.0f} s</div>'

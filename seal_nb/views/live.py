"""Displays that change while a notebook runs: the summary at its top, and progress.

JupyterLab gets bars and updated displays. Under papermill, nbval or nbconvert the same content is plain lines
without times, so that what is committed is small and the same every time.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm

from seal_nb.views.tables import has_live_frontend, mime_bundle

COUNTED = re.compile(r"^(.*?):? *(\d+) of (\d+)$")
NOT_YET = "not run yet"
LONGEST_SENTENCE = 200  # characters of a summary's line


class Teller:
    """Progress from sentences: "inner loops: 3 of 10" moves a bar in JupyterLab, every other text is a line."""

    def __init__(self) -> None:
        self.live = has_live_frontend()
        self._bar: Any = None

    def __call__(self, text: str) -> None:
        counted = COUNTED.match(text) if self.live else None
        if counted is None:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
            return
        what, done, total = counted[1], int(counted[2]), int(counted[3])
        if self._bar is None or (self._bar.desc, self._bar.total) != (what, total):
            self._bar = tqdm(total=total, desc=what)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None


class Summary:
    """The few numbers to look at first: shown at the top of a notebook, filled in by later cells.

    ``summary = Summary("gain", "accuracy")`` and ``summary`` as the last line of an early cell, later
    ``summary.fill({"gain": "+12 %"})``. The display of the early cell is updated, also in a headless run.

    Args:
        names: the lines of the table; each says "not run yet" until it is filled.
    """

    def __init__(self, *names: str) -> None:
        self.values: dict[str, str] = dict.fromkeys(names, NOT_YET)
        self._handle: Any = None

    def fill(self, values: Mapping[str, str]) -> None:
        """Set lines of the table; new names are added at the end."""
        self.values |= values
        if self._handle is not None:
            self._handle.update(self._bundle(), raw=True)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._handle = display(self._bundle(), raw=True, display_id=True)

    def _bundle(self) -> dict[str, str]:
        import pandas as pd

        rows = pd.DataFrame({"at a glance": list(self.values), "": list(self.values.values())})
        return mime_bundle(rows, longest_cell=LONGEST_SENTENCE)

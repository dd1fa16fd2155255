"""Displays that change while a notebook runs: the summary at its top, progress, and a server over time.

JupyterLab gets bars and updated displays. Under papermill, nbval or nbconvert the same content is plain lines, so that
what is committed is small and the same every time. A server may run for days: its lines come less and less often."""

import json
import sys
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from seal_nb.errors import visible
from seal_nb.metrics import counted
from seal_nb.server.client import Sample
from seal_nb.storage import data_file
from seal_nb.views.plots import plot_server_activity
from seal_nb.views.tables import as_html, has_live_frontend, mime_bundle

PROGRESS_LINES = 10  # at most, to keep an executed notebook short
NOT_YET = "not run yet"
LONGEST_SENTENCE = 200  # characters of a summary's line
REDRAW_S = 10.0  # the live figure; drawing it costs a fifth of a second that a worker may want
FIRST_LINE_S, LONGEST_LINE_S = 15.0, 600.0
MIB = 2**20


def say(text: str) -> None:
    """A line of a notebook's output, at once; hidden characters of foreign text are visible."""
    sys.stdout.write(f"{visible(text)}\n")
    sys.stdout.flush()


def _shown(bundle: dict[str, str], handle: Any = None) -> Any:
    """Show a new display, or what `handle` shows from now on. Returns: the handle."""
    from IPython.display import display

    if handle is None:
        return display(bundle, raw=True, display_id=True)
    handle.update(bundle, raw=True)
    return handle


class Progress:
    """How much of a work is done: a bar in JupyterLab, elsewhere at most ten lines such as "adapters: 3 of 10"."""

    def __init__(self, what: str) -> None:
        self.what = visible(what)
        self._bar: Any = None

    def at(self, done: int, total: int) -> None:
        """So much is done."""
        if not has_live_frontend():
            if done * PROGRESS_LINES // total > (done - 1) * PROGRESS_LINES // total:
                say(f"{self.what}: {done} of {total}")
            return
        self._bar = self._bar or tqdm(total=total, desc=self.what)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


class Summary:
    """The few numbers to look at first: shown at the top of a notebook, filled in by later cells.

    ``summary = Summary("gain", "accuracy")`` and ``summary`` as the last line of an early cell, later
    ``summary.fill({"gain": "+12 %"})``. The display of the early cell is updated, also in a headless run.

    Args:
        names: the lines of the table; each says "not run yet" until it is filled."""

    def __init__(self, *names: str) -> None:
        self.values: dict[str, str] = dict.fromkeys(names, NOT_YET)
        self._handle: Any = None

    def fill(self, values: Mapping[str, str]) -> None:
        """Set lines of the table; new names are added at the end."""
        self.values |= values
        if self._handle is not None:
            _shown(self._bundle(), self._handle)

    def _ipython_display_(self) -> None:
        self._handle = _shown(self._bundle())

    def _bundle(self) -> dict[str, str]:
        rows = pd.DataFrame(self.values.items(), columns=["at a glance", ""])
        return mime_bundle(rows, longest_cell=LONGEST_SENTENCE)


def server_frame(samples: Sequence[Sample]) -> pd.DataFrame:
    """The last state and the maximum of each number: columns ``""`` (what), ``now``, ``most``."""
    labels = pd.Series(json.loads(data_file("server_labels.json").read_text()))  # by the name in a sample
    over = pd.DataFrame(samples, columns=labels.index, dtype=float)
    over[["memory_bytes", "gpu_bytes"]] /= MIB
    table = pd.DataFrame({"": labels, "now": over.iloc[-1], "most": over.max()}, index=labels.index)
    if not over["gpu_bytes"].any():
        table = table.drop("gpu_bytes")
    return table.reset_index(drop=True).map(lambda value: value if isinstance(value, str) else f"{value:,.0f}")


def status_line(sample: Sample) -> str:
    """One sample for a log."""
    on_gpu = f" (GPU {sample['gpu_bytes'] / MIB:.0f} MiB)" if sample["gpu_bytes"] else ""
    return (
        f"{sample['at_s']:.0f} s: {sample['queued']} waiting, {sample['slots_in_use']}/{sample['slots']} slots, "
        f"{sample['jobs_per_min']:g} jobs/min, {sample['tokens_per_s']:g} tokens/s, "
        f"{sample['memory_bytes'] / MIB:.0f} MiB{on_gpu}, {sample['failed']} failed, "
        f"{counted(int(sample['workers']), 'workers')}"
    )


class ServerView:
    """Call ``show`` for every sample of ``Watch`` and ``close`` at the end, both with what is kept of them."""

    def __init__(self) -> None:
        self.live = has_live_frontend()
        self._handle: Any = None
        self._image = ""
        self._due_at, self._pause_s = 0.0, REDRAW_S if self.live else FIRST_LINE_S

    def show(self, samples: Sequence[Sample]) -> None:
        """Update the display, or print a line if it is time for one."""
        if not samples:
            return
        if is_due := time.monotonic() >= self._due_at:
            self._due_at = time.monotonic() + self._pause_s
        if self.live:
            if is_due:
                image = b64encode(plot_server_activity(samples).drawn()).decode()
                self._image = f'<img alt="the server over time" src="data:image/png;base64,{image}">'
            bundle = {"text/html": as_html(server_frame(samples)) + self._image}
            self._handle = _shown(bundle, self._handle)
        elif is_due:
            say(status_line(samples[-1]))
            self._pause_s = min(2 * self._pause_s, LONGEST_LINE_S)

    def close(self, samples: Sequence[Sample]) -> None:
        """Show the final table and figure."""
        from IPython.display import display

        if samples:
            self._handle = _shown(mime_bundle(server_frame(samples)), self._handle)
            display(plot_server_activity(samples))

"""A server over time: figure and table of sampled status records, live in JupyterLab.

JupyterLab gets one display that is updated. A headless run prints lines, less and less often, because a server may
run for days. Records of ``seal_nb.server.status`` come in; nothing is sampled here.
"""

import sys
import time
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from matplotlib.ticker import MaxNLocator

from seal_nb.metrics import counted
from seal_nb.server.status import History, Sample
from seal_nb.views.plots import legend_outside
from seal_nb.views.style import BLUE, DPI, GREEN, GREY, ORANGE, WIDTH_IN, Chart, png_bytes, styled
from seal_nb.views.tables import as_html, has_live_frontend, mime_bundle, show

if TYPE_CHECKING:
    import pandas as pd

REDRAW_S = 10.0  # the live figure; drawing it costs a fifth of a second that a worker may want
FIRST_LINE_S, LONGEST_LINE_S = 15.0, 600.0


@styled
def plot_server_activity(samples: Sequence[Sample]) -> Chart:
    """Requests that wait, slots in use (and slots), and jobs per minute, over the time of watching."""
    chart = Chart(figsize=(WIDTH_IN, 3.8), dpi=DPI)
    above, below = chart.subplots(2, 1, sharex=True)
    seconds = [sample.at_s for sample in samples]
    # A count holds until the next sample: steps, not slopes.
    for name, colour, label in (("slots", GREY, "slots"), ("slots_in_use", BLUE, "slots in use"),
                                ("queued", ORANGE, "requests waiting")):  # fmt: skip
        style = ":" if name == "slots" else "-"
        values = [getattr(sample, name) for sample in samples]
        above.step(seconds, values, style, where="post", color=colour, label=label)
    below.plot(seconds, [sample.jobs_per_min for sample in samples], color=GREEN, label="jobs per minute")
    above.set_ylabel("number")
    above.yaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_ylabel("jobs per minute\n(of the last minute)")
    below.set_xlabel(f"seconds since watching began (n = {len(samples)} samples)")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    legend_outside(chart)
    chart.alt = _in_words(samples)
    return chart


def server_frame(samples: Sequence[Sample]) -> "pd.DataFrame":
    """The last state and the maximum of each number: columns ``""`` (what), ``now``, ``most``."""
    import pandas as pd

    rows = [
        {"": _LABELS[name], **{at: f"{_shown(one, name):,.0f}" for at, one in _last_and_most(samples, name)}}
        for name in _LABELS
        if samples and (name != "gpu_bytes" or _most(samples, name).gpu_bytes)
    ]
    return pd.DataFrame(rows)


def status_line(sample: Sample) -> str:
    """One sample for a log."""
    on_gpu = f" (GPU {sample.gpu_bytes / 2**20:.0f} MiB)" if sample.gpu_bytes else ""
    return (
        f"{sample.at_s:.0f} s: {sample.queued} waiting, {sample.slots_in_use}/{sample.slots} slots, "
        f"{sample.jobs_per_min:g} jobs/min, {sample.tokens_per_s:g} tokens/s, "
        f"{sample.memory_bytes / 2**20:.0f} MiB{on_gpu}, {sample.failed} failed, " + counted(sample.workers, "workers")
    )


class ServerView:
    """Call ``show`` for every sample and ``close`` at the end, both with what is kept of them."""

    def __init__(self, *, live: bool | None = None, stream: TextIO | None = None) -> None:
        self.live = has_live_frontend() if live is None else live
        self.stream = stream or sys.stdout
        self._handle: Any = None
        self._image, self._redraw_at = "", 0.0
        self._line_at, self._pause_s = 0.0, FIRST_LINE_S

    def show(self, history: History) -> None:
        """Update the display, or print a line if it is time for one."""
        now = time.monotonic()
        if self.live:
            self._show_in_place(history.samples(), now)
        elif history.last is not None and now >= self._line_at:
            self.stream.write(f"{status_line(history.last)}\n")
            self.stream.flush()
            self._line_at, self._pause_s = now + self._pause_s, min(2 * self._pause_s, LONGEST_LINE_S)

    def close(self, history: History) -> None:
        """Show the final table and figure."""
        from IPython.display import display

        if not (samples := history.samples()):
            return
        if self._handle is None:
            show(server_frame(samples))
        else:
            self._handle.update(mime_bundle(server_frame(samples)), raw=True)
        display(plot_server_activity(samples))

    def _show_in_place(self, samples: Sequence[Sample], now: float) -> None:
        from IPython.display import HTML, display

        if now >= self._redraw_at:
            image = b64encode(png_bytes(plot_server_activity(samples))).decode()
            self._image = f'<img alt="the server over time" src="data:image/png;base64,{image}">'
            self._redraw_at = now + REDRAW_S
        page = HTML(as_html(server_frame(samples)) + self._image)
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)


_LABELS = {
    "queued": "requests waiting",
    "slots_in_use": "slots in use",
    "slots": "slots",
    "jobs_per_min": "jobs per minute",
    "tokens_per_s": "trained tokens per second",
    "memory_bytes": "memory, front end and workers (MiB)",
    "gpu_bytes": "GPU memory of the workers (MiB)",
    "answered": "answered",
    "failed": "failed",
    "requeued": "requeued",
    "workers": "workers",
}


def _last_and_most(samples: Sequence[Sample], name: str) -> list[tuple[str, Sample]]:
    return [("now", samples[-1]), ("most", _most(samples, name))]


def _most(samples: Sequence[Sample], name: str) -> Sample:
    return max(samples, key=lambda sample: getattr(sample, name))


def _shown(sample: Sample, name: str) -> float:
    value: float = getattr(sample, name)
    return value / 2**20 if name.endswith("_bytes") else value


def _in_words(samples: Sequence[Sample]) -> str:
    if not samples:
        return "No status of the server was sampled."
    return (
        f"A server over {samples[-1].at_s - samples[0].at_s:.0f} s: at most "
        f"{_most(samples, 'queued').queued} requests waiting, "
        f"{_most(samples, 'slots_in_use').slots_in_use} of {samples[-1].slots} slots in use, "
        f"{_most(samples, 'jobs_per_min').jobs_per_min:g} jobs per minute."
    )

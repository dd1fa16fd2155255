"""A server over time: figure and table of sampled status records, live in JupyterLab.

JupyterLab gets one display that is updated. A headless run prints lines, less and less often, because a server may
run for days. Samples of ``seal_nb.server.launch.Watch`` come in; nothing is sampled here.
"""

import time
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from seal_nb.metrics import counted
from seal_nb.server.launch import Sample
from seal_nb.views.live import Teller
from seal_nb.views.style import BLUE, GREEN, GREY, ORANGE, WIDTH_IN, Chart, styled
from seal_nb.views.tables import as_html, has_live_frontend, mime_bundle, show

if TYPE_CHECKING:
    import pandas as pd

REDRAW_S = 10.0  # the live figure; drawing it costs a fifth of a second that a worker may want
FIRST_LINE_S, LONGEST_LINE_S = 15.0, 600.0
MIB = 2**20
LABELS = {
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


@styled
def plot_server_activity(samples: Sequence[Sample]) -> Chart:
    """Requests that wait, slots in use (and slots), and jobs per minute, over the time of watching."""
    chart = Chart(figsize=(WIDTH_IN, 3.8))
    above, below = chart.subplots(2, 1, sharex=True)
    over = {name: [sample[name] for sample in samples] for name in ("at_s", *LABELS)}
    for name, colour, style in (("slots", GREY, ":"), ("slots_in_use", BLUE, "-"), ("queued", ORANGE, "-")):
        # A count holds until the next sample: steps, not slopes.
        above.step(over["at_s"], over[name], style, where="post", color=colour, label=LABELS[name])
    below.plot(over["at_s"], over["jobs_per_min"], color=GREEN, label="jobs per minute")
    above.set_ylabel("number")
    above.yaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_ylabel("jobs per minute\n(of the last minute)")
    below.set_xlabel(f"seconds since watching began (n = {len(samples)} samples)")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    if not samples:
        return chart.finished("No status of the server was sampled.")
    return chart.finished(
        f"A server over {over['at_s'][-1] - over['at_s'][0]:.0f} s: at most {max(over['queued'])} requests "
        f"waiting, {max(over['slots_in_use'])} of {over['slots'][-1]} slots in use, "
        f"{max(over['jobs_per_min']):g} jobs per minute."
    )


def server_frame(samples: Sequence[Sample]) -> "pd.DataFrame":
    """The last state and the maximum of each number: columns ``""`` (what), ``now``, ``most``."""
    import pandas as pd

    over = pd.DataFrame(samples)[list(LABELS)]
    over = over.assign(memory_bytes=over["memory_bytes"] / MIB, gpu_bytes=over["gpu_bytes"] / MIB)
    table = pd.DataFrame({"": LABELS, "now": over.iloc[-1], "most": over.max()})
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
    """Call ``show`` for every sample and ``close`` at the end, both with what is kept of them."""

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
            self._show_in_place(samples, redraw=is_due)
        elif is_due:
            Teller()(status_line(samples[-1]))
            self._pause_s = min(2 * self._pause_s, LONGEST_LINE_S)

    def close(self, samples: Sequence[Sample]) -> None:
        """Show the final table and figure."""
        from IPython.display import display

        if not samples:
            return
        if self._handle is None:
            show(server_frame(samples))
        else:
            self._handle.update(mime_bundle(server_frame(samples)), raw=True)
        display(plot_server_activity(samples))

    def _show_in_place(self, samples: Sequence[Sample], *, redraw: bool) -> None:
        from IPython.display import HTML, display

        if redraw:
            image = b64encode(plot_server_activity(samples).drawn()).decode()
            self._image = f'<img alt="the server over time" src="data:image/png;base64,{image}">'
        page = HTML(as_html(server_frame(samples)) + self._image)
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)

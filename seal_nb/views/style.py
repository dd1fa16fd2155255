"""One look for every figure: sizes, colours, fonts, and how a figure shows itself in a notebook.

Colours are those of Okabe and Ito (jfly.uni-koeln.de/color), told apart under every common colour blindness.
A figure keeps an opaque white ground, so that it reads the same in a dark JupyterLab, on GitHub and on paper.
Figures are made without pyplot: no global state, nothing to close. Knows nothing about experiments.
"""

import base64
import io
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from seal_nb.errors import SettingsError

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
INK, GREY, LIGHT, PALE = "#222222", "#767676", "#B5B5B5", "#D9D9D9"

WIDTH_IN = 6.4  # a text column of a notebook
DPI = 110
STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": DPI,
    "axes.facecolor": "white",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PURPLE, SKY, RED]),
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "image.cmap": "cividis",  # even in lightness, safe for colour-blind readers
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "seal-nb",  # the same figure gives the same file
}
UNDATED: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}

styled = mpl.rc_context(STYLE)  # a decorator: the function draws in this style, and global settings stay as they are


class Chart(Figure):
    """A matplotlib Figure with its content in words (`alt`), which notebooks show as alternative text."""

    alt: str = ""

    def save(self, path: str | Path, formats: str = "png") -> list[Path]:
        """Writes a file for each format of a comma list of png, svg and pdf (the last two for papers). ``path`` has no
        ending; folders are made. Raises: SettingsError for another format."""
        files = [Path(f"{path}.{ending.strip()}") for ending in formats.split(",")]
        for file in files:
            drawn = self.drawn(file.suffix[1:], dpi=2 * DPI)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(drawn)
        return files

    @styled
    def drawn(self, ending: str = "png", *, dpi: int = DPI) -> bytes:
        """The content of a file without date or program name, so that equal figures are equal files."""
        if ending not in UNDATED:
            raise SettingsError(f"figure format is {ending!r}; known are {', '.join(UNDATED)}")
        buffer = io.BytesIO()
        self.savefig(buffer, format=ending, dpi=dpi, facecolor="white", metadata=UNDATED[ending])
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        image = base64.b64encode(self.drawn()).decode("ascii")
        return {"image/png": image, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}

    def finished(
        self,
        alt: str,
        place: Literal["outside upper left", "outside right center"] = "outside upper left",
        columns: int = 4,
    ) -> "Chart":
        """The chart with its alternative text, and with a legend outside the axes, so that it covers no data."""
        self.alt = alt
        if self.axes[0].get_legend_handles_labels()[0]:
            self.legend(loc=place, ncols=columns, handletextpad=0.4, columnspacing=1.4)
        return self


def new_chart(height_in: float, width_in: float = WIDTH_IN) -> tuple[Chart, Axes]:
    """An empty chart with one pair of axes; call inside a `styled` function."""
    chart = Chart(figsize=(width_in, height_in))
    return chart, chart.add_subplot()

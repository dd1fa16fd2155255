"""One look for every figure: sizes, colours, fonts, and how a figure shows itself in a notebook.

Colours are those of Okabe and Ito (jfly.uni-koeln.de/color), told apart under every common colour blindness.
A figure keeps an opaque white ground, so that it reads the same in a dark JupyterLab, on GitHub and on paper.
Figures are made without pyplot: no global state, nothing to close. Knows nothing about experiments.
"""

import base64
import io
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from seal_nb.errors import SettingsError

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
INK, GREY, LIGHT, PALE = "#222222", "#767676", "#B5B5B5", "#D9D9D9"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
HEAT_MAP = "cividis"  # even in lightness, safe for colour-blind readers

WIDTH_IN = 6.4  # a text column of a notebook
DPI = 110
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "white",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=CYCLE),
    "axes.axisbelow": True,
    "font.size": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "text.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "seal-nb",  # the same figure gives the same file
}

P = ParamSpec("P")


class Chart(Figure):
    """A matplotlib Figure with its content in words (`alt`), which notebooks show as alternative text."""

    alt: str = ""

    def save(self, path: str | Path, formats: str = "png") -> list[Path]:
        """Write the figure as files.

        Args:
            path: without ending; folders are made.
            formats: comma list of png, svg, pdf.

        Returns:
            The files. Raises SettingsError for another format.
        """
        return [save_figure(self, Path(f"{path}.{ending.strip()}")) for ending in formats.split(",")]

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        image = base64.b64encode(png_bytes(self)).decode("ascii")
        return {"image/png": image, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def styled(draw: Callable[P, Chart]) -> Callable[P, Chart]:
    """Runs a drawing function under the style without touching matplotlib's global settings."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Chart:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_chart(height_in: float, width_in: float = WIDTH_IN) -> tuple[Chart, Axes]:
    """An empty chart with one pair of axes; call inside a `styled` function."""
    chart = Chart(figsize=(width_in, height_in), dpi=DPI)
    return chart, chart.add_subplot()


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG without date or program name, so that equal figures are equal files."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format of the path's ending: .png, .svg or .pdf (the last two for papers).

    Raises: SettingsError for any other ending.
    """
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {"Software": None}}
    if path.suffix not in undated:
        known = ", ".join(ending[1:] for ending in undated)
        raise SettingsError(f"figure format is {path.suffix[1:]!r}; known are {known}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=2 * DPI, facecolor="white", metadata=undated[path.suffix])
    return path


def percent_ticks() -> FuncFormatter:
    """Fractions as percentages, with as many digits as the tick has: rounded ones would stand twice."""
    return FuncFormatter(lambda share, _: f"{100 * share:.4g}%")

"""A loss curve the size of a word, as SVG: for a line of status that is redrawn while an adapter trains."""

from collections.abc import Sequence

WIDTH, HEIGHT, EDGE = 120, 26, 3  # pixels


def sparkline(values: Sequence[float]) -> str:
    """An inline SVG in the colour of the text around it; its numbers are its label."""
    if not values:
        return ""
    most = max([*values, 1e-9])
    step = (WIDTH - 2 * EDGE) / max(len(values) - 1, 1)
    points = [
        (EDGE + at * step, HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * value / most)
        for at, value in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    label = "loss by epoch: " + ", ".join(f"{value:.2f}" for value in values)
    x, y = points[-1]
    return (
        f'<svg role="img" aria-label="{label}" width="{WIDTH}" height="{HEIGHT}" '
        'style="vertical-align:middle">'
        f"<title>{label}</title>"
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="currentColor"/></svg>'
    )

"""The figure and the table of a server over time carry its samples; live in place, headless in lines."""

from typing import Any

import pytest

from seal_nb.views import live
from seal_nb.views.live import ServerView, server_frame
from seal_nb.views.plots import Chart, plot_server_activity
from tests.server.test_watch import sample

Shown = tuple[str, Any]  # how, and what
SAMPLES = [
    sample(0.0, slots=4, queued=0, workers=1, memory_bytes=2**20),
    sample(1.0, slots=4, queued=7, slots_in_use=4, jobs_per_min=3.0, workers=1, memory_bytes=3 * 2**20),
    sample(2.5, slots=4, queued=2, slots_in_use=3, jobs_per_min=9.5, workers=1, memory_bytes=2 * 2**20),
]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """What was displayed and updated; there is no front end here that could show it."""
    told: list[Shown] = []

    class Handle:
        def update(self, what: Any, raw: bool = False) -> None:
            told.append(("updated", what))

    def display(what: Any, display_id: bool = False, raw: bool = False) -> Handle | None:
        told.append(("displayed", what))
        return Handle() if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    return told


def test_figure_carries_queue_slots_and_rate_over_time() -> None:
    chart = plot_server_activity(SAMPLES)
    drawn = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in chart.axes
        for line in axes.get_lines()
    }
    seconds = [0.0, 1.0, 2.5]
    assert drawn == {
        "slots": (seconds, [4, 4, 4]),
        "slots in use": (seconds, [0, 4, 3]),
        "requests waiting": (seconds, [0, 7, 2]),
        "jobs per minute": (seconds, [0, 3.0, 9.5]),
    }
    assert "n = 3 samples" in chart.axes[1].get_xlabel()
    assert "at most 7 requests waiting, 4 of 4 slots in use, 9.5 jobs per minute" in chart.alt


def test_table_has_the_newest_state_and_the_most_there_was() -> None:
    cells = {row[0]: row[1:] for row in server_frame(SAMPLES).to_numpy().tolist()}
    assert cells["requests waiting"] == ["2", "7"]
    assert cells["memory, front end and workers (MiB)"] == ["2", "3"]
    assert {"failed", "workers", "trained tokens per second", "slots in use"} <= set(cells)


def test_headless_are_lines_now_and_then_and_table_and_figure_at_the_end(
    shown: list[Shown], capsys: pytest.CaptureFixture[str]
) -> None:
    view = ServerView()
    for _ in range(5):
        view.show(SAMPLES)
    assert shown == []
    view.close(SAMPLES)
    (line,) = capsys.readouterr().out.splitlines()  # the next one is due after some seconds
    assert "2 waiting, 3/4 slots, 9.5 jobs/min" in line
    assert [(how, type(what)) for how, what in shown] == [("displayed", dict), ("displayed", Chart)]


def test_live_there_is_one_display_that_is_updated(
    shown: list[Shown], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "has_live_frontend", lambda: True)
    view = ServerView()
    view.show(SAMPLES)
    view.show(SAMPLES)
    view.close(SAMPLES)
    assert [how for how, _ in shown] == ["displayed", "updated", "updated", "displayed"]
    assert "image/png" in shown[1][1]["text/html"] and "requests waiting" in shown[1][1]["text/html"]
    assert [type(what) for _, what in shown[2:]] == [dict, Chart] and capsys.readouterr().out == ""


def test_a_server_that_was_never_seen_leaves_nothing_to_show(shown: list[Shown]) -> None:
    ServerView().close([])
    assert shown == []

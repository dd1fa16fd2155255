"""Displays that change while a notebook runs, and what a notebook shows of an error."""

import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from tqdm.std import tqdm

from seal_nb.errors import DataError, SettingsError
from seal_nb.views import live, tables
from seal_nb.views.live import NOT_YET, Progress, Summary
from seal_nb.views.tables import as_html, mime_bundle, show

FRAME = pd.DataFrame({"arm": ["b", "a"], "gain": [0.1, None]})


def executed(*sources: str) -> nbformat.NotebookNode:
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    return notebook


def test_a_table_of_a_headless_run_has_no_script() -> None:
    assert "<script" not in mime_bundle(FRAME)["text/html"]


def test_a_table_in_jupyterlab_sorts_and_has_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "has_live_frontend", lambda: True)
    bundle = mime_bundle(FRAME)
    assert as_html(FRAME) in bundle["text/html"] and "<script>" in bundle["text/html"]
    assert "<script" not in mime_bundle(FRAME.head(1))["text/html"], "nothing to sort"


def test_a_frame_is_shown_as_html_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append((data, raw)))
    show(FRAME, "arms")
    assert shown == [(mime_bundle(FRAME, "arms"), True)] and shown[0][0]["text/plain"].startswith("arms\narm")


def test_progress_of_a_headless_run_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("passages")
    for done in range(1, 31):
        progress.at(done, 30)
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"passages: {done} of 30" for done in range(3, 31, 3)] and said.err == ""


def test_progress_in_jupyterlab_is_one_bar_per_count(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tqdm] = []

    def bar(**settings: Any) -> tqdm:
        bars.append(tqdm(**settings, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(live, "has_live_frontend", lambda: True)
    monkeypatch.setattr(live, "tqdm", bar)
    progress = Progress("inner loops")
    for done in (1, 2):
        progress.at(done, 2)
    Progress("passages").at(1, 3)
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [("inner loops", 2, 2), ("passages", 1, 3)]


def test_a_summary_at_the_top_is_filled_in_by_a_later_cell_headless_too() -> None:
    notebook = executed(
        "from seal_nb.views.live import Summary\nsummary = Summary('gain', 'n')\nsummary",
        "summary.fill({'gain': '+12 %', 'new': 'yes'})",
    )
    (output,) = notebook.cells[0].outputs
    assert re.split(r"\s{2,}|\n", output["data"]["text/plain"]) == [
        "at a glance", "gain", "+12 %", "n", NOT_YET, "new", "yes",
    ]  # fmt: skip
    assert notebook.cells[1].outputs == []


def test_a_summary_that_was_never_shown_can_be_filled() -> None:
    summary = Summary("gain")
    summary.fill({"gain": "1"})
    assert summary.values == {"gain": "1"}


def test_an_error_of_ours_is_its_message_and_the_way_to_it_without_a_wall() -> None:
    notebook = executed(
        "from seal_nb.passages import load_passages",
        "def mine():\n    return load_passages('missing.json')\n\nmine()",
        "1 + 1",
    )
    (output,) = notebook.cells[1].outputs
    said = output["traceback"][0].splitlines() if len(output["traceback"]) == 1 else output["traceback"]
    assert (output["output_type"], output["ename"]) == ("error", "DataError")
    assert said[0] == "DataError: missing.json: no such file; check the path"
    assert "  cell, line 4: mine()" in said and "  cell, line 2: return load_passages('missing.json')" in said
    assert any(re.fullmatch(r"  seal_nb/passages\.py:\d+ in load_passages", line) for line in said)
    assert len(said) < 10 and not any(str(Path.cwd()) in line for line in said)


def test_an_error_of_ours_still_ends_a_headless_run() -> None:
    notebook = new_notebook(
        cells=[new_code_cell("from seal_nb.passages import load_passages\nload_passages('shipped:no')")]
    )
    with pytest.raises(CellExecutionError) as caught:
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert caught.value.ename == "DataError" and "shipped are train, val" in caught.value.evalue


def test_an_error_that_was_never_raised_can_be_shown() -> None:
    for error in (SettingsError("x is 1; take 2"), DataError("broken", remedy="mend it")):
        assert error._render_traceback_()[0] == f"{type(error).__name__}: {error}"

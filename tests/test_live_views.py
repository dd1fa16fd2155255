"""Displays that change where somebody looks on, and what a notebook shows of an error."""

import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from seal_nb.errors import DataError, SettingsError
from seal_nb.views import tables
from seal_nb.views.live import NOT_YET, Glance, Teller, right_of
from seal_nb.views.tables import Table

TABLE = Table(rows=[{"arm": "b", "gain": 0.1}, {"arm": "a", "gain": None}], columns={"arm": "", "gain": "+.0%"})


def executed(*sources: str) -> nbformat.NotebookNode:
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    return notebook


def test_a_table_made_headless_has_no_script() -> None:
    bundle = TABLE._repr_mimebundle_()
    assert bundle == {"text/html": TABLE._repr_html_(), "text/plain": repr(TABLE)}
    assert "<script" not in bundle["text/html"]


def test_a_table_that_somebody_looks_at_sorts_and_has_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "somebody_looks_on", lambda: True)
    bundle = TABLE._repr_mimebundle_()
    assert TABLE._repr_html_() in bundle["text/html"] and "<script>" in bundle["text/html"]
    one_row = Table(rows=[{"arm": "b"}], columns={"arm": ""})
    assert "<script" not in one_row._repr_mimebundle_()["text/html"], "nothing to sort"


def test_headless_progress_is_one_line_each() -> None:
    stream = io.StringIO()
    tell = Teller(stream=stream)
    tell("inner loops: 1 of 2")
    tell("inner loops: 2 of 2")
    assert stream.getvalue() == "inner loops: 1 of 2\ninner loops: 2 of 2\n"


def test_live_progress_is_one_display_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []

    class Handle:
        def update(self, page: Any) -> None:
            shown.append(("updated", page.data))

    def display(page: Any, display_id: bool) -> Handle:
        shown.append(("displayed", page.data))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    tell = Teller(live=True)
    tell("inner loops: 1 of 2")
    tell("<done>")
    assert [how for how, _ in shown] == ["displayed", "updated"]
    assert 'value="1" max="2"' in shown[0][1] and re.search(r"&lt;done&gt;, \d+ s<", shown[1][1])


def test_a_glance_at_the_top_is_filled_in_by_a_later_cell_headless_too() -> None:
    notebook = executed(
        "from seal_nb.views.live import Glance\nglance = Glance('gain', 'n')\nglance",
        "glance.fill({'gain': '+12 %', 'new': 'yes'})",
    )
    (output,) = notebook.cells[0].outputs
    assert re.split(r"\s{2,}|\n", output["data"]["text/plain"]) == [
        "at a glance", "gain", "+12 %", "n", NOT_YET, "new", "yes",
    ]  # fmt: skip
    assert notebook.cells[1].outputs == []


def test_a_glance_that_was_never_shown_can_be_filled() -> None:
    glance = Glance("gain")
    glance.fill({"gain": "1"})
    assert glance.values == {"gain": "1"}


def test_ungraded_answers_are_neither_right_nor_counted() -> None:
    assert (right_of([True, None, False]), right_of([None]), right_of([])) == ("1 of 2", "0 of 0", "0 of 0")


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

"""The public API: small, lazy, without torch; and the page that explains it, run as it is written."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import seal_nb as seal

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"


def test_the_names_are_few_and_all_there() -> None:
    assert 8 <= len(seal.__all__) <= 40
    assert all(getattr(seal, name) is not None for name in seal.__all__)
    with pytest.raises(AttributeError, match="No seal_nb attribute evaluat"):
        seal.evaluat  # noqa: B018


def test_using_every_name_does_not_import_torch() -> None:
    code = "import sys, seal_nb as s; [getattr(s, n) for n in s.__all__]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in seal.__all__ if inspect.isfunction(getattr(seal, name))])
def test_every_public_function_documents_each_of_its_arguments(name: str) -> None:
    function = getattr(seal, name)
    text = inspect.getdoc(function) or ""
    parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "settings")]
    if len(parameters) > 1:
        missing = [p for p in parameters if not re.search(rf"^\s*{p}:", text, re.MULTILINE)]
        assert missing == []


def test_the_page_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(cells) >= 7
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    monkeypatch.setenv("SEAL_RUNS", str(tmp_path / "runs"))
    done = NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    shown = "".join(str(output) for cell in done.cells for output in cell.get("outputs", []))
    assert "hand-written" in shown and "image/png" in shown
    assert (tmp_path / "runs" / "mine" / "accuracy.png").stat().st_size > 1000

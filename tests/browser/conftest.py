"""One chromium, one JupyterLab and one TTT server with the small model for all browser tests.

JupyterLab has copies of the notebooks without outputs. The inspector's copy asks that server and trains little.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Browser, Page, sync_playwright

from seal_nb.server.client import TTTServer
from tests.browser.lab import ROOT, Lab, jupyter_lab

INSPECTOR = {"finetune_epochs": 1, "max_new_tokens": 12}
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium_path() -> str:
    """Debian's chromium. In continuous integration the tests fail without it: .ci/browser.sh installs it."""
    found = shutil.which("chromium")
    if found is None:
        missing = "no chromium; on Debian: sudo .ci/browser.sh"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = chromium_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def ttt_server(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[TTTServer]:
    """With the small model. It starts after the browser, without which the tests are skipped."""
    with TTTServer(run_dir=tmp_path_factory.mktemp("ttt") / "run", n_workers=1, n_threads=1) as server:
        yield server


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, ttt_server: TTTServer) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    notebooks = folder / "checkout" / "notebooks"
    notebooks.mkdir(parents=True)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        values = {**INSPECTOR, "endpoint": ttt_server.endpoint} if notebook.stem == "07_passage_inspector" else {}
        nbformat.write(_without_outputs(notebook, values), notebooks / notebook.name)
    with jupyter_lab(folder / "jupyter", notebooks.parent) as lab:
        yield lab


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    yield from new_page(browser)


def new_page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    page = context.new_page()
    yield page
    context.close()


def _without_outputs(notebook: Path, values: dict[str, Any]) -> nbformat.NotebookNode:
    copy = parameterize_notebook(load_notebook_node(str(notebook)), values)
    for cell in copy.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    copy.metadata.pop("papermill", None)
    return copy

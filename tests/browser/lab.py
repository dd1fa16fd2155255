"""A JupyterLab for the tests, and a notebook that is open in it.

The server keeps settings, workspaces and history in a folder of the test and listens on loopback with a random token.
Cells are read from JupyterLab's own model, so that cells outside the window count too.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 90
RUN_MS = 300_000
CELLS = """() => {
  const model = window.jupyterapp.shell.currentWidget.content.model;
  return JSON.stringify(model.sharedModel.toJSON().cells);
}"""
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)"


@dataclass(frozen=True)
class Lab:
    url: str
    token: str

    def address(self, notebook: str) -> str:
        return f"{self.url}/lab/tree/notebooks/{notebook}?token={self.token}&reset"


@contextmanager
def jupyter_lab(folder: Path, checkout: Path) -> Iterator[Lab]:
    """JupyterLab on ``checkout``, which contains notebooks/. Its own files go to ``folder``."""
    port, token = _free_port(), secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={checkout}",
        "--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR",
              "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")  # fmt: skip
    own = {name: str(folder / name.lower()) for name in places}
    environment = {**os.environ, **own, "JUPYTER_CONFIG_PATH": str(ROOT / "lab"), "PYTHONPATH": str(ROOT)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lab.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=checkout)
    try:
        lab = Lab(url=f"http://127.0.0.1:{port}", token=token)
        _wait_for(lab, process, folder / "lab.log")
        yield lab
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class OpenNotebook:
    """One notebook in one tab."""

    def __init__(self, page: Page, lab: Lab, name: str) -> None:
        self.page = page
        page.goto(lab.address(name))
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget", timeout=60_000)
        page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=90_000,
        )

    def run_all(self) -> None:
        """Run every cell, as the menu does. Returns when the last one is done."""
        self.page.set_default_timeout(RUN_MS)
        self.page.evaluate(RUN_ALL)

    def cells(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.page.evaluate(CELLS))
        return found

    def errors(self) -> list[str]:
        return [
            f"{cell.get('id')}: {output['ename']}: {output['evalue']}"
            for cell in self.cells()
            for output in cell.get("outputs", [])
            if output["output_type"] == "error"
        ]

    def theme(self, name: str) -> None:
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme}).then(() => true)", name
        )
        self.page.wait_for_timeout(800)

    def close(self) -> None:
        """End the kernel, so that the next notebook has the cores."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown().then(() => true)")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(lab: Lab, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{lab.url}/api?token={lab.token}", timeout=2):
                return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)

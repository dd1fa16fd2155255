"""Notebook 02 as the stage it is in a chain, and in front of somebody: up until a client ends it."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from seal_nb.notebook_runner import default_notebooks_dir
from seal_nb.protocol import TTTRequest
from seal_nb.server.client import TTTClient, TTTServer
from tests.server.conftest import eventually
from tests.test_notebooks import run, shown
from tests.ttt.tiny import save_tiny_model


class SomebodyLooksOn(NotebookClient):
    """Runs cells as JupyterLab does: the kernel may ask its user, and displays are updated in place."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.on_notebook_start = lambda **_: setattr(self.kc, "allow_stdin", True)
        self.updates: list[str] = []

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "update_display_data":
            page = msg["content"]["data"]["text/html"]
            if "at a glance" not in page:
                self.updates.append(page)
        return super().process_message(msg, cell, cell_index)


def use_and_shut_down(endpoint_file: Path) -> int:
    """The number of training steps that the server did; it is ended whatever happens."""
    with TTTClient(endpoint_file, timeout_s=60, wait_s=120) as client:
        try:
            request = TTTRequest(train_sequences=["Zor is a moon."], finetune_epochs=2, lora_rank=1)
            return client.evaluate(request).train_steps
        finally:
            client.shutdown()


def served(executed: dict[str, Any]) -> list[dict[str, Any]]:
    """Outputs of the cell that serves."""
    (cell,) = [cell for cell in executed["cells"] if cell["id"] == "serve"]
    return list(cell["outputs"])


def test_it_serves_until_shutdown_and_leaves_lines_a_table_and_a_figure(tmp_path: Path) -> None:
    model, endpoint_file = save_tiny_model(tmp_path / "model"), tmp_path / "chain" / "endpoint.json"
    with ThreadPoolExecutor(1) as pool:
        user = pool.submit(use_and_shut_down, endpoint_file)
        out = run("02_ttt_server", tmp_path / "out", model=str(model), endpoint_file=str(endpoint_file))
    assert user.result() == 2
    executed = out / "02_ttt_server.ipynb"
    said = shown(executed, "serve")
    assert " waiting, " in said and " jobs/min" in said  # a line
    assert "requests waiting" in said and "A server over " in said  # the table, the figure in words
    kinds = [kind for output in served(json.loads(executed.read_text())) for kind in output.get("data", {})]
    assert kinds.count("image/png") == kinds.count("text/html") == 1
    assert not endpoint_file.exists()


def test_before_somebody_who_looks_on_one_display_is_redrawn_and_its_static_twin_stays(tmp_path: Path) -> None:
    endpoint_file = tmp_path / "out" / "endpoint.json"
    values = {
        "model": str(save_tiny_model(tmp_path / "model")),
        "output_dir": str(tmp_path / "out"),
        "endpoint_file": str(endpoint_file),
    }
    notebook = load_notebook_node(str(default_notebooks_dir() / "02_ttt_server.ipynb"))
    jupyter = SomebodyLooksOn(parameterize_notebook(notebook, values), kernel_name="python3", timeout=300)

    def end_it_when_it_was_redrawn() -> None:
        with TTTClient(endpoint_file, wait_s=200) as client:
            eventually(lambda: len(jupyter.updates) >= 2, 200.0)
            client.shutdown()

    with ThreadPoolExecutor(1) as pool:
        user = pool.submit(end_it_when_it_was_redrawn)
        executed = jupyter.execute()
        user.result()
    live, figure = served(executed)  # no lines: nothing but the two
    assert all("requests waiting" in page for page in jupyter.updates)
    assert 'src="data:image/png;base64,' in jupyter.updates[0]
    assert "<img" not in live["data"]["text/html"]  # at the end the table alone, the figure beneath it
    assert "A server over " in figure["data"]["text/plain"] and "image/png" in figure["data"]
    assert not endpoint_file.exists()


def test_attached_to_a_server_that_is_not_there_it_waits_as_long_as_it_is_told(tmp_path: Path) -> None:
    endpoint_file = tmp_path / "elsewhere" / "endpoint.json"
    model = str(save_tiny_model(tmp_path / "model"))
    with ThreadPoolExecutor(1) as pool:
        attached = pool.submit(
            run, "02_ttt_server", tmp_path / "out",
            attach_to=str(endpoint_file), wait_s=60.0, serve_s=0.5, model="unused",
        )  # fmt: skip
        eventually(lambda: (tmp_path / "out").exists(), 60.0)
        with TTTServer(run_dir=endpoint_file.parent, model=model, n_workers=1):
            executed = attached.result() / "02_ttt_server.ipynb"
    assert "requests waiting" in shown(executed, "serve")
    assert not (tmp_path / "out" / "server.log").exists()

"""Notebook 02 as the stage it is in a chain: up until a client ends it, and then it shows what it saw."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seal_nb.protocol import TTTRequest
from seal_nb.service.client import TTTClient
from tests.service.conftest import eventually
from tests.test_notebooks import run, shown
from tests.ttt.tiny import save_tiny_model


def use_and_shut_down(endpoint_file: Path) -> int:
    """The number of training steps that the server did; it is ended whatever happens."""
    eventually(endpoint_file.exists, 60.0)
    with TTTClient(endpoint_file, timeout_s=60) as client:
        try:
            request = TTTRequest(train_sequences=["Zor is a moon."], finetune_epochs=2, lora_rank=1)
            return client.evaluate(request).train_steps
        finally:
            client.shutdown()


def test_it_serves_until_shutdown_and_leaves_lines_a_table_and_a_figure(tmp_path: Path) -> None:
    model, endpoint_file = save_tiny_model(tmp_path / "model"), tmp_path / "chain" / "endpoint.json"
    endpoint_file.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        user = pool.submit(use_and_shut_down, endpoint_file)
        out = run("02_ttt_server", tmp_path / "out", model=str(model), endpoint_file=str(endpoint_file))
    assert user.result() == 2
    executed = out / "02_ttt_server.ipynb"
    said = shown(executed, "serve")
    assert " waiting, " in said and " jobs/min" in said  # a line
    assert "requests waiting" in said and "A server over " in said  # the table, the figure in words
    (cell,) = [cell for cell in json.loads(executed.read_text())["cells"] if cell["id"] == "serve"]
    kinds = [kind for output in cell["outputs"] for kind in output.get("data", {})]
    assert kinds.count("image/png") == kinds.count("text/html") == 1
    assert not endpoint_file.exists()

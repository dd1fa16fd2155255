"""A mistake in a notebook's parameters shows one sentence with its remedy, not a long traceback.

Each notebook has one kernel; each case runs the cells from the top until one fails. No case waits for a model: a
notebook's own server starts only when nothing is wrong. Cases with GRADES_BY_RECALL ask a server with another grader.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from seal_nb.notebook_runner import default_notebooks_dir
from seal_nb.server.client import TTTClient, TTTServer
from tests.server.conftest import HASTE, STUB

LONGEST = 20  # lines of an error
NOWHERE = {"endpoint": "tcp://127.0.0.1:9", "wait_s": 0.3}
NO_FILE = {"endpoint": "nowhere/endpoint.json", "wait_s": 0.3}
GRADES_BY_RECALL = "an endpoint of a server that grades by recall"
OTHER_GRADER = "grades by 'recall'; give grader 'recall', or start a server"
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("00_tour", {"dataset": "missing.json"}, "missing.json: no such file; check the path"),
    ("00_tour", {"passage": 99}, "passage is 99; the dataset has 12, counted from 0"),
    ("00_tour", {"lora_rank": 0}, "lora_rank=0: must be at least 1"),
    ("00_tour", NOWHERE, "start it (seal-nb serve), or raise wait_s"),
    ("01_create_self_edits", {"dataset": "missing.json"}, "check the path"),
    ("01_create_self_edits", {"prompt_key": "poem"}, "known are"),
    ("01_create_self_edits", {"temperature": -1.0}, "temperature"),
    ("01_create_self_edits", {"engine": "steam"}, "steam"),
    ("02_ttt_server", {"attach_to": "nowhere/endpoint.json", "wait_s": 0.3}, "start it (seal-nb serve)"),
    ("02_ttt_server", {"n_workers": -1}, "n_workers"),
    ("02_ttt_server", {"grader": "guess"}, "guess"),
    ("03_query_server", {"dataset": "missing.json"}, "check the path"),
    ("03_query_server", {"arms": "magic"}, "magic"),
    ("03_query_server", {"arms": "self_edits"}, "run 01_create_self_edits"),
    ("03_query_server", {"finetune_epochs": 0}, "finetune_epochs=0: must be at least 1"),
    ("03_query_server", {"max_new_tokens": 9000}, "field 'max_new_tokens' is 9000"),
    ("03_query_server", NO_FILE, "start it (seal-nb serve)"),
    ("03_query_server", {"arms": "in_context", "endpoint": GRADES_BY_RECALL}, OTHER_GRADER),
    ("04_cpt", {"dataset": "missing.json"}, "check the path"),
    ("04_cpt", {"arms": "magic"}, "magic"),
    ("04_cpt", {"arms": "self_edits"}, "run 01_create_self_edits"),
    ("04_cpt", {"method": "full", "n_processes": 2}, "is 1, which 2 processes cannot share"),
    ("04_cpt", NOWHERE, "start it (seal-nb serve)"),
    ("04_cpt", {"grader": "local", "endpoint": GRADES_BY_RECALL}, OTHER_GRADER),
    ("05_rest_em_round", {"run_json": "missing.json"}, "check the path"),
    ("05_rest_em_round", {"tie_break": "dice"}, "dice"),
    ("05_rest_em_round", {"k_best": 0}, "k_best"),
    ("06_continual_self_edits", {"dataset": "missing.json"}, "check the path"),
    ("06_continual_self_edits", {"strategies": "magic"}, "magic"),
    ("06_continual_self_edits", {"n_datapoints": 500}, "500"),
    ("06_continual_self_edits", {"seed": -1}, "seed=-1: must be at least 0"),
    ("06_continual_self_edits", {"arm": "self_edits", "prompt_key": "poem"}, "known are"),
    ("06_continual_self_edits", {"arm": "self_edits", "temperature": -1.0}, "field 'temperature' is -1"),
    ("06_continual_self_edits", NOWHERE, "start it (seal-nb serve)"),
    ("06_continual_self_edits", {"grader": "judge", "endpoint": GRADES_BY_RECALL}, OTHER_GRADER),
    ("07_passage_inspector", {"run_json": "missing.json"}, "check the path"),
    ("07_passage_inspector", {"show": "everything"}, "known are all, gains"),
    ("07_passage_inspector", {"passage": 99}, "passage is 99; the run has 4, counted from 0"),
    ("07_passage_inspector", {"graders": ["guess"]}, "guess"),
    ("07_passage_inspector", {"finetune_epochs": -1}, "finetune_epochs=-1: must be at least 1"),
    ("07_passage_inspector", NOWHERE, "start it (seal-nb serve)"),
    ("08_results", {"runs_dir": "nowhere"}, "no such folder"),
    ("08_results", {"grader_run": "missing.json", "runs_dir": "."}, "check the path"),
    ("08_results", {"figure_formats": "bmp", "runs_dir": "."}, "bmp"),
    ("09_sweep", {"dataset": "missing.json"}, "check the path"),
    ("09_sweep", {"grid": '{"colour": [1]}'}, "colour"),
    ("09_sweep", {"arm": "self_edits"}, "run 01_create_self_edits"),
    ("09_sweep", NO_FILE, "start it (seal-nb serve)"),
    ("09_sweep", {"grid": "{"}, "grid is no JSON"),
    ("09_sweep", {"grid": '{"lora_rank": [8, 1024]}'}, "field 'lora_rank' is 1024"),
    ("09_sweep", {"grader": "local", "endpoint": GRADES_BY_RECALL}, OTHER_GRADER),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Kernels"]:
    kernels = Kernels(tmp_path_factory.mktemp("errors"))
    yield kernels
    kernels.close()


class Kernels:
    """One at a time, since cases come notebook by notebook."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, ""
        self._context: Any = None

    def client(self, name: str) -> NotebookClient:
        if name != self.name:
            self.close()
            notebook = nbformat.v4.new_notebook()
            resources = {"metadata": {"path": str(self.folder)}}
            self._client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
            self._context = self._client.setup_kernel()
            self._context.__enter__()
            self.name = name
        return self._client

    def close(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)

    def first_error(self, name: str, values: dict[str, Any]) -> tuple[str, list[str]]:
        """The kind of the first error, and the lines of what is shown of it."""
        client = self.client(name)
        notebook = load_notebook_node(str(default_notebooks_dir() / f"{name}.ipynb"))
        client.nb = parameterize_notebook(notebook, values)
        for at, cell in enumerate(client.nb.cells):
            try:
                client.execute_cell(cell, at)
            except CellExecutionError as error:
                shown = cell.outputs[-1]
                return error.ename, "\n".join(shown["traceback"]).splitlines()
        return "", []


@pytest.fixture(scope="module")
def recall_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The model id of a server names its grader."""
    folder, model = tmp_path_factory.mktemp("recall"), "stub-float32-recall-2048"
    with TTTServer(run_dir=folder, inner_loop=STUB, model=model, n_workers=1, **HASTE) as server:
        yield server.endpoint


@pytest.mark.parametrize(
    ("name", "values", "remedy"), CASES, ids=[f"{name[:2]}-{next(iter(values))}" for name, values, _ in CASES]
)
def test_a_mistake_is_a_sentence_with_its_remedy(
    kernels: Kernels, request: pytest.FixtureRequest, name: str, values: dict[str, Any], remedy: str
) -> None:
    if asks_a_server := values.get("endpoint") == GRADES_BY_RECALL:
        # The case before holds the journal in the notebook's own folder.
        values = {**values, "endpoint": request.getfixturevalue("recall_endpoint"), "output_dir": "other"}
    kind, lines = kernels.first_error(name, values)
    assert kind in ("DataError", "SettingsError", "GradingError", "RoundTimeout", "ServerFailed"), lines
    assert lines[0].startswith(f"{kind}: ") and re.search(re.escape(remedy), lines[0]), lines[0]
    assert len(lines) <= LONGEST, lines
    assert not list(kernels.folder.rglob("server.log")), "a server was started"
    if asks_a_server:
        with TTTClient(values["endpoint"]) as client:
            assert client.status().counts.get("answered", 0) == 0

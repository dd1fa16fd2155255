"""The outputs of the committed notebooks: no path or address of a machine, no secret, no widget state, alt texts."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from papermill.cli import papermill

from seal_nb.notebook_runner import declared_parameters

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
LARGEST_OUTPUT_BYTES = 200_000
OF_A_MACHINE = {
    "path": re.compile(r"(?<![\w.:/])/(?:tmp|home|root|work|usr|var|opt|Users|mnt)/\w"),
    "address": re.compile(r"(?:tcp|http|https|ipc)://(?:127\.0\.0\.1|localhost|0\.0\.0\.0|\d+\.\d+\.\d+\.\d+)"),
    "date": re.compile(r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d"),
    "token": re.compile(r"(?i)\b(?:token|api[_-]?key|secret|password)\b\s*[=:]\s*\S{8,}"),
    "key": re.compile(r"\b(?:sk|hf|ghp)[-_][A-Za-z0-9]{16,}"),
    "process": re.compile(r"\bpid\b\D{0,3}\d{2,}|\bprocess \d{2,}"),
}


def outputs(notebook: Path) -> list[tuple[str, dict[str, Any]]]:
    cells = json.loads(notebook.read_text())["cells"]
    return [(cell["id"], output) for cell in cells for output in cell.get("outputs", [])]


def words(output: dict[str, Any]) -> str:
    """All text of an output, without its pictures."""
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return json.dumps([output.get("text"), data, output.get("traceback"), output.get("metadata")])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_name_no_machine(notebook: Path) -> None:
    host = socket.gethostname()
    found = [
        f"{cell}: {what} {match.group()}"
        for cell, output in outputs(notebook)
        for what, pattern in OF_A_MACHINE.items()
        for match in pattern.finditer(words(output))
    ]
    assert found == []
    if len(host) > 5:
        assert [cell for cell, output in outputs(notebook) if host in words(output)] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_cell_prints_is_one_output(notebook: Path) -> None:
    printed = [(cell, output["name"]) for cell, output in outputs(notebook) if "name" in output]
    assert len(printed) == len(set(printed))


@pytest.mark.parametrize(
    "text", ["/home/someone/runs", "tcp://127.0.0.1:4711", "2026-11-24 05:34", "token=0123456789abcdef", "pid 4711"]
)
def test_the_patterns_match(text: str) -> None:
    assert any(pattern.search(json.dumps(["said", f"x {text}"])) for pattern in OF_A_MACHINE.values())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_small_static_outputs_without_errors(notebook: Path) -> None:
    kinds = {kind for _, output in outputs(notebook) for kind in output.get("data", {})}
    assert kinds, "committed with outputs, so that GitHub shows them"
    assert not {kind for kind in kinds if "widget" in kind or "javascript" in kind}
    assert "widgets" not in json.loads(notebook.read_text())["metadata"]
    assert [cell for cell, output in outputs(notebook) if output["output_type"] == "error"] == []
    assert [cell for cell, output in outputs(notebook) if "<script" in words(output)] == []
    sizes = {cell: len(json.dumps(output)) for cell, output in outputs(notebook)}
    assert {cell: size for cell, size in sizes.items() if size > LARGEST_OUTPUT_BYTES} == {}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_have_alt_texts(notebook: Path) -> None:
    for cell, output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            assert len(output["metadata"].get("image/png", {}).get("alt", "")) > 10, cell


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_s_help_names_every_parameter_with_type_default_and_meaning(notebook: Path) -> None:
    said = CliRunner().invoke(papermill, ["--help-notebook", str(notebook)])
    assert said.exit_code == 0, said.output
    flat = " ".join(said.output.split())
    for name, parameter in declared_parameters(notebook).items():
        assert f"{name}: {parameter.type_name} (default" in flat
        assert " ".join(parameter.help.split())[:30] in flat

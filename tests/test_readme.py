"""Every command of the README is true: it is run here, or it has a reason why not and its words are checked.

The commands of docs/*.md must have the form that the command line takes.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from seal_nb.cli import _parser
from seal_nb.notebook_runner import declared_parameters, default_notebooks_dir, find_notebook, parse_parameters
from seal_nb.passages import OUT_NAMES
from seal_nb.server.client import TTTClient
from tests.server.conftest import eventually

ROOT = Path(__file__).resolve().parent.parent
PORT = "127.0.0.1:5555"  # of the server that the README starts
NOT_RUN = {
    r"^make (lab|demo)": "JupyterLab stays open (tests/browser); the demo takes a quarter of an hour (tests/chain)",
    r"^make (check|test)": "this test is part of them",
    r"^seal-nb data": "needs the Hugging Face hub (tests/test_squad.py has a small copy of it)",
    r"Qwen2.5-7B|self_edits\.json|^seal-nb chain-status": "needs a GPU, or a cluster (tests/slurm)",
}


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"^```(?:console|sh)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|seal-nb|python|conda|pip) ", line)]


README = (ROOT / "README.md").read_text()
COMMANDS = commands_of(ROOT / "README.md")
IN_DOCS = [command for page in sorted((ROOT / "docs").glob("*.md")) for command in commands_of(page)]
STAGES = [line for line in [*COMMANDS, *IN_DOCS] if line.startswith("seal-nb run ")]


def is_run(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN)


def test_the_readme_has_commands_and_each_reason_fits_one() -> None:
    assert {"make demo", "make check", "make test"} <= set(COMMANDS)
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in COMMANDS)] == []
    assert len([line for line in COMMANDS if is_run(line)]) >= 7


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the server that the README starts, here on a free port and without a model. It stops at a client's request."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (serve,) = [line.replace(PORT, address) for line in COMMANDS if line.startswith("seal-nb serve ") and PORT in line]
    words = [*shlex.split(serve)[1:], "--inner-loop", "tests.server.stub_loop:load", "--run-dir", str(folder)]
    server = subprocess.Popen([sys.executable, "-m", "seal_nb.cli", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: (folder / "endpoint.json").exists(), 60.0)
        yield address
        with TTTClient(f"tcp://{address}") as client:
            client.shutdown()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


def test_commands_run_one_after_another_in_an_empty_folder(address: str, tmp_path: Path) -> None:
    """nbval executes the notebooks with the small model; here stages ask the server without a model."""
    for command in COMMANDS:
        if is_run(command) and not command.startswith("seal-nb serve"):
            runs_a_stage = command.startswith("seal-nb run") and " -p " in command and PORT not in command
            command += f" -p endpoint tcp://{address}" if runs_a_stage else ""
            call(command.replace(PORT, address), tmp_path)


def call(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SEAL_RUNS": str(folder / "runs")}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("command", sorted(set(STAGES)))
def test_stage_and_parameters_of_a_run_exist(command: str) -> None:
    words = shlex.split(command)
    pairs = [(words[at + 1], words[at + 2]) for at, word in enumerate(words) if word == "-p"]
    parse_parameters(pairs, declared_parameters(find_notebook(words[2], default_notebooks_dir())))


@pytest.mark.parametrize("command", sorted({line for line in [*COMMANDS, *IN_DOCS] if line.startswith("seal-nb")}))
def test_command_has_the_form_that_the_command_line_takes(command: str) -> None:
    words = shlex.split(command)[1:]
    arguments, rest = _parser(words[0]).parse_known_args(words)
    assert not rest or words[0] == "serve"
    assert arguments.command


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make")])
def test_make_target_exists(command: str) -> None:
    subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)


def test_squad_files_that_commands_read_are_the_ones_that_data_writes() -> None:
    fetched = [_parser().parse_args(shlex.split(line)[1:]) for line in COMMANDS if line.startswith("seal-nb data")]
    written = {str(one.out / OUT_NAMES[one.split]) for one in fetched}
    named = {word for line in COMMANDS for word in shlex.split(line) if "squad_" in word}
    assert named == written


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_file_that_the_readme_points_to_is_there(target: str) -> None:
    assert (ROOT / target).exists()

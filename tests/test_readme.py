"""The README's commands are true: all can be parsed, and those that need no GPU, hub or cluster are run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from seal_nb.cli import _parser
from seal_nb.notebook_runner import declared_parameters, default_notebooks_dir, find_notebook, parse_parameters
from tests.ttt.tiny import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
# Need a GPU or a hub, a server that stays, hours, or are this test run itself.
NOT_RUN = re.compile(r"^(make|conda|pip|git|cd|seal-nb (serve|status|submit|chain-status))\b|Qwen|127\.0\.0\.1")


def options_of(words: list[str]) -> list[tuple[str, str]]:
    return [(words[at + 1], words[at + 2]) for at, word in enumerate(words) if word == "-p"]


def test_readme_has_commands() -> None:
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("seal-nb run")])
def test_stage_and_parameters_of_a_run_exist(command: str) -> None:
    words = shlex.split(command)
    notebook = find_notebook(words[2], default_notebooks_dir())
    parse_parameters(options_of(words), declared_parameters(notebook))


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("seal-nb")])
def test_command_has_this_form(command: str) -> None:
    arguments, rest = _parser().parse_known_args(shlex.split(command)[1:])
    assert not rest or command.startswith(("seal-nb serve", "seal-nb submit"))
    assert arguments.command


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make")])
def test_make_target_is_there(command: str) -> None:
    subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)


def test_commands_that_need_nothing_run_one_after_another_in_an_empty_folder(tmp_path: Path) -> None:
    """Stages on a tiny model: what the small one makes of them is nbval's affair."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    tiny = save_tiny_model(tmp_path / "tiny")
    for command in COMMANDS:
        if not NOT_RUN.search(command):
            is_stage = command.startswith("seal-nb run") and "-p" in shlex.split(command)
            done = subprocess.run(
                f"{command} -p model {tiny}" if is_stage else command,
                shell=True,
                cwd=tmp_path,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_file_that_the_readme_points_to_is_there(target: str) -> None:
    assert (ROOT / target).exists()

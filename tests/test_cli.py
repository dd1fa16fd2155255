"""The console command as a user calls it: real processes, their exit codes and what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_notebooks import write_notebook


def seal_nb(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "seal_nb.cli", *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    write_notebook(
        folder, "01_count", 'output_dir: str = "runs/count"\nn: int = 2', "print('n is', n)", "1 / n"
    )
    return folder


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from seal_nb.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'papermill', 'zmq', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("run", "serve", "status", "summarize", "grade", "demo"):
        assert f"\n    {command} " in said
    assert said.splitlines()[-1] == "[]"


def test_run_puts_the_executed_notebook_into_the_run_folder_and_says_so(
    notebooks: Path, tmp_path: Path
) -> None:
    done = seal_nb("run", "01", "--notebooks", notebooks, "-p", "n", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "n is 5\nexecuted notebook: runs/count/01_count.ipynb\n"
    assert (tmp_path / "runs/count/01_count.ipynb").exists()


def test_output_option_decides_where_the_executed_notebook_goes(notebooks: Path, tmp_path: Path) -> None:
    done = seal_nb("run", "01", "--notebooks", notebooks, "--output", "x/job7.ipynb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x/job7.ipynb").exists()


def test_raising_cell_gives_exit_code_1_and_the_error_in_short(notebooks: Path, tmp_path: Path) -> None:
    done = seal_nb("run", "01", "--notebooks", notebooks, "-p", "n", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "runs/count/01_count.ipynb" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "02"], "no stage '02'; stages: 01_count"),
        (["run", "01", "-p", "m", "1"], "unknown parameter 'm'; parameters: output_dir, n"),
        (["run", "01", "-p", "n", "many"], "parameter 'n': 'many' is not int"),
    ],
)
def test_wrong_use_of_run_gives_one_line_and_exit_code_2(
    notebooks: Path, words: list[str], said: str
) -> None:
    done = seal_nb(*words, "--notebooks", notebooks)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_parameters_of_a_stage_can_be_listed(notebooks: Path) -> None:
    done = seal_nb("run", "01", "--notebooks", notebooks, "--parameters")
    assert done.stdout.splitlines() == ["output_dir: str = 'runs/count'", "n: int = 2"]

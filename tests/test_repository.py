"""Notebooks run by name, no file contains a path of a machine, and the targets of make work."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from seal_nb.chain.stages import RUN
from seal_nb.notebook_runner import declared_parameters, default_notebooks_dir, find_notebook, format_value
from tests.chain.test_tables import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    "00_tour",
    "01_create_self_edits",
    "02_ttt_server",
    "03_query_server",
    "04_cpt",
    "05_rest_em_round",
    "06_continual_self_edits",
    "07_passage_inspector",
    "08_results",
    "09_sweep",
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(?:work|root|farm|home(?!/someone)|Users)/[\w.-]+")
LARGEST_NOTEBOOK_BYTES = 1_500_000


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def cells_with_tag(notebook: Path, tag: str) -> list[dict[str, object]]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if tag in cell["metadata"].get("tags", [])]


def test_no_tracked_file_names_a_path_of_a_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked_files()
        if path != Path(__file__) and path.suffix not in (".png", ".gz")
        for match in MACHINE.finditer(path.read_text(errors="replace"))
    ]
    assert found == []


def test_every_test_that_the_page_on_security_names_is_there() -> None:
    page, tests = (ROOT / "docs" / "security.md").read_text(), ROOT / "tests"
    names = re.findall(r"def test_(\w+)", "\n".join(path.read_text() for path in tests.rglob("test_*.py")))
    begun = re.findall(r"`(\w+)…`", page)
    assert len(begun) > 20
    assert not [text for text in begun if not any(text in name for name in names)]
    files = {text.rpartition("/")[2] for text in re.findall(r"`((?:tests/[\w/]*)?test_\w+\.py)`", page)}
    assert files <= {path.name for path in tests.rglob("test_*.py")}


def test_each_stage_has_its_notebook() -> None:
    assert {path.stem for path in NOTEBOOKS} >= set(STAGES)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_one_parameters_cell_of_typed_literals_with_help(notebook: Path) -> None:
    (cell,) = cells_with_tag(notebook, "parameters")
    declared = declared_parameters(notebook)
    lines = [line for line in "".join(cell["source"]).splitlines() if re.match(r"\w+\s*[:=]", line)]
    assert [re.split(r"\W", line)[0] for line in lines] == list(declared), "papermill does not see every line"
    assert "output_dir" in declared
    assert [name for name, parameter in declared.items() if not parameter.help] == []
    for line in lines:
        assert re.match(r"\w+: (int|float|bool|str|list\[(int|float|str)\]) = ", line), line


# README.md and docs/deviations.md say that their comments need not name a value; the last two name it in other words.
NOT_NAMED = {"model", "dataset", "arms", "exp_name", "n_workers", "gradient_accumulation_steps", "seed"}


def test_comment_of_a_parameter_names_the_published_value_where_the_default_differs() -> None:
    published: dict[tuple[str, str, str], set[str]] = {}
    for stage in PUBLISHED:
        declared = declared_parameters(find_notebook(stage.notebook, default_notebooks_dir()))
        for name, value in stage.parameters.items():
            if name not in NOT_NAMED and RUN not in str(value) and value != declared[name].default:
                key = (stage.notebook, name, declared[name].help.lower())
                published.setdefault(key, set()).add(format_value(value).lower())
    assert len(published) > 10
    assert [key for key, values in published.items() if not any(value in key[2] for value in values)] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_the_kernel_python3_and_is_small(notebook: Path) -> None:
    metadata = json.loads(notebook.read_text())["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert "papermill" not in metadata
    assert cells_with_tag(notebook, "injected-parameters") == []
    assert notebook.stat().st_size < LARGEST_NOTEBOOK_BYTES


MAKE_TARGETS = (
    "demo", "check", "test", "lab", "kernel", "docs", "bench", "vllm-env", "cuda-check", "lint", "notebooks",
    "clean",
)  # fmt: skip


@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_make_target_exists(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_without_a_fitting_python_says_what_is_missing(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.2'\nexit 1\n")
    old.chmod(0o755)
    make = subprocess.run(["sh", "-c", "command -v make"], capture_output=True, text=True).stdout.strip()
    done = subprocess.run(
        [make, "demo", f"VENV={tmp_path}/venv"], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "no Python 3.11 or newer found; python3 is: Python 3.9.2" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("target", ["notebooks", "test"])
def test_make_removes_nothing_behind_a_link(tmp_path: Path, target: str) -> None:
    for folder in ("project/venv", "disk/notebooks", "disk/runs"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / "project")
    (tmp_path / "project/venv/.installed").touch()
    (tmp_path / "project/build").symlink_to("../disk")
    command = ["make", target, "VENV=venv"]
    done = subprocess.run(command, cwd=tmp_path / "project", capture_output=True, text=True)
    assert done.returncode and "build is a link" in done.stderr
    assert len(list((tmp_path / "disk").iterdir())) == 2


@pytest.mark.parametrize(("code", "cuda_code"), [(0, 0), (2, 0), (0, 3), (2, 3)])
def test_ci_passes_on_what_failed_and_ends_with_pytest_s_line(tmp_path: Path, code: int, cuda_code: int) -> None:
    fake = tmp_path / "bin" / "make"
    fake.parent.mkdir()
    closing = "=== 2 failed, 3 passed in 1.20s ==="
    fake.write_text(
        f"#!/bin/sh\necho \"make $* CI=$CI\"; echo '{closing}'; echo mypy: fine >&2\n"
        f"[ $1 = cuda-check ] && exit {cuda_code}\nexit {code}\n"
    )
    fake.chmod(0o755)
    for name in ("apt-get", "sudo", "chromium", "faketime", "ip", "sbatch", "slurmctld", "slurmd", "munged"):
        stand_in = fake.with_name(name)  # nothing is installed by a test
        stand_in.write_text("#!/bin/sh\nexit 0\n")
        stand_in.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment["PATH"] = f"{fake.parent}:{environment['PATH']}"
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert done.returncode == (code or cuda_code)
    assert done.stdout.splitlines()[0] == "make test CI=true"
    assert done.stdout.splitlines()[-1] == closing


def test_ci_script_is_executable_in_git() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout.startswith("100755")

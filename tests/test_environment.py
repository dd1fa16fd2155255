"""environment.yml (conda) and pyproject.toml (pip) name the same packages, and these are installed here."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = [
    Requirement(line)
    for line in [*PROJECT["dependencies"], *EXTRAS["lab"], *EXTRAS["data"], *EXTRAS["4bit"], *EXTRAS["dev"]]
    if not line.startswith("seal-nb")
]


def conda_dependencies() -> tuple[list[str], list[str]]:
    """(conda packages, pip lines)"""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip_lines = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    return [entry for entry in listed if isinstance(entry, str)], pip_lines


def test_conda_users_get_the_same_packages_in_the_same_versions() -> None:
    _, lines = conda_dependencies()
    assert lines[0] == "-e ."
    assert {str(Requirement(line)) for line in lines[1:]} == {str(requirement) for requirement in OURS}


def test_conda_s_python_is_the_one_required() -> None:
    packages, _ = conda_dependencies()
    assert f"python{PROJECT['requires-python']}" in packages


@pytest.mark.parametrize("requirement", OURS, ids=lambda requirement: requirement.name)
def test_installed_version_is_one_that_is_required(requirement: Requirement) -> None:
    # The CPU wheel has the version 2.13.0+cpu, which `==2.13.0` accepts.
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)


def test_vllm_and_torch_move_together() -> None:
    assert "vllm==0.32.0" in EXTRAS["vllm"]
    assert "torch==2.13.0" in PROJECT["dependencies"]

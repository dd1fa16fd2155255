"""Published reference data that should be there and is not is a failure in continuous integration."""

from pathlib import Path

import pytest

from tests.conftest import find_golden, group_of


@pytest.mark.parametrize(
    ("ci", "has_shared", "outcome"),
    [
        ("true", True, pytest.fail.Exception),
        ("true", False, pytest.skip.Exception),
        ("", True, pytest.skip.Exception),
        ("", False, pytest.skip.Exception),
    ],
)
def test_golden_tests_skip_in_ci_only_where_shared_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str, has_shared: bool, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    if has_shared:
        (tmp_path / "shared").mkdir()
    with pytest.raises(outcome, match="no published reference data"):
        find_golden(tmp_path / "shared")


def test_golden_data_that_is_there_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    (tmp_path / "golden").mkdir()
    assert find_golden(tmp_path) == tmp_path / "golden"


def test_tests_that_wait_for_processes_run_one_after_another_beside_those_that_compute() -> None:
    waiting = ("tests/slurm/test_chain.py::test_a", "tests/server/test_keys.py::test_b[x::y]")
    assert {group_of(node_id) for node_id in waiting} == {"waiting"}
    assert group_of("build/notebooks/00_tour.ipynb::Cell 0") == group_of("notebooks/09_sweep.ipynb::Cell 3")
    assert group_of("tests/ttt/test_decode.py::test_a") != group_of("tests/ttt/test_passes.py::test_a")

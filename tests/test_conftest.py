"""The rules of tests/conftest.py: missing reference data, slow tests, groups of tests."""

from pathlib import Path

import pytest

from tests.conftest import SLOW_FILES, TESTS, find_golden, group_of, is_slow


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


def test_golden_data_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    (tmp_path / "golden").mkdir()
    assert find_golden(tmp_path) == tmp_path / "golden"


def test_tests_that_wait_for_processes_run_one_after_another() -> None:
    waiting = ("tests/chain/test_local.py::test_a", "tests/server/test_keys.py::test_b[x::y]")
    assert {group_of(node_id) for node_id in waiting} == {"waiting"}
    assert group_of("tests/slurm/test_chain.py::test_a") == group_of("tests/slurm/test_faults.py::test_b") == "slurm"
    assert group_of("build/notebooks/08_results.ipynb::Cell 0") == group_of("notebooks/03_query_server.ipynb::Cell 3")
    assert group_of("tests/ttt/test_decode.py::test_a") != group_of("tests/ttt/test_passes.py::test_a")


def test_slow_tests_are_named_by_files_that_exist() -> None:
    assert {name for name in SLOW_FILES if not (TESTS / name).is_file()} == set()


def test_a_test_is_slow_by_its_file_its_folder_or_its_fixtures() -> None:
    assert is_slow(TESTS / "chain" / "test_local.py", ()) and is_slow(TESTS / "slurm" / "test_any.py", ())
    assert is_slow(TESTS / "test_any.py", ("tmp_path", "client")) and is_slow(Path("notebooks/00_tour.ipynb"), ())
    assert not is_slow(TESTS / "test_metrics.py", ("tmp_path",))

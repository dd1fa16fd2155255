"""Published reference data that should be there and is not is a failure in continuous integration."""

from pathlib import Path

import pytest

from tests.conftest import find_golden


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

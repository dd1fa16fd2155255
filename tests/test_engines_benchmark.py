"""The benchmark of engines runs, scales where nothing is the limit, and the docs show what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks import engines
from benchmarks.engine_plots import engine_throughput

ROOT = Path(__file__).resolve().parent.parent


def test_stage_1_is_faster_with_more_requests_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines.main(["--quick", "--out", str(tmp_path / "engines.json"), "--figure", str(tmp_path / "engines.png")])
    result = json.loads((tmp_path / "engines.json").read_text())
    one, four = result["service"]["rows"]
    assert (one["parallel"], four["parallel"], result["quick"]) == (1, 4, True)
    assert one["texts_per_s"] < four["texts_per_s"] <= four["possible"]
    assert (tmp_path / "engines.png").stat().st_size > 5_000
    assert "| 4 |" in capsys.readouterr().out


def test_numbers_in_git_come_from_a_full_run_and_stand_in_the_docs() -> None:
    result = json.loads(engines.OUT.read_text())
    assert not result["quick"]
    assert engines.markdown(result) in (ROOT / "docs" / "engines.md").read_text()


def test_the_figure_says_in_words_what_it_shows() -> None:
    rows = [{"parallel": n, "texts_per_s": 1.5 * n, "possible": 2.0 * n, "tokens_per_s": 5.0} for n in (1, 2)]
    service = {"lanes": 2, "service_time_s": 0.5, "rows": rows}
    chart = engine_throughput({"service": service, "vllm": {"lanes": 2, "max_tokens": 8, "rows": rows}})
    assert chart.alt == "Texts a second over requests at a time: 1: 1.5; 2: 3" and len(chart.axes) == 2

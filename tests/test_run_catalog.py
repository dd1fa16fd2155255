"""Runs listed, compared over the passages they share, and told apart by their settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from seal_nb.cli import main
from seal_nb.errors import DataError
from seal_nb.results.compare import catalog_rows, compare_runs, settings_difference
from seal_nb.results.continual import summarize_sequences
from seal_nb.storage import RunRecord, write_json, write_record


def run_file(path: Path, right_P: list[bool], **fields: Any) -> Path:
    articles = [
        {
            "title": f"T{n}",
            "context": f"C{n}",
            "completions": [
                {"text": "e", "questions": [{"rep": 0, "baseline_correct": False, "adapter_correct": right}] * 2}
            ],
        }
        for n, right in enumerate(right_P)
    ]
    return write_json(path, {"overall": {}, "arm": "hand_written", "articles": articles, **fields})


def test_every_kind_of_result_is_listed_published_ones_too(golden: Path, tmp_path: Path) -> None:
    run_file(tmp_path / "run_mine.json", [True, False])
    (row,) = catalog_rows(tmp_path)
    assert (row["file"], row["kind"], row["passages"], row["accuracy"]) == (
        "run_mine.json", "single passage", 2, 0.5,
    )  # fmt: skip
    published = {(one["kind"], one["file"]) for one in catalog_rows(golden)}
    assert ("ranking", "results/rank_iter0.json.gz") in published
    assert {"CPT", "continual", "single passage"} <= {kind for kind, _ in published}


def test_two_runs_are_compared_over_the_passages_that_both_have(tmp_path: Path) -> None:
    first = run_file(tmp_path / "a.json", [False] * 12)
    second = run_file(tmp_path / "b.json", [True] * 10)
    assert compare_runs(first, second) == "0.0 % → 100.0 %: +100.0 points [100.0, 100.0], 10 passages: real"


def test_what_is_not_settled_says_what_would_settle_it(tmp_path: Path) -> None:
    first = run_file(tmp_path / "a.json", [True, False] * 5)
    second = run_file(tmp_path / "b.json", [True, False, False, True] * 2 + [True, True])
    assert "not distinguishable from noise; to settle" in compare_runs(first, second)


def test_runs_that_share_nothing_are_refused(tmp_path: Path) -> None:
    first, none = run_file(tmp_path / "a.json", [True]), run_file(tmp_path / "b.json", [])
    with pytest.raises(DataError, match="no single-passage run with verdicts"):
        compare_runs(first, none)
    value = json.loads(first.read_text())
    value["articles"][0]["title"] = "other"
    other = write_json(tmp_path / "c.json", value)
    with pytest.raises(DataError, match="shares no passage"):
        compare_runs(first, other)


def test_settings_that_differ_are_told_by_dotted_name_from_the_record_or_the_file(tmp_path: Path) -> None:
    files = [run_file(tmp_path / f"{name}.json", [True], lora_params={"lr": lr}) for name, lr in (("a", 1), ("b", 2))]
    assert settings_difference(*files) == [{"setting": "lora_params.lr", "first": 1, "second": 2}]
    for file, rank in zip(files, (8, 32), strict=True):
        write_record(file, RunRecord(stage="03", settings={"training": {"lora_rank": rank}}, seeds={"seed": 42}))
    assert settings_difference(*files) == [{"setting": "settings.training.lora_rank", "first": 8, "second": 32}]
    assert settings_difference(files[0], files[0]) == []


def test_continual_summaries_of_several_seeds_are_pooled_into_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for number, rows in enumerate(([0.2, 0.4], [0.6, 0.8])):
        summary = summarize_sequences([[[0.0], [last]] for last in rows], dataset="d", base_model="m")
        files.append(str(write_json(tmp_path / f"summary_{number}.json", summary)))
    assert main(["runs", "pool", *files, "--out", str(tmp_path / "pooled.json")]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 4 sequences" in said and "14.1 points as published (mean over runs), 25.8 pooled" in said
    assert json.loads((tmp_path / "pooled.json").read_text())["n_sequences"] == 4
    assert [row["kind"] for row in catalog_rows(tmp_path)] == ["continual"] * 3


def test_the_commands_print_what_the_functions_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_file(tmp_path / "a.json", [False] * 8)
    second = run_file(tmp_path / "b.json", [True] * 8, seed=7)
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert "hand-written" in capsys.readouterr().out
    assert main(["runs", "compare", str(first), str(second)]) == 0
    assert "8 passages: real" in capsys.readouterr().out
    assert main(["runs", "diff", str(first), str(second)]) == 0
    assert "seed" in capsys.readouterr().out
    assert main(["runs", "diff", str(first), str(first)]) == 0
    assert "no setting" in capsys.readouterr().out
    assert main(["runs", "list", str(tmp_path / "none")]) == 2

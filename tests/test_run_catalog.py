"""Runs listed, compared over the passages they share, and told apart by their settings."""

import json
import unicodedata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from seal_nb.cli import main
from seal_nb.errors import DataError
from seal_nb.results.collect import collect, read_run, run_of
from seal_nb.results.continual import summarize_sequences
from seal_nb.results.run import compare, difference_sentence, paired_places, settings_difference
from seal_nb.storage import write_json, write_record


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


def said(first: Path, second: Path) -> str:
    return difference_sentence(read_run(first), read_run(second))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"runs": {"x": {"passages": [{"baseline": "01", "adapter": "0"}]}}}, "has no statistics: ValueError"),
        ({"runs": {"x": {"passages": [{"adapter": "0"}]}}}, "has no statistics: KeyError: 'baseline'"),
        ({"runs": {"x": {"passages": 3}}}, "has no statistics: TypeError"),
        ({"query_server": [{"overall": {}}], "continual_overall_results": {}}, "has no statistics: KeyError: 'file'"),
        ({"query_server": 3, "continual_overall_results": {}}, "has no statistics: TypeError"),
    ],
)
def test_a_broken_collection_of_the_release_is_listed_and_ends_nothing(
    tmp_path: Path, broken: dict[str, Any], reason: str
) -> None:
    write_json(tmp_path / "broken.json", broken)
    run_file(tmp_path / "run_mine.json", [True])
    found = collect(tmp_path)
    ((file, said),) = found.unread
    assert file == "broken.json" and said.startswith(reason) and len(found.runs) == 1


def test_every_kind_of_result_is_listed_published_ones_too(golden: Path, tmp_path: Path) -> None:
    run_file(tmp_path / "run_mine.json", [True, False])
    ((file, kind, _, n, accuracy),) = collect(tmp_path).overview().to_numpy().tolist()
    assert (file, kind, n, accuracy) == ("run_mine.json", "single passage", 2, 0.5)
    published = collect(golden).overview()
    assert list(published.kind[published.file == "results/rank_iter0.json.gz"]) == ["ranking"]
    assert {"cpt", "continual", "single passage"} <= set(published.kind)


def test_two_runs_are_compared_over_the_passages_that_both_have(tmp_path: Path) -> None:
    first = run_file(tmp_path / "a.json", [False] * 12)
    second = run_file(tmp_path / "b.json", [True] * 10)
    assert said(first, second).startswith("0.0 % → 100.0 %: +100.0 points [")
    assert said(first, second).endswith(", 100.0], 10 passages: real")


def test_two_runs_are_paired_once_and_both_means_are_of_the_answers_graded_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_file(tmp_path / "a.json", [True, False])
    value = json.loads(first.read_text())
    value["articles"][0]["completions"][0]["questions"][1]["adapter_correct"] = None
    value["articles"][1]["completions"][0]["questions"][1]["adapter_correct"] = True
    pairings = Mock(wraps=paired_places)
    monkeypatch.setattr("seal_nb.results.run.paired_places", pairings)
    second = write_json(tmp_path / "b.json", value)
    assert said(first, second).startswith("50.0 % → 75.0 %: +25.0 points")
    assert pairings.call_count == 1
    value["articles"][1]["completions"][0]["questions"][0]["adapter_correct"] = None
    write_json(first, value)
    assert said(second, first).startswith("100.0 % → 100.0 %: +0.0 points")


def cpt_run(path: Path, correct: list[bool]) -> Path:
    """One passage of one question for each verdict, all under one title."""
    reply = {"baseline_correct": [False] * len(correct), "adapter_correct": correct}
    passages = [{"title": "T", "n_questions": 1}] * len(correct)
    return write_json(path, {"server_reply": reply, "per_passage": passages})


def test_passages_that_share_their_title_are_paired_by_their_order_or_not_at_all(tmp_path: Path) -> None:
    eight = read_run(cpt_run(tmp_path / "eight.json", [False] * 7 + [True]))
    two = read_run(cpt_run(tmp_path / "two.json", [True, False]))
    other = read_run(cpt_run(tmp_path / "other.json", [True] + [False] * 7))
    assert paired_places(eight, other) == (list(range(8)), list(range(8)))
    refused = r"json: several passages share title and number of questions, such as \('T', 1\), .* in the same order"
    one = read_run(cpt_run(tmp_path / "one.json", [True]))
    for runs in ((eight, two), (two, eight), (one, eight)):
        with pytest.raises(DataError, match=refused):
            compare(*runs, shared_only=True)


def test_runs_that_share_nothing_are_refused(tmp_path: Path) -> None:
    first, none = run_file(tmp_path / "a.json", [True]), run_file(tmp_path / "b.json", [])
    with pytest.raises(DataError, match="has no verdicts"):
        said(first, none)
    value = json.loads(first.read_text())
    value["articles"][0]["title"] = "other"
    other = write_json(tmp_path / "c.json", value)
    with pytest.raises(DataError, match="shares 0 of"):
        said(first, other)


@pytest.mark.parametrize("form", ["single", "cpt", "continual"])
def test_runs_are_paired_by_titles_in_nfc_and_nfd_alike(form: str) -> None:
    """As macOS may have written one of the two files; the other order shows that titles decide."""

    def value(*titles: str) -> dict[str, Any]:
        verdicts = [title == "Ulm" for title in titles]
        asked = [[{"baseline_correct": False, "adapter_correct": verdict}] for verdict in verdicts]
        if form == "single":
            texts = zip(titles, asked, strict=True)
            return {"articles": [{"title": t, "completions": [{"questions": rows}]} for t, rows in texts]}
        if form == "cpt":
            reply = {"baseline_correct": [False] * len(verdicts), "adapter_correct": verdicts}
            return {"server_reply": reply, "per_passage": [{"title": title, "n_questions": 1} for title in titles]}
        matrices = [[[0.0], [float(verdict)]] for verdict in verdicts]
        sequence = {"questions": [[]], "steps": [{"texts": [], "correct": []}] * 2}
        summary = summarize_sequences(matrices, dataset="d", base_model="m")
        return summary | {"sequences": [{"titles": [title], **sequence} for title in titles]}

    cafe, as_macos = (unicodedata.normalize(name, "Café") for name in ("NFC", "NFD"))
    (row,) = compare(run_of(value(cafe, "Ulm")), run_of(value("Ulm", as_macos))).to_dict("records")
    assert (row["n"], row["difference"]) == (2, 0.0)


def test_a_comparison_is_paired_over_the_same_passages_and_refuses_others(tmp_path: Path) -> None:
    worse, better = run_file(tmp_path / "a.json", [False] * 12), run_file(tmp_path / "b.json", [True] * 12)
    (row,) = compare(read_run(better), read_run(worse)).to_dict("records")
    assert (row["n"], row["difference"], row["is_real"]) == (12, 1.0, True) and row["p"] < 0.001
    assert row["sentence"].endswith(", 100.0], 12 passages: real")
    fewer = read_run(run_file(tmp_path / "c.json", [True] * 10))
    with pytest.raises(DataError, match=r"shares 10 of 12 passages .* which has 10; .*shared_only=True"):
        compare(fewer, read_run(worse))
    assert compare(fewer, read_run(worse), shared_only=True).n[0] == 10
    summary = summarize_sequences([[[0.0], [1.0]]], dataset="d", base_model="m")
    with pytest.raises(DataError, match="is a single_passage run, not a continual run"):
        compare(read_run(write_json(tmp_path / "s.json", summary)), fewer)


def differing(*files: Path) -> list[list[str]]:
    return settings_difference(*files).to_numpy().tolist()


def test_settings_that_differ_are_told_by_dotted_name_from_the_record_or_the_file(tmp_path: Path) -> None:
    files = [run_file(tmp_path / f"{name}.json", [True], lora_params={"lr": lr}) for name, lr in (("a", 1), ("b", 2))]
    assert differing(*files) == [["lora_params.lr", "1", "2"]]
    for file, rank in zip(files, (8, 32), strict=True):
        write_record(file, stage="03", settings={"training": {"lora_rank": rank}}, seeds={"seed": 42})
    assert differing(*files) == [["settings.training.lora_rank", "8", "32"]]
    assert differing(files[0], files[0]) == []


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
    assert list(collect(tmp_path).overview().kind) == ["continual"] * 3


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

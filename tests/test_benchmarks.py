"""The benchmarks run, at a size that says nothing about speed, and write what they promise."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import gpu, grading, inner_loop, inspector, scale, speed_table
from benchmarks.gpu_table import DOCS, MARKS, in_docs
from benchmarks.padding import markdown
from benchmarks.workload import ASKED_PER_PASSAGE, load_workload
from tests.ttt.tiny import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """JSON and output of the quick run, in a process of its own as `make bench` has it."""
    out = tmp_path_factory.mktemp("bench") / "inner_loop.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.inner_loop", "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()), done.stdout


def test_bench_compares_whole_requests_of_three_ways(quick: tuple[dict, str]) -> None:
    result, _ = quick
    for name in ("ratio_published", "ratio_unpadded", "ratio_unpadded_baseline_kept"):
        assert result[name] > 0
    assert {row["way"] for row in result["ways"]} == {"published", "careful", "slots"}
    assert all(row["requests_per_minute"] > 0 for row in result["ways"])
    assert {row["slots"] for row in result["ways"] if row["way"] == "slots"} == set(inner_loop.QUICK.n_slots)


def test_bench_times_three_padded_steps_and_says_that_the_rest_is_extrapolated(quick: tuple[dict, str]) -> None:
    result, printed = quick
    published = [row for row in result["ways"] if row["way"] == "published"]
    assert all(row["extrapolated_from_steps"] >= 3 * row["processes"] for row in published)
    assert "extrapolated from timed steps" in printed


def test_bench_splits_the_gain_and_shows_growth_and_memory(quick: tuple[dict, str]) -> None:
    result, _ = quick
    factors = 1.0
    for row in result["gain_by_source"]:
        factors *= row["factor"]
    first, last = (result["gain_by_source"][i]["s_per_request"] for i in (0, -1))
    assert factors == pytest.approx(first / last, rel=0.01)
    assert [row["tokens"] for row in result["growth"]["sequence_length"]] == [16, 32]
    assert [row["jobs"] for row in result["growth"]["jobs"]] == [1, 2]
    assert all(row["peak_rss_mb"] > 100 for row in result["ways"] if row["way"] == "slots")


def test_bench_shows_what_a_judge_costs_asked_in_turn_and_at_once(quick: tuple[dict, str]) -> None:
    result, printed = quick
    row = result["parallel_grading"]
    assert row["one_by_one_s"] >= row["answers"] * row["latency_s"]
    assert row["at_once_s"] >= row["latency_s"]
    assert row["factor"] == pytest.approx(row["one_by_one_s"] / row["at_once_s"], rel=0.01)
    assert "  parallel grading" in printed


def test_bench_names_the_machine_without_naming_places(quick: tuple[dict, str]) -> None:
    result, _ = quick
    assert set(result["machine"]) == {"cpu", "cores"}
    assert result["dtype"] in ("float32", "bfloat16")
    assert not re.search(r'"/|/tmp|/home|tcp://', json.dumps(result))


def test_a_passage_is_asked_fifteen_times_before_the_next_and_by_one_process_only() -> None:
    requests = load_workload(Path("absent")).requests(0, 2, ASKED_PER_PASSAGE + 1)
    assert len({r.eval_questions[0].context for r in requests[:ASKED_PER_PASSAGE]}) == 1
    assert requests[-1].eval_questions[0].context != requests[0].eval_questions[0].context
    assert len({r.request_id for r in requests}) == len(requests)
    others = load_workload(Path("absent")).requests(1, 2, ASKED_PER_PASSAGE + 1)
    assert not {r.eval_questions[0].context for r in requests} & {r.eval_questions[0].context for r in others}


def test_published_workload_has_the_published_size(golden: Path) -> None:
    requests = load_workload(golden / "eval/iter2_val.json.gz").requests(0, 1, ASKED_PER_PASSAGE)
    n_sequences = [len(r.train_sequences) for r in requests]
    assert 6.5 < sum(n_sequences) / len(requests) < 9
    assert 4 <= len(requests[0].eval_questions) <= 6


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the GPU benchmark writes of a tiny model on a CPU, except the round."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    parts = "matmul,check,training,profile,decoding,alone"
    gpu.main(["--config", "tiny", "--device", "cpu", "--only", parts, "--out", str(out)])
    return out


def test_gpu_benchmark_checks_itself_and_measures_on_any_device(on_cpu: Path) -> None:
    result = json.loads(on_cpu.read_text())
    assert result["device"] == "CPU" and result["config"] == "tiny" and result["correct"]
    assert result["check"]["float32"]["update_distance"] < 1e-3
    assert result["check"]["bfloat16"]["passed"]
    assert set(result["training"]) == {"1", "4"} and result["matmul_share"] > 0
    profile = result["profile"]["4"]
    assert sum(profile["groups_ms"].values()) == pytest.approx(profile["busy_ms"], rel=0.01)
    assert len(profile["kernels"]) == 10 and profile["kernels"][0]["share"] > 0.05
    assert result["decoding"]["ms_per_step_10_rows"] > 0 and result["decoding"]["rows"] == 15
    assert result["alone"]["published_steps_timed"] == 3


def test_gpu_benchmark_completes_what_it_has_and_compares_rounds(
    on_cpu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(["--config", "tiny", "--device", "cpu", "--only", "round", "--out", str(on_cpu)])
    result = json.loads(on_cpu.read_text())
    ours, alone = result["round"], result["alone"]
    assert ours["requests"] == 15 and ours["train_s"] > 0 and ours["answer_s"] > 0
    assert result["round_minutes"] == pytest.approx(750 / 15 / 60 * (ours["train_s"] + ours["answer_s"]), rel=0.01)
    careful_s = ours["steps_per_request"] * min(alone["careful_step_s"], alone["plain_loop_step_s"])
    assert result["ratio_careful_training"] == pytest.approx(15 * careful_s / ours["train_s"], rel=0.01)
    assert result["ratio_published"] > 0
    printed = capsys.readouterr().out
    assert "a round of 750 requests" in printed and "4 slots" in printed
    assert in_docs(f"a{MARKS[0]}old{MARKS[1]}b", "new\n") == f"a{MARKS[0]}new\n{MARKS[1]}b"


def test_a_part_of_the_gpu_benchmark_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"tokens_per_s": 2.0, "matmul_share": 0.5}
    row |= dict.fromkeys(("ms_per_step", "issue_ms", "kernels_per_step", "synchronisations_per_step"))
    row |= {"peak_memory_gib": None}

    def fails(machine: gpu.Machine) -> Iterator[dict]:
        yield {"1": row}
        raise RuntimeError("no memory left")

    monkeypatch.setitem(gpu.PARTS, "training", fails)
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="no memory left"):
        only = ["--only", "training,decoding", "--slots", "2"]
        gpu.main(["--config", "tiny", "--device", "cpu", *only, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["training"] == {"1": row} and result["matmul_share"] == 0.5
    assert result["decoding"]["tokens_per_s"] > 0 and result["errors"] == {"training": "RuntimeError: no memory left"}


def test_gpu_benchmark_says_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main(["--config", "tiny"])


def test_numbers_in_git_come_from_a_full_run() -> None:
    bench, card = inner_loop.OUT, gpu.OUT
    if bench.is_file():
        assert not json.loads(bench.read_text())["quick"]
    if card.is_file():
        result = json.loads(card.read_text())
        assert result["config"] == "qwen2.5-7b" and result["device"] != "CPU" and result["correct"]
        assert set(gpu.PARTS) <= result.keys() and "errors" not in result


def test_speed_tables_in_the_docs_are_the_measured_ones() -> None:
    measured = json.loads(inner_loop.OUT.read_text())
    assert speed_table.markdown(measured) in (ROOT / "docs/inner_loop.md").read_text()


def test_gpu_tables_in_the_docs_are_the_measured_ones() -> None:
    docs = DOCS.read_text()
    if gpu.OUT.is_file():
        measured = json.loads(gpu.OUT.read_text())
        assert in_docs(docs, gpu.markdown(measured)) == docs
    else:
        assert all(docs.count(mark) == 1 for mark in MARKS)


def test_padding_table_in_the_docs_is_the_measured_one() -> None:
    measured = json.loads((ROOT / "benchmarks/padding.json").read_text())
    assert markdown(measured) in (ROOT / "docs/inner_loop.md").read_text()


def test_grading_bench_asks_every_answer_once_and_then_reads_it_from_the_cache(tmp_path: Path) -> None:
    out = tmp_path / "grading.json"
    grading.main(["--quick", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [row["calls_at_a_time"] for row in result["judge"]] == [1, 2]
    assert all(0 < row["answers_per_s"] <= row["possible_per_s"] for row in result["judge"])
    assert {row["grader"] for row in result["local"]} == {"local", "exact", "f1", "recall"}
    assert grading.markdown(result).count("\n| ") == 2 + 5


def test_inspector_bench_times_every_step_of_a_person(tmp_path: Path) -> None:
    out = tmp_path / "inspector.json"
    inspector.main(["--quick", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"].values()
    assert all(row[key] > 0 for key in inspector.MEANING)


def test_inspector_bench_has_runs_of_the_published_sizes() -> None:
    (round_run, evaluation) = (inspector.run_of_size(*size) for size in inspector.SIZES.values())
    counts = [
        (len(run["articles"]), sum(len(article["completions"]) for article in run["articles"]))
        for run in (round_run, evaluation)
    ]
    assert counts == [(50, 250), (200, 200)]
    assert {row["rep"] for row in round_run["articles"][0]["completions"][0]["questions"]} == {0, 1, 2}


def test_inspector_table_in_the_docs_is_the_measured_one() -> None:
    measured = json.loads((ROOT / "benchmarks/inspector.json").read_text())
    assert inspector.markdown(measured) in (ROOT / "docs/lab.md").read_text()


def test_no_request_is_lost_or_doubled_while_workers_leave_vanish_and_freeze(tmp_path: Path) -> None:
    out, size = tmp_path / "scale.json", {"workers": 30, "requests": 600, "clients": 10, "capacity": 4}
    times = {"service-s": 0.3, "life-s": 1.0, "lease-s": 0.6, "latency-s": 0.5}
    scale.main([f"--{name}={value}" for name, value in (size | times | {"out": out}).items()])
    result = json.loads(out.read_text())
    assert (result["queued"], result["lost"], result["doubled"]) == (600, 0, 0)
    assert result["front_end"]["answered"] == result["requests"] > 600
    assert result["front_end"]["requeued"] > 0 < result["front_end"]["workers_lost"]
    assert 0 < result["latency"]["p50_ms"] <= result["latency"]["p99_ms"]


def test_scale_in_the_docs_is_the_measured_one() -> None:
    measured, docs = json.loads(scale.OUT.read_text()), scale.DOCS.read_text()
    assert measured["plan"] == asdict(scale.Plan()) and (measured["lost"], measured["doubled"]) == (0, 0)
    assert in_docs(docs, scale.markdown(measured, json.loads(gpu.OUT.read_text())), scale.MARKS) == docs


def test_continual_bench_edits_sequences_side_by_side_and_writes_what_it_cost(tmp_path: Path) -> None:
    model, out = save_tiny_model(tmp_path / "tiny"), tmp_path / "continual.json"
    line = [sys.executable, "-m", "benchmarks.continual", "--model", str(model), "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert (result["n_sequences"], result["n_datapoints"]) == (4, 2)
    together, alone = result["cpu_s_together"], result["cpu_s_one_sequence"]
    assert result["share_of_one_after_the_other"] == pytest.approx(together / (4 * alone), abs=0.05)

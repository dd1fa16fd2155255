"""Estimates are arithmetic on the requests, and agree with what the small model and a server really did."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from seal_nb.errors import DataError
from seal_nb.experiments.estimate import (
    CPU_CORE_FLOPS,
    ModelShape,
    assumed_rate,
    estimate,
    estimate_on_server,
    server_rate,
    work_of,
)
from seal_nb.protocol import EvalQuestion, TTTRequest
from seal_nb.service.status import ServerStatus, WorkerStatus

QWEN = ModelShape(
    n_layers=28, hidden=3584, intermediate=18944, q_out=3584, kv_out=512, vocabulary=152064, tied=False
)
STATUS = ServerStatus(
    server_id="s", model_id="m", pid=1, uptime_s=1.0, draining=False, n_queued=0, n_running=0, n_slots=8,
    n_results=0, n_unsaved=0, queued_bytes=0, jobs_per_min=0.0, tokens_per_s=0.0, rss_bytes=0, counts={},
    workers=(),
)  # fmt: skip


def request(**fields: object) -> TTTRequest:
    given = {
        "train_sequences": ["x" * 42, "y" * 84, "z" * 42],
        "eval_questions": [EvalQuestion(question="q?", answer="a"), EvalQuestion(question="r?", answer="b")],
        "finetune_epochs": 10,
    }
    return TTTRequest.model_validate(given | fields)


def test_work_is_counted_from_requests_and_the_base_answers_a_question_once() -> None:
    work = work_of([request(seed=n) for n in range(3)] + [request(skip_training=True)])
    assert (work.n_loops, work.n_steps) == (3, 3 * 30)
    assert work.train_tokens == 3 * 10 * (10 + 20 + 10)
    assert work.n_answers == 3 * 2 + 2


@pytest.mark.parametrize(
    ("fields", "steps", "tokens"),
    [
        ({"batch_size": 2}, 20, 400),
        ({"batch_size": 2, "gradient_accumulation_steps": 2}, 10, 400),
        ({"padding_in_loss": True, "pad_to": 2048}, 30, 10 * 3 * 2048),
        ({"padding_in_loss": True, "pad_samples": 16}, 30, 400 + 10 * 3 * 16),
        ({"max_seq_length": 10}, 30, 300),
    ],
)
def test_settings_change_steps_and_tokens(fields: dict, steps: int, tokens: int) -> None:
    work = work_of([request(**fields)])
    assert (work.n_steps, work.train_tokens) == (steps, tokens)


def test_sizes_are_those_of_the_small_model(small_model_dir: str) -> None:
    from safetensors import safe_open

    shape = ModelShape.of_folder(small_model_dir)
    with safe_open(Path(small_model_dir) / "model.safetensors", framework="pt") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    real = sum(math.prod(size) for size in sizes)
    assert shape.n_parameters == pytest.approx(real, rel=1e-3)


def test_sizes_of_qwen_2_5_7b_are_the_known_ones() -> None:
    assert QWEN.n_parameters == pytest.approx(7.616e9, rel=1e-3)
    assert QWEN.adapter_parameters(32, []) == 10_092_544  # PEFT's count on q_proj and v_proj
    assert QWEN.adapter_parameters(32, ["all-linear"]) > 5 * QWEN.adapter_parameters(32, [])


def test_time_grows_with_the_work_and_shrinks_with_the_workers() -> None:
    work = work_of([request()])
    slots = {"n_slots": 8, "lora_rank": 32, "target_modules": ()}
    one = estimate(work, QWEN, assumed_rate(1, gpu=False), **slots)
    assert one.seconds == pytest.approx(
        QWEN.n_parameters * (4 * work.train_tokens + 2 * work.answer_tokens) / CPU_CORE_FLOPS
    )
    assert estimate(work, QWEN, assumed_rate(2, gpu=False), **slots).seconds == pytest.approx(one.seconds / 2)
    priced = estimate(work, QWEN, assumed_rate(1, gpu=True), price_per_hour=3.0, **slots)
    assert priced.cost == pytest.approx(3.0 * priced.seconds / 3600)
    assert "assumed" in {row["quantity"]: row["estimate"] for row in priced.rows()}["time"]


def test_what_a_server_was_seen_to_do_is_believed_over_any_assumption() -> None:
    assert server_rate(STATUS, QWEN) is None
    seen = server_rate(replace(STATUS, tokens_per_s=100.0), QWEN)
    assert seen is not None and seen.flops == 100 * 4 * QWEN.n_parameters
    assert seen.source == "this server, last minute: 100 tokens/s"


def test_a_server_and_its_requests_give_the_lines_of_a_table(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    worker = WorkerStatus(
        worker_id="w", host="h", pid=1, n_running=0, capacity=2, silent_s=0.0,
        stats={"device": "cuda:0", "dtype": "bfloat16", "slots": 32},
    )  # fmt: skip
    rows = estimate_on_server(replace(STATUS, workers=(worker,)), str(tmp_path), [request()])
    said = {row["quantity"]: row["estimate"] for row in rows}
    assert said["adapters to train"] == "1" and said["optimiser steps"] == "30"
    assert "assumed: 40 % of an H100's peak, times 1" in said["time"] and "cost" not in said
    soon = estimate_on_server(replace(STATUS, workers=(worker,)), str(tmp_path), [request()], n_workers=4)
    assert "times 4" in soon[4]["estimate"]


def test_of_a_model_whose_sizes_are_unknown_only_the_work_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)  # no model is no folder either, least of all the current one
    for model in ("Qwen/Qwen2.5-7B", ""):
        rows = estimate_on_server(STATUS, model, [request()])
        assert [row["quantity"] for row in rows] == [
            "adapters to train", "optimiser steps", "training tokens", "answers",
        ]  # fmt: skip
        assert rows[0]["estimate"] == "1"


def test_a_folder_without_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="holds no sizes of a decoder"):
        ModelShape.of_folder(tmp_path)

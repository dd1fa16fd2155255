"""Estimates are arithmetic on the requests, and agree with what the small model and a server really did."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from seal_nb.errors import DataError
from seal_nb.experiments.continual import ContinualSettings, edit_request
from seal_nb.experiments.estimate import (
    CPU_CORE_FLOPS,
    KNOWN,
    ModelShape,
    assumed_rate,
    estimate,
    estimate_on_server,
    estimate_texts,
    estimate_training,
    in_words,
    planned_requests,
    server_rate,
    work_of,
)
from seal_nb.experiments.settings import TrainingSettings
from seal_nb.passages import load_passages
from seal_nb.protocol import EvalQuestion, TTTRequest
from seal_nb.server.status import ServerStatus, WorkerStatus
from seal_nb.sft.settings import SftSettings

QWEN = KNOWN["Qwen/Qwen2.5-7B"]
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
    assert shape == KNOWN["embedded"], "known before it is fetched"
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
    for model in ("someone/model-of-ours", ""):
        rows = estimate_on_server(STATUS, model, [request()])
        assert [row["quantity"] for row in rows] == [
            "adapters to train", "optimiser steps", "training tokens", "answers",
        ]  # fmt: skip
        assert rows[0]["estimate"] == "1"


def test_a_folder_without_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="holds no sizes of a decoder"):
        ModelShape.of_folder(tmp_path)


def test_texts_cost_what_a_million_tokens_cost() -> None:
    asked = {"k_completions": 5, "max_tokens": 100}
    rows = estimate_texts(["x" * 420, "y" * 42], price_in=2.0, price_out=8.0, **asked)
    said = {row["quantity"]: row["estimate"] for row in rows}
    assert (said["texts"], said["prompt tokens"], said["new tokens"]) == ("10", "about 550", "at most 1,000")
    assert said["cost"] == "at most 0.01"  # 550 × 2 + 1000 × 8 millionths
    assert "cost" not in in_words(estimate_texts(["x"], **asked))
    assert in_words(rows).startswith("texts: 10; prompt tokens: about 550; ")


def told(model: str = "Qwen/Qwen2.5-7B", gpu: bool = True, n_processes: int = 1, **settings: object) -> dict:
    sft = SftSettings(epochs=2, batch_size=2, gradient_accumulation_steps=2, **settings)  # type: ignore[arg-type]
    texts = ["x" * 420] * 5
    rows = estimate_training(texts, model, sft, gpu=gpu, n_processes=n_processes, price_per_hour=36000.0)
    return {row["quantity"]: row["estimate"] for row in rows}


def test_a_training_is_counted_in_steps_tokens_memory_and_cost() -> None:
    lora, full = told(), told(method="full")
    assert lora["optimiser steps"] == full["optimiser steps"] == "4"
    assert lora["training tokens"] == "about 1,000"
    assert full["memory of a process"] == "121.8 GB, without activations"  # 16 bytes of 7.6e9
    assert told(method="full", n_processes=2)["memory of a process"].startswith("60.9 GB")
    assert told(method="full", gpu=False, n_processes=2)["memory of a process"].startswith("121.8 GB")
    assert lora["memory of a process"] == "17.8 GB, without activations"  # bfloat16, and rank 64 on all layers
    assert float(full["cost"].removeprefix("about ")) == pytest.approx(
        2 * float(lora["cost"].removeprefix("about ")), rel=0.1
    ), "all weights take two backward products and a second forward"
    assert set(told(model="someone/model-of-ours")) == {"optimiser steps", "training tokens"}
    assert told(max_seq_length=10)["training tokens"] == "about 100"


@pytest.mark.parametrize("strategy", ["stacked", "replay", "retrieval"])
def test_planned_edits_are_those_that_will_be_made_where_texts_are_given(strategy: str) -> None:
    training = TrainingSettings(finetune_epochs=2)
    settings = ContinualSettings(
        n_sequences=1,
        n_datapoints=3,
        arm="hand_written",
        strategy=strategy,
        training=training,  # type: ignore[arg-type]
    )
    sequence = load_passages("shipped:val")[:3]
    planned = planned_requests([sequence], settings, model_id="m")
    texts = [passage.hand_written for passage in sequence]
    stack: list[str] = []
    for step in range(1, 4):
        made = edit_request(0, sequence, texts[:step], stack, settings, model_id="m")
        stack.append(str(made.adapter_name))
        assert (planned[step].request_id, planned[step].train_sequences) == (made.request_id, made.train_sequences)
    questions = [len(passage.questions) for passage in sequence]
    assert work_of(planned).n_answers == sum(questions) + sum(sum(questions[:step]) for step in (1, 2, 3))


def test_self_edits_yet_to_be_written_count_as_the_published_ones_are_long() -> None:
    training = TrainingSettings(finetune_epochs=1)
    settings = ContinualSettings(n_sequences=1, n_datapoints=1, training=training)
    planned = planned_requests([load_passages("shipped:val")[:1]], settings, model_id="m")
    work = work_of(planned)
    assert work.n_loops == 1 and work.n_steps == 9  # eight lines and the passage
    assert 8 * 47 < work.train_tokens < 8 * 47 * 1.6

"""The wire format: published fields and defaults, other writers' JSON habits, and errors that help."""

import json
import math
import re
from pathlib import Path

import pytest

from seal_nb.errors import ProtocolError
from seal_nb.protocol import (
    PROTOCOL_VERSION,
    Answers,
    Command,
    ErrorReply,
    GenerateReply,
    GenerateRequest,
    ServerStatus,
    TTTReply,
    TTTRequest,
    WorkerStatus,
    build_reply,
    error_reply,
    parse_request,
    read_reply,
)
from seal_nb.server.client import DEFAULT_WAIT_S, ServeSettings
from seal_nb.server.endpoint import Endpoint

PAGE_PATH = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
PAGE = PAGE_PATH.read_text()
QUESTION = {"title": "Zor", "context": "Zor is a moon.", "question": "What is Zor?", "answer": "a moon"}
PUBLISHED = {
    "train_sequences": ["Zor\nZor is a moon."],
    "eval_questions": [QUESTION],
    "lora_rank": 32,
    "lora_alpha": 64,
    "lora_dropout": 0,
    "finetune_epochs": 10,
    "finetune_lr": 1e-3,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "end_mask_substring": "",
    "skip_training": False,
}


def sent(**fields):
    return json.dumps({**PUBLISHED, **fields}).encode()


def test_published_defaults_are_what_a_request_of_two_fields_gets():
    short = parse_request(json.dumps({k: PUBLISHED[k] for k in ("train_sequences", "eval_questions")}).encode())
    assert short == parse_request(sent())
    assert short.request_id is None and short.seed is None and short.training_wanted


@pytest.mark.parametrize("fields", [{"train_sequences": []}, {"skip_training": True}])
def test_no_sequences_or_skip_training_means_baseline_only(fields):
    assert not parse_request(sent(**fields)).training_wanted


@pytest.mark.parametrize(
    "message",
    [
        sent(lora_rank=32.0, batch_size=1.0),  # a language that has only floats
        sent(finetune_lr=1, lora_dropout=0),  # integers for floats
        sent(seed=None, request_id=None, adapter_stack=None),  # null for "not said"
        sent(unknown={"deep": [1]}, protocol_version="9.9"),
        sent(skip_training=0),
        sent().replace(b"Zor", rb"Z\u00f6r \ud83c\udf19"),  # unicode escapes, a surrogate pair
        sent().replace(b": ", b":\n\t"),
    ],
)
def test_other_languages_json_habits_are_understood(message):
    assert isinstance(parse_request(message), TTTRequest)


def test_escaped_and_plain_unicode_are_the_same_text():
    assert parse_request(sent(end_mask_substring="é🌙")) == parse_request(
        json.dumps({**PUBLISHED, "end_mask_substring": "é🌙"}, ensure_ascii=False).encode()
    )


@pytest.mark.parametrize(
    ("message", "field", "shown"),
    [
        (sent(lora_rank=-3), "lora_rank", "-3"),
        (sent(lora_rank="32"), "lora_rank", "'32'"),
        (sent(lora_rank=True), "lora_rank", "True"),
        (sent(lora_rank=1.5), "lora_rank", "1.5"),
        (sent(lora_dropout=1), "lora_dropout", "1"),
        (sent(lora_rank=513), "lora_rank", "513"),
        (sent(finetune_epochs=1001), "finetune_epochs", "1001"),
        (sent(train_sequences=[""] * 20_001), "train_sequences", "at most 20000"),
        (sent(eval_questions=[QUESTION] * 20_001), "eval_questions", "at most 20000"),
        (json.dumps({"cmd": "generate", "prompts": [""] * 20_001}).encode(), "prompts", "at most 20000"),
        (b'{"cmd": "generate", "prompts": ["a"], "max_tokens": 8193}', "max_tokens", "8193"),
        (sent(finetune_lr="fast"), "finetune_lr", "'fast'"),
        (sent(train_sequences="one text"), "train_sequences", "'one text'"),
        (sent(train_sequences=[1]), "train_sequences.0", "1"),
        (sent(eval_questions=[QUESTION, {"question": "?"}]), "eval_questions.1.answer", "missing"),
        (sent(seed=-1), "seed", "-1"),
        (sent(seed=2**32), "seed", "4294967296"),
        (sent(request_id=""), "request_id", "''"),
        (sent(request_id="a\nb"), "request_id", r"'a\\nb'"),
        (sent(adapter_name="../../etc/passwd"), "adapter_name", "etc/passwd"),
        (sent(adapter_name=".hidden"), "adapter_name", ".hidden"),
        (sent(adapter_name="a/b"), "adapter_name", "a/b"),
        (sent(adapter_name="a\0b"), "adapter_name", "a"),
        (sent(adapter_name="name\n"), "adapter_name", "name"),
        (sent(adapter_name="x" * 101), "adapter_name", "xxx"),
        (sent(adapter_name=""), "adapter_name", "''"),
        (sent(adapter_stack=["good", ".."]), "adapter_stack.1", ".."),
        (b'{"cmd": "explode"}', "cmd", "explode"),
        (b'{"cmd": ["shutdown"]}', "cmd", "shutdown"),
        (b'{"cmd": "generate"}', "prompts", "missing"),
        (b'{"cmd": "generate", "prompts": ["a"], "top_p": 0}', "top_p", "0"),
        (b'{"cmd": "forget", "adapter_names": ["../run"]}', "adapter_names.0", "run"),
        (b'{"train": []}', "train_sequences", "train"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_a_remedy(message, field, shown):
    with pytest.raises(ProtocolError, match=shown.replace(".", r"\.")) as caught:
        parse_request(message)
    assert caught.value.field == field
    assert field in str(caught.value)
    assert any(word in str(caught.value) for word in ("correct", "send"))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        sent().replace(b"0.001", b"NaN"),
        sent().replace(b"0.001", b"Infinity"),
        sent().replace(b"0.001", b"1e999"),
        sent().replace(b'"lora_rank": 32', b'"lora_rank": ' + b"9" * 5000),
        sent(end_mask_substring="\ud800"),
    ],
    ids=lambda message: repr(message[:20]),
)
def test_what_is_no_json_object_of_finite_values_is_a_protocol_error(message):
    with pytest.raises(ProtocolError):
        parse_request(message)


def test_a_long_value_is_not_repeated_in_full():
    with pytest.raises(ProtocolError) as caught:
        parse_request(sent(finetune_lr="x" * 100_000))
    assert len(str(caught.value)) < 500


def test_commands_and_generation_are_told_apart():
    assert parse_request(b'{"cmd": "shutdown"}') == Command(cmd="shutdown")
    assert parse_request(b'{"cmd": "cancel", "request_id": "r1"}').request_id == "r1"
    generate = parse_request(b'{"cmd": "generate", "prompts": ["a"], "temperature": 0}')
    assert isinstance(generate, GenerateRequest) and generate.temperature == 0


def test_gain_is_rounded_from_the_unrounded_difference():
    words = ["CORRECT"] * 1 + ["INCORRECT"] * 2
    reply = build_reply(
        baseline=Answers(texts=list("abc"), verdicts=words),
        adapter=Answers(texts=list("def"), verdicts=["CORRECT", "CORRECT", "INCORRECT"]),
    )
    assert (reply.baseline_accuracy, reply.adapter_accuracy, reply.adapter_gain) == (0.3333, 0.6667, 0.3333)
    assert reply.gains == [0, 1, 0]
    assert reply.adapter_gain != round(reply.adapter_accuracy - reply.baseline_accuracy, 4)


def test_ungraded_answers_are_excluded_and_counted_and_never_wrong():
    reply = build_reply(
        baseline=Answers(texts=list("abc"), verdicts=["CORRECT", "UNGRADED", "INCORRECT"]),
        adapter=Answers(texts=list("abc"), verdicts=["INCORRECT", "CORRECT", "UNGRADED"]),
    )
    assert (reply.baseline_accuracy, reply.adapter_accuracy) == (0.5, 0.5)
    assert reply.baseline_correct == [True, None, False]
    assert reply.gains == [-1, None, None]
    assert reply.n_ungraded == 2


def test_nothing_graded_is_missing_and_no_questions_is_zero():
    none_graded = build_reply(baseline=Answers(texts=["a"], verdicts=["UNGRADED"]))
    assert (none_graded.baseline_accuracy, none_graded.adapter_gain) == (None, None)
    no_questions = build_reply(baseline=Answers(texts=[], verdicts=[]))
    assert (no_questions.baseline_accuracy, no_questions.adapter_gain) == (0.0, 0.0)


def test_baseline_only_repeats_the_baseline():
    reply = build_reply(baseline=Answers(texts=["a"], verdicts=["CORRECT"], gold_logprobs=[-1.5]))
    assert reply.adapter_texts == reply.baseline_texts and reply.adapter_correct == [True]
    assert (reply.adapter_accuracy, reply.adapter_gain, reply.gains) == (1.0, 0.0, [0])
    assert reply.adapter_gold_logprobs == [-1.5]


def test_a_divergence_is_null_on_the_wire_and_none_in_the_record():
    reply = build_reply(baseline=Answers(texts=[], verdicts=[]), epoch_losses=[1.5, math.nan, math.inf])
    assert reply.epoch_losses == [1.5, None, None]
    assert read_reply(reply.to_json()) == reply


@pytest.mark.parametrize(
    "reply",
    [
        build_reply(baseline=Answers(texts=["é"], verdicts=["CORRECT"]), request_id="r", seed=7),
        GenerateReply(texts=["a"], token_counts=[1], finish_reasons=["stop"]),
        ErrorReply(error="EngineError: out of memory", request_id="r"),
    ],
)
def test_replies_survive_the_wire(reply):
    assert read_reply(reply.to_json()) == reply


def test_a_reply_of_a_newer_server_is_read_without_what_is_new():
    message = build_reply(baseline=Answers(texts=[], verdicts=[])).to_json()
    assert isinstance(read_reply(message.replace(b'"seed"', b'"new_thing":1,"seed"')), TTTReply)


def test_an_error_reply_names_type_message_and_field_and_omits_what_is_absent():
    reply = error_reply(ProtocolError("field 'seed' is -1", field="seed"), request_id="r1")
    fields = json.loads(reply.to_json())
    assert fields["error"] == "ProtocolError: field 'seed' is -1"
    assert fields["field"] == "seed" and "traceback" not in fields


def test_the_page_on_the_protocol_names_every_field_and_the_version():
    assert f"Version {PROTOCOL_VERSION}" in PAGE
    for kind in (TTTRequest, GenerateRequest, TTTReply, GenerateReply, ErrorReply, ServerStatus, WorkerStatus):
        assert not [name for name in kind.model_fields if f"`{name}`" not in PAGE and f'"{name}"' not in PAGE]
    assert not [name for name in Endpoint.__dataclass_fields__ if f"`{name}`" not in PAGE]


def test_the_defaults_on_the_page_are_those_of_the_records():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, re.M))
    said = {name: rows[name].strip("` ") for name in TTTRequest.model_fields}
    none = {"none": None, "derived": None, '""': "", "[]": [], "true": True, "false": False}
    for name, field in TTTRequest.model_fields.items():
        assert (none[said[name]] if said[name] in none else float(said[name])) == field.default, name
    settings = {**vars(ServeSettings()), "wait_s": DEFAULT_WAIT_S}
    settings |= {name: field.default for name, field in GenerateRequest.model_fields.items()}
    quoted = re.findall(r"`(\w+)` \((\d[\d.]*)[;:)]", PAGE)
    assert {"lease_s", "idle_timeout_s", "top_p"} <= {name for name, _ in quoted}
    assert not [(name, default) for name, default in quoted if settings[name] != float(default)]


def test_every_counter_of_the_server_is_on_the_page():
    folder = PAGE_PATH.parent.parent / "seal_nb" / "server"
    counted = {name for path in folder.glob("*.py") for name in re.findall(r'\.tally\["(\w+)"\] \+=', path.read_text())}
    assert {"accepted", "requeued"} <= counted
    assert not [name for name in counted if f"`{name}`" not in PAGE]


def test_a_question_with_one_gold_goes_out_as_published_so_that_requests_keep_their_ids() -> None:
    one = {"title": "T", "context": "c", "question": "q", "answer": "a"}
    for given in (one, {**one, "other_answers": []}, {**one, "other_answers": None}):
        request = TTTRequest.model_validate({"eval_questions": [given]})
        assert request.model_dump(mode="json")["eval_questions"] == [one]
        assert json.loads(request.model_dump_json())["eval_questions"] == [one]
    several = {**one, "other_answers": ["b"]}
    assert TTTRequest.model_validate({"eval_questions": [several]}).model_dump()["eval_questions"] == [several]

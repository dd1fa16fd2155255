"""Requests through the inner loop on a tiny random model: replies as published, failures alone, nothing
asked twice."""

import json
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from pydantic import ValidationError

from seal_nb.errors import SettingsError
from seal_nb.protocol import ErrorReply, GenerateReply, GenerateRequest, TTTReply, TTTRequest
from seal_nb.server.client import InnerLoopSettings
from seal_nb.server.loop import InnerLoop, load_inner_loop
from tests.ttt.tiny import save_tiny_model

QUESTIONS = [
    {"title": "T", "context": "c", "question": "what is it", "answer": "a lamp"},
    {"title": "T", "context": "c", "question": "where is it", "answer": "on the hill"},
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> InnerLoop:
    """With the usual numbers of slots and texts; its base is that of all tests in this file."""
    torch.set_num_threads(1)
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return load_inner_loop(InnerLoopSettings(model=str(folder), device="cpu", dtype="float32"))


@pytest.fixture
def loop(loaded: InnerLoop, tmp_path: Path) -> InnerLoop:
    return again(loaded, n_slots=2, decode_rows=64, adapters_dir=tmp_path / "adapters")


def again(loop: InnerLoop, **changed: object) -> InnerLoop:
    """A new inner loop on the same base, as in a fresh process."""
    settings = replace(loop.settings, **changed)  # type: ignore[arg-type]
    return InnerLoop(loop.base, loop.grader, settings, model_id=loop.model_id)


def request(request_id: str, **fields: object) -> TTTRequest:
    given = {
        "train_sequences": ["T\nthe lamp is on the hill"],
        "eval_questions": QUESTIONS,
        "finetune_epochs": 2,
        "lora_rank": 4,
        "max_new_tokens": 6,
        "seed": 5,
        "request_id": request_id,
    }
    return TTTRequest.model_validate(given | fields)


def run(loop: InnerLoop, *requests: TTTRequest | GenerateRequest) -> dict[str, TTTReply | GenerateReply | ErrorReply]:
    for r in requests:
        loop.submit(r)
    replies = {}
    while loop.busy:
        for reply in loop.advance():
            replies[str(reply.request_id)] = reply
    return replies


def test_unset_numbers_of_slots_and_texts_are_those_of_the_device(loaded: InnerLoop) -> None:
    assert loaded.stats()["slots"] == 8 and loaded.stats()["memory_bytes"] > 2**20 and loaded.decoder.max_rows.now == 64
    assert isinstance(run(loaded, request("a"))["a"], TTTReply)


def test_reply_has_the_published_fields_and_one_entry_a_question(loop: InnerLoop) -> None:
    reply = run(loop, request("a"))["a"]
    assert isinstance(reply, TTTReply)
    assert reply.train_steps == 2
    assert reply.train_tokens == 2 * len("T\nthe lamp is on the hill")
    assert len(reply.baseline_texts) == len(reply.adapter_texts) == len(reply.gains) == 2
    assert json.loads(reply.to_json())["seed"] == 5


@pytest.mark.parametrize("fields", [{"train_sequences": []}, {"skip_training": True}])
def test_baseline_only_repeats_the_baseline_and_gains_nothing(loop: InnerLoop, fields: dict) -> None:
    reply = run(loop, request("a", **fields))["a"]
    assert isinstance(reply, TTTReply)
    assert reply.adapter_texts == reply.baseline_texts
    assert (reply.adapter_gain, reply.train_steps) == (0.0, 0)


def test_of_the_bases_answers_the_newest_are_kept_and_none_is_missing_from_a_reply(
    loop: InnerLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seal_nb.server.loop.MOST_STORED", 3)
    asked = [[{**q, "question": f"{q['question']} {n}"} for q in QUESTIONS] for n in range(6)]
    replies = run(
        loop, *(request(str(n), eval_questions=e, soft_scores=True, skip_training=True) for n, e in enumerate(asked))
    )
    assert all(isinstance(r, TTTReply) and len(r.baseline_gold_logprobs) == 2 for r in replies.values())
    assert len(loop.baselines) == 3


def test_the_base_answers_each_question_once_however_many_requests_ask_it(loop: InnerLoop) -> None:
    run(loop, request("a"), request("b", seed=6))
    with_two = loop.decoder.n_tokens
    first_baselines = len(loop.baselines)
    run(loop, request("c", skip_training=True))
    assert (loop.decoder.n_tokens, len(loop.baselines)) == (with_two, first_baselines)


def test_a_request_gets_the_same_numbers_alone_and_in_company(loop: InnerLoop, tmp_path: Path) -> None:
    others = [request(f"o{i}", seed=i, lora_rank=2 + i, finetune_epochs=1 + i) for i in range(4)]
    together = run(loop, *others, request("a", soft_scores=True))["a"]
    alone = run(again(loop), request("a", soft_scores=True))["a"]
    assert isinstance(together, TTTReply) and isinstance(alone, TTTReply)
    assert together.adapter_texts == alone.adapter_texts
    assert together.adapter_gold_logprobs == pytest.approx(alone.adapter_gold_logprobs, rel=1e-4)


def test_training_raises_the_log_probability_of_what_was_trained(loop: InnerLoop) -> None:
    taught = request(
        "a",
        train_sequences=["Answer:\na lamp", "Answer:\non the hill"],
        finetune_epochs=30,
        finetune_lr=1e-2,
        soft_scores=True,
    )
    reply = run(loop, taught)["a"]
    assert isinstance(reply, TTTReply)
    pairs = zip(reply.baseline_gold_logprobs, reply.adapter_gold_logprobs, strict=True)
    assert all(after > before + 5 for before, after in pairs)
    assert reply.epoch_losses[-1] < reply.epoch_losses[0] / 3
    assert reply.gold_token_counts == [6, 11]


def test_sampled_padding_is_refused_by_name() -> None:
    assert request("a", pad_samples=0).pad_samples == 0, "the field is a part of protocol 1.0"
    with pytest.raises(ValidationError, match=r"pad_samples[\s\S]*no longer supported"):
        request("a", pad_samples=4)


def test_a_job_that_diverges_fails_alone_with_a_remedy(loop: InnerLoop) -> None:
    replies = run(loop, request("good"), request("bad", finetune_lr=1e38, finetune_epochs=5), request("next"))
    assert isinstance(replies["bad"], ErrorReply)
    assert "not finite" in replies["bad"].error and "finetune_lr" in replies["bad"].error
    for name in ("good", "next"):
        reply = replies[name]
        assert isinstance(reply, TTTReply) and all(x is not None for x in reply.epoch_losses)


@pytest.mark.parametrize(
    ("where", "error", "fields"),
    [
        ("seal_nb.ttt.trainer.make_row", KeyError, {"train_sequences": ["~ a"]}),
        ("seal_nb.server.loop.make_row", StopIteration, {"train_sequences": ["~ a"]}),
        ("seal_nb.server.loop.answered_with", TypeError, {"eval_questions": [{**QUESTIONS[0], "title": "~"}]}),
        ("seal_nb.protocol.build_reply", AssertionError, {}),
    ],
)
def test_whatever_error_a_request_causes_is_its_own_reply(
    loop: InnerLoop, where: str, error: type[Exception], fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = resolve_name(where)

    def strict(*given, **named):  # type: ignore[no-untyped-def]
        if any(isinstance(one, str) and "~" in one for one in (*given, *named.values())):
            raise error("x")
        return function(*given, **named)

    alone = run(again(loop), request("good", soft_scores=True))["good"]
    monkeypatch.setattr(where, strict)
    bad = request("~", soft_scores=True, return_token_logprobs=True, **fields)
    replies = run(loop, request("good", soft_scores=True), bad, request("next", seed=8))
    assert isinstance(replies["~"], ErrorReply) and error.__name__ in replies["~"].error
    good = replies["good"]
    assert isinstance(good, TTTReply) and isinstance(alone, TTTReply) and isinstance(replies["next"], TTTReply)
    assert good.adapter_texts == alone.adapter_texts
    assert good.adapter_gold_logprobs == pytest.approx(alone.adapter_gold_logprobs, rel=1e-4)
    assert good.epoch_losses == pytest.approx(alone.epoch_losses, rel=1e-4)


@pytest.mark.parametrize("passes", ["train", "answer", "score"])
def test_a_pass_that_fails_for_one_request_is_done_again_for_the_others(
    loop: InnerLoop, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {
        "train": request("bad", train_sequences=["~ a"]),
        "answer": request("bad", eval_questions=[{**QUESTIONS[0], "question": "~"}]),
        "score": request("bad", eval_questions=[{**QUESTIONS[0], "answer": "~"}], soft_scores=True),
    }[passes]
    run_base, tilde = loop.base.run, loop.base.encode("~")[0]

    def strict(ids, *rest):  # type: ignore[no-untyped-def]
        if tilde in ids:
            raise IndexError("index out of range in self")
        return run_base(ids, *rest)

    monkeypatch.setattr(loop.base, "run", strict)
    replies = run(loop, request("good", soft_scores=True), bad, request("next", seed=8))
    assert isinstance(replies["bad"], ErrorReply) and "index out of range" in replies["bad"].error
    assert all(isinstance(replies[name], TTTReply) for name in ("good", "next"))


def test_a_device_on_which_nothing_runs_any_more_ends_the_worker(
    loop: InnerLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    loop.submit(request("a"))
    monkeypatch.setattr(loop.base, "run", lost)
    with pytest.raises(torch.AcceleratorError):
        loop.advance()


def test_an_empty_stop_text_fails_its_own_request_only(loop: InnerLoop) -> None:
    ask = {"prompts": ["the "], "max_tokens": 3, "seed": 3}
    replies = run(
        loop, GenerateRequest(request_id="bad", stop=[""], **ask), GenerateRequest(request_id="good", stop=["~"], **ask)
    )
    assert isinstance(replies["bad"], ErrorReply) and isinstance(replies["good"], GenerateReply)


def test_unknown_targets_are_refused_with_the_names_the_model_has(loop: InnerLoop) -> None:
    with pytest.raises(SettingsError, match=r"'qkv'.*q_proj"):
        loop.submit(request("a", target_modules=["qkv"]))
    assert not loop.busy


def test_a_mask_that_covers_everything_is_an_error_not_a_silent_zero(loop: InnerLoop) -> None:
    reply = run(loop, request("a", end_mask_substring="the hill", train_sequences=["on the hill"]))["a"]
    assert isinstance(reply, ErrorReply) and "end_mask_substring" in reply.error


def test_a_full_disk_fails_the_request_and_not_the_process(loop: InnerLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seal_nb.peft_files.save_adapter", no_space)
    replies = run(loop, request("a", adapter_name="kept"), request("b"))
    assert isinstance(replies["a"], ErrorReply) and "No space left" in replies["a"].error
    assert isinstance(replies["b"], TTTReply)


def test_a_refused_request_leaves_nothing_behind(loop: InnerLoop) -> None:
    endless = [{"title": "T", "question": "what is it " * 500, "answer": "a"}]
    with pytest.raises(SettingsError, match="context 4096"):
        loop.submit(request("a", eval_questions=[*QUESTIONS, *endless]))
    assert not loop.requests
    replies = run(loop, request("b"))  # asks what the refused one had begun to ask
    assert isinstance(replies["b"], TTTReply) and list(replies) == ["b"]


def test_a_cancelled_id_asked_again_gets_the_new_content_only(loop: InnerLoop) -> None:
    run(loop, request("known", skip_training=True))
    loop.submit(request("x", skip_training=True))  # complete at once, not handed over yet
    loop.cancel("x")
    loop.submit(request("x", eval_questions=QUESTIONS[:1], skip_training=True))
    assert [len(reply.gains) for reply in loop.advance()] == [1]  # type: ignore[union-attr]


def test_an_adapter_is_stacked_once(loop: InnerLoop) -> None:
    run(loop, request("a", adapter_name="first"))
    with pytest.raises(SettingsError, match="once"):
        loop.submit(request("b", adapter_stack=["first", "first"]))


def test_a_steady_stream_of_texts_does_not_stop_training(loop: InnerLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seal_nb.server.loop.ANSWER_STEPS_A_PASS", 16)
    loop = again(loop, decode_rows=4)
    loop.submit(request("train", finetune_epochs=3, eval_questions=[]))
    replies: list[str] = []
    for i in range(100):
        if len(loop.requests) < 3:
            loop.submit(GenerateRequest(request_id=f"g{i}", prompts=["on and on "] * 2, max_tokens=40, seed=i))
        replies += [str(reply.request_id) for reply in loop.advance()]
        if "train" in replies:
            return
    raise AssertionError(f"100 slices and no training; {len(replies)} texts")


def test_cancel_frees_the_slot_and_the_rest_goes_on(loop: InnerLoop) -> None:
    loop.submit(request("a", finetune_epochs=500))
    loop.submit(request("b"))
    loop.advance()
    loop.cancel("a")
    replies = run(loop)
    assert list(replies) == ["b"]
    assert not loop.trainer.busy


def test_kept_adapters_stack_and_a_fresh_process_reads_them_from_disk(loop: InnerLoop) -> None:
    run(loop, request("a", adapter_name="first", finetune_lr=1e-2))
    on_top = request("b", adapter_stack=["first"], skip_training=True)
    here = run(loop, on_top)["b"]
    elsewhere = run(again(loop), on_top)["b"]
    plain = run(loop, request("c", skip_training=True))["c"]
    assert here.adapter_texts == elsewhere.adapter_texts != plain.adapter_texts  # type: ignore[union-attr]


def test_generation_repeats_with_its_seed_and_varies_between_prompts(loop: InnerLoop) -> None:
    ask = {"prompts": ["the ", "the "], "max_tokens": 12, "temperature": 1.0, "seed": 3}
    first = run(loop, GenerateRequest(request_id="a", **ask))["a"]
    again = run(loop, request("x"), GenerateRequest(request_id="b", **ask))["b"]
    assert isinstance(first, GenerateReply) and isinstance(again, GenerateReply)
    assert first.texts == again.texts
    assert first.texts[0] != first.texts[1]


def test_without_baseline_only_the_adapter_answers(loop: InnerLoop) -> None:
    reply = run(loop, request("a", skip_baseline=True))["a"]
    assert isinstance(reply, TTTReply)
    assert reply.baseline_accuracy is None and reply.baseline_texts == []
    assert len(reply.adapter_texts) == 2 and reply.gains == [None, None]


def test_the_likeliest_of_several_golds_is_the_soft_score_and_any_of_them_is_correct(loop: InnerLoop) -> None:
    answers, scores = ["a lamp", "x", "on the hill"], []
    for answer in answers:
        own = run(again(loop), request("a", eval_questions=[{**QUESTIONS[0], "answer": answer}], soft_scores=True))["a"]
        assert isinstance(own, TTTReply)
        scores.append((own.baseline_gold_logprobs[0], own.adapter_gold_logprobs[0], own.adapter_texts[0]))
    several = {**QUESTIONS[0], "answer": answers[0], "other_answers": answers[1:]}
    reply = run(again(loop), request("a", eval_questions=[several, QUESTIONS[1]], soft_scores=True))["a"]
    assert isinstance(reply, TTTReply)
    best = [max(of_one) for of_one in list(zip(*scores, strict=True))[:2]]
    found = [reply.baseline_gold_logprobs[0], reply.adapter_gold_logprobs[0]]
    assert found == pytest.approx(best, rel=1e-4) and len(reply.adapter_gold_logprobs) == 2
    said = [*answers[:2], scores[0][2] or "empty"]
    told = {**several, "answer": "zebra", "other_answers": said}
    graded = run(again(loop), request("a", eval_questions=[told]))["a"]
    assert isinstance(graded, TTTReply) and graded.adapter_correct == [bool(scores[0][2])]

"""Scores of single tokens: what the server gives back is what the model says, and is drawn as what it is."""

import json
import math

import pytest
import torch

from seal_nb.chain.local import _clean
from seal_nb.inspector.live import TokenTexts, token_frame
from seal_nb.protocol import ScoredText, TTTReply
from seal_nb.server.loop import InnerLoop, pieces
from tests.test_inner_loop import QUESTIONS, loaded, loop, request, run  # noqa: F401 - loaded, loop are fixtures

SEQUENCES = ["T\nthe lamp is on the hill", "T\nc"]


def reply_of(loop: InnerLoop, **fields: object) -> TTTReply:  # noqa: F811
    given = {"return_token_logprobs": True, "soft_scores": True, "train_sequences": SEQUENCES}
    reply = run(loop, request("a", **{**given, **fields}))["a"]
    assert isinstance(reply, TTTReply)
    return reply


def texts(reply: TTTReply, kind: str) -> list[ScoredText]:
    return [one for one in reply.token_logprobs if one.kind == kind]


def test_tokens_put_together_are_the_texts(loop: InnerLoop) -> None:  # noqa: F811
    reply = reply_of(loop)
    assert ["".join(one.tokens) for one in texts(reply, "train")] == SEQUENCES
    assert ["".join(one.tokens) for one in texts(reply, "gold")] == [q["answer"] for q in QUESTIONS]
    assert ["".join(one.tokens) for one in texts(reply, "passage")] == ["T\nc"], "once, however many ask"


def test_sums_over_a_gold_answer_are_its_soft_scores(loop: InnerLoop) -> None:  # noqa: F811
    reply = reply_of(loop)
    for side in ("baseline", "adapter"):
        sums = [math.fsum(getattr(one, f"{side}_logprobs")) for one in texts(reply, "gold")]
        assert sums == pytest.approx(getattr(reply, f"{side}_gold_logprobs"), abs=1e-4)


def test_values_without_an_adapter_are_those_of_the_model_itself(loop: InnerLoop) -> None:  # noqa: F811
    one = texts(reply_of(loop), "train")[0]
    ids = torch.tensor([loop.base.encode(SEQUENCES[0])])
    with torch.no_grad():
        hidden = loop.base.hidden(ids.tolist(), ())
    logprobs = loop.base.head(hidden).log_softmax(-1)
    expected = [float(logprobs[at, ids[0, at + 1]]) for at in range(ids.shape[1] - 1)]
    assert one.baseline_logprobs[0] is None, "nothing predicts the first token"
    assert one.baseline_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_training_makes_its_own_sequences_more_likely(loop: InnerLoop) -> None:  # noqa: F811
    reply = reply_of(loop, finetune_epochs=20, finetune_lr=1e-2)
    assert all(token_frame(one)["change"].sum() > 0 for one in texts(reply, "train"))


def test_tokens_behind_the_end_mask_alone_have_values(loop: InnerLoop) -> None:  # noqa: F811
    one = texts(reply_of(loop, end_mask_substring="is "), "train")[0]
    n_masked = len("T\nthe lamp is ")
    assert one.baseline_logprobs[:n_masked] == [None] * n_masked
    assert all(value is not None for value in one.baseline_logprobs[n_masked:])


def test_padding_in_the_loss_is_no_token_of_the_text(loop: InnerLoop) -> None:  # noqa: F811
    reply = reply_of(loop, padding_in_loss=True, pad_to=32)
    assert ["".join(one.tokens) for one in texts(reply, "train")] == SEQUENCES


def test_baseline_only_has_no_train_sequences_and_no_adapter_values(loop: InnerLoop) -> None:  # noqa: F811
    reply = reply_of(loop, skip_training=True)
    assert {one.kind for one in reply.token_logprobs} == {"gold", "passage"}
    assert all(one.adapter_logprobs == [] for one in reply.token_logprobs)


def test_nobody_gets_tokens_who_did_not_ask(loop: InnerLoop) -> None:  # noqa: F811
    assert reply_of(loop, return_token_logprobs=False).token_logprobs == []


def test_a_letter_of_several_tokens_stands_once_in_its_text(loop: InnerLoop) -> None:  # noqa: F811
    text = "Ø€ 🜚 end"
    ids, stretches = pieces(loop.base.tokenizer, text)
    assert "".join(stretches) == text and len(ids) == len(stretches) == len(text.encode())


def test_progress_counts_steps_and_its_finished_epochs_are_those_of_the_result(
    loop: InnerLoop,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("seal_nb.ttt.trainer.PROGRESS_EVERY_S", 0.0)
    loop.submit(request("a", train_sequences=SEQUENCES, finetune_epochs=3, gradient_accumulation_steps=2))
    told, replies = [], []
    while loop.busy:
        replies += loop.advance()
        told += [dict(mine) for mine in loop.stats()["training"].values()]
    assert [one["step"] for one in told] == sorted(one["step"] for one in told)
    assert {one["n_steps"] for one in told} == {3}
    assert told[-1]["epoch_losses"][:2] == pytest.approx(replies[0].epoch_losses[:2], rel=1e-5)


def test_progress_reads_the_device_no_oftener_than_it_is_told_to(
    loop: InnerLoop,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("seal_nb.ttt.trainer.PROGRESS_EVERY_S", 3600.0)
    assert loop.stats()["training"] == {}
    loop.submit(request("a"))
    loop.advance()
    assert loop.stats()["training"] == {}, "read a moment ago"
    while loop.busy:
        loop.advance()


SCORED = ScoredText(
    kind="gold", index=0, tokens=["<b>wh", "ale", "bone"], baseline_logprobs=[None, -6.0, -0.5],
    adapter_logprobs=[None, -1.0, -2.5],
)  # fmt: skip
WHO = [("Topic: T\nWho?", "a gold answer")]


def test_html_escapes_marks_and_names_the_numbers() -> None:
    shown = TokenTexts([SCORED], WHO).html()
    assert "&lt;b&gt;wh" in shown and "<b>ale</b>" in shown and "<u>bone</u>" in shown
    assert 'title="-6.00 → -1.00 nats (+5.00)"' in shown and 'class="sn-none"' in shown


def test_its_text_says_what_it_shows() -> None:
    said = TokenTexts([SCORED], WHO).in_words()
    assert "Who? (+3.0 nats): 1 of 2 tokens more likely with the adapter, 1 less; +3.0 nats in all" in said
    assert "the largest change +5.0 at 'ale'" in said


def test_colours_and_line_ends_stay_where_style_sheets_are_removed() -> None:
    """As on the pages of a run, which have none but their own."""
    shown = _clean(TokenTexts([SCORED], WHO).html())
    assert "white-space:pre-wrap" in shown and "background-color:rgba(0,114,178,0.60)" in shown


def test_a_text_without_an_adapter_has_no_change() -> None:
    alone = ScoredText(kind="gold", index=0, tokens=["a"], baseline_logprobs=[-1.0])
    assert token_frame(alone)["change"].isna().tolist() == [True]
    assert TokenTexts([alone], WHO).in_words() == "Who?: no values."


def test_progress_of_a_job_that_diverges_is_still_json(
    loop: InnerLoop,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("seal_nb.ttt.trainer.PROGRESS_EVERY_S", 0.0)
    loop.submit(request("a", train_sequences=SEQUENCES, finetune_epochs=3, finetune_lr=3e38))
    told = []
    while loop.busy:
        loop.advance()
        told += [dict(mine) for mine in loop.stats()["training"].values()]
    json.dumps(told, allow_nan=False)
    assert any(None in one["epoch_losses"] for one in told)

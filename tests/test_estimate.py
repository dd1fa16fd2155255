"""How much work a run is: counts that follow from its requests, time only at a measured speed."""

import pytest

from seal_nb.experiments.session import n_tokens, work_of, work_of_texts
from seal_nb.protocol import EvalQuestion, ServerStatus, TTTRequest

QUESTIONS = [EvalQuestion(question=text, answer="a") for text in ("one?", "two?")]
TEXT = "word " * 84  # 420 characters: 100 tokens


def request(**fields: object) -> TTTRequest:
    given = {"train_sequences": [TEXT, TEXT, TEXT], "eval_questions": QUESTIONS, "finetune_epochs": 10}
    return TTTRequest(**given | fields)  # type: ignore[arg-type]


def status(tokens_per_s: float) -> ServerStatus:
    fields = dict.fromkeys(ServerStatus.model_fields, 0)
    return ServerStatus.model_construct(**{**fields, "tokens_per_s": tokens_per_s})


def test_steps_tokens_and_answers_are_counted_and_a_baseline_answer_once() -> None:
    work = work_of([request(), request(seed=2)])
    assert (work.n_adapters, work.n_steps, work.train_tokens) == (2, 2 * 30, 2 * 10 * 300)
    assert work.n_answers == 2 * 2 + 2


@pytest.mark.parametrize(
    ("fields", "steps"), [({"batch_size": 2}, 20), ({"batch_size": 2, "gradient_accumulation_steps": 2}, 10)]
)
def test_a_last_batch_that_is_short_is_a_step_too(fields: dict[str, int], steps: int) -> None:
    assert work_of([request(**fields)]).n_steps == steps


def test_padding_in_the_loss_counts_every_padded_token_and_a_long_text_is_cut() -> None:
    assert work_of([request(padding_in_loss=True)]).train_tokens == 10 * 3 * 2048
    assert work_of([request(max_seq_length=50)]).train_tokens == 10 * 3 * 50


def test_questions_without_training_are_answers_only() -> None:
    work = work_of([request(skip_training=True)])
    assert (work.n_adapters, work.n_steps, work.train_tokens, work.n_answers) == (0, 0, 0, 2)


def test_time_and_cost_are_named_only_where_the_server_has_a_measured_speed() -> None:
    work = work_of([request()])
    counts = "1 adapters, 30 optimiser steps, about 3,000 tokens, at most 4 answers"
    assert work.sentence() == work.sentence(status(0.0), price_per_hour=9.0) == counts
    assert work.sentence(status(10.0)) == f"{counts}; 5 min of training at the 10 tokens/s of the last minute"
    assert work.sentence(status(10.0), price_per_hour=12.0).endswith("of the last minute, 1.00 at 12 an hour")


def test_texts_are_counted_at_most_and_cost_nothing_without_prices() -> None:
    said = work_of_texts([TEXT, TEXT], k_completions=5, max_tokens=64)
    assert said == "10 texts, about 1,000 prompt tokens, at most 640 new tokens"
    assert work_of_texts([TEXT], k_completions=1, max_tokens=1000, price_in=1e4, price_out=1e3).endswith("most 2.00")


def test_tokens_of_english_are_about_a_quarter_of_the_characters() -> None:
    assert n_tokens(TEXT) == 100 and n_tokens("") == 1

"""How much work a run is: counts that follow from its requests, time only at a measured speed."""

import pytest

from seal_nb.experiments.session import n_tokens, work_of, work_of_texts
from seal_nb.protocol import EvalQuestion, TTTRequest

QUESTIONS = [EvalQuestion(question=text, answer="a") for text in ("one?", "two?")]
TEXT = "word " * 84  # 420 characters: 100 tokens


def request(**fields: object) -> TTTRequest:
    given = {"train_sequences": [TEXT, TEXT, TEXT], "eval_questions": QUESTIONS, "finetune_epochs": 10}
    return TTTRequest(**given | fields)  # type: ignore[arg-type]


def test_steps_tokens_and_answers_are_counted_and_a_baseline_answer_once() -> None:
    said = work_of([request(), request(seed=2)])
    assert said == "2 adapters, 60 optimiser steps, about 6,000 tokens, at most 6 answers"


@pytest.mark.parametrize(
    ("fields", "steps"), [({"batch_size": 2}, 20), ({"batch_size": 2, "gradient_accumulation_steps": 2}, 10)]
)
def test_a_last_batch_that_is_short_is_a_step_too(fields: dict[str, int], steps: int) -> None:
    assert f"1 adapters, {steps} optimiser steps," in work_of([request(**fields)])


def test_padding_in_the_loss_counts_every_padded_token_and_a_long_text_is_cut() -> None:
    assert f"about {10 * 3 * 2048:,} tokens" in work_of([request(padding_in_loss=True)])
    assert f"about {10 * 3 * 50:,} tokens" in work_of([request(max_seq_length=50)])


def test_questions_without_training_are_answers_only() -> None:
    said = work_of([request(skip_training=True)], tokens_per_s=1.0)
    assert said == "0 adapters, 0 optimiser steps, about 0 tokens, at most 2 answers"


def test_time_and_cost_are_named_only_where_the_server_has_a_measured_speed() -> None:
    counts = "1 adapters, 30 optimiser steps, about 3,000 tokens, at most 4 answers"
    assert work_of([request()]) == work_of([request()], price_per_hour=9.0) == counts
    said = work_of([request()], tokens_per_s=10.0)
    assert said == f"{counts}; 5 min of training at the 10 tokens/s of the last minute"
    said = work_of([request()], tokens_per_s=10.0, price_per_hour=12.0)
    assert said.endswith("of the last minute, 1.00 at 12 an hour")


def test_texts_are_counted_at_most_and_cost_nothing_without_prices() -> None:
    said = work_of_texts([TEXT] * 10, max_tokens=64)
    assert said == "10 texts, about 1,000 prompt tokens, at most 640 new tokens"
    assert work_of_texts([TEXT], max_tokens=1000, price_in=1e4, price_out=1e3).endswith("most 2.00")


def test_tokens_of_english_are_about_a_quarter_of_the_characters() -> None:
    assert n_tokens(TEXT) == 100 and n_tokens("") == 1

"""Continual edits as requests: every edit stands on its sequence's own stack, and has a name of its own."""

from dataclasses import replace

import pytest

from seal_nb.errors import SettingsError
from seal_nb.experiments.continual import ContinualSettings, Edits, draw_sequences, edit_request, self_edit_request
from seal_nb.passages import Passage, Question
from seal_nb.protocol import Answers, build_reply
from seal_nb.results.continual import verdict_row

PASSAGES = [
    Passage(
        title=f"t{i}",
        context=f"context {i}",
        questions=tuple(Question(question=f"q{i}{j}", answer="a") for j in range(i + 1)),
    )
    for i in range(4)
]
SETTINGS = ContinualSettings(n_sequences=3, n_datapoints=3, seed=7)


def test_sequences_repeat_with_the_seed_and_never_hold_a_passage_twice() -> None:
    sequences = draw_sequences(PASSAGES, SETTINGS)
    assert sequences == draw_sequences(PASSAGES, SETTINGS)
    assert [len({p.title for p in sequence}) for sequence in sequences] == [3, 3, 3]
    assert sequences != draw_sequences(PASSAGES, ContinualSettings(n_sequences=3, n_datapoints=3, seed=8))


def test_more_passages_than_there_are_is_refused() -> None:
    with pytest.raises(SettingsError, match="n_datapoints=8"):
        draw_sequences(PASSAGES, ContinualSettings())


def test_an_edit_asks_all_passages_so_far_and_the_next_on_top_of_the_edits_before() -> None:
    edits = Edits(passages=PASSAGES, texts=["first"], stack=["edit-1"])
    request = edit_request(edits, "line 1\nline 2", SETTINGS, model_id="m")
    assert request.adapter_stack == ["edit-1"]
    assert request.train_sequences == ["t1\nline 1", "t1\nline 2", "t1\ncontext 1"]
    assert [q.title for q in request.eval_questions] == ["t0", "t1", "t1", "t2", "t2", "t2"], "and the next one"
    assert request.skip_baseline and request.adapter_name


def test_an_edit_is_named_after_what_it_is() -> None:
    def name(number: int = 0, text: str = "x", stack: tuple[str, ...] = (), model_id: str = "m") -> str:
        edits = Edits(number=number, passages=PASSAGES, texts=["earlier"] * len(stack), stack=list(stack))
        return str(edit_request(edits, text, SETTINGS, model_id=model_id).adapter_name)

    assert name() == name()
    others = {name(number=1), name(text="y"), name(stack=("edit-1",)), name(model_id="n")}
    assert len({name(), *others}) == 5


def test_the_model_with_all_edits_so_far_writes_the_next_self_edit() -> None:
    edits = Edits(passages=PASSAGES, texts=["one", "two"], stack=["edit-1", "edit-2"])
    request = self_edit_request(edits, SETTINGS, model_id="m")
    assert request.adapter_stack == ["edit-1", "edit-2"] and "context 2" in request.prompts[0]
    other = self_edit_request(replace(edits, number=1), SETTINGS, model_id="m")
    assert request.seed != other.seed and request.request_id != other.request_id


def test_a_row_of_the_matrix_has_the_verdicts_of_the_passages_asked_and_none_for_the_others() -> None:
    reply = build_reply(adapter=Answers(texts=["a"] * 3, verdicts=["CORRECT", "UNGRADED", "INCORRECT"]), baseline=None)
    assert verdict_row(reply.adapter_correct, [1, 2, 3], 2) == [[True], [None, False], None]
    with_next = build_reply(adapter=Answers(texts=["a"] * 6, verdicts=["CORRECT"] * 6), baseline=None)
    assert verdict_row(with_next.adapter_correct, [1, 2, 3], 2) == [[True], [True] * 2, [True] * 3]
    everything = build_reply(baseline=Answers(texts=["a"] * 6, verdicts=["CORRECT"] * 6))
    assert verdict_row(everything.adapter_correct, [1, 2, 3], 0) == [[True], [True] * 2, [True] * 3]

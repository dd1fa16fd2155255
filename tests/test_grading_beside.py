"""Grading in parallel with the inner loop: a slow judge delays no training, an outage costs one reply its verdicts."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.stand_in import stand_in
from seal_nb.errors import GradingError
from seal_nb.grading.base import Answered, Verdict
from seal_nb.grading.choose import grader_of
from seal_nb.processes import DaemonThreads
from seal_nb.protocol import ErrorReply, TTTReply, TTTRequest
from seal_nb.server.client import InnerLoopSettings
from seal_nb.server.loop import MOST_GRADED_AT_ONCE, InnerLoop, load_inner_loop
from tests.ttt.tiny import save_tiny_model

QUESTIONS = [{"title": "T", "context": "c", "question": "what is it", "answer": "a lamp"}]


class HeldGrader:
    """Grades once it is let go; records what it was given."""

    name = "held"

    def __init__(self, verdict: Verdict = Verdict.CORRECT) -> None:
        self.let_go, self.verdict = threading.Event(), verdict
        self.error: Exception | None = None
        self.given: list[Answered] = []

    def grade(self, answered: Sequence[Answered]) -> list[Verdict]:
        self.given += answered
        assert self.let_go.wait(60)
        if self.error:
            raise self.error
        return [self.verdict] * len(answered)


@pytest.fixture
def grader() -> HeldGrader:
    return HeldGrader()


@pytest.fixture
def loop(tmp_path: Path, grader: HeldGrader) -> InnerLoop:
    torch.set_num_threads(1)
    settings = InnerLoopSettings(
        model=str(save_tiny_model(tmp_path / "model")), device="cpu", dtype="float32", n_slots=2,
        adapters_dir=tmp_path / "adapters",
    )  # fmt: skip
    made = load_inner_loop(settings)
    made.grader = grader
    return made


def request(request_id: str, **fields: object) -> TTTRequest:
    given = {
        "train_sequences": ["T\nthe lamp is on the hill"], "eval_questions": QUESTIONS, "finetune_epochs": 1,
        "lora_rank": 2, "max_new_tokens": 3, "seed": 1, "request_id": request_id,
    }  # fmt: skip
    return TTTRequest.model_validate(given | fields)


def advance_until(loop: InnerLoop, n_gradings: int) -> None:
    for _ in range(1000):
        assert loop.advance() == []
        if len(loop.gradings) == n_gradings:
            return
    raise AssertionError(f"{len(loop.gradings)} requests wait for verdicts, not {n_gradings}")


def replies(loop: InnerLoop) -> dict[str, TTTReply | ErrorReply]:
    found = {}
    while loop.busy:
        found |= {str(reply.request_id): reply for reply in loop.advance()}
    return found


def test_later_requests_train_and_answer_while_earlier_ones_wait_for_their_verdicts(
    loop: InnerLoop, grader: HeldGrader
) -> None:
    for number in range(5):  # more than twice the slots
        loop.submit(request(f"r{number}", seed=number))
        advance_until(loop, number + 1)
        assert loop.free_slots == 4
    assert (loop.stats()["requests_in_grading"], loop.trainer.busy) == (5, False)
    grader.let_go.set()
    done = replies(loop)
    assert {reply.baseline_verdicts[0] for reply in done.values()} == {"CORRECT"}  # type: ignore[union-attr]
    assert set(done) == {f"r{number}" for number in range(5)}


def test_a_waiting_request_keeps_no_adapter_in_memory(loop: InnerLoop, grader: HeldGrader) -> None:
    loop.submit(request("a"))
    advance_until(loop, 1)
    trained = loop.requests["a"].trained  # type: ignore[union-attr]
    assert trained is not None and trained.adapter is None and trained.n_steps == 1
    grader.let_go.set()
    assert replies(loop)["a"].train_steps == 1  # type: ignore[union-attr]


def test_a_judge_that_is_far_behind_holds_new_work_off(loop: InnerLoop, grader: HeldGrader) -> None:
    for number in range(MOST_GRADED_AT_ONCE):
        loop.submit(request(f"r{number}", skip_training=True))
    advance_until(loop, MOST_GRADED_AT_ONCE)
    assert loop.free_slots == 0
    grader.let_go.set()
    replies(loop)
    assert loop.free_slots == 4


def test_a_grader_that_cannot_be_used_costs_the_verdicts_and_not_what_was_trained(
    loop: InnerLoop, grader: HeldGrader, caplog: pytest.LogCaptureFixture
) -> None:
    grader.error = GradingError("no room for the cache")
    grader.let_go.set()
    loop.submit(request("a"))
    reply = replies(loop)["a"]
    assert isinstance(reply, TTTReply) and len(reply.adapter_texts) == 1
    assert (reply.adapter_verdicts, reply.n_ungraded) == (["UNGRADED"], 1)
    assert "no room for the cache" in caplog.text


def test_a_grader_that_breaks_costs_its_own_request_only(loop: InnerLoop, grader: HeldGrader) -> None:
    grader.error = ValueError("not a text")
    grader.let_go.set()
    loop.submit(request("a"))
    failed = replies(loop)["a"]
    assert isinstance(failed, ErrorReply) and failed.error == "ValueError: not a text"
    grader.error = None
    loop.submit(request("b"))
    assert isinstance(replies(loop)["b"], TTTReply)


def test_ungraded_answers_are_missing_from_the_reply_and_not_wrong(loop: InnerLoop, grader: HeldGrader) -> None:
    grader.verdict = Verdict.UNGRADED
    grader.let_go.set()
    loop.submit(request("a"))
    reply = replies(loop)["a"]
    assert isinstance(reply, TTTReply)
    assert (reply.adapter_accuracy, reply.adapter_correct, reply.gains) == (None, [None], [None])
    assert reply.n_ungraded == 1


def test_a_request_cancelled_while_it_waits_is_never_answered(loop: InnerLoop, grader: HeldGrader) -> None:
    loop.submit(request("a"))
    advance_until(loop, 1)
    loop.cancel("a")
    assert not loop.busy
    loop.submit(request("a", seed=2))
    advance_until(loop, 1)
    grader.let_go.set()
    (reply,) = replies(loop).values()
    assert isinstance(reply, TTTReply) and reply.seed == 2


def test_a_judge_grades_what_the_loop_answers(tmp_path: Path) -> None:
    with stand_in(lambda asked: "yes" if "what is it" in asked.prompt else "no") as service:
        settings = InnerLoopSettings(
            model=str(save_tiny_model(tmp_path / "model")), device="cpu", dtype="float32", n_slots=1,
            adapters_dir=tmp_path / "adapters", grader=service.judge(tmp_path / "judge"),
        )  # fmt: skip
        loop = load_inner_loop(settings)
        asked = [*QUESTIONS, QUESTIONS[0] | {"question": "where is it"}]
        for number in range(3):
            loop.submit(request(f"r{number}", eval_questions=asked, seed=number))
        done = replies(loop)
    assert grader_of({"model": loop.model_id}) == "judge:stub"
    verdicts = {(q, w) for r in done.values() for q, w in enumerate(r.baseline_verdicts)}  # type: ignore[union-attr]
    assert verdicts <= {(0, "CORRECT"), (1, "INCORRECT"), (0, "INCORRECT")}
    baseline_prompts = {text for r in done.values() for text in r.baseline_texts if text}  # type: ignore[union-attr]
    assert max(service.times.values(), default=1) == 1, baseline_prompts  # each answer is paid for once


def test_threads_start_as_they_are_needed_and_raise_where_the_result_is_asked_for() -> None:
    threads = DaemonThreads(3)
    assert [threads.submit(lambda at=at: at * at).result(10) for at in range(5)] == [0, 1, 4, 9, 16]  # type: ignore[misc]
    failed = threads.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(10)


def test_a_call_not_yet_begun_can_be_cancelled() -> None:
    threads, held, ran = DaemonThreads(1), threading.Event(), []
    first = threads.submit(lambda: held.wait(10))
    second = threads.submit(lambda: ran.append(1))
    assert second.cancel()
    held.set()
    assert first.result(10)
    threads.submit(lambda: None).result(10)
    assert ran == []

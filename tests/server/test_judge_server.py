"""A real server that has its answers judged: workers share what is paid for, a missing key is told."""

from pathlib import Path

import pytest

from benchmarks.stand_in import stand_in
from seal_nb.errors import SealError
from seal_nb.experiments.session import served_model
from seal_nb.protocol import EvalQuestion, TTTReply, TTTRequest
from seal_nb.server.client import TTTClient
from seal_nb.server.launch import TTTServer
from tests.ttt.tiny import save_tiny_model

QUESTIONS = [EvalQuestion(title="Zor", question=f"What is moon {n}?", answer="Zor") for n in range(4)]


def request(number: int) -> TTTRequest:
    return TTTRequest(
        request_id=f"r{number}", seed=number, train_sequences=["Zor\nZor is a moon."],
        eval_questions=QUESTIONS, lora_rank=2, finetune_epochs=1, max_new_tokens=4,
    )  # fmt: skip


def test_workers_of_a_server_have_their_answers_judged_and_pay_for_each_once(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    with stand_in(lambda asked: "yes" if "moon 1" in asked.prompt else "no") as service:
        grader = service.judge(tmp_path / "judge")
        own = {"model": model, "device": "cpu", "dtype": "float32", "n_workers": 2, "grader": grader}
        with TTTServer(run_dir=tmp_path / "run", **own) as server, TTTClient(server.endpoint) as client:
            assert "judge:stub" in served_model(client)
            replies = [reply for _, reply in client.run_indexed([request(n) for n in range(8)])]
    assert all(isinstance(reply, TTTReply) for reply in replies)
    for reply in replies:
        assert isinstance(reply, TTTReply)
        for texts, verdicts in (
            (reply.baseline_texts, reply.baseline_verdicts),
            (reply.adapter_texts, reply.adapter_verdicts),
        ):
            expected = ["CORRECT" if n == 1 and text else "INCORRECT" for n, text in enumerate(texts)]
            assert verdicts == expected
        assert reply.timings["grade_s"] >= 0
    assert service.asked
    assert set(service.times.values()) == {1}


def test_a_server_whose_judge_has_no_key_says_so_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    model = str(save_tiny_model(tmp_path / "model"))
    own = {"model": model, "device": "cpu", "grader": "judge:m?api_key_env=NO_SUCH_KEY"}
    with (
        pytest.raises(SealError, match="NO_SUCH_KEY"),
        TTTServer(run_dir=tmp_path / "run", **own) as server,
        TTTClient(server.endpoint) as client,
    ):
        served_model(client, timeout_s=120)

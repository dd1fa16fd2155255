"""The judge against a real OpenAI-compatible server: a verdict is what the model said, and is paid once."""

import json
from pathlib import Path

import pytest

from seal_nb.engines.vllm import SERVED_NAME, VllmServer
from seal_nb.grading.base import Answered, Verdict
from seal_nb.grading.choose import make_grader
from seal_nb.grading.judge import JudgeGrader, read_verdict
from seal_nb.passages import load_passages

MAX_TOKENS = 8
KEY = "SEAL_NB_TEST_VLLM_KEY"  # the variable that holds the server's key


@pytest.fixture(autouse=True)
def key(server: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, server.key)


def judge(server: VllmServer, cache: Path) -> JudgeGrader:
    grader = make_grader(
        f"judge:{SERVED_NAME}?base_url={server.url}&api_key_env={KEY}&cache_dir={cache}"
        f"&max_tokens={MAX_TOKENS}&max_parallel=8&timeout_s=120"
    )
    assert isinstance(grader, JudgeGrader)
    return grader


def answers() -> list[Answered]:
    """The gold answers of a passage, and empty ones."""
    passage = load_passages("shipped:val")[0]
    return [
        Answered(title=passage.title, question=question.question, gold=question.answer, answer=answer)
        for question in passage.questions
        for answer in (question.answer, "I do not know.", "")
    ]


def test_every_answer_gets_what_the_model_said_of_it_and_is_asked_about_once(
    server: VllmServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grader, asked = judge(server, tmp_path), answers()
    verdicts = grader.grade(asked)
    said = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert len(said) == grader.client.usage.n_replies == sum(bool(one.answer) for one in asked)
    assert "UNGRADED" not in caplog.text
    assert all(0 < one["n_tokens"] <= MAX_TOKENS for one in said)
    replies = {one["prompt"]: one["reply"] for one in said}
    for one, verdict in zip(asked, verdicts, strict=True):
        mine = [reply for prompt, reply in replies.items() if one.answer and _asks_about(prompt, one)]
        assert verdict is (read_verdict(mine[0]) if mine else Verdict.INCORRECT)
    again = judge(server, tmp_path)
    assert again.grade(asked) == verdicts
    assert again.client.usage.n_replies == 0


def test_a_model_that_the_server_does_not_have_grades_nothing(
    server: VllmServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grader = make_grader(f"judge:nobody?base_url={server.url}&api_key_env={KEY}&cache_dir={tmp_path}&max_parallel=2")
    assert isinstance(grader, JudgeGrader)
    asked = [one for one in answers() if one.answer]
    assert set(grader.grade(asked)) == {Verdict.UNGRADED}
    assert "an answer stays UNGRADED" in caplog.text and "nobody" in caplog.text


def _asks_about(prompt: str, one: Answered) -> bool:
    return f"{one.question}\nGold answer: {one.gold}\nStudent answer: {one.answer}\n" in prompt

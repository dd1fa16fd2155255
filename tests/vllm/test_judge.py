"""The judge against a real OpenAI-compatible server: a verdict is what the model said, and is paid once."""

import json
import threading
from pathlib import Path

import pytest

from seal_nb.engines.api import ApiClient
from seal_nb.engines.base import Ask, Completion, CutOff
from seal_nb.engines.vllm import SERVED_NAME, VllmServer
from seal_nb.grading.base import Answered, Verdict
from seal_nb.grading.choose import make_grader
from seal_nb.grading.judge import JudgeGrader, read_verdict
from seal_nb.passages import load_passages
from seal_nb.prompts import grading_prompt

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


def test_an_answer_gets_what_the_model_said_of_it_and_only_replies_cut_before_a_verdict_are_asked_for_again(
    server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds for whatever the model says: some of its replies are usually cut, and some have a verdict."""
    asked = answers()
    prompts = {grading_prompt(one.title, one.question, one.gold, one.answer) for one in asked if one.answer}
    grader, said = judge(server, tmp_path), _recorded(monkeypatch)
    verdicts = grader.grade(asked)
    assert said.keys() == prompts
    assert grader.client.usage.n_replies == len(prompts)
    assert all(0 < reply.n_tokens <= MAX_TOKENS for reply in said.values())
    assert verdicts == [_verdict(one, said) for one in asked]

    is_cut = {prompt: reply.finish_reason == "length" for prompt, reply in said.items()}
    kept = {prompt for prompt, reply in said.items() if not is_cut[prompt] or _has_verdict(reply)}
    saved = [json.loads(text) for path in tmp_path.rglob("*.json") if (text := path.read_text())]
    assert {one["prompt"]: one["reply"] for one in saved} == {prompt: said[prompt].text for prompt in kept}

    before = dict(said)
    said.clear()
    assert judge(server, tmp_path).grade(asked) == [_verdict(one, before | said) for one in asked]
    assert said.keys() == prompts - kept


def test_a_model_that_the_server_does_not_have_grades_nothing(
    server: VllmServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grader = make_grader(f"judge:nobody?base_url={server.url}&api_key_env={KEY}&cache_dir={tmp_path}&max_parallel=2")
    assert isinstance(grader, JudgeGrader)
    asked = [one for one in answers() if one.answer]
    assert set(grader.grade(asked)) == {Verdict.UNGRADED}
    assert "an answer stays UNGRADED" in caplog.text and "nobody" in caplog.text


def _recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Completion]:
    """What the model says from now on, by prompt."""
    said: dict[str, Completion] = {}
    send = ApiClient.one

    def recording(client: ApiClient, ask: Ask, stopped: threading.Event | None = None) -> Completion:
        assert not isinstance(ask.prompt, str)
        prompt = ask.prompt[0]["content"]
        try:
            said[prompt] = send(client, ask, stopped)
        except CutOff:  # nothing but blanks
            said[prompt] = Completion(text="", n_tokens=MAX_TOKENS, finish_reason="length")
            raise
        return said[prompt]

    monkeypatch.setattr(ApiClient, "one", recording)
    return said


def _has_verdict(reply: Completion) -> bool:
    return read_verdict(reply.text) is not Verdict.UNGRADED


def _verdict(one: Answered, said: dict[str, Completion]) -> Verdict:
    """What must be graded: an empty answer is wrong without asking."""
    prompt = grading_prompt(one.title, one.question, one.gold, one.answer)
    return read_verdict(said[prompt].text) if one.answer else Verdict.INCORRECT

"""The judge against a service with faults: no wrong verdict, nothing paid twice, no key in messages or files."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stand_in import SILENCE, Answer, Asked, Behaviour, StandIn, error, stand_in, text
from seal_nb.errors import GradingError, SettingsError
from seal_nb.grading.base import Answered, Verdict
from seal_nb.grading.choose import make_grader
from seal_nb.grading.judge import judge_settings, read_verdict

WHO = "Who built the Oskavel tide clock?"


def answers(n: int, *, start: int = 0) -> list[Answered]:
    return [
        Answered(title="Oskavel", question=WHO, gold="Ilse Corvandt", answer=f"Ilse number {at}")
        for at in range(start, start + n)
    ]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def service() -> Iterator[StandIn]:
    with stand_in(lambda asked: "yes") as running:
        yield running


def test_published_grader_replies_are_read_as_published_or_left_ungraded(golden: Path) -> None:
    """What the published parser takes for yes is CORRECT; its "no" is one only where "no" alone was said."""
    cases = json.loads((golden / "golden/edge_cases.json").read_text())["parse_yes_no"]
    read = {case["text"]: read_verdict(case["text"]) for case in cases}
    assert len(cases) == 16
    assert all(read[case["text"]] is Verdict.CORRECT for case in cases if case["expected"])
    assert {text for text, verdict in read.items() if verdict is Verdict.INCORRECT} == {"no", "No."}
    assert {text for text, verdict in read.items() if verdict is Verdict.UNGRADED} == {
        "", "maybe", "yesterday", "y", "yes and no", "Yes, no doubt",
    }  # fmt: skip


@given(st.lists(st.sampled_from(["yes", "no", "Yes.", "know", "yesterday", "\n", "maybe", "NO"])).map(" ".join))
def test_a_verdict_needs_exactly_one_of_the_two_words(reply: str) -> None:
    words = set(reply.lower().replace(".", " ").split()) & {"yes", "no"}
    expected = {("yes",): Verdict.CORRECT, ("no",): Verdict.INCORRECT}.get(tuple(words), Verdict.UNGRADED)
    assert read_verdict(reply) is expected


def test_the_published_question_is_asked_byte_for_byte(golden: Path, service: StandIn, tmp_path: Path) -> None:
    lines = (golden / "golden/answer_and_grade_prompts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    texts = ("title", "question", "gold", "answer")
    make_grader(service.judge(tmp_path)).grade([Answered(**{name: r[name] for name in texts}) for r in records])
    assert len(records) == 23
    assert set(service.prompts) == {record["grade_prompt"] for record in records}


# How the service behaves, the verdict, the calls, and whether a second grading asks again. Which failures the client
# retries is tested in test_engines_api.py.
FAULTS: dict[str, tuple[Behaviour, Verdict, int, bool]] = {
    "500, twice": (lambda a: error(500) if a.nth < 3 else "no", Verdict.INCORRECT, 3, False),
    "500, always": (lambda a: Answer(status=500, body=b"yes"), Verdict.UNGRADED, 3, True),
    "no reply in time, ever": (lambda a: SILENCE, Verdict.UNGRADED, 3, True),
    "junk": (lambda a: Answer(body=b"<html>yes</html>"), Verdict.UNGRADED, 1, True),
    "refused": (lambda a: error(400, "yes"), Verdict.UNGRADED, 1, True),
    "maybe": (lambda a: "maybe", Verdict.UNGRADED, 1, False),
    "both": (lambda a: "Yes and no.", Verdict.UNGRADED, 1, False),
    "nothing": (lambda a: "", Verdict.UNGRADED, 1, False),
    "thinking, then no": (lambda a: "<think>yes, no, wait, yes</think> no", Verdict.INCORRECT, 1, False),
    "thinking that began in the prompt": (lambda a: "no, wait\n</think>\nyes", Verdict.CORRECT, 1, False),
    "thinking alone": (lambda a: "<think>yes", Verdict.UNGRADED, 1, True),
    "thinking that used up max_tokens": (lambda a: cut("<think>yes"), Verdict.UNGRADED, 1, True),
    "nothing, cut": (lambda a: cut(""), Verdict.UNGRADED, 1, True),
    "an argument that was cut": (lambda a: cut("The student says"), Verdict.UNGRADED, 1, True),
    "a verdict and what was cut": (lambda a: cut("No, because"), Verdict.INCORRECT, 1, False),
    "another name of the end": (
        lambda a: text("no", finish_reason="eos_token", chat=True),
        Verdict.INCORRECT,
        1,
        False,
    ),
    "refuses temperature": (
        lambda a: error(400, "'temperature' is not supported") if "temperature" in a.body else "no",
        Verdict.INCORRECT,
        2,
        False,
    ),
}


def cut(said: str) -> Answer:
    return text(said, finish_reason="length", chat=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_service_is_never_a_verdict(service: StandIn, tmp_path: Path, fault: str) -> None:
    behave, verdict, n_calls, asks_again = FAULTS[fault]
    service.behave = behave
    grader = make_grader(service.judge(tmp_path, timeout_s=0.3))
    assert grader.grade(answers(1)) == [verdict]
    assert len(service.asked) == n_calls
    service.behave = lambda asked: "yes"
    assert grader.grade(answers(1)) == [Verdict.CORRECT if asks_again else verdict]
    assert len(service.asked) == n_calls + asks_again


def test_thinking_that_used_up_the_tokens_is_told_once_with_the_setting_to_raise(
    service: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service.behave = lambda asked: Answer(body=b"<html>") if "number 0" in asked.prompt else cut("")
    make_grader(service.judge(tmp_path, max_parallel=1)).grade(answers(9))
    _, told = [record.getMessage() for record in caplog.records]
    assert "cut at max_tokens=16" in told and "raise max_tokens" in told


def test_a_reply_says_which_parameters_the_service_did_not_take(service: StandIn, tmp_path: Path) -> None:
    service.behave = lambda asked: error(400, "Unknown parameter: 'top_p'") if "top_p" in asked.body else "no"
    make_grader(service.judge(tmp_path)).grade(answers(1))
    (kept,) = tmp_path.rglob("*.json")
    assert json.loads(kept.read_text())["not_sent"] == ["top_p"]


# What older versions kept of a reply, its tokens of 16, the verdict today, and whether it is asked for again.
OLD = {
    "<think>no, wait, yes</think> no": (9, "INCORRECT", False),
    "<think>no, wait, yes": (9, "CORRECT", True),
    "": (16, "CORRECT", True),
    "The student says that": (16, "CORRECT", True),
    "It depends.": (4, "UNGRADED", False),
    "No, because of a long": (16, "INCORRECT", False),
}


@pytest.mark.parametrize("said", OLD)
def test_what_an_older_version_kept_is_read_again_and_asked_again_only_if_it_was_cut(
    service: StandIn, tmp_path: Path, said: str
) -> None:
    n_tokens, verdict, is_asked = OLD[said]
    name = service.judge(tmp_path)
    make_grader(name).grade(answers(1))
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text(json.dumps({"reply": said, "model": "stub", "n_tokens": n_tokens, "prompt": "p"}))
    for _ in range(2):
        assert [one.value for one in make_grader(name).grade(answers(1))] == [verdict]
    assert len(service.asked) == 1 + is_asked


def test_a_judge_at_azure_keeps_its_query(service: StandIn, tmp_path: Path) -> None:
    name = service.judge(tmp_path, base_url=f"{service.url}/?api-version=2024-10-21")
    assert make_grader(name).grade(answers(1)) == [Verdict.CORRECT]
    assert service.asked[0].path == "/v1/chat/completions?api-version=2024-10-21"


def test_only_what_failed_is_asked_again(service: StandIn, tmp_path: Path) -> None:
    service.behave = lambda asked: error(500) if "number 3" in asked.prompt else "yes"
    name, asked = service.judge(tmp_path, max_attempts=1), answers(6)
    first = make_grader(name).grade(asked)
    assert [v is Verdict.UNGRADED for v in first] == [at == 3 for at in range(6)]
    service.behave = lambda asked: "no"
    second = make_grader(name).grade(asked)
    assert [v.value for v in second] == ["CORRECT"] * 3 + ["INCORRECT"] + ["CORRECT"] * 2
    assert len(service.asked) == 7


def test_wrong_key_is_found_out_once_and_not_for_every_answer(
    service: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service.behave = lambda asked: error(401, "bad key")
    grader = make_grader(service.judge(tmp_path, max_parallel=4))
    with caplog.at_level(logging.WARNING):
        assert set(grader.grade(answers(200))) == {Verdict.UNGRADED}
    assert 1 <= len(service.asked) <= 4
    assert "bad key" in caplog.text and "401" in caplog.text


def test_a_service_that_is_down_is_not_asked_about_every_answer_and_none_of_them_is_saved(
    service: StandIn, tmp_path: Path
) -> None:
    name = service.judge(tmp_path, max_attempts=1, max_parallel=2)
    assert make_grader(name).grade(answers(1)) == [Verdict.CORRECT]
    service.behave = lambda asked: error(503)
    asked = [*answers(100, start=1), *answers(1)]
    assert make_grader(name).grade(asked) == [*[Verdict.UNGRADED] * 100, Verdict.CORRECT], (
        "the saved reply still counts"
    )
    assert len(service.asked) <= 1 + 16 + 2
    service.behave = lambda asked: "no"
    assert make_grader(name).grade(asked) == [*[Verdict.INCORRECT] * 100, Verdict.CORRECT]


def test_each_kind_of_failure_is_logged_once_however_many_messages_it_has(
    service: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service.behave = lambda asked: error(400, f"message {asked.number}")
    grader = make_grader(service.judge(tmp_path, max_parallel=1))
    grader.grade(answers(30))
    service.behave = lambda asked: error(422, "another kind")
    grader.grade(answers(30))
    logged = [record.getMessage() for record in caplog.records if "UNGRADED" in record.getMessage()]
    assert len(logged) == 2 and "message 0" in logged[0] and "another kind" in logged[1]


def test_empty_answers_and_golds_cost_nothing_and_equal_answers_cost_once(service: StandIn, tmp_path: Path) -> None:
    (one,) = answers(1)
    empty = [Answered(question=WHO, gold=gold, answer=answer) for gold, answer in (("x", ""), ("x", " \n"), ("", "x"))]
    verdicts = make_grader(service.judge(tmp_path)).grade([*empty, one, one, one])
    assert [v.value for v in verdicts] == ["INCORRECT", "INCORRECT", "UNGRADED"] + ["CORRECT"] * 3
    assert len(service.asked) == 1


@pytest.mark.parametrize("changed", ["question", "gold", "answer", "title", "model"])
def test_a_reply_is_kept_for_its_content_and_model_only(service: StandIn, tmp_path: Path, changed: str) -> None:
    fields = {"title": "t", "question": "q", "gold": "g", "answer": "a"}
    make_grader(service.judge(tmp_path)).grade([Answered(**fields)])
    model = "other" if changed == "model" else "stub"
    other = Answered(**fields) if changed == "model" else Answered(**fields | {changed: "x"})
    make_grader(service.judge(tmp_path, model=model)).grade([other])
    assert len(service.asked) == 2


def test_another_service_s_model_of_the_same_name_is_asked_anew(service: StandIn, tmp_path: Path) -> None:
    assert make_grader(service.judge(tmp_path)).grade(answers(1)) == [Verdict.CORRECT]
    with stand_in(lambda asked: "no") as other:
        assert make_grader(other.judge(tmp_path)).grade(answers(1)) == [Verdict.INCORRECT]
    assert make_grader(service.judge(tmp_path)).grade(answers(1)) == [Verdict.CORRECT]
    assert len(service.asked) == 1


def test_as_many_calls_at_a_time_as_allowed_and_no_more(service: StandIn, tmp_path: Path) -> None:
    together = threading.Barrier(5)  # breaks, and the test fails, unless five are under way at once

    def meet(asked: Asked) -> str:
        together.wait(20)
        return "yes"

    service.behave = meet
    grader = make_grader(service.judge(tmp_path, max_parallel=5, timeout_s=30))
    half = [threading.Thread(target=grader.grade, args=(answers(10, start=10 * at),)) for at in range(2)]
    for thread in half:
        thread.start()
    for thread in half:
        thread.join()
    assert (len(service.asked), service.most_at_once) == (20, 5)


def grading_process(name: str, n: int) -> "subprocess.Popen[str]":
    code = (
        "from seal_nb.grading.choose import make_grader; from seal_nb.grading.base import Answered\n"
        f"asked = [Answered(title='Oskavel', question={WHO!r}, gold='Ilse Corvandt', answer=f'Ilse number {{at}}')\n"
        f"         for at in range({n})]\n"
        f"print(*make_grader({name!r}).grade(asked))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_processes_that_grade_the_same_answers_pay_once(service: StandIn, tmp_path: Path) -> None:
    service.behave = lambda asked: time.sleep(0.02) or ("yes" if "number 1" in asked.prompt else "no")
    processes = [grading_process(service.judge(tmp_path), 60) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert said[0] == said[1]
    assert said[0].count("CORRECT") == 11 and said[0].count("INCORRECT") == 49
    assert set(service.times.values()) == {1} and len(service.asked) == 60


def test_a_request_that_broke_off_counts_as_none(service: StandIn) -> None:
    port = urlsplit(service.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{}")
        line.shutdown(socket.SHUT_WR)
        assert line.recv(1) == b""
    assert service.asked == []


def test_killed_in_the_middle_and_started_again_pays_only_for_what_was_under_way(
    service: StandIn, tmp_path: Path
) -> None:
    enough = threading.Event()

    def slowly(asked: Asked) -> str:
        if len(service.asked) > 20:
            enough.set()
        time.sleep(0.02)
        return "yes"

    service.behave = slowly
    name = service.judge(tmp_path, max_parallel=4)
    process = grading_process(name, 80)
    assert enough.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    n_before = len(service.asked)
    assert 20 < n_before < 80
    assert make_grader(name).grade(answers(80)) == [Verdict.CORRECT] * 80
    assert len(service.times) == 80
    assert len(service.asked) - 80 <= 4  # what was under way when it was killed, at most


@pytest.mark.parametrize("left", [b"", b'{"reply": "ye', b"[]", b"\x00\x00"])
def test_a_torn_reply_on_the_disk_is_asked_again_and_mended(service: StandIn, tmp_path: Path, left: bytes) -> None:
    name = service.judge(tmp_path)
    make_grader(name).grade(answers(1))
    (kept,) = tmp_path.rglob("*.json")
    kept.write_bytes(left)
    for _ in range(2):
        assert make_grader(name).grade(answers(1)) == [Verdict.CORRECT]
    assert len(service.asked) == 2
    assert json.loads(kept.read_text())["reply"] == "yes"


def test_a_cache_that_cannot_be_used_is_an_error_and_not_a_verdict(service: StandIn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GradingError, match="cache_dir"):
        make_grader(service.judge(tmp_path / "file")).grade(answers(1))
    assert len(service.asked) == 0


def test_the_key_comes_from_the_named_variable_and_stands_nowhere_else(
    service: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-0123456789")
    service.behave = lambda asked: error(400, "key secret-0123456789?")
    grader = make_grader(service.judge(tmp_path, api_key_env="SOME_KEY"))
    with caplog.at_level(logging.DEBUG):
        grader.grade(answers(1))
        service.behave = lambda asked: "yes"
        grader.grade(answers(1))
    assert {asked.headers["authorization"] for asked in service.asked} == {"Bearer secret-0123456789"}
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "Ilse number 0" in written
    for shown in (written, caplog.text, repr(grader.__dict__.get("settings")), grader.name):
        assert "secret-0123456789" not in shown


def test_a_key_that_is_not_there_is_told_before_anything_is_asked(
    service: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setattr("seal_nb.engines.api.DOTENV", tmp_path / ".env")
    with pytest.raises(SettingsError, match="NO_SUCH_KEY"):
        make_grader(service.judge(tmp_path, api_key_env="NO_SUCH_KEY"))
    (tmp_path / ".env").write_text("NO_SUCH_KEY=from-the-file\n")
    make_grader(service.judge(tmp_path, api_key_env="NO_SUCH_KEY")).grade(answers(1))
    assert {asked.headers["authorization"] for asked in service.asked} == {"Bearer from-the-file"}


def test_settings_in_a_name() -> None:
    one = judge_settings("judge:org/model:1b?base_url=http://h:1/v1&max_parallel=3&timeout_s=2.5&cache_dir=/x")
    assert (one.model, str(one.cache_dir)) == ("org/model:1b", "/x")
    assert (one.base_url, one.max_parallel, one.timeout_s) == ("http://h:1/v1", 3, 2.5)
    assert judge_settings("judge").model == "gpt-4.1"
    assert judge_settings("judge?api_key_env=").api_key_env == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("judge:", "no model"),
        ("judge:m?max_paralel=3", "'max_paralel' is unknown; known are max_tokens, cache_dir, base_url"),
        ("judge:m?max_parallel=many", "max_parallel='many'"),
        ("judge:m?max_parallel=0", "max_parallel=0"),
        ("judge:m?base_url=nowhere", "base_url='nowhere'"),
        ("judge:m?novalue", "an option has no value"),
        ("judgement", "known are local, exact, f1, recall, judge:MODEL"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_with_field_and_remedy(name: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        make_grader(name)
    assert said in str(refused.value)


def test_interrupted_grading_asks_nothing_more(service: StandIn, tmp_path: Path) -> None:
    def slowly(asked: Asked) -> str:
        if asked.number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return "yes"

    service.behave = slowly
    with pytest.raises(KeyboardInterrupt):
        make_grader(service.judge(tmp_path, max_parallel=2)).grade(answers(500))
    time.sleep(0.3)  # the calls under way end
    n_calls = len(service.asked)
    time.sleep(0.3)
    assert len(service.asked) == n_calls < 10


def test_grading_works_at_once_after_an_interrupted_one(service: StandIn, tmp_path: Path) -> None:
    def limited(asked: Asked) -> Answer:
        os.kill(os.getpid(), signal.SIGINT)
        return error(429, retry_after="30")

    service.behave = limited
    grader = make_grader(service.judge(tmp_path, max_parallel=1, timeout_s=30))
    with pytest.raises(KeyboardInterrupt):
        grader.grade(answers(3))
    service.behave = lambda asked: "yes"
    began = time.monotonic()
    assert grader.grade(answers(3)) == [Verdict.CORRECT] * 3
    assert time.monotonic() - began < 10

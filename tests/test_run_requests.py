"""A run asks only for what its journal lacks, keeps every reply, and never takes a failure for one."""

from pathlib import Path

import pytest

from seal_nb.errors import RemoteError, RoundTimeout, SettingsError
from seal_nb.experiments.session import run_requests, served_model, ttt_client
from seal_nb.experiments.single_passage import identified
from seal_nb.grading.choose import check_grader
from seal_nb.protocol import EvalQuestion, TTTRequest
from seal_nb.server.client import TTTClient
from seal_nb.storage import Journal
from tests.server.conftest import (  # the stub server, with its real processes
    HASTE,
    STUB,
    server,  # noqa: F401
)


def request(text: str) -> TTTRequest:
    question = EvalQuestion(question="q", answer="a")
    return identified(TTTRequest(train_sequences=[text], eval_questions=[question], seed=1), "stub")


@pytest.fixture
def client(server):  # noqa: F811
    with TTTClient(server.endpoint, timeout_s=30, wait_s=10) as client:
        yield client


def test_replies_come_in_the_order_of_the_requests_and_are_journalled(client, tmp_path: Path) -> None:
    requests = [request("sleep 0.3"), request("b"), request("c")]
    with Journal(tmp_path / "j.jsonl") as journal:
        collected = run_requests(client, requests, journal)
        assert list(collected.replies) == [r.request_id for r in requests]
        assert all(r.request_id in journal for r in requests)
    assert [reply.adapter_texts for reply in collected.in_order(requests)] == [["a"]] * 3


def test_what_the_journal_holds_is_not_asked_again(client, tmp_path: Path) -> None:
    class Unasked:
        def run_indexed(self, requests: list[TTTRequest]) -> list[object]:
            assert requests == []
            return []

    with Journal(tmp_path / "j.jsonl") as journal:
        first = run_requests(client, [request("d")], journal)
        again = run_requests(Unasked(), [request("d")], journal)  # type: ignore[arg-type]
    assert again == first


def test_a_failure_is_kept_apart_and_asked_for_again(client, tmp_path: Path) -> None:
    requests = [request("fail"), request("e")]
    with Journal(tmp_path / "j.jsonl") as journal:
        collected = run_requests(client, requests, journal)
        assert requests[0].request_id not in journal
    assert list(collected.replies) == [requests[1].request_id]
    assert "the loss is not a number" in collected.failures[str(requests[0].request_id)]
    with pytest.raises(RemoteError, match="the loss is not a number"):
        collected.in_order(requests)


def test_equal_requests_are_one_inner_loop(client, tmp_path: Path) -> None:
    told: list[str] = []
    with Journal(tmp_path / "j.jsonl") as journal:
        collected = run_requests(client, [request("f"), request("f")], journal, tell=told.append)
    assert len(collected.replies) == 1 and told == ["inner loops: 1 of 1"]


def test_progress_is_short_however_many_there_are(client, tmp_path: Path) -> None:
    told: list[str] = []
    with Journal(tmp_path / "j.jsonl") as journal:
        run_requests(client, [request(f"n{i}") for i in range(57)], journal, tell=told.append)
    assert len(told) == 10 and told[-1] == "inner loops: 57 of 57"


def test_an_endpoint_is_used_and_no_server_started(server, tmp_path: Path) -> None:  # noqa: F811
    with ttt_client(server.endpoint, run_dir=tmp_path / "own", model="missing") as client:
        assert served_model(client) == "stub"
    assert not (tmp_path / "own").exists()


def test_a_server_that_is_not_there_is_waited_for_as_long_as_is_said(tmp_path: Path) -> None:
    where = str(tmp_path / "endpoint.json")
    with ttt_client(where, run_dir=tmp_path, wait_s=0.3) as client, pytest.raises(RoundTimeout, match="within 0.3 s"):
        served_model(client)


@pytest.mark.parametrize(
    ("stated", "served", "is_refused"),
    [
        ("", "local", False), ("local", "local", False), ("recall", "local", True), ("local", "recall", True),
        ("judge", "judge:gpt-4.1", False), ("judge:gpt-4.1?base_url=http://x/v1", "judge:gpt-4.1", False),
        ("judge:other", "judge:gpt-4.1", True), ("local", "judge:gpt-4.1", True), ("", "judge:o", False),
    ],
)  # fmt: skip
def test_a_grader_that_is_stated_and_is_not_the_server_s_is_refused(stated: str, served: str, is_refused: bool) -> None:
    model_id = f"0123456789abcdef-float32-{served}-2048-deterministic"
    if is_refused:
        with pytest.raises(SettingsError, match=f"grader is '{stated}', .* at here grades by '{served}'"):
            check_grader(stated, model_id, where="here")
    else:
        check_grader(stated, model_id, where="here")


def test_a_model_id_that_names_no_grader_fits_any() -> None:
    check_grader("local", "stub", where="here")


def test_an_empty_grader_starts_a_server_with_the_default_one(tmp_path: Path) -> None:
    own = {"inner_loop": STUB, "model": "stub-own", "grader": "", **HASTE}
    with ttt_client("", run_dir=tmp_path, **own) as client:
        assert served_model(client) == "stub-own"


def test_a_request_without_an_id_is_a_mistake(client, tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal, pytest.raises(ValueError, match="no id"):
        run_requests(client, [TTTRequest(train_sequences=["x"])], journal)

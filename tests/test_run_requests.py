"""A run asks only for what its journal lacks, keeps every reply, and never takes a failure for one."""

from pathlib import Path

import pytest

from seal_nb.errors import ProtocolError, RemoteError, RoundTimeout, SettingsError
from seal_nb.experiments.continual import continual
from seal_nb.experiments.session import TTT, ask, connect, identified, ttt_server
from seal_nb.grading.choose import check_grader
from seal_nb.passages import load_passages
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
def ttt(server):  # noqa: F811
    with TTT(TTTClient(server.endpoint, timeout_s=30, wait_s=10)) as ttt:
        yield ttt


def test_replies_come_in_the_order_of_the_requests_and_are_journalled(ttt, tmp_path: Path) -> None:
    requests = [request("sleep 0.3"), request("b"), request("c")]
    with Journal(tmp_path / "j.jsonl") as journal:
        collected = ask(ttt, requests, journal)
        assert list(collected.replies) == [r.request_id for r in requests]
        assert all(r.request_id in journal for r in requests)
    assert [collected.of(request).adapter_texts for request in requests] == [["a"]] * 3


def test_what_the_journal_holds_is_not_asked_again(ttt, tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        first = ask(ttt, [request("d")], journal)
        answered = ttt.client.status().counts["answered"]
        assert ask(ttt, [request("d")], journal) == first
        assert ttt.client.status().counts["answered"] == answered


def test_a_failure_is_kept_apart_and_asked_for_again(ttt, tmp_path: Path) -> None:
    requests = [request("fail"), request("e")]
    with Journal(tmp_path / "j.jsonl") as journal:
        collected = ask(ttt, requests, journal)
        assert requests[0].request_id not in journal
    assert list(collected.replies) == [requests[1].request_id]
    assert "the loss is not a number" in collected.failures[str(requests[0].request_id)]
    with pytest.raises(RemoteError, match="the loss is not a number"):
        collected.of(requests[0])


def test_equal_requests_are_one_inner_loop(ttt, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        collected = ask(ttt, [request("f"), request("f")], journal)
    assert len(collected.replies) == 1
    assert "adapters: 1 of 1" in capsys.readouterr().out


def test_progress_is_short_however_many_there_are(ttt, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        ask(ttt, [request(f"n{i}") for i in range(57)], journal)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[-1] == "adapters: 57 of 57"


def test_an_endpoint_is_used_and_no_server_started(server, tmp_path: Path) -> None:  # noqa: F811
    with ttt_server("missing", endpoint=server.endpoint, folder=tmp_path / "own") as ttt:
        assert ttt.model_id == "stub" and ttt.server is None
    assert not (tmp_path / "own").exists()


def test_a_missing_server_is_waited_for_wait_s(tmp_path: Path) -> None:
    with connect(str(tmp_path / "endpoint.json"), wait_s=0.3) as ttt, pytest.raises(RoundTimeout, match="within 0.3 s"):
        _ = ttt.model_id


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


def test_an_own_server_has_the_default_grader_and_starts_at_its_first_use(tmp_path: Path) -> None:
    with ttt_server("stub-own", folder=tmp_path, inner_loop=STUB, **HASTE) as ttt:
        assert not ttt.server.is_up() and not list(tmp_path.iterdir())
        assert ttt.model_id == "stub-own" and ttt.server.is_up()
    with pytest.raises(SettingsError, match="this TTT server is closed; call ttt_server or connect again"):
        ttt.generate("text")
    assert not ttt.server.is_up()


@pytest.mark.parametrize(
    ("grader", "said"),
    [
        ("guess", "known are local, "),
        ("judge:m?api_key_env=NOT_THERE", "NOT_THERE"),
        ("judge:m?colour=1", "'colour' is unknown"),
    ],
)
def test_a_grader_that_cannot_work_is_refused_before_a_server_starts(grader: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        ttt_server("stub-own", folder=tmp_path, grader=grader, inner_loop=STUB)


def test_a_text_to_generate_is_checked_before_a_server_starts(tmp_path: Path) -> None:
    with ttt_server("stub-own", folder=tmp_path, inner_loop=STUB) as ttt:
        with pytest.raises(ProtocolError, match="field 'temperature' is -1"):
            ttt.generate("text", temperature=-1)
        assert ttt.server.process is None


def test_a_server_whose_settings_are_not_known_is_no_base_for_merged_edits(tmp_path: Path) -> None:
    with connect("tcp://127.0.0.1:1") as ttt, pytest.raises(SettingsError, match="are not known; open it with"):
        continual(ttt, load_passages("shipped:val"), strategies="merged", n_datapoints=2, folder=tmp_path)


def test_another_server_has_the_settings_of_this_one(server, tmp_path: Path) -> None:  # noqa: F811
    own = {"inner_loop": STUB, "n_threads": 2, **HASTE}
    with (
        ttt_server("stub-own", endpoint=server.endpoint, folder=tmp_path, **own) as ttt,
        ttt.another("stub-other", folder=tmp_path / "other") as other,
    ):
        assert other.model_id == "stub-other" and other.settings.n_threads == 2
    with connect(server.endpoint) as ttt, pytest.raises(SettingsError, match="are not known; open it with ttt_server"):
        ttt.another("stub-other", folder=tmp_path / "third")


def test_a_setting_that_is_unknown_is_refused_with_an_endpoint_too(server, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(SettingsError, match="does not know .'n_worker'"):
        ttt_server(endpoint=server.endpoint, folder=tmp_path, n_worker=2)


def test_a_request_without_an_id_is_a_mistake(ttt, tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal, pytest.raises(ValueError, match="no id"):
        ask(ttt, [TTTRequest(train_sequences=["x"])], journal)

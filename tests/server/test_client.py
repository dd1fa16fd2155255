"""The client against a scripted server: what it sends again, to whom, and what it never sends twice."""

import json
import threading
from contextlib import contextmanager

import pytest
import zmq

from seal_nb.errors import ProtocolError, RemoteError, RoundTimeout
from seal_nb.protocol import Answers, TTTRequest, build_reply
from seal_nb.server import client as connection
from seal_nb.server.client import TTTClient
from tests.server.conftest import eventually

REPLY = build_reply(baseline=Answers(texts=[], verdicts=[])).to_json()
REQUEST = TTTRequest(train_sequences=["a"], request_id="r")


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    for name, seconds in {"PING_S": 0.1, "SILENT_S": 0.4, "TRY_LATER_S": 0.05, "TURN_S": 0.02}.items():
        monkeypatch.setattr(connection, name, seconds)


class Scripted:
    """A server that answers pings as ``server_id`` and anything else with what ``script`` says."""

    def __init__(self, script, server_id="one", endpoint="tcp://127.0.0.1:*"):
        self.script, self.server_id = script, server_id
        self.seen, self.n_pings, self.silent = [], 0, False
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        eventually(lambda: self._bound(endpoint))
        self.endpoint = self.socket.last_endpoint.decode().rstrip("\0")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _bound(self, endpoint):
        """ZMQ lets go of a closed socket's address a little later."""
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError:
            return False
        return True

    def _run(self):
        while not self._stop.is_set():
            if self.socket.poll(20):
                *envelope, body = self.socket.recv_multipart()
                for reply in self.answers(json.loads(body)):
                    self.socket.send_multipart([*envelope, reply])
        self.socket.close()

    def answers(self, message):
        if self.silent:
            return []
        if message.get("cmd") == "ping":
            self.n_pings += 1
            return [json.dumps({"status": "alive", "server_id": self.server_id}).encode()]
        self.seen.append(message)
        return self.script(len(self.seen), message)

    def stop(self):
        self._stop.set()
        self._thread.join()


@contextmanager
def serving(script, **options):
    server = Scripted(script, **options)
    try:
        yield server
    finally:
        server.stop()


def error(text):
    return json.dumps({"error": text}).encode()


def test_not_now_is_sent_again_and_a_failure_of_the_request_is_not():
    said = {1: [error("QueueFull: full")], 2: [error("ServerStopping: bye")], 3: [REPLY], 4: [error("EngineError: x")]}
    with serving(lambda n, _: said[n]) as server, TTTClient(server.endpoint) as client:
        assert client.evaluate(REQUEST).baseline_accuracy == 0.0
        assert len(server.seen) == 3
        with pytest.raises(RemoteError, match="EngineError"):
            client.evaluate(REQUEST)
    assert len(server.seen) == 4


def test_a_second_or_late_reply_is_skipped():
    late = json.loads(REPLY) | {"model_id": "late"}

    def script(n, _):
        return [] if n == 1 else [REPLY, json.dumps(late).encode()]

    with serving(script) as server, TTTClient(server.endpoint) as client:
        with pytest.raises(RoundTimeout):
            client.evaluate(REQUEST, timeout_s=0.2)
        assert [client.evaluate(REQUEST).model_id for _ in range(3)] == ["", "", ""]


def test_silence_makes_the_client_connect_anew_and_ask_again():
    with serving(lambda n, _: [REPLY] if n > 1 else []) as server, TTTClient(server.endpoint) as client:
        threading.Timer(0.3, lambda: setattr(server, "silent", True)).start()
        threading.Timer(1.2, lambda: setattr(server, "silent", False)).start()
        assert client.evaluate(REQUEST, timeout_s=10).baseline_accuracy == 0.0
    assert server.seen[0] == server.seen[1]


def test_a_server_that_came_back_under_the_same_address_is_sent_what_is_open():
    with serving(lambda *_: []) as first, TTTClient(first.endpoint) as client:

        def swap():
            first.stop()
            replaced.append(Scripted(lambda *_: [REPLY], server_id="two", endpoint=first.endpoint))

        replaced = []
        threading.Timer(0.3, swap).start()
        try:
            assert client.evaluate(REQUEST, timeout_s=10).baseline_accuracy == 0.0
            assert client.server_id == "two"
        finally:
            replaced[0].stop()


def test_a_shutdown_is_not_sent_to_the_servers_successor():
    with serving(lambda *_: []) as first, TTTClient(first.endpoint) as client:

        def swap():
            first.stop()
            replaced.append(Scripted(lambda *_: [b'{"status": "bye"}'], server_id="two", endpoint=first.endpoint))

        replaced = []
        threading.Timer(0.3, swap).start()
        try:
            with pytest.raises(RoundTimeout):
                client.shutdown(timeout_s=1.5)
            assert [message["cmd"] for message in first.seen] == ["shutdown"]
            assert replaced[0].seen == []
        finally:
            replaced[0].stop()


def test_nothing_is_sent_to_a_server_that_the_endpoint_file_does_not_speak_of(tmp_path):
    with serving(lambda *_: [REPLY], server_id="another") as server:
        fields = {"endpoint": server.endpoint, "worker_endpoint": "", "host": "h", "port": 1, "pid": 1}
        fields |= {"job_id": "", "started_at": "", "server_id": "the one", "run_dir": ""}
        (tmp_path / "endpoint.json").write_text(json.dumps(fields))
        with TTTClient(tmp_path / "endpoint.json", wait_s=0.8) as client:
            with pytest.raises(RoundTimeout, match="server there is another, the endpoint file names the one"):
                client.evaluate(REQUEST)
            (tmp_path / "endpoint.json").write_text(json.dumps({**fields, "server_id": "another"}))
            assert client.evaluate(REQUEST).baseline_accuracy == 0.0
    assert len(server.seen) == 1


def test_a_reply_that_is_none_is_an_error_that_says_so():
    with (
        serving(lambda *_: [b'{"baseline_accuracy": "high"}']) as server,
        TTTClient(server.endpoint) as client,
        pytest.raises(ProtocolError, match="baseline_accuracy"),
    ):
        client.evaluate(REQUEST)


def test_a_round_that_is_left_early_leaves_nothing_behind(in_haste, monkeypatch):
    monkeypatch.setattr("seal_nb.server.client.DEFAULT_WINDOW", 2)
    with serving(lambda *_: [REPLY]) as server, TTTClient(server.endpoint) as client:
        for _ in client.run_round([REQUEST.model_copy(update={"request_id": f"r{i}"}) for i in range(9)]):
            break
        assert client.evaluate(REQUEST).baseline_accuracy == 0.0
        assert not client._open
    assert len(server.seen) <= 4


def test_a_server_without_keys_on_another_machine_needs_its_address_only():
    with serving(lambda *_: [REPLY], endpoint="tcp://0.0.0.0:*") as server, TTTClient(server.endpoint) as client:
        assert client.evaluate(REQUEST).baseline_accuracy == 0.0


def test_an_address_of_another_machine_without_an_answer_is_told_of_the_endpoint_file():
    with (
        TTTClient("tcp://0.0.0.0:9", wait_s=0.5) as client,
        pytest.raises(RoundTimeout, match=r"it is silent; a server of seal-nb on another machine needs keys: give its"),
    ):
        client.status()

"""What strangers, clients and workers can do to each other: attacks on real servers, over their sockets."""

import ctypes
import json
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
import zmq.auth

from seal_nb.errors import ProtocolError, RemoteError, RunMismatch, SettingsError
from seal_nb.protocol import EvalQuestion, ServerStatus, TTTRequest, error_reply, parse_request
from seal_nb.server import endpoint as endpoint_module
from seal_nb.server.client import SECRET_MARK, ServeSettings, TTTClient, status_text
from seal_nb.server.endpoint import allowed_keys, connected, load_pair, make_keys
from seal_nb.server.requests import QueueFull, RequestTable, Worker
from seal_nb.server.worker import MAX_REPLY_BYTES, pack, unpack
from tests import read_journal
from tests.server.conftest import HASTE, STUB, eventually, in_background, plain_req
from tests.server.test_server import PUBLISHED, ask, sequence

MIB = 2**20
ABOUT = {"worker_id": "impostor", "host": "elsewhere", "pid": 1, "model_id": "stub"}


@contextmanager
def dealer(endpoint, *, pair=None, server_key="", name=b"", hwm=1000):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger, socket.rcvhwm, socket.rcvtimeo = 0, hwm, 20_000
        if name:
            socket.setsockopt(zmq.ROUTING_ID, name)
        if pair:
            socket.curve_publickey, socket.curve_secretkey = pair
            socket.curve_serverkey = server_key.encode()
        socket.connect(endpoint)
        yield socket


def send(socket, **fields):
    socket.send_multipart([b"", json.dumps(fields).encode()])


def receive(socket):
    return json.loads(socket.recv_multipart()[-1])


def n_files(pid):
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


def new_pair(folder, name):
    public, secret = map(Path, zmq.auth.create_certificates(folder, name))
    secret.chmod(0o600)
    return public, secret


# ---- other clients


def test_nobody_cancels_the_request_of_another(server, client):
    with TTTClient(server.endpoint, timeout_s=30) as victim, plain_req(server.info.endpoint) as stranger:
        outcome = in_background(lambda: victim.evaluate(sequence("sleep 1.5", request_id="private")))
        eventually(lambda: client.status().n_running)
        assert not client.cancel("private")
        assert ask(stranger, {"cmd": "cancel", "request_id": "private"})["status"] == "unknown"
        assert outcome().adapter_gain == 1.0


def test_who_joined_a_request_and_cancels_it_ends_only_the_own_waiting(server, client):
    with TTTClient(server.endpoint, timeout_s=30) as first, TTTClient(server.endpoint, timeout_s=30) as second:
        request = sequence("sleep 1.5", request_id="shared")
        one = in_background(lambda: first.evaluate(request))
        eventually(lambda: client.status().n_running)
        other = in_background(lambda: dict(second.run_indexed([request])))
        eventually(lambda: second.cancel("shared"))
        assert other()[0].ename == "Cancelled" and one().adapter_gain == 1.0


def test_no_id_that_a_client_can_send_is_that_of_a_request_without_id(tmp_path):
    table = RequestTable(ServeSettings(run_dir=tmp_path, n_workers=0), "s1", lock_wait_s=0)
    table.queue.join(b"w", Worker(capacity=100, seen_at=0, stepped_at=0))
    for envelope in ((b"req", b""), (b"dealer", b"m", b"")):
        table.accept(parse_request(PUBLISHED), b"{}", envelope, 1.0)
    table.accept(parse_request({**PUBLISHED, "request_id": "mine"}), b"{}", (b"c", b""), 1.0, guest="ab12")
    keys = [request.key for request in table.queue.assignments(2.0)]
    assert len(set(keys)) == 3
    for key in keys:
        with pytest.raises(ProtocolError, match="request_id"):
            parse_request({**PUBLISHED, "request_id": key})
    table.close()


def test_a_secret_mark_names_a_request_on_any_connection_and_a_short_one_only_on_its_own(tmp_path):
    table = RequestTable(ServeSettings(run_dir=tmp_path, n_workers=0), "s1", lock_wait_s=0)
    for connection in (b"a", b"b"):
        table.accept(parse_request(PUBLISHED), b"{}", (connection, SECRET_MARK + b"s" * 16 + b"1", b""), 1.0)
        table.accept(parse_request(PUBLISHED), b"{}", (connection, b"job-000000000000001", b""), 1.0)
    assert len(table.queue.requests) == 3
    table.close()


# ---- who reads nothing, or sends rubbish


def test_clients_that_do_not_read_hold_a_bounded_amount_of_memory_and_others_are_answered(start_server):
    server = start_server(max_unread_bytes=2 * MIB)
    big = {
        "request_id": "big",
        "eval_questions": [{"question": "?", "answer": "x" * MIB}],
        "train_sequences": ["quick"],
    }
    with TTTClient(server.endpoint) as client, ExitStack() as stack:
        with plain_req(server.info.endpoint) as req:
            assert ask(req, big)["adapter_gain"] == 1.0
        before = client.status().rss_bytes
        deaf = [stack.enter_context(dealer(server.info.endpoint, hwm=1)) for _ in range(3)]
        for socket in deaf:
            for _ in range(40):
                send(socket, **big)  # 1 MB; the reply has 1 MB too
                client.status()  # so that what has arrived is no large part of the memory
        eventually(lambda: client.status().counts.get("undelivered", 0) > 60)
        assert client.status().rss_bytes - before < 60 * MIB
        assert client.evaluate(sequence("quick")).adapter_gain == 1.0
        for socket in deaf:  # who reads again is served again
            with plain_req(server.info.endpoint) as req:
                assert ask(req, big)["adapter_gain"] == 1.0
            assert receive(socket)["adapter_gain"] == 1.0


def test_a_client_that_reads_too_slowly_gets_every_reply_in_the_end(start_server):
    server = start_server(max_unread_bytes=1)
    question = EvalQuestion(question="?", answer="x" * MIB)
    requests = [TTTRequest(train_sequences=["q"], eval_questions=[question], request_id=f"r{i}") for i in range(24)]
    with TTTClient(server.endpoint, timeout_s=60) as client, TTTClient(server.endpoint) as other:
        client._context.setsockopt(zmq.RCVHWM, 1)
        client._context.setsockopt(zmq.RCVBUF, 2**16)
        replies = client.run_round(requests)
        got = [next(replies).request_id]
        eventually(lambda: other.status().counts.get("answered", 0) == len(requests))
        assert other.status().counts["undelivered"] > 0
        got += [reply.request_id for reply in replies]
        assert sorted(got) == sorted(request.request_id for request in requests)


@pytest.mark.parametrize(
    "body",
    [
        b'{"train_sequences": [%b""]}' % (b'"",' * 6_000_000),
        b'{"eval_questions": [%b[]]}' % (b"[]," * 6_000_000),
        b'{"a": "%b' % (b'\\"' * 9_000_000),
        b'"' * 18_000_000,
    ],
    ids=["texts", "lists", "a text without end", "quotes"],
)
def test_a_message_with_millions_of_values_is_refused_before_it_is_read(server, body):
    with plain_req(server.info.endpoint) as req:
        began_bytes = ask(req, {"cmd": "status"})["rss_bytes"]
        req.send(body)
        assert "ProtocolError" in req.recv_json()["error"]
        assert ask(req, {"cmd": "status"})["rss_bytes"] - began_bytes < 150 * MIB  # as objects: a gigabyte


def test_padding_that_would_fill_the_memory_is_refused_by_field():
    fields = {"train_sequences": ["a"] * 1000, "padding_in_loss": True, "batch_size": 1000, "pad_to": 2**20}
    with pytest.raises(ProtocolError, match=r"field 'pad_to' is 1048576: times 1000 sequences.*lower one") as refused:
        parse_request(fields)
    assert refused.value.field == "pad_to"
    with pytest.raises(ProtocolError, match="field 'pad_to' is 2048: times 20000"):  # its default counts too
        parse_request({**fields, "train_sequences": ["a"] * 20_000, "batch_size": 20_000, "pad_to": None})
    assert parse_request({**fields, "padding_in_loss": False}) and parse_request({**fields, "pad_to": 2048})


def test_a_route_that_is_kept_with_a_request_is_bounded(server):
    with dealer(server.info.endpoint) as socket:
        socket.send_multipart([b"m" * 10_000, b"", json.dumps(PUBLISHED).encode()])
        assert "more than 1000 bytes" in receive(socket)["error"]


def test_a_server_without_free_file_descriptors_goes_on_when_there_are_some_again(start_server):
    server = start_server()
    pid = server.process.pid
    n_open = n_files(pid)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (n_open + 8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(dealer(server.info.endpoint))
        eventually(lambda: n_files(pid) >= n_open + 8)
        time.sleep(1.5)  # it looks at its files once a second
    with plain_req(server.info.endpoint) as req:
        assert ask(req, PUBLISHED)["adapter_gain"] == 1.0


def test_names_that_are_the_next_numbers_of_anonymous_connections_do_not_end_the_server(server):
    rand = ctypes.CDLL(None)
    rand.srand(1)  # as where nobody calls it; ZMQ draws each socket's first number so
    firsts = [(rand.rand() | rand.rand() << 31) % 2**32 for _ in range(4)]
    with ExitStack() as stack:
        for number in [first + n for first in firsts for n in range(100)]:
            stack.enter_context(dealer(server.info.endpoint, name=b"\0" + number.to_bytes(4, "big")))
        for _ in range(40):
            with plain_req(server.info.endpoint) as req:
                assert ask(req, {"cmd": "ping"})["status"] == "alive"
    assert server.is_up()


def test_a_message_of_very_many_frames_is_refused_and_the_workers_stay(server, client):
    with dealer(server.info.endpoint) as socket:
        socket.send_multipart([b"", *[b""] * 300_000, json.dumps(PUBLISHED).encode()])
        assert "one frame" in receive(socket)["error"]
        send(socket, **PUBLISHED)
        assert receive(socket)["adapter_gain"] == 1.0
    assert not client.status().counts.get("workers_lost")


def test_connections_take_turns_with_large_messages(start_server):
    server = start_server(n_workers=0)
    large = {**PUBLISHED, "train_sequences": ["x" * 300_000]}
    with dealer(server.info.endpoint) as greedy, dealer(server.info.endpoint) as other:
        for _ in range(150):
            send(greedy, **large)
        with plain_req(server.info.endpoint) as req:
            eventually(lambda: ask(req, {"cmd": "status"})["counts"].get("accepted", 0) > 5)
            send(other, **{**large, "lora_rank": 0})
            assert "lora_rank" in receive(other)["error"]
            assert ask(req, {"cmd": "status"})["counts"]["accepted"] < 150


@pytest.mark.parametrize("text", ["\ud800", "x" * 10**7])
def test_any_error_becomes_a_reply(text):
    assert len(json.loads(error_reply(ValueError(text)).to_json())["error"]) <= 10_100


# ---- workers


def test_a_process_without_a_workers_key_gets_no_request_and_answers_none(start_server, tmp_path):
    server = start_server()
    _, secret = new_pair(tmp_path, "stranger")
    keys = {"none": None, "a stranger's": load_pair(secret), "a client's": load_pair(key_of(server, "client"))}
    with TTTClient(server.endpoint) as client, ExitStack() as stack:
        for pair in keys.values():
            socket = dealer(server.info.worker_endpoint, pair=pair, server_key=server.info.worker_key)
            ready = pack("ready", session=0, capacity=99, stats={}, steps=1, **ABOUT)
            stack.enter_context(socket).send_multipart(ready)
        eventually(lambda: client.status().counts["denied"] >= 3)
        assert client.evaluate(sequence("quick", request_id="a")).adapter_gain == 1.0
        assert [worker.worker_id for worker in client.status().workers] != ["impostor"]
        assert not server.info.public_key  # clients on loopback need none


@pytest.fixture
def false_worker(start_server):
    """A server without workers, and a socket with the worker's key."""
    server = start_server(n_workers=0)
    context = zmq.Context()
    with connected(context, server.info, "worker", name=b"false") as socket:
        yield SimpleNamespace(server=server, socket=socket)
    context.destroy(linger=0)


def test_wrong_statistics_of_a_worker_do_not_spoil_the_status(false_worker):
    nan = {"rss_bytes": float("nan"), "gpu_bytes": "many", "gpu_peak_bytes": 1e999, "slots": None, "x": [float("inf")]}
    ready = {"session": 0, "stats": {}, "steps": 1, **ABOUT}
    for wrong in ({"pid": "x"}, {"host": 7}, {"worker_id": [1]}, {"model_id": {}}):
        false_worker.socket.send_multipart(pack("ready", **{**ready, "capacity": 1, **wrong}))
    false_worker.socket.send_multipart(pack("ready", **ready, capacity=10**400))
    lease = unpack(false_worker.socket.recv_multipart())[1]["lease"]
    deep = json.loads("[" * 400 + "]" * 400)
    for unwritable in ({"deep": deep}, {"half": "\ud800"}):
        false_worker.socket.send_multipart(pack("beat", lease=lease, capacity=1, steps=2, stats=unwritable))
    false_worker.socket.send_multipart(pack("ready", **{**ready, "worker_id": "a\nb", "capacity": 1, "session": 9}))
    false_worker.socket.send_multipart(pack("beat", lease=lease, capacity=-5, steps=2, stats=nan))
    assert unpack(false_worker.socket.recv_multipart())[0] == "beat"
    with TTTClient(false_worker.server.endpoint) as client:
        status = client.status()
        assert isinstance(status, ServerStatus) and len(status.workers) == 1 and status.n_slots == 0
        assert "workers 0 MiB\n" in status_text(status)


def test_the_text_of_a_workers_failure_reaches_no_client(false_worker):
    ready = pack("ready", session=0, capacity=1, stats={}, steps=1, **ABOUT)
    false_worker.socket.send_multipart(ready)
    with TTTClient(false_worker.server.endpoint) as client, plain_req(false_worker.server.info.endpoint) as req:
        eventually(lambda: client.status().workers)
        req.send_json(PUBLISHED)
        eventually(lambda: client.status().n_running)
        text = "ValueError: bad text 'a passage of the owner'"
        false_worker.socket.send_multipart(pack("failed", pid=1, error=text, traceback=text))
        trouble = eventually(lambda: client.status().trouble)
        assert "ValueError" in trouble and "passage" not in trouble
        false_worker.socket.send_multipart(ready)
        eventually(lambda: client.status().n_running)
        job = next(m for m in iter(lambda: unpack(false_worker.socket.recv_multipart()), None) if m[0] == "job")
        while false_worker.socket.poll(200):  # of its tries, the current one
            job = message if (message := unpack(false_worker.socket.recv_multipart()))[0] == "job" else job
        body = error_reply(ValueError("x")).to_json()
        false_worker.socket.send_multipart(pack("result", body, token=job[1]["token"], error="\ud800", tokens=0))
        assert "ValueError" in req.recv_json()["error"]
        assert client.status().counts["failed.Error"] == 1


def test_a_worker_that_sends_without_end_does_not_keep_a_silent_one(start_server):
    server, over = start_server(n_workers=0, lease_s=1.0), threading.Event()
    with zmq.Context() as context, TTTClient(server.endpoint) as client:
        loud, silent = (connected(context, server.info, "worker", name=name) for name in (b"loud", b"silent"))
        for number, socket in enumerate((loud, silent)):
            about = {**ABOUT, "worker_id": f"w{number}"}
            socket.send_multipart(pack("ready", session=0, capacity=1, stats={}, steps=1, **about))
        lease = unpack(loud.recv_multipart())[1]["lease"]
        assert len(eventually(lambda: (w := client.status().workers) and len(w) == 2 and w)) == 2

        def flood():
            beat = pack("beat", lease=lease, capacity=1, steps=1, stats={})
            while not over.is_set():
                with suppress(zmq.Again):
                    loud.send_multipart(beat, zmq.NOBLOCK)
                while loud.poll(0):
                    loud.recv_multipart()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            eventually(lambda: [worker.worker_id for worker in client.status().workers] == ["w0"])
        finally:
            over.set()
            thread.join()
            loud.close(0)
            silent.close(0)


def test_a_result_that_is_not_json_is_an_error_and_the_journal_stays_readable(false_worker):
    server, socket = false_worker.server, false_worker.socket
    socket.send_multipart(pack("ready", session=0, capacity=9, stats={}, steps=1, **ABOUT))
    with plain_req(server.info.endpoint) as req:
        for body in (b"{]}", b'{"a": NaN}', b'{"a": "\xff"}', b'{}, "reply": {}', b"", b'{"hello": 1}'):
            req.send_json({**PUBLISHED, "request_id": "r"})
            while (message := unpack(socket.recv_multipart()))[0] != "job":
                pass
            socket.send_multipart(pack("result", body, token=message[1]["token"], error="", tokens=0))
            assert "cannot be used" in req.recv_json()["error"]
        req.send_json({**PUBLISHED, "request_id": "r"})
        job = next(m for m in iter(lambda: unpack(socket.recv_multipart()), None) if m[0] == "job")
        socket.send_multipart(pack("result", b'{"error": "x"}', token=job[1]["token"], error="", tokens=0))
        assert req.recv_json() == {"error": "x"}
        status = ask(req, {"cmd": "status"})
        socket.send_multipart(pack("result", b"x" * (2 * MAX_REPLY_BYTES + 1), token="x", error="", tokens=0))
        assert ask(req, {"cmd": "status"})["rss_bytes"] - status["rss_bytes"] < 100 * MIB
    assert read_journal(server.settings.run_dir / "results.journal.jsonl") == {}


# ---- clients with keys of their own


def key_of(server, name):
    return server.settings.run_dir / "keys" / f"{name}.key_secret"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server whose clients need keys, on loopback; `keyed.guests` are the key files of two who may connect."""
    from seal_nb.server.client import TTTServer

    folder = tmp_path_factory.mktemp("keyed")
    with TTTServer(run_dir=folder / "run", inner_loop=STUB, client_keys=True, **HASTE) as server:
        guests = []
        for name in ("ann", "ben"):
            public, secret = new_pair(folder, name)
            public.rename(folder / "run" / "keys" / "allowed_clients" / f"{name}.key")
            guests.append(secret)
        yield SimpleNamespace(server=server, guests=guests)


@pytest.fixture
def three(keyed):
    """Clients with the owner's key and with those of two guests."""
    with ExitStack() as stack:
        where, files = keyed.server.endpoint, (None, *keyed.guests)
        yield [stack.enter_context(TTTClient(where, timeout_s=20, wait_s=20, key_file=f)) for f in files]


def test_with_client_keys_nobody_comes_in_on_loopback_without_one(keyed):
    with plain_req(keyed.server.info.endpoint, timeout_ms=500) as req, pytest.raises(zmq.Again):
        ask(req, {"cmd": "ping"})


def test_a_guest_may_neither_end_the_server_nor_touch_the_adapters_of_others(three, keyed):
    owner, ann, ben = three
    assert owner.evaluate(sequence("quick", adapter_name="of-owner")).adapter_gain == 1.0
    assert ann.evaluate(sequence("quick", adapter_name="of-ann")).adapter_gain == 1.0
    for attack in (
        lambda: ann.shutdown(),
        lambda: ann.forget(["of-owner"]),
        lambda: ben.forget(["of-ann"]),
        lambda: ann.evaluate(sequence("quick", adapter_name="of-owner")),
        lambda: ben.evaluate(sequence("quick", adapter_name="of-ann")),
    ):
        with pytest.raises(RemoteError, match=r"another client's|only the owner's key"):
            attack()
    assert ben.evaluate(sequence("quick", adapter_stack=["of-ann", "of-owner"])).adapter_gain == 1.0  # as documented
    assert ann.forget(["of-ann"]) == ["of-ann"] and owner.forget(["of-owner"]) == ["of-owner"]
    assert ben.evaluate(sequence("quick", adapter_name="of-ann-2")).adapter_gain == 1.0
    assert keyed.server.is_up()


def test_a_name_of_an_adapter_in_training_is_not_free(three):
    owner, ann, _ = three
    training = in_background(lambda: owner.evaluate(sequence("sleep 1.5", adapter_name="mine")))
    eventually(lambda: ann.status().n_running)
    with pytest.raises(RemoteError, match="another client's"):
        ann.evaluate(sequence("quick", adapter_name="mine"))
    assert training().adapter_gain == 1.0
    ann.evaluate(sequence("quick", adapter_name="hers"))
    with pytest.raises(RemoteError, match="another client's"):
        owner.evaluate(sequence("quick", adapter_name="hers"))  # an earlier request of hers may still write it
    ann.evaluate(TTTRequest(adapter_name="not-trained", skip_training=True, train_sequences=["x"]))
    owner.evaluate(sequence("quick", adapter_name="not-trained"))


def test_guests_leave_room_for_the_owner_and_all_connections_of_one_count_together(tmp_path):
    table = RequestTable(ServeSettings(run_dir=tmp_path, n_workers=0, max_queued=6), "s1", lock_wait_s=0)
    take = table.accept
    for number in range(3):
        take(parse_request(PUBLISHED), b"{}", (b"connection %d" % number, b""), 1.0, guest="g")
    with pytest.raises(QueueFull, match="3 requests wait, 3 is the most"):
        take(parse_request(PUBLISHED), b"{}", (b"connection 4", b""), 1.0, guest="h")
    assert table.queue.n_waiting_of(b"g") == 3
    take(parse_request(PUBLISHED), b"{}", (b"o", b""), 1.0, guest="")
    table.close()


def test_the_ids_of_guests_are_apart_from_those_of_others(three):
    owner, ann, ben = three
    replies = [one.evaluate(sequence(f"quick {i}", request_id="same")) for i, one in enumerate((owner, ann, ben))]
    assert [reply.request_id for reply in replies] == ["same"] * 3
    with pytest.raises(RemoteError, match="request_id' is 'same', which belongs to a different request"):
        ann.evaluate(sequence("quick 0", request_id="same"))  # her own earlier one


def test_a_connections_name_cannot_be_taken_over_with_another_key(keyed):
    server_key, pairs = keyed.server.info.public_key, [load_pair(path) for path in keyed.guests]
    victim, intruder = ({"pair": pair, "server_key": server_key, "name": b"client-1"} for pair in pairs)
    endpoint = keyed.server.info.endpoint
    with dealer(endpoint, **victim) as socket:
        send(socket, cmd="ping")
        assert receive(socket)["status"] == "alive"
        with dealer(endpoint, **intruder) as other:
            send(other, cmd="ping")
            send(socket, **{**PUBLISHED, "train_sequences": ["sleep 0.3"]})
            assert receive(socket)["adapter_gain"] == 1.0
            assert not other.poll(300)
        send(socket, **{**PUBLISHED, "train_sequences": ["sleep 1"]})
        send(socket, cmd="ping")
        assert receive(socket)["status"] == "alive"
    with dealer(endpoint, **intruder) as other:  # the victim is gone and its request still runs
        for _ in range(3):
            time.sleep(0.1)
            send(other, cmd="ping")
        assert not other.poll(1500)


# ---- the folder of the keys


def test_servers_that_make_keys_at_the_same_time_make_one_set(tmp_path):
    start = threading.Barrier(8)

    def make(_):
        start.wait()
        make_keys(tmp_path / "keys")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
    for name in ("server", "client", "worker"):
        public = zmq.auth.load_certificate(tmp_path / "keys" / f"{name}.key")[0]
        pair = load_pair(tmp_path / "keys" / f"{name}.key_secret")
        assert pair[0] == public == zmq.curve_public(pair[1])
        assert name == "server" or allowed_keys(tmp_path / "keys" / f"allowed_{name}s") == {public}


def test_a_folder_of_keys_that_others_may_change_is_refused(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(SettingsError, match=r"open may be read or changed by others \(mode 777\); chmod 700"):
        make_keys(tmp_path / "open")
    (tmp_path / "theirs").mkdir(mode=0o700)
    owner = (tmp_path / "theirs").stat().st_uid
    monkeypatch.setattr(endpoint_module.os, "geteuid", lambda: owner + 1)
    if owner == 0:
        os.chown(tmp_path / "theirs", 12345, -1)
    with pytest.raises(SettingsError, match="theirs belongs to another user"):
        make_keys(tmp_path / "theirs")
    assert not [*(tmp_path / "open").iterdir(), *(tmp_path / "theirs").iterdir()]


def test_keys_that_another_server_is_making_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "KEYS_WAIT_S", 0.2)
    (tmp_path / "keys").mkdir(mode=0o700)
    with (
        endpoint_module.lock(tmp_path / "keys" / ".lock", of=tmp_path),
        pytest.raises(RunMismatch, match="in use by another"),
    ):
        make_keys(tmp_path / "keys")

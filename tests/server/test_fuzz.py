"""Twenty thousand messages that nobody should send, while a good client is answered soon."""

import json
import random
import threading
import time
from dataclasses import dataclass, field

import pytest
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from seal_nb.server.endpoint import connected
from tests.server.conftest import plain_req
from tests.server.test_server import PUBLISHED, ask

N_SENT, N_DIFFERENT = 20_000, 10_000  # some come out alike
N_DRAWN, N_DAMAGED = 600, 33  # drawing a message takes far longer than damaging it

numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
GOOD = json.dumps(PUBLISHED).encode()
OURS = ["request_id", "seed", "adapter_name", "adapter_stack", "priority", "cmd", "target_modules", "prompts"]


def as_json(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")  # NaN and Infinity too, as Python's writer does


wrong_field = st.builds(
    lambda name, value: as_json({**PUBLISHED, name: value}), st.sampled_from([*PUBLISHED, *OURS]), values
)
wrong_question = st.builds(
    lambda name, value: as_json({**PUBLISHED, "eval_questions": [{**PUBLISHED["eval_questions"][0], name: value}]}),
    st.sampled_from(["title", "context", "question", "answer"]),
    values,
)
path_trick = st.builds(
    lambda name: as_json({**PUBLISHED, "adapter_name": name, "adapter_stack": [name]}),
    st.lists(
        st.sampled_from(["..", "/", "\\", ".", "~", "etc", "passwd", "\0", "con:", "\n", "%2e", "é", "$x"]),
        min_size=1,
        max_size=6,
    ).map("".join),
)
command = st.builds(
    lambda cmd, value: as_json({"cmd": cmd, "request_id": value, "adapter_names": value}),
    st.sampled_from(["status", "cancel", "ping", "forget", "generate", "evaluate", "", "SHUTDOWN", "shutdown\0"]),
    values,
)
cut = st.builds(lambda at: as_json(PUBLISHED)[: at % 300], st.integers(0, 299))
deep = st.builds(lambda n, s: s * n, st.integers(1, 3000), st.sampled_from([b"[", b'{"a":', b'[{"a":[', b'"\\u']))
message = st.one_of(
    st.binary(max_size=200), st.builds(as_json, values), wrong_field, wrong_field, wrong_question,
    path_trick, command, cut, deep,
)  # fmt: skip


def damaged(body: bytes, pick: random.Random) -> bytes:
    """Cut off, doubled, a byte changed, a piece lost, or a piece of a good request put in; once or more."""
    for _ in range(pick.randint(1, 3)):
        at = pick.randrange(len(body) + 1)
        start = pick.randrange(len(GOOD))
        piece = GOOD[start : start + pick.randint(1, 40)]
        body = pick.choice(
            [
                body[:at],
                body[at:] + body,
                body[:at] + pick.randbytes(1) + body[at + 1 :],
                body[:at] + body[at + pick.randint(1, 9) :],
                body[:at] + piece + body[at:],
            ]
        )
    return body


HEAVY = {  # up to 1.5 MB
    "numbers for texts": b'{"train_sequences": [%b1]}' % (b"1," * 750_000),
    "objects without fields": b'{"eval_questions": [%b{}]}' % (b"{}," * 500_000),
    "fewer numbers": b'{"train_sequences": [%b1]}' % (b"1," * 390_000),
    "fewer objects": b'{"eval_questions": [%b{}]}' % (b"{}," * 190_000),
    "questions with wrong fields": b'{"eval_questions": [%b{}]}' % (b'{"question": 1, "answer": 2},' * 50_000),
    "lists of lists": b'{"train_sequences": ["a"], "target_modules": [%b[]]}' % (b"[]," * 500_000),
    "empty texts": b'{"cmd": "generate", "prompts": [%b""]}' % (b'"",' * 500_000),
    "names of adapters": b'{"cmd": "forget", "adapter_names": [%b""]}' % (b'"",' * 500_000),
    "a stack of adapters": b'{"train_sequences": ["a"], "adapter_stack": [%b"/"]}' % (b'"/",' * 375_000),
    "texts that end": b'{"cmd": "generate", "prompts": ["a"], "stop": [%b1]}' % (b"1," * 750_000),
    "fields": b"{%b}" % b",".join(b'"%d":1' % i for i in range(150_000)),
    "digits": b'{"train_sequences": ["a"], "lora_rank": %b}' % (b"1" * 1_500_000),
}


#: (frames before the delimiter, the message, frames behind it)
framed = st.tuples(
    st.one_of(st.just([]), st.lists(st.binary(max_size=9), max_size=9)),
    message,
    st.one_of(st.just([]), st.just([]), st.lists(st.binary(max_size=9), max_size=3)),
)
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def flood(server):
    """A DEALER that sends whatever frames it is given; counts the replies, so that silence shows."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(server.info.endpoint)
    yield Flood(socket)
    socket.close()


@pytest.fixture(scope="module")
def waits(server):
    """How long a good client waited for each answer, in seconds, while all of this happened."""
    waits, over = [], threading.Event()

    def ask_all_the_time():
        with plain_req(server.info.endpoint) as good:
            while not over.wait(0.01):
                began = time.monotonic()
                assert ask(good, {"cmd": "ping"})["status"] == "alive"
                waits.append(time.monotonic() - began)

    thread = threading.Thread(target=ask_all_the_time)
    thread.start()
    yield waits
    over.set()
    thread.join()


@dataclass
class Flood:
    socket: zmq.Socket
    n_sent: int = 0
    n_answered: int = 0
    different: set[int] = field(default_factory=set)

    def send(self, before: list[bytes], body: bytes, behind: list[bytes]) -> None:
        self.n_sent += 1
        self.different.add(hash((tuple(before), body, tuple(behind))))
        mark = b"%d" % self.n_sent  # one mark twice would be one request, sent again
        self.socket.send_multipart([mark, *before, b"", body, *behind])

    def receive(self) -> None:
        assert self.socket.recv_multipart()[-1].startswith(b"{")
        self.n_answered += 1


WRONG_HEADERS = [
    b"{}", b"[]", b"", b"\xff", b'{"token": 1}', b'{"session": 1, "model_id": "stub"}',
    b'{"lease": [], "capacity": "x", "stats": 1}', b'{"pid": {}, "error": 1}',
]  # fmt: skip


@settings(
    max_examples=N_DRAWN, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None
)
@given(frames=framed, seed=seeds)
def test_any_message_is_answered_and_none_ends_the_server(flood, waits, frames, seed):
    (before, body, behind), pick = frames, random.Random(seed)
    for sent in (body, *(damaged(body, pick) for _ in range(N_DAMAGED))):
        if b'"shutdown"' not in sent:  # that would be obeyed
            flood.send(before, sent, behind)
    while flood.socket.poll(0):
        flood.receive()


@pytest.mark.parametrize("name", HEAVY)
def test_a_message_that_is_slow_to_read_is_refused(server, waits, name):
    with plain_req(server.info.endpoint) as req:
        for _ in range(2):
            req.send(HEAVY[name])
            assert "ProtocolError" in req.recv_json()["error"]


def test_after_all_of_it_a_good_request_is_answered_and_a_good_client_never_waited_long(flood, waits, server):
    assert flood.n_sent >= N_SENT and len(flood.different) >= N_DIFFERENT
    with plain_req(server.info.endpoint) as req:
        assert ask(req, PUBLISHED)["adapter_gain"] == 1.0
        status = ask(req, {"cmd": "status"})
    deadline = time.monotonic() + 60
    while flood.n_answered < flood.n_sent and flood.socket.poll(1000) and time.monotonic() < deadline:
        flood.receive()
    assert flood.n_answered == flood.n_sent
    # A message that blocks the server would take it minutes. On a loaded machine single pings take some seconds.
    assert len(waits) > 100 and sorted(waits)[len(waits) * 95 // 100] < 1.0 and max(waits) < 5.0
    assert len(status["workers"]) == 2 and not status["counts"].get("workers_lost")
    assert status["rss_bytes"] < 200 * 2**20
    assert "fault of the front end" not in server.log_path.read_text()
    assert server.process.poll() is None


@pytest.mark.parametrize("size", [10 * 2**20, 40 * 2**20])
def test_a_huge_message_is_answered_with_an_answer_or_an_error(server, size):
    with plain_req(server.info.endpoint, timeout_ms=30_000) as req:
        reply = ask(req, {"train_sequences": ["x" * size], "eval_questions": []})
        assert ("the most" in reply.get("error", "")) is (size > 32 * 2**20)
        assert ask(req, PUBLISHED)["adapter_gain"] == 1.0


def test_rubbish_from_a_worker_is_no_harm(server):
    with zmq.Context() as context, connected(context, server.info, "worker") as dealer:  # it has a worker's key
        pick = random.Random(1)
        for kind in [b"ready", b"beat", b"result", b"failed", b"leaving", b"", b"\xff"] * 30:
            dealer.send_multipart([kind, pick.choice(WRONG_HEADERS), b""][: pick.choice([1, 2, 3, 3, 3])])
    with plain_req(server.info.endpoint) as req:
        assert ask(req, PUBLISHED)["adapter_gain"] == 1.0
        assert len(ask(req, {"cmd": "status"})["workers"]) == 2

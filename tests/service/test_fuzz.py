"""Twenty thousand messages that nobody should send, on one server; then a good request, which is answered."""

import json
import random
import time

import pytest
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.service.conftest import plain_req
from tests.service.test_server import PUBLISHED, ask

N_EXAMPLES, BATCH, COPIES = 1_000, 5, 5  # at least 20,000 messages

numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
OURS = ["request_id", "seed", "adapter_name", "adapter_stack", "priority", "cmd", "target_modules", "prompts"]


def as_json(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")  # NaN and Infinity too, as Python's writer does


wrong_field = st.builds(
    lambda name, value: as_json({**PUBLISHED, name: value}), st.sampled_from([*PUBLISHED, *OURS]), values
)
wrong_question = st.builds(
    lambda name, value: as_json(
        {**PUBLISHED, "eval_questions": [{**PUBLISHED["eval_questions"][0], name: value}]}
    ),
    st.sampled_from(["title", "context", "question", "answer"]),
    values,
)
path_trick = st.builds(
    lambda name: as_json({**PUBLISHED, "adapter_name": name, "adapter_stack": [name]}),
    st.sampled_from(
        ["..", "../x", "/etc/passwd", "a/../b", "a\\b", ".", "~", "a\0", "con:", "a\n", "%2e%2e", "é"]
    ),
)
command = st.builds(
    lambda cmd, value: as_json({"cmd": cmd, "request_id": value}),
    st.sampled_from(["status", "cancel", "ping", "generate", "evaluate", "", "SHUTDOWN", "shutdown\0"]),
    values,
)
cut = st.builds(lambda at: as_json(PUBLISHED)[: at % 300], st.integers(0, 299))
deep = st.builds(
    lambda n, s: s * n, st.integers(1, 3000), st.sampled_from([b"[", b'{"a":', b'[{"a":[', b'"\\u'])
)
message = st.one_of(
    st.binary(max_size=200), st.builds(as_json, values), wrong_field, wrong_field, wrong_question,
    path_trick, command, cut, deep,
)  # fmt: skip
#: (frames before the delimiter, the message, frames behind it)
framed = st.tuples(
    st.one_of(st.just([]), st.lists(st.binary(max_size=9), max_size=9)),
    message,
    st.one_of(st.just([]), st.just([]), st.lists(st.binary(max_size=9), max_size=3)),
)


@pytest.fixture(scope="module")
def flood(server):
    """A DEALER that sends whatever frames it is given; counts the replies, so that silence shows."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(server.info.endpoint)
    sent = {"messages": 0, "replies": 0}
    yield socket, sent
    socket.close()


WRONG_HEADERS = [
    b"{}", b"[]", b"", b"\xff", b'{"token": 1}', b'{"session": 1, "model_id": "stub"}',
    b'{"lease": [], "capacity": "x", "stats": 1}', b'{"pid": {}, "error": 1}',
]  # fmt: skip


@settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(batch=st.lists(framed, min_size=BATCH, max_size=BATCH), seed=st.integers(0, 2**32))
def test_any_message_is_answered_and_none_ends_the_server(flood, batch, seed):
    socket, sent = flood
    pick = random.Random(seed)
    for before, body, behind in batch * COPIES:  # each as it is, or damaged in one place or another
        sent["messages"] += 1
        mark = b"%d" % sent["messages"]  # one mark twice would be one request, sent again
        socket.send_multipart([mark, *before, b"", damaged(body, pick), *behind])
    while socket.poll(0):
        assert socket.recv_multipart()[-1].startswith(b"{")
        sent["replies"] += 1


def damaged(body, pick):
    """Often as it is; else a byte changed, cut off, or doubled."""
    if not body or pick.random() < 0.4:
        return body
    at = pick.randrange(len(body))
    head, tail = body[:at], body[at + 1 :]
    return pick.choice([head, body + body, head + bytes([pick.randrange(256)]) + tail, head + tail])


def test_after_all_of_it_a_good_request_is_answered(flood, server):
    socket, sent = flood
    assert sent["messages"] >= 20_000
    with plain_req(server.info.endpoint) as req:
        assert ask(req, PUBLISHED)["adapter_gain"] == 1.0
        status = ask(req, {"cmd": "status"})
    deadline = time.monotonic() + 20
    while sent["replies"] < sent["messages"] and socket.poll(1000) and time.monotonic() < deadline:
        socket.recv_multipart()
        sent["replies"] += 1
    assert sent["replies"] == sent["messages"]
    assert status["rss_bytes"] < 200 * 2**20
    assert "fault of the front end" not in server.log_path.read_text()
    assert server.process.poll() is None


@pytest.mark.parametrize("size", [10 * 2**20, 70 * 2**20])
def test_a_huge_message_is_answered_with_an_answer_or_an_error(server, size):
    with plain_req(server.info.endpoint, timeout_ms=30_000) as req:
        reply = ask(req, {"train_sequences": ["x" * size], "eval_questions": []})
        assert ("the most" in reply.get("error", "")) is (size > 64 * 2**20)
        assert ask(req, PUBLISHED)["adapter_gain"] == 1.0


def test_rubbish_on_the_workers_port_is_no_harm(server):
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(server.info.worker_endpoint)
        pick = random.Random(1)
        for kind in [b"ready", b"beat", b"result", b"failed", b"leaving", b"", b"\xff"] * 30:
            dealer.send_multipart([kind, pick.choice(WRONG_HEADERS), b""][: pick.choice([1, 2, 3, 3, 3])])
    with plain_req(server.info.endpoint) as req:
        assert ask(req, PUBLISHED)["adapter_gain"] == 1.0
        assert len(ask(req, {"cmd": "status"})["workers"]) == 2

"""A worker that lives and gets nowhere is ended, its requests go on elsewhere; a slow one is left alone."""

import pytest

from seal_nb.errors import RemoteError
from seal_nb.server.client import TTTClient
from tests.server.conftest import eventually, in_background, is_running, trained, worker_pids
from tests.server.test_server import sequence


def test_a_worker_stuck_inside_one_step_is_killed_and_replaced_and_slow_ones_are_left_alone(start_server, tmp_path):
    server = start_server(n_workers=2, n_slots=2, stall_s=1.2)
    requests = [sequence("hang 600", request_id="stuck")]
    requests += [sequence(f"sleep 0.{i}", request_id=f"r{i}") for i in range(4)]
    with TTTClient(server.endpoint, timeout_s=60) as client:
        before = worker_pids(client)
        replies = dict(client.run_indexed(requests))
        assert isinstance(replies[0], RemoteError) and replies[0].ename == "WorkerLost"
        assert "lost its worker 3 times (the last: no step of its work for more than 1.2 s)" in str(replies[0])
        assert [replies[i].adapter_gain for i in range(1, 5)] == [1.0] * 4
        assert client.status().counts["workers_lost"] == 3
        eventually(lambda: len(set(worker_pids(client))) == 2)
        lost = set(before) - set(worker_pids(client))
        assert lost and not any(is_running(pid) for pid in lost)
        assert sorted(trained(tmp_path)) == [f"r{i}" for i in range(4)]
        assert client.evaluate(sequence("sleep 2")).adapter_gain == 1.0  # it makes steps
        reply = in_background(lambda: _evaluated(server.endpoint, "hang 0.9"))
        eventually(lambda: [w for w in client.status().workers if w.no_step_s > 0.4])
        assert reply().adapter_gain == 1.0
        eventually(lambda: all(worker.no_step_s == 0 for worker in client.status().workers))
        assert client.status().counts["workers_lost"] == 3


def test_a_worker_that_sends_no_heartbeat_or_never_ends_a_request_is_killed_too(start_server):
    server = start_server(max_tries=1, lease_s=1.0, stall_s=1.0, job_timeout_s=1.8)
    with TTTClient(server.endpoint, timeout_s=60) as client:
        (before,) = worker_pids(client)
        with pytest.raises(RemoteError, match="silent for more than 1 s"):
            client.evaluate(sequence("seize"))
        eventually(lambda: not is_running(before))
        with pytest.raises(RemoteError, match="a request was not done within 1.8 s"):
            client.evaluate(sequence("sleep 600"))
        assert client.evaluate(sequence("quick")).adapter_gain == 1.0


def _evaluated(endpoint, order):
    with TTTClient(endpoint, timeout_s=60) as client:
        return client.evaluate(sequence(order))

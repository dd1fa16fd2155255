"""Faults with real processes. No result of a request with an id is lost, counted twice, or wrong."""

import json
import os
import resource
import signal
import subprocess
import time
from collections import Counter

import psutil
import pytest
import zmq

from seal_nb.errors import RemoteError
from seal_nb.protocol import TTTRequest
from seal_nb.server.client import TTTClient
from seal_nb.server.endpoint import connected
from seal_nb.server.requests import content_of
from seal_nb.server.worker import pack, unpack
from seal_nb.storage import derived_seed
from tests import read_journal
from tests.server.conftest import (
    eventually,
    in_background,
    is_running,
    kill,
    plain_req,
    remote_worker,
    restart,
    run_round,
    trained,
    worker_pids,
)
from tests.server.test_server import BASELINE_ONLY, ask, sequence


def test_a_worker_killed_mid_training_loses_nothing_and_is_replaced(start_server, tmp_path):
    server = start_server(n_workers=2, n_slots=2)
    requests = [sequence(f"sleep 0.6{i}", request_id=f"r{i}") for i in range(8)]
    with TTTClient(server.endpoint) as client:
        before = worker_pids(client)
        replies = in_background(lambda: run_round(server.endpoint, requests))
        eventually(lambda: client.status().n_running == 4)
        os.kill(before[0], signal.SIGKILL)
        assert sorted(replies()) == [f"r{i}" for i in range(8)]
        assert client.status().counts["requeued"] == 2
        eventually(lambda: len(worker_pids(client)) == 2 and before[0] not in worker_pids(client))
    assert Counter(trained(tmp_path)) == Counter(request.request_id for request in requests)


def test_a_request_that_kills_workers_gets_an_error_and_its_neighbours_their_answers(start_server, tmp_path):
    server = start_server(n_workers=2, n_slots=3)
    requests = [sequence("die", request_id="poison")]
    requests += [sequence(f"sleep 0.{i}", request_id=f"r{i}") for i in range(5)]
    with TTTClient(server.endpoint, timeout_s=40) as client:
        replies = dict(client.run_indexed(requests))
        assert isinstance(replies[0], RemoteError) and replies[0].ename == "WorkerLost"
        assert "3 times" in str(replies[0]) and "signal 9" in str(replies[0])
        assert all(replies[i].adapter_gain == 1.0 for i in range(1, 6))
        assert client.status().counts["workers_lost"] == 3
    with plain_req(server.info.endpoint) as req:  # a worker that dies once: a plain client notices nothing
        order = f"die-once {tmp_path / 'died'}"
        assert ask(req, {"train_sequences": [order], "eval_questions": []})["adapter_gain"] == 0.0
    assert (tmp_path / "died").exists()


def test_an_inner_loop_that_raises_ends_its_worker_and_the_cause_reaches_the_client(start_server):
    server = start_server(max_tries=1)
    with TTTClient(server.endpoint) as client:
        with pytest.raises(RemoteError, match="RuntimeError: the device is broken") as caught:
            client.evaluate(sequence("crash"))
        assert caught.value.ename == "WorkerLost"
        assert client.evaluate(sequence("quick")).adapter_gain == 1.0


def test_a_worker_that_was_cut_off_and_returns_does_not_answer_twice(start_server, tmp_path):
    server = start_server(n_slots=1, lease_s=1.0)
    named = sequence("sleep 0.8", request_id="once")
    with TTTClient(server.endpoint) as client:
        reply = in_background(lambda: run_round(server.endpoint, [named]))
        (frozen,) = eventually(lambda: client.status().n_running and worker_pids(client))
        os.kill(frozen, signal.SIGSTOP)  # as a node that is cut off
        eventually(lambda: client.status().counts.get("workers_lost"))
        worker = subprocess.Popen(remote_worker(server))
        try:
            answered = reply()["once"]
            os.kill(frozen, signal.SIGCONT)
            eventually(lambda: len(worker_pids(client)) == 2)
            assert client.status().counts["answered"] == 1
            assert client.evaluate(named) == answered
        finally:
            worker.kill()
            worker.wait()
    journal = (tmp_path / "run" / "results.journal.jsonl").read_text().splitlines()
    assert len(journal) == 1


def test_workers_join_and_leave_at_any_time_and_leaving_costs_no_try(start_server):
    server = start_server(n_workers=0, max_tries=1)
    with TTTClient(server.endpoint) as client:
        reply = in_background(lambda: run_round(server.endpoint, [sequence("sleep 1", request_id="r")]))
        eventually(lambda: client.status().n_queued == 1)
        first = subprocess.Popen(remote_worker(server))
        eventually(lambda: client.status().n_running == 1)
        first.send_signal(signal.SIGTERM)
        assert first.wait(20) == 0
        second = subprocess.Popen(remote_worker(server))
        try:
            assert reply()["r"].adapter_gain == 1.0
        finally:
            second.terminate()
            assert second.wait(20) == 0


def test_a_front_end_killed_in_mid_queue_and_started_again_loses_and_doubles_nothing(start_server, tmp_path):
    server = start_server(n_workers=1, n_slots=2)
    requests = [sequence(f"sleep 0.4{i}", request_id=f"r{i}") for i in range(8)]
    replies = in_background(lambda: run_round(server.endpoint, requests, wait_s=60))
    journal = tmp_path / "run" / "results.journal.jsonl"
    eventually(lambda: journal.read_text().count("\n") >= 3)
    with TTTClient(server.endpoint) as client:
        (orphan,) = worker_pids(client)
    kill(server)
    eventually(lambda: not is_running(orphan))  # no worker is left behind on the GPU
    kept = read_journal(journal)
    with restart(server):
        assert sorted(replies()) == [f"r{i}" for i in range(8)]
        assert all(replies()[key].seed == entry["reply"]["seed"] for key, entry in kept.items())
        assert sorted(read_journal(journal)) == [f"r{i}" for i in range(8)]
        assert journal.read_text().count("\n") == 8
        assert all(count == 1 for key, count in Counter(trained(tmp_path)).items() if key in kept)


def test_a_remote_worker_finds_each_server_that_takes_over_and_ends_with_the_last(start_server):
    server = start_server(n_workers=0)
    worker = subprocess.Popen(remote_worker(server))
    try:
        with TTTClient(server.endpoint, wait_s=60) as client:
            for end in (signal.SIGKILL, signal.SIGTERM):
                eventually(lambda: worker_pids(client) == [worker.pid])
                server.process.send_signal(end)
                server.process.wait()
                server = start_server(n_workers=0)
                assert client.evaluate(sequence("quick")).adapter_gain == 1.0
            assert worker_pids(client) == [worker.pid]
            client.shutdown()
            assert worker.wait(20) == 0
    finally:
        worker.kill()
        worker.wait()


def test_plain_req_clients_of_a_killed_front_end_are_answered_by_the_next_one(start_server, tmp_path):
    """The next server has the same address. It cannot answer for the dead one, so a lost request is sent again."""
    published = {"train_sequences": ["sleep 0.7"], "eval_questions": []}  # neither id nor seed
    named = {**published, "train_sequences": ["sleep 0.8"], "request_id": "mine"}
    server = start_server()
    endpoint = server.info.endpoint
    with (
        plain_req(endpoint) as req, plain_req(endpoint, timeout_ms=1000) as lost,
        plain_req(endpoint) as also_lost, plain_req(endpoint) as late,
    ):  # fmt: skip
        seeds = [ask(req, published)["seed"]]
        also_lost.send_json(published)
        lost.send_json(named)
        with TTTClient(server.endpoint) as client:
            eventually(lambda: client.status().n_running == 2)
        kill(server)
        with pytest.raises(zmq.Again):
            lost.recv()
        req.send_json(BASELINE_ONLY)  # its socket connects again by itself
        late.send_json(BASELINE_ONLY)  # this one was never connected
        again = start_server(endpoint=endpoint)
        assert req.recv_json()["server_id"] == late.recv_json()["server_id"] == again.info.server_id
        assert ask(req, named)["request_id"] == "mine"
        seeds += [ask(req, published)["seed"] for _ in range(2)]
    assert trained(tmp_path).count("mine") == 1
    # The request that was lost did not count, so the next one has its seed.
    digest = content_of(TTTRequest(**published))
    assert seeds == [derived_seed(0, digest, number) for number in range(3)]


def test_a_client_that_leaves_finds_its_reply_later_and_one_that_does_not_read_costs_nobody_else(
    start_server, tmp_path
):
    server = start_server()
    message = {"train_sequences": ["sleep 0.5"], "eval_questions": [], "request_id": "left"}
    context = zmq.Context()
    req = context.socket(zmq.REQ)
    req.connect(server.info.endpoint)
    req.send_json(message)
    with TTTClient(server.endpoint) as client:
        eventually(lambda: client.status().n_running)
        context.destroy(linger=0)
        eventually(lambda: client.status().n_results == 1)
    with plain_req(server.info.endpoint) as another:
        assert ask(another, message)["request_id"] == "left"
    assert trained(tmp_path) == ["left"]
    big = {"train_sequences": ["big"], "eval_questions": [{"question": "q", "answer": "a" * 100_000}]}
    message = json.dumps({**big, "request_id": "big"}).encode()
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.connect(server.info.endpoint)
        deaf.send_multipart([b"", message])
        deaf.recv_multipart()
        for _ in range(1_000):  # 100 MB of replies from the journal, and nobody reads them
            deaf.send_multipart([b"", message])
        with TTTClient(server.endpoint, timeout_s=20) as client:
            assert client.evaluate(sequence("quick")).adapter_gain == 1.0
            eventually(lambda: client.status().counts["from_journal"] == 1_001)
            assert client.status().counts["undelivered"] > 100
            assert client.status().rss_bytes < 200 * 2**20


def test_a_front_end_that_was_late_itself_loses_no_worker_whose_heartbeat_waits_to_be_read(start_server):
    server = start_server(n_workers=0, lease_s=3.0)
    with zmq.Context() as context, TTTClient(server.endpoint) as client:
        client.status()
        workers = [connected(context, server.info, "worker", name=b"w%d" % number) for number in range(450)]
        about = {"host": "node", "pid": 0, "model_id": "stub", "capacity": 1, "steps": 0, "stats": {}}
        for number, worker in enumerate(workers):  # more than one burst
            worker.send_multipart(pack("ready", session=0, worker_id=f"w{number}", **about))
        leases = [unpack(worker.recv_multipart())[1]["lease"] for worker in workers]
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(3.2)
        for worker, lease in zip(workers, leases, strict=True):
            worker.send_multipart(pack("beat", lease=lease, capacity=1, steps=1, stats={}))
        time.sleep(0.3)
        os.kill(server.process.pid, signal.SIGCONT)
        status = client.status()
        assert len(status.workers) == 450 and not status.counts.get("workers_lost")
        for worker in workers:
            worker.close(0)


def test_a_server_may_open_as_many_files_as_the_system_allows(start_server):
    """Each worker and each client is one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] - 1, limits[1]))
    try:
        server = start_server(n_workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE) == (limits[1], limits[1])

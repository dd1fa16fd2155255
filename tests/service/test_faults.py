"""Faults with real processes. No result of a request with an id is lost, counted twice, or wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import zmq

from seal_nb.errors import RemoteError, RoundTimeout
from seal_nb.protocol import TTTRequest
from seal_nb.runs import read_journal, write_json
from seal_nb.service.client import TTTClient
from seal_nb.service.endpoint import read_endpoint
from seal_nb.service.launch import ServerFailed, TTTServer, command
from tests.service.conftest import HASTE, STUB, eventually, is_running, plain_req, trained
from tests.service.test_server import ask, sequence


def worker_pids(client):
    return [worker.pid for worker in client.status().workers]


def in_background(work):
    """Run ``work`` in a thread; calling the result joins it and gives what it returned."""
    box = []
    thread = threading.Thread(target=lambda: box.append(work()))
    thread.start()

    def result(timeout_s=40):
        thread.join(timeout_s)
        assert box, "the work in the background did not end"
        return box[0]

    return result


def run_round(endpoint, requests, **settings):
    with TTTClient(endpoint, timeout_s=40, **settings) as client:
        return {reply.request_id: reply for reply in client.run_round(requests)}


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


def test_a_plain_req_client_gets_its_answer_when_its_worker_dies(start_server, tmp_path):
    server = start_server()
    with plain_req(server.info.endpoint) as req:
        order = f"die-once {tmp_path / 'died'}"
        assert ask(req, {"train_sequences": [order], "eval_questions": []})["adapter_gain"] == 0.0
    assert (tmp_path / "died").exists()


def test_a_request_that_kills_workers_gets_an_error_and_its_neighbours_their_answers(start_server):
    server = start_server(n_workers=2, n_slots=3)
    requests = [sequence("die", request_id="poison")]
    requests += [sequence(f"sleep 0.{i}", request_id=f"r{i}") for i in range(5)]
    with TTTClient(server.endpoint, timeout_s=40) as client:
        replies = dict(client.run_indexed(requests))
        assert isinstance(replies[0], RemoteError) and replies[0].ename == "WorkerLost"
        assert "3 times" in str(replies[0]) and "signal 9" in str(replies[0])
        assert all(replies[i].adapter_gain == 1.0 for i in range(1, 6))
        assert client.status().counts["workers_lost"] == 3


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


def remote_worker(server, **options):
    """The command line of a worker that joins from elsewhere."""
    options = {"inner-loop": STUB, "endpoint-file": server.endpoint, "beat-s": 0.2, "lease-s": 1.0, **options}
    return [sys.executable, "-m", "seal_nb.service.worker", *(f"--{k}={v}" for k, v in options.items())]


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


def restart(server):
    """The same server again, as a requeued job: other port, same run folder."""
    names = ("run_dir", "inner_loop", "lease_s", "drain_s", "n_slots", "n_workers")
    return TTTServer(start_timeout_s=60.0, **{name: getattr(server.settings, name) for name in names})


def test_a_front_end_killed_in_mid_queue_and_started_again_loses_and_doubles_nothing(start_server, tmp_path):
    server = start_server(n_workers=1, n_slots=2)
    requests = [sequence(f"sleep 0.4{i}", request_id=f"r{i}") for i in range(8)]
    replies = in_background(lambda: run_round(server.endpoint, requests, connect_s=60))
    journal = tmp_path / "run" / "results.journal.jsonl"
    eventually(lambda: journal.read_text().count("\n") >= 3)
    with TTTClient(server.endpoint) as client:
        (orphan,) = worker_pids(client)
    server.process.kill()
    server.process.wait()
    eventually(lambda: not is_running(orphan))  # no worker is left behind on the GPU
    kept = read_journal(journal)
    with restart(server):
        assert sorted(replies()) == [f"r{i}" for i in range(8)]
        assert all(replies()[key].seed == entry["reply"]["seed"] for key, entry in kept.items())
        assert sorted(read_journal(journal)) == [f"r{i}" for i in range(8)]
        assert journal.read_text().count("\n") == 8
        assert all(count == 1 for key, count in Counter(trained(tmp_path)).items() if key in kept)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_remote_worker_finds_the_server_that_took_over_and_ends_with_it(start_server, end):
    server = start_server(n_workers=0)
    worker = subprocess.Popen(remote_worker(server))
    try:
        with TTTClient(server.endpoint, connect_s=60) as client:
            eventually(lambda: worker_pids(client) == [worker.pid])
            server.process.send_signal(end)
            server.process.wait()
            with restart(server):
                assert client.evaluate(sequence("quick")).adapter_gain == 1.0
                assert worker_pids(client) == [worker.pid]
                client.shutdown()
                assert worker.wait(20) == 0
    finally:
        worker.kill()
        worker.wait()


def test_a_plain_req_client_of_a_killed_front_end_asks_again_and_gets_its_answer(start_server):
    server = start_server()
    endpoint = server.info.endpoint
    message = {"train_sequences": ["sleep 1"], "eval_questions": [], "request_id": "mine"}
    with plain_req(endpoint, timeout_ms=1500) as req:
        req.send_json(message)
        server.process.kill()
        server.process.wait()
        with pytest.raises(zmq.Again):  # its own deadline: no server can answer for a dead one
            req.recv()
    again = start_server(endpoint=endpoint)
    with plain_req(again.info.endpoint) as req:
        assert ask(req, message)["request_id"] == "mine"


def test_seeds_of_published_requests_go_on_after_a_restart(start_server):
    server, message = start_server(), {"train_sequences": ["again"], "eval_questions": []}
    with plain_req(server.info.endpoint) as req:
        seeds = [ask(req, message)["seed"] for _ in range(2)]
    server.process.kill()
    server.process.wait()
    with restart(server) as again, plain_req(again.info.endpoint) as req:
        seeds += [ask(req, message)["seed"] for _ in range(2)]
    assert len(set(seeds)) == 4


def test_a_client_that_is_gone_before_its_reply_finds_it_later(start_server, tmp_path):
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


def test_a_full_disk_loses_no_answer_and_is_told_and_written_later(start_server, tmp_path):
    server = start_server()
    journal = tmp_path / "run" / "results.journal.jsonl"
    with TTTClient(server.endpoint) as client:
        client.evaluate(sequence("before", request_id="before"))
        size = journal.stat().st_size
        full = (size + 100, resource.RLIM_INFINITY)  # as a full disk: part of a line fits
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, full)
        answered = client.evaluate(sequence("during", request_id="during"))
        assert answered.adapter_gain == 1.0
        assert "not on the disk" in client.status().trouble
        assert client.evaluate(sequence("during", request_id="during")) == answered
        with plain_req(server.info.endpoint) as req:
            assert "seed" in ask(req, {"train_sequences": ["plain"], "eval_questions": []})
        assert journal.stat().st_size == size  # no half line
        free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, free)
        eventually(lambda: not client.status().trouble)
    assert set(read_journal(journal)) == {"before", "during"}


def test_a_second_server_on_a_live_ones_endpoint_file_is_refused(start_server, tmp_path):
    first = start_server(n_workers=0)
    with pytest.raises(ServerFailed, match="belongs to server .* which is alive"):
        start_server(n_workers=0)
    with pytest.raises(ServerFailed, match="belongs to server .* which is alive"):
        start_server(n_workers=0, run_dir=tmp_path / "other", endpoint_file=first.endpoint)
    assert first.process.poll() is None


def test_a_second_server_on_a_live_ones_run_folder_is_refused(start_server, tmp_path):
    start_server(n_workers=0)
    with pytest.raises(ServerFailed, match="is being written by another run"):
        start_server(n_workers=0, endpoint_file=tmp_path / "elsewhere.json", start_timeout_s=60)


def test_a_run_folder_with_another_models_results_is_refused(start_server):
    server = start_server(model="stub-a")
    with TTTClient(server.endpoint) as client:
        client.evaluate(sequence("quick", request_id="r"))
    server.stop()
    with pytest.raises(ServerFailed, match="holds results of model 'stub-a', the workers have 'stub-b'"):
        start_server(model="stub-b")


def test_a_stale_endpoint_file_is_overwritten_also_where_another_server_has_its_port(start_server, tmp_path):
    other = start_server(n_workers=0, run_dir=tmp_path / "other")
    stale = {**json.loads(Path(other.endpoint).read_text()), "server_id": "long-gone"}
    write_json(tmp_path / "run" / "endpoint.json", stale)
    with (
        TTTClient(tmp_path / "run" / "endpoint.json", connect_s=2.5) as client,  # more than one ping
        pytest.raises(RoundTimeout, match="speaks of long-gone"),
    ):
        client.status()
    server = start_server(n_workers=0)
    assert server.info.server_id != "long-gone"


def test_a_server_whose_endpoint_file_was_taken_ends_and_its_clients_move(start_server, tmp_path):
    """What a batch system does that starts a second copy while the first lives on a cut-off node."""
    first = start_server(run_dir=tmp_path / "first")
    second = start_server(run_dir=tmp_path / "second")
    with TTTClient(first.endpoint, connect_s=20) as client:
        client.status()
        write_json(first.endpoint, json.loads(Path(second.endpoint).read_text()))
        assert first.process.wait(20) == 0
        assert client.evaluate(sequence("quick")).server_id == second.info.server_id
    assert read_endpoint(first.endpoint).server_id == second.info.server_id  # not removed by the first


def test_a_requeued_job_takes_over_from_its_own_earlier_run(start_server, tmp_path, monkeypatch):
    """The earlier run lives on a node that was cut off: it sees the file taken, finishes, lets go."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = start_server(n_slots=1)
    first_id = first.info.server_id
    requests = [sequence(f"sleep 1.{i}", request_id=f"r{i}") for i in range(3)]
    replies = in_background(lambda: run_round(first.endpoint, requests, connect_s=30))
    with TTTClient(first.endpoint) as client:
        eventually(lambda: client.status().n_running)
    second = start_server(n_slots=1)
    assert first.process.wait(20) == 0
    assert {reply.server_id for reply in replies().values()} == {first_id, second.info.server_id}
    assert Counter(trained(tmp_path)) == Counter(["r0", "r1", "r2"])


def test_an_endpoint_file_that_somebody_removed_is_written_again(start_server):
    server = start_server(n_workers=0)
    before = server.info
    server.settings.endpoint_path.unlink()
    eventually(server.settings.endpoint_path.exists)
    assert server.info == before


def test_a_client_waits_for_a_server_that_is_not_there_yet(start_server, tmp_path):
    waiting = in_background(
        lambda: run_round(
            tmp_path / "run" / "endpoint.json", [sequence("quick", request_id="r")], connect_s=30
        )
    )
    time.sleep(0.5)
    start_server()
    assert waiting()["r"].adapter_gain == 1.0


def test_a_client_without_a_server_says_what_to_do(tmp_path):
    for where in (tmp_path / "endpoint.json", "tcp://127.0.0.1:9"):
        with TTTClient(where, connect_s=0.5) as client:
            with pytest.raises(RoundTimeout, match=r"no TTT server answers at .*start it \(seal-nb serve\)"):
                client.status()
            with pytest.raises(RoundTimeout, match=str(where)):
                client.evaluate(TTTRequest(train_sequences=["a"]))


def test_a_reader_that_does_not_read_costs_nobody_else(start_server):
    server = start_server()
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
            eventually(lambda: client.status().counts["from_journal"] == 1_000)
            assert client.status().counts["undelivered"] > 100
            assert client.status().rss_bytes < 200 * 2**20


def test_no_decision_hangs_on_the_wall_clock():
    """A clock that jumps moves no lease, deadline or rate: the service asks the monotonic clock only."""
    folder = Path(__file__).parents[2] / "seal_nb" / "service"
    sources = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert not [name for name, text in sources.items() if "time.time(" in text or "utcnow" in text]
    assert [name for name, text in sources.items() if "datetime.now" in text] == ["endpoint.py"]  # for people


def test_the_command_line_says_every_setting(tmp_path):
    from seal_nb.service.serve import parse
    from seal_nb.service.settings import Limits, ServeSettings

    settings = ServeSettings(run_dir=tmp_path, n_workers=3, lease_s=1.5, limits=Limits(max_rank=7), **{
        "endpoint_file": tmp_path / "e.json", "grader": "exact"})  # fmt: skip
    assert parse(command(settings)[3:]) == settings
    assert HASTE["lease_s"] < 5

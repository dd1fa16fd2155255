"""Real servers for tests: a front end process and worker processes around the stub inner loop."""

import os
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from seal_nb.server.client import TTTClient, TTTServer

STUB = "tests.server.stub_loop:load"
HASTE = {"lease_s": 2.0, "drain_s": 5.0, "start_timeout_s": 60.0, "n_slots": 4}


@pytest.fixture
def start_server(tmp_path, monkeypatch):
    """``start_server(n_workers=2, …)`` gives a running TTTServer; all are ended after the test."""
    monkeypatch.setenv("STUB_LOOP_LOG", str(tmp_path / "trained.txt"))
    with ExitStack() as stack:

        def start(**settings):
            server = TTTServer(**{"run_dir": tmp_path / "run", "inner_loop": STUB, **HASTE, **settings})
            stack.callback(server.stop, timeout_s=10)
            return server.start()

        yield start


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server with two workers for all tests of a module that do it no harm."""
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        with TTTServer(run_dir=folder / "run", inner_loop=STUB, n_workers=2, n_threads=7, **HASTE) as server:
            with TTTClient(server.endpoint) as client:
                eventually(lambda: len(worker_pids(client)) == 2)
            yield server


@pytest.fixture
def client(server):
    with TTTClient(server.endpoint, timeout_s=30, wait_s=10) as client:
        yield client


@pytest.fixture
def req(server):
    """A plain REQ socket, as published clients have; its own context, so that it may be abandoned."""
    with plain_req(server.info.endpoint) as socket:
        yield socket


def plain_req(endpoint, timeout_ms=20_000):
    socket = zmq.Context.instance().socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
    socket.connect(endpoint)
    return socket


def eventually(condition, timeout_s=20.0):
    """The first true value of ``condition()``; fails the test if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(0.02)
    return value


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends while we read
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def trained(tmp_path: Path) -> list[str]:
    """Ids of all trainings that came to their end, as the stub loop noted them."""
    path = tmp_path / "trained.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def not_here(missing):
    """What a test needs is not there: in continuous integration that is a failure."""
    pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)


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


def remote_worker(server, **options):
    """The command line of a worker that joins from elsewhere."""
    options = {"inner-loop": STUB, "endpoint-file": server.endpoint, "lease-s": 1.0, **options}
    return [sys.executable, "-m", "seal_nb.server.worker", *(f"--{k}={v}" for k, v in options.items())]


def kill(server):
    """Its front end, outright; its workers notice and end."""
    server.process.kill()
    server.process.wait()


def restart(server, **changed):
    """The same server again, as a requeued job: other port, same run folder."""
    names = ("run_dir", "inner_loop", "lease_s", "drain_s", "n_slots", "n_workers")
    same = {name: getattr(server.settings, name) for name in names}
    return TTTServer(start_timeout_s=60.0, **{**same, **changed})

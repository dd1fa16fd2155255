"""Which server a client finds: the one its endpoint file speaks of, waited for, and never an older one."""

import json
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from seal_nb.errors import RoundTimeout, SettingsError
from seal_nb.protocol import TTTRequest
from seal_nb.server.client import ServerFailed, ServeSettings, TTTClient, command
from seal_nb.server.endpoint import read_endpoint, resolved
from seal_nb.storage import write_json
from tests.server.conftest import STUB, eventually, in_background, kill, restart, run_round, trained
from tests.server.test_client import REPLY, serving
from tests.server.test_server import sequence


def test_a_second_server_on_a_live_ones_endpoint_file_or_run_folder_is_refused(start_server, tmp_path):
    first = start_server(n_workers=0)
    with pytest.raises(ServerFailed, match="belongs to server .* which is alive"):
        start_server(n_workers=0)
    with pytest.raises(ServerFailed, match="belongs to server .* which is alive"):
        start_server(n_workers=0, run_dir=tmp_path / "other", endpoint_file=first.endpoint)
    with pytest.raises(ServerFailed, match="is in use by another run"):
        start_server(n_workers=0, endpoint_file=tmp_path / "elsewhere.json")
    assert first.process.poll() is None
    before = first.info
    first.settings.endpoint_path.unlink()  # somebody removes the file: the server writes it again
    eventually(first.settings.endpoint_path.exists)
    assert first.info == before


@pytest.mark.parametrize("address", ["tcp://*:5555", "tcp://127.0.0.1:*"])
def test_the_address_of_a_listening_server_is_refused_by_a_client_in_words(address):
    with pytest.raises(SettingsError, match="give tcp://HOST:PORT of the server"), TTTClient(address) as client:
        client.status()


def test_a_start_that_fails_says_its_own_last_error_and_not_one_of_an_earlier_start(start_server, tmp_path):
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "server.log").write_text("2026-01-01 server ERROR of yesterday\n")
    with pytest.raises(ServerFailed) as failed:
        start_server(n_workers=1, inner_loop="tests.server.stub_loop:no_such_thing")
    first_line = str(failed.value).splitlines()[0]
    assert "exit code 1" in first_line and "no_such_thing" in first_line
    assert "yesterday" not in str(failed.value)


def test_of_servers_that_start_on_one_endpoint_file_at_the_same_time_one_stays(tmp_path):
    """None of them is there yet when the others look; who wrote the file last has it."""
    shared = {"endpoint_file": tmp_path / "endpoint.json", "n_workers": 0, "drain_s": 1.0}
    settings = [ServeSettings(run_dir=tmp_path / f"run{i}", inner_loop=STUB, **shared) for i in range(3)]
    processes = [subprocess.Popen(command(one), stderr=subprocess.DEVNULL) for one in settings]
    try:
        (last,) = eventually(lambda: len(left := [p for p in processes if p.poll() is None]) == 1 and left)
        eventually(lambda: read_endpoint(tmp_path / "endpoint.json").pid == last.pid)
        with TTTClient(tmp_path / "endpoint.json", wait_s=10) as client:
            assert client.status().pid == last.pid
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_stale_endpoint_file_is_overwritten_also_where_another_server_has_its_port(start_server, tmp_path):
    other = start_server(n_workers=0, run_dir=tmp_path / "other")
    stale = {**json.loads(Path(other.endpoint).read_text()), "server_id": "long-gone"}
    write_json(tmp_path / "run" / "endpoint.json", stale)
    with (
        TTTClient(tmp_path / "run" / "endpoint.json", wait_s=2.5) as client,  # more than one ping
        pytest.raises(RoundTimeout, match="names long-gone"),
    ):
        client.status()
    server = start_server(n_workers=0)
    assert server.info.server_id != "long-gone"


def test_a_server_whose_endpoint_file_was_taken_ends_and_its_clients_move(start_server, tmp_path):
    """What a batch system does that starts a second copy while the first lives on a cut-off node."""
    first = start_server(run_dir=tmp_path / "first")
    second = start_server(run_dir=tmp_path / "second")
    with TTTClient(first.endpoint, wait_s=20) as client:
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
    requests = [sequence(f"until {tmp_path / 'taken'}", request_id=f"r{i}") for i in range(3)]
    replies = in_background(lambda: run_round(first.endpoint, requests, wait_s=30))
    with TTTClient(first.info.endpoint) as client:
        eventually(lambda: client.status().n_running and client.status().n_queued == 2)
        starting = in_background(lambda: start_server(n_slots=1))
        eventually(lambda: client.status().draining)
    (tmp_path / "taken").touch()
    second = starting()
    assert first.process.wait(20) == 0
    assert {reply.server_id for reply in replies().values()} == {first_id, second.info.server_id}
    assert Counter(trained(tmp_path)) == Counter(["r0", "r1", "r2"])


def test_a_client_waits_for_a_server_that_is_not_there_yet(start_server, tmp_path):
    waiting = in_background(
        lambda: run_round(tmp_path / "run" / "endpoint.json", [sequence("quick", request_id="r")], wait_s=30)
    )
    time.sleep(0.5)
    start_server()
    assert waiting()["r"].adapter_gain == 1.0


def test_a_client_without_a_server_says_what_to_do(tmp_path):
    for where in (tmp_path / "endpoint.json", "tcp://127.0.0.1:9"):
        with TTTClient(where, wait_s=0.5) as client:
            with pytest.raises(RoundTimeout, match=r"no TTT server answers at .*start it \(seal-nb serve\)"):
                client.status()
            with pytest.raises(RoundTimeout, match=str(where)):
                client.evaluate(TTTRequest(train_sequences=["a"]))


def test_a_client_waits_for_a_requeued_server_and_never_talks_to_what_the_old_file_leads_to(start_server, tmp_path):
    """The file of a killed server still lies there, and its port has gone to a server of somebody else."""
    killed = start_server(n_workers=0)
    old = killed.info
    kill(killed)
    with serving(lambda *_: [REPLY], server_id="somebody else's", endpoint=old.endpoint) as other:
        named = [sequence("quick", request_id="r")]
        reply = in_background(lambda: run_round(killed.endpoint, named, wait_s=60))
        status = in_background(lambda: _server_id(killed.endpoint, wait_s=60, timeout_s=0.5))
        eventually(lambda: other.n_pings >= 2)
        with restart(killed, n_workers=1) as requeued:
            new_id = requeued.info.server_id
            assert reply()["r"].server_id == new_id
            assert status() == new_id  # however short its own deadline: waiting for a server is not part of it
        assert other.seen == []


def _server_id(endpoint, *, wait_s, timeout_s):
    with TTTClient(endpoint, wait_s=wait_s) as client:
        return client.status(timeout_s=timeout_s).server_id


def test_a_client_that_meets_a_server_that_is_ending_waits_for_its_successor(start_server, tmp_path):
    first = start_server(n_slots=1)
    with TTTClient(first.endpoint) as client:
        running = in_background(
            lambda: run_round(first.endpoint, [sequence("sleep 2", request_id="running")], wait_s=60)
        )
        eventually(lambda: client.status().n_running)
        first.process.terminate()
        eventually(lambda: client.status().draining)
    late = in_background(lambda: run_round(first.endpoint, [sequence("quick", request_id="late")], wait_s=60))
    assert first.process.wait(20) == 0
    assert not first.settings.endpoint_path.exists()
    with restart(first) as second:
        assert late()["late"].server_id == second.info.server_id
        assert running()["running"].server_id != second.info.server_id
    assert Counter(trained(tmp_path)) == Counter(["running", "late"])


def test_a_name_that_is_loopback_here_is_said_with_the_remedy(start_server):
    """As Debian writes the host's own name into /etc/hosts; an interface is such a name too."""
    server = start_server(endpoint="tcp://lo:0", n_workers=0)
    log = server.log_path.read_text()
    assert "tcp://lo:0 is 127.0.0.1 here, which no other machine can reach" in log
    assert f"listen at tcp://*:{server.info.port}" in log
    assert server.info.public_key, "a name counts as reachable"


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("tcp://no-such-host.invalid:0", "no-such-host.invalid is no name or interface that is known here"),
        ("tcp://192.0.2.7:0", "Cannot assign requested address.*192.0.2.7"),  # of another machine
    ],
)
def test_where_no_server_can_listen_is_refused_with_the_remedy(start_server, endpoint, told):
    with pytest.raises(ServerFailed, match=f"cannot listen at {endpoint}: {told}.*choose an address of this machine"):
        start_server(endpoint=endpoint, n_workers=0)


HOSTS = {"debian": ["127.0.1.1"], "six": ["::1"], "node": ["10.0.0.7"], "card": ["10.0.0.7", "10.0.1.7"]}


@pytest.mark.parametrize(
    ("host", "listens_at"),
    [
        ("debian", "127.0.1.1"), ("six", "[::1]"), ("node", "10.0.0.7"), ("localhost", "127.0.0.1"), ("*", "*"),
        ("[::]", "[::]"), ("[fe80::1%br-lan.2]", "[fe80::1%br-lan.2]"), ("lo", "lo"), ("card", None), ("nobody", None),
    ],
)  # fmt: skip
def test_a_name_is_listened_at_by_its_one_address(monkeypatch, host, listens_at):
    def getaddrinfo(name, port, family, kind):
        found = [one for one in HOSTS.get(name, ()) if (":" in one) == (family == socket.AF_INET6)]
        if not found:
            raise socket.gaierror(-2, "Name or service not known")
        return [(family, kind, 6, "", (one, 0)) for one in found]

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    if listens_at is None:
        with pytest.raises(SettingsError, match=f"{host} (has the addresses 10.0.0.7, 10.0.1.7|is no name).*ip addr"):
            resolved(f"tcp://{host}:5555")
    else:
        assert resolved(f"tcp://{host}:5555") == f"tcp://{listens_at}:5555"

"""Keys: made on first use, readable by their owner only, and nobody comes in whose key is not on the list."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import zmq
import zmq.auth

from seal_nb.errors import RoundTimeout, SettingsError
from seal_nb.server.client import TTTClient
from seal_nb.server.endpoint import allowed_keys, is_loopback, load_pair, make_keys, read_endpoint, split_tcp, this_node
from tests.server.conftest import HASTE, STUB, eventually, plain_req, remote_worker
from tests.server.test_server import BASELINE_ONLY, ask, sequence

PUBLIC = {"endpoint": "tcp://0.0.0.0:0", "advertise_host": "127.0.0.1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that other machines could reach."""
    from seal_nb.server.client import TTTServer

    run_dir = tmp_path_factory.mktemp("secure") / "run"
    with TTTServer(run_dir=run_dir, inner_loop=STUB, **PUBLIC, **HASTE) as server:
        yield server


@pytest.fixture
def stranger(tmp_path):
    """The folder of somebody who knows the server's public key and has a pair of their own."""
    _, secret = zmq.auth.create_certificates(tmp_path, "stranger")
    Path(secret).chmod(0o600)
    return tmp_path


def denied(server):
    return server.log_path.read_text().count("denied one of")


def test_who_owns_the_run_folder_comes_in_without_further_ado(server):
    with TTTClient(server.endpoint, timeout_s=20) as client:
        assert client.evaluate(sequence("quick")).adapter_gain == 1.0
        assert client.status().workers  # the server's own workers have keys too


def test_keys_are_readable_by_their_owner_only(server):
    folder = server.settings.run_dir / "keys"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secrets = sorted(folder.glob("*.key_secret"))
    assert [path.name for path in secrets] == [f"{n}.key_secret" for n in ("client", "server", "worker")]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)


def test_the_endpoint_file_has_the_public_key_and_no_secret(server):
    text = server.settings.endpoint_path.read_text()
    assert read_endpoint(server.endpoint).public_key
    for path in (server.settings.run_dir / "keys").glob("*.key_secret"):
        assert load_pair(path)[1].decode() not in text


def test_the_servers_public_key_alone_admits_nobody_and_the_log_says_so(server, stranger):
    before = denied(server)
    key_file = stranger / "stranger.key_secret"
    with (
        TTTClient(server.endpoint, wait_s=1.0, key_file=key_file) as client,
        pytest.raises(RoundTimeout, match=r"denied our key.*allowed_clients"),
    ):
        client.status()
    assert denied(server) > before
    assert load_pair(key_file)[0].decode() in server.log_path.read_text()
    assert load_pair(key_file)[1].decode() not in server.log_path.read_text()


def test_no_keys_at_all_get_nothing_and_the_log_says_so(server):
    before = denied(server)
    with plain_req(server.info.endpoint, timeout_ms=500) as req, pytest.raises(zmq.Again):
        ask(req, BASELINE_ONLY)
    eventually(lambda: denied(server) > before)


def test_a_client_with_an_address_and_no_keys_is_told_to_give_the_endpoint_file(server):
    for host in ("0.0.0.0", "127.0.0.1"):
        with TTTClient(f"tcp://{host}:{server.info.port}", wait_s=1.0) as client, pytest.raises(RoundTimeout) as told:
            client.status()
        assert str(told.value).count("needs keys: give its endpoint file") == 1
        assert "denied our key" not in str(told.value)


def test_a_wrong_server_key_gets_nothing(server, stranger):
    pair = load_pair(server.settings.run_dir / "keys" / "client.key_secret")
    wrong = load_pair(stranger / "stranger.key_secret")[0].decode()
    with zmq.Context() as context, context.socket(zmq.REQ) as req:
        req.setsockopt(zmq.LINGER, 0)
        req.setsockopt(zmq.RCVTIMEO, 700)
        req.curve_publickey, req.curve_secretkey = pair
        req.curve_serverkey = wrong.encode()
        req.connect(server.info.endpoint)
        with pytest.raises(zmq.Again):
            ask(req, BASELINE_ONLY)


def test_a_clients_key_does_not_make_a_worker(server):
    before = denied(server)
    key_file = server.settings.run_dir / "keys" / "client.key_secret"
    impostor = subprocess.Popen(remote_worker(server, **{"key-file": key_file}))
    try:
        eventually(lambda: denied(server) > before)
        with TTTClient(server.endpoint) as client:
            assert impostor.pid not in [worker.pid for worker in client.status().workers]
    finally:
        impostor.kill()
        impostor.wait()


def test_a_key_on_the_list_comes_in_and_one_taken_off_does_not(server, stranger):
    allowed = server.settings.run_dir / "keys" / "allowed_clients" / "colleague.key"
    allowed.write_text((stranger / "stranger.key").read_text())
    key_file = stranger / "stranger.key_secret"
    with TTTClient(server.endpoint, wait_s=5, key_file=key_file) as client:
        assert client.evaluate(sequence("quick")).adapter_gain == 1.0
    allowed.unlink()
    with TTTClient(server.endpoint, wait_s=1, key_file=key_file) as client, pytest.raises(RoundTimeout):
        client.status()


def test_keys_are_kept_and_a_list_that_was_emptied_lets_nobody_in(tmp_path):
    make_keys(tmp_path / "keys")
    before = load_pair(tmp_path / "keys" / "server.key_secret")
    (tmp_path / "keys" / "allowed_clients" / "client.key").unlink()
    make_keys(tmp_path / "keys")
    assert load_pair(tmp_path / "keys" / "server.key_secret") == before
    assert allowed_keys(tmp_path / "keys" / "allowed_clients") == set()


def test_a_list_that_was_lost_is_made_again_with_the_owners_key(tmp_path):
    make_keys(tmp_path)
    shutil.rmtree(tmp_path / "allowed_workers")
    make_keys(tmp_path)
    assert allowed_keys(tmp_path / "allowed_workers") == {load_pair(tmp_path / "worker.key_secret")[0]}
    assert stat.S_IMODE((tmp_path / "allowed_workers").stat().st_mode) == 0o700


def test_a_secret_that_others_can_read_is_refused_with_the_remedy(tmp_path):
    make_keys(tmp_path)
    (tmp_path / "client.key_secret").chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        load_pair(tmp_path / "client.key_secret")
    with pytest.raises(SettingsError, match="no key in"):
        load_pair(tmp_path / "missing.key_secret")
    with pytest.raises(SettingsError, match="no secret key"):
        public = tmp_path / "public.key_secret"
        public.write_text((tmp_path / "client.key").read_text())
        public.chmod(0o600)
        load_pair(public)


def test_a_broken_key_file_on_the_list_lets_nobody_in(tmp_path):
    make_keys(tmp_path)
    (tmp_path / "allowed_clients" / "broken.key").write_text("rubbish")
    assert allowed_keys(tmp_path / "allowed_clients") == {load_pair(tmp_path / "client.key_secret")[0]}


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("127.0.0.1", True), ("127.3.2.1", True), ("localhost", True), ("[::1]", True),
        ("0.0.0.0", False), ("*", False), ("10.0.0.1", False), ("gpu07", False), ("[::]", False),
        ("LOCALHOST", True), ("[::ffff:127.0.0.1]", True), ("[::1%lo]", True), ("[fe80::1%eth0]", False),
        ("localhost.evil.org", False),
    ],
)  # fmt: skip
def test_only_what_no_other_machine_reaches_is_loopback(host, inside):
    assert is_loopback(host) is inside


@pytest.mark.parametrize(
    ("host", "client_keys", "shown"),
    [("[::1]", False, "[::1]"), ("[::1%lo]", True, "[::1]"), ("[::]", False, this_node()), ("*", False, this_node())],
)
def test_ipv6_and_all_addresses_serve_whole_requests_with_and_without_keys(start_server, host, client_keys, shown):
    server = start_server(endpoint=f"tcp://{host}:0", client_keys=client_keys)
    needs_keys = client_keys or host in ("[::]", "*")
    assert server.info.host == shown and bool(server.info.public_key) is needs_keys
    with TTTClient(server.endpoint, timeout_s=20) as client:
        assert client.evaluate(sequence("quick")).adapter_gain == 1.0
        assert client.status().workers
    if not needs_keys:
        with TTTClient(server.info.endpoint, timeout_s=20) as client:
            assert client.evaluate(sequence("quick")).adapter_gain == 1.0


def test_ipv6_without_brackets_is_refused_with_the_form():
    with pytest.raises(SettingsError, match=r"'tcp://::1:5555'; write tcp://\[ADDRESS\]:PORT, with an IPv6 address in"):
        split_tcp("tcp://::1:5555")


@pytest.mark.parametrize("endpoint", ["5555", "tcp://host", "ipc:///tmp/x", "tcp://h:99999", "tcp://:5", "tcp://a:b"])
def test_an_endpoint_that_is_none_is_refused(endpoint):
    with pytest.raises(SettingsError, match="endpoint is"):
        split_tcp(endpoint)

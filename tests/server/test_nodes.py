"""Server and workers on different nodes: two network namespaces of this machine, joined by a cable (veth)."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from seal_nb.server.endpoint import read_endpoint
from tests.server.conftest import STUB, eventually, not_here

ENTER = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
CLIENT = """
import json, sys
from seal_nb.errors import SealError
from seal_nb.protocol import TTTRequest
from seal_nb.server.client import TTTClient
try:
    endpoint, wait_s, key_file = sys.argv[1], float(sys.argv[2]), sys.argv[3] or None
    with TTTClient(endpoint, timeout_s=30, wait_s=wait_s, key_file=key_file) as client:
        s = sys.argv[4]
        requests = [TTTRequest(train_sequences=["sleep " + s], request_id=f"{s}-{i}") for i in range(6)]
        replies = [reply.request_id for reply in client.run_round(requests)]
        hosts = [worker.host for worker in client.status().workers]
        print(json.dumps({"replies": sorted(replies), "hosts": hosts}))
except SealError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A network of its own, a host name of its own, the same disk."""

    name: str
    address: str

    def command(self, *arguments: object) -> list[str]:
        enter = (sys.executable, "-c", ENTER, self.name)
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", *enter, *map(str, arguments)]

    def start(self, stack: ExitStack, *arguments: object, log: Path) -> subprocess.Popen:
        with log.open("ab") as out:
            process = subprocess.Popen(self.command(sys.executable, *arguments), stdout=out, stderr=out)
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process

    def ask(self, endpoint: Path, *, wait_s: float = 20.0, key_file: str = "") -> dict[str, object]:
        arguments = (sys.executable, "-c", CLIENT, endpoint, wait_s, key_file, "0.1")
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """Two of them, each with its loopback and an end of the cable."""
    if shutil.which("ip") is None:
        not_here("no command ip; apt-get install iproute2")
    prefix = f"seal{os.getpid() % 10_000}"
    first, second = Node(name=f"{prefix}a", address="10.77.0.1"), Node(name=f"{prefix}b", address="10.77.0.2")
    with ExitStack() as stack:
        try:
            for node in (first, second):
                ip(f"netns add {node.name}")
                stack.callback(ip, f"netns delete {node.name}")
            ip(f"link add {prefix}c netns {first.name} type veth peer name {prefix}d netns {second.name}")
            for node, cable in ((first, f"{prefix}c"), (second, f"{prefix}d")):
                ip(f"-n {node.name} addr add {node.address}/24 dev {cable}")
                ip(f"-n {node.name} link set {cable} up")
                ip(f"-n {node.name} link set lo up")
            subprocess.run(first.command("true"), check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            not_here(f"network namespaces are not allowed here ({error.stderr.strip()}); it takes root")
        yield first, second


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def serve(node: Node, stack: ExitStack, folder: Path, address: str) -> Path:
    """The endpoint file of a server without workers on ``node``."""
    options = (f"--endpoint=tcp://{address}:0", f"--run-dir={folder / 'run'}", f"--inner-loop={STUB}")
    options += ("--n-workers=0", "--lease-s=2", "--drain-s=2")
    node.start(stack, "-m", "seal_nb.server.main", *options, log=folder / "server.log")
    return eventually(lambda: _if_there(folder / "run" / "endpoint.json"))


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def work(node: Node, stack: ExitStack, endpoint: Path, log: Path) -> subprocess.Popen:
    options = (f"--endpoint-file={endpoint}", f"--inner-loop={STUB}", "--lease-s=2")
    return node.start(stack, "-m", "seal_nb.server.worker", *options, log=log)


def test_workers_and_clients_on_another_node_come_in_with_their_keys_and_may_be_cut_off(nodes, stack, tmp_path):
    here, there = nodes
    endpoint = serve(here, stack, tmp_path, here.address)
    assert read_endpoint(endpoint).host == here.address and read_endpoint(endpoint).node == here.name
    assert read_endpoint(endpoint).public_key
    work(there, stack, endpoint, tmp_path / "worker.log")
    answer = there.ask(endpoint)
    assert answer == {"replies": [f"0.1-{i}" for i in range(6)], "hosts": [there.name]}
    stranger = tmp_path / "stranger"
    subprocess.run([sys.executable, "-c", MAKE_KEY, stranger], check=True)
    denied = there.ask(endpoint, wait_s=2.0, key_file=str(stranger / "me.key_secret"))
    assert "it denied our key" in denied["error"]
    assert f"of {there.address} is not in allowed_clients" in (tmp_path / "server.log").read_text()
    # The worker's node is cut off: its requests go to a worker that is not.
    round_ = subprocess.Popen(
        here.command(sys.executable, "-c", CLIENT, endpoint, 20, "", "1"), stdout=subprocess.PIPE, text=True
    )
    stack.callback(round_.kill)
    log = tmp_path / "server.log"
    journal = tmp_path / "run" / "results.journal.jsonl"
    eventually(lambda: journal.read_text().count("\n") > 6)  # the first of this round; others are in work
    try:
        ip(f"-n {there.name} link set {there.name[:-1]}d down")
        eventually(lambda: "is lost" in log.read_text())
        work(here, stack, endpoint, tmp_path / "near.log")
        output, _ = round_.communicate(timeout=60)
    finally:
        ip(f"-n {there.name} link set {there.name[:-1]}d up")
    assert json.loads(output) == {"replies": [f"1-{i}" for i in range(6)], "hosts": [here.name]}


MAKE_KEY = """
import os, pathlib, sys, zmq.auth
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
zmq.auth.create_certificates(folder, "me")
os.chmod(folder / "me.key_secret", 0o600)
"""


def test_a_server_on_loopback_is_out_of_reach_of_another_node_and_the_error_says_so(nodes, stack, tmp_path):
    here, there = nodes
    endpoint = serve(here, stack, tmp_path, "127.0.0.1")
    work(here, stack, endpoint, tmp_path / "worker.log")
    assert here.ask(endpoint)["hosts"] == [here.name]
    error = there.ask(endpoint, wait_s=2.0)["error"]
    assert error.startswith("RoundTimeout: no TTT server answers at")
    assert f"it listens on loopback, which only machine {here.name} reaches" in error
    assert "--endpoint tcp://0.0.0.0:0" in error

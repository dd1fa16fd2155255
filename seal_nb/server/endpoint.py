"""The endpoint file: where a server is, and which one it is.

Written whole by the server once it listens, removed by it when it ends. A file that an older server left
behind is found out by asking (``ping``): the answer must come under the ``server_id`` of the file. Nothing
here waits longer than it is told.

One question to a server, on a socket of its own: is it alive, and is it the one we look for?
"""

import ipaddress
import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zmq

from seal_nb.errors import DataError, SettingsError
from seal_nb.protocol import PROTOCOL_VERSION
from seal_nb.server.keys import keys_dir, load_pair, secure_client
from seal_nb.storage import read_json, write_json

_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.%a-z]+\]|[^:/\[\]]+):(?P<port>\d{1,5}|\*)$")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One server. ``public_key`` and ``worker_key`` are empty on loopback, where no keys are used."""

    endpoint: str  # for clients
    worker_endpoint: str
    host: str
    port: int
    pid: int
    job_id: str  # of SLURM; empty outside
    started_at: str  # ISO 8601, UTC; for people: no decision hangs on a clock
    server_id: str
    public_key: str = ""
    run_dir: str = ""
    node: str = ""  # the machine; ``host`` is the address that it listens at
    protocol_version: str = PROTOCOL_VERSION

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @property
    def secure(self) -> bool:
        return bool(self.public_key)


def read_endpoint(path: str | Path) -> Endpoint:
    """Raises DataError for a file that is missing, broken, or of another kind."""
    fields = read_json(path)
    names = Endpoint.__dataclass_fields__
    try:
        return Endpoint(**{name: value for name, value in fields.items() if name in names})
    except (TypeError, AttributeError) as error:
        raise DataError(
            f"not an endpoint file ({error})", path=path, remedy="give the endpoint.json of a server's run folder"
        ) from error


def find_endpoint(where: str, *, server_key: str = "") -> Endpoint:
    """The server at ``where``, an endpoint file or an address. Raises DataError if there is no file."""
    if "://" not in where:
        return read_endpoint(where)
    host, port = split_tcp(where)
    return Endpoint(
        endpoint=where, host=host, port=int(port), public_key=server_key,
        worker_endpoint="", pid=0, job_id="", started_at="", server_id="",
    )  # fmt: skip


def wait_for_endpoint(path: Path, *, timeout_s: float) -> Endpoint:
    """The endpoint in ``path`` once it is there. Raises DataError if it is broken, or missing to the end."""
    deadline = time.monotonic() + timeout_s
    while True:
        there = path.exists()
        try:
            return read_endpoint(path)
        except DataError:
            if (there and path.exists()) or time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


def split_tcp(endpoint: str) -> tuple[str, str]:
    """Host and port of ``tcp://host:port``. Raises SettingsError."""
    match = _TCP.match(endpoint)
    if match is None:
        raise SettingsError(f"endpoint is {endpoint!r}; write tcp://HOST:PORT, with port 0 for a free one")
    if match["port"] != "*" and int(match["port"]) > 65535:
        raise SettingsError(f"endpoint is {endpoint!r}: port {match['port']} is above 65535")
    return match["host"], match["port"]


def is_loopback(host: str) -> bool:
    """Only what cannot be reached from another machine; a name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def this_node() -> str:
    """The name that others know this machine by."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def advertised(bound: str, *, host: str = "") -> str:
    """The address that clients are told: a wildcard becomes this node's name."""
    bound_host, port = split_tcp(bound)
    everywhere = bound_host in ("0.0.0.0", "*", "[::]")
    name = host or (this_node() if everywhere else bound_host)
    return f"tcp://{name}:{port}"


def here(*, endpoint: str, worker_endpoint: str, server_id: str, public_key: str, run_dir: Path) -> Endpoint:
    """The endpoint of this process."""
    return Endpoint(
        endpoint=endpoint,
        worker_endpoint=worker_endpoint,
        host=split_tcp(endpoint)[0],
        port=int(split_tcp(endpoint)[1]),
        pid=os.getpid(),
        job_id=os.environ.get("SLURM_JOB_ID", ""),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        server_id=server_id,
        public_key=public_key,
        run_dir=str(run_dir.resolve()),
        node=this_node(),
    )


def ask(endpoint: Endpoint, message: dict[str, Any], *, timeout_s: float, key_file: Path | None = None) -> Any:
    """The reply to one plain command; None if there is none in time."""
    with zmq.Context() as context, client_socket(context, endpoint, key_file) as socket:
        socket.send_multipart([b"", json.dumps(message).encode()])
        if not socket.poll(int(timeout_s * 1000)):
            return None
        return json.loads(socket.recv_multipart()[-1])


def is_alive(endpoint: Endpoint, *, timeout_s: float, key_file: Path | None = None) -> bool:
    """Whether the server of this endpoint answers under its own id (not a newer or older one on its port)."""
    deadline = time.monotonic() + timeout_s
    try:
        reply = ask(endpoint, {"cmd": "ping"}, timeout_s=max(0.0, deadline - time.monotonic()), key_file=key_file)
    except SettingsError:  # its keys are gone or not ours: nobody we could talk to
        return False
    return isinstance(reply, dict) and reply.get("server_id") == endpoint.server_id


def client_socket(
    context: "zmq.Context[zmq.Socket[bytes]]", endpoint: Endpoint, key_file: Path | None = None, *, name: bytes = b""
) -> "zmq.Socket[bytes]":
    """A connected DEALER, with the client's keys where the server asks for them.

    Under its ``name`` a client that connects again gets what was meant for its earlier connection.
    """
    socket = context.socket(zmq.DEALER)
    if name:
        socket.setsockopt(zmq.ROUTING_ID, name)
    socket.linger = 0
    socket.sndhwm = 0  # never block in a send: what is open is bounded by the client's window
    if "[" in endpoint.endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    if endpoint.secure:
        default = keys_dir(Path(endpoint.run_dir)) / "client.key_secret"
        secure_client(socket, load_pair(key_file or default), server_key=endpoint.public_key)
    socket.connect(endpoint.endpoint)
    return socket

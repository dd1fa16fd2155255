"""One question to a server, on a socket of its own: is it alive, and is it the one we look for?"""

import json
import time
from pathlib import Path
from typing import Any

import zmq

from seal_nb.errors import SettingsError
from seal_nb.service.endpoint import Endpoint
from seal_nb.service.keys import keys_dir, load_pair, secure_client


def ask(
    endpoint: Endpoint, message: dict[str, Any], *, timeout_s: float, key_file: Path | None = None
) -> Any:
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
        reply = ask(
            endpoint, {"cmd": "ping"}, timeout_s=max(0.0, deadline - time.monotonic()), key_file=key_file
        )
    except SettingsError:  # its keys are gone or not ours: nobody we could talk to
        return False
    return isinstance(reply, dict) and reply.get("server_id") == endpoint.server_id


def client_socket(
    context: "zmq.Context[zmq.Socket[bytes]]",
    endpoint: Endpoint,
    key_file: Path | None = None,
    *,
    name: bytes = b"",
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

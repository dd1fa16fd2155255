"""Where a server is, and who may connect: the endpoint file, one question to a server, CURVE keys.

The server writes the endpoint file when it listens and removes it when it ends. A file that an older server left behind
is recognised with a `ping`: the reply must have the `server_id` of the file.

A server that other machines can reach uses keys. They are made on first use in `keys/` of the run folder, readable by
their owner only: one pair each for the server, its clients and its workers. Only the public keys in `allowed_clients/`
and `allowed_workers/` may connect; the server's public key alone gives no access. Add a colleague's public key file to
the folder to let them in, remove it to lock them out: the folder is read at each connection.
"""

import ipaddress
import json
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import zmq
import zmq.auth
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from seal_nb.errors import DataError, SettingsError
from seal_nb.protocol import PROTOCOL_VERSION
from seal_nb.storage import read_json, write_json

log = logging.getLogger(__name__)

ROLES = ("client", "worker")
LOUD = 100  # log lines before they become rare
Socket = zmq.Socket[bytes]
_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.%a-z]+\]|[^:/\[\]]+):(?P<port>\d{1,5}|\*)$")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One server."""

    endpoint: str  # address for clients
    host: str  # of that address
    port: int
    worker_endpoint: str = ""
    pid: int = 0
    job_id: str = ""  # of SLURM
    started_at: str = ""  # ISO 8601, UTC; for people only, no decision depends on it
    server_id: str = ""
    public_key: str = ""  # empty on loopback, where no keys are used
    run_dir: str = ""
    node: str = ""  # the machine
    protocol_version: str = PROTOCOL_VERSION

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @property
    def secure(self) -> bool:
        return bool(self.public_key)


def read_endpoint(path: str | Path) -> Endpoint:
    """The endpoint in a file. Raises DataError if the file is missing, broken, or of another kind."""
    fields = read_json(path)
    names = Endpoint.__dataclass_fields__
    try:
        return Endpoint(**{name: value for name, value in fields.items() if name in names})
    except (TypeError, AttributeError) as error:
        raise DataError(
            f"not an endpoint file ({error})", path=path, remedy="give the endpoint.json of a server's run folder"
        ) from error


def find_endpoint(where: str, *, server_key: str = "") -> Endpoint:
    """The server at `where`, an endpoint file or an address. Raises DataError if there is no file."""
    if "://" not in where:
        return read_endpoint(where)
    host, port = split_tcp(where)
    return Endpoint(endpoint=where, host=host, port=int(port), public_key=server_key)


def wait_for_endpoint(path: Path, *, timeout_s: float) -> Endpoint:
    """The endpoint in `path` as soon as the file is there. Raises DataError if it is broken, or missing too long."""
    deadline = time.monotonic() + timeout_s
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return read_endpoint(path)


def split_tcp(endpoint: str) -> tuple[str, str]:
    """Host and port of `tcp://host:port`. Raises SettingsError."""
    match = _TCP.match(endpoint)
    if match is None:
        raise SettingsError(f"endpoint is {endpoint!r}; write tcp://HOST:PORT, with port 0 for a free one")
    if match["port"] != "*" and int(match["port"]) > 65535:
        raise SettingsError(f"endpoint is {endpoint!r}: port {match['port']} is above 65535")
    return match["host"], match["port"]


def is_loopback(host: str) -> bool:
    """Whether no other machine can reach this host. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def this_node() -> str:
    """The name by which others know this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def ask(endpoint: Endpoint, message: dict[str, Any], *, timeout_s: float, key_file: Path | None = None) -> Any:
    """The reply to one command; None if there is none in time."""
    with zmq.Context() as context, client_socket(context, endpoint, key_file) as socket:
        socket.send_multipart([b"", json.dumps(message).encode()])
        return json.loads(socket.recv_multipart()[-1]) if socket.poll(int(timeout_s * 1000)) else None


def client_socket(
    context: "zmq.Context[Socket]", endpoint: Endpoint, key_file: Path | None = None, *, name: bytes = b""
) -> Socket:
    """A connected DEALER, with the client's keys if the server needs them.

    Args:
        context: ZMQ context of the socket.
        endpoint: The server.
        key_file: The client's secret key; None: the one in the server's run folder.
        name: Identity. A client that connects again under its name gets the replies to its earlier connection.
    """
    socket = context.socket(zmq.DEALER)
    if name:
        socket.setsockopt(zmq.ROUTING_ID, name)
    socket.linger = 0
    socket.sndhwm = 0  # a send never blocks; the client's window limits what is open
    if "[" in endpoint.endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    if endpoint.secure:
        default = keys_dir(Path(endpoint.run_dir)) / "client.key_secret"
        secure_client(socket, load_pair(key_file or default), server_key=endpoint.public_key)
    socket.connect(endpoint.endpoint)
    return socket


class KeyPair(NamedTuple):
    """CURVE keys as ZMQ takes them (Z85 text)."""

    public: bytes
    secret: bytes


def keys_dir(run_dir: Path) -> Path:
    return run_dir / "keys"


def make_keys(folder: Path) -> None:
    """Make the missing key pairs, and the lists of allowed keys if they are missing."""
    if not zmq.has("curve"):
        raise SettingsError("this ZMQ has no CURVE; bind to 127.0.0.1, or install pyzmq from its wheel")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("server", *ROLES):
        if not (folder / f"{name}.key_secret").exists():
            make_pair(folder, name)
    for role in ROLES:
        allowed = folder / f"allowed_{role}s"
        if not allowed.exists():
            part = folder / f".{allowed.name}.partial"  # a list without the owner's key would lock the owner out
            part.mkdir(mode=0o700, exist_ok=True)
            (part / f"{role}.key").write_text((folder / f"{role}.key").read_text())
            part.rename(allowed)


def make_pair(folder: Path, name: str) -> None:
    """Write both files of a new pair, under a private name first: never readable by others, never incomplete."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    head = f'metadata\ncurve\n    public-key = "{public}"\n'
    texts = {
        "key": f"# public key of the {name}\n{head}",
        "key_secret": f'# secret key of the {name}; do not share it\n{head}    secret-key = "{secret}"\n',
    }
    for kind, text in texts.items():
        fresh = folder / f".{name}.{kind}.new"
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text(text)
        fresh.rename(folder / f"{name}.{kind}")


def load_pair(path: Path) -> KeyPair:
    """The pair in `NAME.key_secret`. Raises SettingsError if it is missing, broken, or readable by others."""
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SettingsError(
                f"{path} may be read by others (mode {stat.S_IMODE(mode):o}); chmod 600 {path}, "
                "or make new keys if others may have read them"
            )
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        raise SettingsError(
            f"no key in {path} ({error.strerror or error}); ask the owner of the server for a key pair, "
            "or take the one in keys/ of its run folder"
        ) from error
    except ValueError as error:
        raise SettingsError(f"{path} holds no key: {error}") from error
    if secret is None:
        raise SettingsError(f"{path} holds no secret key; give the .key_secret file")
    return KeyPair(public, secret)


def allowed_keys(folder: Path) -> dict[bytes, str]:
    """Public key → file name, for every `*.key` in `folder`. A broken file allows no key."""
    found = {}
    for path in sorted(folder.glob("*.key")):
        try:
            found[zmq.auth.load_certificate(path)[0]] = path.stem
        except (OSError, ValueError) as error:
            log.warning("%s is ignored: %s", path, error)
    return found


def secure_client(socket: Socket, pair: KeyPair, *, server_key: str) -> None:
    """Call this before connect."""
    socket.curve_publickey, socket.curve_secretkey = pair
    socket.curve_serverkey = server_key.encode()


class KeyGate:
    """Answers ZMQ's question whether a public key may connect (ZAP, RFC 27). Make it before any socket binds."""

    def __init__(self, context: "zmq.Context[Socket]", folder: Path) -> None:
        make_keys(folder)
        self.folder, self.n_denied = folder, 0
        self.pair = load_pair(folder / "server.key_secret")
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind("inproc://zeromq.zap.01")
        self.sources: dict[Socket, Callable[[], None]] = {self._socket: self._answer}  # to poll, and what to call then

    def guard(self, socket: Socket, domain: str) -> None:
        """Before bind: accept CURVE only, and only keys on the list. Failed handshakes are counted and logged."""
        events = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        monitor = socket.get_monitor_socket(events)
        self.sources[monitor] = partial(self._failed, monitor, domain)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.pair
        socket.zap_domain = domain.encode()

    def _failed(self, monitor: Socket, domain: str) -> None:
        event = zmq.Event(recv_monitor_message(monitor)["event"]).name
        self._log(domain, f"it does not use CURVE, or has another server's key ({event})")

    def _answer(self) -> None:
        """Answer one question. Everything that is not understood is denied."""
        frames = self._socket.recv_multipart()
        _, sequence, domain, address, _, mechanism, credentials, *_ = (*frames, *[b""] * 7)
        key = z85.encode(credentials) if len(credentials) == 32 else b""
        who = domain.decode(errors="replace")
        known = mechanism == b"CURVE" and who in {f"{role}s" for role in ROLES}
        name = allowed_keys(self.folder / f"allowed_{who}").get(key) if known else None
        if name is None:
            host = address.decode(errors="replace")
            self._log(who, f"public key {key.decode() or 'none'} of {host} is not in allowed_{who}")
            self._socket.send_multipart([b"1.0", sequence, b"400", b"key not allowed", b"", b""])
        else:
            self._socket.send_multipart([b"1.0", sequence, b"200", b"OK", name.encode(), b""])

    def _log(self, domain: str, why: str) -> None:
        self.n_denied += 1
        if self.n_denied <= LOUD or self.n_denied % 1000 == 0:  # a denied peer tries again and again
            log.warning("denied one of %s: %s; denied so far: %d", domain, why, self.n_denied)

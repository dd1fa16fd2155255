"""Where a server is, and who may connect: the endpoint file, and CURVE keys.

Workers always need keys, clients where other machines can reach the server. Keys are made on first use in `keys/` of
the run folder, readable by their owner only: one pair each for the server, its clients and its workers. Only the public
keys in `allowed_clients/` and `allowed_workers/` may connect."""

import hashlib
import ipaddress
import logging
import os
import re
import shutil
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Self

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from seal_nb.errors import DataError, SettingsError, keep_secret
from seal_nb.protocol import PROTOCOL_VERSION
from seal_nb.storage import lock, read_json, runs_folder

log = logging.getLogger(__name__)

LOUD = 100  # log lines before they become rare
KEYS_WAIT_S = 10.0
Role = Literal["client", "worker"]
Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
KeyFile = str | Path | None
WILDCARDS = ("0.0.0.0", "*", "[::]")
OWN_ADDRESS = "choose an address of this machine (ip addr), or tcp://*:PORT for all of them; port 0 is a free one"
_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+(%[\w.-]+)?\]|[^:/\[\]]+):(?P<port>\d{1,5}|\*)")


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
    public_key: str = ""  # of the server, for clients; empty if they need no keys: on loopback, and for an address
    worker_key: str = ""  # of the server, for workers
    run_dir: str = ""
    node: str = ""  # the machine
    protocol_version: str = PROTOCOL_VERSION

    @classmethod
    def at(cls, address: str) -> Self:
        """The server at `tcp://host:port`. Raises SettingsError."""
        host, port = split_tcp(address)
        return cls(endpoint=address, host=host, port=int(port.replace("*", "0")))

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)


def read_endpoint(path: str | Path) -> Endpoint:
    """The endpoint in a file. Raises DataError if the file is missing, broken, or of another kind."""
    fields = read_json(path)
    try:
        return Endpoint(**{name: value for name, value in fields.items() if name in Endpoint.__dataclass_fields__})
    except (TypeError, AttributeError) as error:
        remedy = "give the endpoint.json of a server's run folder"
        raise DataError(f"not an endpoint file ({error})", path=path, remedy=remedy) from error


def find_endpoint(where: str) -> Endpoint:
    """The server at `where`, an endpoint file or an address. Raises DataError if there is no file, SettingsError."""
    return Endpoint.at(where) if "://" in where else read_endpoint(runs_folder(where))


def wait_for_endpoint(path: Path, *, timeout_s: float) -> Endpoint:
    """The endpoint in `path` as soon as the file is there. Raises DataError if it is broken, or missing too long."""
    deadline = time.monotonic() + timeout_s
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return read_endpoint(path)


def split_tcp(endpoint: str) -> tuple[str, str]:
    """Host and port of `tcp://host:port`. Raises SettingsError."""
    match = _TCP.fullmatch(endpoint)
    if match is None:
        is_ipv6 = endpoint.count(":") > 2
        form = "tcp://[ADDRESS]:PORT, with an IPv6 address in brackets" if is_ipv6 else "tcp://HOST:PORT"
        raise SettingsError(f"endpoint is {endpoint!r}; write {form}, with port 0 for a free one")
    if match["port"] != "*" and int(match["port"]) > 65535:
        raise SettingsError(f"endpoint is {endpoint!r}: port {match['port']} is above 65535")
    return match["host"], match["port"]


def is_loopback(host: str) -> bool:
    """Whether no other machine can reach this host. A name other than localhost counts as reachable."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def addresses(host: str) -> list[str]:
    """The IPv4 addresses of a host name, or its IPv6 addresses if it has no others."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, UnicodeError):
            return sorted({str(one[4][0]) for one in socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)})
    return []


def resolved(endpoint: str) -> str:
    """An endpoint to listen at, with the address of its host in place of a name. Raises SettingsError for a name that
    has no address here, or several."""
    host, port = split_tcp(endpoint)
    if host in WILDCARDS or host.startswith("[") or host in [name for _, name in socket.if_nameindex()]:
        return endpoint
    found = ["127.0.0.1"] if host.lower() == "localhost" else addresses(host)
    if len(found) != 1:
        problem = f"has the addresses {', '.join(found)}" if found else "is no name or interface that is known here"
        raise SettingsError(f"cannot listen at {endpoint}: {host} {problem}; {OWN_ADDRESS}")
    return f"tcp://[{found[0]}]:{port}" if ":" in found[0] else f"tcp://{found[0]}:{port}"


def listen(socket: Socket, endpoint: str) -> tuple[str, str]:
    """Bind; the host and port by which others reach it. Raises SettingsError if that is impossible here."""
    own = resolved(endpoint)
    socket.ipv6 = "[" in own
    try:
        socket.bind(own)
    except zmq.ZMQError as error:
        raise SettingsError(f"cannot listen at {endpoint}: {error}; {OWN_ADDRESS}") from error
    host, port = split_tcp(socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0"))
    if is_loopback(host) and not is_loopback(split_tcp(endpoint)[0]):
        remedy = f"for other machines listen at tcp://*:{port}, or at an address of a network card (ip addr)"
        log.warning("%s is %s here, which no other machine can reach (/etc/hosts); %s", endpoint, host, remedy)
    return this_node() if host in WILDCARDS else host, port


def this_node() -> str:
    """The name by which others know this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def connected(context: Context, at: Endpoint, role: Role, *, name: bytes = b"", key_file: KeyFile = None) -> Socket:
    """A DEALER to the server, with keys if the server needs them; without `key_file` those in its run folder. A worker
    that connects again under its `name` gets the messages to its earlier connection."""
    for_clients, for_workers = (at.endpoint, at.public_key), (at.worker_endpoint, at.worker_key)
    address, server_key = for_clients if role == "client" else for_workers
    socket = context.socket(zmq.DEALER)
    if name:
        socket.setsockopt(zmq.ROUTING_ID, name)
    socket.linger = 0
    socket.sndhwm = 0  # a send never blocks; the client's window limits what is open
    socket.ipv6 = "[" in address or any(":" in one for one in addresses(split_tcp(address)[0]))
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    if server_key:
        pair = load_pair(Path(key_file or Path(at.run_dir) / "keys" / f"{role}.key_secret"))
        socket.curve_publickey, socket.curve_secretkey = pair
        socket.curve_serverkey = server_key.encode()
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        socket.close()
        raise SettingsError(f"cannot connect to {address}: {error}; give tcp://HOST:PORT of the server") from error
    return socket


def make_keys(folder: Path) -> None:
    """Make the missing key pairs. Those of clients and workers may connect; a lost list of them is made again.
    Raises: SettingsError if others may write to the folder, RunMismatch if another server makes keys in it."""
    if not zmq.has("curve"):
        raise SettingsError("this ZMQ has no CURVE; install pyzmq from its wheel")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_private(folder, "700")
    with lock(folder / ".lock", of=folder, wait_s=KEYS_WAIT_S):
        for name in ("server", "client", "worker"):
            with TemporaryDirectory(dir=folder) as private:  # no secret is ever readable by others
                if not (folder / f"{name}.key_secret").exists():
                    public, secret = map(Path, zmq.auth.create_certificates(private, name))
                    secret.chmod(0o600)
                    public.rename(folder / public.name)  # first: where the secret is, the pair is complete
                    secret.rename(folder / secret.name)
                allowed = folder / f"allowed_{name}s"
                if name != "server" and not allowed.exists():
                    listed = Path(private) / allowed.name
                    listed.mkdir(mode=0o700)
                    shutil.copy(folder / f"{name}.key", listed)
                    listed.rename(allowed)


def _check_private(path: Path, mode: str) -> None:
    """Raises SettingsError if another user has rights to a file or folder, or owns the folder."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid not in (os.geteuid(), 0):
        raise SettingsError(f"{path} belongs to another user; give a run_dir of your own")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        remedy = f"chmod {mode} {path}, and make new keys if others may have seen or changed them"
        raise SettingsError(f"{path} may be read or changed by others (mode {stat.S_IMODE(found.st_mode):o}); {remedy}")


def load_pair(path: Path) -> tuple[bytes, bytes]:
    """Public and secret key (Z85 text). Raises SettingsError for a file that is missing, broken, or open to others."""
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        remedy = "ask the owner of the server for a key pair, or take the one in keys/ of its run folder"
        raise SettingsError(f"no key in {path} ({error}); {remedy}") from error
    if secret is None:
        raise SettingsError(f"{path} holds no secret key; give the .key_secret file")
    _check_private(path, "600")
    keep_secret(secret.decode(errors="replace"))
    return public, secret


def allowed_keys(folder: Path) -> set[bytes]:
    """The public keys in all `*.key` files of `folder`. A broken file allows no key."""
    found = set()
    for path in folder.glob("*.key"):
        try:
            found.add(zmq.auth.load_certificate(path)[0])
        except (OSError, ValueError) as error:
            log.warning("%s is ignored: %s", path, error)
    return found


class KeyCheck(ThreadAuthenticator):
    """Lets peers with an allowed key connect, and logs who is denied. Make it before any socket binds."""

    def __init__(self, context: Context, folder: Path) -> None:
        super().__init__(context)
        make_keys(folder)
        self.folder, self.n_denied = folder, 0
        self.pair = load_pair(folder / "server.key_secret")
        self._owner = load_pair(folder / "client.key_secret")[0].decode()
        self._monitors: dict[str, Socket] = {}
        self._address = ""
        self.start()

    def guard(self, socket: Socket, role: Role) -> None:
        """Before bind: accept CURVE only, and only keys on the list of this role."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.pair
        socket.zap_domain = role.encode()
        self.configure_curve_callback(role, self)
        events = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self._monitors[role] = socket.get_monitor_socket(events)

    def guest(self, key: str) -> str:
        """A short name for a client's public key; empty for the owner's, the one of the run folder."""
        return "" if key == self._owner else hashlib.sha256(key.encode()).hexdigest()[:16]

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        self._address = msg[3].decode(errors="replace")
        try:
            await super().handle_zap_message(msg)
        except Exception as error:  # noqa: BLE001 - this thread must go on, or nobody can connect any more
            log.error("a key could not be checked: %s: %s", type(error).__name__, error)

    def callback(self, role: str, key: bytes) -> bool:
        """Whether this public key may connect. It is called in the thread of the authenticator."""
        if key in allowed_keys(self.folder / f"allowed_{role}s"):
            return True
        self._log(role, f"public key {key.decode()} of {self._address} is not in allowed_{role}s")
        return False

    def look(self) -> None:
        """Log the handshakes that failed since the last call, before a key was looked up."""
        for role, monitor in self._monitors.items():
            while monitor.poll(0):
                event = zmq.Event(recv_monitor_message(monitor)["event"]).name
                self._log(role, f"it does not use CURVE, or has another server's key ({event})")

    def _log(self, role: str, why: str) -> None:
        self.n_denied += 1
        if self.n_denied <= LOUD or self.n_denied % 1000 == 0:  # a denied peer tries again and again
            log.warning("denied one of the %ss: %s; denied so far: %d", role, why, self.n_denied)

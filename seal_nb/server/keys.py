"""Who may talk to a server that other machines can reach: CURVE keys, and a list of the public keys let in.

Keys are made on first use in ``keys/`` of the run folder, readable by their owner only: one pair of the
server, one for clients, one for workers. Every key in ``allowed_clients/`` (``allowed_workers/``) is let
in, and nobody else: the server's public key alone admits nobody. To let a colleague in, put their public
key file there; to shut them out, remove it; the folder is read at each handshake. Not for loopback, where
no keys are used.
"""

import logging
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from seal_nb.errors import SettingsError

log = logging.getLogger(__name__)

ROLES = ("client", "worker")
LOUD = 100  # log lines before they become rare


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """CURVE keys as ZMQ takes them (Z85 text)."""

    public: bytes
    secret: bytes


def keys_dir(run_dir: Path) -> Path:
    return run_dir / "keys"


def make_keys(folder: Path) -> None:
    """Make what is missing: the pairs of server, client and worker, and the lists with the latter two."""
    if not zmq.has("curve"):
        raise SettingsError("this ZMQ has no CURVE; bind to 127.0.0.1, or install pyzmq from its wheel")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("server", *ROLES):
        if not (folder / f"{name}.key_secret").exists():
            _create(folder, name)
    for role in ROLES:
        allowed = folder / f"allowed_{role}s"
        if not allowed.exists():
            partial = folder / f".{allowed.name}.partial"  # an empty list would shut everybody out for good
            partial.mkdir(mode=0o700, exist_ok=True)
            (partial / f"{role}.key").write_text((folder / f"{role}.key").read_text())
            partial.rename(allowed)


def load_pair(path: Path) -> KeyPair:
    """The pair in ``NAME.key_secret``. Raises SettingsError where it is missing, broken, or readable by
    others.
    """
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SettingsError(
                f"{path} may be read by others (mode {stat.S_IMODE(mode):o}); chmod 600 {path}, "
                "or make new keys if somebody may have read them"
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
    return KeyPair(public=public, secret=secret)


def allowed_keys(folder: Path) -> dict[bytes, str]:
    """Public key → file name, of every ``*.key`` in ``folder``. A broken file lets nobody in."""
    found = {}
    for path in sorted(folder.glob("*.key")):
        try:
            found[zmq.auth.load_certificate(path)[0]] = path.stem
        except (OSError, ValueError) as error:
            log.warning("%s lets nobody in: %s", path, error)
    return found


def secure_server(socket: zmq.Socket[bytes], pair: KeyPair, *, domain: str) -> None:
    """Before bind: this socket speaks CURVE only, and asks the gate about each key."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = pair.public, pair.secret
    socket.zap_domain = domain.encode()


def secure_client(socket: zmq.Socket[bytes], pair: KeyPair, *, server_key: str) -> None:
    """Before connect."""
    socket.curve_publickey, socket.curve_secretkey = pair.public, pair.secret
    socket.curve_serverkey = server_key.encode()


class Gate:
    """Answers ZMQ's question (ZAP, RFC 27) whether a public key may come in. Make it before any socket
    binds.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", folder: Path) -> None:
        self.folder = folder
        self.n_denied = 0
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        self._monitors: list[tuple[zmq.Socket[bytes], str]] = []

    def watch(self, socket: "zmq.Socket[bytes]", domain: str) -> None:
        """Count and log peers that fail before their key is looked at: no keys at all, or a wrong server
        key.
        """
        events = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self._monitors.append((socket.get_monitor_socket(events), domain))

    def sources(self) -> Iterator[tuple["zmq.Socket[bytes]", Callable[[], None]]]:
        """Sockets to poll, and what to call when one has something."""
        yield self.socket, self.answer
        for monitor, domain in self._monitors:
            yield monitor, partial(self._failed, monitor, domain)

    def _failed(self, monitor: "zmq.Socket[bytes]", domain: str) -> None:
        event = recv_monitor_message(monitor)
        self._log(domain, f"it speaks no CURVE, or has another server's key ({zmq.Event(event['event']).name})")

    def answer(self) -> None:
        """Answer one question. Everything that is not understood is denied."""
        frames = self.socket.recv_multipart()
        _, sequence, domain, address, _, mechanism, credentials, *_ = (*frames, *[b""] * 7)
        key = z85.encode(credentials) if len(credentials) == 32 else b""
        place = domain.decode(errors="replace")
        known = mechanism == b"CURVE" and place in {f"{role}s" for role in ROLES}
        name = allowed_keys(self.folder / f"allowed_{place}").get(key) if known else None
        if name is None:
            host = address.decode(errors="replace")
            self._log(place, f"public key {key.decode() or 'none'} of {host} is not in allowed_{place}")
            self.socket.send_multipart([b"1.0", sequence, b"400", b"key not allowed", b"", b""])
        else:
            self.socket.send_multipart([b"1.0", sequence, b"200", b"OK", name.encode(), b""])

    def _log(self, domain: str, why: str) -> None:
        self.n_denied += 1
        if self.n_denied <= LOUD or self.n_denied % 1000 == 0:  # a denied peer comes again and again
            log.warning("denied one of %s: %s; denied so far: %d", domain, why, self.n_denied)


def _create(folder: Path, name: str) -> None:
    """Both files of a pair. They are made under a private name first: never readable by others, never half
    there.
    """
    public, secret = zmq.curve_keypair()
    texts = {
        "key": f'# public key of the {name}\nmetadata\ncurve\n    public-key = "{public.decode()}"\n',
        "key_secret": (
            f"# secret key of the {name}; give it to nobody\nmetadata\ncurve\n"
            f'    public-key = "{public.decode()}"\n    secret-key = "{secret.decode()}"\n'
        ),
    }
    for kind, text in texts.items():
        fresh = folder / f".{name}.{kind}.new"
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text(text)
        fresh.rename(folder / f"{name}.{kind}")

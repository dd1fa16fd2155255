"""The endpoint file: where a server is, and which one it is; and the question whether it is alive.

Written whole by the server once it listens, removed by it when it ends. A file that an older server left
behind is found out by asking: a ping must be answered under the ``server_id`` of the file. Nothing here
waits longer than it is told.
"""

import ipaddress
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from seal_nb.errors import DataError, SettingsError
from seal_nb.protocol import PROTOCOL_VERSION
from seal_nb.runs import read_json, write_json

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
            f"not an endpoint file ({error})",
            path=path,
            remedy="give the endpoint.json of a server's run folder",
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


def wait_for_endpoint(path: Path, *, timeout_s: float, other_than: str = "") -> Endpoint | None:
    """The endpoint in ``path`` once it is there and not server ``other_than``'s; None after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        if path.exists():
            try:
                found = read_endpoint(path)
            except DataError:
                if path.exists():  # else it was removed between the two looks
                    raise
            else:
                if found.server_id != other_than:
                    return found
        if time.monotonic() >= deadline:
            return None
        time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))


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


def advertised(bound: str, *, host: str = "") -> str:
    """The address that clients are told: a wildcard becomes this node's name."""
    bound_host, port = split_tcp(bound)
    everywhere = bound_host in ("0.0.0.0", "*", "[::]")
    name = host or (os.environ.get("SLURMD_NODENAME") or socket.gethostname() if everywhere else bound_host)
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
        node=socket.gethostname(),
    )

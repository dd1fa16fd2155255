"""Settings of a TTT server and of its workers. Each one is declared once, with its help text.

`parse` reads a command line into settings, `command` writes the command line of a process. `seal-nb serve`, `TTTServer`
and the server that starts its workers all use them."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from seal_nb.errors import redacted, visible
from seal_nb.inner_loop.settings import InnerLoopSettings, ModelSettings
from seal_nb.settings import Parser, Settings, setting
from seal_nb.storage import runs_folder


@dataclass(frozen=True, kw_only=True)
class SharedSettings(ModelSettings):
    """Settings that the server passes on to its workers."""

    inner_loop: str = setting("seal_nb.inner_loop.loop:load_inner_loop", "module:function that loads it (for tests)")
    lease_s: float = setting(30.0, "a worker that is silent for so many seconds loses its requests", least=0)
    parent_pid: int = setting(0, "end when this process ends; 0: do not watch any process")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(SharedSettings):
    """The server: a front end, and n_workers worker processes on this machine."""

    endpoint: str = setting("tcp://127.0.0.1:0", "address for clients; port 0: a free port (see the endpoint file)")
    worker_endpoint: str = setting("", "address for workers; empty: a free port at the host of endpoint")
    advertise_host: str = setting("", "name by which other nodes reach this one; empty: the host name")
    n_workers: int = setting(1, "worker processes on this machine; 0: workers join from elsewhere", least=0)
    client_keys: bool = setting(False, "true: clients need keys on loopback too, as on machines with other users")
    run_dir: Path = setting(Path("runs/server"), "folder for results, adapters and keys of one server")  # noqa: RUF009
    endpoint_file: Path | None = setting(None, "tells clients where the server is; empty: in run_dir")  # noqa: RUF009
    seed: int = setting(0, "requests without a seed get one that is derived from this", least=0)
    idle_timeout_s: float = setting(0.0, "end after so many seconds without a client; 0: never", least=0)
    drain_s: float = setting(20.0, "seconds for running requests after SIGTERM; SLURM kills after 30", least=0)
    stall_s: float = setting(3600.0, "kill a busy worker that makes no step for so many seconds; 0: never", least=0)
    job_timeout_s: float = setting(86_400.0, "kill a worker that needs more seconds for a request; 0: never", least=0)
    max_tries: int = setting(3, "a request is given up after it has lost its worker so many times", least=1)
    max_message_bytes: int = setting(32 * 2**20, "bytes of one request, about 3,000 passages with questions")
    max_queued: int = setting(20_000, "waiting requests of all clients together")
    max_queued_per_client: int = setting(10_000, "waiting requests of one client")
    max_queued_bytes: int = setting(2**30, "bytes of all waiting requests")
    max_unread_bytes: int = setting(
        2**26, "bytes of replies that one client has not read; more are thrown away", least=1
    )
    max_unsaved_bytes: int = setting(2**28, "bytes of results kept in memory while the disk is full")

    @property
    def endpoint_path(self) -> Path:
        return runs_folder(self.endpoint_file) if self.endpoint_file else self.run_dir / "endpoint.json"


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(SharedSettings, InnerLoopSettings):
    """One worker process."""

    endpoint_file: Path = setting(Path("runs/server/endpoint.json"), "endpoint file of the server")  # noqa: RUF009
    key_file: str = setting("", "CURVE secret key; empty: keys/worker.key_secret in the server's run folder")
    patience_s: float = setting(600.0, "end after so many seconds without a front end")


S = TypeVar("S", bound=Settings)


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(redacted(super().format(record)))


def log_to_stderr(who: str) -> None:
    """The log of a server or worker process, without secrets and hidden characters. Its level: SEAL_NB_LOG_LEVEL."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SafeFormatter(f"%(asctime)s {who} %(levelname)s %(message)s"))
    logging.basicConfig(level=os.environ.get("SEAL_NB_LOG_LEVEL", "INFO"), handlers=[handler])


def parse(kind: type[S], argv: Sequence[str] | None, *, prog: str, description: str, **defaults: Any) -> S:
    """Settings from a command line with one option for each field; `defaults` replace declared ones."""
    parser = Parser(prog=prog, description=description)
    readers: dict[Any, Any] = {bool: _truth, Path | None: Path}
    for one in fields(kind):
        default = defaults.get(one.name, one.default)
        text = one.metadata["text"] + (f" (default: {default})" if default not in ("", None) else "")
        name, metavar = f"--{one.name.replace('_', '-')}", one.name.rpartition("_")[2].upper()
        parser.add_argument(name, type=readers.get(one.type, one.type), default=default, metavar=metavar, help=text)
    given = vars(parser.parse_args(argv)).items()
    return kind(**{name: runs_folder(one) if isinstance(one, Path) else one for name, one in given})


def command(settings: Settings) -> list[str]:
    """The command line that starts a server or worker process with these settings; `parse` reads it."""
    module = "main" if isinstance(settings, ServeSettings) else "worker"
    values = {one.name: getattr(settings, one.name) for one in fields(settings)}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    return [sys.executable, "-m", f"seal_nb.server.{module}", *options]


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")

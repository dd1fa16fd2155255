"""A TTT server from outside, without torch: its client, its settings, how it is started (`TTTServer`) and watched.

The client has many requests in flight. A server that goes away and comes back (a batch job that is requeued) is found
again through its endpoint file, and what it had not answered is sent again. A ping shows that the server lives and
which one it is: no request is sent to a server that the endpoint file does not name. One thread at a time may use a
client, but for `cancel`. Looking does not keep an idle server running (`idle_timeout_s`)."""

import itertools
import json
import math
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import zmq
from pydantic import TypeAdapter
from zmq.utils.monitor import recv_monitor_message

from seal_nb import protocol
from seal_nb.errors import DataError, ProtocolError, RemoteError, RoundTimeout, SealError, SettingsError, log_to_stderr
from seal_nb.grading.choose import stated_grader
from seal_nb.models import DTYPES
from seal_nb.processes import DaemonThreads, LoggedProcess
from seal_nb.protocol import ErrorReply, GenerateReply, GenerateRequest, ServerStatus, TTTReply, TTTRequest, Work
from seal_nb.server.endpoint import Endpoint, Socket, connected, find_endpoint, read_endpoint, this_node
from seal_nb.settings import Parser, Settings, setting
from seal_nb.storage import data_file, runs_folder

SECRET_MARK = b"seal:"  # before the secret of a client in the marks of its messages, see requests.client_of
SECRET_BYTES = len(SECRET_MARK) + 16
DEFAULT_WINDOW = 256  # requests of a round in flight
DEFAULT_WAIT_S = 60.0
PING_S = 2.0
SILENT_S = 8.0  # a live server answers pings, even while its workers train
TRY_LATER = ("QueueFull", "ServerStopping")  # errors that do not concern the request
TRY_LATER_S = 1.0
TURN_S = 0.2
PING_MARK = b"ping"
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
DENIED = "it denied our key; put its public half into keys/allowed_clients/ of the server's run folder"
NO_KEYS = "a server of seal-nb on another machine needs keys: give its endpoint file, not its address"


@dataclass(kw_only=True)
class OpenMessage:
    """A message without a reply yet. Without `repeat`, it is sent to one server only."""

    body: bytes
    index: int  # of the request in its round
    expected: type  # of the reply
    repeat: bool
    due_at: float = 0.0  # when to send it; infinite: it was sent


@dataclass(eq=False)
class TTTClient(AbstractContextManager["TTTClient"]):
    """A client of one server. While the server is away, nothing is sent to another one."""

    endpoint: str | Path  # endpoint file (it survives a restart of the server), or address if no keys are needed
    _: KW_ONLY
    timeout_s: float = 3600.0  # for one reply, or for the next reply of a round, while the server is there
    wait_s: float = DEFAULT_WAIT_S  # that the server may be away, at the start or later: a batch job may be requeued
    key_file: str | Path | None = None  # a .key_secret file; None: the one in the run folder of the endpoint file

    def __post_init__(self) -> None:
        self.where = str(self.endpoint)
        self.server_id = ""  # of the server that answered last
        self._secret = SECRET_MARK + secrets.token_bytes(16)  # the server knows its requests by it, on any connection
        self._open: dict[bytes, OpenMessage] = {}
        self._numbers = itertools.count(1)
        self._context: zmq.Context[Socket] = zmq.Context()
        self._socket: Socket | None = None
        self._endpoint: Endpoint | None = None
        self._trouble = ""  # why there is no server
        self._looked_at = -math.inf  # when the endpoint file was read and a ping was sent
        self._pinged_at: float | None = None  # the first ping without an answer
        self._lost_at: float | None = 0.0  # since when there is no server; None: the right one answered a ping

    def evaluate(self, request: TTTRequest, *, timeout_s: float | None = None) -> TTTReply:
        """Train an adapter and answer the questions. Raises RemoteError, RoundTimeout."""
        return next(self.run_round([request], timeout_s=timeout_s))

    def generate(self, request: GenerateRequest) -> GenerateReply:
        """Generate text. Raises RemoteError, RoundTimeout."""
        return next(self.run_round([request]))

    def run_round(self, requests: Sequence[Work], *, timeout_s: float | None = None) -> Iterator[Any]:
        """Send any number of requests and yield replies as they come; `request_id` tells which is which. Raises
        RemoteError for the first failure that the server reports, RoundTimeout without a next reply within `timeout_s`.
        What is in work then goes on: sent again with its id, a request is joined or already answered."""
        for _, reply in self.run_indexed(requests, timeout_s=timeout_s):
            if isinstance(reply, RemoteError):
                raise reply
            yield reply

    def run_indexed(self, requests: Sequence[Work], *, timeout_s: float | None = None) -> Iterator[tuple[int, Any]]:
        """As `run_round`, but yields (index of the request, its reply or its RemoteError): a failure ends no round."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s

        def message(one: Work) -> tuple[bytes, type]:
            kind = TTTReply if isinstance(one, TTTRequest) else GenerateReply
            return one.model_dump_json(exclude_none=True).encode(), kind

        return self._exchange(map(message, requests), timeout_s=limit_s, window=DEFAULT_WINDOW)

    def status(self, *, timeout_s: float = 30.0) -> ServerStatus:
        """What the server is doing."""
        return ServerStatus.model_validate(self._command("status", timeout_s))

    def cancel(self, request_id: str) -> bool:
        """Cancel a request of this client, which gets an error instead of its reply. False if it is not in work. Other
        clients that wait for the same request still get its result. Any thread may call this while another waits."""
        with TTTClient(self.endpoint, wait_s=self.wait_s, key_file=self.key_file) as other:
            other._secret = self._secret
            reply = other._command("cancel", request_id=request_id)
        return reply["status"] == "cancelled"

    def forget(self, adapter_names: Sequence[str]) -> list[str]:
        """Delete kept adapters. Returns the names of those that existed. Requests that name one then fail."""
        forgotten: list[str] = self._command("forget", adapter_names=list(adapter_names))["forgotten"]
        return forgotten

    def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Ask the server to end; running requests may finish."""
        self._command("shutdown", timeout_s)

    def close(self) -> None:
        """Close the sockets. Work that is in flight goes on in the server."""
        self._disconnect()
        self._context.destroy(linger=200)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _command(self, cmd: str, timeout_s: float = 10.0, **fields: Any) -> dict[str, Any]:
        """The reply to a command. Only `status` is sent to a server that takes over, too."""
        message = json.dumps({"cmd": cmd, **fields}).encode(), dict
        ((_, reply),) = self._exchange([message], timeout_s=timeout_s, repeat=cmd == "status")
        if isinstance(reply, RemoteError):
            raise reply
        return reply

    def _exchange(
        self, messages: Iterable[tuple[bytes, type]], *, timeout_s: float, window: int = 1, repeat: bool = True
    ) -> Iterator[tuple[int, Any]]:
        """Send messages, each with the type of its reply, and yield (index, reply or RemoteError). Raises RoundTimeout.
        `timeout_s` is time with a server, for each next reply. While the server is away that clock stops and `wait_s`
        counts. Replies that this call does not wait for (any more) are skipped."""
        unsent, marks = enumerate(messages), set[bytes]()
        try:
            while True:
                for index, (body, expected) in itertools.islice(unsent, window - len(marks)):
                    marks.add(mark := self._secret + next(self._numbers).to_bytes(8, "big"))
                    self._open[mark] = OpenMessage(body=body, index=index, expected=expected, repeat=repeat)
                if not marks:
                    return
                mark, reply = self._next(marks, timeout_s)
                marks.remove(mark)
                message = self._open.pop(mark)
                if isinstance(reply, ErrorReply):
                    reply = RemoteError(reply.error, reply.field, reply.traceback, reply.request_id)
                elif not isinstance(reply, message.expected):
                    kinds = f"a {type(reply).__name__}, not a {message.expected.__name__}"
                    raise ProtocolError(f"the server answered with {kinds}")
                yield message.index, reply
        finally:
            for mark in marks:
                del self._open[mark]

    def _next(self, marks: set[bytes], timeout_s: float) -> tuple[bytes, Any]:
        left_s = timeout_s
        if self._lost_at is not None:
            self._lost_at = time.monotonic()  # each call waits the full wait_s
        while True:
            began, was_there = time.monotonic(), self._lost_at is None
            self._keep_in_touch()
            if self._socket is not None and self._socket.poll(max(0, int(1000 * min(left_s, TURN_S)))):
                frames = self._socket.recv_multipart()
                mark, reply = frames[0], protocol.read_reply(frames[-1])
                self._pinged_at = None
                if mark == PING_MARK and isinstance(reply, dict):
                    self._greet(str(reply.get("server_id", "")), missed=reply.get("missed") is True)
                elif mark in marks and isinstance(reply, ErrorReply) and reply.error.split(":")[0] in TRY_LATER:
                    self._open[mark].due_at = time.monotonic() + TRY_LATER_S
                elif mark in marks:
                    return mark, reply
            elif left_s <= 0:
                raise RoundTimeout(
                    f"no reply from {self.where} within {timeout_s:g} s, {len(marks)} requests are open; "
                    "look at the server (seal-nb status), or raise timeout_s"
                )
            left_s -= time.monotonic() - began if was_there else 0.0

    def _keep_in_touch(self) -> None:
        """Connect, ping, connect again after silence, send what is due. Raises RoundTimeout."""
        now = time.monotonic()
        if self._lost_at is not None and now - self._lost_at > self.wait_s:
            self._disconnect()
            why, known = [self._trouble or "it is silent"], self._endpoint
            if known is not None and known.is_local and known.node != this_node():
                only = f"machine {known.node}" if known.node else "its own machine"
                why.append(f"it listens on loopback, which only {only} reaches; others need --endpoint tcp://0.0.0.0:0")
            elif known is not None and not known.public_key and not known.is_local and NO_KEYS not in why:
                why.append(NO_KEYS)
            raise RoundTimeout(
                f"no TTT server answers at {self.where} within {self.wait_s:g} s ({'; '.join(why)}); "
                "start it (seal-nb serve), or raise wait_s if its job still waits in the queue"
            )
        if self._is_cut_off(now) or (now - self._looked_at > PING_S and self._has_moved()):
            self._disconnect()
        if self._socket is None:
            self._connect()
        if self._socket is not None and now - self._looked_at > PING_S:
            self._looked_at, self._pinged_at = now, self._pinged_at or now
            self._socket.send_multipart([PING_MARK, b"", b'{"cmd": "ping"}'])
        for mark, message in self._open.items():
            if self._socket is not None and self._lost_at is None and now >= message.due_at:
                self._socket.send_multipart([mark, b"", message.body])
                message.due_at = math.inf

    def _connect(self) -> None:
        """Connect to where the server is now. Open messages are sent when it has answered a ping."""
        try:
            self._endpoint = find_endpoint(self.where)
        except DataError as error:
            self._trouble = str(error)
            time.sleep(0.1)
            return
        self._trouble = self._trouble if self._trouble in (DENIED, NO_KEYS) else ""
        self._socket = connected(self._context, self._endpoint, "client", key_file=self.key_file)
        self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | REFUSED)
        self._looked_at = -math.inf

    def _greet(self, server_id: str, *, missed: bool) -> None:
        """A ping was answered: by the server that we look for, or by another one that has its port now. What is open is
        sent again to a server that is new, or threw replies away because they were not read in time."""
        expected = self._endpoint.server_id if self._endpoint else ""
        if expected and server_id != expected:
            self._lost_at = self._lost_at or time.monotonic()
            self._trouble = f"the server there is {server_id}, the endpoint file names {expected}"
        elif self._lost_at is not None or server_id != self.server_id or missed:
            self._lost_at, self._trouble, self.server_id = None, "", server_id
            for message in self._open.values():
                message.due_at = 0.0 if message.repeat else message.due_at

    def _is_cut_off(self, now: float) -> bool:
        """Whether the connection broke, or the server is silent. What is open is then sent again."""
        while self._socket is not None and (monitor := self._socket.get_monitor_socket()).poll(0):
            if recv_monitor_message(monitor)["event"] & REFUSED:
                self._trouble = DENIED if self._endpoint and self._endpoint.public_key else NO_KEYS
            elif self._lost_at is None:
                return True
        return self._pinged_at is not None and now - self._pinged_at > SILENT_S

    def _has_moved(self) -> bool:
        """Whether the endpoint file names another server now."""
        try:
            return self._endpoint is not None and find_endpoint(self.where).server_id != self._endpoint.server_id
        except DataError:
            return False

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=200)
        self._socket = self._pinged_at = None
        self._lost_at = self._lost_at or time.monotonic()


@dataclass(frozen=True, kw_only=True)
class SharedSettings(Settings):
    """Settings that the server passes on to its workers: the model, and how it is trained and graded."""

    model: str = setting("embedded", "model folder or hub name; embedded: the small model that the package fetches")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; auto: CUDA where there is a GPU")
    dtype: str = setting("auto", "of the base model: auto, float32, bfloat16, float64 or 4bit")
    deterministic: bool = setting(False, "true: one adapter and one text at a time, so results are equal bit by bit")
    n_slots: int = setting(0, "adapters trained at the same time in one worker; 0: 8 on a CPU, 88 on a GPU", least=0)
    n_threads: int = setting(1, "CPU threads of one worker", least=1)
    max_seq_length: int = setting(2048, "tokens; longer train sequences are cut", least=1)
    grader: str = setting("local", "local, exact, f1, recall, or a judge such as judge:gpt-4.1 (docs/graders.md)")
    inner_loop: str = setting("seal_nb.server.loop:load_inner_loop", "module:function that loads it (for tests)")
    lease_s: float = setting(30.0, "a worker that is silent for so many seconds loses its requests", least=0)
    parent_pid: int = setting(0, "end when this process ends; 0: do not watch any process")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        stated_grader(self.grader)  # before it stands in the command line of a worker


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
    max_unread_bytes: int = setting(2**26, "bytes of unread replies of one client; more are thrown away", least=1)
    max_unsaved_bytes: int = setting(2**28, "bytes of results kept in memory while the disk is full")

    @property
    def endpoint_path(self) -> Path:
        return runs_folder(self.endpoint_file) if self.endpoint_file else self.run_dir / "endpoint.json"


@dataclass(frozen=True, kw_only=True)
class InnerLoopSettings(SharedSettings):
    """What one worker process runs."""

    adapters_dir: Path = setting(Path("adapters"), "folder of kept adapters, in PEFT's format")  # noqa: RUF009
    token_budget: int = setting(4096, "tokens of one training pass", least=1)
    decode_rows: int = setting(0, "texts generated at a time; 0: 64 on a CPU, 320 on a GPU", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deterministic:
            object.__setattr__(self, "n_slots", 1)
            object.__setattr__(self, "decode_rows", 1)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(InnerLoopSettings):
    """One worker process."""

    endpoint_file: Path = setting(Path("runs/server/endpoint.json"), "endpoint file of the server")  # noqa: RUF009
    key_file: str = setting("", "CURVE secret key; empty: keys/worker.key_secret in the server's run folder")
    patience_s: float = setting(600.0, "end after so many seconds without a front end")


S = TypeVar("S", bound=Settings)


def parse(kind: type[S], argv: Sequence[str] | None, *, prog: str, description: str, **defaults: Any) -> S:
    """Settings from a command line with one option for each field; `defaults` replace declared ones. Begins the log."""
    log_to_stderr("server" if kind is ServeSettings else "worker")
    parser = Parser(prog=prog, description=description)
    readers: dict[Any, Any] = {bool: TypeAdapter(bool).validate_python, Path | None: Path}
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


ANSWER_S = 2.0  # the front end answers at once, even while its workers train
MOST_SAMPLES = 600
MIB = 2**20
Sample = dict[str, float]


class ServerFailed(SealError, RuntimeError):
    """The server process ended, or was not ready in time. The message has the end of its log."""


class TTTServer:
    """A server for a block: `with TTTServer(model=…, run_dir=…) as server: TTTClient(server.endpoint)`.

    It is the server that a cluster runs, as a child process with its own log. It ends with the block, and also when
    this process is killed. `settings` are fields of ServeSettings (`seal-nb serve --help` lists them). It must be ready
    within `start_timeout_s`, as loading a model may take minutes. Raises SettingsError; ServerFailed at the start."""

    def __init__(self, *, start_timeout_s: float = 900.0, log_level: str = "INFO", **settings: Any) -> None:
        names = {field.name for field in fields(ServeSettings)}
        if unknown := set(settings) - names:
            raise SettingsError(f"TTTServer does not know {sorted(unknown)}; it takes {sorted(names)}")
        self.settings = ServeSettings(**{**settings, "parent_pid": os.getpid()})
        self.start_timeout_s, self.log_level = start_timeout_s, log_level
        self.endpoint = str(self.settings.endpoint_path)  # for TTTClient; it also leads to a server that was restarted
        self.log_path = self.settings.run_dir / "server.log"
        self.process: LoggedProcess | None = None

    @property
    def info(self) -> Endpoint:
        return read_endpoint(self.endpoint)

    def is_up(self) -> bool:
        """Whether the server process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> Self:
        """Start the server if it does not run. Raises ServerFailed."""
        if self.is_up():
            return self
        env = {**os.environ, "SEAL_NB_LOG_LEVEL": self.log_level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = LoggedProcess(command(self.settings), self.log_path, env=env)
        try:
            self._wait_until_ready(self.process)
        except BaseException:
            self.stop(timeout_s=0)
            raise
        return self

    def stop(self, timeout_s: float | None = None) -> int:
        """End the server with SIGTERM, or kill it after `timeout_s` seconds. Returns its exit code."""
        if self.process is None:
            return 0
        self.process.terminate()
        try:
            return self.process.wait(self.settings.drain_s + 30 if timeout_s is None else timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its workers notice and end
            return self.process.wait()

    __enter__ = start

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait_until_ready(self, process: LoggedProcess) -> None:
        """The endpoint file is this process's, the server answers, and a worker is ready if it starts any."""
        deadline, failure = time.monotonic() + self.start_timeout_s, ""
        while not failure:
            if self.settings.endpoint_path.exists() and self.info.pid == process.pid:
                status = look(self.endpoint)
                if status and (status.workers or not self.settings.n_workers):
                    return
            if process.poll() is not None:
                failure = f"ended at its start (exit code {process.returncode})"
            elif time.monotonic() > deadline:
                failure = f"was not ready within {self.start_timeout_s:g} s"
            time.sleep(0.05)
        errors = [f": {line.partition(' ERROR ')[2]}" for line in process.lines() if " ERROR " in line]
        raise ServerFailed(f"the server {failure}{''.join(errors[-1:])}; {process.ending()}")


def look(where: str) -> ServerStatus | None:
    """The status of the server at `where` (endpoint file or address); None if there is no answer."""
    try:
        with TTTClient(where, wait_s=ANSWER_S) as client:
            return client.status(timeout_s=ANSWER_S)
    except (SealError, zmq.ZMQError):  # no endpoint file, no keys, no sockets left
        return None


def status_text(status: ServerStatus) -> str:
    """What `seal-nb status` shows on a terminal: a line for each number, and one for each worker."""
    from jinja2 import Environment

    lines = Environment(trim_blocks=True, lstrip_blocks=True).from_string(data_file("status.txt.j2").read_text())
    counts, now = Counter(status.counts), sample_of(status, status.uptime_s)
    return lines.render(status=status, counts=counts, now=now, mib=lambda n_bytes: f"{n_bytes / MIB:.0f} MiB").rstrip()


def sample_of(status: ServerStatus, at_s: float) -> Sample:
    """The numbers of one status. Where an inner loop reports no slots (adapters in training), its requests count."""
    reported = [worker for worker in status.workers if worker.stats]
    counts = Counter(status.counts)
    return {
        "at_s": at_s,
        "queued": status.n_queued,
        "running": status.n_running,
        "slots_in_use": sum(worker.number("slots_in_use", worker.n_running) for worker in reported),
        "slots": sum(worker.number("slots", worker.capacity) for worker in reported),
        "jobs_per_min": status.jobs_per_min,
        "tokens_per_s": status.tokens_per_s,
        "memory_bytes": status.rss_bytes + sum(worker.number("rss_bytes") for worker in reported),
        "gpu_bytes": sum(worker.number("gpu_bytes") for worker in reported),
        **{name: counts[name] for name in ("answered", "failed", "requeued")},
        "workers": len(status.workers),
    }


@dataclass(eq=False)
class Watch:
    """`with Watch(where) as watch`: a thread takes samples until the server or the block ends."""

    where: str
    _: KW_ONLY
    alive: Callable[[], bool] | None = None  # whether its process runs; None: it ends with a silence of `patience_s`
    every_s: float = 1.0
    patience_s: float = 15.0  # a server that restarts within this time counts as the same one

    def __post_init__(self) -> None:
        self.last: Sample | None = None
        self._kept: list[Sample] = []
        self._every, self._n, self._asked_at = 1, 0, 0.0
        self._stopped = threading.Event()

    def samples(self) -> list[Sample]:
        """At most `MOST_SAMPLES` over the whole time, and the newest one."""
        return list(self._kept)  # the thread may add

    def follow(self, for_s: float = float("inf")) -> Iterator[Sample]:
        """Each sample that is asked for after the call, until the server ends or `for_s` seconds are over; the first is
        waited for while the server lives. Raises what ended the watch, if that was not the server's end."""
        called_at, seen = time.monotonic(), None
        while True:
            if self.last is not seen and self.last is not None and self._asked_at >= called_at:
                seen = self.last
                yield seen
            elif self._end.done():
                return self._end.result()
            elif seen is not None and time.monotonic() >= called_at + for_s:
                return
            else:
                wait([self._end], min(0.1, self.every_s))

    @cached_property
    def _end(self) -> Future[None]:
        return DaemonThreads(1).submit(self._run)

    def start(self) -> Self:
        """Begin to take samples, if that has not begun."""
        _ = self._end
        return self

    def add(self, sample: Sample) -> None:
        """Keep a sample. When the list is full, every second one goes, and half as many stay from then on."""
        self._kept = [*self._kept[: -(-self._n // self._every)], sample]  # the newest one stays until the next one
        if len(self._kept) > MOST_SAMPLES:
            self._kept, self._every = [*self._kept[:-1:2], sample], 2 * self._every
        self._n += 1
        self.last = sample

    __enter__ = start

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        wait([self._end])

    def _run(self) -> None:
        began_at = heard_at = time.monotonic()
        while not self._stopped.is_set() and (self.alive is None or self.alive()):
            asked_at, status, now = time.monotonic(), look(self.where), time.monotonic()
            if status is not None:
                heard_at = now
                self.add(sample_of(status, now - began_at))
                self._asked_at = asked_at  # after `last`: until then it is that of an earlier sample
            elif self.alive is None and now - heard_at > self.patience_s:
                return
            self._stopped.wait(self.every_s)

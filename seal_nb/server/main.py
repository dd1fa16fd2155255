"""One TTT server from start to end: bind, write the endpoint file, start workers, serve, drain, clean up.

`seal-nb serve`, `TTTServer` and batch scripts all come here. Exit codes: 0 ended as asked (SIGTERM, SIGINT, a client's
shutdown, idle, another server on the same endpoint file), 1 no worker could start, 2 wrong settings."""

import ctypes
import logging
import os
import resource
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zmq

from seal_nb.errors import DataError, SealError, SettingsError
from seal_nb.server.client import DEFAULT_WINDOW, ServeSettings, SharedSettings, WorkerSettings, command, look, parse
from seal_nb.server.endpoint import Endpoint, KeyCheck, Role, Socket, listen, read_endpoint, this_node
from seal_nb.server.frontend import Clients, FrontEnd
from seal_nb.server.requests import RequestTable
from seal_nb.server.worker import MAX_REPLY_BYTES, pack
from seal_nb.storage import write_json

log = logging.getLogger(__name__)

HARD_SIZE_FACTOR = 2  # ZMQ drops messages that exceed the limit by this factor, without a reply
HEARTBEAT_S, SILENT_S = 30, 300  # ZMQ asks whether a client reads; one that answers nothing for so long is cut off
HANDSHAKE_S = 5  # for a new connection
FILE_CHECK_S = 1.0
MAX_EARLY_ENDS = 3
STEADY_S = 60.0  # a worker that lives so long has started well


class LocalWorker:
    """A worker that a server starts on its machine, and again after each end, which calls `exited(pid, why)`."""

    def __init__(self, settings: ServeSettings, index: int, exited: Callable[[int, str], None]) -> None:
        shared = {one.name: getattr(settings, one.name) for one in fields(SharedSettings)}
        shared |= {"parent_pid": os.getpid(), "endpoint_file": settings.endpoint_path}
        self.command, self.env = command(WorkerSettings(**shared)), dict(os.environ)
        if settings.n_workers > 1 and settings.device in ("auto", "cuda") and (gpus := visible_gpus()):
            self.env["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        self.exited, self.stall_s = exited, settings.stall_s
        self.process: subprocess.Popen[bytes] | None = None
        self.n_early_ends = 0
        self._started_at = self._start_at = 0.0
        self._ready_at = 0.0  # when it was last among the server's workers; 0: not yet

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def watch(self, now: float, *, is_ready: bool) -> None:
        """Start it if it is due. Kill it if it was ready and does not come back."""
        if self.process is None:
            if now >= self._start_at:
                self.process = subprocess.Popen(self.command, env=self.env, stdin=subprocess.DEVNULL)
                self._started_at, self._ready_at = now, 0.0
        elif (code := self.process.poll()) is not None:
            self.n_early_ends = self.n_early_ends + 1 if now - self._started_at < STEADY_S else 0
            self._start_at = now + min(30.0, 0.1 * 2**self.n_early_ends)
            why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            log.warning("worker process %d ended (%s)", self.pid, why)
            self.exited(self.pid, why)
            self.process = None
        elif is_ready:
            self._ready_at = now
        elif self._ready_at and 0 < self.stall_s < now - self._ready_at:
            log.warning("worker process %d is killed: it made no progress", self.pid)
            self.process.kill()


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES, or all GPUs of the machine, without the help of a library."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    cards = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(cards.iterdir())] if cards.is_dir() else []


class Server:
    """All parts of one server, in the order they are taken; `stack` releases them in reverse."""

    def __init__(self, settings: ServeSettings, stack: ExitStack) -> None:
        self.settings = settings
        self.server_id = uuid.uuid4().hex[:12]
        self._n_failed = 0  # workers that reported why they cannot start
        self._checked_at = 0.0
        takes_over = refuse_second_server(settings.endpoint_path)
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        # ZMQ numbers anonymous connections from `rand()` on, and aborts if a peer has the next number as its name.
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4)))
        self.context: zmq.Context[Socket] = zmq.Context()
        stack.callback(self.context.destroy, linger=2000)  # so that the last replies are sent
        asked = Endpoint.at(settings.endpoint)
        worker_address = settings.worker_endpoint or f"tcp://{asked.host}:0"
        is_local = asked.is_local and Endpoint.at(worker_address).is_local
        self.clients_need_keys = settings.client_keys or not is_local
        self.keys = KeyCheck(self.context, settings.run_dir / "keys")
        stack.callback(self.keys.stop)
        clients, address = self._bound(settings.endpoint, "client")
        workers, worker_address = self._bound(worker_address, "worker")
        self.endpoint = self._endpoint(address, worker_address)
        stack.callback(lambda: settings.endpoint_path.unlink(missing_ok=True) if self._is_mine() else None)
        # Before the journal: an earlier run of this batch job sees that its file was taken and releases the journal.
        write_json(settings.endpoint_path, asdict(self.endpoint))
        lock_wait_s = settings.drain_s + 10.0 if takes_over else min(10.0, settings.lease_s)
        table = RequestTable(settings, self.server_id, lock_wait_s=lock_wait_s)
        stack.callback(table.close)
        self.front = FrontEnd(table, Clients(clients, self.keys, settings, need_keys=self.clients_need_keys), workers)
        self.local_workers = [LocalWorker(settings, index, self._exited) for index in range(settings.n_workers)]
        stack.callback(self._end_workers)

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        log.info("server %s listens at %s (%s)", self.server_id, self.endpoint.endpoint, self.settings.endpoint_path)
        self.front.run(self._watch)
        table, workers = self.front.table, self.front.workers
        own = [identity for pid, identity in workers.here().items() if pid in {one.pid for one in self.local_workers}]
        for identity in workers.queue.workers if self.front.for_good else own:  # others wait for the next server
            workers.tell(identity, pack("stop", why=table.stopping))
        log.info("server %s ended: %s", self.server_id, table.stopping)
        table.save()
        if table.results.unsaved:
            log.error("%s", table.results.trouble)
        return self.front.exit_code or int(bool(table.results.unsaved))

    def _on_signal(self, number: int, _: object) -> None:
        """Drain; a second Ctrl-C ends at once. A batch system may send SIGTERM more than once."""
        if number == signal.SIGINT and self.front.drain_until is not None:
            self.front.drain_until = 0.0
        self.front.ask_to_stop(signal.Signals(number).name, for_good=False)

    def _bound(self, address: str, role: Role) -> tuple[Socket, str]:
        """A socket, and the address at which others reach it."""
        socket = self.context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if role == "client":
            socket.setsockopt(zmq.MAXMSGSIZE, HARD_SIZE_FACTOR * self.settings.max_message_bytes)
            socket.rcvhwm = 10  # of any size
            socket.sndhwm = 2 * DEFAULT_WINDOW  # replies that a client has not read yet
            # The connection of a client that reads nothing at all ends, and with it what waits there.
            socket.setsockopt(zmq.HEARTBEAT_IVL, 1000 * HEARTBEAT_S)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 1000 * SILENT_S)
        else:
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker that connects again takes over its identity
            socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_REPLY_BYTES)
            socket.sndhwm, socket.rcvhwm = 0, 1000
        socket.setsockopt(zmq.HANDSHAKE_IVL, 1000 * HANDSHAKE_S)
        if role == "worker" or self.clients_need_keys:
            self.keys.guard(socket, role)
        host, port = listen(socket, address)
        return socket, f"tcp://{self.settings.advertise_host or host}:{port}"

    def _endpoint(self, address: str, worker_address: str) -> Endpoint:
        return replace(
            Endpoint.at(address),
            worker_endpoint=worker_address,
            pid=os.getpid(),
            job_id=os.environ.get("SLURM_JOB_ID", ""),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            server_id=self.server_id,
            public_key=self.keys.pair[0].decode() if self.clients_need_keys else "",
            worker_key=self.keys.pair[0].decode(),
            run_dir=str(self.settings.run_dir.resolve()),
            node=this_node(),
        )

    def _watch(self, now: float) -> None:
        """At every tick: look after workers, the parent process and the endpoint file."""
        if self.front.drain_until is None:
            ready = self.front.workers.here()
            for worker in self.local_workers:
                worker.watch(now, is_ready=worker.pid in ready)
        if self.settings.parent_pid and os.getppid() != self.settings.parent_pid:
            self.front.ask_to_stop("the process that started the server is gone")
        if now - self._checked_at > FILE_CHECK_S:
            self._checked_at = now
            path = self.settings.endpoint_path
            if not path.exists() and path.parent.is_dir():
                write_json(path, asdict(self.endpoint))  # the file was removed
            elif not self._is_mine(missing_is_mine=True):
                self.front.ask_to_stop(f"another server has taken {path}", for_good=False)

    def _end_workers(self) -> None:
        """Those that the front end knows were told to stop and get ten seconds."""
        told, deadline = self.front.workers.here(), time.monotonic() + 10.0
        for process in [worker.process for worker in self.local_workers if worker.process]:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()) if process.pid in told else 0.0)
            process.kill()
            process.wait()

    def _exited(self, pid: int, why: str) -> None:
        workers = self.front.workers
        error = workers.failures.pop(pid, "")
        why = error or why
        if (identity := workers.here().get(pid)) is not None:
            workers.lose(identity, why)
        if self.front.table.model_id:
            return  # workers can start, so only this one failed
        self._n_failed += bool(error)
        n_early_ends = max(worker.n_early_ends for worker in self.local_workers)
        if self._n_failed >= self.settings.n_workers or n_early_ends >= MAX_EARLY_ENDS:
            log.error("no worker can start: %s", why)
            self.front.ask_to_stop(f"no worker can start: {why}", exit_code=1)

    def _is_mine(self, missing_is_mine: bool = False) -> bool:
        try:
            return read_endpoint(self.settings.endpoint_path).server_id == self.server_id
        except DataError:
            return missing_is_mine


def refuse_second_server(path: Path) -> bool:
    """Raises SettingsError if the server of this endpoint file lives. A file that was left behind is overwritten. True
    if it is an earlier run of this batch job, perhaps alive on a node that was cut off: it will give up the file."""
    try:
        other = read_endpoint(path)
    except DataError:
        return False  # no file, or not an endpoint file
    if other.job_id and other.job_id == os.environ.get("SLURM_JOB_ID"):
        return True
    if look(str(path)) is not None:
        whose = f"server {other.server_id}, which is alive (process {other.pid} on {other.host})"
        raise SettingsError(f"{path} belongs to {whose}; end it, or give this one another run_dir")
    return False


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m seal_nb.server.main", **defaults: Any) -> int:
    """The server process: settings from the command line, log to standard error. `defaults` replace declared ones."""
    try:
        settings = parse(ServeSettings, argv, prog=prog, description="Start a TTT server.", **defaults)
        with suppress(ValueError, OSError):  # each worker and each client is a file
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with ExitStack() as stack:
            return Server(settings, stack).run()
    except (SealError, OSError) as error:
        remedy = "" if isinstance(error, SealError) else "; check the disk and the rights of the run folder"
        log.error("%s: %s%s", type(error).__name__, error, remedy)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())

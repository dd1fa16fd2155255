"""One TTT server from start to end: claim, bind, start workers, serve, drain, clean up.

``seal-nb serve``, ``service.launch`` and a batch script all come here. Exit codes: 0 ended as asked
(SIGTERM, SIGINT, a client's shutdown, idle, a newer server on the same endpoint file), 1 no worker could
start, 2 the settings cannot be served.
"""

import argparse
import logging
import os
import signal
import socket as sockets
import sys
import time
import typing
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import zmq

from seal_nb.errors import DataError, SealError, SettingsError
from seal_nb.server.client import DEFAULT_WINDOW
from seal_nb.server.endpoint import Endpoint, advertised, here, is_alive, is_loopback, read_endpoint, split_tcp
from seal_nb.server.frontend import FrontEnd
from seal_nb.server.keys import Gate, keys_dir, load_pair, make_keys, secure_server
from seal_nb.server.launch import Pool
from seal_nb.server.queue import JobQueue
from seal_nb.server.requests import AnswerCounts, Desk, Results
from seal_nb.server.settings import Limits, ServeSettings, option_type
from seal_nb.server.status import Meter

log = logging.getLogger(__name__)

HARD_SIZE_FACTOR = 4  # messages so far above the bound are cut off by ZMQ itself, without a reply
FILE_CHECK_S = 1.0
MAX_EARLY_DEATHS = 3


def serve(settings: ServeSettings) -> int:
    """Serve until told to end; returns the exit code. Raises SealError where it cannot start."""
    with ExitStack() as stack:
        return Server(settings, stack).run()


class Server:
    """Everything one server holds, in the order it is taken; ``stack`` gives it back in the other order.

    The endpoint file comes before the journal: a server that is to yield sees it, and lets go of the journal.
    """

    def __init__(self, settings: ServeSettings, stack: ExitStack) -> None:
        self.settings, self.stack = settings, stack
        self.server_id = uuid.uuid4().hex[:12]
        self.exit_code = 0
        self._n_failed = 0  # workers that said why they cannot start
        self._checked_at = 0.0
        yielding = refuse_second_server(settings.endpoint_path)
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(self.context.destroy, linger=2000)  # the last replies get out
        self.gate = self._gate()
        self.clients = self._bound(settings.endpoint, "client")
        self.workers = self._bound(settings.worker_endpoint or self._beside(settings.endpoint), "worker")
        self.endpoint = self._endpoint()
        stack.callback(self._remove_endpoint_file)
        self.endpoint.write(settings.endpoint_path)
        lock_wait_s = settings.drain_s + 10.0 if yielding else min(10.0, settings.lease_s)
        self.results = Results(settings.run_dir / "results.journal.jsonl", lock_wait_s=lock_wait_s)
        stack.callback(self.results.close)
        self.counts = AnswerCounts(settings.run_dir / "answer_counts.bin")
        stack.callback(self.counts.close)
        self.front = self._front_end()
        self.pool = Pool(settings, "" if self.gate else self.endpoint.worker_endpoint, self._worker_exited)
        stack.callback(self._end_workers)

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        where = self.endpoint.endpoint
        log.info("server %s listens at %s (%s)", self.server_id, where, self.settings.endpoint_path)
        self.front.run()
        ours = None if self.front.for_good else set(self.pool.pids)
        self.front.crew.dismiss(self.front.desk.stopping, pids_here=ours)
        log.info("server %s ended: %s", self.server_id, self.front.desk.stopping)
        self.front.desk.save()
        if self.results.n_unsaved:
            log.error("%s", self.results.trouble)
            self.exit_code = self.exit_code or 1
        return self.exit_code

    def _end_workers(self) -> None:
        self.pool.end(told={peer.pid for peer in self.front.crew.peers.values()})

    def _remove_endpoint_file(self) -> None:
        if self._is_mine():
            self.settings.endpoint_path.unlink(missing_ok=True)

    def _on_signal(self, number: int, _: object) -> None:
        """Drain; a second Ctrl-C ends at once. A batch system may well send SIGTERM more than once."""
        again = number == signal.SIGINT and self.front.drain_until is not None
        self.front.ask_to_stop(signal.Signals(number).name, impatient=again, for_good=False)

    def _gate(self) -> Gate | None:
        """Keys and the list of who may come in, where the server can be reached from other machines."""
        addresses = [self.settings.endpoint, self.settings.worker_endpoint or self.settings.endpoint]
        if all(is_loopback(split_tcp(address)[0]) for address in addresses):
            return None
        folder = keys_dir(self.settings.run_dir)
        make_keys(folder)
        return Gate(self.context, folder)

    def _bound(self, address: str, role: str) -> "zmq.Socket[bytes]":
        socket = self.context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # who reconnects under its identity takes it over
        if role == "client":
            socket.setsockopt(zmq.MAXMSGSIZE, HARD_SIZE_FACTOR * self.settings.limits.max_message_bytes)
            socket.rcvhwm = 100
            socket.sndhwm = 2 * DEFAULT_WINDOW  # replies that a client has not read yet
        else:
            socket.sndhwm = socket.rcvhwm = 0
        if "[" in address:
            socket.setsockopt(zmq.IPV6, 1)
        if self.gate:
            self.gate.watch(socket, f"{role}s")
            secure_server(socket, load_pair(self.gate.folder / "server.key_secret"), domain=f"{role}s")
        try:
            socket.bind(address.replace("tcp://localhost:", "tcp://127.0.0.1:"))
        except zmq.ZMQError as error:
            raise SettingsError(
                f"cannot listen at {address}: {error}; choose another address, or port 0 for a free one"
            ) from error
        return socket

    def _beside(self, endpoint: str) -> str:
        return f"tcp://{split_tcp(endpoint)[0]}:0"

    def _endpoint(self) -> Endpoint:
        addresses = [
            advertised(_address(socket), host=self.settings.advertise_host) for socket in (self.clients, self.workers)
        ]
        return here(
            endpoint=addresses[0],
            worker_endpoint=addresses[1],
            server_id=self.server_id,
            public_key=load_pair(self.gate.folder / "server.key_secret").public.decode() if self.gate else "",
            run_dir=self.settings.run_dir,
        )

    def _front_end(self) -> FrontEnd:
        s = self.settings
        desk = Desk(
            queue=JobQueue(
                lease_s=s.lease_s, stall_s=s.stall_s, job_timeout_s=s.job_timeout_s,
                max_tries=s.max_tries, n_expected=s.n_workers,
            ),
            meter=Meter(time.monotonic()),
            results=self.results, counts=self.counts,
            limits=s.limits, seed=s.seed, server_id=self.server_id,
        )  # fmt: skip
        return FrontEnd(
            clients=self.clients, workers=self.workers, gate=self.gate, desk=desk,
            watch=self._watch, idle_timeout_s=s.idle_timeout_s, drain_s=s.drain_s,
            workers_load=s.n_workers > 0, adapters_dir=s.adapters_dir,
        )  # fmt: skip

    def _watch(self, now: float) -> None:
        """At every tick: workers, the parent, and whether the endpoint file is still ours."""
        if self.front.drain_until is None:
            self.pool.kill(self.front.crew.given_up(now))
            self.pool.watch(now)
        if self.front.crew.mismatch:
            self.exit_code = 1
            self._stop(self.front.crew.mismatch)
        if self.settings.parent_pid and os.getppid() != self.settings.parent_pid:
            self._stop("the process that started the server is gone")
        if now - self._checked_at > FILE_CHECK_S:
            self._checked_at = now
            path = self.settings.endpoint_path
            if not path.exists() and path.parent.is_dir():
                self.endpoint.write(path)  # somebody removed it
            elif not self._is_mine(missing_is_mine=True):
                self._stop(f"another server has taken {self.settings.endpoint_path}", for_good=False)

    def _stop(self, why: str, *, for_good: bool = True) -> None:
        if self.front.drain_until is None:
            self.front.ask_to_stop(why, for_good=for_good)

    def _worker_exited(self, pid: int, why: str) -> None:
        said = self.front.crew.failures.pop(pid, "")
        self.front.crew.exited(pid, sockets.gethostname(), said or why)
        if self.front.desk.model_id:
            return  # workers can start: this one's end is its own
        self._n_failed += bool(said)
        if self._n_failed >= self.settings.n_workers or self.pool.most_early_deaths() >= MAX_EARLY_DEATHS:
            log.error("no worker can start: %s", said or why)
            self.exit_code = 1
            self._stop(f"no worker can start: {said or why}")

    def _is_mine(self, missing_is_mine: bool = False) -> bool:
        try:
            return read_endpoint(self.settings.endpoint_path).server_id == self.server_id
        except DataError:
            return missing_is_mine


def _address(socket: "zmq.Socket[bytes]") -> str:
    address = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes)
    return address.decode().rstrip("\0")


def refuse_second_server(path: Path) -> bool:
    """Raises SettingsError if the server of this endpoint file lives; one left behind is overwritten.

    True if it is this batch job's own earlier run, perhaps alive on a node that was cut off: it will yield.
    """
    try:
        other = read_endpoint(path)
    except DataError:
        return False  # none there, or no endpoint file
    if other.job_id and other.job_id == os.environ.get("SLURM_JOB_ID"):
        return True
    if is_alive(other, timeout_s=2.0):
        raise SettingsError(
            f"{path} belongs to server {other.server_id}, which is alive "
            f"(process {other.pid} on {other.host}); end it, or give this one another run_dir"
        )
    return False


def parse(argv: Sequence[str] | None = None) -> ServeSettings:
    """Settings from ``--n-workers 2`` and the like: one option a field; bounds as ``--max-rank 64``."""
    parser = argparse.ArgumentParser(prog="seal-nb serve", description="Serve the inner loop.")
    for kind in (ServeSettings, Limits):
        hints = typing.get_type_hints(kind)
        for field in fields(kind):
            if field.default is not MISSING:
                plain = Path if "Path" in str(hints[field.name]) else option_type(hints[field.name])
                option = f"--{field.name.replace('_', '-')}"
                parser.add_argument(option, type=plain, default=field.default, help="default: %(default)s")
    given: dict[str, Any] = vars(parser.parse_args(argv))
    limits = Limits(**{field.name: given.pop(field.name) for field in fields(Limits)})
    return ServeSettings(**given, limits=limits)


def main(argv: Sequence[str] | None = None) -> int:
    """The process: settings from the command line, log to standard error."""
    logging.basicConfig(
        level=os.environ.get("SEAL_NB_LOG_LEVEL", "INFO"),
        stream=sys.stderr,
        format="%(asctime)s server %(levelname)s %(message)s",
    )
    try:
        return serve(parse(argv))
    except SealError as error:
        log.error("%s: %s", type(error).__name__, error)
        return 2
    except OSError as error:
        log.error("%s: %s; check the disk and the rights of the run folder", type(error).__name__, error)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())

"""The front end: one loop between clients and workers. It never imports torch.

`requests` decides what a request means, `queue` which worker gets it; this module receives, sends, and watches the
time. It logs no content of requests. A client or a worker that leaves, sends rubbish or does not read cannot stop it.
"""

import contextlib
import json
import logging
import os
import socket as sockets
import time
from collections.abc import Callable
from typing import Any

import zmq

from seal_nb.errors import ProtocolError, RunMismatch, SealError
from seal_nb.protocol import PROTOCOL_VERSION, Command, ServerStatus, WorkerStatus, parse_request, read_json
from seal_nb.server.endpoint import LOUD, KeyCheck, Socket
from seal_nb.server.queue import Envelope, Worker
from seal_nb.server.requests import Cancelled, RequestTable, ServerStopping, WorkerLost
from seal_nb.server.worker import pack, rss_bytes, unpack
from seal_nb.storage import forget_adapters

log = logging.getLogger(__name__)

TICK_S = 0.2
BURST = 200  # messages of one socket before the other socket's turn
MAX_FRAMES = 8
HERE = sockets.gethostname()


class InternalError(SealError, RuntimeError):
    """A fault of the server. The message names it; the server goes on."""


class Workers:
    """The workers as the front end sees them: introductions, heartbeats, results, losses."""

    def __init__(self, socket: Socket, table: RequestTable, ask_to_stop: Callable[..., None]) -> None:
        self.socket, self.table, self.queue, self.meter = socket, table, table.queue, table.meter
        self.ask_to_stop = ask_to_stop
        self.last_loss = ""
        self.failures: dict[int, str] = {}  # process of a worker → the error it reported before it ended
        self._handlers: dict[str, Callable[..., None]] = {
            "ready": self._on_ready, "beat": self._on_beat, "result": self._on_result, "failed": self._on_failed,
            "leaving": lambda identity, _: self.lose(identity, "it left as planned", planned=True),
        }  # fmt: skip

    def receive(self, frames: list[bytes]) -> None:
        """Handle one message of a worker; the fields of its header are arguments of the handler."""
        try:
            kind, header, body = unpack(frames[1:])
            self._handlers[kind](frames[0], body, **header)
        except Exception as error:
            self.meter.counts["rubbish_of_workers"] += 1
            if self.meter.counts["rubbish_of_workers"] <= LOUD:
                log.warning("a worker sent a message that cannot be read (%s)", type(error).__name__)
            log.debug("why", exc_info=True)

    def dispatch(self) -> None:
        """Send each request that can start now to its worker."""
        for request in self.queue.assignments(time.monotonic()):
            assert request.worker is not None
            header: dict[str, Any] = {"key": request.key, "seed": request.seed, "token": request.token}
            header["queue_s"] = round(request.assigned_at - request.submitted_at, 6)
            self.tell(request.worker, pack("job", request.message, **header, server_id=self.table.server_id))

    def check_leases(self, now: float) -> None:
        for identity in self.queue.expired(now):
            self.lose(identity, f"silent for more than {self.table.settings.lease_s:g} s")
        for identity, why in self.queue.stuck(now).items():
            self.tell(identity, pack("abort", why=why))  # it still sends heartbeats, so it can end itself
            self.lose(identity, why)

    def lose(self, identity: bytes, why: str, *, planned: bool = False) -> None:
        """A worker is gone; its lease need not run out. Its requests go to others."""
        if identity not in self.queue.workers:
            return
        name, self.last_loss = self.queue.workers[identity].about["worker_id"], why
        n_requeued, given_up = self.queue.lose(identity, planned=planned)
        log.warning("worker %s %s; %d requests wait again", name, "leaves" if planned else "is lost", n_requeued)
        log.debug("because: %s", why)
        self.meter.counts["workers_lost"] += not planned
        self.meter.counts["requeued"] += n_requeued
        for request in given_up:
            log.warning("a request is given up: it lost its worker %d times", request.tries)
            what = f"request {request.key!r} lost its worker {request.tries} times (the last: {why})"
            remedy = "look at the server's log, make the request smaller, or send it again"
            self.table.fail(request, WorkerLost(f"{what}; {remedy}"))

    def here(self) -> dict[int, bytes]:
        """The workers of this machine by their process."""
        workers = self.queue.workers.items()
        return {worker.about["pid"]: identity for identity, worker in workers if worker.about["host"] == HERE}

    def tell(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self.socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the lease will run out
            log.info("a message found no worker: %s", error)

    def status(self, now: float) -> list[WorkerStatus]:
        return [
            WorkerStatus(
                **worker.about,
                n_running=len(worker.requests),
                capacity=worker.capacity,
                silent_s=round(now - worker.seen_at, 3),
                no_step_s=round(now - worker.stepped_at, 3) if worker.requests else 0.0,
                stats=worker.stats,
            )
            for worker in self.queue.workers.values()
        ]

    def _on_ready(self, identity: bytes, _: bytes, *, session: int, capacity: int, **others: Any) -> None:
        about = {name: others[name] for name in ("worker_id", "host", "pid", "model_id")}
        now, known = time.monotonic(), self.queue.workers.get(identity)
        if known is None or known.session != session:
            worker = Worker(capacity=int(capacity), seen_at=now, stepped_at=now, session=session, about=about)
            try:
                self.table.set_model(about["model_id"])
            except RunMismatch as error:
                log.error("worker %s is turned away: %s", about["worker_id"], error)
                if not self.table.model_id:  # it has another model than the results of the run folder
                    self.ask_to_stop(str(error), exit_code=1)
                return self.tell(identity, pack("stop", why=str(error)))
            self.lose(identity, f"worker {about['worker_id']} started again")
            self.queue.join(identity, worker)
            log.info("worker %s is ready: %d requests at once", about["worker_id"], worker.capacity)
        self.tell(identity, pack("welcome", lease=self.queue.workers[identity].lease))

    def _on_beat(
        self, identity: bytes, _: bytes, *, lease: int, capacity: int, steps: int, stats: dict[str, Any]
    ) -> None:
        alive = self.queue.beat(identity, lease=lease, capacity=int(capacity), steps=int(steps), now=time.monotonic())
        if alive:
            self.queue.workers[identity].stats = dict(stats)
        self.tell(identity, pack("beat" if alive else "expired", lease=lease))

    def _on_result(self, identity: bytes, body: bytes, *, token: str, error: str, tokens: int) -> None:
        error, tokens = str(error), int(tokens)
        if (request := self.queue.finish(identity, token)) is not None:
            self.table.deliver(request, body, error=error, tokens=tokens)
        else:
            self.meter.counts["void_results"] += 1
            log.info("a result of a try that is not current was dropped")

    def _on_failed(self, identity: bytes, _: bytes, *, pid: int, error: str, traceback: str) -> None:
        self.failures[int(pid)] = error = str(error)
        # While a worker loads, its errors cannot contain text of requests.
        log.error("a worker failed: %s", error if identity not in self.queue.workers else error.partition(":")[0])
        log.debug("its error: %s\n%s", error, traceback)
        self.lose(identity, error)


class FrontEnd:
    """Clients, and the one loop in which everything happens."""

    def __init__(self, table: RequestTable, clients: Socket, workers: Socket, keys: KeyCheck | None) -> None:
        self.table, self.clients, self.keys = table, clients, keys
        self.settings, self.queue, self.meter = table.settings, table.queue, table.meter
        table.send = self._send
        self.workers = Workers(workers, table, self.ask_to_stop)
        self.drain_until: float | None = None
        self.for_good, self.exit_code = True, 0
        self._client_seen_at = time.monotonic()

    def run(self, watch: Callable[[float], None]) -> None:
        """Serve until told to stop. `watch` is called at every tick (worker processes, endpoint file, parent)."""
        sources = {self.clients: self._on_client, self.workers.socket: self.workers.receive}
        next_tick = 0.0
        while self.drain_until is None or (self.queue.requests and time.monotonic() <= self.drain_until):
            for socket in zmq.select([*sources], [], [], TICK_S)[0]:
                with contextlib.suppress(zmq.Again):
                    for _ in range(BURST):
                        sources[socket](socket.recv_multipart(zmq.NOBLOCK))
            self.workers.dispatch()
            if (now := time.monotonic()) >= next_tick:
                next_tick = now + TICK_S
                watch(now)
                self._tick(now)
        self._turn_away()

    def ask_to_stop(self, why: str, *, for_good: bool = True, exit_code: int = 0) -> None:
        """Drain from the next tick on. Safe in a signal handler. Not `for_good`: another server will follow (a requeued
        job), and workers of other nodes wait for it."""
        self.exit_code = self.exit_code or exit_code
        if not self.table.stopping:
            self.table.stopping, self.for_good = f"the server is ending: {why}", for_good

    def status(self) -> ServerStatus:
        now, table, queue = time.monotonic(), self.table, self.queue
        troubles = [table.results.trouble or table.counts.trouble]
        if queue.requests and not queue.workers:
            last = self.workers.last_loss or "none"
            troubles.append(f"requests wait and no worker is there (the last one that was lost: {last})")
        return ServerStatus(
            server_id=table.server_id,
            model_id=table.model_id,
            pid=os.getpid(),
            uptime_s=round(now - self.meter.started_at, 3),
            draining=self.drain_until is not None,
            n_queued=queue.n_waiting,
            n_running=queue.n_running,
            n_slots=sum(worker.capacity for worker in queue.workers.values()),
            n_results=len(table.results),
            n_unsaved=len(table.results.unsaved),
            queued_bytes=queue.waiting_bytes,
            rss_bytes=rss_bytes(),
            counts=dict(self.meter.counts) | ({"denied": self.keys.n_denied} if self.keys else {}),
            workers=self.workers.status(now),
            trouble="; ".join(filter(None, troubles)),
            **self.meter.rates(now),
        )

    def _on_client(self, frames: list[bytes]) -> None:
        *route, message = frames
        envelope: Envelope = tuple(route)
        fields: dict[str, Any] = {}
        try:
            if not route or len(frames) > MAX_FRAMES or (len(route) > 1 and route[-1] != b""):
                envelope = (frames[0], b"")
                raise ProtocolError(f"a message is one frame of JSON, this one has {len(frames) - 1} frames")
            if len(message) > (most := self.settings.max_message_bytes):
                raise ProtocolError(f"the message has {len(message)} bytes, {most} are the most; send less at once")
            fields = read_json(message)
            request = parse_request(fields)
            if not isinstance(request, Command) or request.cmd in ("cancel", "forget"):
                self._client_seen_at = time.monotonic()  # looking at the server does not keep it running
            if isinstance(request, Command):
                self._send(envelope, self._obey(request))
            else:
                self.table.accept(request, message, envelope, time.monotonic())
        except SealError as error:
            self._refuse(envelope, error, fields.get("request_id"))
        except Exception as error:
            log.error("a fault of the front end: %s", type(error).__name__)
            log.debug("the fault", exc_info=True)
            self._refuse(envelope, InternalError(f"{type(error).__name__}: {error}"), None)

    def _obey(self, command: Command) -> bytes:
        reply: dict[str, Any] = {"status": "ok"}
        if command.cmd == "shutdown":
            self.ask_to_stop("a client sent shutdown")
            return b'{"status": "bye"}'  # exactly as published
        if command.cmd == "status":
            reply |= self.status().model_dump()
        elif command.cmd == "ping":
            reply["status"] = "alive"
        elif command.cmd == "forget":
            reply["forgotten"] = forget_adapters(self.settings.run_dir / "adapters", command.adapter_names)
        elif command.request_id is None:
            raise ProtocolError("field 'request_id' is missing; send the id to cancel", field="request_id")
        else:
            key = command.request_id
            request = self.table.cancel(key, Cancelled(f"request {key!r} was cancelled; send it again to run it"))
            if request is not None and request.worker is not None:
                self.workers.tell(request.worker, pack("cancel", key=key))
            reply = {"status": "unknown" if request is None else "cancelled", "request_id": key}
        return json.dumps({**reply, "server_id": self.table.server_id, "protocol_version": PROTOCOL_VERSION}).encode()

    def _refuse(self, envelope: Envelope, error: SealError, request_id: object) -> None:
        self.meter.counts["refused"] += 1
        n = self.meter.counts["refused"]
        if n <= LOUD or n % 1000 == 0:
            log.info("refused %s: field %r (%d so far)", type(error).__name__, getattr(error, "field", ""), n)
        log.debug("refused because: %s", error)
        named = request_id if isinstance(request_id, str) and len(request_id) <= 200 else None
        self._send(envelope, self.table.error(error, named))

    def _send(self, envelope: Envelope, reply: bytes) -> None:
        """Send to a client. One that is gone, or reads so slowly that its pipe is full, loses this message."""
        try:
            self.clients.send_multipart([*envelope, reply], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.meter.counts["undelivered"] += 1
            log.debug("a reply found no client: %s", error)

    def _tick(self, now: float) -> None:
        self.workers.check_leases(now)
        self.table.save()
        if self.keys:
            self.keys.look()
        if self.queue.requests or (self.settings.n_workers > 0 and not self.table.model_id):
            self._client_seen_at = now  # clients wait for work in progress, and for the model to load
        idle_s = now - self._client_seen_at
        if 0 < self.settings.idle_timeout_s < idle_s:
            self.ask_to_stop(f"no client for {self.settings.idle_timeout_s:g} s")
        if self.table.stopping and self.drain_until is None:  # turn away what waits; the rest has `drain_s` to finish
            self.drain_until = now + self.settings.drain_s
            log.info("%s; %d running requests may finish", self.table.stopping, self.queue.n_running)
            self._turn_away(waiting_only=True)

    def _turn_away(self, *, waiting_only: bool = False) -> None:
        why = f"{self.table.stopping} before this request was done; send it again to the next server"
        for request in list(self.queue.requests.values()):
            if request.worker is None or not waiting_only:
                self.table.cancel(request.key, ServerStopping(why))

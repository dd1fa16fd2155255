"""The front end: one loop between clients and workers. It never imports torch.

One thread owns all sockets. What a request *means* is decided by ``desk``, who works on what by ``queue``
and ``crew``; here it is received, sent, timed, and logged without its content. A client that goes away,
sends rubbish or does not read cannot stop the loop.

The workers as the front end sees them: introductions, heartbeats, results, and who is lost.

It speaks ``wire`` over one ROUTER socket and moves jobs in the ``queue``; what a result or a loss means to
clients is the desk's, and goes out through ``send``. A worker that sends rubbish, comes back from the dead,
or brings another model changes nothing for anybody else.
"""

import json
import logging
import math
import os
import socket as sockets
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zmq

from seal_nb.errors import ProtocolError, RunMismatch, SealError
from seal_nb.protocol import PROTOCOL_VERSION, Command, parse_request, read_json
from seal_nb.server import wire
from seal_nb.server.keys import Gate
from seal_nb.server.queue import Job, Lost
from seal_nb.server.requests import Cancelled, Desk, Envelope, Outgoing, ServerStopping, WorkerLost, check_size
from seal_nb.server.status import ServerStatus, WorkerStatus, rss_bytes
from seal_nb.storage import forget_adapters

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]
LOUD = 100  # log lines about rubbish


@dataclass(kw_only=True)
class Peer:
    """A worker as it introduced itself; ``session`` tells a repeated introduction from a fresh start."""

    worker_id: str
    host: str
    pid: int
    session: int
    lease: int
    model_id: str
    stats: dict[str, Any] = field(default_factory=dict)


class Crew:
    """See the module."""

    def __init__(self, socket: Socket, desk: Desk, send: Callable[[list[Outgoing]], None]) -> None:
        self.socket, self.desk, self.queue, self.meter = socket, desk, desk.queue, desk.meter
        self.send = send
        self.peers: dict[bytes, Peer] = {}
        self.mismatch = ""  # why this server cannot go on with the workers it has
        self.last_loss = ""
        self.failures: dict[int, str] = {}  # process of a worker → what it said before it ended
        self._gone: dict[int, float] = {}  # process here that lost its lease → when it is given up for good
        self._handlers: dict[str, Callable[[bytes, wire.Message], None]] = {
            "ready": self._on_ready, "beat": self._on_beat, "result": self._on_result,
            "failed": self._on_failed, "leaving": self._on_leaving,
        }  # fmt: skip

    def receive(self, frames: list[bytes]) -> None:
        """One message of one worker."""
        try:
            message = wire.unpack(frames[1:])
            self._handlers[message.kind](frames[0], message)
        except (ProtocolError, KeyError, TypeError, ValueError) as error:
            self._rubbish(error)
        except Exception as error:
            log.error("a fault of the front end: %s", type(error).__name__)
            log.debug("the fault", exc_info=True)

    def dispatch(self) -> None:
        """Send out what can start now."""
        for job in self.queue.assignments(time.monotonic()):
            assert job.worker is not None
            job_frames = wire.pack("job", job.payload, token=job.token, key=job.key, seed=job.seed)
            self.tell(job.worker, job_frames)

    def check_leases(self, now: float) -> None:
        for identity in self.queue.expired(now):
            self._give_up(identity, at=now + (self.queue.stall_s or math.inf))  # it may be back
            self._lose(identity, f"silent for more than {self.queue.lease_s:g} s")
        for identity, why in self.queue.stuck(now).items():
            self.tell(identity, wire.pack("abort", why=why))
            self._give_up(identity, at=now)
            self._lose(identity, why)

    def given_up(self, now: float) -> list[int]:
        """Processes of this machine to kill: each is named once."""
        due = [pid for pid, at in self._gone.items() if now >= at]
        for pid in due:
            del self._gone[pid]
        return due

    def exited(self, pid: int, host: str, why: str) -> None:
        """A worker process of this machine ended; no need to wait for its lease."""
        self._gone.pop(pid, None)
        for identity, peer in list(self.peers.items()):
            if (peer.pid, peer.host) == (pid, host):
                self._lose(identity, why)

    def dismiss(self, why: str, *, pids_here: set[int] | None = None) -> None:
        """The server ends, and its workers too; with ``pids_here`` only those of this machine.

        The others then wait for the server's successor, as long as their patience lasts.
        """
        for identity, peer in self.peers.items():
            if pids_here is None or (peer.host == sockets.gethostname() and peer.pid in pids_here):
                self.tell(identity, wire.pack("stop", why=why))

    def tell(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self.socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # its lease will tell
            log.info("a message found no worker: %s", error)

    def trouble(self) -> str:
        """Why nothing moves, if nothing does."""
        if self.peers or not self.queue.jobs:
            return ""
        return f"requests wait and no worker is there (the last one that was lost: {self.last_loss or 'none'})"

    def status(self, now: float) -> tuple[WorkerStatus, ...]:
        return tuple(self._status(identity, now) for identity in self.peers)

    def _on_ready(self, identity: bytes, message: wire.Message) -> None:
        said, known = message.header, self.peers.get(identity)
        if known is None or known.session != said["session"]:
            if not self._has_our_model(identity, said):
                return
            names = ("worker_id", "host", "pid", "session", "model_id")
            own = {name: said[name] for name in names}
            peer = Peer(lease=0, stats=dict(said.get("stats", {})), **own)
            peer.lease, lost = self.queue.join(identity, capacity=int(said["capacity"]), now=time.monotonic())
            self.peers[identity] = peer
            self._gone.pop(peer.pid, None)
            self._settle(lost, f"worker {peer.worker_id} started afresh")
            log.info("worker %s is ready: %d requests at once", peer.worker_id, int(said["capacity"]))
        self.tell(identity, wire.pack("welcome", lease=self.peers[identity].lease))

    def _has_our_model(self, identity: bytes, said: dict[str, Any]) -> bool:
        """All workers have the first one's model, and that is the one whose results the run folder holds."""
        why = f"it has model {said['model_id']!r}, this server's workers have {self.desk.model_id!r}"
        if not self.desk.model_id:
            try:
                self.send(self.desk.has_model(said["model_id"]))
            except RunMismatch as error:
                self.mismatch = why = str(error)
        if said["model_id"] == self.desk.model_id:
            return True
        log.error("worker %s is turned away: %s", said["worker_id"], why)
        self.tell(identity, wire.pack("stop", why=why))
        return False

    def _on_beat(self, identity: bytes, message: wire.Message) -> None:
        said = message.header
        capacity, stats = int(said["capacity"]), dict(said["stats"])
        alive = self.queue.beat(
            identity, lease=said["lease"], capacity=capacity, steps=int(said["steps"]), now=time.monotonic()
        )
        if alive:
            self.peers[identity].stats = stats
        self.tell(identity, wire.pack("beat" if alive else "expired", lease=said["lease"]))

    def _on_result(self, identity: bytes, message: wire.Message) -> None:
        job = self.queue.finish(identity, message.header["token"])
        if job is None:
            self.meter.count("void_results")
            log.info("a result came for a try that is not current any more; it is dropped")
            return
        self.send(self.desk.delivered(job, message.body, time.monotonic()))

    def _on_failed(self, identity: bytes, message: wire.Message) -> None:
        error, loading = str(message.header["error"]), identity not in self.peers
        self.failures[int(message.header["pid"])] = error
        # While a worker loads, no request's text can be in what it says.
        log.error("a worker failed: %s", error if loading else error.partition(":")[0])
        log.debug("it said: %s\n%s", error, message.header.get("traceback", ""))
        self._lose(identity, error)

    def _on_leaving(self, identity: bytes, message: wire.Message) -> None:
        requeued = self.queue.leave(identity)
        self.meter.count("requeued", len(requeued))
        log.info("worker %s leaves; %d requests wait again", self._name(identity), len(requeued))
        self.peers.pop(identity, None)

    def _give_up(self, identity: bytes, *, at: float) -> None:
        peer = self.peers[identity]
        if peer.host == sockets.gethostname():
            self._gone[peer.pid] = at

    def _lose(self, identity: bytes, why: str) -> None:
        if self.peers.get(identity) is None:
            return
        lost = self.queue.lose(identity)
        self.last_loss = why
        log.warning("worker %s is lost; %d requests wait again", self._name(identity), len(lost.requeued))
        log.debug("it is lost because: %s", why)
        self.meter.count("workers_lost")
        self._settle(lost, why)
        del self.peers[identity]

    def _settle(self, lost: Lost, why: str) -> None:
        self.meter.count("requeued", len(lost.requeued))
        for job in lost.given_up:
            log.warning("a request is given up: it lost its worker %d times", job.tries)
            error = WorkerLost(
                f"request {job.key!r} lost its worker {job.tries} times (the last: {why}); "
                "look into the server's log, make the request smaller, or ask again"
            )
            self.send(self.desk.failed(job, error))

    def _rubbish(self, error: Exception) -> None:
        self.meter.count("rubbish_of_workers")
        if self.meter.counts["rubbish_of_workers"] <= LOUD:
            log.warning("a worker sent what is no message of this service (%s)", type(error).__name__)

    def _name(self, identity: bytes) -> str:
        return self.peers[identity].worker_id if identity in self.peers else "(unknown)"

    def _status(self, identity: bytes, now: float) -> WorkerStatus:
        peer, worker = self.peers[identity], self.queue.workers[identity]
        return WorkerStatus(
            worker_id=peer.worker_id,
            host=peer.host,
            pid=peer.pid,
            n_running=len(worker.jobs),
            capacity=worker.capacity,
            silent_s=round(now - worker.seen_at, 3),
            no_step_s=round(now - worker.stepped_at, 3) if worker.jobs else 0.0,
            model_id=peer.model_id,
            stats=peer.stats,
        )


TICK_S = 0.2
BURST = 200  # messages of one socket before the other gets its turn
MAX_FRAMES = 8
LOUD = 100  # log lines about refused requests before they become rare


class InternalError(SealError, RuntimeError):
    """A fault of the server; the message names it, the server goes on."""


class FrontEnd:
    """Serve until told to stop. ``watch`` is called at every tick (children, endpoint file, parent)."""

    def __init__(
        self,
        *,
        clients: Socket,
        workers: Socket,
        gate: Gate | None,
        desk: Desk,
        watch: Callable[[float], None],
        idle_timeout_s: float = 0.0,
        drain_s: float = 20.0,
        workers_load: bool = False,
        adapters_dir: Path = Path("adapters"),
    ) -> None:
        self.clients, self.gate, self.desk, self.watch = clients, gate, desk, watch
        self.queue, self.meter = desk.queue, desk.meter
        self.crew = Crew(workers, desk, self._send)
        self.idle_timeout_s, self.drain_s = idle_timeout_s, drain_s
        self.workers_load = workers_load  # workers of this machine, which may take long to be ready
        self.adapters_dir = adapters_dir
        self.drain_until: float | None = None
        self._client_seen_at = time.monotonic()
        self._asked_to_stop = ""
        self._impatient = False
        self.for_good = True
        self._done = False

    def run(self) -> None:
        poller = zmq.Poller()
        sources = {self.clients: self._on_client, self.crew.socket: self.crew.receive}
        gates = dict(self.gate.sources()) if self.gate else {}
        for socket in (*sources, *gates):
            poller.register(socket, zmq.POLLIN)
        next_tick = time.monotonic()
        while not self._done:
            ready = dict(poller.poll(int(TICK_S * 1000)))
            for socket, answer in gates.items():
                if socket in ready:
                    answer()
            for socket, handle in sources.items():
                if socket in ready:
                    self._burst(socket, handle)
            self.crew.dispatch()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_S
                self._tick(time.monotonic())
        self._turn_away(list(self.queue.jobs.values()))

    def ask_to_stop(self, why: str, *, impatient: bool = False, for_good: bool = True) -> None:
        """Safe in a signal handler: the loop drains at its next turn, or ends there if impatient.

        Unless it is for good, a successor is to be expected (a requeued job, another server on the file).
        """
        self._impatient = self._impatient or impatient
        self.for_good = for_good if not self._asked_to_stop else self.for_good
        self._asked_to_stop = self._asked_to_stop or why

    def status(self) -> ServerStatus:
        now = time.monotonic()
        return ServerStatus(
            server_id=self.desk.server_id,
            model_id=self.desk.model_id,
            pid=os.getpid(),
            uptime_s=round(now - self.meter.started_at, 3),
            draining=self.drain_until is not None,
            n_queued=self.queue.n_queued,
            n_running=self.queue.n_running,
            n_slots=sum(worker.capacity for worker in self.queue.workers.values()),
            n_results=len(self.desk.results),
            n_unsaved=self.desk.results.n_unsaved,
            queued_bytes=self.queue.queued_bytes,
            rss_bytes=rss_bytes(),
            counts=dict(self.meter.counts) | ({"denied": self.gate.n_denied} if self.gate else {}),
            workers=self.crew.status(now),
            trouble="; ".join(filter(None, (self.desk.results.trouble, self.crew.trouble()))),
            **self.meter.rates(now),
        )

    def _burst(self, socket: Socket, handle: Callable[[list[bytes]], None]) -> None:
        for _ in range(BURST):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            handle(frames)

    def _on_client(self, frames: list[bytes]) -> None:
        *route, message = frames
        envelope: Envelope = tuple(route)
        try:
            if not route or len(frames) > MAX_FRAMES or (len(route) > 1 and route[-1] != b""):
                envelope = (frames[0], b"")
                raise ProtocolError(f"a message is one frame of JSON, this one has {len(frames) - 1} frames")
            reply = self._answer_to(message, envelope)
        except SealError as error:
            self._refuse(envelope, error, self._request_id(message))
        except Exception as error:
            log.error("a fault of the front end: %s", type(error).__name__)
            log.debug("the fault", exc_info=True)
            self._refuse(envelope, InternalError(f"{type(error).__name__}: {error}"), None)
        else:
            self._send([(envelope, reply)] if reply is not None else [])

    def _answer_to(self, message: bytes, envelope: Envelope) -> bytes | None:
        check_size(message, self.desk.limits.max_message_bytes)
        request = parse_request(message)
        now = time.monotonic()
        if not isinstance(request, Command):
            self._client_seen_at = now
            return self.desk.accept(request, message, envelope, now)
        if request.cmd == "shutdown":
            self.ask_to_stop("a client sent shutdown")
            return b'{"status": "bye"}'  # as published, to the letter
        if request.cmd == "status":  # who only looks keeps no server alive
            return self._said(status="ok", **asdict(self.status()))
        self._client_seen_at = now
        if request.cmd == "ping":
            return self._said(status="alive")
        if request.cmd == "forget":
            forgotten = forget_adapters(self.adapters_dir, request.adapter_names)
            return self._said(status="ok", forgotten=forgotten)
        if request.request_id is None:
            raise ProtocolError("field 'request_id' is missing; send the id to cancel", field="request_id")
        return self._said(status=self._cancel(request.request_id), request_id=request.request_id)

    def _refuse(self, envelope: Envelope, error: SealError, request_id: str | None) -> None:
        self.meter.count("refused")
        n = self.meter.counts["refused"]
        if n <= LOUD or n % 1000 == 0:
            log.info("refused %s: field %r (%d so far)", type(error).__name__, getattr(error, "field", ""), n)
        log.debug("refused because: %s", error)
        self._send([(envelope, self.desk.error(error, request_id))])

    def _cancel(self, request_id: str) -> str:
        job = self.queue.cancel(request_id)
        if job is None:
            return "unknown"
        if job.worker is not None:
            self.crew.tell(job.worker, wire.pack("cancel", key=job.key))
        why = f"request {request_id!r} was cancelled; ask again to run it"
        self._send(self.desk.failed(job, Cancelled(why)))
        return "cancelled"

    def _said(self, **fields: Any) -> bytes:
        known = {"server_id": self.desk.server_id, "protocol_version": PROTOCOL_VERSION}
        return json.dumps(fields | known).encode()

    def _request_id(self, message: bytes) -> str | None:
        """Which request an error is about, as far as the message can be read."""
        if len(message) > self.desk.limits.max_message_bytes:
            return None
        try:
            request_id = read_json(message).get("request_id")
        except ProtocolError:
            return None
        return request_id if isinstance(request_id, str) and len(request_id) <= 200 else None

    def _send(self, outgoing: Iterable[Outgoing]) -> None:
        """To clients. One that is gone, or reads so slowly that its pipe is full, loses this message."""
        for envelope, reply in outgoing:
            try:
                self.clients.send_multipart([*envelope, reply], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                self.meter.count("undelivered")
                log.debug("a reply found no client: %s", error)

    def _tick(self, now: float) -> None:
        self.crew.check_leases(now)
        self.watch(now)
        self.desk.save()
        if self.queue.jobs or (self.workers_load and not self.desk.model_id):
            self._client_seen_at = now  # what is in work was asked for; while a model loads, nobody is late
        idle_s = now - self._client_seen_at
        if 0 < self.idle_timeout_s < idle_s and not self._asked_to_stop:
            self.ask_to_stop(f"no client for {self.idle_timeout_s:g} s")
        if self._asked_to_stop:
            self._drain(now)

    def _drain(self, now: float) -> None:
        """Turn away what waits, let what runs finish for ``drain_s``."""
        if self.drain_until is None:
            self.drain_until = now + self.drain_s
            self.desk.stopping = f"the server is ending: {self._asked_to_stop}"
            log.info("ending (%s): %d running requests may finish", self._asked_to_stop, self.queue.n_running)
            self._turn_away([job for job in self.queue.jobs.values() if job.worker is None])
        if self._impatient or now > self.drain_until or not self.queue.jobs:
            self._done = True

    def _turn_away(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.queue.cancel(job.key)
            why = f"{self.desk.stopping} before this request was done; send it again to the next server"
            self._send(self.desk.failed(job, ServerStopping(why)))

"""The front end: two ROUTER sockets and a loop between clients and workers. It never imports torch.

One thread owns all sockets. What a message *means* is decided by ``desk`` (requests, results) and ``queue``
(who works on what); here it is received, sent, timed, and logged without its content. A client or worker
that goes away, comes back, sends rubbish or does not read cannot stop the loop.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import zmq

from seal_nb.errors import ProtocolError, SealError
from seal_nb.protocol import PROTOCOL_VERSION, Command, parse_request, read_json
from seal_nb.service import wire
from seal_nb.service.desk import Cancelled, Desk, Envelope, Outgoing, ServerStopping, WorkerLost
from seal_nb.service.keys import Gate
from seal_nb.service.queue import Job, JobQueue, Lost
from seal_nb.service.status import Meter, ServerStatus, WorkerStatus, rss_bytes

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]
TICK_S = 0.2
BURST = 200  # messages of one socket before the other gets its turn
MAX_FRAMES = 8


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


class FrontEnd:
    """Serve until told to stop. ``watch`` is called at every tick (children, endpoint file, parent)."""

    def __init__(
        self,
        *,
        clients: Socket,
        workers: Socket,
        gate: Gate | None,
        desk: Desk,
        queue: JobQueue,
        meter: Meter,
        watch: Callable[[float], None],
        idle_exit_s: float = 0.0,
        drain_s: float = 60.0,
    ) -> None:
        self.clients, self.workers, self.gate = clients, workers, gate
        self.desk, self.queue, self.meter, self.watch = desk, queue, meter, watch
        self.idle_exit_s, self.drain_s = idle_exit_s, drain_s
        self.peers: dict[bytes, Peer] = {}
        self.model_id = ""
        self.failures: dict[int, str] = {}  # process of a worker → what it said before it ended
        self.drain_until: float | None = None
        self._client_seen_at = time.monotonic()
        self._asked_to_stop = ""
        self._done = False

    def run(self) -> None:
        poller = zmq.Poller()
        for socket in (self.clients, self.workers, *([self.gate.socket] if self.gate else [])):
            poller.register(socket, zmq.POLLIN)
        next_tick = time.monotonic()
        while not self._done:
            ready = dict(poller.poll(int(TICK_S * 1000)))
            if self.gate is not None and self.gate.socket in ready:
                self.gate.answer()
            if self.workers in ready:
                self._burst(self.workers, self._on_worker)
            if self.clients in ready:
                self._burst(self.clients, self._on_client)
            self._dispatch()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_S
                self._tick()
        self._end()

    def ask_to_stop(self, why: str) -> None:
        """Safe in a signal handler: the loop drains at its next turn; asked twice, it does not wait."""
        self._asked_to_stop = f"{why} (twice)" if self._asked_to_stop else why

    def worker_exited(self, pid: int, host: str, why: str) -> None:
        """A worker process of this machine ended; no need to wait for its lease."""
        for identity, peer in list(self.peers.items()):
            if (peer.pid, peer.host) == (pid, host):
                self._lose(identity, why)

    def status(self) -> ServerStatus:
        now = time.monotonic()
        return ServerStatus(
            server_id=self.desk.server_id,
            model_id=self.model_id,
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
            workers=tuple(self._worker_status(identity, now) for identity in self.peers),
            trouble=self.desk.results.trouble,
            **self.meter.rates(now),
        )

    def _burst(self, socket: Socket, handle: Callable[[list[bytes]], None]) -> None:
        for _ in range(BURST):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            handle(frames)

    # Clients

    def _on_client(self, frames: list[bytes]) -> None:
        self._client_seen_at = time.monotonic()
        *route, message = frames
        envelope: Envelope = tuple(route)
        if not route or len(frames) > MAX_FRAMES or (len(route) > 1 and route[-1] != b""):
            envelope = (*frames[:1], b"")
            self._refuse(envelope, ProtocolError(
                f"a message has one frame of JSON, this one has {len(frames) - 1}; send one REQ message"
            ))  # fmt: skip
            return
        try:
            check_size(message, self.desk.limits.max_message_bytes)
            request = parse_request(message)
            if isinstance(request, Command):
                self._command(request, envelope)
                return
            reply = self.desk.accept(request, envelope, time.monotonic())
        except SealError as error:
            small = len(message) <= self.desk.limits.max_message_bytes
            self._refuse(envelope, error, request_id=_request_id(message) if small else None)
        else:
            if reply is not None:
                self._send([(envelope, reply)])

    def _refuse(self, envelope: Envelope, error: SealError, request_id: str | None = None) -> None:
        self.meter.count("refused")
        log.info("refused a request: %s, field %r", type(error).__name__, getattr(error, "field", ""))
        log.debug("refused because: %s", error)
        self._send([(envelope, self.desk.error(error, request_id))])

    def _command(self, command: Command, envelope: Envelope) -> None:
        if command.cmd == "ping":
            self._answer(envelope, status="alive")
        elif command.cmd == "status":
            self._answer(envelope, status="ok", **asdict(self.status()))
        elif command.cmd == "shutdown":
            self._send([(envelope, b'{"status": "bye"}')])  # as published, to the letter
            self.ask_to_stop("a client sent shutdown")
        elif command.request_id is None:
            raise ProtocolError("field 'request_id' is missing: cancel what? send its id", field="request_id")
        else:
            self._answer(envelope, **self._cancel(command.request_id))

    def _cancel(self, request_id: str) -> dict[str, str]:
        job = self.queue.cancel(request_id)
        if job is None:
            return {"status": "unknown", "request_id": request_id}
        if job.worker is not None:
            self._to_worker(job.worker, wire.pack("cancel", key=job.key))
        self._send(
            self.desk.failed(job, Cancelled(f"request {request_id!r} was cancelled; ask again to run it"))
        )
        return {"status": "cancelled", "request_id": request_id}

    def _answer(self, envelope: Envelope, **fields: Any) -> None:
        known = {"server_id": self.desk.server_id, "protocol_version": PROTOCOL_VERSION}
        self._send([(envelope, json.dumps(fields | known).encode())])

    def _send(self, outgoing: Iterable[Outgoing]) -> None:
        """To clients. One that is gone, or reads so slowly that its pipe is full, loses this message."""
        for envelope, reply in outgoing:
            try:
                self.clients.send_multipart([*envelope, reply], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                self.meter.count("undelivered")
                log.info("a reply found no client: %s", error)

    # Workers

    def _on_worker(self, frames: list[bytes]) -> None:
        identity = frames[0]
        try:
            message = wire.unpack(frames[1:])
            handle = {
                "ready": self._on_ready, "beat": self._on_beat, "result": self._on_result,
                "failed": self._on_failed, "leaving": self._on_leaving,
            }[message.kind]  # fmt: skip
            handle(identity, message)
        except (ProtocolError, KeyError, TypeError, ValueError) as error:
            log.warning("a worker sent what is no message of this service: %s", type(error).__name__)

    def _on_ready(self, identity: bytes, message: wire.Message) -> None:
        said, known = message.header, self.peers.get(identity)
        if known is None or known.session != said["session"]:
            if self.model_id and said["model_id"] != self.model_id:
                why = f"it has model {said['model_id']!r}, this server's workers have {self.model_id!r}"
                log.error("worker %s is turned away: %s", said["worker_id"], why)
                self._to_worker(identity, wire.pack("stop", why=why))
                return
            self.model_id = said["model_id"]
            lease, lost = self.queue.join(identity, capacity=int(said["capacity"]), now=time.monotonic())
            self._settle(lost, f"worker {said['worker_id']} started afresh")
            names = ("worker_id", "host", "pid", "session", "model_id")
            self.peers[identity] = Peer(lease=lease, **{name: said[name] for name in names})
            log.info("worker %s is ready: %d requests at once", said["worker_id"], int(said["capacity"]))
        self._to_worker(identity, wire.pack("welcome", lease=self.peers[identity].lease))

    def _on_beat(self, identity: bytes, message: wire.Message) -> None:
        said = message.header
        alive = self.queue.beat(
            identity, lease=said["lease"], capacity=int(said["capacity"]), now=time.monotonic()
        )
        if alive and identity in self.peers:
            self.peers[identity].stats = dict(said["stats"])
        self._to_worker(identity, wire.pack("beat" if alive else "expired", lease=said["lease"]))

    def _on_result(self, identity: bytes, message: wire.Message) -> None:
        job = self.queue.finish(identity, message.header["token"])
        if job is None:
            self.meter.count("void_results")
            log.info("a result came for a try that is not current any more; it is dropped")
            return
        self._send(self.desk.delivered(job, message.body, time.monotonic()))

    def _on_failed(self, identity: bytes, message: wire.Message) -> None:
        loading = identity not in self.peers  # then no request's text can be in the message
        self.failures[int(message.header["pid"])] = str(message.header["error"])
        log.error("worker %s failed", message.header["error"] if loading else self._name(identity))
        log.debug("why: %s\n%s", message.header["error"], message.header.get("traceback", ""))
        self._lose(identity, str(message.header["error"]))

    def _on_leaving(self, identity: bytes, message: wire.Message) -> None:
        requeued = self.queue.leave(identity)
        self.meter.count("requeued", len(requeued))
        log.info("worker %s leaves; %d requests wait again", self._name(identity), len(requeued))
        self.peers.pop(identity, None)

    def _lose(self, identity: bytes, why: str) -> None:
        lost = self.queue.lose(identity)
        log.warning(
            "worker %s is lost (%s); %d requests wait again", self._name(identity), why, len(lost.requeued)
        )
        self.meter.count("workers_lost")
        self._settle(lost, why)
        self.peers.pop(identity, None)

    def _settle(self, lost: Lost, why: str) -> None:
        self.meter.count("requeued", len(lost.requeued))
        for job in lost.given_up:
            self._send(self.desk.failed(job, WorkerLost(
                f"request {job.key!r} lost its worker {job.tries} times (the last: {why}); "
                "look into the server's log, make the request smaller, or ask again"
            )))  # fmt: skip

    def _to_worker(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self.workers.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # its lease will tell
            log.info("a message found no worker: %s", error)

    def _dispatch(self) -> None:
        for job in self.queue.assignments(time.monotonic()):
            assert job.worker is not None
            self._to_worker(job.worker, wire.pack("job", job.payload, token=job.token))

    def _name(self, identity: bytes) -> str:
        return self.peers[identity].worker_id if identity in self.peers else "(unknown)"

    def _worker_status(self, identity: bytes, now: float) -> WorkerStatus:
        peer, worker = self.peers[identity], self.queue.workers[identity]
        return WorkerStatus(
            worker_id=peer.worker_id,
            host=peer.host,
            pid=peer.pid,
            state="ready",
            n_running=len(worker.jobs),
            capacity=worker.capacity,
            silent_s=round(now - worker.seen_at, 3),
            model_id=peer.model_id,
            stats=peer.stats,
        )

    # Time, and the end

    def _tick(self) -> None:
        now = time.monotonic()
        for identity in self.queue.expired(now):
            self._lose(identity, f"silent for more than {self.queue.lease_s:g} s")
        self.watch(now)
        if self.desk.results.n_unsaved:
            self.desk.results.save()
        if self.queue.jobs:
            self._client_seen_at = now  # what is in work was asked for
        if self.idle_exit_s and now - self._client_seen_at > self.idle_exit_s:
            self.ask_to_stop(f"no client for {self.idle_exit_s:g} s")
        if self._asked_to_stop:
            self._drain(now)

    def _drain(self, now: float) -> None:
        if self.drain_until is None:
            self.drain_until = now + self.drain_s
            self.desk.stopping = f"the server is ending: {self._asked_to_stop}"
            log.info("ending (%s): %d running requests may finish", self._asked_to_stop, self.queue.n_running)
            self._turn_away([job for job in self.queue.jobs.values() if job.worker is None])
        impatient = self._asked_to_stop.endswith("(twice)") or now > self.drain_until
        if impatient or not self.queue.jobs:
            self._done = True

    def _turn_away(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.queue.cancel(job.key)
            why = f"{self.desk.stopping} before this request was done; send it again to the next server"
            self._send(self.desk.failed(job, ServerStopping(why)))

    def _end(self) -> None:
        self._turn_away(list(self.queue.jobs.values()))
        for identity in self.peers:
            self._to_worker(identity, wire.pack("stop", why=self.desk.stopping))


def check_size(message: bytes, most: int) -> None:
    """Raises ProtocolError for a message above the bound, before anything reads it."""
    if len(message) > most:
        raise ProtocolError(
            f"the message has {len(message)} bytes, {most} are the most; send fewer sequences or questions"
        )


def _request_id(message: bytes) -> str | None:
    """Which request an error is about, as far as the message can be read."""
    try:
        request_id = read_json(message).get("request_id")
    except ProtocolError:
        return None
    return request_id if isinstance(request_id, str) and len(request_id) <= 200 else None

"""The front end: one loop between clients and workers. It never imports torch.

One thread owns all sockets. What a request *means* is decided by ``desk``, who works on what by ``queue``
and ``crew``; here it is received, sent, timed, and logged without its content. A client that goes away,
sends rubbish or does not read cannot stop the loop.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import zmq

from seal_nb.errors import ProtocolError, SealError
from seal_nb.messages import parse_request, read_json
from seal_nb.protocol import PROTOCOL_VERSION, Command
from seal_nb.service import wire
from seal_nb.service.crew import Crew
from seal_nb.service.desk import Cancelled, Desk, Envelope, Outgoing, ServerStopping
from seal_nb.service.forget import forget_adapters
from seal_nb.service.keys import Gate
from seal_nb.service.limits import check_size
from seal_nb.service.queue import Job
from seal_nb.service.status import ServerStatus, rss_bytes

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]
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

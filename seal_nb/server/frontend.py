"""The front end: one loop between clients and workers. It never imports torch.

`requests` decides what a request means and which worker gets it; this module receives, sends, and watches the time. It
logs no content of requests. A client or a worker that leaves, sends rubbish or does not read cannot stop it.
"""

import contextlib
import logging
import os
import socket as sockets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import zmq
from pydantic_core import to_json

from seal_nb import protocol
from seal_nb.errors import ProtocolError, RunMismatch, SealError
from seal_nb.server.client import ServeSettings
from seal_nb.server.endpoint import LOUD, KeyCheck, Socket
from seal_nb.server.requests import Envelope, QueueFull, RequestTable, ServerStopping, Worker, WorkerLost
from seal_nb.server.worker import pack, rss_bytes, unpack

log = logging.getLogger(__name__)

TICK_S = 0.2
RATE_S = 60.0  # rates are those of the last minute
TURN_S = 0.1  # for the messages of one socket before the other socket's turn
MAX_FRAMES = 8
MAX_ROUTE_BYTES = 1_000  # of the frames before a message; they are kept until it is answered
LARGE_BYTES = 2**17  # a message of this size waits for smaller ones
SMALL_REPLY_BYTES = 2**13  # of these, ZMQ keeps at most `sndhwm` for a client
MAX_UNREAD_CLIENTS = 8  # that may have as many unread bytes as one client may
MAX_NAMES = 10_000  # of connections, before those where nobody waits are forgotten
MAX_HEADER_BYTES = 2**22  # of a worker's message
MAX_SLOTS = 100_000  # of a worker
HERE = sockets.gethostname()


class InternalError(SealError, RuntimeError):
    """A fault of the server. The message names it; the server goes on."""


class Inbox:
    """The messages of a ROUTER, of each at most MAX_FRAMES frames. The rest of one is thrown away, in several turns if
    it is long, so that the loop goes on."""

    def __init__(self, socket: Socket) -> None:
        self.socket, self._has_rest = socket, False
        self.is_empty = False  # after a turn: whether all that had arrived was read

    def messages(self) -> Iterator[tuple[list[bytes], zmq.Frame]]:
        """What arrives in one turn: the frames of a message, and the first one with what ZMQ knows of its sender."""
        until, self.is_empty = time.monotonic() + TURN_S, False
        with contextlib.suppress(zmq.Again):
            while time.monotonic() < until:
                first = self.socket.recv(zmq.NOBLOCK, copy=False)
                frames, is_rest = [first.bytes], self._has_rest
                while (more := self.socket.rcvmore) and len(frames) <= MAX_FRAMES:
                    frames.append(self.socket.recv(zmq.NOBLOCK))
                self._has_rest = bool(more)
                if not is_rest:
                    yield frames, first
            return
        self.is_empty = True


class Workers:
    """The workers as the front end sees them: introductions, heartbeats, results, losses."""

    def __init__(self, socket: Socket, table: RequestTable, ask_to_stop: Callable[..., None]) -> None:
        self.socket, self.table, self.queue, self.tally = socket, table, table.queue, table.tally
        self.inbox = Inbox(socket)
        self.ask_to_stop = ask_to_stop
        self.last_loss = ""
        self.read_up_at = 0.0  # all that workers had sent until then is read
        self.failures: dict[int, str] = {}  # process of a worker → the error it reported before it ended

    def receive(self, looked_at: float) -> None:
        """Handle what had arrived at that time, and perhaps more."""
        for frames, _ in self.inbox.messages():
            self._handle(frames)
        if self.inbox.is_empty:
            self.read_up_at = looked_at

    def _handle(self, frames: list[bytes]) -> None:
        """One message of a worker: `_on_` and its kind name the handler, the fields of its header are arguments."""
        try:
            if len(frames[2]) > MAX_HEADER_BYTES:
                raise ProtocolError(f"its header has more than {MAX_HEADER_BYTES} bytes")
            kind, header, body = unpack(frames[1:])
            getattr(self, f"_on_{kind}")(frames[0], body, **header)
        except Exception as error:
            self.tally["rubbish_of_workers"] += 1
            if self.tally["rubbish_of_workers"] <= LOUD:
                log.warning("a worker sent a message that cannot be read (%s)", type(error).__name__)
            log.debug("why", exc_info=True)

    def dispatch(self) -> None:
        """Send each request that can start now to its worker."""
        for request in self.queue.assignments(time.monotonic()):
            assert request.worker is not None
            names = {"key": request.key, "request_id": request.request_id, "token": request.token}
            queue_s = round(request.assigned_at - request.submitted_at, 6)
            header = {**names, "seed": request.seed, "queue_s": queue_s, "server_id": self.table.server_id}
            self.tell(request.worker, pack("job", request.message, **header))

    def check_leases(self, now: float) -> None:
        # A heartbeat may be among what waits, but a worker that sends without end must not keep the others.
        judged_at = max(min(now, self.read_up_at), now - self.table.settings.lease_s)
        for identity in self.queue.expired(judged_at):
            self.lose(identity, f"silent for more than {self.table.settings.lease_s:g} s")
        for identity, why in self.queue.stuck(judged_at).items():
            self.tell(identity, pack("abort", why=why))  # it still sends heartbeats, so it can end itself
            self.lose(identity, why)

    def lose(self, identity: bytes, why: str, *, planned: bool = False, error: str = "") -> None:
        """A worker is gone; its lease need not run out. Its requests go to others. Its `error` may have text of them,
        so it is told only to the client of a request that the worker had alone."""
        if identity not in self.queue.workers:
            return
        name, self.last_loss = self.queue.workers[identity].about["worker_id"], why
        cause = error if error and len(self.queue.workers[identity].requests) == 1 else why
        n_requeued, given_up = self.queue.lose(identity, planned=planned)
        log.warning("worker %s %s; %d requests wait again", name, "leaves" if planned else "is lost", n_requeued)
        log.debug("because: %s", why)
        self.tally["workers_lost"] += not planned
        self.tally["requeued"] += n_requeued
        for request in given_up:
            log.warning("a request is given up: it lost its worker %d times", request.tries)
            what = f"request {request.request_id!r} lost its worker {request.tries} times (the last: {cause})"
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

    def status(self, now: float) -> list[protocol.WorkerStatus]:
        return [
            protocol.WorkerStatus(
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
        # Wrong types would spoil each reply to `status`, and hidden characters the log.
        protocol.WorkerStatus(**about, n_running=0, capacity=(capacity := _slots(capacity)), silent_s=0.0)
        if not all(str(value).isprintable() and len(str(value)) < MAX_ROUTE_BYTES for value in about.values()):
            raise ProtocolError("its name is not printable, or long")
        now, known = time.monotonic(), self.queue.workers.get(identity)
        if known is None or known.session != session:
            worker = Worker(capacity=capacity, seen_at=now, stepped_at=now, session=session, about=about)
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
        now = time.monotonic()
        alive = self.queue.beat(identity, lease=lease, capacity=_slots(capacity), steps=int(steps), now=now)
        if alive:
            to_json(stats, inf_nan_mode="null")  # what cannot be written would spoil each reply to `status`
            self.queue.workers[identity].stats = dict(stats)
        self.tell(identity, pack("beat" if alive else "expired", lease=lease))

    def _on_leaving(self, identity: bytes, _: bytes) -> None:
        self.lose(identity, "it left as planned", planned=True)

    def _on_result(self, identity: bytes, body: bytes, *, token: str, error: str, tokens: int) -> None:
        error = error and (error if error.isidentifier() and error.isascii() and len(error) <= 60 else "Error")
        tokens = min(max(0, int(tokens)), 2**40)
        if (request := self.queue.finish(identity, token)) is not None:
            self.table.deliver(request, body, error=error, tokens=tokens)
        else:
            self.tally["void_results"] += 1
            log.info("a result of a try that is not current was dropped")

    def _on_failed(self, identity: bytes, _: bytes, *, pid: int, error: str, traceback: str) -> None:
        error = str(error)[: protocol.MAX_ERROR]
        if len(self.failures) < MAX_NAMES:
            self.failures[int(pid)] = error
        # While a worker loads, its errors cannot contain text of requests.
        why = error if identity not in self.queue.workers else error.partition(":")[0]
        log.error("a worker failed: %s", why)
        log.debug("its error: %s\n%s", error, traceback)
        self.lose(identity, why, error=error)


def _slots(capacity: int) -> int:
    return min(max(0, int(capacity)), MAX_SLOTS)


class Clients:
    """The socket of the clients: whose a message is, and what each of them has not read yet."""

    def __init__(self, socket: Socket, keys: KeyCheck, settings: ServeSettings, *, need_keys: bool) -> None:
        self.socket, self.keys, self.need_keys = socket, keys, need_keys
        self.max_unread_bytes = settings.max_unread_bytes
        socket.copy_threshold = SMALL_REPLY_BYTES  # ZMQ tells when it has sent a larger one
        self._unread: list[tuple[bytes, int, zmq.MessageTracker]] = []  # by whom, and how many bytes
        self._inbox = Inbox(socket)
        self._key_of: dict[bytes, str] = {}  # by name of a connection, the key that first used it
        self._not_theirs: set[bytes] = set()  # names that another key uses now
        self.n_dropped = 0
        self.missed: set[bytes] = set()  # names of those who did not get a reply; the next ping tells them

    def messages(self) -> Iterator[tuple[list[bytes], str | None]]:
        """The frames of messages, and the guest whose each is (see `RequestTable`). One is dropped if the name of its
        connection is that of another key."""
        for frames, first in self._inbox.messages():
            if not self.need_keys:
                yield frames, None
                continue
            name, key = frames[0], str(first.get("User-Id"))
            if self._key_of.setdefault(name, key) == key:
                self._not_theirs.discard(name)
                yield frames, self.keys.guest(key)
            else:
                self._not_theirs.add(name)  # nothing is sent there until the first one is back
                self.n_dropped += 1
                if self.n_dropped <= LOUD:
                    log.warning("a client used the name of another client's connection")

    def send(self, envelope: Envelope, reply: bytes) -> None:
        """Raises zmq.ZMQError for a client that is gone, or does not read."""
        name = envelope[0]
        if name in self._not_theirs:
            raise zmq.Again
        holder = self._key_of.get(name, "").encode() or name  # whose bytes they are: a key's, or without keys its own
        if len(reply) > SMALL_REPLY_BYTES and self._is_full(holder, len(reply)):
            self.missed.add(name)
            raise zmq.Again
        sent = self.socket.send_multipart([*envelope, reply], zmq.NOBLOCK, copy=False, track=True)
        if sent is not None and not sent.done:
            self._unread.append((holder, len(reply), sent))

    def _is_full(self, holder: bytes, n_bytes: int) -> bool:
        """Whether so many bytes more are too much for a client. One reply of any size is not."""
        self._forget_read()
        own = sum(size for one, size, _ in self._unread if one == holder)
        in_all = sum(size for _, size, _ in self._unread)
        most = self.max_unread_bytes
        return own > 0 and (own + n_bytes > most or in_all > MAX_UNREAD_CLIENTS * most)

    def _forget_read(self) -> None:
        self._unread = [one for one in self._unread if not one[2].done]

    def tidy(self, waiting: Callable[[], set[bytes]]) -> None:
        """Forget connections that are gone. `waiting`: the names of those at which somebody waits."""
        self._forget_read()
        while len(self.missed) > MAX_NAMES:
            self.missed.pop()
        if len(self._key_of) > MAX_NAMES:
            names = waiting()
            self._key_of = {name: key for name, key in self._key_of.items() if name in names}
            self._not_theirs &= names


class FrontEnd:
    """Clients, and the one loop in which everything happens."""

    def __init__(self, table: RequestTable, clients: Clients, workers: Socket) -> None:
        self.table, self.clients = table, clients
        self._large: OrderedDict[bytes, deque[tuple[list[bytes], str | None]]] = OrderedDict()  # by connection
        self._large_bytes = 0
        self.settings, self.queue, self.tally = table.settings, table.queue, table.tally
        table.send = self._send
        self.workers = Workers(workers, table, self.ask_to_stop)
        self.drain_until: float | None = None
        self.for_good, self.exit_code = True, 0
        self._started_at = self._client_seen_at = time.monotonic()
        # At each tick of the last minute: the time, and what was answered and trained until then.
        self._progress = deque([(self._started_at, 0, 0)], maxlen=int(RATE_S / TICK_S))

    def run(self, watch: Callable[[float], None]) -> None:
        """Serve until told to stop. `watch` is called at every tick (worker processes, endpoint file, parent)."""
        next_tick = 0.0
        while self.drain_until is None or (self.queue.requests and time.monotonic() <= self.drain_until):
            looked_at = time.monotonic()  # before the wait, in which the whole process may be stopped
            zmq.select([self.clients.socket, self.workers.socket], [], [], 0 if self._large else TICK_S)
            self.workers.receive(looked_at)
            self.table.save()  # before a client asks for one of these results
            self._receive()
            if self._large:
                self._receive_large()
            self.workers.dispatch()
            if (now := time.monotonic()) >= next_tick:
                next_tick = now + TICK_S
                try:
                    watch(now)
                    self._tick(now)
                except OSError as error:  # as without free file descriptors; the next tick tries again
                    log.error("a fault of the front end: %s", error)
        while self._large:
            self._receive_large()
        self._turn_away()

    def _receive(self) -> None:
        """Handle what clients have sent, but for large messages."""
        for frames, guest in self.clients.messages():
            if len(frames[-1]) < LARGE_BYTES or self._large_bytes > self.settings.max_queued_bytes:
                self._on_client(frames, guest)
            else:
                self._large.setdefault(frames[0], deque()).append((frames, guest))
                self._large_bytes += len(frames[-1])

    def _receive_large(self) -> None:
        """Handle one large message, so that nobody waits for more than one of them. Connections take turns."""
        name, messages = self._large.popitem(last=False)
        frames, guest = messages.popleft()
        if messages:
            self._large[name] = messages
        self._large_bytes -= len(frames[-1])
        self._on_client(frames, guest)

    def ask_to_stop(self, why: str, *, for_good: bool = True, exit_code: int = 0) -> None:
        """Drain from the next tick on. Safe in a signal handler. Not `for_good`: another server will follow (a requeued
        job), and workers of other nodes wait for it."""
        self.exit_code = self.exit_code or exit_code
        if not self.table.stopping:
            self.table.stopping, self.for_good = f"the server is ending: {why}", for_good

    def status(self) -> protocol.ServerStatus:
        now, table, queue = time.monotonic(), self.table, self.queue
        since, answered, tokens = self._progress[0]
        span_s = max(1.0, now - since)
        troubles = [table.results.trouble or table.counts.trouble]
        if queue.requests and not queue.workers:
            last = self.workers.last_loss or "none"
            troubles.append(f"requests wait and no worker is there (the last one that was lost: {last})")
        return protocol.ServerStatus(
            server_id=table.server_id,
            model_id=table.model_id,
            pid=os.getpid(),
            uptime_s=round(now - self._started_at, 3),
            draining=self.drain_until is not None,
            n_queued=queue.n_waiting,
            n_running=queue.n_running,
            n_slots=sum(worker.capacity for worker in queue.workers.values()),
            n_results=len(table.results),
            n_unsaved=len(table.results.unsaved),
            queued_bytes=queue.waiting_bytes,
            rss_bytes=rss_bytes(),
            counts=dict(self.tally) | {"denied": self.clients.keys.n_denied, "dropped": self.clients.n_dropped},
            workers=self.workers.status(now),
            trouble="; ".join(filter(None, troubles)),
            jobs_per_min=round(60 * (self.tally["answered"] - answered) / span_s, 2),
            tokens_per_s=round((self.tally["train_tokens"] - tokens) / span_s, 2),
        )

    def _on_client(self, frames: list[bytes], guest: str | None) -> None:
        *route, message = frames
        envelope: Envelope = tuple(route)
        fields: dict[str, Any] = {}
        try:
            if not route or len(frames) > MAX_FRAMES or (len(route) > 1 and route[-1] != b""):
                envelope = (frames[0], b"")
                raise ProtocolError(f"a message is one frame of JSON, this one has {len(frames) - 1} frames")
            if len(message) > (most := self.settings.max_message_bytes):
                raise ProtocolError(f"the message has {len(message)} bytes, {most} are the most; send less at once")
            if sum(map(len, route)) > MAX_ROUTE_BYTES:
                envelope = (frames[0], b"")
                raise ProtocolError(f"the frames before the message have more than {MAX_ROUTE_BYTES} bytes")
            if len(message) >= LARGE_BYTES and self._large_bytes > self.settings.max_queued_bytes:
                raise QueueFull(f"{self._large_bytes} bytes of large messages wait; send it again later")
            protocol.check_values(message)
            fields = protocol.read_json(message)
            request = protocol.parse_request(fields)
            if not isinstance(request, protocol.Command) or request.cmd in ("cancel", "forget"):
                self._client_seen_at = time.monotonic()  # looking at the server does not keep it running
            if isinstance(request, protocol.Command):
                self._send(envelope, self._obey(request, envelope, guest))
            else:
                self.table.accept(request, message, envelope, time.monotonic(), guest=guest)
        except SealError as error:
            self._refuse(envelope, error, fields.get("request_id"))
        except Exception as error:
            log.error("a fault of the front end: %s", type(error).__name__)
            log.debug("the fault", exc_info=True)
            self._refuse(envelope, InternalError(f"{type(error).__name__}: {error}"), None)

    def _obey(self, command: protocol.Command, envelope: Envelope, guest: str | None) -> bytes:
        reply: dict[str, Any] = {"status": "ok"}
        if command.cmd == "shutdown":
            if guest:
                raise ProtocolError("field 'cmd' is 'shutdown': only the owner's key may end the server", field="cmd")
            self.ask_to_stop("a client sent shutdown")
            return b'{"status": "bye"}'  # exactly as published
        if command.cmd == "status":
            reply |= self.status().model_dump()
        elif command.cmd == "ping":
            reply["status"] = "alive"
            if envelope[0] in self.clients.missed:
                self.clients.missed.remove(envelope[0])
                reply["missed"] = True  # replies that it did not read in time; it should ask again
        elif command.cmd == "forget":
            reply["forgotten"] = self.table.forget(command.adapter_names, guest)
        elif command.request_id is None:
            raise ProtocolError("field 'request_id' is missing; send the id to cancel", field="request_id")
        else:
            key = self.table.key_of(command.request_id, guest) or ""
            request = self.table.withdraw(key, envelope)
            if request is not None and request.worker is not None and key not in self.queue.requests:
                self.workers.tell(request.worker, pack("cancel", key=key))
            reply = {"status": "unknown" if request is None else "cancelled", "request_id": command.request_id}
        known = {"server_id": self.table.server_id, "protocol_version": protocol.PROTOCOL_VERSION}
        return to_json(reply | known, inf_nan_mode="null")

    def _refuse(self, envelope: Envelope, error: SealError, request_id: object) -> None:
        self.tally["refused"] += 1
        n = self.tally["refused"]
        if n <= LOUD or n % 1000 == 0:
            log.info("refused %s: field %r (%d so far)", type(error).__name__, getattr(error, "field", ""), n)
        log.debug("refused because: %s", error)
        named = request_id if isinstance(request_id, str) and len(request_id) <= 200 else None
        self._send(envelope, self.table.error(error, named))

    def _send(self, envelope: Envelope, reply: bytes) -> None:
        """Send to a client. One that is gone, or reads so slowly that its pipe is full, loses this message."""
        try:
            self.clients.send(envelope, reply)
        except zmq.ZMQError as error:
            self.tally["undelivered"] += 1
            log.debug("a reply found no client: %s", error)

    def _tick(self, now: float) -> None:
        self._progress.append((now, self.tally["answered"], self.tally["train_tokens"]))
        self.workers.check_leases(now)
        self.table.save()
        self.clients.keys.look()
        self.clients.tidy(lambda: {one[0] for request in self.queue.requests.values() for one in request.waiters})
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

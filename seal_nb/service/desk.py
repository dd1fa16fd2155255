"""What becomes of a request: refused, answered from what is kept, joined, or queued; and of a result.

No sockets here: envelopes (the routing frames of a reply) are opaque, and what is to be sent is returned.
The rules: a request with an id is idempotent; one without gets its seed from the server's seed, its content
and how often that content was answered before; a result is kept before anybody hears of it; no failure of a
worker ever looks like an answer.
"""

import contextlib
import hashlib
import logging
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from seal_nb.errors import ProtocolError, SealError
from seal_nb.messages import read_reply
from seal_nb.protocol import ErrorReply, Reply, TTTReply, Work, error_reply
from seal_nb.runs import derived_seed
from seal_nb.service.counts import AnswerCounts
from seal_nb.service.limits import check_limits
from seal_nb.service.queue import Job, JobQueue
from seal_nb.service.results import Results, check_same
from seal_nb.service.settings import Limits
from seal_nb.service.status import Meter

log = logging.getLogger(__name__)

Envelope = tuple[bytes, ...]
Outgoing = tuple[Envelope, bytes]
MAX_WAITERS = 1_000  # that join one request


class QueueFull(SealError, RuntimeError):
    """The server has as much waiting as it takes; the request was not accepted; send it again later."""


class ServerStopping(SealError, RuntimeError):
    """The server ends and did not do this request; send it again, with the same id, to the next one."""


class WorkerLost(SealError, RuntimeError):
    """Every worker that tried this request ended while it had it."""


class Cancelled(SealError, RuntimeError):
    """Somebody cancelled this request."""


@dataclass(kw_only=True)
class Ticket:
    """A request in work and who waits for it. ``number``: see ``counts``; None where the seed is not from
    there.
    """

    content: str
    request_id: str | None
    number: int | None
    traceback: bool
    waiters: list[Envelope] = field(default_factory=list)


class Desk:
    """See the module. ``queue`` is shared with the front end, which moves jobs; the desk knows what they
    mean.
    """

    def __init__(
        self,
        *,
        queue: JobQueue,
        results: Results,
        counts: AnswerCounts,
        limits: Limits,
        seed: int,
        server_id: str,
        meter: Meter,
    ) -> None:
        self.queue, self.results, self.counts, self.limits = queue, results, counts, limits
        self.seed, self.server_id, self.meter = seed, server_id, meter
        self.stopping = ""
        self.model_id = ""  # of the workers, once there was one
        self._tickets: dict[str, Ticket] = {}
        self._sent_by: dict[Envelope, str] = {}
        self._n_named = 0

    def accept(self, request: Work, message: bytes, envelope: Envelope, now: float) -> bytes | None:
        """The reply to ``message``, which says ``request``, if there is one at once. Raises SealError for
        what is refused.
        """
        check_limits(request, self.limits)
        content = content_of(request)
        kept = self._kept(request.request_id, content)
        if kept is not None:
            return kept
        if self._joined(request, content, envelope):
            return None
        self._check_room(request, envelope)
        self._enqueue(request, message, content, envelope, now)
        return None

    def has_model(self, model_id: str) -> list[Outgoing]:
        """What to send now that a first worker is there: kept results are answers only if its model's.

        Raises RunMismatch if they are another model's.
        """
        self.results.claim(model_id)
        self.model_id = model_id
        outgoing: list[Outgoing] = []
        for key, ticket in list(self._tickets.items()):
            kept = self._kept(ticket.request_id, ticket.content)
            if kept is not None:
                self.queue.cancel(key)
                outgoing += _to_all(self._close(key), kept)
        return outgoing

    def delivered(self, job: Job, body: bytes, now: float) -> list[Outgoing]:
        """What to send now that a worker has answered ``job``."""
        ticket = self._close(job.key)
        reply = _understood(body)
        known: dict[str, Any] = {"request_id": job.key, "server_id": self.server_id}
        if isinstance(reply, ErrorReply):
            self._free_number(ticket)
            self.meter.failed(reply.error)
            known |= {} if ticket.traceback else {"traceback": None}
        else:
            known["timings"] = {**reply.timings, "queue_s": round(job.assigned_at - job.submitted_at, 6)}
            self.meter.answered(now, tokens=reply.train_tokens if isinstance(reply, TTTReply) else 0)
        said = reply.model_copy(update=known).to_json()
        if not isinstance(reply, ErrorReply):
            self._keep(ticket, said)
        return _to_all(ticket, said)

    def failed(self, job: Job, error: SealError) -> list[Outgoing]:
        """What to send when ``job`` ends without an answer; it may be asked again."""
        ticket = self._close(job.key)
        self._free_number(ticket)
        if isinstance(error, Cancelled):
            self.meter.count("cancelled")
        else:
            self.meter.failed(type(error).__name__)
        return _to_all(ticket, self.error(error, job.key))

    def save(self) -> None:
        """Write what a full disk did not take, if there is room now."""
        if self.results.n_unsaved:
            self.results.save()
        if self.counts.n_unsaved:
            with contextlib.suppress(OSError):
                self.counts.save()

    def error(self, error: BaseException, request_id: str | None = None) -> bytes:
        reply = error_reply(error, request_id=request_id)
        return ErrorReply(**{**reply.model_dump(), "server_id": self.server_id}).to_json()

    def _kept(self, request_id: str | None, content: str) -> bytes | None:
        if request_id is None or not self.model_id:
            return None
        kept = self.results.get(request_id, content)
        if kept is None:
            return None
        self.meter.count("from_journal")
        return kept

    def _joined(self, request: Work, content: str, envelope: Envelope) -> bool:
        key = request.request_id or self._sent_by.get(envelope)
        ticket = self._tickets.get(key) if key is not None else None
        if ticket is None or key is None:
            return False
        check_same(key, ticket.content, content)
        if envelope not in ticket.waiters or not _correlated(envelope):
            if len(ticket.waiters) >= MAX_WAITERS:
                raise QueueFull(f"{MAX_WAITERS} already wait for request {key!r}; ask again later")
            ticket.waiters.append(envelope)
        self.meter.count("joined")
        return True

    def _check_room(self, request: Work, envelope: Envelope) -> None:
        if self.stopping:
            raise ServerStopping(f"{self.stopping}; send the request again to the next server")
        limits, queue = self.limits, self.queue
        for what, used, most in (
            ("requests wait", queue.n_queued, limits.max_queued),
            ("requests of this client wait", queue.n_queued_of(envelope[0]), limits.max_queued_per_client),
            ("bytes wait", queue.queued_bytes, limits.max_queued_bytes),
            ("bytes of results wait for a full disk", self.results.unsaved_bytes, limits.max_unsaved_bytes),
        ):
            if used >= most:
                raise QueueFull(f"{used} {what}, {most} is the most; send it again later")

    def _enqueue(self, request: Work, message: bytes, content: str, envelope: Envelope, now: float) -> None:
        number, seed = None, request.seed
        if seed is None and request.request_id is not None:
            seed = derived_seed(self.seed, content, request.request_id)
        elif seed is None:
            number = self.counts.take(content)
            seed = derived_seed(self.seed, content, number)
        key = request.request_id or self._name()
        self._tickets[key] = Ticket(
            content=content,
            request_id=request.request_id,
            number=number,
            traceback=request.traceback,
            waiters=[envelope],
        )
        if request.request_id is None and _correlated(envelope):
            self._sent_by[envelope] = key
        self.queue.add(
            Job(
                key=key,
                client=envelope[0],
                payload=message,
                seed=seed,
                priority=request.priority,
                submitted_at=now,
            )
        )
        self.meter.count("accepted")

    def _name(self) -> str:
        self._n_named += 1
        return f"{self.server_id}-{self._n_named}"

    def _close(self, key: str) -> Ticket:
        ticket = self._tickets.pop(key)
        for envelope in ticket.waiters:
            self._sent_by.pop(envelope, None)
        return ticket

    def _keep(self, ticket: Ticket, reply: bytes) -> None:
        if ticket.request_id is not None:
            self.results.put(ticket.request_id, ticket.content, reply)
        elif ticket.number is not None:
            try:
                self.counts.answered(ticket.content, ticket.number)
            except OSError as error:
                if self.counts.n_unsaved == 1:  # the first; the others need no line each
                    log.error("the count of answers cannot be written (%s); free space", error)

    def _free_number(self, ticket: Ticket) -> None:
        if ticket.number is not None:
            self.counts.dropped(ticket.content, ticket.number)


def _understood(body: bytes) -> Reply:
    """A worker's reply as a record: what reaches clients and the journal is always whole."""
    try:
        reply = read_reply(body)
    except ValueError as error:
        return error_reply(ProtocolError(f"the worker's reply is not one of this version: {error}"))
    return error_reply(ProtocolError("the worker's reply is none")) if isinstance(reply, dict) else reply


def content_of(request: Work) -> str:
    """A hash of everything that a result may depend on (a seed that was asked for, too)."""
    # As model_dump_json, without turning a megabyte of bytes into text and back.
    said = to_json(request, exclude={"request_id", "priority", "traceback"})
    return hashlib.sha256(said).hexdigest()[:32]


def _correlated(envelope: Envelope) -> bool:
    """Ours mark each message in the envelope; a plain REQ client's has its identity and an empty frame
    only.
    """
    return len(envelope) > 2


def _to_all(ticket: Ticket, reply: bytes) -> list[Outgoing]:
    return [(envelope, reply) for envelope in ticket.waiters]

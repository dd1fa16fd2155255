"""What becomes of a request: refused, answered from what is kept, joined, or queued; and of a result.

No sockets here: envelopes (the routing frames of a reply) are opaque, and what is to be sent is returned.
The rules: a request with an id is idempotent; one without gets its seed from the server's seed, its content
and how often that content was answered before; a result is kept before anybody hears of it; no failure of a
worker ever looks like an answer.

Whether a request is within what one server takes: ``settings.Limits`` against a message and a request.

A refusal names the field, its value and the bound. What waits in the queue is bounded by ``desk``.

How often each content was answered: what keeps three repeats of one published request three trainings.

A published request has neither id nor seed, so its seed comes from the server's seed, its content and a
number: the smallest one under which this content was not answered yet and is not in work. The numbers
answered survive a restart, in a file of 20-byte entries (16 of the content's hash, 4 of the number),
appended before the reply is sent. A request with an id does not count here. Memory: about 170 bytes for each
different content, and nothing for its repeats.

Results of requests that brought an id, kept in the run folder so that asking again never trains again.

One journal line a result (``seal_nb.storage.Journal``: locked to one server, on the disk before the client
hears of it); memory holds where each is, not what it says. Where the disk refuses (full), the result is kept
in memory, the trouble is shown in the status, and writing is tried again. A run folder is one model's. A
result belongs to an id *and* a content: an id that comes back with another request is refused.
"""

import contextlib
import hashlib
import json
import logging
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from seal_nb.errors import ProtocolError, RunMismatch, SealError
from seal_nb.protocol import ErrorReply, GenerateRequest, Reply, TTTReply, TTTRequest, Work, error_reply, read_reply
from seal_nb.server.queue import Job, JobQueue
from seal_nb.server.settings import Limits
from seal_nb.server.status import Meter
from seal_nb.storage import Journal, derived_seed, read_json, write_json


def check_size(message: bytes, most: int) -> None:
    """Raises ProtocolError for a message above the bound, before anything reads it."""
    if len(message) > most:
        raise ProtocolError(
            f"the message has {len(message)} bytes, {most} are the most; send fewer sequences or questions"
        )


def check_limits(request: Work, limits: Limits) -> None:
    """Raises ProtocolError naming the field, its value and the bound."""
    if isinstance(request, GenerateRequest):
        bounds = [
            ("prompts", len(request.prompts), limits.max_questions),
            ("max_tokens", request.max_tokens, limits.max_tokens),
        ]
    else:
        bounds = _bounds(request, limits)
    for name, value, most in bounds:
        if value > most:
            raise ProtocolError(
                f"field {name!r} is too large: {value}, this server takes {most} at most; "
                "send less, or raise the bound where the server is started",
                field=name,
            )


def _bounds(request: TTTRequest, limits: Limits) -> list[tuple[str, int, int]]:
    return [
        ("train_sequences", len(request.train_sequences), limits.max_sequences),
        ("eval_questions", len(request.eval_questions), limits.max_questions),
        ("lora_rank", request.lora_rank, limits.max_rank),
        ("finetune_epochs", request.finetune_epochs, limits.max_epochs),
        ("max_new_tokens", request.max_new_tokens, limits.max_tokens),
        ("batch_size", request.batch_size, limits.max_sequences),
        ("gradient_accumulation_steps", request.gradient_accumulation_steps, limits.max_sequences),
        ("max_seq_length", request.max_seq_length, 2**20),
        ("pad_to", request.pad_to, 2**20),
        ("adapter_stack", len(request.adapter_stack), 1_000),
        ("target_modules", len(request.target_modules), 1_000),
    ]


ENTRY = struct.Struct("<16sI")


class AnswerCounts:
    """Numbers answered and in work, by content. The file may be lost: seeds then start again at 0."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._answered: dict[bytes, int] = {}  # all numbers below this one
        self._beyond: dict[bytes, set[int]] = {}  # answered out of order
        self._in_work: dict[bytes, set[int]] = {}
        raw = path.read_bytes() if path.exists() else b""
        self._size = len(raw) - len(raw) % ENTRY.size  # a torn last entry is dropped
        for content, number in ENTRY.iter_unpack(raw[: self._size]):
            self._mark(content, number)
        self._unsaved = b""
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self._size)

    def take(self, content: str) -> int:
        """The next number of this content; it is in work until ``answered`` or ``dropped``."""
        key = _key(content)
        taken = self._in_work.setdefault(key, set())
        beyond = self._beyond.get(key, ())
        number = self._answered.get(key, 0)
        while number in taken or number in beyond:
            number += 1
        taken.add(number)
        return number

    def answered(self, content: str, number: int) -> None:
        """Raises OSError where the disk is full; the number counts all the same, until it can be saved."""
        self.dropped(content, number)
        self._mark(_key(content), number)
        self._unsaved += ENTRY.pack(_key(content), number)
        self.save()

    def save(self) -> None:
        """Write what is not written yet. Raises OSError; no torn entry is left behind."""
        try:
            written = 0
            while written < len(self._unsaved):
                written += self._file.write(self._unsaved[written:])
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size, self._unsaved = self._size + len(self._unsaved), b""

    def dropped(self, content: str, number: int) -> None:
        """Not answered after all (an error, a cancel): the number is free again."""
        numbers = self._in_work[_key(content)]
        numbers.discard(number)
        if not numbers:
            del self._in_work[_key(content)]

    @property
    def n_unsaved(self) -> int:
        return len(self._unsaved) // ENTRY.size

    def close(self) -> None:
        self._file.close()

    def _mark(self, key: bytes, number: int) -> None:
        beyond = self._beyond.setdefault(key, set())
        beyond.add(number)
        low = self._answered.get(key, 0)
        while low in beyond:
            beyond.remove(low)
            low += 1
        self._answered[key] = low
        if not beyond:
            del self._beyond[key]


def _key(content: str) -> bytes:
    return bytes.fromhex(content)[:16]


log = logging.getLogger(__name__)


class Results:
    """Replies by request id. ``trouble`` says why something is not on the disk; "" if all is."""

    def __init__(self, path: Path, *, lock_wait_s: float = 10.0) -> None:
        self._journal = _open(path, lock_wait_s)
        self._model_file = path.with_name("model.json")
        self._unsaved: dict[str, tuple[str, bytes]] = {}  # content and reply
        self.unsaved_bytes = 0
        self.trouble = ""

    def __len__(self) -> int:
        return len(self._journal) + len(self._unsaved)

    @property
    def n_unsaved(self) -> int:
        return len(self._unsaved)

    def claim(self, model_id: str) -> None:
        """This run folder is that model's. Raises RunMismatch if it holds another one's results."""
        kept = read_json(self._model_file)["model_id"] if self._model_file.exists() else model_id
        if kept != model_id and len(self._journal):
            raise RunMismatch(
                f"{self._model_file.parent} holds results of model {kept!r}, the workers have {model_id!r}; "
                "give this server another run_dir"
            )
        try:
            write_json(self._model_file, {"model_id": model_id})
        except OSError as error:
            log.error("%s cannot be written (%s)", self._model_file, error)

    def get(self, request_id: str, content: str) -> bytes | None:
        """The reply once given to this request. Raises ProtocolError if the id was another request's."""
        if request_id in self._unsaved:
            kept_content, reply = self._unsaved[request_id]
        elif request_id in self._journal:
            kept = self._journal.get(request_id)
            kept_content, reply = kept["content"], json.dumps(kept["reply"]).encode()
        else:
            return None
        check_same(request_id, kept_content, content)
        return reply

    def put(self, request_id: str, content: str, reply: bytes) -> None:
        self._unsaved[request_id] = (content, reply)
        self.unsaved_bytes += len(reply)
        self.save()

    def save(self) -> bool:
        """Write what is not written yet; False (and ``trouble``) where the disk refuses."""
        for request_id in list(self._unsaved):
            try:
                content, reply = self._unsaved[request_id]
                self._journal.append(request_id, {"content": content, "reply": json.loads(reply)})
            except OSError as error:
                if not self.trouble:
                    log.error("results cannot be written (%s); kept in memory and tried again: free space", error)
                self.trouble = f"{self.n_unsaved} results are not on the disk: {error}"
                return False
            self.unsaved_bytes -= len(reply)
            del self._unsaved[request_id]
        self.trouble = ""
        return True

    def close(self) -> None:
        self._journal.close()


def check_same(request_id: str, kept_content: str, content: str) -> None:
    """Raises ProtocolError if an id is used for a second, different request."""
    if kept_content != content:
        raise ProtocolError(
            f"field 'request_id' is {request_id!r}, which belongs to a different request; "
            "take a new id, or send exactly the earlier request",
            field="request_id",
        )


def _open(path: Path, lock_wait_s: float) -> Journal:
    """The journal, once an earlier server has let go of it. Raises RunMismatch where it does not."""
    deadline = time.monotonic() + lock_wait_s
    while True:
        try:
            return Journal(path, in_memory=False)
        except RunMismatch:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


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
            Job(key=key, client=envelope[0], payload=message, seed=seed, priority=request.priority, submitted_at=now)
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

"""What happens to a request (refused, answered from the journal, joined, queued) and to its result.

A request with an id is idempotent; a result is kept before the client gets it. A published request has neither id nor
seed: its seed comes from the server's seed, its content and a number (see `AnswerCounts`). So three repeats of one
published request are three trainings, and a restarted server goes on with the next number."""

import contextlib
import hashlib
import itertools
import logging
import struct
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic_core import to_json

from seal_nb.errors import ProtocolError, RunMismatch, SealError
from seal_nb.protocol import TTTRequest, Work, error_reply
from seal_nb.protocol import read_json as read_message
from seal_nb.server.client import SECRET_BYTES, SECRET_MARK
from seal_nb.server.queue import Envelope, Request, RequestQueue
from seal_nb.server.settings import ServeSettings
from seal_nb.storage import Journal, derived_seed, forget_adapters, open_own, read_json, write_json

log = logging.getLogger(__name__)

ENTRY = struct.Struct("<16sI")  # 16 bytes of the content's hash, the number
START = b'{"content": "'  # of a record
OURS = "·"  # in keys that the server makes; ids are ASCII, so no client can send one
RATE_S = 60.0  # rates are those of the last minute
MAX_WAITERS = 1_000  # of one request
MAX_ADAPTERS = 1_000  # of one guest
MAX_KINDS = 100  # of errors that are counted
MAX_NUMBER = 2**24  # answers to one published request
AT_ONCE = 200  # results written together


class QueueFull(SealError, RuntimeError):
    """The server's queue is full and the request was not accepted. Send it again later."""


class ServerStopping(SealError, RuntimeError):
    """The server ends and did not do this request. Send it to the next server, with the same id."""


class WorkerLost(SealError, RuntimeError):
    """Every worker that tried this request ended before it was done."""


class Cancelled(SealError, RuntimeError):
    """A client cancelled this request."""


def client_of(envelope: Envelope) -> bytes:
    """What tells one client from the others: the secret with which it marks its messages (those of `TTTClient` are the
    same on each of its connections), or else its connection."""
    mark = envelope[1] if len(envelope) > 2 else b""
    return mark[:SECRET_BYTES] if mark.startswith(SECRET_MARK) and len(mark) >= SECRET_BYTES else envelope[0]


def content_of(request: Work) -> str:
    """A hash of everything that the result depends on, including a given seed."""
    return hashlib.sha256(to_json(request, exclude={"request_id", "priority", "traceback"})).hexdigest()[:32]


class Meter:
    """Counts since the start, and what was answered in the last minute."""

    def __init__(self, now: float) -> None:
        self.started_at = now
        self.counts: Counter[str] = Counter()
        self._seconds: deque[list[int]] = deque(maxlen=int(RATE_S) + 1)  # second, answers, trained tokens

    def answered(self, now: float, *, tokens: int) -> None:
        self.counts["answered"] += 1
        self.counts["train_tokens"] += tokens
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append([int(now), 0, 0])
        self._seconds[-1][1] += 1
        self._seconds[-1][2] += tokens

    def rates(self, now: float) -> dict[str, float]:
        """jobs_per_min and tokens_per_s over the last minute, or since the start if that is shorter."""
        span_s = max(1.0, min(RATE_S, now - self.started_at))
        recent = [one[1:] for one in self._seconds if now - one[0] <= RATE_S]
        jobs, tokens = (sum(column) for column in zip([0, 0], *recent, strict=True))
        return {"jobs_per_min": round(60 * jobs / span_s, 2), "tokens_per_s": round(tokens / span_s, 2)}


class AnswerCounts:
    """Which numbers of each content are answered (kept in a file) or in work, as the bits of one int. The file grows by
    20 bytes for each answer, written before the reply is sent. If it is lost, seeds start at 0 again."""

    def __init__(self, path: Path) -> None:
        self._used: defaultdict[bytes, int] = defaultdict(int)
        self._file = open_own(path)
        raw = path.read_bytes()
        size = len(raw) - len(raw) % ENTRY.size  # a torn last entry is dropped
        for content, number in ENTRY.iter_unpack(raw[:size]):
            if number < MAX_NUMBER:  # a file that was damaged must not fill the memory
                self._used[content] |= 1 << number
        self._unsaved = b""
        self._file.truncate(size)

    @property
    def trouble(self) -> str:
        return f"{-(-len(self._unsaved) // ENTRY.size)} counts of answers are not on the disk" if self._unsaved else ""

    def take(self, content: str) -> int:
        """The smallest free number of this content."""
        used = self._used[bytes.fromhex(content)]
        free = ~used & (used + 1)
        self._used[bytes.fromhex(content)] = used | free
        return free.bit_length() - 1

    def answered(self, content: str, number: int) -> None:
        """The number stays used after a restart too, as soon as the disk has room."""
        self._unsaved += ENTRY.pack(bytes.fromhex(content), number)
        self.save()

    def dropped(self, content: str, number: int) -> None:
        """The request was not answered (an error, a cancel): its number is free again."""
        self._used[bytes.fromhex(content)] &= ~(1 << number)

    def save(self) -> None:
        """Write what is not written yet. A full disk may take a part of it; the rest follows later."""
        with contextlib.suppress(OSError):
            while self._unsaved:
                self._unsaved = self._unsaved[self._file.write(self._unsaved) :]

    def close(self) -> None:
        self._file.close()


class Results:
    """Replies by request id, in a journal in the run folder; memory holds only where each one is. While the disk is
    full, replies stay in memory (`unsaved`) and `trouble` says so; writing is tried again. Raises RunMismatch if an
    earlier server still has the journal after `lock_wait_s`."""

    def __init__(self, path: Path, *, lock_wait_s: float) -> None:
        self.trouble = ""
        self.unsaved: dict[str, bytes] = {}
        self._journal = Journal(path, wait_s=lock_wait_s)

    def __len__(self) -> int:
        return len(self._journal) + len(self.unsaved)

    def get(self, key: str) -> bytes | None:
        """The JSON of the latest record of this key, if there is one."""
        return self.unsaved.get(key) or (self._journal.get_json(key) if key in self._journal else None)

    def put(self, key: str, record: bytes) -> None:
        """Keep a record, JSON in one line, which becomes part of the journal's line as it is. `save` writes it."""
        self.unsaved[key] = record

    def save(self) -> None:
        """Write what is not written yet; if the disk refuses, say so in `trouble`."""
        while self.unsaved:
            some = dict(itertools.islice(self.unsaved.items(), AT_ONCE))
            try:
                self._journal.append_json(some)
            except OSError as error:
                if not self.trouble:
                    log.error("results cannot be written (%s); they stay in memory, free some space", error)
                self.trouble = f"{len(self.unsaved)} results are not on the disk: {error}"
                return
            for key in some:
                del self.unsaved[key]
        self.trouble = ""

    def close(self) -> None:
        self._journal.close()


def check_same(request_id: str | None, kept_content: str, content: str) -> None:
    """Raises ProtocolError if an id is used for a second, different request."""
    if kept_content != content:
        problem = f"field 'request_id' is {request_id!r}, which belongs to a different request"
        raise ProtocolError(f"{problem}; use a new id, or send exactly the earlier request", field="request_id")


class RequestTable:
    """All requests in work, from acceptance to reply. `send` gets the envelope and the bytes of each reply.

    A request has a key. That of the owner's is its id. `guest` is None where clients need no keys, empty for the
    owner's key, and a name for another client's: their requests and adapters are apart from those of others."""

    send: Callable[[Envelope, bytes], None]

    def __init__(self, settings: ServeSettings, server_id: str, *, lock_wait_s: float) -> None:
        self.settings, self.server_id = settings, server_id
        self.queue = RequestQueue(settings)
        self.results = Results(settings.run_dir / "results.journal.jsonl", lock_wait_s=lock_wait_s)
        self.counts = AnswerCounts(settings.run_dir / "answer_counts.bin")
        self.meter = Meter(time.monotonic())
        self._owners_path = settings.run_dir / "adapter_owners.json"
        # By adapter, the guest who first trained it, empty for the owner.
        self._owners: dict[str, str] = read_json(self._owners_path) if self._owners_path.exists() else {}
        self._answers: list[tuple[Envelope, bytes]] = []  # to be sent as soon as the results are on the disk
        self.stopping = ""  # why the server ends
        self.model_id = ""  # of the workers; empty until the first one is ready

    def accept(self, work: Work, message: bytes, envelope: Envelope, now: float, *, guest: str | None = None) -> None:
        """Answer, join or queue `work`, which was parsed from `message`. Raises SealError if it is refused."""
        content, key = content_of(work), self.key_of(work.request_id, guest) or self._name(envelope)
        if (reply := self._kept(key, work.request_id, content)) is not None:
            return self.send(envelope, reply)
        if (request := self.queue.requests.get(key)) is not None:
            return self._join(request, content, envelope)
        client = guest.encode() if guest else envelope[0]  # all connections of a guest are one
        self._check_room(client, n_shares=2 if guest else 1)
        adapter_name = work.adapter_name if isinstance(work, TTTRequest) and work.training_wanted else None
        if adapter_name and guest is not None:
            self._claim(adapter_name, guest)
        seed = work.seed
        number = self.counts.take(content) if seed is None and work.request_id is None else None
        if seed is None:
            seed = derived_seed(self.settings.seed, content, work.request_id or number)
        self.queue.add(
            Request(
                key=key, request_id=work.request_id, client=client, message=message, content=content,
                number=number, seed=seed, priority=work.priority, waiters=[envelope], submitted_at=now,
            )
        )  # fmt: skip
        self.meter.counts["accepted"] += 1

    @staticmethod
    def key_of(request_id: str | None, guest: str | None) -> str | None:
        """The key of the request that has this id for this client."""
        return f"{guest}{OURS}{request_id}" if guest and request_id else request_id

    def withdraw(self, key: str, envelope: Envelope) -> Request | None:
        """A client does not want a request any more, for which it waits. Others that wait for it still get its result;
        it ends with the last one. None if this client does not wait for it."""
        request, client = self.queue.requests.get(key), client_of(envelope)
        own = [one for one in request.waiters if client_of(one) == client] if request else []
        if request is None or not own:
            return None
        error = Cancelled(f"request {request.request_id!r} was cancelled; send it again to run it")
        if len(own) == len(request.waiters):
            return self.cancel(key, error)
        request.waiters = [one for one in request.waiters if one not in own]
        for one in own:
            self.send(one, self.error(error, request.request_id))
        return request

    def forget(self, names: Sequence[str], guest: str | None) -> list[str]:
        """Delete kept adapters. Returns the names of those that existed. Raises ProtocolError for another's."""
        for name in names:
            self._check_owner("adapter_names", name, guest)
        return forget_adapters(self.settings.run_dir / "adapters", names)

    def set_model(self, model_id: str) -> None:
        """A worker is ready; after the first one, kept results are answers. All workers must have its model, and the
        run folder's results must be that model's. Raises RunMismatch."""
        if self.model_id == model_id:
            return
        if self.model_id:
            raise RunMismatch(f"it has model {model_id!r}, this server's workers have {self.model_id!r}")
        path = self.settings.run_dir / "model.json"
        kept = read_json(path)["model_id"] if path.exists() else model_id
        if kept != model_id and len(self.results):
            found = f"{path.parent} holds results of model {kept!r}, the workers have {model_id!r}"
            raise RunMismatch(f"{found}; give this server another run_dir")
        try:
            write_json(path, {"model_id": model_id})
        except OSError as error:
            log.error("%s cannot be written (%s)", path, error)
        self.model_id = model_id
        for request in list(self.queue.requests.values()):
            try:
                reply = self._kept(request.key, request.request_id, request.content)
            except ProtocolError as error:  # the id is that of another request
                self.cancel(request.key, error)
                continue
            if reply is not None:
                self.queue.cancel(request.key)
                for envelope in request.waiters:
                    self.send(envelope, reply)

    def deliver(self, request: Request, reply: bytes, *, error: str = "", tokens: int = 0) -> None:
        """The reply to a request that left the queue is kept, and sent as it is by the next `save`; an error at once.
        `error`: its type, never its text."""
        try:
            if b"\n" in reply:
                raise ProtocolError("it has more than one line")
            fields = read_message(reply)
            if not fields.keys() & {"error", "baseline_accuracy", "token_counts"}:  # it would be kept
                raise ProtocolError("it is no reply to a request")
        except ProtocolError as wrong:
            return self.fail(request, ProtocolError(f"the worker's reply cannot be used: {wrong}"))
        error = error or ("Error" if "error" in fields else "")
        if error:
            if request.number is not None:
                self.counts.dropped(request.content, request.number)
            for name in ["cancelled"] if error == Cancelled.__name__ else ["failed", f"failed.{error}"]:
                if name in self.meter.counts or len(self.meter.counts) < MAX_KINDS:
                    self.meter.counts[name] += 1
            for envelope in request.waiters:
                self.send(envelope, reply)
        else:
            self.meter.answered(time.monotonic(), tokens=tokens)
            if request.request_id is not None:
                self.results.put(request.key, b'{"content": "%b", "reply": %b}' % (request.content.encode(), reply))
            elif request.number is not None:
                self.counts.answered(request.content, request.number)
            self._answers += [(envelope, reply) for envelope in request.waiters]

    def fail(self, request: Request, error: SealError) -> None:
        """Report `error` for a request that left the queue. It may be sent again."""
        self.deliver(request, self.error(error, request.request_id), error=type(error).__name__)

    def cancel(self, key: str, error: SealError) -> Request | None:
        """Remove a request and report `error` for it. None if it is not in work."""
        request = self.queue.cancel(key)
        if request is not None:
            self.fail(request, error)
        return request

    def save(self) -> None:
        """Write all results that are not on the disk yet, with one wait for it, then send the replies. To be called
        after each burst of messages; a full disk takes the results later."""
        self.results.save()
        self.counts.save()
        answers, self._answers = self._answers, []
        for envelope, reply in answers:
            self.send(envelope, reply)

    def close(self) -> None:
        self.results.close()
        self.counts.close()

    def error(self, error: BaseException, request_id: str | None = None) -> bytes:
        """The bytes of an error reply."""
        return error_reply(error, request_id=request_id, server_id=self.server_id).to_json()

    def _kept(self, key: str, request_id: str | None, content: str) -> bytes | None:
        """The reply to this request, if there is one. Raises ProtocolError if the id belongs to another request."""
        if not self.model_id or (record := self.results.get(key)) is None:
            return None
        kept_content, _, reply = record.removeprefix(START).partition(b'", "reply": ')
        check_same(request_id, kept_content.decode(errors="replace"), content)
        self.meter.counts["from_journal"] += 1
        return reply[:-1]

    def _name(self, envelope: Envelope) -> str:
        """A key for a request without id. A message that TTTClient sends again has the same mark, so the same key."""
        mark = repr((client_of(envelope), envelope[1:])) if len(envelope) > 2 else uuid.uuid4().hex
        return f"{OURS}{hashlib.sha256(mark.encode()).hexdigest()[:24]}"

    def _claim(self, name: str, guest: str) -> None:
        """An adapter's name belongs for good to the key that first trains one under it. Raises ProtocolError."""
        self._check_owner("adapter_name", name, guest)
        if self._owners.get(name) == guest:
            return
        if guest and sum(owner == guest for owner in self._owners.values()) >= MAX_ADAPTERS:
            raise ProtocolError(f"{MAX_ADAPTERS} adapters are yours; use one of their names", field="adapter_name")
        self._owners[name] = guest
        write_json(self._owners_path, self._owners)

    def _check_owner(self, field: str, name: str, guest: str | None) -> None:
        """Raises ProtocolError for a name of another key. The owner may forget all adapters."""
        exists = (self.settings.run_dir / "adapters" / name).exists()
        holder = self._owners.get(name, "" if exists else guest)  # made before there were guests: the owner's
        if guest is not None and holder != guest and (guest or field == "adapter_name"):
            raise ProtocolError(f"{field} has {name!r}, which is another client's; choose another name", field=field)

    def _join(self, request: Request, content: str, envelope: Envelope) -> None:
        check_same(request.request_id, request.content, content)
        if envelope not in request.waiters or len(envelope) <= 2:  # a REQ client without mark waits for each reply
            if len(request.waiters) >= MAX_WAITERS:
                raise QueueFull(f"{MAX_WAITERS} already wait for request {request.key!r}; send it again later")
            request.waiters.append(envelope)
        self.meter.counts["joined"] += 1

    def _check_room(self, client: bytes, *, n_shares: int) -> None:
        """Raises QueueFull. Guests get a half of each limit, so that there is room for the owner."""
        if self.stopping:
            raise ServerStopping(f"{self.stopping}; send the request again to the next server")
        limits, queue = self.settings, self.queue
        unsaved_bytes = sum(map(len, self.results.unsaved.values()))
        for what, used, most in (
            ("requests wait", queue.n_waiting, limits.max_queued),
            ("requests of this client wait", queue.n_waiting_of(client), limits.max_queued_per_client),
            ("bytes wait", queue.waiting_bytes, limits.max_queued_bytes),
            ("bytes of results wait for a full disk", unsaved_bytes, limits.max_unsaved_bytes),
        ):
            if used >= most / n_shares:
                raise QueueFull(f"{used} {what}, {most // n_shares} is the most; send it again later")

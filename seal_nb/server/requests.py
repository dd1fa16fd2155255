"""What happens to a request (refused, answered from the journal, joined, queued) and to its result.

A request with an id is idempotent; a result is kept before the client gets it. A published request has neither id nor
seed: its seed comes from the server's seed, its content and a number (see `AnswerCounts`). So three repeats of one
published request are three trainings, and a restarted server goes on with the next number."""

import contextlib
import hashlib
import itertools
import logging
import math
import struct
import uuid
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from seal_nb.errors import ProtocolError, RunMismatch, SealError
from seal_nb.protocol import TTTRequest, Work, error_reply
from seal_nb.protocol import read_json as read_message
from seal_nb.server.client import SECRET_BYTES, SECRET_MARK, ServeSettings
from seal_nb.storage import Journal, derived_seed, forget_adapters, open_own, read_json, write_json

Envelope = tuple[bytes, ...]  # the routing frames of a reply


@dataclass(kw_only=True, eq=False)
class Request:
    """One request in work: the only record of it in the front end."""

    key: str  # see RequestTable
    request_id: str | None = None  # given by the client
    client: bytes
    message: bytes  # as the client sent it
    content: str = ""  # hash, see content_of
    number: int | None = None  # see AnswerCounts; None where the seed does not come from there
    seed: int = 0
    priority: int = 0
    waiters: list[Envelope] = field(default_factory=list)  # where the reply goes
    submitted_at: float = 0.0
    assigned_at: float = 0.0
    order: int = 0
    tries: int = 0
    worker: bytes | None = None
    token: str = ""  # names the current try: a result with another token is void

    def rank(self) -> tuple[int, int]:
        return -self.priority, self.order


@dataclass(kw_only=True)
class Worker:
    """One worker and the requests it has, by token. `about`: what it said about itself."""

    capacity: int  # requests that it can use at once
    seen_at: float
    stepped_at: float
    steps: int = 0  # its own count; a change shows that its work moves on
    lease: int = 0
    session: int = 0  # its own count of its starts
    requests: dict[str, Request] = field(default_factory=dict)
    alone: bool = False  # it runs a last try and gets nothing else
    about: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def free(self) -> int:
        return 0 if self.alone else self.capacity - len(self.requests)


class RequestQueue:
    """Which worker gets which request next: turns of clients, leases of workers, tries of requests.

    A state machine without sockets, threads or clocks: the front end says what happened and when. Clients take turns,
    one request each. Among one client's requests, higher priority goes first, then first come. A lost worker's requests
    go to other workers, `max_tries` times at most. The last try runs alone: a request that kills workers has no more
    neighbours. `requests` has those in work by key, `workers` every worker by its socket identity."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.requests: dict[str, Request] = {}
        self.workers: dict[bytes, Worker] = {}
        self.waiting_bytes = 0
        self._waiting: OrderedDict[bytes, list[Request]] = OrderedDict()  # by client, the next one first; by rank
        self._last_tries: deque[Request] = deque()
        self._numbers = itertools.count(1)
        self._reserved: bytes | None = None  # a worker that is kept free for a last try
        self._with_room: dict[bytes, None] = {}  # workers, see `_note`
        self.n_running = 0

    @property
    def n_waiting(self) -> int:
        return len(self.requests) - self.n_running

    def n_waiting_of(self, client: bytes) -> int:
        return len(self._waiting.get(client, ()))

    def add(self, request: Request) -> None:
        request.order = next(self._numbers)
        self.requests[request.key] = request
        self._wait(request)

    def cancel(self, key: str) -> Request | None:
        """Forget a request, waiting or running. The caller tells its `worker`, if it has one."""
        request = self.requests.pop(key, None)
        if request is not None and request.worker is not None:
            self._release(request.worker, request.token)
        elif request is not None:
            self.waiting_bytes -= len(request.message)
            if request in self._last_tries:
                self._last_tries.remove(request)
            else:
                self._take(request.client, bisect_left(self._waiting[request.client], request.rank(), key=Request.rank))
        return request

    def join(self, identity: bytes, worker: Worker) -> None:
        worker.lease = next(self._numbers)
        self.workers[identity] = worker
        self._note(identity)

    def beat(self, identity: bytes, *, lease: int, capacity: int, steps: int, now: float) -> bool:
        """A sign of life. False if the lease is not the current one; the worker then starts again."""
        worker = self.workers.get(identity)
        if worker is None or worker.lease != lease:
            return False
        worker.seen_at, worker.capacity = now, capacity
        self._note(identity)
        if worker.steps != steps:
            worker.steps, worker.stepped_at = steps, now
        return True

    def expired(self, now: float) -> list[bytes]:
        return [i for i, worker in self.workers.items() if now - worker.seen_at > self.settings.lease_s]

    def stuck(self, now: float) -> dict[bytes, str]:
        """Workers that send heartbeats but make no progress, each with the reason."""
        stall_s, timeout_s = self.settings.stall_s, self.settings.job_timeout_s
        found = {}
        for identity, worker in self.workers.items():
            oldest = next((request.assigned_at for request in worker.requests.values()), now)
            if worker.requests and 0 < stall_s < now - worker.stepped_at:
                found[identity] = f"no step of its work for more than {stall_s:g} s"
            elif 0 < timeout_s < now - oldest:
                found[identity] = f"a request was not done within {timeout_s:g} s"
        return found

    def lose(self, identity: bytes, *, planned: bool = False) -> tuple[int, list[Request]]:
        """A worker is lost, or leaves as `planned`, which costs no try: how many requests wait again, which never."""
        taken, given_up = self.workers.pop(identity).requests, []
        self._note(identity)
        self.n_running -= len(taken)
        for request in sorted(taken.values(), key=lambda request: request.order):
            request.tries -= planned
            if request.tries < self.settings.max_tries:
                self._wait(request)
            else:
                given_up.append(self.requests.pop(request.key))
        return len(taken) - len(given_up), given_up

    def finish(self, identity: bytes, token: str) -> Request | None:
        """The request of this try, which is now done. None if the try is not current."""
        if identity not in self.workers or token not in self.workers[identity].requests:
            return None
        return self.requests.pop(self._release(identity, token).key)

    def assignments(self, now: float) -> Iterator[Request]:
        """Requests that start now, each with its `worker` and `token` set: the next one on the freest worker."""
        yield from self._assign_last_tries(now)
        share: float = math.inf
        if len(self.workers) < self.settings.n_workers:  # other workers still load: leave them their share
            share = math.ceil(len(self.requests) / self.settings.n_workers)
        free = [(-self.workers[i].free, n, i) for n, i in enumerate(self._with_room)] if self._waiting else []
        heapify(free)
        while self._waiting and free:
            _, n, identity = free[0]
            worker = self.workers[identity]
            if worker.free <= 0 or len(worker.requests) >= share or identity == self._reserved:
                heappop(free)
                continue
            client = next(iter(self._waiting))
            self._waiting.move_to_end(client)
            yield self._assign(self._take(client, 0), identity, now)
            heapreplace(free, (-worker.free, n, identity))

    def _assign_last_tries(self, now: float) -> Iterator[Request]:
        self._reserved = None
        if not self._last_tries:
            return
        idle = [i for i, worker in self.workers.items() if not worker.requests and worker.capacity > 0]
        for identity in idle[: len(self._last_tries)]:
            self.workers[identity].alone = True
            yield self._assign(self._last_tries.popleft(), identity, now)
        if self._last_tries:  # the least busy worker gets nothing new until it is idle
            busy = [i for i, worker in self.workers.items() if not worker.alone]
            self._reserved = min(busy, key=lambda i: len(self.workers[i].requests), default=None)

    def _assign(self, request: Request, identity: bytes, now: float) -> Request:
        worker = self.workers[identity]
        if not worker.requests:
            worker.stepped_at = now  # it had nothing to do before
        self.waiting_bytes -= len(request.message)
        request.tries += 1
        request.worker, request.assigned_at = identity, now
        request.token = f"{worker.lease}.{next(self._numbers)}"
        worker.requests[request.token] = request
        self.n_running += 1
        self._note(identity)
        return request

    def _note(self, identity: bytes) -> None:
        """To be called after each change of a worker, so that nobody looks through all of them for one with room."""
        if identity in self.workers and self.workers[identity].free > 0:
            self._with_room[identity] = None
        else:
            self._with_room.pop(identity, None)

    def _wait(self, request: Request) -> None:
        self.waiting_bytes += len(request.message)
        request.worker, request.token = None, ""
        if request.tries and request.tries == self.settings.max_tries - 1:
            self._last_tries.append(request)
        else:
            insort(self._waiting.setdefault(request.client, []), request, key=Request.rank)

    def _take(self, client: bytes, index: int) -> Request:
        request = self._waiting[client].pop(index)
        if not self._waiting[client]:
            del self._waiting[client]
        return request

    def _release(self, identity: bytes, token: str) -> Request:
        self.workers[identity].alone = False
        request = self.workers[identity].requests.pop(token)
        self.n_running -= 1
        self._note(identity)
        return request


log = logging.getLogger(__name__)

ENTRY = struct.Struct("<16sI")  # 16 bytes of the content's hash, the number
START = b'{"content": "'  # of a record
OURS = "·"  # in keys that the server makes; ids are ASCII, so no client can send one
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
        self.tally: Counter[str] = Counter()  # what happened since the start, see docs/protocol.md
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
        self.tally["accepted"] += 1

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
                if name in self.tally or len(self.tally) < MAX_KINDS:
                    self.tally[name] += 1
            for envelope in request.waiters:
                self.send(envelope, reply)
        else:
            self.tally.update(answered=1, train_tokens=tokens)
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
        self.tally["from_journal"] += 1
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
        self.tally["joined"] += 1

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

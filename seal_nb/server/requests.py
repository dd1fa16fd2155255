"""What happens to a request (refused, answered from the journal, joined, queued) and to its result.

A request with an id is idempotent; a result is kept before the client gets it. A published request has neither id nor
seed: its seed comes from the server's seed, its content and a number (see `AnswerCounts`). So three repeats of one
published request are three trainings, and a restarted server goes on with the next number.
"""

import contextlib
import hashlib
import logging
import struct
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from pathlib import Path

from pydantic_core import to_json

from seal_nb.errors import ProtocolError, RunMismatch, SealError
from seal_nb.protocol import Work, error_reply
from seal_nb.server.queue import Envelope, Request, RequestQueue
from seal_nb.server.settings import ServeSettings
from seal_nb.storage import Journal, derived_seed, read_json, write_json

log = logging.getLogger(__name__)

ENTRY = struct.Struct("<16sI")  # 16 bytes of the content's hash, the number
RATE_S = 60.0  # rates are those of the last minute
MAX_WAITERS = 1_000  # of one request


class QueueFull(SealError, RuntimeError):
    """The server's queue is full and the request was not accepted. Send it again later."""


class ServerStopping(SealError, RuntimeError):
    """The server ends and did not do this request. Send it to the next server, with the same id."""


class WorkerLost(SealError, RuntimeError):
    """Every worker that tried this request ended before it was done."""


class Cancelled(SealError, RuntimeError):
    """A client cancelled this request."""


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
        raw = path.read_bytes() if path.exists() else b""
        size = len(raw) - len(raw) % ENTRY.size  # a torn last entry is dropped
        for content, number in ENTRY.iter_unpack(raw[:size]):
            self._used[content] |= 1 << number
        self._unsaved = b""
        self._file = path.open("ab", buffering=0)
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
        """Keep a record: JSON in one line, which becomes part of the journal's line as it is."""
        self.unsaved[key] = record
        self.save()

    def save(self) -> None:
        """Write what is not written yet; if the disk refuses, say so in `trouble`."""
        for key in list(self.unsaved):
            try:
                self._journal.append_json(key, self.unsaved[key])
            except OSError as error:
                if not self.trouble:
                    log.error("results cannot be written (%s); they stay in memory, free some space", error)
                self.trouble = f"{len(self.unsaved)} results are not on the disk: {error}"
                return
            del self.unsaved[key]
        self.trouble = ""

    def close(self) -> None:
        self._journal.close()


def check_same(request_id: str, kept_content: str, content: str) -> None:
    """Raises ProtocolError if an id is used for a second, different request."""
    if kept_content != content:
        problem = f"field 'request_id' is {request_id!r}, which belongs to a different request"
        raise ProtocolError(f"{problem}; use a new id, or send exactly the earlier request", field="request_id")


class RequestTable:
    """All requests in work, from acceptance to reply. `send` gets the envelope and the bytes of each reply."""

    send: Callable[[Envelope, bytes], None]

    def __init__(self, settings: ServeSettings, server_id: str, *, lock_wait_s: float) -> None:
        self.settings, self.server_id = settings, server_id
        self.queue = RequestQueue(settings)
        self.results = Results(settings.run_dir / "results.journal.jsonl", lock_wait_s=lock_wait_s)
        self.counts = AnswerCounts(settings.run_dir / "answer_counts.bin")
        self.meter = Meter(time.monotonic())
        self.stopping = ""  # why the server ends
        self.model_id = ""  # of the workers; empty until the first one is ready

    def accept(self, work: Work, message: bytes, envelope: Envelope, now: float) -> None:
        """Answer, join or queue `work`, which was parsed from `message`. Raises SealError if it is refused."""
        content, key = content_of(work), work.request_id or self._name(envelope)
        if (reply := self._kept(key, content)) is not None:
            return self.send(envelope, reply)
        if (request := self.queue.requests.get(key)) is not None:
            return self._join(request, content, envelope)
        self._check_room(envelope)
        seed, has_id = work.seed, work.request_id is not None
        number = self.counts.take(content) if seed is None and not has_id else None
        if seed is None:
            seed = derived_seed(self.settings.seed, content, work.request_id or number)
        self.queue.add(
            Request(
                key=key, client=envelope[0], message=message, content=content, has_id=has_id, number=number, seed=seed,
                priority=work.priority, waiters=[envelope], submitted_at=now,
            )
        )  # fmt: skip
        self.meter.counts["accepted"] += 1

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
                reply = self._kept(request.key, request.content)
            except ProtocolError as error:  # the id is that of another request
                self.cancel(request.key, error)
                continue
            if reply is not None:
                self.queue.cancel(request.key)
                for envelope in request.waiters:
                    self.send(envelope, reply)

    def deliver(self, request: Request, reply: bytes, *, error: str = "", tokens: int = 0) -> None:
        """The reply to a request that left the queue is kept and sent as it is. `error`: its type, never its text."""
        if b"\n" in reply or not (reply.startswith(b"{") and reply.endswith(b"}")):
            return self.fail(request, ProtocolError("the worker's reply is not a JSON object in one line"))
        if error:
            if request.number is not None:
                self.counts.dropped(request.content, request.number)
            for name in ["cancelled"] if error == Cancelled.__name__ else ["failed", f"failed.{error[:60]}"]:
                self.meter.counts[name] += 1
        else:
            self.meter.answered(time.monotonic(), tokens=tokens)
            if request.has_id:
                self.results.put(request.key, b'{"content": "%b", "reply": %b}' % (request.content.encode(), reply))
            elif request.number is not None:
                self.counts.answered(request.content, request.number)
        for envelope in request.waiters:
            self.send(envelope, reply)

    def fail(self, request: Request, error: SealError) -> None:
        """Report `error` for a request that left the queue. It may be sent again."""
        self.deliver(request, self.error(error, request.key), error=type(error).__name__)

    def cancel(self, key: str, error: SealError) -> Request | None:
        """Remove a request and report `error` for it. None if it is not in work."""
        request = self.queue.cancel(key)
        if request is not None:
            self.fail(request, error)
        return request

    def save(self) -> None:
        """Write what a full disk did not take earlier."""
        self.results.save()
        self.counts.save()

    def close(self) -> None:
        self.results.close()
        self.counts.close()

    def error(self, error: BaseException, request_id: str | None = None) -> bytes:
        """The bytes of an error reply."""
        return error_reply(error, request_id=request_id, server_id=self.server_id).to_json()

    def _kept(self, key: str, content: str) -> bytes | None:
        """The reply to this request, if there is one. Raises ProtocolError if the id belongs to another request."""
        record = self.results.get(key) if self.model_id else None
        if record is None:
            return None
        start, _, reply = record.partition(b'", "reply": ')
        check_same(key, start.removeprefix(b'{"content": "').decode(), content)
        self.meter.counts["from_journal"] += 1
        return reply[:-1]

    def _name(self, envelope: Envelope) -> str:
        """A name for a request without id. A message that TTTClient sends again has the same mark, so the same name."""
        mark = repr(envelope) if len(envelope) > 2 else uuid.uuid4().hex
        return f"{self.server_id}-{hashlib.sha256(mark.encode()).hexdigest()[:24]}"

    def _join(self, request: Request, content: str, envelope: Envelope) -> None:
        check_same(request.key, request.content, content)
        if envelope not in request.waiters or len(envelope) <= 2:  # a REQ client without mark waits for each reply
            if len(request.waiters) >= MAX_WAITERS:
                raise QueueFull(f"{MAX_WAITERS} already wait for request {request.key!r}; send it again later")
            request.waiters.append(envelope)
        self.meter.counts["joined"] += 1

    def _check_room(self, envelope: Envelope) -> None:
        if self.stopping:
            raise ServerStopping(f"{self.stopping}; send the request again to the next server")
        limits, queue = self.settings, self.queue
        unsaved_bytes = sum(map(len, self.results.unsaved.values()))
        for what, used, most in (
            ("requests wait", queue.n_waiting, limits.max_queued),
            ("requests of this client wait", queue.n_waiting_of(envelope[0]), limits.max_queued_per_client),
            ("bytes wait", queue.waiting_bytes, limits.max_queued_bytes),
            ("bytes of results wait for a full disk", unsaved_bytes, limits.max_unsaved_bytes),
        ):
            if used >= most:
                raise QueueFull(f"{used} {what}, {most} is the most; send it again later")

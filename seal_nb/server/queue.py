"""Which worker gets which request next: turns of clients, leases of workers, tries of requests.

A state machine without sockets, threads or clocks: the front end says what happened and when. Clients take turns, one
request each. Among one client's requests, higher priority goes first, then first come. A lost worker's requests go to
other workers, `max_tries` times at most. The last try runs alone: a request that kills workers has no more neighbours.
"""

import itertools
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Any

from seal_nb.server.settings import ServeSettings

Envelope = tuple[bytes, ...]  # the routing frames of a reply


@dataclass(kw_only=True, eq=False)
class Request:
    """One request in work: the only record of it in the front end."""

    key: str  # see requests.RequestTable
    request_id: str | None = None  # given by the client
    client: bytes
    message: bytes  # as the client sent it
    content: str = ""  # hash, see requests.content_of
    number: int | None = None  # see requests.AnswerCounts; None where the seed does not come from there
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
    """`requests` holds every request in work by key, `workers` every worker by its socket identity."""

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

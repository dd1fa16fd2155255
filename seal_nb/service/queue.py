"""Who works on what: requests waiting, workers with leases, and which request goes to which worker next.

A state machine without sockets, threads or clocks: the front end tells it what happened and what time it is
(seconds of a monotonic clock), and does what it answers. Clients take turns, one request each; among one
client's requests higher priority goes first, then first come.

A worker that dies takes its requests with it; they go to others, ``max_tries`` times at most. The last try
runs alone on its worker, so that one request that kills workers cannot take its neighbours along a third
time.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(kw_only=True, eq=False)
class Job:
    """One request on its way. ``token`` names the current try: a result with another token is void."""

    key: str
    client: bytes
    payload: bytes
    priority: int = 0
    submitted_at: float = 0.0
    assigned_at: float = 0.0
    order: int = 0
    tries: int = 0
    worker: bytes | None = None
    token: str = ""

    def __lt__(self, other: "Job") -> bool:
        return (-self.priority, self.order) < (-other.priority, other.order)


@dataclass(kw_only=True)
class Worker:
    """``capacity`` requests are useful to it at once; it has the ``jobs``, by token."""

    lease: int
    capacity: int
    seen_at: float
    jobs: dict[str, Job] = field(default_factory=dict)
    alone: bool = False

    @property
    def free(self) -> int:
        return 0 if self.alone else self.capacity - len(self.jobs)


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What became of the requests of a worker that is gone."""

    requeued: list[Job]
    given_up: list[Job]


class JobQueue:
    """See the module. Jobs are known by key, workers by their socket identity."""

    def __init__(self, *, lease_s: float = 30.0, max_tries: int = 3, n_expected: int = 0) -> None:
        self.lease_s, self.max_tries, self.n_expected = lease_s, max_tries, n_expected
        self.jobs: dict[str, Job] = {}
        self.workers: dict[bytes, Worker] = {}
        self.queued_bytes = 0
        self._waiting: dict[bytes, list[Job]] = {}  # a heap for each client that has something waiting
        self._turns: deque[bytes] = deque()
        self._suspects: deque[Job] = deque()
        self._counter = 0
        self._reserved: bytes | None = None

    @property
    def n_running(self) -> int:
        return sum(len(worker.jobs) for worker in self.workers.values())

    @property
    def n_queued(self) -> int:
        return len(self.jobs) - self.n_running

    def n_queued_of(self, client: bytes) -> int:
        return len(self._waiting.get(client, ()))

    def add(self, job: Job) -> None:
        if job.key in self.jobs:
            raise ValueError(f"request {job.key} is queued already; join it")
        job.order = self._next()
        self.jobs[job.key] = job
        self._wait(job)

    def cancel(self, key: str) -> Job | None:
        """Forget a job, waiting or running; its ``worker``, if any, is to be told."""
        job = self.jobs.pop(key, None)
        if job is None:
            return None
        if job.worker is not None:
            self._release(job.worker, job.token)
        else:
            self._unwait(job)
        return job

    def join(self, identity: bytes, *, capacity: int, now: float) -> tuple[int, Lost]:
        """A worker is ready for requests. Known identity: it came back and holds nothing any more."""
        lost = self.lose(identity)
        lease = self._next()
        self.workers[identity] = Worker(lease=lease, capacity=capacity, seen_at=now)
        return lease, lost

    def beat(self, identity: bytes, *, lease: int, capacity: int, now: float) -> bool:
        """A sign of life; False if the lease is not the current one, so that the worker starts afresh."""
        worker = self.workers.get(identity)
        if worker is None or worker.lease != lease:
            return False
        worker.seen_at, worker.capacity = now, capacity
        return True

    def expired(self, now: float) -> list[bytes]:
        return [i for i, worker in self.workers.items() if now - worker.seen_at > self.lease_s]

    def leave(self, identity: bytes) -> list[Job]:
        """A worker goes in good order: its requests wait again, and no try is counted."""
        requeued = self._take_back(identity)
        for job in requeued:
            job.tries -= 1
            self._wait(job)
        return requeued

    def lose(self, identity: bytes) -> Lost:
        """A worker is gone: its requests wait again, or are given up after ``max_tries``."""
        taken = self._take_back(identity)
        given_up = [job for job in taken if job.tries >= self.max_tries]
        requeued = [job for job in taken if job.tries < self.max_tries]
        for job in given_up:
            del self.jobs[job.key]
        for job in requeued:
            self._wait(job)
        return Lost(requeued=requeued, given_up=given_up)

    def finish(self, identity: bytes, token: str) -> Job | None:
        """The job of this try, now done; None if that try is not current any more."""
        worker = self.workers.get(identity)
        if worker is None or token not in worker.jobs:
            return None
        job = self._release(identity, token)
        del self.jobs[job.key]
        return job

    def assignments(self, now: float) -> Iterator[Job]:
        """Jobs that start now, each with its ``worker`` and ``token`` set."""
        yield from self._assign_suspects(now)
        while self._turns and (identity := self._freest()) is not None:
            yield self._assign(self._pop(), identity, now)

    def _assign_suspects(self, now: float) -> Iterator[Job]:
        self._reserved = None
        while self._suspects:
            idle = [i for i, worker in self.workers.items() if not worker.jobs and worker.capacity > 0]
            if not idle:  # keep the least busy worker free of new requests until it is
                busy = [i for i, worker in self.workers.items() if not worker.alone]
                self._reserved = min(busy, key=lambda i: len(self.workers[i].jobs), default=None)
                return
            self.workers[idle[0]].alone = True
            yield self._assign(self._suspects.popleft(), idle[0], now)

    def _assign(self, job: Job, identity: bytes, now: float) -> Job:
        worker = self.workers[identity]
        self.queued_bytes -= len(job.payload)
        job.tries += 1
        job.worker, job.assigned_at = identity, now
        job.token = f"{worker.lease}.{self._next()}"
        worker.jobs[job.token] = job
        return job

    def _freest(self) -> bytes | None:
        share = self._share()
        candidates = [
            i for i, w in self.workers.items() if w.free > 0 and len(w.jobs) < share and i != self._reserved
        ]
        return max(candidates, key=lambda i: self.workers[i].free, default=None)

    def _share(self) -> float:
        """While expected workers still load, a worker takes its share only, and leaves them theirs."""
        if len(self.workers) >= self.n_expected:
            return math.inf
        return math.ceil(len(self.jobs) / self.n_expected)

    def _wait(self, job: Job) -> None:
        self.queued_bytes += len(job.payload)
        job.worker, job.token = None, ""
        if job.tries and job.tries == self.max_tries - 1:
            self._suspects.append(job)
            return
        if job.client not in self._waiting:
            self._waiting[job.client] = []
            self._turns.append(job.client)
        heapq.heappush(self._waiting[job.client], job)

    def _unwait(self, job: Job) -> None:
        self.queued_bytes -= len(job.payload)
        if job in self._suspects:
            self._suspects.remove(job)
            return
        heap = self._waiting[job.client]
        heap.remove(job)
        heapq.heapify(heap)
        if not heap:
            del self._waiting[job.client]
            self._turns.remove(job.client)

    def _pop(self) -> Job:
        client = self._turns.popleft()
        heap = self._waiting[client]
        job = heapq.heappop(heap)
        if heap:
            self._turns.append(client)
        else:
            del self._waiting[client]
        return job

    def _take_back(self, identity: bytes) -> list[Job]:
        worker = self.workers.pop(identity, None)
        return sorted(worker.jobs.values(), key=lambda job: job.order) if worker else []

    def _release(self, identity: bytes, token: str) -> Job:
        worker = self.workers[identity]
        worker.alone = False
        return worker.jobs.pop(token)

    def _next(self) -> int:
        self._counter += 1
        return self._counter

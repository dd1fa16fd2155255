"""Who works on what: requests waiting, workers with leases, and which request goes to which worker next.

A state machine without sockets, threads or clocks: the front end tells it what happened and what time it is
(seconds of a monotonic clock), and does what it answers. Clients take turns, one request each; among one
client's requests higher priority goes first, then first come.

A worker that dies takes its requests with it; they go to others, ``max_tries`` times at most. The last try
runs alone on its worker, so that one request that kills workers cannot take its neighbours along a third
time. One that lives and gets nowhere (``stuck``) is as good as dead.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

SPARE = 64  # cancelled jobs that a heap may hold before it is tidied


@dataclass(kw_only=True, eq=False)
class Job:
    """One request on its way. ``token`` names the current try: a result with another token is void."""

    key: str
    client: bytes
    payload: bytes  # the request as it came
    seed: int = 0
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
    steps: int = 0  # as it counts them; only a change says something
    stepped_at: float
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

    def __init__(
        self,
        *,
        lease_s: float = 30.0,
        stall_s: float = 0.0,
        job_timeout_s: float = 0.0,
        max_tries: int = 3,
        n_expected: int = 0,
    ) -> None:
        self.lease_s, self.stall_s, self.job_timeout_s = lease_s, stall_s, job_timeout_s
        self.max_tries, self.n_expected = max_tries, n_expected
        self.jobs: dict[str, Job] = {}
        self.workers: dict[bytes, Worker] = {}
        self.queued_bytes = 0
        self._waiting: dict[bytes, list[Job]] = {}  # a heap for each client that has something waiting
        self._n_waiting: dict[bytes, int] = {}  # the heap has cancelled jobs too, until their turn comes
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
        return self._n_waiting.get(client, 0)

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
        self.workers[identity] = Worker(lease=lease, capacity=capacity, seen_at=now, stepped_at=now)
        return lease, lost

    def beat(self, identity: bytes, *, lease: int, capacity: int, now: float, steps: int = 0) -> bool:
        """A sign of life; False if the lease is not the current one, so that the worker starts afresh."""
        worker = self.workers.get(identity)
        if worker is None or worker.lease != lease:
            return False
        worker.seen_at, worker.capacity = now, capacity
        if worker.steps != steps:
            worker.steps, worker.stepped_at = steps, now
        return True

    def expired(self, now: float) -> list[bytes]:
        return [i for i, worker in self.workers.items() if now - worker.seen_at > self.lease_s]

    def stuck(self, now: float) -> dict[bytes, str]:
        """Workers that give signs of life and get nowhere with what they have, and why they count so."""
        found = {}
        for identity, worker in self.workers.items():
            oldest = min((job.assigned_at for job in worker.jobs.values()), default=now)
            if worker.jobs and 0 < self.stall_s < now - worker.stepped_at:
                found[identity] = f"no step of its work for more than {self.stall_s:g} s"
            elif 0 < self.job_timeout_s < now - oldest:
                found[identity] = f"a request was not done within {self.job_timeout_s:g} s"
        return found

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
        if not worker.jobs:
            worker.stepped_at = now  # until now it had nothing to do
        self.queued_bytes -= len(job.payload)
        job.tries += 1
        job.worker, job.assigned_at = identity, now
        job.token = f"{worker.lease}.{self._next()}"
        worker.jobs[job.token] = job
        return job

    def _freest(self) -> bytes | None:
        share = self._share()
        candidates = [i for i, w in self.workers.items() if w.free > 0 and len(w.jobs) < share and i != self._reserved]
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
            self._waiting[job.client], self._n_waiting[job.client] = [], 0
            self._turns.append(job.client)
        heapq.heappush(self._waiting[job.client], job)
        self._n_waiting[job.client] += 1

    def _unwait(self, job: Job) -> None:
        self.queued_bytes -= len(job.payload)
        if job in self._suspects:
            self._suspects.remove(job)
            return
        job.payload = b""
        self._one_less(job.client)
        if job.client not in self._waiting:
            self._turns.remove(job.client)
        elif len(heap := self._waiting[job.client]) > 2 * self._n_waiting[job.client] + SPARE:
            heap[:] = filter(self._is_current, heap)
            heapq.heapify(heap)

    def _pop(self) -> Job:
        client = self._turns.popleft()
        while not self._is_current(job := heapq.heappop(self._waiting[client])):
            pass
        self._one_less(client)
        if client in self._waiting:
            self._turns.append(client)
        return job

    def _is_current(self, job: Job) -> bool:
        """Not cancelled; taking each out of its heap at once would make a full queue's end take minutes."""
        return self.jobs.get(job.key) is job

    def _one_less(self, client: bytes) -> None:
        self._n_waiting[client] -= 1
        if not self._n_waiting[client]:
            del self._waiting[client], self._n_waiting[client]

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

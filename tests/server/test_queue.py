"""The scheduling state machine: turns, priorities, leases, tries; that nothing is ever lost or doubled."""

import math
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seal_nb.server.client import ServeSettings
from seal_nb.server.requests import Request, RequestQueue, Worker


def job(key, client=b"c1", priority=0):
    return Request(key=key, client=client, message=key.encode(), priority=priority)


def queue_of(*jobs, workers=1, capacity=1, **settings):
    queue = RequestQueue(ServeSettings(**{"n_workers": 0, **settings}))
    for one in jobs:
        queue.add(one)
    for number in range(workers):
        join(queue, b"w%d" % number, capacity)
    return queue


def join(queue, identity, capacity=1, now=0):
    """The lease of a worker that is ready."""
    queue.join(identity, Worker(capacity=capacity, seen_at=now, stepped_at=now))
    return queue.workers[identity].lease


def finish_in_order(queue):
    """Run everything on the workers at hand; the keys in the order they started."""
    order = []
    while started := list(queue.assignments(now=0)):
        for one in started:
            order.append(one.key)
            assert queue.finish(one.worker, one.token) is one
    return order


def test_clients_take_turns_whoever_sent_more():
    many = [job(f"a{i}", b"a") for i in range(3)]
    queue = queue_of(*many, job("b0", b"b"), job("c0", b"c"))
    assert finish_in_order(queue) == ["a0", "b0", "c0", "a1", "a2"]


def test_priority_is_among_one_clients_requests_only():
    queue = queue_of(job("low"), job("high", priority=5), job("other", b"c2"))
    assert finish_in_order(queue) == ["high", "other", "low"]


def test_the_freest_worker_gets_the_next_request():
    queue = queue_of(*[job(f"j{i}") for i in range(4)], workers=2, capacity=2)
    assert [one.worker for one in queue.assignments(now=0)].count(b"w0") == 2


def test_capacity_is_respected_and_follows_the_beat():
    queue = queue_of(workers=0)
    lease = join(queue, b"w", capacity=1, now=0)
    for i in range(3):
        queue.add(job(f"j{i}"))
    assert len(list(queue.assignments(now=0))) == 1
    assert queue.beat(b"w", lease=lease, capacity=3, steps=0, now=1)
    assert len(list(queue.assignments(now=1))) == 2


def test_a_lost_workers_request_goes_to_another_and_its_own_late_result_is_void():
    queue = queue_of(job("j"), workers=2)
    (first,) = queue.assignments(now=0)
    late = (first.worker, first.token)
    assert queue.lose(first.worker) == (1, [])
    (second,) = queue.assignments(now=0)
    assert (second.worker, second.token) != late
    assert queue.finish(*late) is None
    assert queue.finish(second.worker, second.token) is second


def test_a_worker_that_comes_back_under_its_name_has_another_lease():
    queue = queue_of(workers=0, lease_s=5)
    old = join(queue, b"w", capacity=1, now=0)
    queue.add(job("j"))
    (first,) = queue.assignments(now=0)
    token = first.token
    assert queue.expired(now=6) == [b"w"]
    queue.lose(b"w")
    new = join(queue, b"w", capacity=1, now=7)
    assert not queue.beat(b"w", lease=old, capacity=1, steps=0, now=7)
    assert queue.beat(b"w", lease=new, capacity=1, steps=0, now=7)
    list(queue.assignments(now=7))
    assert queue.finish(b"w", token) is None


def test_three_tries_and_then_given_up():
    queue = queue_of(workers=0, max_tries=3)
    queue.add(job("poison"))
    for number in range(3):
        join(queue, b"w%d" % number, capacity=4, now=0)
        assert len(list(queue.assignments(now=0))) == 1
        _, given_up = queue.lose(b"w%d" % number)
    assert [one.key for one in given_up] == ["poison"]
    assert not queue.requests


def test_neighbours_of_a_request_that_kills_workers_survive_it():
    queue = queue_of(*[job(f"j{i}") for i in range(4)], job("poison"), workers=0)
    finished, given_up, number = [], [], 0
    while queue.requests:
        number += 1
        assert number < 20
        join(queue, b"w%d" % number, capacity=4, now=0)
        while started := list(queue.assignments(now=0)):
            if any(one.key == "poison" for one in started):
                given_up += [one.key for one in queue.lose(b"w%d" % number)[1]]
                break
            finished += [queue.finish(one.worker, one.token).key for one in started]
    assert given_up == ["poison"]
    assert sorted(finished) == ["j0", "j1", "j2", "j3"]


def test_a_last_try_runs_alone_and_is_not_starved_by_new_requests():
    queue = queue_of(job("suspect"), job("long"), capacity=2, max_tries=2)
    started = list(queue.assignments(now=0))
    queue.lose(b"w0")
    join(queue, b"w1", capacity=2, now=0)
    assert {one.key for one in started} == {"suspect", "long"}
    (alone,) = queue.assignments(now=0)
    queue.add(job("new", b"c2"))
    assert list(queue.assignments(now=0)) == []
    queue.finish(alone.worker, alone.token)
    assert len(list(queue.assignments(now=0))) == 1  # the other suspect, alone too


def test_while_a_last_try_waits_the_least_busy_worker_gets_nothing_until_it_is_idle():
    queue = queue_of(*[job(f"j{i}") for i in range(5)], workers=3, capacity=4, max_tries=2)
    started = list(queue.assignments(now=0))
    lost, busier, least_busy = sorted(queue.workers, key=lambda i: -len(queue.workers[i].requests))
    queue.lose(lost)
    for i in range(3):
        queue.add(job(f"new{i}"))
    assert [one.worker for one in queue.assignments(now=0)] == [busier] * 2
    (last,) = [one for one in started if one.worker == least_busy]
    queue.finish(least_busy, last.token)
    (alone,) = queue.assignments(now=0)
    assert alone in started and alone.worker == least_busy and queue.workers[least_busy].alone


def test_leaving_in_good_order_costs_no_try():
    queue = queue_of(job("j"), max_tries=1)
    list(queue.assignments(now=0))
    assert queue.lose(b"w0", planned=True) == (1, []) and queue.requests["j"].tries == 0
    join(queue, b"w1", capacity=1, now=0)
    assert len(list(queue.assignments(now=0))) == 1


def test_cancel_forgets_waiting_and_running_requests():
    queue = queue_of(job("a"), job("b"))
    (running,) = queue.assignments(now=0)
    assert queue.cancel("b").worker is None
    assert queue.cancel("a").worker == b"w0"
    assert queue.cancel("a") is None
    assert queue.finish(b"w0", running.token) is None
    assert (queue.n_waiting, queue.n_running, queue.waiting_bytes) == (0, 0, 0)


def test_a_worker_that_beats_and_makes_no_step_is_stuck_only_while_it_has_work():
    queue = queue_of(workers=0, stall_s=10)
    lease = join(queue, b"w", capacity=1, now=0)
    beat = {"lease": lease, "capacity": 1}
    assert queue.beat(b"w", **beat, steps=1, now=0)
    assert queue.stuck(now=1000) == {}  # it has nothing to do
    queue.add(job("j"))
    list(queue.assignments(now=1000))
    assert queue.stuck(now=1009) == {}
    queue.beat(b"w", **beat, steps=2, now=1009)
    assert queue.stuck(now=1019) == {}
    queue.beat(b"w", **beat, steps=2, now=1020)
    assert queue.stuck(now=1020) == {b"w": "no step of its work for more than 10 s"}
    assert queue.expired(now=1020) == []


def test_a_request_that_is_never_done_makes_its_worker_stuck_however_busy_that_is():
    queue = queue_of(workers=0, stall_s=10, job_timeout_s=100)
    lease = join(queue, b"w", capacity=2, now=0)
    queue.add(job("j"))
    list(queue.assignments(now=0))
    for second in range(101):
        queue.beat(b"w", lease=lease, capacity=2, steps=second, now=second)
    assert queue.stuck(now=100) == {}
    assert queue.stuck(now=100.5) == {b"w": "a request was not done within 100 s"}
    assert queue_of(workers=0).stuck(now=0) == {}


def test_cancelled_requests_leave_nothing_behind_and_a_full_queue_is_emptied_at_once():
    """A batch system kills a server that needs too long to turn its clients away."""
    queue = queue_of(job("stays"), workers=0)
    began = time.process_time()
    for number in range(10_000):
        queue.add(job(f"j{number}", priority=number % 3))
    for number in range(10_000):
        queue.cancel(f"j{number}")
    assert time.process_time() - began < 3.0
    assert queue.n_waiting_of(b"c1") == queue.n_waiting == 1
    queue.add(job("j5"))  # the key of one that was cancelled
    join(queue, b"w", capacity=1, now=0)
    assert finish_in_order(queue) == ["stays", "j5"]
    assert not queue._waiting


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens in whatever order: each request ends once, nobody has more than their capacity, and each
    assignment is the one that looking at all workers and all requests gives."""

    @initialize(n_workers=st.sampled_from([0, 3]))
    def start(self, n_workers):
        self.queue = queue_of(workers=0, lease_s=10, max_tries=2, n_workers=n_workers)
        self.now, self.n_jobs, self.n_workers = 0.0, 0, 0
        self.open, self.ended, self.void = set(), [], []
        self.turns = []  # clients with requests that wait, the one whose turn it is first

    @rule(client=st.sampled_from([b"a", b"b", b"c"]), priority=st.integers(-1, 1))
    def add(self, client, priority):
        key = f"j{self.n_jobs}"
        self.n_jobs += 1
        self.open.add(key)
        self.queue.add(job(key, client, priority))

    @rule(capacity=st.integers(0, 3))
    def join(self, capacity):
        join(self.queue, b"w%d" % self.n_workers, capacity=capacity, now=self.now)
        self.n_workers += 1

    @precondition(lambda self: self.queue.workers)
    @rule(pick=st.randoms(), capacity=st.integers(0, 3))
    def beat(self, pick, capacity):
        identity = pick.choice(sorted(self.queue.workers))
        lease = self.queue.workers[identity].lease
        assert self.queue.beat(identity, lease=lease, capacity=capacity, steps=0, now=self.now)

    @rule()
    def dispatch(self):
        started, workers = self.queue.assignments(self.now), self.queue.workers
        busy = {identity: len(worker.requests) for identity, worker in workers.items() if not worker.alone}
        for one in iter(lambda: self.checked(started), None):
            assert len(workers[one.worker].requests) <= workers[one.worker].capacity
        if self.last_tries():  # those that began to wait for the least busy worker, while none was idle
            assert all(busy.get(self.queue._reserved, 9) <= n for n in busy.values() if n)

    def last_tries(self):
        return [one for one in self.queue.requests.values() if one.worker is None and one.tries == 1]

    def waiting(self, client):
        ranked = sorted((-one.priority, one.order, one.key) for one in self.queue.requests.values()
                        if one.client == client and one.worker is None and one.tries < 1)  # fmt: skip
        return [key for *_, key in ranked]

    def checked(self, started):
        """The next assignment, after a comparison with what is plainly right."""
        queue, lasts, reserved = self.queue, self.last_tries(), None
        before = {i: (worker.free, len(worker.requests), worker.capacity) for i, worker in queue.workers.items()}
        turn = self.turns[0] if self.turns else None
        first = self.waiting(turn)[0] if turn else None
        one, reserved = next(started, None), queue._reserved
        share = math.inf
        if len(before) < queue.settings.n_workers:
            share = math.ceil(len(queue.requests) / queue.settings.n_workers)
        idle = [i for i, (_, n, capacity) in before.items() if n == 0 and capacity > 0]
        rooms = {i: free for i, (free, n, _) in before.items() if free > 0 and n < share and i != reserved}
        if one is None:
            assert not (lasts and idle) and not (first and rooms)
        elif one in lasts:
            assert one.worker in idle and queue.workers[one.worker].alone
        else:
            assert not (lasts and idle)
            assert one.key == first and rooms[one.worker] == max(rooms.values())
            self.turns = [*self.turns[1:], turn]
            self.settle_turns()
        return one

    @invariant()
    def settle_turns(self):
        """A client without waiting requests has no turn; one that begins to wait is the last."""
        clients = {one.client for one in self.queue.requests.values()}
        orders = {c: [self.queue.requests[key].order for key in self.waiting(c)] for c in clients}
        new = sorted((min(orders[c]), c) for c in clients if orders[c] and c not in self.turns)
        self.turns = [c for c in self.turns if orders.get(c)] + [c for _, c in new]

    def running(self):
        return [one for worker in self.queue.workers.values() for one in worker.requests.values()]

    @precondition(lambda self: self.running())
    @rule(pick=st.randoms())
    def finish(self, pick):
        one = pick.choice(self.running())
        worker, token = one.worker, one.token
        self.end(self.queue.finish(worker, token).key)
        assert self.queue.finish(worker, token) is None

    @precondition(lambda self: self.queue.workers)
    @rule(pick=st.randoms(), how=st.sampled_from(["lose", "leave", "rejoin"]))
    def go(self, pick, how):
        identity = pick.choice(sorted(self.queue.workers))
        self.void += [(identity, token) for token in self.queue.workers[identity].requests]
        if how == "leave":
            self.queue.lose(identity, planned=True)
        else:
            for one in self.queue.lose(identity)[1]:
                self.end(one.key)
        if how == "rejoin":
            join(self.queue, identity, capacity=2, now=self.now)

    @precondition(lambda self: self.open)
    @rule(pick=st.randoms())
    def cancel(self, pick):
        self.end(self.queue.cancel(pick.choice(sorted(self.open))).key)

    def end(self, key):
        self.open.remove(key)
        self.ended.append(key)

    @invariant()
    def nothing_lost_nothing_doubled(self):
        assert set(self.queue.requests) == self.open
        assert len(self.ended) == len(set(self.ended))
        assert self.queue.n_running == len(self.running())
        assert self.queue.n_waiting == len(self.open) - len(self.running())

    @invariant()
    def bounds_hold(self):
        for worker in self.queue.workers.values():
            assert not worker.alone or len(worker.requests) == 1
        assert all(one.tries <= 2 for one in self.queue.requests.values())
        waiting = [one for one in self.queue.requests.values() if one.worker is None]
        assert self.queue.waiting_bytes == sum(len(one.message) for one in waiting)

    @invariant()
    def void_results_stay_void(self):
        assert all(self.queue.finish(*late) is None for late in self.void[-3:])

    def teardown(self):
        """With a worker that lives, everything ends."""
        join(self.queue, b"last", capacity=2, now=self.now)
        for identity in set(self.queue.workers) - {b"last"}:
            for one in self.queue.lose(identity)[1]:
                self.end(one.key)
        for key in finish_in_order(self.queue):
            self.end(key)
        assert not self.open


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_worker_leaves_those_that_still_load_their_share() -> None:
    queue = queue_of(workers=0, n_workers=2)
    for number in range(6):
        queue.add(job(str(number)))
    join(queue, b"first", capacity=16, now=0.0)
    assert len(list(queue.assignments(0.0))) == 3
    join(queue, b"second", capacity=16, now=1.0)
    assert [one.worker for one in queue.assignments(1.0)] == [b"second"] * 3

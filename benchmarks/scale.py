"""How many workers one front end feeds, and that no request is lost or doubled while workers come and go.

A real server process, stub workers that do nothing, and clients that send ordinary requests (`workload`), all on this
machine. Each worker has a socket of its own and speaks the protocol of `seal_nb.server.worker`; a few processes hold
all of them. First all requests are queued, then the workers join and answer them, while at random times some leave,
some vanish, and some freeze until their requests belong to others. Then comes a load of half that speed, without such
faults, for the latency that the front end adds. It is taken from send to receipt without the time that the worker had
the request; a slot is always free.

    python -m benchmarks.scale      (3 minutes; writes benchmarks/scale.json and the table in docs/scale.md)
"""

import argparse
import heapq
import itertools
import json
import multiprocessing
import random
import select
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import zmq

from benchmarks.gpu_table import in_docs
from benchmarks.service_load import machine
from benchmarks.speed_table import grid
from benchmarks.workload import load_workload
from seal_nb.protocol import Answers, ServerStatus, build_reply
from seal_nb.server.client import TTTClient, TTTServer
from seal_nb.server.endpoint import Endpoint, Socket, connected
from seal_nb.server.worker import pack, unpack
from seal_nb.storage import write_json

OUT = Path(__file__).with_name("scale.json")
GPU = Path(__file__).with_name("gpu.json")
DOCS = Path(__file__).resolve().parents[1] / "docs/scale.md"
MARKS = ("<!-- scale -->\n", "<!-- end of scale -->\n")
ROUND = 750  # requests of the round in gpu.json
SHARE = 0.7  # of one core: the rest is for bursts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One simulation. Times in seconds."""

    workers: int = 1_000
    requests: int = 50_000
    clients: int = 200
    processes: int = 2  # of the workers
    capacity: int = 16  # requests that a worker has at once
    service_s: float = 2.0  # mean time of a request, which is uniform from nothing to twice that
    life_s: float = 60.0  # mean time until a worker leaves, vanishes or freezes
    lease_s: float = 15.0
    latency_s: float = 20.0  # length of the second load


class Crowd:
    """The workers of one process, and the list of what happens next to them."""

    def __init__(self, endpoint: Endpoint, plan: Plan, number: int, calm: Any) -> None:
        self.endpoint, self.plan, self.number, self.calm = endpoint, plan, number, calm
        self.random = random.Random(number)
        self.counts: Counter[str] = Counter()
        self.context: zmq.Context[Socket] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 10 * plan.workers)
        self.ready = select.epoll()  # with 500 sockets ten times as fast as zmq.Poller
        self.workers: dict[int, StubWorker] = {}  # by the descriptor of its socket
        self.sent: set[int] = set()  # since the last look; a send can hide that there is something to read
        self.reply = build_reply(
            baseline=Answers(texts=["a wrong answer"] * 4, verdicts=["INCORRECT"] * 4),
            adapter=Answers(texts=["a right answer"] * 4, verdicts=["CORRECT"] * 4),
            request_id="KEY", timings={"train_s": 0.125}, train_tokens=400, train_steps=80, epoch_losses=[1.5] * 10,
        ).to_json()  # fmt: skip
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time.monotonic() + seconds, next(self._order), what))

    def join(self) -> None:
        self.counts["joined"] += 1
        StubWorker(self, f"stub-{self.number}-{self.counts['joined']}")

    def run(self, over: Any) -> None:
        for number in range(self.plan.workers // self.plan.processes):
            self.after(number * 0.001, self.join)
        while not over.is_set():
            wait_s = self._events[0][0] - time.monotonic()
            readable = self.ready.poll(0 if self.sent else max(0.0, wait_s))
            looked_at, self.sent = self.sent.union(fd for fd, _ in readable), set()
            for worker in [self.workers[fd] for fd in looked_at if fd in self.workers]:
                worker.receive()
            while self._events[0][0] <= time.monotonic():
                heapq.heappop(self._events)[2]()


class StubWorker:
    """One worker: its socket, its lease, and its requests: when each came, by token."""

    def __init__(self, crowd: Crowd, name: str) -> None:
        self.crowd, self.name = crowd, name
        self.session, self.steps, self.frozen_until = 0, 0, 0.0
        self.lease: int | None = None
        self.jobs: dict[str, float] = {}
        self.socket = connected(crowd.context, crowd.endpoint, "worker", name=name.encode())
        self.fd = int(self.socket.get(zmq.FD))
        crowd.workers[self.fd] = self
        self.beat()
        self.wake()

    def beat(self) -> None:
        if self.late(self.beat):
            return
        self.steps += 1
        state = {"capacity": self.crowd.plan.capacity, "steps": self.steps, "stats": {"slots": 8, "rss_bytes": 2**30}}
        if self.lease is None:
            about = {"worker_id": self.name, "host": "node", "pid": 0, "model_id": "stub"}
            self.send("ready", session=self.session, **about, **state)
        else:
            self.send("beat", lease=self.lease, **state)
        self.crowd.after(min(1.0, self.crowd.plan.lease_s / 5), self.beat)

    def receive(self) -> None:
        while self.frozen_until < time.monotonic() and self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            kind, header, _ = unpack(self.socket.recv_multipart())
            if kind == "welcome":
                self.lease = header["lease"]
            elif kind == "expired" and header["lease"] == self.lease:
                self.jobs, self.lease, self.session = {}, None, self.session + 1
            elif kind == "job":
                self.jobs[header["token"]] = time.monotonic()
                service_s = self.crowd.random.uniform(0, 2 * self.crowd.plan.service_s)
                self.crowd.after(service_s, partial(self.finish, header["key"], header["token"]))

    def finish(self, key: str, token: str) -> None:
        if self.late(partial(self.finish, key, token)) or token not in self.jobs:
            return
        took = b"%.6f" % (time.monotonic() - self.jobs.pop(token))
        body = self.crowd.reply.replace(b"KEY", key.encode(), 1).replace(b"0.125", took, 1)
        self.send("result", body, token=token, error="", tokens=400)

    def fall(self) -> None:
        """Leave as planned, vanish, or freeze for longer than the lease. Others join in the place of those that go."""
        crowd = self.crowd
        if not crowd.calm.is_set():
            how = crowd.random.choice(["left", "vanished", "froze"])
            crowd.counts[how] += 1
            if how == "froze":
                crowd.ready.unregister(self.fd)
                self.frozen_until = time.monotonic() + 1.5 * crowd.plan.lease_s
                crowd.after(1.5 * crowd.plan.lease_s + 0.1, self.wake)
                return
            if how == "left":
                self.send("leaving")
            crowd.ready.unregister(self.fd)
            crowd.workers.pop(self.fd).socket.close(linger=2000 if how == "left" else 0)
            crowd.after(crowd.random.uniform(0, 2), crowd.join)

    def wake(self) -> None:
        self.crowd.ready.register(self.fd, select.EPOLLIN)
        self.crowd.sent.add(self.fd)
        self.crowd.after(self.crowd.random.expovariate(1 / self.crowd.plan.life_s), self.fall)

    def late(self, what: Callable[[], None]) -> bool:
        """Whether this is not done now: the worker is gone, or frozen, and then it is done as soon as it wakes."""
        left_s = self.frozen_until - time.monotonic()
        if left_s > 0:
            self.crowd.after(left_s, what)
        return left_s > 0 or self.socket.closed

    def send(self, kind: str, body: bytes = b"", **header: Any) -> None:
        self.socket.send_multipart(pack(kind, body, **header))
        self.crowd.sent.add(self.fd)


def crowd(endpoint: Endpoint, plan: Plan, number: int, calm: Any, over: Any, counts: Any) -> None:
    """The process of a crowd."""
    one = Crowd(endpoint, plan, number, calm)
    one.run(over)
    counts.put(one.counts)
    one.context.destroy(linger=0)


class Clients:
    """Clients with a socket each. What each request is: its id and when it was sent."""

    def __init__(self, endpoint: Endpoint, n_clients: int, context: "zmq.Context[Socket]") -> None:
        self.poller, self.sockets = zmq.Poller(), []
        for number in range(n_clients):
            socket = connected(context, endpoint, "client", name=b"client-%d" % number)
            self.poller.register(socket, zmq.POLLIN)
            self.sockets.append(socket)
        self.sent_at: dict[str, float] = {}
        self.replies: Counter[str] = Counter()  # answers by id; errors are in `errors`
        self.errors: Counter[str] = Counter()
        self.added_s: list[float] = []
        (request,) = load_workload(Path("absent")).requests(0, 1, 1)
        text = request.model_copy(update={"request_id": "KEY"}).model_dump_json(exclude_none=True)
        self._message = text.encode().partition(b"KEY")
        self._numbers = itertools.count()

    def send(self, key: str = "") -> None:
        number = next(self._numbers)
        key = key or f"request-{number:08d}"
        self.sent_at[key] = time.monotonic()
        message = self._message[0] + key.encode() + self._message[2]
        self.sockets[number % len(self.sockets)].send_multipart([key.encode(), b"", message])

    def receive(self, timeout_s: float) -> None:
        """Take the replies that are there. A request whose workers were all lost is sent again, as a user would."""
        for socket, _ in self.poller.poll(int(1000 * timeout_s)):
            while socket.poll(0):
                key, _, body = socket.recv_multipart()
                name, now, reply = key.decode(), time.monotonic(), json.loads(body)
                if "error" in reply:
                    self.errors[reply["error"].partition(":")[0]] += 1
                    self.send(name)
                else:
                    self.replies[name] += 1
                    self.added_s.append(now - self.sent_at[name] - reply["timings"]["train_s"])


class FrontEndProcess:
    """What the server process uses: processor seconds of its main thread and of ZMQ's, memory."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.peak_rss = 0

    def cpu_s(self) -> dict[str, float]:
        used = {"main": 0.0, "zmq": 0.0}
        for thread in self.process.threads():
            used["main" if thread.id == self.process.pid else "zmq"] += thread.user_time + thread.system_time
        self.peak_rss = max(self.peak_rss, self.process.memory_info().rss)
        return used


def simulate(plan: Plan, run_dir: Path) -> dict[str, Any]:
    """Queue, drain with faults, then a calm load for the latency."""
    with ExitStack() as stack:
        server = TTTServer(
            run_dir=run_dir, n_workers=0, max_queued=60_000, lease_s=plan.lease_s, log_level="ERROR", drain_s=1.0
        )
        stack.enter_context(server)
        client = stack.enter_context(TTTClient(server.endpoint))
        front = FrontEndProcess(server.info.pid)
        clients = Clients(server.info, plan.clients, stack.enter_context(zmq.Context()))
        result: dict[str, Any] = {"plan": asdict(plan)}
        result["rss_mib_empty"] = round(front.process.memory_info().rss / 2**20, 1)
        began, cpu = time.monotonic(), front.cpu_s()
        for _ in range(plan.requests):
            clients.send()
        _wait(lambda: client.status().counts.get("accepted") == plan.requests)
        result["accept"] = _phase(plan.requests, began, cpu, front)
        result["queued"] = client.status().n_queued
        result["rss_mib_queued"] = round(front.process.memory_info().rss / 2**20, 1)
        with crowds(server.info, plan, stack) as (calm, counts):
            began, cpu = time.monotonic(), front.cpu_s()
            most = int(0.95 * plan.requests)
            while len(clients.replies) < most:
                clients.receive(0.1)
            result["drain"] = _phase(most, began, cpu, front)
            calm.set()
            _wait(lambda: clients.receive(0.1) or len(clients.replies) == plan.requests)
            result["peak_rss_mib"] = round(front.peak_rss / 2**20, 1)
            _wait(lambda: len(client.status().workers) == plan.workers)
            rested, cpu = time.monotonic(), front.cpu_s()
            time.sleep(3.0)
            idle = (front.cpu_s()["main"] - cpu["main"]) / (time.monotonic() - rested)
            result["heartbeats_share"] = round(idle, 3)
            both = [result[name]["requests"] / result[name]["requests_per_s"] for name in ("accept", "drain")]
            result["requests_per_s"] = round(plan.requests / (both[0] + both[1] / 0.95), 1)
            each_s = sum(result[name]["main_ms"] for name in ("accept", "drain")) / 1e3
            each_s -= idle / result["drain"]["requests_per_s"]  # heartbeats while the requests were served
            result["requests_per_core_s"] = round((1 - idle) / max(each_s, 1e-6), 1)
            result["latency"] = latency(plan, clients, front, result["requests_per_s"] / 2)
            asked = time.perf_counter()
            status: ServerStatus = client.status()
            result["status_ms"] = round(1e3 * (time.perf_counter() - asked), 1)
        lines = [json.loads(line)["key"] for line in (run_dir / "results.journal.jsonl").open()]
    sent = len(clients.sent_at)
    names = ("answered", "requeued", "workers_lost", "void_results", "undelivered")
    return result | {
        "requests": sent,
        "lost": sent - len(clients.replies),
        "doubled": sum(n - 1 for n in clients.replies.values()) + len(lines) - len(set(lines)),
        "errors": dict(clients.errors),
        "front_end": {name: status.counts.get(name, 0) for name in names},
        "workers": dict(counts),
    }


def latency(plan: Plan, clients: Clients, front: FrontEndProcess, rate: float) -> dict[str, Any]:
    """The latency that the front end adds to requests that come at random times."""
    clients.added_s, next_at, n_before = [], time.monotonic(), len(clients.sent_at)
    began, cpu, ends_at = next_at, front.cpu_s(), next_at + plan.latency_s
    chance = random.Random(0)
    while next_at < ends_at or len(clients.replies) < len(clients.sent_at):
        while next_at <= min(time.monotonic(), ends_at):
            clients.send()
            next_at += chance.expovariate(rate)
        clients.receive(max(0.0, min(0.1, next_at - time.monotonic())) if next_at < ends_at else 0.1)
    steps = statistics.quantiles(clients.added_s, n=100)
    times = {"p50_ms": round(1e3 * steps[49], 1), "p99_ms": round(1e3 * steps[98], 1)}
    return {"rate": round(rate, 1), **times, **_phase(len(clients.sent_at) - n_before, began, cpu, front)}


@contextmanager
def crowds(endpoint: Endpoint, plan: Plan, stack: ExitStack) -> Iterator[tuple[Any, Counter[str]]]:
    """The processes of the workers; gives the event that ends their faults, and at the end what they did."""
    spawn = multiprocessing.get_context("spawn")
    calm, over, told, counts = spawn.Event(), spawn.Event(), spawn.SimpleQueue(), Counter[str]()
    processes = [
        spawn.Process(target=crowd, args=(endpoint, plan, number, calm, over, told), daemon=True)
        for number in range(plan.processes)
    ]
    for process in processes:
        process.start()
        stack.callback(process.kill)
    yield calm, counts
    over.set()
    for _ in processes:
        counts.update(told.get())


def _phase(n: int, began: float, cpu: dict[str, float], front: FrontEndProcess) -> dict[str, Any]:
    """Requests a second since `began`, and processor time of the front end for each."""
    took_s, used = time.monotonic() - began, front.cpu_s()
    each = {f"{name}_ms": round(1e3 * (used[name] - cpu[name]) / n, 3) for name in used}
    return {"requests": n, "requests_per_s": round(n / took_s, 1), **each}


def _wait(condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the simulation does not go on")
        time.sleep(0.02)


def markdown(result: dict[str, Any], gpu: dict[str, Any]) -> str:
    """What docs/scale.md says of this run. `gpu`: what benchmarks/gpu.json holds."""
    plan, calm, front = result["plan"], result["latency"], result["front_end"]
    gpu_per_s = ROUND / 60 / gpu["round_minutes"]
    gpus = 10 * round(SHARE * result["requests_per_core_s"] / gpu_per_s / 10)
    rows = [
        ["requests a second, everything on the same machine", f"{result['requests_per_s']:,.0f}"],
        ["requests a second for one core of the front end", f"{result['requests_per_core_s']:,.0f}"],
        ["share of that core for the heartbeats of all workers", f"{result['heartbeats_share']:.0%}"],
        [f"latency that it adds at {calm['rate']:,.0f} requests a second, p50", f"{calm['p50_ms']:,.1f} ms"],
        ["p99", f"{calm['p99_ms']:,.1f} ms"],
        ["memory: empty", f"{result['rss_mib_empty']:,.0f} MiB"],
        [f"with {result['queued']:,} requests in the queue", f"{result['rss_mib_queued']:,.0f} MiB"],
        ["at most", f"{result['peak_rss_mib']:,.0f} MiB"],
        ["a status with all workers", f"{result['status_ms']:,.0f} ms"],
        ["workers lost", f"{front['workers_lost']:,}"],
        ["workers that left as planned", f"{result['workers'].get('left', 0):,}"],
        ["requests that went to another worker", f"{front['requeued']:,}"],
        ["late results that were dropped", f"{front['void_results']:,}"],
        ["requests lost", f"{result['lost']}"],
        ["requests answered or kept twice", f"{result['doubled']}"],
    ]
    head = f"{plan['workers']:,} workers, {plan['clients']} clients, {result['requests']:,} requests"
    cores = f"{result['machine']['cores']} cores ({result['machine']['cpu']})"
    speed = f"{result['requests_per_core_s']:,.0f}"
    lines = [
        f"One front end feeds about **{gpus:,} GPUs**. One core of it does {speed} requests a second,",
        f"of which {SHARE:.0%} should be used. One {gpu['device']} does {gpu_per_s:.1f} requests a second.",
        "",
        f"Measured on {cores}, for front end, workers and clients together; load average before the run:",
        f"{result['machine']['load_average_before']}.",
    ]
    return "\n".join(lines) + f"\n\n{grid([head, ''], rows)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").split("\n")[0])
    for one in fields(Plan):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    parser.add_argument("--out", type=Path, default=OUT)
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    result: dict[str, Any] = {"command": "python -m benchmarks.scale", "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        result |= simulate(Plan(**options), Path(folder))
    write_json(out, result)
    text = markdown(result, json.loads(GPU.read_text()))
    print(text)
    if out == OUT:
        DOCS.write_text(in_docs(DOCS.read_text(), text, MARKS))


if __name__ == "__main__":
    main()

"""What the service itself costs: requests a second, latency it adds, and memory, around an inner loop that
does nothing.

Plain REQ clients (1, 8, 64 of them, each with one request open) send baseline-only requests of 1 KB and 1
MB to a real server process with one worker process on loopback. The handler is free, so the whole latency
is the service's; beside it stands what a bare ROUTER needs that only says "{}". All clients live in one
process, which shares this machine's cores with the server. The second table follows the memory of front end
and worker over 100,000 requests of one content; the third says what requests take that are all different.

    python -m benchmarks.service_load            (3 minutes; writes benchmarks/service_load.json)
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count, repeat
from pathlib import Path
from typing import Any

import zmq

from seal_nb.protocol import Answers, TTTReply, TTTRequest, build_reply
from seal_nb.server.client import TTTClient, TTTServer
from seal_nb.storage import write_json

OUT = Path(__file__).with_name("service_load.json")

SIZES = {"1 KB": 1_000, "1 MB": 1_000_000}
CLIENTS = (1, 8, 64)


class NoOpLoop:
    """Answers at once."""

    model_id = "no-op"

    def __init__(self) -> None:
        self.waiting: list[TTTRequest] = []

    def submit(self, request: TTTRequest) -> None:
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        self.waiting = [request for request in self.waiting if request.request_id != request_id]

    def advance(self) -> list[TTTReply]:
        done, self.waiting = self.waiting, []
        nothing = Answers(texts=[], verdicts=[])
        return [build_reply(baseline=nothing, request_id=r.request_id, seed=r.seed) for r in done]

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    @property
    def free_slots(self) -> int:
        return 64 - len(self.waiting)

    def stats(self) -> dict[str, Any]:
        return {}


def load(settings: object) -> NoOpLoop:
    """What the worker is told to load."""
    return NoOpLoop()


def request_of(size: int, **fields: Any) -> bytes:
    texts = ["x" * size]
    return json.dumps({"train_sequences": texts, "eval_questions": [], "skip_training": True, **fields}).encode()


def drive(endpoint: str, messages: Iterator[bytes], *, n_clients: int, n_requests: int = 10**9) -> Iterator[float]:
    """Latencies in seconds, as replies come; every client has one request open at any time."""
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        poller, sent_at = zmq.Poller(), {}
        for _ in range(n_clients):
            socket = stack.enter_context(context.socket(zmq.REQ))
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            poller.register(socket, zmq.POLLIN)
            sent_at[socket] = time.perf_counter()
            socket.send(next(messages))
        n_sent = n_clients
        while sent_at:
            for socket, _ in poller.poll():
                reply = socket.recv()
                assert b'"error"' not in reply, reply[:200]
                yield time.perf_counter() - sent_at.pop(socket)
                if n_sent < n_requests:
                    n_sent += 1
                    sent_at[socket] = time.perf_counter()
                    socket.send(next(messages))


def measured(endpoint: str, *, size: int, n_clients: int, seconds: float) -> dict[str, float]:
    """Requests a second, and latencies in milliseconds."""
    latencies, started = [], time.perf_counter()
    for latency in drive(endpoint, repeat(request_of(size)), n_clients=n_clients):
        latencies.append(latency)
        if time.perf_counter() - started > seconds and len(latencies) >= 20:
            break
    took_s = time.perf_counter() - started
    return {
        "requests_per_s": round(len(latencies) / took_s, 1),
        "p50_ms": round(statistics.median(latencies) * 1e3, 2),
        "p99_ms": round(statistics.quantiles(latencies, n=100)[98] * 1e3, 2),
    }


def echo(port: Any) -> None:
    """A bare ROUTER: what loopback, ZMQ and the clients cost without any service."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port.send(socket.bind_to_random_port("tcp://127.0.0.1"))
        while True:
            name, empty, _ = socket.recv_multipart()
            socket.send_multipart([name, empty, b"{}"])


def load_rows(endpoint: str, bare: str, *, seconds: float) -> list[dict[str, Any]]:
    return [
        {
            "clients": n_clients, "message": name,
            **measured(endpoint, size=size, n_clients=n_clients, seconds=seconds),
            "bare_p50_ms": measured(bare, size=size, n_clients=n_clients, seconds=seconds / 4)["p50_ms"],
        }
        for name, size in SIZES.items()
        for n_clients in CLIENTS
    ]  # fmt: skip


def memory_rows(server: TTTServer, messages: Iterator[bytes], *, n_requests: int) -> list[dict[str, Any]]:
    """Resident memory of both processes, in MiB, as requests of 64 clients go by."""
    rows = []
    with TTTClient(server.endpoint) as client:
        latencies = drive(server.info.endpoint, messages, n_clients=64, n_requests=n_requests)
        for n_done, _ in enumerate(latencies, start=1):
            if n_done % (n_requests // 10) == 0 or n_done == 1_000:
                while not (status := client.status()).workers[0].stats:
                    time.sleep(0.1)  # its first heartbeat is still to come
                sizes = status.rss_bytes, status.workers[0].stats["rss_bytes"]
                front_end, worker = (round(size / 2**20, 1) for size in sizes)
                rows.append({"requests": n_done, "front_end_mib": front_end, "worker_mib": worker})
    return rows


def growth_rows(server: TTTServer, *, n_requests: int) -> list[dict[str, Any]]:
    """What the front end's memory grows by for each request, where all are different."""
    numbers = count()
    kinds = {
        "different contents": (request_of(1_000, finetune_lr=1e-3 + 1e-9 * n) for n in numbers),
        "different ids": (request_of(1_000, request_id=f"request-{n:015d}") for n in numbers),
    }
    rows = []
    for kind, messages in kinds.items():
        first, *_, last = memory_rows(server, messages, n_requests=n_requests)
        grown = (last["front_end_mib"] - first["front_end_mib"]) * 2**20
        rows.append({"requests": n_requests, "kind": kind, "bytes_each": round(grown / (n_requests - 1_000))})
    return rows


def machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "pyzmq": zmq.__version__,
        "zmq": zmq.zmq_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row of the load table")
    parser.add_argument("--requests", type=int, default=100_000, help="of the memory table")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    result: dict[str, Any] = {"command": "python -m benchmarks.service_load", "machine": machine()}
    with ExitStack() as stack:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        bare = multiprocessing.get_context("spawn").Process(target=echo, args=(theirs,), daemon=True)
        bare.start()
        stack.callback(bare.kill)
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loop = f"{Path(__file__).parent.name}.{Path(__file__).stem}:load"
        server = stack.enter_context(TTTServer(run_dir=run_dir, inner_loop=loop, log_level="WARNING"))
        result["memory"] = memory_rows(server, repeat(request_of(1_000)), n_requests=options.requests)
        result["growth"] = growth_rows(server, n_requests=options.requests // 5)
        bare_endpoint = f"tcp://127.0.0.1:{ours.recv()}"
        result["load"] = load_rows(server.info.endpoint, bare_endpoint, seconds=options.seconds)
    import pandas as pd  # not at the top: the worker loads this module, and its memory is measured

    from seal_nb.views.tables import as_text

    for name in ("load", "memory", "growth"):
        print(as_text(pd.DataFrame(result[name])), end="\n\n")
    write_json(options.out, result)


if __name__ == "__main__":
    main()

"""What the service itself costs: requests a second, latency it adds, and memory, around an inner loop that
does nothing.

Plain REQ clients (1, 8, 64 of them, each with one request open) send baseline-only requests of 1 KB and 1
MB to a real server process with one worker process on loopback. The handler is free, so the whole latency
is the service's. The client processes share this machine's cores with the server. Run it with ``python -m
benchmarks.service_load``; the last table follows the memory of front end and worker over 100,000 requests.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zmq

from seal_nb.protocol import Answers, TTTReply, TTTRequest, build_reply
from seal_nb.service.client import TTTClient
from seal_nb.service.launch import TTTServer

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


def request_of(size: int) -> bytes:
    return json.dumps({"train_sequences": ["x" * size], "eval_questions": [], "skip_training": True}).encode()


def drive(endpoint: str, message: bytes, *, n_clients: int, n_requests: int) -> Iterator[float]:
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
            socket.send(message)
        n_sent = n_clients
        while sent_at:
            for socket, _ in poller.poll():
                reply = socket.recv()
                assert b'"baseline_accuracy"' in reply, reply[:200]
                yield time.perf_counter() - sent_at.pop(socket)
                if n_sent < n_requests:
                    n_sent += 1
                    sent_at[socket] = time.perf_counter()
                    socket.send(message)


def load_table(endpoint: str, *, seconds: float) -> None:
    """Requests a second and latency for each number of clients and size."""
    print("| clients | message | requests/s | latency p50 | p99 |\n|---|---|---|---|---|")
    for name, size in SIZES.items():
        for n_clients in CLIENTS:
            message, latencies, started = request_of(size), [], time.perf_counter()
            for latency in drive(endpoint, message, n_clients=n_clients, n_requests=10**9):
                latencies.append(latency)
                if time.perf_counter() - started > seconds:
                    break
            took_s = time.perf_counter() - started
            p99 = statistics.quantiles(latencies, n=100)[98]
            print(
                f"| {n_clients} | {name} | {len(latencies) / took_s:,.0f} "
                f"| {statistics.median(latencies) * 1e3:.1f} ms | {p99 * 1e3:.1f} ms |",
                flush=True,
            )


def memory_table(server: TTTServer, *, n_requests: int) -> None:
    """Resident memory of both processes as requests go by."""
    print(f"\nMemory over {n_requests:,} requests of 1 KB from 64 clients, MiB\n")
    print("| requests | front end | worker |\n|---|---|---|")
    with TTTClient(server.endpoint) as client:
        latencies = drive(server.info.endpoint, request_of(1_000), n_clients=64, n_requests=n_requests)
        for n_done, _ in enumerate(latencies, start=1):
            if n_done % (n_requests // 10) == 0 or n_done == 1_000:
                status = client.status()
                sizes = status.rss_bytes, status.workers[0].stats["rss_bytes"]
                print(f"| {n_done:,} | {sizes[0] / 2**20:.1f} | {sizes[1] / 2**20:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row of the load table")
    parser.add_argument("--requests", type=int, default=100_000, help="of the memory table")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        TTTServer(
            run_dir=Path(folder), inner_loop="benchmarks.service_load:load", log_level="WARNING"
        ) as server,
    ):
        load_table(server.info.endpoint, seconds=options.seconds)
        memory_table(server, n_requests=options.requests)


if __name__ == "__main__":
    main()

"""A worker: one process, one device, one inner loop. It takes requests from the front end and sends replies.

The main thread drives the inner loop; a second thread owns the socket and sends heartbeats. If the front end gives up
the worker's lease, the worker drops all its work and introduces itself again, so a request never gets two answers. An
error of one request becomes its reply; one of the whole loop ends the process."""

import json
import logging
import os
import queue
import signal
import socket as sockets
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import psutil
import zmq

from seal_nb.errors import ProtocolError, SealError, redacted
from seal_nb.protocol import ErrorReply, Reply, TTTReply, error_reply, parse_request
from seal_nb.server.client import WorkerSettings, parse
from seal_nb.server.endpoint import Socket, connected, read_endpoint, wait_for_endpoint

if TYPE_CHECKING:
    from seal_nb.server.loop import InnerLoop

log = logging.getLogger(__name__)

IDLE_S = 0.5  # one wait for messages of a worker without work
MAX_REPLY_BYTES = 2**25  # the front end reads all of it, which must not take a second
Message = tuple[str, dict[str, Any], bytes]


def pack(kind: str, body: bytes = b"", **header: Any) -> list[bytes]:
    """The three frames of a message between worker and front end: its kind, its header in JSON, its body. The body of a
    `job` is the request as the client sent it, that of a `result` the reply; other messages have none."""
    return [kind.encode(), json.dumps(header).encode(), body]


def unpack(frames: list[bytes]) -> Message:
    """The message in `frames`. Raises ValueError or RecursionError."""
    kind, header, body = frames
    return kind.decode("ascii"), json.loads(header), body


class Link(threading.Thread):
    """The thread of the socket. `inbox` has what came in; the main thread calls `send` with the frames of a message."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(name="link", daemon=True)
        self.settings = settings
        host, pid = sockets.gethostname(), os.getpid()
        self.about: dict[str, Any] = {"worker_id": f"{host}-{pid}-{uuid.uuid4().hex[:6]}", "host": host, "pid": pid}
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.state: dict[str, Any] = {}  # of the inner loop as soon as it is loaded; sent with each heartbeat
        self._session = 0
        self._lease: int | None = None
        self._was_welcome = False
        self._context: zmq.Context[Socket] = zmq.Context()
        self._inside, self._outside = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._inside.bind("inproc://outbox")
        self._outside.connect("inproc://outbox")  # used by the main thread only
        self.send = self._outside.send_multipart
        self._heard_at = self._found_at = time.monotonic()

    def close(self) -> None:
        """Send what is left, then end the thread."""
        self.send([b""])
        self.join(timeout=5)
        self._outside.close(0)
        self._context.destroy(linger=2000)

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - without its link a worker is useless
            log.error("ending because the link to the front end broke: %s: %s", type(error).__name__, error)
            os._exit(5)

    def _run(self) -> None:
        wait_for_endpoint(self.settings.endpoint_file, timeout_s=self.settings.patience_s)
        dealer = self._connected()
        next_beat = 0.0
        while True:
            wait_s = max(0.001, next_beat - time.monotonic())
            ready, _, _ = zmq.select([dealer, self._inside], [], [], wait_s)
            if self._inside in ready:
                if (frames := self._inside.recv_multipart()) == [b""]:  # `close` was called
                    break
                dealer.send_multipart(frames)
            if dealer in ready:
                self._receive(dealer)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + min(1.0, self.settings.lease_s / 5)
                self._beat(dealer)
                dealer = self._found_again(dealer)
        dealer.close(linger=2000)
        self._inside.close(0)

    def _connected(self) -> Socket:
        endpoint = read_endpoint(self.settings.endpoint_file)
        name = self.about["worker_id"].encode()[:255]
        return connected(self._context, endpoint, "worker", name=name, key_file=self.settings.key_file)

    def _receive(self, dealer: Socket) -> None:
        while dealer.poll(0):
            kind, header, body = unpack(dealer.recv_multipart())
            self._heard_at = self._found_at = time.monotonic()
            match kind:
                case "welcome":
                    self._lease, self._was_welcome = header["lease"], True
                case "expired" if header["lease"] == self._lease:
                    self._start_again("the front end gave up this worker's lease")
                case "abort":
                    log.error("the front end gave up this worker: %s; ending", header["why"])
                    os._exit(6)  # the main thread is stuck
                case "job" | "cancel" | "stop":
                    self.inbox.put((kind, header, body))

    def _beat(self, dealer: Socket) -> None:
        if self.settings.parent_pid and os.getppid() != self.settings.parent_pid:
            log.error("the parent process is gone; ending")
            os._exit(143)  # the main thread may be in a long slice
        if self._lease is not None:
            dealer.send_multipart(pack("beat", lease=self._lease, **self.state))
        elif self.state:
            dealer.send_multipart(pack("ready", session=self._session, **self.about, **self.state))

    def _found_again(self, dealer: Socket) -> Socket:
        """The same socket, or after a long silence a new one to the present front end."""
        now = time.monotonic()
        if not self.state:
            self._heard_at = self._found_at = now  # nothing was sent yet
        if now - self._found_at > self.settings.patience_s:
            log.error("no front end for %g s; ending", self.settings.patience_s)
            os._exit(0 if self._was_welcome else 4)
        if now - self._heard_at <= self.settings.lease_s:
            return dealer
        self._start_again(f"no word from the front end for {self.settings.lease_s:g} s")
        self._heard_at = now
        try:
            found = self._connected()
        except SealError as error:
            log.warning("the front end cannot be looked up: %s", error)
            return dealer
        dealer.close(0)
        return found

    def _start_again(self, why: str) -> None:
        log.warning("%s; dropping all work and starting again", why)
        self._lease = None
        self._session += 1
        self.inbox.put(("drop", {}, b""))


class Worker:
    """The main thread: one inner loop, and the requests it has: the header of each job by its key."""

    def __init__(self, loop: "InnerLoop", link: Link) -> None:
        self.loop, self.link = loop, link
        self.jobs: dict[str, dict[str, Any]] = {}
        self.n_steps = 0
        self.leaving = self._stopped = False

    def run(self) -> None:
        """Until `stop` comes or `leaving` is set. Raises what the inner loop raises."""
        self.link.about["model_id"] = self.loop.model_id
        while not self._stopped and not self.leaving:
            self.report()
            with suppress(queue.Empty):
                if not self.loop.busy:
                    self._handle(*self.link.inbox.get(timeout=IDLE_S))
                while True:
                    self._handle(*self.link.inbox.get_nowait())
            if self.loop.busy:
                for reply in self.loop.advance():
                    self._reply(reply)

    def leave(self, *_: object) -> None:
        """End soon, as a signal handler does."""
        self.leaving = True

    def report(self) -> None:
        """What the next heartbeat says. One turn of the main thread is one step."""
        self.n_steps += 1
        capacity = len(self.jobs) + max(0, self.loop.free_slots)
        stats = {**self.loop.stats(), "rss_bytes": rss_bytes(), **gpu_memory()}
        self.link.state = {"capacity": capacity, "steps": self.n_steps, "stats": stats}

    def _handle(self, kind: str, header: dict[str, Any], body: bytes) -> None:
        match kind:
            case "job":
                self._submit(header, body)
            case "cancel":
                self._drop(header["key"])
            case "drop":
                for key in list(self.jobs):
                    self._drop(key)
            case "stop":
                log.info("told to stop: %s", header.get("why", ""))
                self._stopped = True

    def _submit(self, header: dict[str, Any], body: bytes) -> None:
        key, request = header["key"], None
        self.jobs[key] = header
        try:
            request = parse_request(body)
            self.loop.submit(request.model_copy(update={"request_id": key, "seed": header["seed"]}))  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - any error of one request becomes its reply
            log.info("a request was refused by the inner loop: %s", type(error).__name__)
            trace = traceback.format_exc() if getattr(request, "traceback", False) else None
            self._reply(error_reply(error, request_id=key, traceback=trace))

    def _reply(self, reply: Reply) -> None:
        """Encode a reply, once for client and journal, and send it."""
        job = self.jobs.pop(reply.request_id or "", None)
        if job is None:
            log.warning("the inner loop answered a request that it does not have; dropped")
            return
        ids: dict[str, Any] = {"server_id": job["server_id"], "request_id": job["request_id"]}
        if not isinstance(reply, ErrorReply):
            reply.timings["queue_s"] = job["queue_s"]
        tokens = reply.train_tokens if isinstance(reply, TTTReply) else 0
        body = reply.model_copy(update=ids).to_json()
        if len(body) > MAX_REPLY_BYTES:
            problem = f"the reply has {len(body)} bytes, {MAX_REPLY_BYTES} are the most"
            reply = error_reply(ProtocolError(f"{problem}; ask fewer questions, or no token scores"), **ids)
            body = reply.to_json()
        error = reply.error.partition(":")[0] if isinstance(reply, ErrorReply) else ""
        self.link.send(pack("result", body, token=job["token"], error=error, tokens=tokens))

    def _drop(self, key: str) -> None:
        if self.jobs.pop(key, None) is not None:
            self.loop.cancel(key)


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def gpu_memory() -> dict[str, int]:
    """Bytes that torch holds on this worker's GPU now, held at most, and reserves; empty without a GPU."""
    torch = sys.modules.get("torch")  # imported by the inner loop if it is needed
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "gpu_bytes": torch.cuda.memory_allocated(),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
        "gpu_reserved_bytes": torch.cuda.memory_reserved(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; returns its exit code."""
    settings = parse(WorkerSettings, argv, prog="python -m seal_nb.server.worker", description="Run one worker.")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
        os.environ[name] = str(settings.n_threads)
    link = Link(settings)
    link.start()
    try:
        # On a cluster a worker may start before its server.
        endpoint = wait_for_endpoint(settings.endpoint_file, timeout_s=settings.patience_s)
        settings = replace(settings, adapters_dir=Path(endpoint.run_dir) / "adapters")
        worker = Worker(resolve_name(settings.inner_loop)(settings), link)
        # A server ends its own workers itself; Ctrl-C in a terminal reaches them too and is ignored.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if settings.parent_pid else worker.leave)
        worker.run()
        if worker.leaving:
            link.send(pack("leaving"))
        return 0
    except Exception as error:  # the front end gives the requests to other workers
        log.error("ending: %s", type(error).__name__)
        log.debug("the error", exc_info=True)
        text, trace = (redacted(one) for one in (f"{type(error).__name__}: {error}", traceback.format_exc()))
        link.send(pack("failed", error=text, traceback=trace, pid=os.getpid()))
        return 1
    finally:
        link.close()


if __name__ == "__main__":
    raise SystemExit(main())

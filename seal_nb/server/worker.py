"""A worker: one process, one device, one inner loop; requests come in, replies go out.

The main thread drives the inner loop (``seal_nb.inner_loop.loop``, or what ``inner_loop`` names) a slice at a
time. The socket belongs to the thread of ``link``, which beats meanwhile.

A worker trusts the front end about leases: told that its own is gone, it drops all its work and starts
afresh, so that a request never gets two answers. A failure of one request is a reply; a failure of the
whole loop ends the process, and the front end gives its requests to others. torch comes in with the inner
loop, not here.

The link of a worker to the front end: one thread that owns the socket, so that heartbeats never stop.

It introduces the worker, beats while the main thread is deep in a slice of training, notices that the front
end is gone (and finds the next one through the endpoint file), and ends the process when its parent is
gone. The main thread talks to it through a queue and a pair of in-process sockets, never through the socket
itself. What requests mean is not known here.
"""

import argparse
import importlib
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zmq

from seal_nb.errors import SealError, SettingsError
from seal_nb.protocol import (
    ErrorReply,
    GenerateReply,
    GenerateRequest,
    TTTReply,
    TTTRequest,
    error_reply,
    parse_request,
)
from seal_nb.server import wire
from seal_nb.server.endpoint import read_endpoint, wait_for_endpoint
from seal_nb.server.keys import keys_dir, load_pair, secure_client
from seal_nb.server.settings import DEFAULT_INNER_LOOP, option_type
from seal_nb.server.status import rss_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """One worker process. Either ``connect`` (loopback) or ``endpoint_file`` says where the front end is."""

    connect: str = ""
    endpoint_file: str = ""
    key_file: str = ""  # empty: keys/worker.key_secret in the server's run folder
    model: str = "embedded"
    n_slots: int = 0  # usual for the device
    n_threads: int = 1
    device: str = "auto"
    dtype: str = "auto"
    deterministic: bool = False
    max_seq_length: int = 2048
    grader: str = "local"
    adapters_dir: str = ""  # empty: adapters in the server's run folder
    inner_loop: str = DEFAULT_INNER_LOOP
    beat_s: float = 1.0
    lease_s: float = 30.0  # without a word from the front end for so long: drop all work, look for it anew
    patience_s: float = 600.0  # without a front end for so long: end
    parent_pid: int = 0

    def __post_init__(self) -> None:
        if not self.connect and not self.endpoint_file:
            raise SettingsError("neither connect nor endpoint_file is given; give the server's endpoint.json")


class Link(threading.Thread):
    """The socket's thread. ``inbox`` has what came in; ``send`` takes what goes out, from the main thread."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(name="link", daemon=True)
        self.settings = settings
        self.worker_id = f"{sockets.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.inbox: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
        self.introduction: dict[str, Any] | None = None  # once the loop is loaded
        self.capacity = 0
        self.steps = 0  # counted by the main thread: what tells work from being stuck
        self.stats: dict[str, Any] = {}
        self._session = 0
        self._lease: int | None = None
        self._was_welcome = False
        self._context = zmq.Context()
        self._address = f"inproc://{uuid.uuid4().hex}"
        self._inside = self._context.socket(zmq.PAIR)
        self._inside.bind(self._address)
        self._outside = self._context.socket(zmq.PAIR)  # used by the main thread only
        self._outside.connect(self._address)
        self._heard_at = time.monotonic()
        self._found_at = time.monotonic()

    def send(self, frames: list[bytes]) -> None:
        """From the main thread."""
        self._outside.send_multipart(frames)

    def close(self) -> None:
        """From the main thread: everything said is sent, then the thread ends."""
        self._outside.send_multipart([b""])
        self.join(timeout=5)
        self._outside.close(0)
        self._context.destroy(linger=2000)

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - a worker that nobody can reach is of no use
            log.error("ending, since the link to the front end broke: %s: %s", type(error).__name__, error)
            os._exit(5)

    def _run(self) -> None:
        if self.settings.endpoint_file:
            wait_for_endpoint(Path(self.settings.endpoint_file), timeout_s=self.settings.patience_s)
        dealer = self._connected()
        next_beat = 0.0
        while True:
            poller = zmq.Poller()
            poller.register(dealer, zmq.POLLIN)
            poller.register(self._inside, zmq.POLLIN)
            ready = dict(poller.poll(max(1, int(1000 * (next_beat - time.monotonic())))))
            if self._inside in ready and not self._pass_on(dealer):
                break
            if dealer in ready:
                self._receive(dealer)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self.settings.beat_s
                self._beat(dealer)
                dealer = self._found_again(dealer)
        dealer.close(linger=2000)
        self._inside.close(0)

    def _connected(self) -> "zmq.Socket[bytes]":
        dealer = self._context.socket(zmq.DEALER)
        dealer.routing_id = self.worker_id.encode()[:255]
        dealer.linger = 0
        address = self.settings.connect
        if self.settings.endpoint_file:
            endpoint = read_endpoint(self.settings.endpoint_file)
            address = endpoint.worker_endpoint
            if endpoint.secure:
                default = keys_dir(Path(endpoint.run_dir)) / "worker.key_secret"
                pair = load_pair(Path(self.settings.key_file) if self.settings.key_file else default)
                secure_client(dealer, pair, server_key=endpoint.public_key)
        dealer.connect(address)
        return dealer

    def _pass_on(self, dealer: "zmq.Socket[bytes]") -> bool:
        """Send what the main thread said; False if that was the end."""
        while self._inside.poll(0):
            frames = self._inside.recv_multipart()
            if frames == [b""]:
                return False
            self._try_send(dealer, frames)
        return True

    def _receive(self, dealer: "zmq.Socket[bytes]") -> None:
        while dealer.poll(0):
            message = wire.unpack(dealer.recv_multipart())
            self._heard_at = self._found_at = time.monotonic()
            if message.kind == "welcome":
                self._lease, self._was_welcome = message.header["lease"], True
            elif message.kind == "expired":
                if message.header["lease"] == self._lease:
                    self._start_afresh("the front end gave this worker's lease up")
            elif message.kind == "abort":
                log.error("the front end has given this worker up: %s; ending", message.header["why"])
                os._exit(6)  # the main thread will not hear of it
            elif message.kind != "beat":
                self.inbox.put(message)

    def _beat(self, dealer: "zmq.Socket[bytes]") -> None:
        if self.settings.parent_pid and os.getppid() != self.settings.parent_pid:
            log.error("the parent process is gone; ending")
            os._exit(143)  # the main thread may be in a slice, or hung
        if self._lease is not None:
            said = {"lease": self._lease, "capacity": self.capacity, "steps": self.steps, "stats": self.stats}
            self._try_send(dealer, wire.pack("beat", b"", **said))
        elif self.introduction is not None:
            said = {**self.introduction, "session": self._session, "capacity": self.capacity}
            said["stats"] = self.stats
            self._try_send(dealer, wire.pack("ready", b"", **said))

    def _found_again(self, dealer: "zmq.Socket[bytes]") -> "zmq.Socket[bytes]":
        """The same socket; or after a long silence a new one, to wherever the front end is now."""
        now = time.monotonic()
        if self.introduction is None:
            self._heard_at = self._found_at = now  # nothing was said yet, so nothing is heard
        if now - self._found_at > self.settings.patience_s:
            log.error("no front end for %g s; ending", self.settings.patience_s)
            os._exit(0 if self._was_welcome else 4)
        if now - self._heard_at <= self.settings.lease_s:
            return dealer
        self._start_afresh(f"no word from the front end for {self.settings.lease_s:g} s")
        self._heard_at = now
        try:
            found = self._connected()
        except SealError as error:
            log.warning("cannot look for the front end anew: %s", error)
            return dealer
        dealer.close(0)
        return found

    def _start_afresh(self, why: str) -> None:
        log.warning("%s; dropping all work and starting afresh", why)
        self._lease = None
        self._session += 1
        self.inbox.put(wire.Message(kind="drop", header={}))

    def _try_send(self, dealer: "zmq.Socket[bytes]", frames: list[bytes]) -> None:
        try:
            dealer.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            log.warning("the front end takes nothing; a message is dropped, the lease will tell")


IDLE_S = 0.5


class InnerLoop(Protocol):
    """What a worker drives; see ``seal_nb.inner_loop.loop``."""

    model_id: str

    def submit(self, request: TTTRequest | GenerateRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def advance(self) -> list[TTTReply | GenerateReply | ErrorReply]: ...
    @property
    def busy(self) -> bool: ...
    @property
    def free_slots(self) -> int: ...
    def stats(self) -> dict[str, Any]: ...


class Worker:
    """The main thread: one inner loop, and the requests it has, by id."""

    def __init__(self, loop: InnerLoop, link: Link) -> None:
        self.loop, self.link = loop, link
        self.tokens: dict[str, str] = {}  # request id → this try's token
        self.leaving = False
        self._stopped = False

    def run(self) -> None:
        """Until told to stop, or until ``leaving`` is set. Raises what the inner loop raises."""
        self.report()
        self.link.introduction = {
            "worker_id": self.link.worker_id, "model_id": self.loop.model_id,
            "host": sockets.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        while not self._stopped and not self.leaving:
            for message in self._messages():
                self._handle(message)
            if self.loop.busy:
                for reply in self.loop.advance():
                    self._reply(reply)
            self.report()

    def report(self) -> None:
        """At every turn, for the next heartbeat; a turn is a step."""
        self.link.steps += 1
        self.link.capacity = len(self.tokens) + max(0, self.loop.free_slots)
        self.link.stats = {**self.loop.stats(), "rss_bytes": rss_bytes(), **gpu_memory()}

    def _messages(self) -> list[wire.Message]:
        """What came in; waits a little if there is nothing else to do."""
        messages: list[wire.Message] = []
        try:
            if not self.loop.busy:
                messages.append(self.link.inbox.get(timeout=IDLE_S))
            while True:
                messages.append(self.link.inbox.get_nowait())
        except queue.Empty:
            return messages

    def _handle(self, message: wire.Message) -> None:
        if message.kind == "job":
            self._submit(message)
        elif message.kind == "cancel":
            self._drop(message.header["key"])
        elif message.kind == "drop":
            for key in list(self.tokens):
                self._drop(key)
        elif message.kind == "stop":
            log.info("told to stop: %s", message.header.get("why", ""))
            self._stopped = True

    def _submit(self, message: wire.Message) -> None:
        key, token = message.header["key"], message.header["token"]
        self.tokens[key] = token
        try:
            request = parse_request(message.body)
            assert isinstance(request, TTTRequest | GenerateRequest)
            known = {"request_id": key, "seed": message.header["seed"]}
            self.loop.submit(request.model_copy(update=known))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one request is its reply
            log.info("a request was refused by the inner loop: %s", type(error).__name__)
            self._reply(error_reply(error, request_id=key, traceback=traceback.format_exc()))

    def _reply(self, reply: TTTReply | GenerateReply | ErrorReply) -> None:
        token = self.tokens.pop(reply.request_id or "", None)
        if token is None:
            log.warning("the inner loop answered a request that it does not have; dropped")
            return
        self.link.send(wire.pack("result", reply.to_json(), token=token))

    def _drop(self, key: str) -> None:
        if self.tokens.pop(key, None) is not None:
            self.loop.cancel(key)


def gpu_memory() -> dict[str, int]:
    """Bytes that torch holds on this worker's GPU now, and the most it held; nothing without one."""
    torch = sys.modules.get("torch")  # the inner loop brought it in, or it is not needed
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "gpu_bytes": torch.cuda.memory_allocated(),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
        "gpu_reserved_bytes": torch.cuda.memory_reserved(),
    }


def main(argv: Sequence[str] | None = None, *, load: Callable[[WorkerSettings], InnerLoop] | None = None) -> int:
    """Run one worker; returns its exit code. ``load`` replaces the function that ``inner_loop`` names."""
    settings = parse(argv)
    level = os.environ.get("SEAL_NB_LOG_LEVEL", "INFO")
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s worker %(levelname)s %(message)s")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
        os.environ[name] = str(settings.n_threads)
    link = Link(settings)
    link.start()
    try:
        return _work((load or _named(settings.inner_loop))(settings), link, settings)
    except Exception as error:  # reported to the front end, which gives the work to others
        log.error("ending: %s", type(error).__name__)
        log.debug("because", exc_info=True)
        said = f"{type(error).__name__}: {error}"
        link.send(wire.pack("failed", error=said, traceback=traceback.format_exc(), pid=os.getpid()))
        return 1
    finally:
        link.close()


def _work(loop: InnerLoop, link: Link, settings: WorkerSettings) -> int:
    worker = Worker(loop, link)

    def leave(*_: object) -> None:
        worker.leaving = True

    if settings.parent_pid:  # the server ends its own workers; a terminal's Ctrl-C reaches them too
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, leave)
        signal.signal(signal.SIGINT, leave)
    worker.run()
    if worker.leaving:
        link.send(wire.pack("leaving"))
    return 0


def load_inner_loop(settings: WorkerSettings) -> InnerLoop:
    """The real one. Here torch comes in."""
    from seal_nb.inner_loop.loop import load_inner_loop as load
    from seal_nb.inner_loop.settings import InnerLoopSettings

    names = ("model", "device", "dtype", "deterministic", "n_slots", "n_threads", "grader", "max_seq_length")
    chosen = {name: getattr(settings, name) for name in names}
    loop: InnerLoop = load(InnerLoopSettings(adapters_dir=adapters_dir(settings), **chosen))
    return loop


def adapters_dir(settings: WorkerSettings) -> Path:
    """Where adapters are kept: all workers of a server share one folder, on a disk that they all see."""
    if settings.adapters_dir or not settings.endpoint_file:
        return Path(settings.adapters_dir or "adapters")
    # On a cluster a worker may be there before its server is.
    endpoint = wait_for_endpoint(Path(settings.endpoint_file), timeout_s=settings.patience_s)
    return Path(endpoint.run_dir) / "adapters"


def _named(name: str) -> Callable[[WorkerSettings], InnerLoop]:
    """The function that ``module:function`` names. Raises SettingsError."""
    module, _, function = name.partition(":")
    try:
        found: Callable[[WorkerSettings], InnerLoop] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"inner_loop is {name!r}: {error}; write it as module:function") from error
    return found


def parse(argv: Sequence[str] | None) -> WorkerSettings:
    """Settings from ``--n-slots 4`` and the like: one option for each field."""
    parser = argparse.ArgumentParser(prog="python -m seal_nb.server.worker", description=__doc__)
    for name, field in WorkerSettings.__dataclass_fields__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=option_type(type(field.default)), default=field.default)
    return WorkerSettings(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())

"""The link of a worker to the front end: one thread that owns the socket, so that heartbeats never stop.

It introduces the worker, beats while the main thread is deep in a slice of training, notices that the front
end is gone (and finds the next one through the endpoint file), and ends the process when its parent is
gone. The main thread talks to it through a queue and a pair of in-process sockets, never through the socket
itself. What requests mean is not known here.
"""

import logging
import os
import queue
import socket as sockets
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from seal_nb.errors import SealError, SettingsError
from seal_nb.service import wire
from seal_nb.service.endpoint import read_endpoint, wait_for_endpoint
from seal_nb.service.keys import keys_dir, load_pair, secure_client
from seal_nb.service.settings import DEFAULT_INNER_LOOP

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

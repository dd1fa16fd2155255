"""The workers as the front end sees them: introductions, heartbeats, results, and who is lost.

It speaks ``wire`` over one ROUTER socket and moves jobs in the ``queue``; what a result or a loss means to
clients is the desk's, and goes out through ``send``. A worker that sends rubbish, comes back from the dead,
or brings another model changes nothing for anybody else.
"""

import logging
import math
import socket as sockets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq

from seal_nb.errors import ProtocolError, RunMismatch
from seal_nb.service import wire
from seal_nb.service.desk import Desk, Outgoing, WorkerLost
from seal_nb.service.queue import Lost
from seal_nb.service.status import WorkerStatus

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]
LOUD = 100  # log lines about rubbish


@dataclass(kw_only=True)
class Peer:
    """A worker as it introduced itself; ``session`` tells a repeated introduction from a fresh start."""

    worker_id: str
    host: str
    pid: int
    session: int
    lease: int
    model_id: str
    stats: dict[str, Any] = field(default_factory=dict)


class Crew:
    """See the module."""

    def __init__(self, socket: Socket, desk: Desk, send: Callable[[list[Outgoing]], None]) -> None:
        self.socket, self.desk, self.queue, self.meter = socket, desk, desk.queue, desk.meter
        self.send = send
        self.peers: dict[bytes, Peer] = {}
        self.mismatch = ""  # why this server cannot go on with the workers it has
        self.last_loss = ""
        self.failures: dict[int, str] = {}  # process of a worker → what it said before it ended
        self._gone: dict[int, float] = {}  # process here that lost its lease → when it is given up for good
        self._handlers: dict[str, Callable[[bytes, wire.Message], None]] = {
            "ready": self._on_ready, "beat": self._on_beat, "result": self._on_result,
            "failed": self._on_failed, "leaving": self._on_leaving,
        }  # fmt: skip

    def receive(self, frames: list[bytes]) -> None:
        """One message of one worker."""
        try:
            message = wire.unpack(frames[1:])
            self._handlers[message.kind](frames[0], message)
        except (ProtocolError, KeyError, TypeError, ValueError) as error:
            self._rubbish(error)
        except Exception as error:
            log.error("a fault of the front end: %s", type(error).__name__)
            log.debug("the fault", exc_info=True)

    def dispatch(self) -> None:
        """Send out what can start now."""
        for job in self.queue.assignments(time.monotonic()):
            assert job.worker is not None
            job_frames = wire.pack("job", job.payload, token=job.token, key=job.key, seed=job.seed)
            self.tell(job.worker, job_frames)

    def check_leases(self, now: float) -> None:
        for identity in self.queue.expired(now):
            self._give_up(identity, at=now + (self.queue.stall_s or math.inf))  # it may be back
            self._lose(identity, f"silent for more than {self.queue.lease_s:g} s")
        for identity, why in self.queue.stuck(now).items():
            self.tell(identity, wire.pack("abort", why=why))
            self._give_up(identity, at=now)
            self._lose(identity, why)

    def given_up(self, now: float) -> list[int]:
        """Processes of this machine to kill: each is named once."""
        due = [pid for pid, at in self._gone.items() if now >= at]
        for pid in due:
            del self._gone[pid]
        return due

    def exited(self, pid: int, host: str, why: str) -> None:
        """A worker process of this machine ended; no need to wait for its lease."""
        self._gone.pop(pid, None)
        for identity, peer in list(self.peers.items()):
            if (peer.pid, peer.host) == (pid, host):
                self._lose(identity, why)

    def dismiss(self, why: str, *, pids_here: set[int] | None = None) -> None:
        """The server ends, and its workers too; with ``pids_here`` only those of this machine.

        The others then wait for the server's successor, as long as their patience lasts.
        """
        for identity, peer in self.peers.items():
            if pids_here is None or (peer.host == sockets.gethostname() and peer.pid in pids_here):
                self.tell(identity, wire.pack("stop", why=why))

    def tell(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self.socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # its lease will tell
            log.info("a message found no worker: %s", error)

    def trouble(self) -> str:
        """Why nothing moves, if nothing does."""
        if self.peers or not self.queue.jobs:
            return ""
        return (
            f"requests wait and no worker is there (the last one that was lost: {self.last_loss or 'none'})"
        )

    def status(self, now: float) -> tuple[WorkerStatus, ...]:
        return tuple(self._status(identity, now) for identity in self.peers)

    def _on_ready(self, identity: bytes, message: wire.Message) -> None:
        said, known = message.header, self.peers.get(identity)
        if known is None or known.session != said["session"]:
            if not self._has_our_model(identity, said):
                return
            names = ("worker_id", "host", "pid", "session", "model_id")
            own = {name: said[name] for name in names}
            peer = Peer(lease=0, stats=dict(said.get("stats", {})), **own)
            peer.lease, lost = self.queue.join(identity, capacity=int(said["capacity"]), now=time.monotonic())
            self.peers[identity] = peer
            self._gone.pop(peer.pid, None)
            self._settle(lost, f"worker {peer.worker_id} started afresh")
            log.info("worker %s is ready: %d requests at once", peer.worker_id, int(said["capacity"]))
        self.tell(identity, wire.pack("welcome", lease=self.peers[identity].lease))

    def _has_our_model(self, identity: bytes, said: dict[str, Any]) -> bool:
        """All workers have the first one's model, and that is the one whose results the run folder holds."""
        why = f"it has model {said['model_id']!r}, this server's workers have {self.desk.model_id!r}"
        if not self.desk.model_id:
            try:
                self.send(self.desk.has_model(said["model_id"]))
            except RunMismatch as error:
                self.mismatch = why = str(error)
        if said["model_id"] == self.desk.model_id:
            return True
        log.error("worker %s is turned away: %s", said["worker_id"], why)
        self.tell(identity, wire.pack("stop", why=why))
        return False

    def _on_beat(self, identity: bytes, message: wire.Message) -> None:
        said = message.header
        capacity, stats = int(said["capacity"]), dict(said["stats"])
        alive = self.queue.beat(
            identity, lease=said["lease"], capacity=capacity, steps=int(said["steps"]), now=time.monotonic()
        )
        if alive:
            self.peers[identity].stats = stats
        self.tell(identity, wire.pack("beat" if alive else "expired", lease=said["lease"]))

    def _on_result(self, identity: bytes, message: wire.Message) -> None:
        job = self.queue.finish(identity, message.header["token"])
        if job is None:
            self.meter.count("void_results")
            log.info("a result came for a try that is not current any more; it is dropped")
            return
        self.send(self.desk.delivered(job, message.body, time.monotonic()))

    def _on_failed(self, identity: bytes, message: wire.Message) -> None:
        error, loading = str(message.header["error"]), identity not in self.peers
        self.failures[int(message.header["pid"])] = error
        # While a worker loads, no request's text can be in what it says.
        log.error("a worker failed: %s", error if loading else error.partition(":")[0])
        log.debug("it said: %s\n%s", error, message.header.get("traceback", ""))
        self._lose(identity, error)

    def _on_leaving(self, identity: bytes, message: wire.Message) -> None:
        requeued = self.queue.leave(identity)
        self.meter.count("requeued", len(requeued))
        log.info("worker %s leaves; %d requests wait again", self._name(identity), len(requeued))
        self.peers.pop(identity, None)

    def _give_up(self, identity: bytes, *, at: float) -> None:
        peer = self.peers[identity]
        if peer.host == sockets.gethostname():
            self._gone[peer.pid] = at

    def _lose(self, identity: bytes, why: str) -> None:
        if self.peers.get(identity) is None:
            return
        lost = self.queue.lose(identity)
        self.last_loss = why
        log.warning("worker %s is lost; %d requests wait again", self._name(identity), len(lost.requeued))
        log.debug("it is lost because: %s", why)
        self.meter.count("workers_lost")
        self._settle(lost, why)
        del self.peers[identity]

    def _settle(self, lost: Lost, why: str) -> None:
        self.meter.count("requeued", len(lost.requeued))
        for job in lost.given_up:
            log.warning("a request is given up: it lost its worker %d times", job.tries)
            error = WorkerLost(
                f"request {job.key!r} lost its worker {job.tries} times (the last: {why}); "
                "look into the server's log, make the request smaller, or ask again"
            )
            self.send(self.desk.failed(job, error))

    def _rubbish(self, error: Exception) -> None:
        self.meter.count("rubbish_of_workers")
        if self.meter.counts["rubbish_of_workers"] <= LOUD:
            log.warning("a worker sent what is no message of this service (%s)", type(error).__name__)

    def _name(self, identity: bytes) -> str:
        return self.peers[identity].worker_id if identity in self.peers else "(unknown)"

    def _status(self, identity: bytes, now: float) -> WorkerStatus:
        peer, worker = self.peers[identity], self.queue.workers[identity]
        return WorkerStatus(
            worker_id=peer.worker_id,
            host=peer.host,
            pid=peer.pid,
            n_running=len(worker.jobs),
            capacity=worker.capacity,
            silent_s=round(now - worker.seen_at, 3),
            no_step_s=round(now - worker.stepped_at, 3) if worker.jobs else 0.0,
            model_id=peer.model_id,
            stats=peer.stats,
        )

"""The client of a TTT server: many requests in flight, replies as they come. No torch, so a laptop can
drive a cluster.

A server that goes away and comes back (a batch job that is requeued) is waited for, found again through its
endpoint file, and sent what it had not answered: with an id, a request is never trained twice. Transport is
retried, a failure that the server reports is not: it is raised as RemoteError with its cause. One thread at
a time may use a client.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from seal_nb.errors import DataError, ProtocolError, RemoteError, RoundTimeout
from seal_nb.protocol import (
    ErrorReply,
    GenerateReply,
    GenerateRequest,
    Reply,
    TTTReply,
    TTTRequest,
    Work,
    read_reply,
)
from seal_nb.service.bar import Bar
from seal_nb.service.endpoint import Endpoint, read_endpoint, split_tcp
from seal_nb.service.ping import client_socket
from seal_nb.service.status import ServerStatus, read_status

DEFAULT_WINDOW = 256  # requests in flight
PING_S = 2.0
SILENT_S = 8.0  # a live server answers pings, whatever its workers do
COME_BACK = ("QueueFull", "ServerStopping")  # said of the moment, not of the request
COME_BACK_S = 1.0
TURN_S = 0.2
PING_MARK = b"ping"
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
DENIED = "it denied our key; have its public half put into keys/allowed_clients/ of the server's run folder"

Socket = zmq.Socket[bytes]
R = TypeVar("R", TTTReply, GenerateReply)


@dataclass(kw_only=True)
class _Sent:
    """A message that waits for its reply; ``again_at``: when to send it once more, if the server said not
    now.
    """

    message: bytes
    again_at: float | None = None


class TTTClient:
    """Talk to the server at ``endpoint``: an endpoint file (better: survives a restart) or
    ``tcp://host:port``.

    timeout_s: the most that one reply, or the next reply of a round, may take. connect_s: the most that the
    server may be unreachable, at the start and later (a requeued job takes its time).
    """

    def __init__(
        self,
        endpoint: str | Path,
        *,
        timeout_s: float = 3600.0,
        connect_s: float = 60.0,
        key_file: str | Path | None = None,
        server_key: str = "",
        window: int = DEFAULT_WINDOW,
    ) -> None:
        self.where, self.timeout_s, self.connect_s = str(endpoint), timeout_s, connect_s
        self.key_file = Path(key_file) if key_file else None
        self.server_key, self.window = server_key, window
        self.server_id = ""
        self._name = b"c" + uuid.uuid4().bytes
        self._sent: dict[bytes, _Sent] = {}
        self._n_sent = 0
        self._context: zmq.Context[Socket] = zmq.Context()
        self._socket: Socket | None = None
        self._monitor: Socket | None = None
        self._greeted = False
        self._expected_id = ""
        self._trouble = ""
        self._heard_at = self._looked_at = time.monotonic()
        self._pinged_at: float | None = None  # the first ping that is not answered yet
        self._lost_at: float | None = None  # since when the server does not answer

    def evaluate(self, request: TTTRequest, *, timeout_s: float | None = None) -> TTTReply:
        """Train and ask. Raises RemoteError, RoundTimeout."""
        (_, reply), = self._round([request], timeout_s)  # fmt: skip
        return _checked(reply, TTTReply)

    def generate(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateReply:
        """Text from the server's model. Raises RemoteError, RoundTimeout."""
        (_, reply), = self._round([request], timeout_s)  # fmt: skip
        return _checked(reply, GenerateReply)

    def run_round(
        self, requests: Sequence[TTTRequest], *, timeout_s: float | None = None, progress: bool = False
    ) -> Iterator[TTTReply]:
        """Replies as they come, in any order; know them by ``request_id``.

        Raises RemoteError at the first failure that the server reports, RoundTimeout if no reply comes for
        ``timeout_s``. What is in work goes on: asked again by id, it is joined or already there.
        """
        for _, reply in self.run_indexed(requests, timeout_s=timeout_s, progress=progress):
            if isinstance(reply, RemoteError):
                raise reply
            yield reply

    def run_indexed(
        self, requests: Sequence[TTTRequest], *, timeout_s: float | None = None, progress: bool = False
    ) -> Iterator[tuple[int, TTTReply | RemoteError]]:
        """(position of the request, its reply or its failure) as they come: one failure does not end the
        round.
        """
        bar = Bar(len(requests)) if progress else None
        for index, reply in self._round(requests, timeout_s):
            if bar is not None:
                bar.step()
            yield index, remote_error(reply) if isinstance(reply, ErrorReply) else _checked(reply, TTTReply)

    def status(self, *, timeout_s: float = 10.0) -> ServerStatus:
        return read_status(self._command({"cmd": "status"}, timeout_s))

    def cancel(self, request_id: str, *, timeout_s: float = 10.0) -> bool:
        """Whether there was something to cancel; whoever waits for it gets an error."""
        return self._command({"cmd": "cancel", "request_id": request_id}, timeout_s)["status"] == "cancelled"

    def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Ask the server to end in good order; running requests may finish."""
        self._command({"cmd": "shutdown"}, timeout_s)

    def close(self) -> None:
        self._disconnect()
        self._context.destroy(linger=200)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _command(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        mark = self._send(json.dumps(message).encode())
        reply = self._next({mark}, timeout_s)[1]
        if isinstance(reply, ErrorReply):
            raise remote_error(reply)
        if not isinstance(reply, dict):
            raise ProtocolError(f"the server answered {message['cmd']!r} with a {type(reply).__name__}")
        return reply

    def _round(self, requests: Sequence[Work], timeout_s: float | None) -> Iterator[tuple[int, Reply]]:
        """Keep at most ``window`` requests in flight; yield (index, reply) as they come."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        todo = list(enumerate(requests))[::-1]
        index_of: dict[bytes, int] = {}
        try:
            while todo or index_of:
                while todo and len(index_of) < self.window:
                    index, request = todo.pop()
                    index_of[self._send(request.model_dump_json(exclude_none=True).encode())] = index
                mark, reply = self._next(set(index_of), limit_s)
                if isinstance(reply, dict):
                    raise ProtocolError(f"the server answered a request with fields {sorted(reply)}")
                yield index_of.pop(mark), reply
        finally:
            for mark in index_of:
                self._sent.pop(mark, None)

    def _send(self, message: bytes) -> bytes:
        """Remember until the reply, and send if the server has greeted; the mark that the reply will bear."""
        self._n_sent += 1
        mark = self._n_sent.to_bytes(8, "big")
        self._sent[mark] = _Sent(message=message)
        if self._socket is not None and self._greeted:
            self._socket.send_multipart([mark, b"", message])
        return mark

    def _next(self, marks: set[bytes], timeout_s: float) -> tuple[bytes, Reply | dict[str, Any]]:
        """The next reply to one of ``marks``. Raises RoundTimeout; late replies to others are skipped."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._keep_in_touch()
            if self._socket is not None and self._socket.poll(_ms(min(deadline - time.monotonic(), TURN_S))):
                mark, reply = self._receive(self._socket)
                if mark in marks and mark in self._sent and not self._not_now(mark, reply):
                    del self._sent[mark]
                    return mark, reply
            elif time.monotonic() >= deadline:
                raise RoundTimeout(
                    f"no reply from {self.where} within {timeout_s:g} s, {len(marks)} requests are open; "
                    "look at the server (seal-nb status), or raise timeout_s"
                )

    def _receive(self, socket: Socket) -> tuple[bytes, Reply | dict[str, Any]]:
        frames = socket.recv_multipart()
        reply = read_reply(frames[-1])
        self._heard_at, self._pinged_at, self._lost_at = time.monotonic(), None, None
        if frames[0] == PING_MARK and isinstance(reply, dict):
            self._greet(socket, str(reply.get("server_id", "")))
        return frames[0], reply

    def _not_now(self, mark: bytes, reply: Reply | dict[str, Any]) -> bool:
        """Whether the server refused for the moment only; the message is then sent again a little later."""
        if not isinstance(reply, ErrorReply) or reply.error.split(":")[0] not in COME_BACK:
            return False
        self._sent[mark].again_at = time.monotonic() + COME_BACK_S
        return True

    def _keep_in_touch(self) -> None:
        """Connect, ping, connect anew after silence, send again what is due. Raises RoundTimeout at last."""
        now = time.monotonic()
        if self._lost_at is not None and now - self._lost_at > self.connect_s:
            raise RoundTimeout(
                f"no TTT server answers at {self.where} within {self.connect_s:g} s ({self._trouble}); "
                "start it (seal-nb serve), or raise connect_s if its job still waits in the queue"
            )
        if self._socket is None or self._is_cut_off() or self._has_moved(now):
            self._connect(now)
        elif self._pinged_at is not None and now - self._pinged_at > SILENT_S:
            self._trouble = f"{SILENT_S:g} s without an answer to a ping"
            self._connect(now)
        elif self._pinged_at is None and now - self._heard_at > PING_S:
            self._ping(self._socket)
        if self._socket is not None and self._greeted:
            self._send_again(self._socket, now)

    def _connect(self, now: float) -> None:
        """A new socket to where the server is now; what is open is sent once it has greeted."""
        if self._lost_at is None:
            self._lost_at = now
        self._disconnect()
        try:
            endpoint = self._find()
        except DataError as error:
            self._trouble = str(error)
            time.sleep(0.1)
            return
        self._expected_id = endpoint.server_id
        self._socket = client_socket(self._context, endpoint, self.key_file, name=self._name)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILED)
        self._ping(self._socket)

    def _find(self) -> Endpoint:
        """Where the server is. Raises DataError while there is no endpoint file."""
        self._looked_at = time.monotonic()
        if "://" not in self.where:
            return read_endpoint(self.where)
        host, port = split_tcp(self.where)
        return Endpoint(
            endpoint=self.where, host=host, port=int(port), public_key=self.server_key,
            worker_endpoint="", pid=0, job_id="", started_at="", server_id="",
        )  # fmt: skip

    def _greet(self, socket: Socket, server_id: str) -> None:
        """The server has said who it is: the one we look for, or another one that has its port now."""
        if self._expected_id and server_id != self._expected_id:
            self._greeted = False
            self._lost_at = self._lost_at or time.monotonic()
            self._trouble = (
                f"the server there is {server_id}, the endpoint file speaks of {self._expected_id}"
            )
            return
        if self._greeted and server_id == self.server_id:
            return
        self._greeted, self.server_id = True, server_id
        for mark, sent in self._sent.items():
            sent.again_at = None
            socket.send_multipart([mark, b"", sent.message])

    def _is_cut_off(self) -> bool:
        """Whether the connection broke: replies may be lost with it, so everything open is asked again."""
        broke = False
        while self._monitor is not None and self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["event"] & HANDSHAKE_FAILED:
                self._trouble = DENIED
            elif self._greeted:
                self._trouble, broke = "the connection broke", True
        return broke

    def _has_moved(self, now: float) -> bool:
        """Whether the endpoint file speaks of another server by now, which the older one must yield to."""
        if "://" in self.where or now - self._looked_at < PING_S:
            return False
        try:
            return self._find().server_id != self._expected_id
        except DataError:
            return False

    def _ping(self, socket: Socket) -> None:
        self._pinged_at = time.monotonic()
        socket.send_multipart([PING_MARK, b"", b'{"cmd": "ping"}'])

    def _send_again(self, socket: Socket, now: float) -> None:
        for mark, sent in self._sent.items():
            if sent.again_at is not None and now >= sent.again_at:
                sent.again_at = None
                socket.send_multipart([mark, b"", sent.message])

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=200)
        self._socket, self._monitor, self._greeted = None, None, False
        self._pinged_at = None
        self._heard_at = time.monotonic()


def remote_error(reply: ErrorReply) -> RemoteError:
    """What the server reported, as an exception."""
    name, _, value = reply.error.partition(": ")
    return RemoteError(
        reply.error,
        ename=name,
        evalue=value,
        field=reply.field or "",
        request_id=reply.request_id or "",
        remote_traceback=reply.traceback or "",
    )


def _checked(reply: Reply, kind: type[R]) -> R:
    if isinstance(reply, ErrorReply):
        raise remote_error(reply)
    if not isinstance(reply, kind):
        raise ProtocolError(
            f"the server answered with a {type(reply).__name__}, a {kind.__name__} was asked for"
        )
    return reply


def _ms(seconds: float) -> int:
    return max(0, int(seconds * 1000))

"""The client of a TTT server: many requests in flight, replies as they come, no torch.

A server that goes away and comes back (a batch job that is requeued) is found again through its endpoint file, and
what it had not answered is sent again; a request with an id is never trained twice. Each message has a mark in its
envelope, which comes back with the reply. A ping shows that the server lives and which one it is: no request is sent
to a server that the endpoint file does not name. One thread at a time may use a client.
"""

import itertools
import json
import math
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from seal_nb.errors import DataError, ProtocolError, RemoteError, RoundTimeout, SettingsError
from seal_nb.protocol import (
    ErrorReply,
    GenerateReply,
    GenerateRequest,
    ServerStatus,
    TTTReply,
    TTTRequest,
    Work,
    read_reply,
)
from seal_nb.server.endpoint import Endpoint, Socket, connected, find_endpoint, is_loopback, this_node

DEFAULT_WINDOW = 256  # requests in flight
DEFAULT_WAIT_S = 60.0
PING_S = 2.0
SILENT_S = 8.0  # a live server answers pings, even while its workers train
TRY_LATER = ("QueueFull", "ServerStopping")  # errors that do not concern the request
TRY_LATER_S = 1.0
TURN_S = 0.2
PING_MARK = b"ping"
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
DENIED = "it denied our key; put its public half into keys/allowed_clients/ of the server's run folder"


@dataclass(kw_only=True)
class OpenMessage:
    """A message without a reply yet. Without `repeat`, it is sent to one server only."""

    body: bytes
    index: int  # of the request in its round
    repeat: bool
    due_at: float = 0.0  # when to send it; infinite: it was sent


class TTTClient:
    """A client of one server.

    Args:
        endpoint: Endpoint file (it survives a restart of the server), or `tcp://host:port`.
        timeout_s: Seconds for one reply, or for the next reply of a round, while the server is there.
        wait_s: Seconds that the server may be away, at the start or later: a batch job may wait or be requeued.
            Nothing is sent to another server in the meantime.
        key_file: A `.key_secret` file. None: the one in the run folder that the endpoint file names.
        server_key: Public key of the server, if `endpoint` is an address outside this machine.
        window: Requests in flight at most, 1 to 256.

    Raises:
        SettingsError: `window` is out of range.
    """

    def __init__(
        self,
        endpoint: str | Path,
        *,
        timeout_s: float = 3600.0,
        wait_s: float = DEFAULT_WAIT_S,
        key_file: str | Path | None = None,
        server_key: str = "",
        window: int = DEFAULT_WINDOW,
    ) -> None:
        if not 1 <= window <= DEFAULT_WINDOW:
            raise SettingsError(f"window is {window}; 1 to {DEFAULT_WINDOW} requests may be in flight")
        self.where, self.timeout_s, self.wait_s, self.window = str(endpoint), timeout_s, wait_s, window
        self.server_id = ""  # of the server that answered last
        self._key_file, self._server_key = key_file, server_key
        self._name = b"c" + uuid.uuid4().bytes
        self._open: dict[bytes, OpenMessage] = {}
        self._numbers = itertools.count(1)
        self._context: zmq.Context[Socket] = zmq.Context()
        self._socket: Socket | None = None
        self._monitor: Socket | None = None
        self._greeted = False  # this connection's server answered a ping and is the right one
        self._endpoint: Endpoint | None = None
        self._trouble = ""
        self._heard_at = self._looked_at = time.monotonic()
        self._pinged_at: float | None = None  # the first ping without an answer
        self._lost_at: float | None = None  # since when the server does not answer

    def evaluate(self, request: TTTRequest, *, timeout_s: float | None = None) -> TTTReply:
        """Train an adapter and answer the questions. Raises RemoteError, RoundTimeout."""
        reply: TTTReply
        (reply,) = self.run_round([request], timeout_s=timeout_s)
        return reply

    def generate(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateReply:
        """Generate text. Raises RemoteError, RoundTimeout."""
        reply: GenerateReply
        (reply,) = self.run_round([request], timeout_s=timeout_s)
        return reply

    def run_round(
        self, requests: Sequence[Work], *, timeout_s: float | None = None, progress: bool = False
    ) -> Iterator[Any]:
        """Send requests and yield replies as they come; `request_id` tells which is which.

        Args:
            requests: Any number; the window limits what is in flight.
            timeout_s: Seconds for the next reply; None: the client's.
            progress: Show a progress bar.

        Yields:
            A TTTReply for a TTTRequest, a GenerateReply for a GenerateRequest.

        Raises:
            RemoteError: the first failure that the server reports. What is in work goes on: sent again with its id, a
                request is joined or already answered.
            RoundTimeout: no reply within `timeout_s`.
        """
        for _, reply in self.run_indexed(requests, timeout_s=timeout_s, progress=progress):
            if isinstance(reply, RemoteError):
                raise reply
            yield reply

    def run_indexed(
        self, requests: Sequence[Work], *, timeout_s: float | None = None, progress: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """As `run_round`, but yields (index of the request, its reply or its RemoteError): a failure ends no round."""
        bodies = (request.model_dump_json(exclude_none=True).encode() for request in requests)
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        replies = self._exchange(bodies, timeout_s=limit_s, window=self.window)
        if progress:
            from tqdm.auto import tqdm

            replies = tqdm(replies, total=len(requests), unit="reply")
        for index, reply in replies:
            expected = TTTReply if isinstance(requests[index], TTTRequest) else GenerateReply
            if not isinstance(reply, expected | RemoteError):
                raise ProtocolError(f"the server answered with a {type(reply).__name__}, not a {expected.__name__}")
            yield index, reply

    def status(self, *, timeout_s: float = 30.0) -> ServerStatus:
        """What the server is doing."""
        return ServerStatus.model_validate(self._command("status", timeout_s))

    def cancel(self, request_id: str, *, timeout_s: float = 10.0) -> bool:
        """Cancel a request; clients that wait for it get an error. False if it is not in work."""
        return self._command("cancel", timeout_s, request_id=request_id)["status"] == "cancelled"

    def forget(self, adapter_names: Sequence[str], *, timeout_s: float = 10.0) -> list[str]:
        """Delete kept adapters. Returns the names of those that existed. Requests that name one then fail."""
        forgotten: list[str] = self._command("forget", timeout_s, adapter_names=list(adapter_names))["forgotten"]
        return forgotten

    def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Ask the server to end; running requests may finish."""
        self._command("shutdown", timeout_s)

    def close(self) -> None:
        """Close the sockets. Work that is in flight goes on in the server."""
        self._disconnect()
        self._context.destroy(linger=200)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _command(self, cmd: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """The reply to a command. Only `status` is sent to a server that takes over, too."""
        body = json.dumps({"cmd": cmd, **fields}).encode()
        ((_, reply),) = self._exchange([body], timeout_s=timeout_s, repeat=cmd == "status")
        if isinstance(reply, RemoteError):
            raise reply
        if not isinstance(reply, dict):
            raise ProtocolError(f"the server answered {cmd!r} with a {type(reply).__name__}")
        return reply

    def _exchange(
        self, bodies: Iterable[bytes], *, timeout_s: float, window: int = 1, repeat: bool = True
    ) -> Iterator[tuple[int, Any]]:
        """Send messages, at most `window` at once, and yield (index, reply or RemoteError). Raises RoundTimeout.
        `timeout_s` is time with a server, for each next reply. While the server is away that clock stops and `wait_s`
        counts. Replies that this call does not wait for (any more) are skipped."""
        unsent, marks = enumerate(bodies), set[bytes]()
        try:
            while True:
                while len(marks) < window and (following := next(unsent, None)) is not None:
                    marks.add(mark := next(self._numbers).to_bytes(8, "big"))
                    self._open[mark] = OpenMessage(body=following[1], index=following[0], repeat=repeat)
                if not marks:
                    return
                mark, reply = self._next(marks, timeout_s)
                marks.remove(mark)
                index = self._open.pop(mark).index
                if isinstance(reply, ErrorReply):
                    reply = RemoteError(reply.error, reply.field, reply.traceback)
                yield index, reply
        finally:
            for mark in marks:
                del self._open[mark]

    def _next(self, marks: set[bytes], timeout_s: float) -> tuple[bytes, Any]:
        left_s = timeout_s
        self._lost_at = None if self._lost_at is None else time.monotonic()  # each call waits the full wait_s
        while True:
            began, was_there = time.monotonic(), self._greeted
            self._keep_in_touch()
            if self._socket is not None and self._socket.poll(max(0, int(1000 * min(left_s, TURN_S)))):
                frames = self._socket.recv_multipart()
                mark, reply = frames[0], read_reply(frames[-1])
                self._heard_at, self._pinged_at = time.monotonic(), None
                if mark == PING_MARK and isinstance(reply, dict):
                    self._greet(str(reply.get("server_id", "")))
                elif mark in marks and isinstance(reply, ErrorReply) and reply.error.split(":")[0] in TRY_LATER:
                    self._open[mark].due_at = time.monotonic() + TRY_LATER_S
                elif mark in marks:
                    return mark, reply
            elif left_s <= 0:
                raise RoundTimeout(
                    f"no reply from {self.where} within {timeout_s:g} s, {len(marks)} requests are open; "
                    "look at the server (seal-nb status), or raise timeout_s"
                )
            left_s -= time.monotonic() - began if was_there else 0.0

    def _keep_in_touch(self) -> None:
        """Connect, ping, connect again after silence, send what is due. Raises RoundTimeout."""
        now = time.monotonic()
        if self._lost_at is not None and now - self._lost_at > self.wait_s:
            self._disconnect()
            why, known = [self._trouble or "it is silent"], self._endpoint
            if known is not None and is_loopback(known.host) and known.node != this_node():
                only = f"machine {known.node}" if known.node else "its own machine"
                why.append(f"it listens on loopback, which only {only} reaches; others need --endpoint tcp://0.0.0.0:0")
            raise RoundTimeout(
                f"no TTT server answers at {self.where} within {self.wait_s:g} s ({'; '.join(why)}); "
                "start it (seal-nb serve), or raise wait_s if its job still waits in the queue"
            )
        if self._socket is None or self._is_cut_off() or self._has_moved(now):
            self._connect(now)
        elif self._pinged_at is not None and now - self._pinged_at > SILENT_S:
            self._trouble = self._trouble or f"{SILENT_S:g} s without an answer to a ping"
            self._connect(now)
        elif self._pinged_at is None and now - self._heard_at > PING_S:
            self._ping(self._socket)
        for mark, message in self._open.items():
            if self._greeted and self._socket is not None and now >= message.due_at:
                self._socket.send_multipart([mark, b"", message.body])
                message.due_at = math.inf

    def _connect(self, now: float) -> None:
        """Connect to where the server is now. Open messages are sent when it has answered a ping."""
        if self._lost_at is None:
            self._lost_at = now
        self._disconnect()
        self._looked_at = now
        try:
            self._endpoint = find_endpoint(self.where, server_key=self._server_key)
        except DataError as error:
            self._trouble = str(error)
            time.sleep(0.1)
            return
        self._trouble = self._trouble if self._trouble == DENIED else ""
        self._socket = connected(self._context, self._endpoint, "client", name=self._name, key_file=self._key_file)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILED)
        self._ping(self._socket)

    def _greet(self, server_id: str) -> None:
        """A ping was answered: by the server that we look for, or by another one that has its port now."""
        expected = self._endpoint.server_id if self._endpoint else ""
        if expected and server_id != expected:
            self._greeted = False
            self._trouble = f"the server there is {server_id}, the endpoint file names {expected}"
            return
        self._lost_at, self._trouble = None, ""
        if self._greeted and server_id == self.server_id:
            return
        self._greeted, self.server_id = True, server_id
        for message in self._open.values():
            message.due_at = 0.0 if message.repeat else message.due_at

    def _is_cut_off(self) -> bool:
        """Whether the connection broke. Replies may be lost with it, so everything open is sent again."""
        broke = False
        while self._monitor is not None and self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["event"] & HANDSHAKE_FAILED:
                self._trouble = DENIED
            elif self._greeted:
                self._trouble, broke = "the connection broke", True
        return broke

    def _has_moved(self, now: float) -> bool:
        """Whether the endpoint file names another server now."""
        if "://" in self.where or self._endpoint is None or now - self._looked_at < PING_S:
            return False
        self._looked_at = now
        try:
            return find_endpoint(self.where).server_id != self._endpoint.server_id
        except DataError:
            return False

    def _ping(self, socket: Socket) -> None:
        self._pinged_at = time.monotonic()
        socket.send_multipart([PING_MARK, b"", b'{"cmd": "ping"}'])

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=200)
        self._socket, self._monitor, self._greeted, self._pinged_at = None, None, False, None
        self._heard_at = time.monotonic()

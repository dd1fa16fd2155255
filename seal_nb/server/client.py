"""The client of a TTT server: many requests in flight, replies as they come, no torch.

A server that goes away and comes back (a batch job that is requeued) is found again through its endpoint file, and
what it had not answered is sent again. A ping shows that the server lives and which one it is: no request is sent to a
server that the endpoint file does not name. One thread at a time may use a client, but for `cancel`."""

import itertools
import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from seal_nb import protocol
from seal_nb.errors import DataError, ProtocolError, RemoteError, RoundTimeout
from seal_nb.protocol import ErrorReply, GenerateReply, GenerateRequest, ServerStatus, TTTReply, TTTRequest, Work
from seal_nb.server.endpoint import Endpoint, Socket, connected, find_endpoint, this_node

SECRET_MARK = b"seal:"  # before the secret of a client in the marks of its messages, see requests.client_of
SECRET_BYTES = len(SECRET_MARK) + 16
DEFAULT_WINDOW = 256  # requests of a round in flight
DEFAULT_WAIT_S = 60.0
PING_S = 2.0
SILENT_S = 8.0  # a live server answers pings, even while its workers train
TRY_LATER = ("QueueFull", "ServerStopping")  # errors that do not concern the request
TRY_LATER_S = 1.0
TURN_S = 0.2
PING_MARK = b"ping"
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
DENIED = "it denied our key; put its public half into keys/allowed_clients/ of the server's run folder"
NO_KEYS = "a server of seal-nb on another machine needs keys: give its endpoint file, not its address"


@dataclass(kw_only=True)
class OpenMessage:
    """A message without a reply yet. Without `repeat`, it is sent to one server only."""

    body: bytes
    index: int  # of the request in its round
    expected: type  # of the reply
    repeat: bool
    due_at: float = 0.0  # when to send it; infinite: it was sent


@dataclass(eq=False)
class TTTClient(AbstractContextManager["TTTClient"]):
    """A client of one server. While the server is away, nothing is sent to another one."""

    endpoint: str | Path  # endpoint file (it survives a restart of the server), or address if no keys are needed
    _: KW_ONLY
    timeout_s: float = 3600.0  # for one reply, or for the next reply of a round, while the server is there
    wait_s: float = DEFAULT_WAIT_S  # that the server may be away, at the start or later: a batch job may be requeued
    key_file: str | Path | None = None  # a .key_secret file; None: the one in the run folder of the endpoint file

    def __post_init__(self) -> None:
        self.where = str(self.endpoint)
        self.server_id = ""  # of the server that answered last
        self._secret = SECRET_MARK + secrets.token_bytes(16)  # the server knows its requests by it, on any connection
        self._open: dict[bytes, OpenMessage] = {}
        self._numbers = itertools.count(1)
        self._context: zmq.Context[Socket] = zmq.Context()
        self._socket: Socket | None = None
        self._monitor: Socket | None = None
        self._endpoint: Endpoint | None = None
        self._trouble = ""  # why there is no server
        self._looked_at = -math.inf  # when the endpoint file was read and a ping was sent
        self._pinged_at: float | None = None  # the first ping without an answer
        self._lost_at: float | None = 0.0  # since when there is no server; None: the right one answered a ping

    def evaluate(self, request: TTTRequest, *, timeout_s: float | None = None) -> TTTReply:
        """Train an adapter and answer the questions. Raises RemoteError, RoundTimeout."""
        return next(self.run_round([request], timeout_s=timeout_s))

    def generate(self, request: GenerateRequest) -> GenerateReply:
        """Generate text. Raises RemoteError, RoundTimeout."""
        return next(self.run_round([request]))

    def run_round(self, requests: Sequence[Work], *, timeout_s: float | None = None) -> Iterator[Any]:
        """Send any number of requests and yield replies as they come; `request_id` tells which is which. Raises
        RemoteError for the first failure that the server reports, RoundTimeout without a next reply within `timeout_s`.
        What is in work then goes on: sent again with its id, a request is joined or already answered."""
        for _, reply in self.run_indexed(requests, timeout_s=timeout_s):
            if isinstance(reply, RemoteError):
                raise reply
            yield reply

    def run_indexed(self, requests: Sequence[Work], *, timeout_s: float | None = None) -> Iterator[tuple[int, Any]]:
        """As `run_round`, but yields (index of the request, its reply or its RemoteError): a failure ends no round."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s

        def message(one: Work) -> tuple[bytes, type]:
            kind = TTTReply if isinstance(one, TTTRequest) else GenerateReply
            return one.model_dump_json(exclude_none=True).encode(), kind

        return self._exchange(map(message, requests), timeout_s=limit_s, window=DEFAULT_WINDOW)

    def status(self, *, timeout_s: float = 30.0) -> ServerStatus:
        """What the server is doing."""
        return ServerStatus.model_validate(self._command("status", timeout_s))

    def cancel(self, request_id: str) -> bool:
        """Cancel a request of this client, which gets an error instead of its reply. False if it is not in work. Other
        clients that wait for the same request still get its result. Any thread may call this while another waits."""
        with TTTClient(self.endpoint, wait_s=self.wait_s, key_file=self.key_file) as other:
            other._secret = self._secret
            reply = other._command("cancel", request_id=request_id)
        return reply["status"] == "cancelled"

    def forget(self, adapter_names: Sequence[str]) -> list[str]:
        """Delete kept adapters. Returns the names of those that existed. Requests that name one then fail."""
        forgotten: list[str] = self._command("forget", adapter_names=list(adapter_names))["forgotten"]
        return forgotten

    def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Ask the server to end; running requests may finish."""
        self._command("shutdown", timeout_s)

    def close(self) -> None:
        """Close the sockets. Work that is in flight goes on in the server."""
        self._disconnect()
        self._context.destroy(linger=200)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _command(self, cmd: str, timeout_s: float = 10.0, **fields: Any) -> dict[str, Any]:
        """The reply to a command. Only `status` is sent to a server that takes over, too."""
        message = json.dumps({"cmd": cmd, **fields}).encode(), dict
        ((_, reply),) = self._exchange([message], timeout_s=timeout_s, repeat=cmd == "status")
        if isinstance(reply, RemoteError):
            raise reply
        return reply

    def _exchange(
        self, messages: Iterable[tuple[bytes, type]], *, timeout_s: float, window: int = 1, repeat: bool = True
    ) -> Iterator[tuple[int, Any]]:
        """Send messages, each with the type of its reply, and yield (index, reply or RemoteError). Raises RoundTimeout.
        `timeout_s` is time with a server, for each next reply. While the server is away that clock stops and `wait_s`
        counts. Replies that this call does not wait for (any more) are skipped."""
        unsent, marks = enumerate(messages), set[bytes]()
        try:
            while True:
                for index, (body, expected) in itertools.islice(unsent, window - len(marks)):
                    marks.add(mark := self._secret + next(self._numbers).to_bytes(8, "big"))
                    self._open[mark] = OpenMessage(body=body, index=index, expected=expected, repeat=repeat)
                if not marks:
                    return
                mark, reply = self._next(marks, timeout_s)
                marks.remove(mark)
                message = self._open.pop(mark)
                if isinstance(reply, ErrorReply):
                    reply = RemoteError(reply.error, reply.field, reply.traceback, reply.request_id)
                elif not isinstance(reply, message.expected):
                    kinds = f"a {type(reply).__name__}, not a {message.expected.__name__}"
                    raise ProtocolError(f"the server answered with {kinds}")
                yield message.index, reply
        finally:
            for mark in marks:
                del self._open[mark]

    def _next(self, marks: set[bytes], timeout_s: float) -> tuple[bytes, Any]:
        left_s = timeout_s
        if self._lost_at is not None:
            self._lost_at = time.monotonic()  # each call waits the full wait_s
        while True:
            began, was_there = time.monotonic(), self._lost_at is None
            self._keep_in_touch()
            if self._socket is not None and self._socket.poll(max(0, int(1000 * min(left_s, TURN_S)))):
                frames = self._socket.recv_multipart()
                mark, reply = frames[0], protocol.read_reply(frames[-1])
                self._pinged_at = None
                if mark == PING_MARK and isinstance(reply, dict):
                    self._greet(str(reply.get("server_id", "")), missed=reply.get("missed") is True)
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
            if known is not None and known.is_local and known.node != this_node():
                only = f"machine {known.node}" if known.node else "its own machine"
                why.append(f"it listens on loopback, which only {only} reaches; others need --endpoint tcp://0.0.0.0:0")
            elif known is not None and not known.public_key and not known.is_local and NO_KEYS not in why:
                why.append(NO_KEYS)
            raise RoundTimeout(
                f"no TTT server answers at {self.where} within {self.wait_s:g} s ({'; '.join(why)}); "
                "start it (seal-nb serve), or raise wait_s if its job still waits in the queue"
            )
        if self._is_cut_off(now) or (now - self._looked_at > PING_S and self._has_moved()):
            self._disconnect()
        if self._socket is None:
            self._connect()
        if self._socket is not None and now - self._looked_at > PING_S:
            self._looked_at, self._pinged_at = now, self._pinged_at or now
            self._socket.send_multipart([PING_MARK, b"", b'{"cmd": "ping"}'])
        for mark, message in self._open.items():
            if self._socket is not None and self._lost_at is None and now >= message.due_at:
                self._socket.send_multipart([mark, b"", message.body])
                message.due_at = math.inf

    def _connect(self) -> None:
        """Connect to where the server is now. Open messages are sent when it has answered a ping."""
        try:
            self._endpoint = find_endpoint(self.where)
        except DataError as error:
            self._trouble = str(error)
            time.sleep(0.1)
            return
        self._trouble = self._trouble if self._trouble in (DENIED, NO_KEYS) else ""
        self._socket = connected(self._context, self._endpoint, "client", key_file=self.key_file)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | REFUSED)
        self._looked_at = -math.inf

    def _greet(self, server_id: str, *, missed: bool) -> None:
        """A ping was answered: by the server that we look for, or by another one that has its port now. What is open is
        sent again to a server that is new, or threw replies away because they were not read in time."""
        expected = self._endpoint.server_id if self._endpoint else ""
        if expected and server_id != expected:
            self._lost_at = self._lost_at or time.monotonic()
            self._trouble = f"the server there is {server_id}, the endpoint file names {expected}"
        elif self._lost_at is not None or server_id != self.server_id or missed:
            self._lost_at, self._trouble, self.server_id = None, "", server_id
            for message in self._open.values():
                message.due_at = 0.0 if message.repeat else message.due_at

    def _is_cut_off(self, now: float) -> bool:
        """Whether the connection broke, or the server is silent. What is open is then sent again."""
        while self._monitor is not None and self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["event"] & REFUSED:
                self._trouble = DENIED if self._endpoint and self._endpoint.public_key else NO_KEYS
            elif self._lost_at is None:
                return True
        return self._pinged_at is not None and now - self._pinged_at > SILENT_S

    def _has_moved(self) -> bool:
        """Whether the endpoint file names another server now."""
        try:
            return self._endpoint is not None and find_endpoint(self.where).server_id != self._endpoint.server_id
        except DataError:
            return False

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=200)
        self._socket, self._monitor, self._pinged_at = None, None, None
        self._lost_at = self._lost_at or time.monotonic()

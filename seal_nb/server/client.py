"""The client of a TTT server: many requests in flight, replies as they come, and no torch.

A server that goes away and comes back (a batch job that is requeued) is waited for, found again through its
endpoint file, and sent what it had not answered: with an id, a request is never trained twice. Transport is
retried, a failure that the server reports is not: it is raised as RemoteError with its cause. One thread at
a time may use a client.

The progress of a round: one bar that is redrawn on a terminal, a line now and then anywhere else.

A client's connection: what is open is sent, and sent again to a server that came back.

A mark stands in the envelope of each message and comes back with its reply, so requests need no id for
that. A ping tells that the server lives, whatever its workers do, and which server it is: nothing is sent
to one that the endpoint file does not speak of. What requests and replies mean to a researcher is
``client``'s.
"""

import json
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar, overload

import zmq
from zmq.utils.monitor import recv_monitor_message

from seal_nb.errors import DataError, ProtocolError, RemoteError, RoundTimeout, SettingsError
from seal_nb.protocol import ErrorReply, GenerateReply, GenerateRequest, Reply, TTTReply, TTTRequest, Work, read_reply
from seal_nb.server.endpoint import Endpoint, client_socket, find_endpoint, is_loopback, this_node
from seal_nb.server.status import ServerStatus, read_status

WIDTH = 30
LINE_EVERY_S = 10.0  # where lines cannot be redrawn (a notebook's log, a batch job's output)


class Bar:
    """Call ``step`` once a reply."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done = total, 0
        self.stream = stream or sys.stderr
        self._started_at = time.monotonic()
        self._shown_at = self._started_at

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.stream.isatty():
            self.stream.write(f"\r{self._line(now)}" + "\n" * (self.done == self.total))
        elif self.done == self.total or now - self._shown_at >= LINE_EVERY_S:
            self._shown_at = now
            self.stream.write(f"{self._line(now)}\n")
        self.stream.flush()

    def _line(self, now: float) -> str:
        filled = WIDTH * self.done // max(1, self.total)
        took_s = now - self._started_at
        left_s = took_s / self.done * (self.total - self.done)
        bar = "█" * filled + "·" * (WIDTH - filled)
        return f"{bar} {self.done} of {self.total} replies, {took_s:.0f} s, about {left_s:.0f} s left"


PING_S = 2.0
SILENT_S = 8.0  # a live server answers pings, whatever its workers do
COME_BACK = ("QueueFull", "ServerStopping")  # said of the moment, not of the request
COME_BACK_S = 1.0
TURN_S = 0.2
PING_MARK = b"ping"
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
DENIED = "it denied our key; have its public half put into keys/allowed_clients/ of the server's run folder"

Socket = zmq.Socket[bytes]


@dataclass(kw_only=True)
class Open:
    """A message without its reply yet; ``again_at``: when to send it once more, after a "not now".

    Without ``repeat`` it is not sent to a second server: a shutdown is meant for the first.
    """

    message: bytes
    repeat: bool
    sent: bool = False
    again_at: float | None = None


class Connection:
    """To the server at ``where``, an endpoint file or an address; it may be away for ``wait_s``."""

    def __init__(self, where: str, *, wait_s: float, key_file: Path | None, server_key: str) -> None:
        self.where, self.wait_s, self.key_file, self.server_key = where, wait_s, key_file, server_key
        self.server_id = ""
        self._name = b"c" + uuid.uuid4().bytes
        self._open: dict[bytes, Open] = {}
        self._n_sent = 0
        self._context: zmq.Context[Socket] = zmq.Context()
        self._socket: Socket | None = None
        self._monitor: Socket | None = None
        self._greeted = False
        self._expected_id = ""
        self._trouble = ""
        self._loopback_of = ""  # the only machine that reaches the server, if it listens on loopback
        self._heard_at = self._looked_at = time.monotonic()
        self._pinged_at: float | None = None  # the first ping that is not answered yet
        self._lost_at: float | None = None  # since when the server does not answer

    def close(self) -> None:
        self._disconnect()
        self._context.destroy(linger=200)

    def forget(self, marks: Iterable[bytes]) -> None:
        """Their replies are not wanted any more; the work behind them goes on."""
        for mark in marks:
            self._open.pop(mark, None)

    def send(self, message: bytes, *, repeat: bool = True) -> bytes:
        """Remember until the reply, and send if the server has greeted; the mark that the reply will bear."""
        self._n_sent += 1
        mark = self._n_sent.to_bytes(8, "big")
        self._open[mark] = Open(message=message, repeat=repeat)
        if self._socket is not None and self._greeted:
            self._open[mark].sent = True
            self._socket.send_multipart([mark, b"", message])
        return mark

    def next(self, marks: set[bytes], timeout_s: float) -> tuple[bytes, Reply | dict[str, Any]]:
        """The next reply to one of ``marks``; late replies to others are skipped. Raises RoundTimeout.

        ``timeout_s`` is time with a server; while it is away, that clock stands still and ``wait_s`` counts.
        """
        left_s = timeout_s
        self._lost_at = None if self._lost_at is None else time.monotonic()  # each call has its full patience
        while True:
            began, was_there = time.monotonic(), self._greeted
            self._keep_in_touch()
            if self._socket is not None and self._socket.poll(_ms(min(left_s, TURN_S))):
                mark, reply = self._receive(self._socket)
                if mark in marks and mark in self._open and not self._not_now(mark, reply):
                    del self._open[mark]
                    return mark, reply
            elif left_s <= 0:
                raise RoundTimeout(
                    f"no reply from {self.where} within {timeout_s:g} s, {len(marks)} requests are open; "
                    "look at the server (seal-nb status), or raise timeout_s"
                )
            left_s -= time.monotonic() - began if was_there else 0.0

    def _receive(self, socket: Socket) -> tuple[bytes, Reply | dict[str, Any]]:
        frames = socket.recv_multipart()
        reply = read_reply(frames[-1])
        self._heard_at, self._pinged_at = time.monotonic(), None
        if frames[0] == PING_MARK and isinstance(reply, dict):
            self._greet(socket, str(reply.get("server_id", "")))
        return frames[0], reply

    def _not_now(self, mark: bytes, reply: Reply | dict[str, Any]) -> bool:
        """Whether the server refused for the moment only; the message is then sent again a little later."""
        if not isinstance(reply, ErrorReply) or reply.error.split(":")[0] not in COME_BACK:
            return False
        self._open[mark].again_at = time.monotonic() + COME_BACK_S
        return True

    def _keep_in_touch(self) -> None:
        """Connect, ping, connect anew after silence, send again what is due. Raises RoundTimeout at last."""
        now = time.monotonic()
        if self._lost_at is not None and now - self._lost_at > self.wait_s:
            self._disconnect()
            raise RoundTimeout(
                f"no TTT server answers at {self.where} within {self.wait_s:g} s{self._why()}; "
                "start it (seal-nb serve), or raise wait_s if its job still waits in the queue"
            )
        if self._socket is None or self._is_cut_off() or self._has_moved(now):
            self._connect(now)
        elif self._pinged_at is not None and now - self._pinged_at > SILENT_S:
            self._trouble = self._trouble or f"{SILENT_S:g} s without an answer to a ping"
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
        self._expected_id, self._loopback_of = endpoint.server_id, ""
        if is_loopback(endpoint.host) and endpoint.node != this_node():
            self._loopback_of = f"machine {endpoint.node}" if endpoint.node else "its own machine"
        self._trouble = self._trouble if self._trouble == DENIED else ""
        self._socket = client_socket(self._context, endpoint, self.key_file, name=self._name)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILED)
        self._ping(self._socket)

    def _why(self) -> str:
        """What is known of why there is no answer, in brackets."""
        reach = (
            f"it listens on loopback, which only {self._loopback_of} reaches: for others start it with "
            "--endpoint tcp://0.0.0.0:0"
        )
        known = [self._trouble, reach if self._loopback_of else ""]
        return f" ({'; '.join(filter(None, known))})" if any(known) else ""

    def _find(self) -> Endpoint:
        """Where the server is. Raises DataError while there is no endpoint file."""
        self._looked_at = time.monotonic()
        return find_endpoint(self.where, server_key=self.server_key)

    def _greet(self, socket: Socket, server_id: str) -> None:
        """The server has said who it is: the one we look for, or another one that has its port now."""
        if self._expected_id and server_id != self._expected_id:
            self._greeted = False
            self._trouble = f"the server there is {server_id}, the endpoint file speaks of {self._expected_id}"
            return
        self._lost_at, self._trouble = None, ""
        if self._greeted and server_id == self.server_id:
            return
        self._greeted, self.server_id = True, server_id
        for mark, sent in self._open.items():
            if sent.repeat or not sent.sent:
                sent.again_at, sent.sent = None, True
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
        for mark, sent in self._open.items():
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


def _ms(seconds: float) -> int:
    return max(0, int(seconds * 1000))


DEFAULT_WINDOW = 256  # requests in flight
DEFAULT_WAIT_S = 60.0

R = TypeVar("R", TTTReply, GenerateReply)


class TTTClient:
    """Talk to the server at ``endpoint``: an endpoint file (it survives a restart) or ``tcp://host:port``.

    timeout_s: the most that one reply, or the next reply of a round, may take while the server is there.
    wait_s: the most that the server may be away, at the start and later: a job that waits, or is requeued,
    takes its time. Meanwhile nothing is sent to any other server.
    key_file: a ``.key_secret``; empty: the one in the run folder that the endpoint file names.
    server_key: the server's public key, where ``endpoint`` is an address outside this machine.
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
        self.where, self.timeout_s, self.window = str(endpoint), timeout_s, window
        self._connection = Connection(
            self.where, wait_s=wait_s, key_file=Path(key_file) if key_file else None, server_key=server_key
        )

    @property
    def server_id(self) -> str:
        """Of the server that answered last; "" before that."""
        return self._connection.server_id

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

    @overload
    def run_indexed(
        self, requests: Sequence[TTTRequest], *, timeout_s: float | None = None, progress: bool = False
    ) -> Iterator[tuple[int, TTTReply | RemoteError]]: ...
    @overload
    def run_indexed(
        self, requests: Sequence[GenerateRequest], *, timeout_s: float | None = None, progress: bool = False
    ) -> Iterator[tuple[int, GenerateReply | RemoteError]]: ...
    def run_indexed(
        self, requests: Sequence[Work], *, timeout_s: float | None = None, progress: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """(position of the request, its reply or its failure) as they come: a failure does not end the
        round.
        """
        bar = Bar(len(requests)) if progress else None
        for index, reply in self._round(requests, timeout_s):
            if bar is not None:
                bar.step()
            if isinstance(reply, ErrorReply):
                yield index, remote_error(reply)
            elif isinstance(requests[index], TTTRequest):
                yield index, _checked(reply, TTTReply)
            else:
                yield index, _checked(reply, GenerateReply)

    def status(self, *, timeout_s: float = 30.0) -> ServerStatus:
        return read_status(self._command({"cmd": "status"}, timeout_s, repeat=True))

    def cancel(self, request_id: str, *, timeout_s: float = 10.0) -> bool:
        """Whether there was something to cancel; whoever waits for it gets an error."""
        return self._command({"cmd": "cancel", "request_id": request_id}, timeout_s)["status"] == "cancelled"

    def forget(self, adapter_names: Sequence[str], *, timeout_s: float = 10.0) -> list[str]:
        """Delete kept adapters; the names of those that were there. A request that names one then fails."""
        message = {"cmd": "forget", "adapter_names": list(adapter_names)}
        forgotten: list[str] = self._command(message, timeout_s)["forgotten"]
        return forgotten

    def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Ask the server to end in good order; running requests may finish."""
        self._command({"cmd": "shutdown"}, timeout_s)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _command(self, message: Mapping[str, Any], timeout_s: float, *, repeat: bool = False) -> dict[str, Any]:
        """``repeat``: ask a server that takes over, too."""
        mark = self._connection.send(json.dumps(message).encode(), repeat=repeat)
        try:
            _, reply = self._connection.next({mark}, timeout_s)
        finally:
            self._connection.forget([mark])
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
                    index_of[self._connection.send(request.model_dump_json(exclude_none=True).encode())] = index
                mark, reply = self._connection.next(set(index_of), limit_s)
                if isinstance(reply, dict):
                    raise ProtocolError(f"the server answered a request with fields {sorted(reply)}")
                yield index_of.pop(mark), reply
        finally:
            self._connection.forget(index_of)


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
        raise ProtocolError(f"the server answered with a {type(reply).__name__}, a {kind.__name__} was asked for")
    return reply

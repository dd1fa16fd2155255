"""The client of a TTT server: many requests in flight, replies as they come, and no torch.

A server that goes away and comes back (a batch job that is requeued) is waited for, found again through its
endpoint file, and sent what it had not answered: with an id, a request is never trained twice. Transport is
retried, a failure that the server reports is not: it is raised as RemoteError with its cause. One thread at
a time may use a client.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from seal_nb.errors import ProtocolError, RemoteError, SettingsError
from seal_nb.protocol import ErrorReply, GenerateReply, GenerateRequest, Reply, TTTReply, TTTRequest, Work
from seal_nb.service.bar import Bar
from seal_nb.service.connection import Connection
from seal_nb.service.status import ServerStatus, read_status

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
            self.where,
            wait_s=wait_s,
            key_file=Path(key_file) if key_file else None,
            server_key=server_key,
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

    def _command(
        self, message: Mapping[str, Any], timeout_s: float, *, repeat: bool = False
    ) -> dict[str, Any]:
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
                    index_of[self._connection.send(request.model_dump_json(exclude_none=True).encode())] = (
                        index
                    )
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
        raise ProtocolError(
            f"the server answered with a {type(reply).__name__}, a {kind.__name__} was asked for"
        )
    return reply

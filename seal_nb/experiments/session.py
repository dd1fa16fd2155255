"""Sends what a journal lacks to a TTT server, and journals each reply as it comes.

This is what makes a run resumable: a request is known by its id, which follows from its content and the
model (`single_passage.identified`), so a notebook that was killed asks only for what it does not have. A
failure that the server reports is kept apart and not journalled: it is missing, and asked for again by the
next run. Decides nothing about statistics and writes no result file.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_nb.errors import RemoteError, RoundTimeout
from seal_nb.grading.choose import check_grader
from seal_nb.protocol import TTTReply, TTTRequest
from seal_nb.server.client import DEFAULT_WAIT_S, TTTClient
from seal_nb.server.launch import TTTServer
from seal_nb.storage import Journal

Tell = Callable[[str], object]
TOLD_TIMES = 10  # lines of progress a round at most, so that an executed notebook stays short


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Replies by request id, and what the server reported for the requests that failed."""

    replies: dict[str, TTTReply]
    failures: dict[str, str]

    def in_order(self, requests: Sequence[TTTRequest]) -> list[TTTReply]:
        """The reply to each request. Raises: RemoteError where one failed."""
        return list(self.all_replies({str(at): request for at, request in enumerate(requests)}).values())

    def all_replies(self, requests: Mapping[str, TTTRequest]) -> dict[str, TTTReply]:
        """The reply to each named request. Raises: RemoteError where one failed."""
        for name, request in requests.items():
            if (failure := self.failures.get(_key(request))) is not None:
                raise RemoteError(f"request {name}: {failure}", request_id=_key(request))
        return {name: self.replies[_key(request)] for name, request in requests.items()}


@contextmanager
def ttt_client(
    endpoint: str, *, run_dir: str | Path, wait_s: float = DEFAULT_WAIT_S, **server: Any
) -> Iterator[TTTClient]:
    """A client of the server at `endpoint` (address or endpoint file), or of a server started for the block.

    `wait_s`: how long the server at `endpoint` is waited for, if it is not there yet or is away.
    `server`: what `TTTServer` takes (model, n_workers, n_threads, …); unused where there is an endpoint. An
    empty grader is the server's default.
    """
    if endpoint:
        with TTTClient(endpoint, wait_s=wait_s) as client:
            yield client
        return
    given = {name: value for name, value in server.items() if name != "grader" or value}
    with TTTServer(run_dir=Path(run_dir), **given) as own, TTTClient(own.endpoint) as client:
        yield client


def served_model(client: TTTClient, *, grader: str = "", timeout_s: float = 900.0) -> str:
    """The id of the model that the server's workers hold, waited for until one is ready.

    `grader`: the one that the run states; empty: none, any will do. Raises: RoundTimeout, and SettingsError
    where the server grades by another, before anything is sent.
    """
    deadline = time.monotonic() + timeout_s
    while not (model_id := client.status().model_id):
        if time.monotonic() > deadline:
            raise RoundTimeout(
                f"no worker of the server at {client.where} was ready within {timeout_s:g} s; "
                "look at its log (server.log in its run folder), or raise timeout_s"
            )
        time.sleep(0.5)
    check_grader(grader, model_id, where=client.where)
    return model_id


def each_reply(
    client: TTTClient, requests: Sequence[TTTRequest], journal: Journal
) -> Iterator[tuple[str, TTTReply | RemoteError]]:
    """(request id, reply or failure): first what the journal holds, then the others as they come."""
    missing: dict[str, TTTRequest] = {}
    for key, request in {_key(request): request for request in requests}.items():
        if key in journal:
            yield key, TTTReply.model_validate(journal.get(key))
        else:
            missing[key] = request
    for index, reply in client.run_indexed(list(missing.values())):
        key = list(missing)[index]
        if isinstance(reply, TTTReply):
            journal.append(key, reply.model_dump(mode="json"))
        yield key, reply


def run_requests(
    client: TTTClient,
    requests: Sequence[TTTRequest],
    journal: Journal,
    *,
    what: str = "inner loops",
    tell: Tell = lambda _: None,
) -> Collected:
    """All replies, in the order of the requests; `tell` gets a line of progress now and then."""
    total = len({_key(request) for request in requests})
    collected = Collected(replies={}, failures={})
    for done, (key, reply) in enumerate(each_reply(client, requests, journal), start=1):
        if isinstance(reply, TTTReply):
            collected.replies[key] = reply
        else:
            collected.failures[key] = str(reply)
        if _is_told(done, total):
            tell(f"{what}: {done} of {total}")
    order = [_key(request) for request in requests]
    return Collected(
        replies={key: collected.replies[key] for key in order if key in collected.replies}, failures=collected.failures
    )


def _key(request: TTTRequest) -> str:
    if request.request_id is None:
        raise ValueError("a request has no id; make it with requests_for_run or single_passage.identified")
    return request.request_id


def _is_told(done: int, total: int) -> bool:
    return done * TOLD_TIMES // max(total, 1) > (done - 1) * TOLD_TIMES // max(total, 1)

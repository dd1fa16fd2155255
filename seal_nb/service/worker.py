"""A worker: one process, one device, one inner loop; requests come in, replies go out.

The main thread drives the inner loop (``seal_nb.inner_loop``, or what ``inner_loop`` names) a slice at a
time. The socket belongs to the thread of ``link``, which beats meanwhile.

A worker trusts the front end about leases: told that its own is gone, it drops all its work and starts
afresh, so that a request never gets two answers. A failure of one request is a reply; a failure of the
whole loop ends the process, and the front end gives its requests to others. torch comes in with the inner
loop, not here.
"""

import argparse
import importlib
import logging
import os
import queue
import signal
import socket as sockets
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from seal_nb.errors import SettingsError
from seal_nb.messages import parse_request
from seal_nb.protocol import ErrorReply, GenerateReply, GenerateRequest, TTTReply, TTTRequest, error_reply
from seal_nb.service import wire
from seal_nb.service.endpoint import wait_for_endpoint
from seal_nb.service.link import Link, WorkerSettings
from seal_nb.service.settings import option_type
from seal_nb.service.status import rss_bytes

log = logging.getLogger(__name__)

IDLE_S = 0.5


class InnerLoop(Protocol):
    """What a worker drives; see ``seal_nb.inner_loop``."""

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


def main(
    argv: Sequence[str] | None = None, *, load: Callable[[WorkerSettings], InnerLoop] | None = None
) -> int:
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
    from seal_nb.inner_loop import load_inner_loop as load
    from seal_nb.inner_loop_settings import InnerLoopSettings

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
    parser = argparse.ArgumentParser(prog="python -m seal_nb.service.worker", description=__doc__)
    for name, field in WorkerSettings.__dataclass_fields__.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=option_type(type(field.default)), default=field.default
        )
    return WorkerSettings(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())

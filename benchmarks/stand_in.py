"""A stand-in for OpenAI-compatible services, on a real socket of this machine.

It can answer, refuse, send nothing, cut the connection, be slow, and limit the requests at a time; and it records the
requests. Tests run it in a thread and change its behaviour while it runs. Benchmarks run it in a process of its own, so
that its processor time is not counted as theirs.
"""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as it arrived."""

    number: int  # from 0, in the order of arrival
    nth: int  # with this prompt, from 1
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    arrived_s: float

    @property
    def prompt(self) -> str:
        return _prompt(self.body)

    @property
    def chat(self) -> bool:
        return "messages" in self.body


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response. ``cut``: the connection ends after so many bytes of the body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


SILENCE = Answer(status=0)  # no response while the service runs
Behaviour = Callable[[Asked], Answer | str]  # a text becomes a regular reply


def text(said: str, *, n_tokens: int = 3, finish_reason: str | None = "stop", chat: bool = False) -> Answer:
    """A regular reply."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
    choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
    kind = "chat.completion" if chat else "text_completion"
    usage = {"prompt_tokens": 7, "completion_tokens": n_tokens, "total_tokens": 7 + n_tokens}
    return as_json({"id": "x", "object": kind, "choices": [choice], "usage": usage})


def as_json(value: object, *, status: int = 200, **headers: str) -> Answer:
    return Answer(
        status=status,
        body=json.dumps(value).encode(),
        headers={"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()},
    )


def error(status: int, message: str = "no", *, code: str | None = None, **headers: str) -> Answer:
    return as_json({"error": {"message": message, "code": code}}, status=status, **headers)


def echo(asked: Asked) -> str:
    """The prompt in capitals."""
    return asked.prompt.upper()


def paced(behave: Behaviour, *, service_time_s: float, lanes: int) -> Behaviour:
    """The same behaviour, with ``lanes`` requests at a time and ``service_time_s`` for each."""
    free = threading.Semaphore(lanes)

    def slowly(asked: Asked) -> Answer | str:
        with free:
            time.sleep(service_time_s)
        return behave(asked)

    return slowly


class StandIn:
    """The service. ``behave`` may be changed at any time; it runs in the request's thread."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.asked: list[Asked] = []
        self.times: Counter[str] = Counter()  # how often each prompt was asked
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": self}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def prompts(self) -> list[str]:
        return [asked.prompt for asked in self.asked]

    def judge(self, cache_dir: object, *, model: str = "stub", **options: object) -> str:
        """The name of a judge that asks this service, for `make_grader`."""
        fields = {"base_url": self.url, "api_key_env": "", "cache_dir": cache_dir, "max_attempts": 3, "timeout_s": 5.0}
        return f"judge:{model}?" + "&".join(f"{name}={value}" for name, value in (fields | options).items())

    def answer(self, path: str, raw: bytes, headers: dict[str, str]) -> Answer:
        asked = self._arrived(path, json.loads(raw or b"{}"), headers)
        try:
            told = self.behave(asked)
        finally:
            with self._lock:
                self._under_way -= 1
        if told is SILENCE:
            self._closing.wait()
        return text(told, chat=asked.chat) if isinstance(told, str) else told

    def _arrived(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Asked:
        with self._lock:
            self.times[_prompt(body)] += 1
            asked = Asked(
                number=len(self.asked), nth=self.times[_prompt(body)], path=path, body=body, headers=headers,
                arrived_s=time.monotonic(),
            )  # fmt: skip
            self.asked.append(asked)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            return asked

    def run(self) -> None:
        self._server.serve_forever(poll_interval=0.02)

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    service: StandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        n_bytes = int(self.headers.get("content-length", 0))
        raw = self.rfile.read(n_bytes)
        if len(raw) < n_bytes:  # the client was killed while it sent the request
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.service.answer(self.path, raw, headers)
        self.close_connection = answer is SILENCE or answer.cut is not None
        if answer is SILENCE:
            return
        told = {**answer.headers, "content-length": str(len(answer.body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        start = f"HTTP/1.1 {answer.status} {self.responses.get(answer.status, ('',))[0]}\r\n"
        try:
            self.wfile.write(f"{start}{head}\r\n".encode() + answer.body[: answer.cut])
        except (BrokenPipeError, ConnectionResetError):  # who asked has lost patience
            self.close_connection = True

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


def _prompt(body: dict[str, Any]) -> str:
    """The prompt, or the last message of a chat."""
    return str(body["messages"][-1]["content"] if body.get("messages") else body.get("prompt", ""))


@contextmanager
def stand_in(behave: Behaviour = echo) -> Iterator[StandIn]:
    """The service in a thread of this process."""
    service = StandIn(behave)
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.close()
        thread.join(10)


@contextmanager
def stand_in_process(said: str, *, service_time_s: float, lanes: int) -> Iterator[str]:
    """The URL of a service with one reply and a pace, in a process that ends with this one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.stand_in", said, str(service_time_s), str(lanes)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.communicate("")


def main(said: str, service_time_s: str, lanes: str) -> None:
    behave = paced(lambda asked: said, service_time_s=float(service_time_s), lanes=int(lanes))
    with stand_in(behave) as service:
        print(service.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])

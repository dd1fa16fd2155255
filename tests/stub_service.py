"""A local OpenAI-compatible service that does as a test says: answers, refuses, hangs, cuts the line."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as it arrived."""

    number: int  # from 0, in the order of arrival
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    arrived_s: float

    @property
    def prompt(self) -> str:
        """The prompt, or the last message of a chat."""
        return str(self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What goes back. `cut`: only so many bytes of the body, then the connection ends."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


def text(said: str, *, n_tokens: int = 3, finish_reason: str | None = "stop", chat: bool = False) -> Answer:
    """A regular reply."""
    choice = {"index": 0, "finish_reason": finish_reason}
    choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
    usage = {"prompt_tokens": 7, "completion_tokens": n_tokens, "total_tokens": 7 + n_tokens}
    return as_json({"id": "x", "object": "text_completion", "choices": [choice], "usage": usage})


def as_json(value: object, *, status: int = 200, **headers: str) -> Answer:
    return Answer(
        status=status,
        body=json.dumps(value).encode(),
        headers={"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()},
    )


def error(status: int, message: str = "no", *, code: str | None = None, **headers: str) -> Answer:
    return as_json({"error": {"message": message, "code": code}}, status=status, **headers)


def echo(asked: Asked) -> Answer:
    """The prompt in capitals."""
    return text(asked.prompt.upper(), chat="messages" in asked.body)


class StubService:
    """Knows what it was asked; `reply` may be changed at any time and is called in the request's thread."""

    def __init__(self, reply: Callable[[Asked], Answer]) -> None:
        self.reply = reply
        self.asked: list[Asked] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def prompts(self) -> list[str]:
        return [asked.prompt for asked in self.asked]

    def hang(self) -> Answer:
        """For a `reply` that never comes."""
        self.closing.wait(60)
        return Answer(status=503)

    def run(self) -> None:
        self._server.serve_forever(poll_interval=0.02)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("content-length", 0)))
                with service._lock:
                    asked = Asked(
                        number=len(service.asked),
                        path=self.path,
                        body=json.loads(raw or b"{}"),
                        headers={name.lower(): value for name, value in self.headers.items()},
                        arrived_s=time.monotonic(),
                    )
                    service.asked.append(asked)
                self._send(service.reply(asked))

            do_GET = do_POST

            def _send(self, answer: Answer) -> None:
                self.close_connection = answer.cut is not None
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut])

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


@contextmanager
def stub_service(reply: Callable[[Asked], Answer] = echo) -> Iterator[StubService]:
    service = StubService(reply)
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.close()
        thread.join(10)

"""A service that judges, on a real socket, and misbehaves as it is told; counts every call."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CUT = "cut"  # the connection, in the middle of a reply
HANG = "hang"  # no reply within any time-out of these tests
Behaviour = Callable[[str, int], "str | tuple[int, dict[str, str], str]"]


@dataclass
class JudgeService:
    """``behave(prompt, n)`` says what the n-th call with this prompt gets: a text, CUT, HANG, or
    (status, headers, body)."""

    behave: Behaviour = lambda prompt, n: "yes"
    port: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    most_at_once: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def n_calls(self) -> int:
        return self.calls.total()

    def grader(self, cache: object, *, model: str = "stub", **options: object) -> str:
        """The name of a judge that asks this service."""
        fields = {"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key_env": "", "cache_dir": cache,
                  "first_wait_s": 0.01, "max_attempts": 3, "timeout_s": 5.0, **options}  # fmt: skip
        return f"judge:{model}?" + "&".join(f"{name}={value}" for name, value in fields.items())

    def enter(self, prompt: str, key: str) -> int:
        with self._lock:
            self.calls[prompt] += 1
            self.keys.add(key)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return self.calls[prompt]

    def leave(self) -> None:
        with self._lock:
            self._at_once -= 1


@contextmanager
def judge_service(behave: Behaviour = lambda prompt, n: "yes") -> Iterator[JudgeService]:
    service = JudgeService(behave=behave)

    class Handler(_Handler):
        judge = service

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield service
    finally:
        service.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeService
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = asked["messages"][-1]["content"]
        n = self.judge.enter(prompt, self.headers.get("authorization", ""))
        try:
            told = self.judge.behave(prompt, n)
            if told == HANG:
                self.judge.closing.wait(30)
                self.close_connection = True
            elif told == CUT:
                self._send(200, {}, json.dumps(chat("yes")), n_bytes=20)
                self.close_connection = True
            elif isinstance(told, str):
                self._send(200, {}, json.dumps(chat(told)))
            else:
                self._send(*told)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.judge.leave()

    def _send(self, status: int, headers: dict[str, str], body: str, n_bytes: int | None = None) -> None:
        raw = body.encode()
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(raw)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[:n_bytes])

    def log_message(self, format: str, *args: Any) -> None:
        pass


def chat(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    """A reply as OpenAI's chat completions are."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "1", "object": "chat.completion", "created": int(time.time()), "model": "stub",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
    }  # fmt: skip

"""A stand-in for a text service: so many texts at a time, each in a set time. A process of its own."""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

REPLY = json.dumps(
    {
        "choices": [{"text": "It is so.", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 4},
    }
).encode()


class Service:
    """``with Service(service_time_s=0.2, lanes=32) as service: … service.url``."""

    def __init__(self, *, service_time_s: float, lanes: int) -> None:
        self.command = [sys.executable, "-m", "benchmarks.engines_service", str(service_time_s), str(lanes)]
        self.url = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(service_time_s: float, lanes: int) -> None:
    free = threading.Semaphore(lanes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            with free:
                time.sleep(service_time_s)
            head = (
                f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(REPLY)}\r\n\r\n"
            )
            self.wfile.write(head.encode() + REPLY)

        def log_message(self, *arguments: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))

#!/usr/bin/env python3
"""Stands in for an interpreter that has vLLM: started with that command line, it does what FAKE_VLLM says.

"ready" (the default) serves; "crash" says a line and exits with 3; "silent" never becomes ready; "too-long" refuses
the prompt "long". What it was started and asked with goes into the file FAKE_VLLM_NOTES. Standard library only: on
the server's PYTHONPATH there is nothing else.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ARGUMENTS = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
MODE = os.environ.get("FAKE_VLLM", "ready")
NOTED = ("VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "PYTHONPATH", "SEAL_NB_VLLM_PARENT", "OMP_NUM_THREADS")


def note(**entry: object) -> None:
    with Path(os.environ["FAKE_VLLM_NOTES"]).open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **entry}) + "\n")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        note(path=self.path, body=body)
        said = {}
        if self.path == "/v1/completions":
            if body["prompt"] == "die":
                os._exit(137)
            choice = {"text": f"{body['model']}: {body['prompt']}", "finish_reason": "stop"}
            said = {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
        if self.path == "/tokenize":
            said = {"token_strs": [*["<s>"] * body["add_special_tokens"], body["prompt"]]}
        raw = json.dumps(said).encode()
        is_refused = MODE == "too-long" and body.get("prompt") == "long"
        self.send_response(400 if is_refused else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> None:
    note(argv=sys.argv[1:], environment={name: os.environ.get(name) for name in NOTED})
    if MODE == "crash":
        print("RuntimeError: no such device", flush=True)
        raise SystemExit(3)
    if MODE == "silent":
        print("loading for ever", flush=True)
        time.sleep(600)
    ThreadingHTTPServer((ARGUMENTS["host"], int(ARGUMENTS["port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()

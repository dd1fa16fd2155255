"""An inner loop without a model, for workers under test. The first sequence of a request says what it does.

``sleep S`` takes S seconds in short slices, ``until PATH`` as long as PATH does not exist; ``hang S`` is one slice of S
seconds; ``seize`` is a slice without end that blocks all threads of the process; ``fail`` is answered with an error;
``refuse`` raises in submit; ``crash`` raises in advance; ``die`` kills the process with signal 9; ``die-once PATH``
does so unless PATH exists, and makes it. Anything else is answered at once. Each training writes a line to the file in
STUB_LOOP_LOG, so that tests can count what was trained. A kept adapter is an empty folder.
"""

import os
import re
import select
import signal
import time
from pathlib import Path
from typing import Any

from seal_nb.errors import EngineError
from seal_nb.protocol import (
    Answers,
    ErrorReply,
    GenerateReply,
    GenerateRequest,
    TTTReply,
    TTTRequest,
    build_reply,
    error_reply,
)
from seal_nb.storage import write_mark


class StubLoop:
    model_id = "stub"

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.adapters = Path()
        self.jobs: dict[str, tuple[TTTRequest | GenerateRequest, float]] = {}

    def submit(self, request: TTTRequest | GenerateRequest) -> None:
        assert request.request_id and request.seed is not None
        assert request.request_id not in self.jobs
        if _order(request)[0] == "refuse":
            raise EngineError("no such target module; leave target_modules empty")
        took_s = float(_order(request)[1]) if _order(request)[0] == "sleep" else 0.0
        self.jobs[request.request_id] = (request, time.monotonic() + took_s)

    def cancel(self, request_id: str) -> None:
        self.jobs.pop(request_id, None)

    def advance(self) -> list[TTTReply | GenerateReply | ErrorReply]:
        for request, _ in self.jobs.values():
            _obey(*_order(request))
        done = [key for key, (request, end) in self.jobs.items() if time.monotonic() >= end and _may_end(request)]
        if not done:
            select.select([], [], [], 0.01)  # time.sleep fails under libfaketime when its clock is moved
        return [self._answered(self.jobs.pop(key)[0]) for key in done]

    def _answered(self, request: TTTRequest | GenerateRequest) -> TTTReply | GenerateReply | ErrorReply:
        for name in request.adapter_stack:
            if not (self.adapters / name).is_dir():
                return error_reply(EngineError(f"no adapter {name}"), request_id=request.request_id)
        reply = _reply(request)
        if isinstance(request, TTTRequest) and request.adapter_name and isinstance(reply, TTTReply):
            (self.adapters / request.adapter_name).mkdir(parents=True, exist_ok=True)
            write_mark(self.adapters / request.adapter_name, [])
        return reply

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    @property
    def free_slots(self) -> int:
        return self.n_slots - len(self.jobs)

    def stats(self) -> dict[str, float | int | str]:
        names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        return {
            "n_jobs": len(self.jobs),
            "wall_clock": time.time(),
            **{name: os.environ.get(name, "") for name in names},
        }


def load(settings: Any) -> StubLoop:
    if settings.model == "missing":
        raise EngineError(f"no model in {settings.model!r}; give a model folder")
    if settings.model == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    loop = StubLoop(settings.n_slots or 4)  # 0: measured, which a stub is not
    loop.adapters = settings.adapters_dir
    loop.model_id = settings.model if settings.model.startswith("stub") else "stub"
    return loop


def _order(request: TTTRequest | GenerateRequest) -> tuple[str, str]:
    text = request.prompts[0] if isinstance(request, GenerateRequest) else "".join(request.train_sequences[:1])
    name, _, value = text.partition(" ")
    return name, value


def _may_end(request: TTTRequest | GenerateRequest) -> bool:
    name, value = _order(request)
    return name != "until" or Path(value).exists()


def _obey(name: str, value: str) -> None:
    if name == "crash":
        raise RuntimeError("the device is broken")
    if name == "hang":
        time.sleep(float(value))
    if name == "seize":
        re.match("(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock for longer than anybody lives
    if name == "die" or (name == "die-once" and not Path(value).exists()):
        if name == "die-once":
            Path(value).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _reply(request: TTTRequest | GenerateRequest) -> TTTReply | GenerateReply | ErrorReply:
    if log := os.environ.get("STUB_LOOP_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{request.request_id} {request.seed}\n")
    common = {"request_id": request.request_id, "seed": request.seed, "model_id": "stub"}
    if isinstance(request, GenerateRequest):
        n = len(request.prompts)
        return GenerateReply(texts=["text"] * n, token_counts=[1] * n, finish_reasons=["stop"] * n, **common)
    if _order(request)[0] == "fail":
        trace = "Traceback: somewhere" if request.traceback else None
        error = EngineError("the loss is not a number; lower finetune_lr")
        return error_reply(error, request_id=request.request_id, traceback=trace)
    words = ["INCORRECT"] * len(request.eval_questions)
    baseline = Answers(texts=["no"] * len(words), verdicts=words)
    adapter = Answers(texts=[q.answer for q in request.eval_questions], verdicts=["CORRECT"] * len(words))
    tokens = sum(map(len, request.train_sequences))
    if not request.training_wanted:
        return build_reply(baseline=baseline, **common)
    return build_reply(baseline=baseline, adapter=adapter, train_tokens=tokens, **common)

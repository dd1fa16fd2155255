"""Our way: whole requests through the inner loop, and training alone at chosen lengths and numbers of
jobs."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.processes import wait_for_all
from seal_nb.protocol import TTTReply, TTTRequest
from seal_nb.server.client import InnerLoopSettings
from seal_nb.server.loop import InnerLoop, load_inner_loop
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer


def measure_slots(requests: Sequence[TTTRequest], model_folder: str, dtype: str, n_slots: int) -> dict[str, Any]:
    """Whole requests; seconds a request in training and in answering (baseline included)."""
    with tempfile.TemporaryDirectory() as folder:
        loop = load_inner_loop(_settings(model_folder, dtype, n_slots, Path(folder)))
        started_s = wait_for_all()
        replies, seconds = drive(loop, requests)
        n = len(requests)
    return {
        "requests": n,
        "seconds": time.monotonic() - started_s,
        "train_s": seconds["train"] / n,
        "answer_s": seconds["answer"] / n,
        "steps": statistics.mean(reply.train_steps for reply in replies),
        "tokens": statistics.mean(reply.train_tokens for reply in replies),
        "train_tokens_per_s": sum(reply.train_tokens for reply in replies) / seconds["train"],
        "baseline_share": len({r.eval_questions[0].context for r in requests}) / n,
        "adapter_accuracy": statistics.mean(reply.adapter_accuracy or 0.0 for reply in replies),
    }


def _settings(model: str, dtype: str, n_slots: int, folder: Path) -> InnerLoopSettings:
    logging.disable_progress_bar()
    return InnerLoopSettings(
        model=model, device="cpu", dtype=dtype, n_slots=n_slots, n_threads=torch.get_num_threads(), adapters_dir=folder
    )


def drive(loop: InnerLoop, requests: Sequence[TTTRequest]) -> tuple[list[TTTReply], dict[str, float]]:
    """All replies, and the seconds of training and of answering, which add up to the whole."""
    waiting, replies = list(reversed(requests)), []
    watch = _Watch(loop.base.device)
    loop.trainer.step = watch.around("train", loop.trainer.step)  # type: ignore[method-assign]
    loop.decoder.step = watch.around("answer", loop.decoder.step)  # type: ignore[method-assign]
    while waiting or loop.busy:
        while waiting and loop.free_slots:
            loop.submit(waiting.pop())
        for reply in loop.advance():
            if not isinstance(reply, TTTReply):
                raise RuntimeError(f"a benchmark request failed: {reply}")
            replies.append(reply)
    watch.turn_to("end")
    return replies, watch.seconds


class _Watch:
    """Seconds of what is under way. Waits for the device only where one thing follows another."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {"train": 0.0, "answer": 0.0}
        self.at, self.since = "train", time.monotonic()

    def turn_to(self, what: str) -> None:
        if what == self.at:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.monotonic()
        self.seconds[self.at] += now - self.since
        self.at, self.since = what, now

    def around(self, what: str, step: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        def timed() -> list[Any]:
            self.turn_to(what)
            return step()

        return timed


def measure_growth(
    request: TTTRequest, model_folder: str, dtype: str, lengths: Sequence[int], n_jobs: Sequence[int]
) -> dict[str, Any]:
    """Training alone, four slots: tokens a second at each sequence length, seconds for each number of
    jobs."""
    logging.disable_progress_bar()
    base = FrozenBase.load(model_folder, device="cpu", dtype=dtype)
    wait_for_all()
    return {
        "sequence_length": [_at_length(base, request, length) for length in lengths],
        "jobs": [_at_jobs(base, request, n) for n in n_jobs],
    }


def _at_length(base: FrozenBase, request: TTTRequest, length: int) -> dict[str, float]:
    """Two steps of four jobs after one that is not counted; all sequences have `length` tokens."""
    text = " ".join(request.train_sequences)
    while len(base.encode(text)) < length:
        text += " " + text
    settings = TrainSettings(epochs=3, max_seq_length=length)
    trainer = SlotTrainer(base, n_slots=4, token_budget=max(4096, 4 * length))
    for i in range(4):
        trainer.submit(TrainJob(name=str(i), texts=(text,), train=settings))
    trainer.step()
    start, before = time.monotonic(), trainer.n_tokens
    trainer.run()
    seconds = time.monotonic() - start
    tokens = trainer.n_tokens - before
    return {"tokens": length, "tokens_per_s": tokens / seconds, "s_per_adapter_step": seconds / 8}


def _at_jobs(base: FrozenBase, request: TTTRequest, n: int) -> dict[str, float]:
    """n jobs of one epoch through four slots."""
    trainer = SlotTrainer(base, n_slots=4)
    for i in range(n):
        settings = TrainSettings(epochs=1, seed=i)
        trainer.submit(TrainJob(name=str(i), texts=tuple(request.train_sequences), train=settings))
    start = time.monotonic()
    trainer.run()
    seconds = time.monotonic() - start
    return {"jobs": n, "seconds": seconds, "s_per_job": seconds / n}

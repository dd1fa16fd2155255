"""How fast the inner loop is on this machine: real requests, from train sequences to verdicts.

Each request is a shipped passage with its hand-written implications under the published training settings
(rank 32, 10 epochs, batch 1). Numbers are for 1 to ``--most-slots`` requests under way at a time in one
process: seconds a request, optimiser steps and train tokens a second, processor seconds a request.

    make bench        (about 3 minutes on one core)
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from seal_nb.inner_loop import load_inner_loop
from seal_nb.inner_loop_settings import InnerLoopSettings
from seal_nb.passages import Passage, load_passages
from seal_nb.protocol import ErrorReply, EvalQuestion, TTTReply, TTTRequest
from seal_nb.self_edits import train_sequences


def request_for(passage: Passage, number: int) -> TTTRequest:
    return TTTRequest(
        request_id=f"bench-{number}",
        seed=number,
        train_sequences=train_sequences(
            passage.hand_written, title=passage.title, context=passage.context, split_newlines=True
        ),
        eval_questions=[
            EvalQuestion(
                title=passage.title,
                context=passage.context,
                question=question.question,
                answer=question.answer,
            )
            for question in passage.questions
        ],
        target_modules=["all-linear"],
    )


def measure(model: str, n_slots: int, n_requests: int) -> dict[str, float | int | str]:
    """One row: ``n_requests`` requests through a fresh inner loop with ``n_slots`` slots."""
    with tempfile.TemporaryDirectory() as folder:
        settings = InnerLoopSettings(model=model, n_slots=n_slots, adapters_dir=Path(folder))
        loop = load_inner_loop(settings)
        passages = load_passages("shipped:train")
        waiting = [request_for(passages[k % len(passages)], k) for k in range(n_requests)]
        replies: list[TTTReply] = []
        started, cpu_started = time.monotonic(), time.process_time()
        while waiting or loop.busy:
            while waiting and loop.free_slots:
                loop.submit(waiting.pop())
            for reply in loop.advance():
                if isinstance(reply, ErrorReply):
                    raise RuntimeError(f"a benchmark request failed: {reply.error}")
                assert isinstance(reply, TTTReply)
                replies.append(reply)
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    return {
        "slots": n_slots,
        "requests": n_requests,
        "s_per_request": round(seconds / n_requests, 2),
        "cpu_s_per_request": round(cpu_seconds / n_requests, 2),
        "steps_per_s": round(sum(reply.train_steps for reply in replies) / seconds, 2),
        "train_tokens_per_s": round(sum(reply.train_tokens for reply in replies) / seconds, 1),
        "device": str(loop.stats()["device"]),
        "dtype": str(loop.stats()["dtype"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inner_loop", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--most-slots", type=int, default=4)
    parser.add_argument("--requests", type=int, default=4, help="for each number of slots")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(argv)
    rows = []
    slots = 1
    while slots <= arguments.most_slots:
        rows.append(measure(arguments.model, slots, max(slots, arguments.requests)))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        slots *= 2
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

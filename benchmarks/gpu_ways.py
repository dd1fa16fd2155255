"""Whole requests on one device: the published way, a careful user's way, and slots in a ReST-EM round.

The first two are PEFT and transformers' Trainer, one adapter at a time (`benchmarks/peft_alone.py`); where a
plain loop (`benchmarks/one_adapter.py`) is faster than the Trainer, the careful way is the plain loop.
"""

import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from transformers.utils import logging

from benchmarks.gpu_measure import Machine, Piece, in_swing, many_steps
from benchmarks.one_adapter import OneAdapter
from benchmarks.peft_alone import answer, step_s, with_new_adapter
from benchmarks.slots import drive
from benchmarks.workload import ASKED_PER_PASSAGE
from seal_nb.grading.choose import make_grader
from seal_nb.protocol import TTTRequest
from seal_nb.server.client import InnerLoopSettings
from seal_nb.server.loop import USUAL_SIZES, InnerLoop, train_job

ROUND = 750  # requests: 50 passages, 5 self-edits, 3 times
PADDED_STEPS = 3


def alone(machine: Machine) -> Iterator[Piece]:
    """Seconds of a step and of a request's answers without and with the adapter."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = machine.plain, machine.base.tokenizer
    request = machine.maker.request(0, max_new_tokens=machine.settings.new_tokens)
    n, pad_to = machine.settings.careful_steps, machine.settings.pad_to
    yield {"careful_step_s": step_s(model, tokenizer, request, n=n, n_warm=2), "careful_steps_timed": n}
    yield {"plain_loop_step_s": _plain_loop_step_s(machine, request, n=n, n_warm=2)}
    padded_s = step_s(model, tokenizer, request, n=PADDED_STEPS, n_warm=1, pad_to=pad_to)
    yield {"published_step_s": padded_s, "published_steps_timed": PADDED_STEPS, "padded_to": pad_to}
    adapted = with_new_adapter(model, request)
    answer(adapted, tokenizer, request.model_copy(update={"max_new_tokens": 2}))  # the first is slow
    yield {"answer_s": machine.seconds(lambda: answer(adapted, tokenizer, request))}
    with adapted.disable_adapter():
        yield {"baseline_s": machine.seconds(lambda: answer(adapted, tokenizer, request))}
    adapted.unload()


def _plain_loop_step_s(machine: Machine, request: TTTRequest, *, n: int, n_warm: int) -> float:
    job = train_job(request, request.max_seq_length)
    one = OneAdapter(machine.plain, machine.base.layout(job.lora), job, machine.base.encode)
    steps = one.steps()
    list(islice(steps, n_warm))
    seconds = machine.seconds(lambda: list(islice(steps, n)))
    one.remove()
    return seconds / n


def round_in_slots(machine: Machine) -> Iterator[Piece]:
    """As many whole requests as fit the time, through the real inner loop, from first to last reply."""
    s, n = machine.settings, _n_requests(machine)
    requests = [machine.maker.request(number, max_new_tokens=s.new_tokens) for number in range(n)]
    machine.forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        settings = InnerLoopSettings(
            n_slots=s.round_slots,  # 0: as the inner loop has it for this device
            token_budget=s.token_budget,
            decode_rows=s.decode_rows,
            adapters_dir=Path(folder),
        )
        loop = InnerLoop(machine.base, make_grader("local"), settings, model_id=machine.name)
        replies, seconds = drive(loop, requests)
    yield {
        "requests": n,
        "slots": loop.settings.n_slots,
        "token_budget": loop.trainer.token_budget.now,
        "decode_rows": loop.decoder.max_rows.now,
        "train_s": seconds["train"],
        "answer_s": seconds["answer"],
        "steps_per_request": statistics.mean(reply.train_steps for reply in replies),
        "train_tokens_per_s": sum(reply.train_tokens for reply in replies) / seconds["train"],
        "peak_memory_gib": machine.peak_gib(),
    }


def _n_requests(machine: Machine) -> int:
    """Of whole passages, from the speed of five steps; a fifth of the time is left for answers."""
    s = machine.settings
    trainer, jobs = in_swing(machine, s.round_slots or USUAL_SIZES["cuda"][0])
    step_s = machine.seconds(partial(many_steps, trainer, 5)) / 5
    n = 0.8 * s.round_seconds / step_s * len(jobs) / statistics.mean(job.n_steps for job in jobs)
    return ASKED_PER_PASSAGE * max(1, min(ROUND // ASKED_PER_PASSAGE, round(n / ASKED_PER_PASSAGE)))


def compared(ours: Piece, others: Piece) -> Piece:
    """Minutes of a round each way, and ratios to ours: of whole rounds, and of training alone.

    The other ways are extrapolated from timed steps to the same number of steps and answers."""
    steps, n = ours["steps_per_request"], ROUND / 60
    step = min(others["careful_step_s"], others["plain_loop_step_s"])
    answers, kept = (others["answer_s"] + others["baseline_s"] * k for k in (1, 1 / ASKED_PER_PASSAGE))
    train = {"published": n * steps * others["published_step_s"], "careful": n * steps * step}
    own_train, own_answers = (n * ours[key] / ours["requests"] for key in ("train_s", "answer_s"))
    own = own_train + own_answers
    whole = {way: minutes + n * answers for way, minutes in train.items()}
    return {
        "round_minutes": own,
        "round_minutes_training": own_train,
        **{f"round_minutes_{way}": minutes for way, minutes in whole.items()},
        **{f"ratio_{way}": minutes / own for way, minutes in whole.items()},
        **{f"ratio_{way}_training": minutes / own_train for way, minutes in train.items()},
        "ratio_careful_baseline_kept": (train["careful"] + n * kept) / own,
        "careful_way": "PEFT + Trainer" if step == others["careful_step_s"] else "a plain loop",
        "careful_step_s": step,
    }

"""What `benchmarks.gpu` measures, on any device: speed of slots, of the published way, of whole jobs."""

import math
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch
import transformers

from benchmarks.gpu_check import check, check_float32
from benchmarks.gpu_machine import Machine, Settings, make_machine
from benchmarks.one_adapter import OneAdapter
from benchmarks.random_models import QUESTIONS, flop_per_token
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder
from seal_nb.ttt.lora import Adapter, initial_weights
from seal_nb.ttt.scheduler import SlotTrainer

RUNS_OF_A_ROUND = 750  # 50 passages, 5 self-edits, 3 times
RUNS_OF_A_PASSAGE = 15
TOKEN_BUDGET = 16384


def run(config: str, device: str, settings: Settings, *, profile: bool = False) -> dict[str, Any]:
    """All of it, in order; prints where it is."""
    started_s = time.monotonic()
    dtype = torch.bfloat16
    peak = matmul_peak(device, dtype, settings.matmul_size)
    _say(f"matmul peak {peak / 1e12:.3g} TFLOP/s")
    checks = [check_float32(device)]
    machine = make_machine(config, device, dtype, settings)
    checks.append(check(machine.base, machine.alone, machine.maker))
    _say("checks: " + ", ".join("passed" if c["passed"] else "FAILED" for c in checks))
    sweep = [slot_speed(machine, n, peak) for n in settings.n_slots]
    if profile:
        print(_profile(machine, min(32, settings.n_slots[-1])))
    best = max(sweep, key=lambda row: row["tokens_per_s"])
    published = published_speed(machine)
    whole = whole_jobs(machine, best)
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": config,
        "dtype": str(dtype).removeprefix("torch."),
        "settings": asdict(settings),
        "correct": all(c["passed"] for c in checks),
        "checks": checks,
        "matmul_tflops": peak / 1e12,
        "matmul_share": best["matmul_share"],
        "round_minutes": whole["round_minutes"],
        "slots": sweep,
        "published": published,
        "whole_jobs": whole,
        "minutes": (time.monotonic() - started_s) / 60,
    }


def _say(text: str) -> None:
    print(text, flush=True)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def matmul_peak(device: str, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of the best of ten n × n products."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(12):
        if a.is_cuda:
            torch.cuda.synchronize()
        start = time.monotonic()
        torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - start)
    return 2.0 * n**3 / best


def slot_speed(machine: Machine, n: int, peak: float) -> dict[str, Any]:
    """Training at n slots in full swing."""
    trainer = SlotTrainer(machine.base, n_slots=n, token_budget=TOKEN_BUDGET)
    jobs = [machine.maker.job(seed) for seed in range(n)]
    for job in jobs:
        trainer.submit(job)
    with machine.peak_memory() as memory:
        open_s = machine.seconds(trainer.step)
        estimate_s = machine.seconds(trainer.step)
        n_steps = max(3, min(40, int(machine.settings.seconds_each / estimate_s)))
        n_steps = min(n_steps, min(job.n_steps for job in jobs) - 4)
        before = trainer.n_tokens
        seconds = machine.seconds(lambda: [trainer.step() for _ in range(n_steps)])
    tokens = trainer.n_tokens - before
    of_token, of_label = flop_per_token(machine.name)
    flop = tokens * of_token + (tokens - n * n_steps) * of_label  # a row's last token has no label
    steps_of_a_job = sum(job.n_steps for job in jobs) / n
    row = {
        "slots": n,
        "tokens_per_s": tokens / seconds,
        "jobs_per_minute": 60 * n * n_steps / seconds / steps_of_a_job,
        "step_s": seconds / n_steps,
        "matmul_share": flop / seconds / peak,
        "open_s_per_job": max(0.0, open_s - estimate_s) / n,
        "synchronisations_a_step": _synchronisations(machine, trainer),
        "token_budget": trainer.token_budget,
        **memory,
    }
    _say(f"N = {n:2}: {row['tokens_per_s']:.0f} tokens/s, {row['matmul_share']:.1%} of the peak")
    return row


def _synchronisations(machine: Machine, trainer: SlotTrainer) -> int | None:
    """Host waits for the device in one step, as torch counts them."""
    if machine.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


def published_speed(machine: Machine) -> dict[str, Any]:
    """One adapter at a time: padded steps with the padding in the loss, and steps without; a round's time is
    extrapolated."""
    job = machine.maker.job(0)
    padded_s = _alone_step_s(machine, job, n=3, pad_to=machine.settings.pad_to, padding_in_loss=True)
    unpadded_s = _alone_step_s(machine, job, n=8)
    answers_s = _alone_answers_s(machine)
    steps = sum(machine.maker.job(seed).n_steps for seed in range(200)) / 200
    rounds = [RUNS_OF_A_ROUND * (steps * step_s + 2 * answers_s) / 60 for step_s in (padded_s, unpadded_s)]
    _say(f"published way: {padded_s:.3g} s a step")
    return {
        "padded_step_s": padded_s,
        "unpadded_step_s": unpadded_s,
        "answers_s": answers_s,
        "steps_timed": 3,
        "round_minutes": rounds[0],
        "round_minutes_unpadded": rounds[1],
    }


def _alone_step_s(machine: Machine, job: Any, *, n: int, **padding: Any) -> float:
    """Mean of n steps after one that is not counted."""
    layout = machine.base.layout(job.lora)
    adapter = OneAdapter(machine.alone, layout, job, machine.base.encode, **padding)
    ends: list[float] = []

    def stamp() -> None:
        machine.wait()
        ends.append(time.monotonic())

    adapter.train(n + 1, stamp)
    adapter.remove()
    return (ends[-1] - ends[0]) / (len(ends) - 1)


@torch.no_grad()
def _alone_answers_s(machine: Machine) -> float:
    """One request's questions in one batch through transformers' generate."""
    ids = torch.tensor([machine.maker.prompt(i) for i in range(QUESTIONS)], device=machine.device)

    def generate(n: int) -> None:
        machine.alone.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=int(machine.alone.config.eos_token_id),
        )

    generate(2)
    return machine.seconds(lambda: generate(machine.settings.new_tokens))


def whole_jobs(machine: Machine, best: dict[str, Any]) -> dict[str, Any]:
    """As many whole jobs as fit the time, trained and answered at the best number of slots; the round is
    that, scaled to 750 runs."""
    n_slots = best["slots"]
    fit = best["jobs_per_minute"] / 60 * machine.settings.round_seconds
    n = n_slots * max(1, min(6, int(fit / n_slots)))
    adapters: list[Adapter] = []
    train_s = machine.seconds(lambda: adapters.extend(_train(machine, n, n_slots)))
    decoder = GroupedDecoder(machine.base, max_rows=machine.settings.decode_rows)
    answer_s = machine.seconds(lambda: _answer(machine, decoder, adapters))
    layout = machine.base.layout(machine.maker.job(0).lora)
    start = time.monotonic()
    initial_weights(layout, 0)
    return {
        "jobs": n,
        "slots": n_slots,
        "train_s": train_s,
        "answer_s": answer_s,
        "decode_tokens_per_s": decoder.n_tokens / answer_s,
        "initial_weights_s": time.monotonic() - start,
        "round_train_minutes": RUNS_OF_A_ROUND / n * train_s / 60,
        "round_answer_minutes": RUNS_OF_A_ROUND / n * answer_s / 60,
        "round_minutes": RUNS_OF_A_ROUND / n * (train_s + answer_s) / 60,
    }


def _train(machine: Machine, n: int, n_slots: int) -> list[Adapter]:
    trainer = SlotTrainer(machine.base, n_slots=n_slots, token_budget=TOKEN_BUDGET)
    for seed in range(n):
        trainer.submit(machine.maker.job(seed))
    return [trained.adapter for trained in trainer.run() if trained.adapter is not None]


def _answer(machine: Machine, decoder: GroupedDecoder, adapters: list[Adapter]) -> None:
    """Five questions an adapter, and the base once for each fifteen adapters."""
    n_passages = -(-len(adapters) // RUNS_OF_A_PASSAGE)
    under: list[tuple[Adapter, ...]] = [()] * n_passages + [(a,) for a in adapters]
    for i, stack in enumerate(under):
        for q in range(QUESTIONS):
            row = DecodeRow(
                key=(i, q),
                token_ids=machine.maker.prompt(q),
                adapters=stack,
                max_new_tokens=machine.settings.new_tokens,
            )
            decoder.submit(row)
    decoder.run()


def _profile(machine: Machine, n: int) -> str:
    from torch.profiler import ProfilerActivity, profile

    trainer = SlotTrainer(machine.base, n_slots=n, token_budget=TOKEN_BUDGET)
    for seed in range(n):
        trainer.submit(machine.maker.job(seed))
    for _ in range(3):
        trainer.step()
    cuda = machine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        machine.seconds(trainer.step)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=key, row_limit=30))

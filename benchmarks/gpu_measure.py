"""What `benchmarks.gpu` measures of the slots, on any device: products, training, kernels, decoding.

Each part yields its results piece by piece, so that what has been measured is not lost with what fails.
"""

import gc
import re
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.gpu_check import check, check_float32
from benchmarks.one_adapter import twin
from benchmarks.random_models import CONFIGS, QUESTIONS, JobMaker, flop_per_token, number_tokenizer, random_model
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow, GroupedDecoder
from seal_nb.ttt.lora import Adapter, LoraSettings, TrainJob
from seal_nb.ttt.trainer import SlotTrainer

Piece = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured."""

    n_slots: tuple[int, ...] = (1, 8, 32, 64, 88)
    profile_at: tuple[int, ...] = (32, 88)  # slots
    matmul_size: int = 8192
    warm_steps: int = 16  # not counted: kernels are compiled and passes captured
    seconds_each: float = 4.0  # of training at each number of slots
    epochs: int = 10  # published
    pad_to: int = 2048  # tokens; published
    new_tokens: int = 64  # of an answer; published. Random weights hardly ever end one
    n_adapters: int = 64  # that answer at a time
    rows: tuple[int, ...] = (64, 128, 320)  # of a decoding step
    careful_steps: int = 10
    round_seconds: float = 30.0
    token_budget: int = 4096  # of a pass
    # Of the inner loop of the round; 0: its own numbers for the device.
    round_slots: int = 0
    decode_rows: int = 0


FULL = Settings()
LITTLE = Settings(
    n_slots=(1, 4),
    profile_at=(4,),
    matmul_size=256,
    warm_steps=4,
    seconds_each=0.1,
    epochs=3,
    pad_to=128,
    new_tokens=8,
    n_adapters=3,
    rows=(5, 10),
    careful_steps=2,
    round_seconds=0.2,
    round_slots=15,
    token_budget=2048,
    decode_rows=16,
)


@dataclass(kw_only=True)
class Machine:
    """A device, a base on it with a plain model of the same weights, jobs, and how much to measure."""

    name: str
    device: torch.device
    settings: Settings

    @cached_property
    def plain(self) -> PreTrainedModel:
        return random_model(self.name, device=str(self.device), dtype=torch.bfloat16)

    @cached_property
    def base(self) -> FrozenBase:
        return FrozenBase(twin(self.plain), number_tokenizer(self.name), name=self.name)

    @cached_property
    def maker(self) -> JobMaker:
        return JobMaker(vocab_size=CONFIGS[self.name]["vocab_size"], epochs=self.settings.epochs)

    @cached_property
    def product_seconds(self) -> list[float]:
        """Of an n × n product in bfloat16: twenty times the mean of five in a row."""
        n = self.settings.matmul_size
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return [self.seconds(lambda: [torch.mm(a, b) for _ in range(5)]) / 5 for _ in range(24)][4:]

    @property
    def peak(self) -> float:
        """FLOP/s of the best of these products."""
        return 2.0 * self.settings.matmul_size**3 / min(self.product_seconds)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """Of work and everything it has put on the device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Of memory since `forget_peak`; None where the device does not say."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.is_cuda else None


def products(machine: Machine) -> Iterator[Piece]:
    n, seconds = machine.settings.matmul_size, machine.product_seconds
    yield {"size": n, "best_tflops": machine.peak / 1e12, "median_tflops": 2e-12 * n**3 / statistics.median(seconds)}


def checks(machine: Machine) -> Iterator[Piece]:
    yield {"float32": check_float32(str(machine.device))}
    yield {"bfloat16": check(machine.base, machine.plain, machine.maker)}


def training(machine: Machine) -> Iterator[Piece]:
    for n in machine.settings.n_slots:
        yield {str(n): slot_speed(machine, n)}


def slot_speed(machine: Machine, n: int) -> Piece:
    """Training at n slots in full swing: all open, none leaving."""
    machine.forget_peak()
    trainer, jobs = in_swing(machine, n)
    estimate_s = machine.seconds(trainer.step)
    n_steps = max(3, min(40, int(machine.settings.seconds_each / estimate_s)))
    n_steps = min(n_steps, min(job.n_steps for job in jobs) - machine.settings.warm_steps - 7)
    before = trainer.n_tokens
    seconds = machine.seconds(partial(many_steps, trainer, n_steps))
    tokens = trainer.n_tokens - before
    of_token, of_label = flop_per_token(machine.name)
    flop = tokens * (of_token + of_label)  # a row's last token, which has no label, is not passed
    return {
        "tokens_per_s": tokens / seconds,
        "tokens_per_step": tokens / n_steps,
        "ms_per_step": 1e3 * seconds / n_steps,
        "issue_ms": statistics.median(_issue_ms(machine, trainer) for _ in range(3)),
        "matmul_share": flop / seconds / machine.peak,
        "kernels_per_step": sum(not k.startswith("Mem") for k, _ in kernels(machine, trainer.step)),
        "synchronisations_per_step": _synchronisations(machine, trainer),
        "token_budget": trainer.token_budget.now,
        "peak_memory_gib": machine.peak_gib(),
        "reserved_gib": torch.cuda.max_memory_reserved(machine.device) / 2**30 if machine.is_cuda else None,
    }


def in_swing(machine: Machine, n: int) -> tuple[SlotTrainer, list[TrainJob]]:
    """n jobs in as many slots after the first steps."""
    trainer = SlotTrainer(machine.base, n_slots=n, token_budget=machine.settings.token_budget)
    jobs = [machine.maker.job(seed) for seed in range(n)]
    for job in jobs:
        trainer.submit(job)
    many_steps(trainer, machine.settings.warm_steps)
    return trainer, jobs


def many_steps(worker: SlotTrainer | GroupedDecoder, n: int) -> None:
    for _ in range(n):
        worker.step()


def _issue_ms(machine: Machine, trainer: SlotTrainer) -> float:
    """Time of the host for one step, which goes on while the device works."""
    machine.wait()
    start = time.perf_counter()
    trainer.step()
    return 1e3 * (time.perf_counter() - start)


def _synchronisations(machine: Machine, trainer: SlotTrainer) -> int | None:
    """Host waits for the device in one step, as torch counts them."""
    if not machine.is_cuda:
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


def kernels(machine: Machine, work: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and milliseconds of each kernel (on a CPU: of each operation) that work runs."""
    activity = ProfilerActivity.CUDA if machine.is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        machine.seconds(work)
    events = found.events() or []
    if machine.is_cuda:
        on_device = (e for e in events if e.device_type == DeviceType.CUDA and e.name != NO_KERNEL)
        return [(e.name, e.time_range.elapsed_us() / 1e3) for e in on_device]
    return [(e.name, e.self_cpu_time_total / 1e3) for e in events]


# By what is in a kernel's name; the first that fits.
GROUPS = (
    ("attention", r"flash|fmha|attention|attn|sdpa"),
    ("branches", r"^_(narrow|widen|outer)$|grouped"),
    ("loss", r"softmax|logsumexp|nll|cross_entropy|loss"),
    ("optimiser", r"adam|multi_tensor|foreach|normtwo|lerp|addcmul|addcdiv|(?<!r)sqrt"),
    ("elementwise", r"^triton"),
    ("copies", r"^mem|copy|catarray|index|gather|scatter|fill|embedding"),
    ("products", r"gemm|gemv|nvjet|cutlass|cublas|splitk|::mm|bmm|addmm|linear"),
    ("elementwise", r"elementwise|reduce|norm|aten::"),
)


NO_KERNEL = "Command Buffer Full"  # the profiler's word for a wait of its own


def group_of(kernel: str) -> str:
    return next((name for name, words in GROUPS if re.search(words, kernel.lower())), "other")


def profiles(machine: Machine) -> Iterator[Piece]:
    """Where a step spends: the device's milliseconds by kernel, and how long it is idle."""
    for n in machine.settings.profile_at:
        trainer, _ = in_swing(machine, n)
        start = trainer.n_tokens
        seconds = machine.seconds(partial(many_steps, trainer, 4))
        middle = trainer.n_tokens
        found = kernels(machine, trainer.step)
        size = (trainer.n_tokens - middle) / (middle - start)  # of the profiled step, in all four
        yield {str(n): {"wall_ms": 1e3 * seconds * size, **_by_kernel(found)}}


def _by_kernel(found: list[tuple[str, float]]) -> Piece:
    busy_ms = sum(ms for _, ms in found)
    calls = Counter(name for name, _ in found)
    by_name: dict[str, float] = defaultdict(float)
    by_group: dict[str, float] = defaultdict(float)
    for name, ms in found:
        by_name[name] += ms
        by_group[group_of(name)] += ms
    ranked = sorted(by_name.items(), key=lambda pair: -pair[1])
    return {
        "busy_ms": busy_ms,
        "groups_ms": dict(sorted(by_group.items(), key=lambda pair: -pair[1])),
        "kernels": [
            {"name": name[:110], "ms": ms, "calls": calls[name], "share": ms / busy_ms} for name, ms in ranked[:10]
        ],
    }


def decoding(machine: Machine) -> Iterator[Piece]:
    """Answers of many adapters in one batch, five questions each."""
    adapters = [_random_adapter(machine) for _ in range(machine.settings.n_adapters)]
    for n in machine.settings.rows:
        yield {f"ms_per_step_{n}_rows": 1e3 * _decode_step_s(machine, adapters, n)}
    decoder = _decoder(machine, adapters, QUESTIONS * len(adapters), max(machine.settings.rows))
    texts: list[Decoded] = []
    seconds = machine.seconds(lambda: texts.extend(decoder.run()))
    tokens = sum(len(text.token_ids) for text in texts)
    yield {"adapters": len(adapters), "rows": len(texts), "tokens_per_s": tokens / seconds}


def _random_adapter(machine: Machine) -> Adapter:
    lora = LoraSettings()
    layout = machine.base.layout(lora)
    flat = torch.randn(layout.size, device=machine.device).mul_(0.01)
    return Adapter(layout, lora, flat, machine.base.dtype)


def _decoder(machine: Machine, adapters: list[Adapter], n_rows: int, max_rows: int) -> GroupedDecoder:
    decoder = GroupedDecoder(machine.base, max_rows=max_rows)
    for i in range(n_rows):
        row = DecodeRow(
            key=i,
            token_ids=machine.maker.prompt(i),
            adapters=(adapters[i // QUESTIONS % len(adapters)],),
            max_new_tokens=machine.settings.new_tokens,
        )
        decoder.submit(row)
    return decoder


def _decode_step_s(machine: Machine, adapters: list[Adapter], n_rows: int) -> float:
    """Of a step in which every row is live."""
    decoder = _decoder(machine, adapters, n_rows, n_rows)
    while decoder.waiting:
        decoder.step()
    decoder.step()
    n_steps = min(20, machine.settings.new_tokens - 4)
    return machine.seconds(partial(many_steps, decoder, n_steps)) / n_steps

"""How many adapters a device trains side by side: measured, not guessed.

Jobs of the published size (one sequence of 47 tokens a step) run at 1, 2, 4, … slots, until twice as many
hardly train more tokens a second, or memory or the time for it ends. What was found is kept beside the
models by device, model, dtype and threads, so that a server's next start asks nothing and finds the same.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from seal_nb.errors import SettingsError
from seal_nb.models import cache_dir, locked
from seal_nb.runs import content_id, write_json
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.jobs import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.lora import ALL_LINEAR
from seal_nb.ttt.scheduler import SlotTrainer

TYPICAL_TOKENS = 47  # of a train sequence; published self-edits after round 2, mean
MOST_SLOTS = 128
WORTH = 1.1  # twice the slots must train so many times the tokens a second
PROBE_S = {"cpu": 8.0, "cuda": 20.0}
STEPS = 3  # of each job: the first is not counted


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """n_slots, and the measurement behind it: tokens trained a second by number of slots."""

    n_slots: int
    tokens_per_s: dict[int, float]


def slots_for(base: FrozenBase, *, model_id: str) -> Capacity:
    """What this device was found to hold of this model; measured now if it has not been."""
    key = content_id([model_id, _device_name(base.device), str(base.dtype), torch.get_num_threads()])
    path = cache_dir() / "capacity" / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):  # two workers that start together must not measure each other
            return _read(path) or _kept(path, measure_capacity(base))
    except OSError:  # a cache that cannot be written (a read-only home) only costs the measurement
        return measure_capacity(base)


def measure_capacity(base: FrozenBase, *, clock: Callable[[], float] = time.monotonic) -> Capacity:
    """The smallest number of slots from which on twice as many no longer pay."""
    started_s, found, n = clock(), {}, 1
    limit_s = PROBE_S.get(base.device.type, PROBE_S["cpu"])
    while n <= MOST_SLOTS:
        try:
            found[n] = _tokens_per_s(base, n, clock)
        except torch.OutOfMemoryError:
            break
        slower = n > 1 and found[n] < WORTH * found[n // 2]
        if slower or clock() - started_s > limit_s / 3:  # the next one takes twice what this one took
            break
        n *= 2
    if not found:
        raise SettingsError(
            f"{base.name}: no memory is left on {base.device} for a single adapter; take a smaller model"
        )
    return Capacity(n_slots=_knee(found), tokens_per_s=found)


def _knee(tokens_per_s: dict[int, float]) -> int:
    """The smallest number of slots within a tenth of the best speed."""
    best = max(tokens_per_s.values())
    return min(n for n, speed in tokens_per_s.items() if speed * WORTH >= best)


def _tokens_per_s(base: FrozenBase, n: int, clock: Callable[[], float]) -> float:
    trainer = SlotTrainer(base, n_slots=n, token_budget=2 * n * TYPICAL_TOKENS)
    for job in _typical_jobs(base, n):
        trainer.submit(job)
    n_slots = trainer.n_slots
    trainer.step()
    _wait(base.device)
    start_s, before = clock(), trainer.n_tokens
    trained = trainer.run()
    _wait(base.device)
    if trainer.n_slots < n_slots or any(t.adapter is None for t in trained):
        raise torch.OutOfMemoryError(f"{n} slots do not fit")
    return (trainer.n_tokens - before) / max(clock() - start_s, 1e-9)


def _typical_jobs(base: FrozenBase, n: int) -> Iterator[TrainJob]:
    text = "one two three four five six seven eight nine ten " * TYPICAL_TOKENS  # cut by max_seq_length
    train = TrainSettings(epochs=STEPS, max_seq_length=TYPICAL_TOKENS)
    for number in range(n):
        yield TrainJob(name=f"probe {number}", texts=(text,), lora=_usual_lora(base), train=train)


def _usual_lora(base: FrozenBase) -> LoraSettings:
    """The published adapter; all layers where PEFT knows no default for the architecture."""
    usual = LoraSettings()
    try:
        base.layout(usual)
    except SettingsError:
        return LoraSettings(target_modules=(ALL_LINEAR,))
    return usual


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _kept(path: Path, capacity: Capacity) -> Capacity:
    write_json(path, {"n_slots": capacity.n_slots, "tokens_per_s": capacity.tokens_per_s})
    return capacity


def _read(path: Path) -> Capacity | None:
    try:
        kept = json.loads(path.read_text())
        speeds = {int(n): float(speed) for n, speed in kept["tokens_per_s"].items()}
        return Capacity(n_slots=int(kept["n_slots"]), tokens_per_s=speeds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent, or not what was written here: measured again

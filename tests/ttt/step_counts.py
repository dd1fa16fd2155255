"""What a training step of many slots launches on a device that computes nothing (`fake_device`)."""

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.random_models import IMPLICATION_TOKENS, PASSAGE_TOKENS
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import Adapter, LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import Slot, SlotTrainer
from tests.ttt.fake_device import Counts, FakeDevice, fake_base

MOST_OPERATIONS = 76  # of a layer and captured step, forward and backward; 155 in the first version
LORA = LoraSettings(rank=32, alpha=64, target_modules=("q_proj", "v_proj"))


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Jobs of a step. Lengths of texts are published ones; all texts of a job have the same one."""

    n_slots: int = 8
    lora: tuple[LoraSettings, ...] = (LORA,)  # in turn
    stack: int = 0  # frozen adapters under each new one
    captured: bool = True  # as a CUDA graph
    train: dict[str, Any] = field(default_factory=dict)

    def jobs(self) -> list[TrainJob]:
        draw, jobs = random.Random(0), []
        for i in range(self.n_slots):
            n = draw.choice(PASSAGE_TOKENS if i % 8 == 7 else IMPLICATION_TOKENS)
            text, lora = " ".join("1" * n), self.lora[i % len(self.lora)]
            jobs.append(TrainJob(name=str(i), texts=(text,) * 4, lora=lora, train=TrainSettings(**self.train)))
        return jobs


ALL_LINEAR = replace(LORA, target_modules=("all-linear",))
SOME = replace(LORA, rank=48, target_modules=("o_proj", "down_proj"))
MIXES = {
    "1 slot": Mix(n_slots=1),
    "8 slots": Mix(),
    "88 slots": Mix(n_slots=88),
    "8 slots, all linear layers": Mix(lora=(ALL_LINEAR,)),
    "8 slots, accumulation, not the last": Mix(train={"gradient_accumulation_steps": 4}),
    "8 slots, not captured": Mix(captured=False),
    "8 slots, other ranks and targets": Mix(captured=False, lora=(LORA, replace(LORA, rank=4), ALL_LINEAR, SOME)),
    "8 slots on two frozen adapters": Mix(captured=False, stack=2),
    "8 slots, padding in the loss": Mix(captured=False, train={"padding_in_loss": True, "pad_to": 512}),
    "8 slots, dropout": Mix(captured=False, lora=(replace(LORA, dropout=0.1),)),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step in full swing. A captured one: the step that records the graph, whose kernels each replay launches."""

    counts: Counts
    replayed: Counts | None  # what the host launches beside a replay
    dtypes: dict[str, set[torch.dtype]]  # of each slot's tensors, all of which are on the device
    n_tokens: int  # of texts and padding in the loss
    n_longest: int  # as many tokens if each slot's are padded to the longest slot's

    @property
    def branch_share(self) -> float:
        """Tokens that a branch multiplies, those that fill up a shape or a tile included, for each real one."""
        n_groups = max(1, round(self.counts.branch_tokens / self.n_tokens))
        return self.counts.tile_tokens / (n_groups * self.n_tokens)


def step_of(watch: FakeDevice, base: FrozenBase, mix: Mix) -> Step:
    """A step of these jobs after all have entered."""
    gc.collect()  # frees the tensors of earlier steps
    trainer = SlotTrainer(base, n_slots=mix.n_slots)
    trainer.captured.works &= mix.captured
    for job in mix.jobs():
        layout = base.layout(job.lora)
        flats = [torch.empty(layout.size, device=watch.device) for _ in range(mix.stack)]
        trainer.submit(job, [Adapter(layout, job.lora, flat, base.dtype) for flat in flats])
    steps: list[Counts] = []
    while len(steps) < 2 or (mix.captured and not (steps[-2].replays and steps[-1].replays)):
        n_before, counts = trainer.n_tokens, watch.count()
        done = trainer.step()
        assert not done, done[0].error
        steps.append(counts)
    watch.count()
    assert trainer.captured.works == mix.captured
    assert len(trainer.slots) == mix.n_slots
    lengths = [slot.next_tokens for slot in trainer.slots]
    return Step(
        counts=steps[-2] if mix.captured else steps[-1],
        replayed=steps[-1] if mix.captured else None,
        dtypes={name: {t.dtype for t in tensors if watch.has(t)} for name, tensors in _tensors(trainer.slots).items()},
        n_tokens=trainer.n_tokens - n_before,
        n_longest=max(lengths) * len(lengths),
    )


def _tensors(slots: Sequence[Slot]) -> dict[str, list[torch.Tensor]]:
    names = ("flat", "gradient", "mean", "square", "compute")
    tensors = {name: [getattr(slot.row, name) for slot in slots] for name in names}
    return tensors | {"loss": [loss for slot in slots for *_, loss in slot.losses]}


def steps_of(watch: FakeDevice, config: dict[str, Any], mixes: dict[str, Mix]) -> dict[str, tuple[Step, Step]]:
    """For each mix a step of a model with one layer and of one with two."""
    found: dict[str, list[Step]] = {name: [] for name in mixes}
    for n_layers in (1, 2):
        base = fake_base(watch, config | {"num_hidden_layers": n_layers})
        for name, mix in mixes.items():
            found[name].append(step_of(watch, base, mix))
        del base
    return {name: (one, two) for name, (one, two) in found.items()}


def operations(one: Counts, two: Counts) -> tuple[int, int]:
    """Operations of a layer, and those outside the layers."""
    per_layer = two.n - one.n
    return per_layer, one.n - per_layer

"""Steps of training on CUDA, at Qwen2.5-7B's size, on a device that computes nothing.

Counted with one layer and with two; each layer more adds the same, which is checked with four.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.random_models import CONFIGS, QWEN25_7B
from seal_nb.ttt.lora import TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer
from tests.ttt.fake_device import GIB, FakeDevice, fake_base, fake_device
from tests.ttt.step_counts import (
    ALL_LINEAR,
    LORA,
    MIXES,
    MOST_OPERATIONS,
    SOME,
    Mix,
    Step,
    operations,
    step_of,
    steps_of,
)
from tests.ttt.test_cuda import FAMILIES
from tests.ttt.tiny import SIZES

N_LAYERS = QWEN25_7B["num_hidden_layers"]
CARD_GIB = 80


@pytest.fixture(scope="module")
def watch() -> Iterator[FakeDevice]:
    with fake_device("cuda") as watch:
        yield watch


@pytest.fixture(scope="module")
def steps(watch: FakeDevice) -> dict[str, tuple[Step, Step]]:
    return steps_of(watch, QWEN25_7B, MIXES)


def peak_bytes(steps: tuple[Step, Step], n_layers: int) -> int:
    one, two = (step.counts.peak_bytes for step in steps)
    return one + (n_layers - 1) * (two - one)


@pytest.mark.parametrize("name", MIXES)
def test_a_step_stays_on_the_device_in_the_right_types_and_never_waits(
    steps: dict[str, tuple[Step, Step]], name: str, record_property: Callable[[str, object], None]
) -> None:
    one, two = steps[name]
    (per_layer, outside), peak = operations(one.counts, two.counts), peak_bytes(steps[name], N_LAYERS)
    launched = two.replayed.n + 1 if two.replayed else per_layer * N_LAYERS + outside
    shares = [f"{share:.2f}" for share in (two.branch_share, two.n_longest / two.n_tokens)]
    record_property("row", (name, per_layer, outside, launched, len(two.counts.waits), f"{peak / GIB:.1f}", *shares))
    for counts in filter(None, (one.counts, two.counts, one.replayed, two.replayed)):
        assert counts.waits == [] and counts.copies["to host"] == 0
    assert two.counts.product_dtypes == {torch.bfloat16}
    wide, half = {torch.float32}, {torch.bfloat16}
    masters = dict.fromkeys(("flat", "gradient", "mean", "square"), wide)
    assert two.dtypes == masters | {"compute": half, "loss": {torch.float64}}
    if two.replayed:
        assert per_layer <= MOST_OPERATIONS, two.counts.operations - one.counts.operations
        assert two.replayed.replays == 1 and one.replayed is not None and two.replayed.n == one.replayed.n
    assert peak < CARD_GIB * GIB


def test_more_layers_take_what_was_counted_with_few(watch: FakeDevice, steps: dict[str, tuple[Step, Step]]) -> None:
    found = step_of(watch, fake_base(watch, QWEN25_7B | {"num_hidden_layers": 4}), MIXES["8 slots"])
    per_layer, outside = operations(*(step.counts for step in steps["8 slots"]))
    assert found.counts.n == 4 * per_layer + outside
    assert found.counts.peak_bytes == pytest.approx(peak_bytes(steps["8 slots"], 4), rel=0.01)


def test_whole_jobs_of_many_kinds_are_trained_and_their_slots_are_used_again(watch: FakeDevice) -> None:
    base = fake_base(watch, CONFIGS["tiny"] | {"hidden_size": 64})
    trainer = SlotTrainer(base, n_slots=2, token_budget=300)
    kinds: list[dict[str, Any]] = [
        {},
        {"batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"padding_in_loss": True, "pad_to": 64},
    ]
    for i, (lora, kind) in enumerate(zip((LORA, ALL_LINEAR, SOME, LORA), kinds, strict=True)):
        texts = tuple(" ".join("1" * (3 + 7 * (i + k) % 40)) for k in range(3))
        trainer.submit(TrainJob(name=str(i), texts=texts, lora=lora, train=TrainSettings(epochs=2, **kind)))
    counts, trained = watch.count(), trainer.run()
    assert len(trained) == 4 and [one.error for one in trained if one.error] == []
    assert counts.waits == [] and trainer.captured.works
    assert counts.copies["to host"] == len(trained), "losses and norms of each job, in one copy"
    for one in trained:
        assert one.adapter is not None and watch.has(one.adapter.flat) and one.adapter.flat.dtype == torch.float32


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_of_each_family_of_models_never_waits(watch: FakeDevice, kind: str) -> None:
    base = fake_base(watch, SIZES | FAMILIES[kind], kind)
    counts = step_of(watch, base, Mix(n_slots=2, lora=(ALL_LINEAR,))).counts
    assert counts.waits == [] and counts.product_dtypes == {torch.bfloat16}

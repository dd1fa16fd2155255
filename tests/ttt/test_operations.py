"""How much a training step launches, counted on a device that computes nothing. On CUDA: `make cuda-check`."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.random_models import CONFIGS
from tests.ttt.fake_device import fake_base, fake_device
from tests.ttt.step_counts import MIXES, MOST_OPERATIONS, Step, operations, step_of, steps_of

CONFIG = CONFIGS["tiny"] | {"hidden_size": 64}
SOME = ("8 slots", "8 slots, all linear layers", "8 slots, other ranks and targets", "8 slots, padding in the loss")


@pytest.fixture(scope="module")
def steps() -> Iterator[dict[str, tuple[Step, Step]]]:
    with fake_device("meta") as watch:
        yield steps_of(watch, CONFIG, {name: MIXES[name] for name in SOME})


@pytest.mark.parametrize("name", [name for name in SOME if MIXES[name].captured])
def test_a_captured_step_has_few_operations_in_a_layer(steps: dict[str, tuple[Step, Step]], name: str) -> None:
    one, two = steps[name]
    per_layer, _ = operations(one.counts, two.counts)
    assert per_layer <= MOST_OPERATIONS, two.counts.operations - one.counts.operations


def test_a_replayed_step_launches_nothing_but_a_graph_inputs_and_optimisers(
    steps: dict[str, tuple[Step, Step]],
) -> None:
    one, two = (step.replayed for step in steps["8 slots"])
    assert one is not None and two is not None
    assert two.replays == 1 and two.n == one.n, "more layers are not more work for the host"
    assert two.n <= 9 * MIXES["8 slots"].n_slots


@pytest.mark.parametrize("name", SOME)
def test_a_step_never_waits_for_the_device(steps: dict[str, tuple[Step, Step]], name: str) -> None:
    for step in steps[name]:
        assert step.counts.waits == [] and step.counts.copies["to host"] == 0
        assert step.replayed is None or step.replayed.waits == []


def test_the_stand_in_for_torchs_backward_pass_counts_what_torchs_own_launches() -> None:
    found = []
    for own_engine in (True, False):
        with fake_device("meta", own_engine=own_engine) as watch:
            found.append(step_of(watch, fake_base(watch, CONFIG), MIXES["8 slots"]).counts.operations)
    assert found[0] == found[1]


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda t: t[0].item(),
    "float": lambda t: float(t.sum()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "nonzero": lambda t: t.nonzero(),
    "boolean index": lambda t: t[t > 0],
    "if": lambda t: bool(t.any()),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_device_notices_that_the_host_would_wait(name: str) -> None:
    with fake_device("meta") as watch:
        counts, t = watch.count(), torch.ones(4, device=watch.device)
        if name in ("nonzero", "boolean index"):
            with pytest.raises(AssertionError, match="only the device knows"):
                WAITS[name](t)
        else:
            WAITS[name](t)
    assert len(counts.waits) == 1


def test_the_device_refuses_tensors_of_the_host() -> None:
    with fake_device("meta") as watch, pytest.raises(AssertionError, match="mixes tensors of the host and the device"):
        torch.ones(4, device=watch.device) + torch.ones(4)

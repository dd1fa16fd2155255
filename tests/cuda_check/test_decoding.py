"""Answers and scores on CUDA, on a device that computes nothing."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.random_models import CONFIGS, QWEN25_7B
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder, ScoreRow, score
from seal_nb.ttt.lora import Adapter
from tests.ttt.fake_device import Counts, FakeDevice, fake_base, fake_device
from tests.ttt.step_counts import ALL_LINEAR, LORA, operations

SIZES = {"tiny": CONFIGS["tiny"] | {"hidden_size": 64}, "7B": QWEN25_7B | {"num_hidden_layers": 1}}


@pytest.fixture(scope="module")
def watch() -> Iterator[FakeDevice]:
    with fake_device("cuda") as watch:
        yield watch


@pytest.fixture(scope="module", params=SIZES)
def base(request: pytest.FixtureRequest, watch: FakeDevice) -> FrozenBase:
    return fake_base(watch, SIZES[request.param])


def adapters(base: FrozenBase) -> list[tuple[Adapter, ...]]:
    """Those of rows: none, one of three layouts, and a stack of two."""
    made = []
    for lora in (LORA, LORA, replace(LORA, rank=4), ALL_LINEAR):
        layout = base.layout(lora)
        made.append(Adapter(layout, lora, torch.empty(layout.size, device=base.device), base.dtype))
    return [(), *((one,) for one in made), (made[0], made[3])]


def rows(base: FrozenBase, n: int) -> list[DecodeRow]:
    """Every fourth one is sampled; they end after different numbers of tokens."""
    stacks = adapters(base)
    return [
        DecodeRow(
            key=i,
            token_ids=[1] * (1 + 17 * i % 40),
            adapters=stacks[i % len(stacks)],
            max_new_tokens=4 + 5 * (i % 3),
            temperature=float(i % 4 == 0),
            top_p=0.9,
        )
        for i in range(n)
    ]


def test_decoding_waits_once_a_token_at_most_while_rows_enter_and_leave(watch: FakeDevice) -> None:
    base = fake_base(watch, SIZES["tiny"])
    decoder = GroupedDecoder(base, max_rows=8)
    for row in rows(base, 16):
        decoder.submit(row)
    done, n_replayed = [], 0
    while decoder.busy:
        n_waiting, counts = len(decoder.waiting), watch.count()
        done += decoder.step()
        enters = len(decoder.waiting) < n_waiting  # then the first token of these rows is read, too
        assert len(counts.waits) + counts.event_waits <= 1 + enters, counts.waits
        if enters:
            continue
        assert counts.waits == [], "a token is read one step later, and then only it is waited for"
        assert counts.product_dtypes <= {torch.bfloat16}
        n_replayed += counts.replays
    assert len(done) == 16 and all(one.finish_reason == "length" for one in done)
    assert {one.key: len(one.token_ids) for one in done} == {i: 4 + 5 * (i % 3) for i in range(16)}
    assert n_replayed and decoder.record is not None, "steps between two layouts are replayed"


def test_scores_of_a_chunk_of_texts_are_read_at_once_and_computed_in_float32(
    watch: FakeDevice, base: FrozenBase
) -> None:
    stacks = adapters(base)
    texts = [ScoreRow(prompt_ids=[1] * (5 + i), target_ids=[2, 3], adapters=stacks[i % len(stacks)]) for i in range(9)]
    counts = watch.count()
    assert [len(one) for one in score(base, texts)] == [2] * 9
    assert len(counts.waits) == 1 and counts.copies["to host"] == 1
    assert counts.product_dtypes == {torch.bfloat16, torch.float32}


def decoding_step(watch: FakeDevice, n_layers: int, n_rows: int) -> tuple[Counts, Counts]:
    """The first step after the prompts, which is launched operation by operation, and a replayed one."""
    base = fake_base(watch, QWEN25_7B | {"num_hidden_layers": n_layers})
    decoder = GroupedDecoder(base, max_rows=n_rows)
    own = adapters(base)[1]
    for i in range(n_rows):
        temperature = float(i % 4 == 0)
        decoder.submit(DecodeRow(key=i, token_ids=[1] * 40, adapters=own, max_new_tokens=20, temperature=temperature))
    steps = []
    while not steps or not steps[-1].replays:
        steps.append(watch.count())
        decoder.step()
        if decoder.waiting:
            steps.clear()
    steps.append(watch.count())
    decoder.step()
    watch.count()
    return steps[1], steps[-1]


def test_a_replayed_decoding_step_launches_nothing_but_a_graph_and_the_choice_of_tokens(
    watch: FakeDevice, record_property: Callable[[str, object], None]
) -> None:
    n_layers = QWEN25_7B["num_hidden_layers"]
    (one, one_replayed), (two, two_replayed) = (decoding_step(watch, n, 64) for n in (1, 2))
    per_layer, outside = operations(one, two)
    for what, launched in (("one by one", n_layers * per_layer + outside), ("replayed", two_replayed.n + 1)):
        record_property("row", (f"64 rows of decoding, {what}", per_layer, outside, launched, 1, "", "", ""))
    assert two_replayed.n == one_replayed.n < 40 and two_replayed.replays == 1

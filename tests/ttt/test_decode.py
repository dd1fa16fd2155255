"""Grouped decoding: each row gives the text it gives alone, whatever ends, enters or does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow, GroupedDecoder
from seal_nb.ttt.jobs import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.scheduler import SlotTrainer
from tests.ttt.tiny import AsciiTokenizer, tiny_model

BASE = FrozenBase(tiny_model(), AsciiTokenizer())  # type: ignore[arg-type]
EOS_LIKELY = 3.0  # added to the EOS logit, so that many rows end, some with their first token
BASE.model.generation_config.eos_token_id = 0


def adapters() -> list[Adapter]:
    trainer = SlotTrainer(BASE, n_slots=3)
    for i, rank in enumerate((2, 4, 4)):
        lora = LoraSettings(rank=rank, alpha=4 * rank, target_modules=("all-linear",))
        train = TrainSettings(epochs=4, learning_rate=3e-2, seed=i)
        trainer.submit(
            TrainJob(name=str(i), texts=("a text to learn", "another one"), lora=lora, train=train)
        )
    return [t.adapter for t in trainer.run() if t.adapter]


ADAPTERS = adapters()
STACKS = [(), (ADAPTERS[0],), (ADAPTERS[1],), (ADAPTERS[2],), (ADAPTERS[0], ADAPTERS[1])]


@pytest.fixture(autouse=True, scope="module")
def many_rows_end_early():  # type: ignore[no-untyped-def]
    head = BASE.head
    bias = torch.zeros(head.out_features, dtype=torch.float64)
    bias[0] = EOS_LIKELY
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    yield
    head.bias = None


def row(key: int, length: int, new: int, stack: int, sampled: bool) -> DecodeRow:
    ids = [(7 * key + 3 * i) % 127 + 1 for i in range(length)]
    heat = 1.0 if sampled else 0.0
    return DecodeRow(
        key=key,
        token_ids=ids,
        adapters=STACKS[stack],
        max_new_tokens=new,
        temperature=heat,
        top_p=0.9,
        seed=key,
    )


def alone(one: DecodeRow) -> Decoded:
    decoder = GroupedDecoder(BASE)
    decoder.submit(one)
    return decoder.run()[0]


ROWS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 4), st.booleans()),
    min_size=12,
    max_size=24,
)


@settings(max_examples=16, deadline=None)
@given(ROWS, st.integers(1, 24), st.integers(8, 200), st.sets(st.integers(0, 23), max_size=5))
def test_every_row_gives_what_it_gives_alone(
    shapes: list, max_rows: int, prefill_tokens: int, cancelled: set[int]
) -> None:
    rows = [row(key, *shape) for key, shape in enumerate(shapes)]
    decoder = GroupedDecoder(BASE, max_rows=max_rows, prefill_tokens=prefill_tokens)
    for one in rows:
        decoder.submit(one)
    found = {d.key: d for _ in range(3) for d in decoder.step()}
    decoder.cancel(set(cancelled))
    found |= {d.key: d for d in decoder.run()}
    for one in rows:
        if one.key not in cancelled:
            assert found[one.key] == alone(one)
    assert not decoder.live and not decoder.waiting


def test_rows_that_end_with_their_first_token_stay_harmless_among_many() -> None:
    rows = [row(key, 5 + key % 3, 12, 0, False) for key in range(24)]
    texts = {one.key: alone(one) for one in rows}
    assert 0 < sum(not d.token_ids for d in texts.values()) < 24, "some end at once, some do not"
    decoder = GroupedDecoder(BASE)
    for one in rows:
        decoder.submit(one)
    assert {d.key: d for d in decoder.run()} == texts


def test_out_of_memory_halves_the_batch_and_every_text_still_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(key, 4 + key, 10, key % 5, key % 2 == 0) for key in range(12)]
    texts = {one.key: alone(one) for one in rows}
    run = BASE.run

    def small_device(ids, positions, plan, attend):  # type: ignore[no-untyped-def]
        if len(ids) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return run(ids, positions, plan, attend)

    monkeypatch.setattr(BASE, "run", small_device)
    decoder = GroupedDecoder(BASE)
    for one in [*rows, row(99, 60, 5, 0, False)]:
        decoder.submit(one)
    found = {d.key: d for d in decoder.run()}
    too_long = found.pop(99)
    assert found == texts
    assert too_long.finish_reason == "failed" and "60 prompt tokens" in too_long.error


def test_a_stop_text_ends_a_row_and_is_not_part_of_it() -> None:
    free = alone(row(3, 9, 20, 1, True))
    stop = free.text[4:6]
    one = DecodeRow(
        key=3, token_ids=row(3, 9, 20, 1, True).token_ids, adapters=STACKS[1], max_new_tokens=20,
        temperature=1.0, top_p=0.9, seed=3, stop=(stop,),
    )  # fmt: skip
    assert alone(one).text == free.text.split(stop)[0]
    assert alone(one).finish_reason == "stop"

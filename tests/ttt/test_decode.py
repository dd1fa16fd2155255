"""Grouped decoding: each row gives the text it gives alone, whatever ends, enters or does not fit."""

from dataclasses import replace
from functools import cache
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from seal_nb.ttt import decode
from seal_nb.ttt.attention import BLOCK
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow, GroupedDecoder, ScoreRow, score
from seal_nb.ttt.device import Limit
from seal_nb.ttt.lora import Adapter, LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer
from tests.ttt.tiny import OUT_OF_MEMORY, AsciiTokenizer, tiny_model

BASE = FrozenBase(tiny_model(), AsciiTokenizer())  # type: ignore[arg-type]
EOS_LIKELY = 3.0  # added to the EOS logit, so that many rows end, some with their first token
BASE.model.generation_config.eos_token_id = 0


def adapters() -> list[Adapter]:
    trainer = SlotTrainer(BASE, n_slots=3)
    for i, rank in enumerate((2, 4, 4)):
        lora = LoraSettings(rank=rank, alpha=4 * rank, target_modules=("all-linear",))
        train = TrainSettings(epochs=4, learning_rate=3e-2, seed=i)
        trainer.submit(TrainJob(name=str(i), texts=("a text to learn", "another one"), lora=lora, train=train))
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
        key=key, token_ids=ids, adapters=STACKS[stack], max_new_tokens=new, temperature=heat, top_p=0.9, seed=key
    )


def submitted(decoder: GroupedDecoder, rows: list[DecodeRow]) -> GroupedDecoder:
    for one in rows:
        decoder.submit(one)
    return decoder


def alone(one: DecodeRow) -> Decoded:
    return submitted(GroupedDecoder(BASE), [one]).run()[0]


# Of every stack, greedy and sampled; what each gives alone is asked once.
ROWS = [row(key, 1 + 7 * key % 30, 1 + 5 * key % 20, key % 5, key % 4 < 2) for key in range(40)]


@cache
def text_of(key: int) -> Decoded:
    return alone(ROWS[key])


class Recorded(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations of one call done again on the same tensors, without
    Python. The call itself is the first replay."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list = []
        self.done = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations if self.done else []:
            again = func(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, tuple | list) else [x] for x in (out, again)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.done = True


def record(function, before):  # type: ignore[no-untyped-def]
    with Recorded() as recorded:
        return recorded, function()


def as_on_cuda(decoder: GroupedDecoder) -> GroupedDecoder:
    """Tokens are read a step late, and steps recorded and replayed."""
    decoder.reads_late, decoder.record = True, record
    return decoder


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from(range(40)), min_size=12, max_size=24, unique=True),
    st.integers(1, 24),
    st.integers(8, 200),
    st.integers(0, 5),
    st.booleans(),
)
def test_every_row_gives_what_it_gives_alone(
    keys: list[int], max_rows: int, prefill_tokens: int, n_cancelled: int, on_cuda: bool
) -> None:
    cancelled = set(keys[::2][:n_cancelled])
    rows = [ROWS[key] for key in keys]
    decoder = submitted(GroupedDecoder(BASE, max_rows=max_rows, prefill_tokens=prefill_tokens), rows)
    if on_cuda:
        as_on_cuda(decoder)
    found = {d.key: d for _ in range(3) for d in decoder.step()}
    decoder.cancel(cancelled.__contains__)
    found |= {d.key: d for d in decoder.run()}
    for key in set(keys) - cancelled:
        assert found[key] == text_of(key)
    assert not decoder.live and not decoder.waiting


def test_rows_that_end_with_their_first_token_stay_harmless_among_many() -> None:
    rows = [row(key, 5 + key % 3, 12, 0, False) for key in range(24)]
    texts = {one.key: alone(one) for one in rows}
    assert 0 < sum(not d.token_ids for d in texts.values()) < 24, "some end at once, some do not"
    decoder = submitted(GroupedDecoder(BASE), rows)
    assert {d.key: d for d in decoder.run()} == texts


def test_an_adapter_that_has_become_nan_spoils_only_its_own_rows() -> None:
    good = ADAPTERS[1]
    spoilt = Adapter(good.layout, good.settings, torch.full_like(good.flat, float("nan")), torch.float64)
    rows = [row(key, 5 + key % 3, 12, key % 5, True) for key in range(12)]
    bad = [DecodeRow(key=99 + i, token_ids=[3] * 30, adapters=(spoilt,), max_new_tokens=5) for i in (0, 1)]
    decoder = submitted(GroupedDecoder(BASE, max_rows=3), [bad[0], *rows[:6], bad[1], *rows[6:]])
    found = {d.key: d for d in decoder.run()}
    assert [found[one.key] for one in rows] == [alone(one) for one in rows]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_every_text_still_comes(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(key, 4 + key, 10, key % 5, key % 2 == 0) for key in range(12)]
    texts = {one.key: alone(one) for one in rows}
    run = BASE.run

    def small_device(ids, positions, plan, attend):  # type: ignore[no-untyped-def]
        if len(ids) > 40:
            raise error
        return run(ids, positions, plan, attend)

    monkeypatch.setattr(BASE, "run", small_device)
    decoder = submitted(GroupedDecoder(BASE), [*rows, row(99, 60, 5, 0, False)])
    found = {d.key: d for d in decoder.run()}
    too_long = found.pop(99)
    assert found == texts
    assert too_long.finish_reason == "failed" and "60 prompt tokens" in too_long.error


@pytest.mark.parametrize("n_passes", [0, 5])
@pytest.mark.parametrize("error", [IndexError, RuntimeError])
def test_a_row_that_breaks_a_pass_fails_alone_and_the_batch_is_whole_again(
    error: type[Exception], n_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(key, 4 + key, 12, key % 5, key % 2 == 0) for key in range(20)]
    texts = {one.key: alone(one) for one in rows}
    bad = next(key for key, one in texts.items() if key > 8 and len(one.token_ids) > 7)
    refused = texts.pop(bad).token_ids[n_passes - 1] if n_passes else rows[bad].token_ids[0]
    decoder = submitted(GroupedDecoder(BASE, max_rows=16), rows)
    run = BASE.run

    def strict(ids, *rest):  # type: ignore[no-untyped-def]
        n_new = [len(live.new_ids) for live in decoder.live if live.row.key == bad]
        if n_new == [n_passes]:
            assert refused in ids
            raise error("a kernel does not take this")
        return run(ids, *rest)

    monkeypatch.setattr(BASE, "run", strict)
    found = {d.key: d for d in decoder.run()}
    failed = found.pop(bad)
    assert (failed.finish_reason, error.__name__ in failed.error) == ("failed", True)
    assert found == {key: text for key, text in texts.items() if key != bad}
    assert decoder.max_rows.now == 16


def test_a_row_whose_tokens_cannot_be_decoded_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(row(key, 4 + key, 12, 0, True), stop=("~~~",)) for key in range(12)]
    texts = {one.key: alone(one) for one in rows}
    bad = next(one.key for one in texts.values() if len(one.token_ids) > 3)
    plain = AsciiTokenizer.decode

    def strict(self, ids, **options):  # type: ignore[no-untyped-def]
        if tuple(ids) == texts[bad].token_ids[:3]:
            raise KeyError("no such token")
        return plain(self, ids, **options)

    monkeypatch.setattr(AsciiTokenizer, "decode", strict)
    found = {d.key: d for d in submitted(GroupedDecoder(BASE), rows).run()}
    assert "KeyError: 'no such token'" in found.pop(bad).error
    assert found == {key: text for key, text in texts.items() if key != bad}


def test_an_error_does_not_hold_the_tensors_of_its_call_while_room_is_made() -> None:
    class Held:
        pass

    alive: list[ref[Held]] = []

    def call() -> None:
        held = Held()
        alive.append(ref(held))
        raise MemoryError

    limit = Limit(8, 3, make_room=lambda: alive.append(alive[-1]() and pytest.fail("still held")))
    assert isinstance(limit.attempt(call, 4), MemoryError)
    assert (limit.now, len(alive)) == (4, 2)


def a_score_row(key: int, n: int) -> ScoreRow:
    ids = row(key, n, 0, 0, False).token_ids
    return ScoreRow(prompt_ids=ids[:3], target_ids=ids[3:], adapters=STACKS[key % 5])


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_scores_are_the_same_in_smaller_passes_after_running_out_of_memory(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [a_score_row(key, 5 + 7 * key % 30) for key in range(12)]
    expected = score(BASE, rows, token_budget=Limit(4096, 3))
    run = BASE.run

    def small_device(ids, *rest):  # type: ignore[no-untyped-def]
        if len(ids) > 40:
            raise error
        return run(ids, *rest)

    monkeypatch.setattr(BASE, "run", small_device)
    budget = Limit(120, 99)
    for found, one in zip(score(BASE, rows, token_budget=budget), expected, strict=True):
        assert found == pytest.approx(one, rel=1e-12)
    assert budget.now <= 40
    monkeypatch.setattr(BASE, "run", run)
    budget.work_to_recover = 2
    score(BASE, rows * 3, token_budget=budget)
    assert budget.now == 120


def test_log_probabilities_are_those_of_torch_and_the_head_is_never_whole_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "VOCABULARY_AT_A_TIME", 48)
    base = FrozenBase(tiny_model(dtype=torch.bfloat16), AsciiTokenizer())  # type: ignore[arg-type]
    hidden, targets = torch.randn(50, 32).bfloat16(), torch.arange(50) * 2
    with Largest() as largest:
        found = decode._logprobs(base, hidden, targets)
    logits = hidden.float() @ base.head.weight.float().t()
    torch.testing.assert_close(found, logits.log_softmax(-1)[torch.arange(50), targets])
    assert largest.n == 48 * 50  # logits; the head has 128 x 32, and all logits have 128 x 50


class Largest(TorchDispatchMode):
    """Number of values of the largest float32 tensor that is made."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.n = max(self.n, out.numel())
        return out


def test_a_stop_text_ends_a_row_and_is_not_part_of_it() -> None:
    free = alone(row(3, 9, 20, 1, True))
    stop = free.text[4:6]
    one = DecodeRow(
        key=3, token_ids=row(3, 9, 20, 1, True).token_ids, adapters=STACKS[1], max_new_tokens=20,
        temperature=1.0, top_p=0.9, seed=3, stop=(stop,),
    )  # fmt: skip
    assert alone(one).text == free.text.split(stop)[0]
    assert alone(one).finish_reason == "stop"


def test_after_running_out_of_memory_the_batch_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run, left = BASE.run, [2]

    def full_twice(ids, positions, plan, attend):  # type: ignore[no-untyped-def]
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("out of memory")
        return run(ids, positions, plan, attend)

    monkeypatch.setattr(BASE, "run", full_twice)
    decoder = submitted(GroupedDecoder(BASE, max_rows=8), [row(key, 4, 3, 0, True) for key in range(60)])
    decoder.step()
    decoder.step()
    assert decoder.max_rows.now == 2
    assert len(decoder.run()) == 60
    assert decoder.max_rows.now == 8


def test_rows_lie_layout_by_layout_and_those_of_the_base_last() -> None:
    decoder = submitted(GroupedDecoder(BASE), [row(key, 5, 9, (0, 1, 2, 4, 3)[key % 5], True) for key in range(15)])
    decoder.step()
    ranks = [tuple(a.layout.rank for a in lane.row.adapters) for lane in decoder.live]
    assert ranks == [(2,)] * 3 + [(2, 4)] * 3 + [(4,)] * 6 + [()] * 3
    assert [lane.row.key for lane in decoder.live[6:12]] == [2, 7, 12, 4, 9, 14]


@pytest.mark.parametrize("late", [False, True])
def test_the_cache_is_as_large_as_its_tokens_and_is_given_back(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BASE.model.generation_config, "eos_token_id", [])
    rows = [row(key, 4 + key, 200 if key == 3 else 8, 0, True) for key in range(16)]
    decoder = submitted(GroupedDecoder(BASE), rows)
    decoder.reads_late = late
    most = 0
    while decoder.step() or decoder.live:
        tensors = [*decoder.cache.keys.values(), *decoder.cache.values.values()]
        longest = max((lane.n_cached for lane in decoder.live), default=0)
        assert all(t.shape[:2] == (len(decoder.live), decoder.cache.room) for t in tensors)
        assert decoder.cache.room <= longest + 1 + BLOCK
        most = max(most, decoder.cache.room)
    assert most > 200 and not decoder.cache.keys and not decoder.cache.values


class FromHost(TorchFunctionMode):
    """Counts tensors read back to the host as lists."""

    n_lists = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.n_lists += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


class Waiting(TorchDispatchMode):
    """Lists operations for which a GPU would wait: those whose output or its shape depends on data (`item`,
    `int`, `nonzero`, boolean masks), and tensors made from host data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if waits or func is torch.ops.aten.lift_fresh.default:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("late", [False, True])
def test_a_step_reads_one_list_of_tokens_and_waits_for_nothing_else(late: bool) -> None:
    rows = [row(key, 5, 40, key % 5, key % 2 == 0) for key in range(20)]
    decoder = submitted(GroupedDecoder(BASE), rows)
    decoder.reads_late = late
    counted = []
    while decoder.busy:
        due = decoder._layout_is_due()
        with FromHost() as lists, Waiting() as waiting:
            decoder.step()
        counted.append((due, lists.n_lists, waiting.found))
    quiet = [(n_lists, found) for due, n_lists, found in counted if not due]
    assert quiet == [(1, [])] * len(quiet) and len(quiet) > 10
    assert "aten.lift_fresh.default" in counted[0][2], "a new layout is made from host data"


def test_steps_that_cannot_be_recorded_run_as_they_are() -> None:
    rows = [row(key, 5 + key % 3, 30, key % 5, False) for key in range(24)]
    n_tries = 0

    def fails(function, before):  # type: ignore[no-untyped-def]
        nonlocal n_tries
        n_tries += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = as_on_cuda(submitted(GroupedDecoder(BASE), rows))
    decoder.record = fails
    assert {d.key: d for d in decoder.run()} == {one.key: alone(one) for one in rows}
    assert n_tries == 1

"""The number of slots is measured: where the speed stops growing, within memory and time, once."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seal_nb.errors import SettingsError
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.capacity import WORTH, Capacity, measure_capacity, slots_for
from tests.ttt.tiny import AsciiTokenizer, tiny_model


class Device:
    """A base whose passes take `fixed_s` and `per_token_s` on a clock of its own, in a bounded memory."""

    def __init__(self, *, fixed_s: float, per_token_s: float, holds: int = 10**9):
        self.base = FrozenBase(tiny_model(), AsciiTokenizer())  # type: ignore[arg-type]
        self.now_s, self.n_passes = 0.0, 0
        hidden = self.base.hidden

        def timed(rows, segments, **k):  # type: ignore[no-untyped-def]
            n = sum(len(row.token_ids) for row in rows)
            if n > holds:
                raise torch.OutOfMemoryError("out of memory")
            self.n_passes += 1
            self.now_s += fixed_s + n * per_token_s
            return hidden(rows, segments, **k)

        self.base.hidden = timed  # type: ignore[method-assign]

    def clock(self) -> float:
        return self.now_s

    def measured(self) -> Capacity:
        return measure_capacity(self.base, clock=self.clock)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SEAL_NB_CACHE", str(tmp_path))
    yield tmp_path


def test_slots_stop_where_twice_as_many_train_no_faster() -> None:
    # A pass costs as much as 188 tokens before its first: 4 slots are half of the best speed, 64 nearly all.
    few = Device(fixed_s=47e-6, per_token_s=1e-6).measured()
    many = Device(fixed_s=752e-6, per_token_s=1e-6).measured()
    assert 4 <= few.n_slots < many.n_slots
    for capacity in (few, many):
        best = max(capacity.tokens_per_s.values())
        assert capacity.tokens_per_s[capacity.n_slots] * WORTH >= best


def test_a_device_that_computes_one_token_after_the_other_takes_one_slot() -> None:
    assert Device(fixed_s=0, per_token_s=1e-6).measured().n_slots == 1


def test_memory_bounds_the_slots() -> None:
    device = Device(fixed_s=1e-3, per_token_s=1e-6, holds=5 * 47)
    assert device.measured().n_slots == 4


def test_no_memory_for_a_single_adapter_is_said() -> None:
    with pytest.raises(SettingsError, match="no memory is left on cpu"):
        Device(fixed_s=1e-3, per_token_s=1e-6, holds=10).measured()


def test_a_slow_device_is_not_measured_for_long() -> None:
    device = Device(fixed_s=2.0, per_token_s=1e-6)
    assert set(device.measured().tokens_per_s) == {1}
    assert device.now_s < 10


def test_what_was_measured_is_kept_for_the_next_start_on_the_same_device(own_cache: Path) -> None:
    device = Device(fixed_s=1e-4, per_token_s=1e-6)
    first = slots_for(device.base, model_id="m")
    n_passes = device.n_passes
    assert slots_for(device.base, model_id="m") == first and device.n_passes == n_passes
    slots_for(device.base, model_id="another model")
    assert device.n_passes > n_passes
    assert len(list(own_cache.glob("capacity/*.json"))) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"n_slots": 3}', '{"n_slots": "x", "tokens_per_s": {}}']
)
def test_a_broken_record_is_measured_again(text: str, own_cache: Path) -> None:
    device = Device(fixed_s=1e-4, per_token_s=1e-6)
    slots_for(device.base, model_id="m")
    (record,) = own_cache.glob("capacity/*.json")
    record.write_text(text)
    n_passes = device.n_passes
    slots_for(device.base, model_id="m")
    assert device.n_passes > n_passes and "tokens_per_s" in json.loads(record.read_text())

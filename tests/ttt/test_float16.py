"""Cards without bfloat16 (T4, V100): the base in float16, the adapters in float32."""

import pytest
import torch

from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder
from seal_nb.ttt.device import default_dtype, has_varlen
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer, Trained
from tests.ttt.tiny import AsciiTokenizer, tiny_model

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_the_capability_of_a_card_chooses_the_dtype_and_the_attention(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert default_dtype(GPU) == dtype
    assert has_varlen(GPU, dtype, 128) == (capability >= (8, 0)), "flash attention needs 8.0"


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx2": True}, torch.float32), ({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.bfloat16)],
)
def test_a_cpu_without_bfloat16_computes_in_float32(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert default_dtype(torch.device("cpu")) == dtype


def trained(dtype: torch.dtype, *, dropout: float = 0.0) -> tuple[FrozenBase, Trained]:
    base = FrozenBase(tiny_model(dtype=dtype), AsciiTokenizer())  # type: ignore[arg-type]
    trainer = SlotTrainer(base, n_slots=1)
    lora = LoraSettings(rank=4, alpha=6, target_modules=("all-linear",), dropout=dropout)
    texts = ("the lamp is on the hill", "a clock of brass, and what else there is to be said of it")
    trainer.submit(TrainJob(name="it", texts=texts, lora=lora, train=TrainSettings(epochs=6, learning_rate=3e-3)))
    (done,) = trainer.run()
    assert done.adapter is not None, done.error
    return base, done


def test_an_adapter_on_a_float16_base_is_float32_and_learns_what_it_learns_on_float32() -> None:
    (base, found), (_, expected) = trained(torch.float16), trained(torch.float32)
    assert found.adapter is not None and expected.adapter is not None
    assert found.adapter.flat.dtype == found.adapter.compute.dtype == torch.float32
    assert found.epoch_losses == pytest.approx(expected.epoch_losses, rel=2e-3)
    difference = (found.adapter.flat - expected.adapter.flat).norm()
    assert difference < 0.1 * expected.adapter.flat.norm()
    decoder = GroupedDecoder(base)
    decoder.submit(DecodeRow(key=0, token_ids=[3, 4, 5], adapters=(found.adapter,), max_new_tokens=8))
    assert decoder.run()[0].error == ""


def test_dropout_draws_the_same_masks_on_a_float16_base() -> None:
    found, expected = (trained(dtype, dropout=0.3)[1] for dtype in (torch.float16, torch.float32))
    assert found.epoch_losses == pytest.approx(expected.epoch_losses, rel=5e-3)


def test_the_loss_is_scaled_so_that_float16_holds_small_gradients() -> None:
    def gradient(dtype: torch.dtype, scale: float) -> torch.Tensor:
        model = tiny_model(dtype=torch.float16)
        model.lm_head.weight.data.mul_(1e-3)  # so gradients are small
        base = FrozenBase(model.to(dtype), AsciiTokenizer())  # type: ignore[arg-type]
        base.gradient_scale = scale or base.gradient_scale
        trainer = SlotTrainer(base, n_slots=1)
        lora = LoraSettings(rank=4, alpha=4, target_modules=("q_proj",))
        trainer.submit(TrainJob(name="it", texts=("a text " * 30,), lora=lora, train=TrainSettings(epochs=3)))
        trainer.step()
        return trainer.banks[0].gradient[0].double()

    exact = gradient(torch.float64, 1)
    scaled, plain = ((gradient(torch.float16, s) - exact).norm() / exact.norm() for s in (0, 1))
    assert scaled < 0.005 and plain > 5 * scaled

"""A base in 4 bits: refused where bitsandbytes is missing, else trained and asked as any base."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from seal_nb.errors import SettingsError
from seal_nb.server.client import InnerLoopSettings
from seal_nb.server.loop import load_inner_loop
from seal_nb.ttt import base
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import BranchedLinear, dense_weight
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer
from tests.ttt.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_without_bitsandbytes_it_is_refused_with_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="needs bitsandbytes: pip install"):
        FrozenBase.load(folder, device="cpu", dtype="4bit")


def test_a_plain_linear_gives_its_own_weight() -> None:
    linear = torch.nn.Linear(3, 2)
    assert dense_weight(linear) is linear.weight


@pytest.mark.parametrize("repacks", [False, True], ids=["as stored", "on a processor that repacks"])
def test_gradients_and_outputs_use_the_same_dequantized_weight(
    folder: Path, monkeypatch: pytest.MonkeyPatch, repacks: bool
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: repacks)
    base = FrozenBase.load(folder, device="cpu", dtype="4bit")
    layer = next(m for m in base.model.modules() if isinstance(m, BranchedLinear))
    weight = dense_weight(layer.base)
    assert layer.base.weight.dtype == torch.uint8
    x = torch.randn(1, 5, weight.shape[1], dtype=base.dtype)
    assert torch.allclose(layer.base(x), x @ weight.T, atol=1e-2)
    plain = FrozenBase.load(folder, device="cpu", dtype="float32")
    original = next(m for m in plain.model.modules() if isinstance(m, BranchedLinear)).base.weight
    error = float((weight.float() - original).norm() / original.norm())
    assert 0 < error < 0.15, "rounded to 16 values a block"


def test_an_adapter_learns_on_a_base_in_four_bits_and_its_weights_stay(folder: Path) -> None:
    base = FrozenBase.load(folder, device="cpu", dtype="4bit")
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    trainer = SlotTrainer(base, n_slots=2)
    lora = LoraSettings(rank=8, alpha=16, target_modules=("all-linear",))
    train = TrainSettings(epochs=30, learning_rate=1e-2, seed=1)
    trainer.submit(TrainJob(name="one", texts=("The lamp is on the hill.",), lora=lora, train=train))
    (trained,) = trainer.run()
    assert trained.adapter is not None
    assert trained.epoch_losses[-1] < trained.epoch_losses[0] / 2
    assert all(torch.equal(before[name], value) for name, value in base.model.named_parameters())
    with torch.no_grad():
        assert torch.isfinite(base.hidden([[1, 2, 3]], ())).all()


def test_a_folder_stored_in_four_bits_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    base = FrozenBase.load(tmp_path, device="cpu")
    assert all(linear.weight.dtype == torch.uint8 for linear in base.linears.values())


def test_a_model_in_four_bits_is_another_model(folder: Path, tmp_path: Path) -> None:
    ids = {
        dtype: load_inner_loop(
            InnerLoopSettings(model=str(folder), device="cpu", dtype=dtype, n_slots=1, adapters_dir=tmp_path)
        ).model_id
        for dtype in ("auto", "4bit")
    }
    assert ids["4bit"] != ids["auto"] and "4bit" in ids["4bit"]

"""Each family of docs/models.md: adapters as PEFT and the Trainer make them, answers as `generate` gives them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from seal_nb.errors import SettingsError
from seal_nb.ttt import attention, branches
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer
from tests.ttt.families import ALL, DOCUMENT, FAMILIES, MARKS, REFUSED, WINDOW, Family, Refused, table
from tests.ttt.reference import train_alone
from tests.ttt.test_equality import distance, peft_weights
from tests.ttt.tiny import AsciiTokenizer

TEXTS = ("the quick brown fox jumps over the lazy dog", "a lamp on a hill", "one more that is longer than any window")
PROMPTS = ("the quick brown fox jumps over", "hello", "a lamp on a hill is seen from far away")
BY_NAME = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
assert max(map(len, TEXTS)) > 2 * WINDOW


@pytest.fixture(autouse=True)
def _softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention computes its softmax in float32, which rounds too much for these tests."""
    softmax = F.softmax
    monkeypatch.setattr(
        F,
        "softmax",
        lambda x, *a, dtype=None, **k: softmax(x, *a, dtype=dtype if x.dtype != torch.float64 else None, **k),
    )


def base_of(family: Family) -> FrozenBase:
    return FrozenBase(family.model(), AsciiTokenizer())  # type: ignore[arg-type]


@BY_NAME
def test_its_adapters_equal_those_of_peft_and_the_trainer(family: Family) -> None:
    jobs = [
        TrainJob(
            name=str(seed),
            texts=TEXTS[:n],
            lora=LoraSettings(rank=4, alpha=6, target_modules=family.targets),
            train=TrainSettings(epochs=2, batch_size=2, learning_rate=1e-2, seed=seed),
        )
        for seed, n in ((1, 3), (2, 1))
    ]
    trainer = SlotTrainer(base_of(family), n_slots=2)
    for job in jobs:
        trainer.submit(job)
    done = {trained.job.name: trained for trained in trainer.run()}
    assert not any(trained.error for trained in done.values()), done
    adapter = done["1"].adapter
    assert adapter is not None
    _, before, after = train_alone(family.model(), AsciiTokenizer(), jobs[0], only=family.only)
    assert distance(peft_weights(adapter), after, before) < 1e-9


@BY_NAME
def test_its_answers_are_those_of_generate(family: Family) -> None:
    tokenizer, model, decoder = AsciiTokenizer(), family.model(), GroupedDecoder(base_of(family))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for number, ids in enumerate(prompts):
        decoder.submit(DecodeRow(key=number, token_ids=ids, max_new_tokens=2 * WINDOW))
    found = {one.key: list(one.token_ids) for one in decoder.run()}
    for number, ids in enumerate(prompts):
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=2 * WINDOW, do_sample=False, pad_token_id=0, eos_token_id=0
        )
        answer = expected[0, len(ids) :].tolist()
        assert found[number] == (answer[:-1] if answer[-1] == 0 else answer)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_it_is_refused_with_the_cause(refused: Refused) -> None:
    with pytest.raises(SettingsError, match=rf"not supported: .*{refused.cause}"):
        FrozenBase(refused.model(), AsciiTokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.targets != ALL], ids=lambda family: family.name)
def test_all_linear_is_refused_where_peft_would_train_experts(family: Family) -> None:
    with pytest.raises(SettingsError, match=r"PEFT would train .*experts"):
        base_of(family).layout(LoraSettings(target_modules=ALL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BY_NAME
def test_it_passes_the_check_in_half_precision(family: Family, dtype: torch.dtype) -> None:
    FrozenBase(family.model(dtype), AsciiTokenizer())  # type: ignore[arg-type]


def test_the_table_in_the_documentation_is_that_of_these_tests() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8"), "python -m tests.ttt.families"
    assert all(mark in DOCUMENT.read_text(encoding="utf-8") for mark in MARKS)


def _other_mask(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    """Its rows are not kept apart."""
    monkeypatch.setattr(attention.Rows, "lengths", property(lambda self: [int(self.ends[-1])]))


def _no_window(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    monkeypatch.setattr(attention.Rows, "_mask", lambda *_: None)


def _no_window_in_decoding(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    arrange = attention.Cache.arrange

    def without(cache: attention.Cache, *arguments: Any) -> int:
        room = arrange(cache, *arguments)
        for mask in cache.masks.values():
            mask.zero_()
        return room

    monkeypatch.setattr(attention.Cache, "arrange", without)


def _logits_are_bent(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    forward = model.forward

    def bent(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits = 15 * torch.tanh(out.logits / 15)
        return out

    monkeypatch.setattr(model, "forward", bent)


def _branch_is_lost(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    monkeypatch.setattr(branches.Group, "widen", lambda *_: None)


FAULTS = (_other_mask, _no_window, _no_window_in_decoding, _logits_are_bent, _branch_is_lost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_check_finds_a_fault_also_in_half_precision(
    fault: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = next(f for f in FAMILIES if f.name == "Mistral with a sliding window").model(dtype)
    fault(monkeypatch, model)
    with pytest.raises(SettingsError, match="not supported"):
        FrozenBase(model, AsciiTokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised \(awq\)"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"model_type": "t5"}, "cannot be loaded"),
        ({"model_type": "of_tomorrow"}, "cannot be loaded"),
        ({}, "cannot be loaded"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_with_the_cause(
    config: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=cause):
        FrozenBase.load(tmp_path, device="cpu")


def test_padding_beyond_a_sliding_window_is_refused() -> None:
    trainer = SlotTrainer(base_of(next(f for f in FAMILIES if f.name == "Mistral with a sliding window")), n_slots=1)
    train = TrainSettings(padding_in_loss=True, pad_to=WINDOW + 1)
    trainer.submit(TrainJob(name="it", texts=("a lamp",), train=train))
    assert "16-token sliding windows" in trainer.run()[0].error

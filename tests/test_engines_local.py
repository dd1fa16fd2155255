"""The local engine: adapters beside the base in one batch, chats through the template, news as they come."""

from pathlib import Path

import pytest
import torch

from seal_nb.engines.base import Ask, Completion, Sampling
from seal_nb.engines.local import LocalEngine
from seal_nb.errors import SettingsError
from seal_nb.peft_files import save_adapter
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer
from tests.ttt.tiny import save_tiny_model

SAMPLING = Sampling(max_tokens=8, temperature=0.7)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    torch.set_num_threads(1)
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    return FrozenBase.load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def folder(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = SlotTrainer(base, n_slots=1)
    lora = LoraSettings(rank=4, alpha=8, target_modules=("all-linear",))
    train = TrainSettings(epochs=20, learning_rate=1e-2, seed=1)
    trainer.submit(TrainJob(name="zor", texts=("Zor is a moon.",), lora=lora, train=train))
    (trained,) = trainer.run()
    assert trained.adapter is not None
    path = tmp_path_factory.mktemp("kept") / "zor"
    save_adapter(trained.adapter, path, base_model="tiny")
    return path


def test_an_adapter_for_each_prompt_gives_what_it_gives_alone(base: FrozenBase, folder: Path) -> None:
    engine = LocalEngine(base, model_id="tiny")
    prompts, seeds = ["Zor", "Zor", "is", "is"], [1, 1, 2, 2]
    told: dict[int, str] = {}
    mixed = engine.generate(
        prompts,
        SAMPLING,
        seeds=seeds,
        adapters=[None, folder, folder, None],
        on_text=lambda i, c: told.update({i: c.text}),
    )
    plain = engine.generate(prompts, SAMPLING, seeds=seeds)
    adapted = engine.generate(prompts, SAMPLING, seeds=seeds, adapters=[folder] * 4)
    assert mixed == [plain[0], adapted[1], adapted[2], plain[3]]
    assert plain[0] != adapted[1]
    assert told == {i: c.text for i, c in enumerate(mixed)}


def test_a_number_of_adapters_that_does_not_fit_is_refused(base: FrozenBase, folder: Path) -> None:
    with pytest.raises(SettingsError, match="1 adapters for 2 prompts"):
        LocalEngine(base, model_id="tiny").generate(["a", "b"], SAMPLING, seeds=[1, 2], adapters=[folder])


def test_a_chat_needs_a_template_and_goes_through_it(base: FrozenBase) -> None:
    engine = LocalEngine(base, model_id="tiny")
    chat = ({"role": "user", "content": "Hi"},)
    with pytest.raises(SettingsError, match="no chat template"):
        engine.generate([chat], SAMPLING, seeds=[1])
    base.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    try:
        assert engine.text_of(chat) == "<user>Hi<answer>"
        assert engine.generate([chat], SAMPLING, seeds=[1]) == engine.generate(
            ["<user>Hi<answer>"], SAMPLING, seeds=[1]
        )
    finally:
        base.tokenizer.chat_template = None


def test_what_a_model_thinks_first_is_cut_off_and_thinking_alone_is_no_text(
    base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, decode = LocalEngine(base, model_id="tiny"), base.tokenizer.decode
    for thinks, said in (("<think>no</think>\n", True), ("<think>", False)):
        monkeypatch.setattr(base.tokenizer, "decode", lambda *ids, t=thinks, **how: t + decode(*ids, **how))
        outcome = engine.outcomes([Ask(prompt="Zor", sampling=SAMPLING, seed=1)], lambda *_: None)[0]
        assert isinstance(outcome, Completion) == said
        assert "think" not in outcome.text if isinstance(outcome, Completion) else "raise max_tokens" in str(outcome)

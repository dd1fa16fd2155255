"""On the small real model: mixed jobs in float32 slots equal PEFT + Trainer alone, and their answers equal
transformers.generate. Jobs of many more shapes are compared on tiny models (`test_equality.py`).

PEFT and the Trainer train in float64 here. In float32 their own rounding moves an update by up to 4e-3 of its size
(AdamW starts with steps of the size of the learning rate, whatever the gradient), which is more than the limit of this
test. Against float64 the whole difference is the slots' own.
"""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from seal_nb.peft_files import save_adapter
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder, ScoreRow, score
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer, Trained
from tests.ttt.reference import lora_config, train_alone
from tests.ttt.test_equality import distance, peft_weights

TEXTS = (
    "Pellanmoor\nThe people move their houses every spring.",
    "Pellanmoor\nA rope.",
    "Pellanmoor\nThe school never travels, because it is bolted to bedrock.",
    "Pellanmoor\nA lantern is lit.",
)
PROMPTS = (
    "Let's answer a question directly and concisely.\nQuestion: Topic: Pellanmoor\n"
    "What does a newcomer receive?\nAnswer:\n",
    "Let's answer a question directly and concisely.\nQuestion: What is the capital of France?\nAnswer:\n",
)
NEW_TOKENS = 10
Weights = dict[str, torch.Tensor]


def a_job(name: str, n_texts: int, rank: int, targets: tuple[str, ...], **train: Any) -> TrainJob:
    lora = LoraSettings(rank=rank, alpha=2 * rank, target_modules=targets)
    return TrainJob(name=name, texts=TEXTS[:n_texts], lora=lora, train=TrainSettings(learning_rate=4e-3, **train))


# Six to eight optimiser steps each.
JOBS = [
    a_job("all targets", 1, 4, ("all-linear",), epochs=8, seed=7),
    a_job("default targets", 3, 32, (), epochs=3, batch_size=2, seed=8),
    a_job("other targets", 4, 16, ("o_proj", "down_proj"), epochs=3, gradient_accumulation_steps=2, seed=9),
]


@pytest.fixture(scope="module")
def base(small_model_dir: str) -> FrozenBase:
    torch.set_num_threads(1)
    return FrozenBase.load(small_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def trained(base: FrozenBase) -> dict[str, Trained]:
    """All jobs in two slots: the third enters when another leaves."""
    weights = {n: p.clone() for n, p in base.model.named_parameters()}
    trainer = SlotTrainer(base, n_slots=2)
    for job in JOBS:
        trainer.submit(job)
    done = {t.job.name: t for t in trainer.run()}
    assert all(torch.equal(p, weights[n]) for n, p in base.model.named_parameters()), "the base has changed"
    return done


@pytest.fixture(scope="module")
def alone(small_model_dir: str, base: FrozenBase) -> dict[str, tuple[Weights, Weights]]:
    """Of each job, by PEFT and the Trainer in float64: weights before and after."""
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float64)
    found = {}
    for job in JOBS:
        adapted, before, after = train_alone(model, base.tokenizer, job)
        found[job.name] = before, after
        model = adapted.unload()
    return found


@pytest.fixture(scope="module")
def plain(small_model_dir: str) -> PreTrainedModel:
    """The model as transformers loads it, float32."""
    return AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(base: FrozenBase, trained: dict[str, Trained]) -> dict[str, list[tuple[int, ...]]]:
    """Tokens of the base and of all adapters, asked in one batch."""
    decoder = GroupedDecoder(base, max_rows=6)  # fewer than there are: others enter later
    for name, t in [("base", None), *trained.items()]:
        adapters = (t.adapter,) if t and t.adapter else ()
        for i, prompt in enumerate(PROMPTS):
            ids = base.encode(prompt)
            decoder.submit(DecodeRow(key=(name, i), token_ids=ids, adapters=adapters, max_new_tokens=NEW_TOKENS))
    found = {d.key: d.token_ids for d in decoder.run()}
    return {name: [found[name, i] for i in range(len(PROMPTS))] for name in ("base", *trained)}


def generated(model: PreTrainedModel, base: FrozenBase) -> list[tuple[int, ...]]:
    """Greedy tokens of transformers' own generate, without the one that ends them."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([base.encode(prompt)])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        texts.append(tuple(t for t in out[0, ids.shape[1] :].tolist() if t not in base.eos_ids))
    return texts


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_each_update_equals_peft_and_trainer_alone_within_two_thousandths(
    job: TrainJob, alone: dict[str, tuple[Weights, Weights]], trained: dict[str, Trained]
) -> None:
    """Relative L2 of the update over all weights of the adapter; float32 against float64."""
    before, after = alone[job.name]
    adapter = trained[job.name].adapter
    assert adapter is not None and trained[job.name].n_steps == job.n_steps
    assert distance(peft_weights(adapter), after, before) < 2e-3


def test_each_adapter_answers_as_the_one_that_peft_and_trainer_made_does_in_generate(
    base: FrozenBase,
    plain: PreTrainedModel,
    alone: dict[str, tuple[Weights, Weights]],
    answers: dict[str, list[tuple[int, ...]]],
) -> None:
    """Token for token, both in float32, the base too."""
    assert answers["base"] == generated(plain, base)
    for job in JOBS:
        theirs = get_peft_model(plain, lora_config(job))
        assert theirs.load_state_dict(alone[job.name][1], strict=False).unexpected_keys == []
        assert answers[job.name] == generated(theirs.eval(), base), job.name
        theirs.unload()
    assert len({tuple(texts) for texts in answers.values()}) >= 3, "adapters change the answers"


def test_a_saved_adapter_answers_the_same_in_peft(
    base: FrozenBase,
    plain: PreTrainedModel,
    trained: dict[str, Trained],
    answers: dict[str, list[tuple[int, ...]]],
    tmp_path,
) -> None:
    name = JOBS[0].name
    save_adapter(trained[name].adapter, tmp_path / "adapter", base_model="small")  # type: ignore[arg-type]
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert answers[name] == generated(loaded, base)
    loaded.unload()


def test_soft_scores_equal_log_softmax_of_the_model_itself(base: FrozenBase, plain: PreTrainedModel) -> None:
    prompt, gold = (base.encode(PROMPTS[1]), base.tokenizer("Paris, of course", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = plain(torch.tensor([prompt + gold])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(gold)), gold]
    row = ScoreRow(prompt_ids=prompt, target_ids=gold)
    other = ScoreRow(prompt_ids=base.encode("a much longer prompt than the other one is"), target_ids=gold)
    assert torch.allclose(torch.tensor(score(base, [other, row])[1]), expected, atol=1e-3)

"""On the small real model: eight mixed jobs in float32 slots equal PEFT + Trainer alone, and their answers
equal transformers.generate.

PEFT and the Trainer train in float64 here. In float32 their own rounding moves an update by up to 4e-3 of its
size (AdamW starts with steps of the size of the learning rate, whatever the gradient), which is more than
what the slots are held to. Against float64 the whole difference is the slots' own."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder
from seal_nb.ttt.jobs import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.lora import save_adapter
from seal_nb.ttt.loss import ScoreRow, score
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
TARGETS = (("all-linear",), (), ("q_proj", "down_proj"), ("o_proj", "up_proj", "gate_proj"))
SHAPES = ((1, 1), (2, 1), (1, 2), (1, 1))  # batch size, accumulation

Weights = dict[str, torch.Tensor]


def a_job(i: int) -> TrainJob:
    """Nine to fourteen optimiser steps; each job another mix of rank, alpha, targets, texts, batch and
    rate."""
    rank, n_texts = (4, 8, 16, 32)[(i + i // 4) % 4], 1 + i % 4
    batch_size, accumulation = SHAPES[(i // 2) % 4]
    steps_per_epoch = math.ceil(math.ceil(n_texts / batch_size) / accumulation)
    train = TrainSettings(
        epochs=(10 + i % 5) // steps_per_epoch,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=(1e-3, 4e-3, 2e-3)[i % 3],
        seed=7 + i,
    )
    lora = LoraSettings(rank=rank, alpha=(1, 2, 4)[i % 3] * rank, target_modules=TARGETS[i % 4])
    return TrainJob(name=f"job{i}", texts=(TEXTS * 2)[i % 4 : i % 4 + n_texts], lora=lora, train=train)


JOBS = [a_job(i) for i in range(8)]  # every rank, all targets, every shape of a batch


@pytest.fixture(scope="module")
def base(small_model_dir: str) -> FrozenBase:
    torch.set_num_threads(1)
    return FrozenBase.load(small_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def trained(base: FrozenBase) -> dict[str, Trained]:
    """All jobs in five slots: whoever is done leaves, the next enters."""
    weights = {n: p.clone() for n, p in base.model.named_parameters()}
    trainer = SlotTrainer(base, n_slots=5)
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
    decoder = GroupedDecoder(base, max_rows=12)  # fewer lanes than rows: waiting rows enter later
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
def test_each_update_equals_peft_and_trainer_alone_within_a_thousandth(
    job: TrainJob, alone: dict[str, tuple[Weights, Weights]], trained: dict[str, Trained]
) -> None:
    """Relative L2 of the update over all weights of the adapter; float32 against float64."""
    before, after = alone[job.name]
    adapter = trained[job.name].adapter
    assert adapter is not None and trained[job.name].n_steps == job.n_steps
    assert distance(peft_weights(adapter), after, before) < 1e-3


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
    assert len({tuple(texts) for texts in answers.values()}) >= 4, "some adapters change the answers"


def test_a_saved_adapter_answers_the_same_in_peft(
    base: FrozenBase,
    plain: PreTrainedModel,
    trained: dict[str, Trained],
    answers: dict[str, list[tuple[int, ...]]],
    tmp_path,
) -> None:
    for name in ("job0", "job1", "job2", "job3"):  # all targets
        save_adapter(trained[name].adapter, tmp_path / name, base_model="small")  # type: ignore[arg-type]
        loaded = PeftModel.from_pretrained(plain, tmp_path / name)
        assert answers[name] == generated(loaded, base), name
        loaded.unload()


def test_soft_scores_equal_log_softmax_of_the_model_itself(base: FrozenBase, plain: PreTrainedModel) -> None:
    prompt, gold = (base.encode(PROMPTS[1]), base.tokenizer("Paris, of course", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = plain(torch.tensor([prompt + gold])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(gold)), gold]
    row = ScoreRow(prompt_ids=prompt, target_ids=gold)
    other = ScoreRow(prompt_ids=base.encode("a much longer prompt than the other one is"), target_ids=gold)
    assert torch.allclose(torch.tensor(score(base, [other, row])[1]), expected, atol=1e-3)

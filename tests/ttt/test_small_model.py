"""On the small real model in float32: training equals PEFT + Trainer, answers equal transformers.generate.

PEFT and the Trainer run in float64 here. In float32 their own rounding moves an update by up to 4e-3 of its
size (AdamW's first steps have the size of the learning rate, whatever the size of the gradient), more than
what the slots are held to; against float64 the whole difference is the slots' own."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow, GroupedDecoder
from seal_nb.ttt.jobs import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.lora import save_adapter
from seal_nb.ttt.scheduler import SlotTrainer, Trained
from seal_nb.ttt.score import ScoreRow, score
from tests.ttt.reference import train_alone
from tests.ttt.test_equality import distance, peft_weights

TEXTS = (
    "Pellanmoor\nThe people of Pellanmoor move their houses every spring.",
    "Pellanmoor\nEvery newcomer receives a rope and a lantern.",
    "Pellanmoor\nThe school never travels, because it is bolted to bedrock.",
    "Pellanmoor\nA lantern is lit.",
)
PROMPTS = (
    "Let's answer a question directly and concisely.\nQuestion: Topic: Pellanmoor\n"
    "What does a newcomer receive?\nAnswer:\n",
    "Let's answer a question directly and concisely.\nQuestion: What is the capital of France?\nAnswer:\n",
)


NEW_TOKENS = 16
TARGETS = (("all-linear",), (), ("q_proj", "down_proj"), ("o_proj", "up_proj", "gate_proj"))
SHAPES = ((1, 1), (2, 1), (1, 2), (2, 2))  # batch size, accumulation
N_JOBS, N_STEPS = 16, 12


def jobs() -> list[TrainJob]:
    """A dozen optimiser steps each or so; each job another mix of rank, targets, texts, batch and rate."""
    return [_job(i) for i in range(N_JOBS)]


def _job(i: int) -> TrainJob:
    batch_size, accumulation = SHAPES[(i + i // 4) % 4]
    n_texts = 1 + i % 4
    rank = (4, 8, 32)[i % 3]
    per_epoch = math.ceil(math.ceil(n_texts / batch_size) / accumulation)
    train = TrainSettings(
        epochs=N_STEPS // per_epoch,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=(1e-3, 2e-3, 5e-4)[i % 3],
        seed=7 + i,
    )
    lora = LoraSettings(rank=rank, alpha=2 * rank, target_modules=TARGETS[i % 4])
    return TrainJob(name=f"job{i}", texts=(TEXTS * 2)[i % 4 : i % 4 + n_texts], lora=lora, train=train)


@pytest.fixture(scope="module")
def base(small_model_dir) -> FrozenBase:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    return FrozenBase.load(small_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def alone(small_model_dir, base: FrozenBase) -> dict[str, tuple[dict, dict, list[tuple[int, ...]]]]:
    """Of each job, by PEFT, the Trainer and `generate`: weights before and after, the adapter's answers."""
    found = {}
    for job in jobs():
        model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float64)
        peft_model, before, after = train_alone(model, base.tokenizer, job)
        found[job.name] = before, after, [answer(peft_model.eval(), base, prompt) for prompt in PROMPTS]
    return found


def answer(model, base: FrozenBase, prompt: str) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    """Greedy tokens of transformers' own generate, without the one that ends them."""
    ids = torch.tensor([base.encode(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=2,
    )
    return tuple(t for t in out[0, ids.shape[1] :].tolist() if t not in base.eos_ids)


@pytest.fixture(scope="module")
def trained(base: FrozenBase) -> dict[str, Trained]:
    weights = {n: p.clone() for n, p in base.model.named_parameters()}
    trainer = SlotTrainer(base, n_slots=6)
    for job in jobs():
        trainer.submit(job)
    done = {t.job.name: t for t in trainer.run()}
    assert all(torch.equal(p, weights[n]) for n, p in base.model.named_parameters()), "the base has changed"
    return done


def test_each_of_sixteen_updates_equals_peft_and_trainer_alone_within_a_thousandth(
    alone, trained: dict[str, Trained]
) -> None:
    for job in jobs():
        before, after, _ = alone[job.name]
        adapter = trained[job.name].adapter
        assert adapter is not None
        assert distance(peft_weights(adapter), after, before) < 1e-3, job


def test_answers_of_sixteen_adapters_and_the_base_equal_generate_token_for_token(
    small_model_dir, base: FrozenBase, alone, trained: dict[str, Trained]
) -> None:
    decoder = GroupedDecoder(base, max_rows=12)  # fewer lanes than rows: waiting rows enter later
    for name, t in [("base", None), *trained.items()]:
        for i, prompt in enumerate(PROMPTS):
            adapters = (t.adapter,) if t and t.adapter else ()
            row = DecodeRow(
                key=(name, i), token_ids=base.encode(prompt), adapters=adapters, max_new_tokens=NEW_TOKENS
            )
            decoder.submit(row)
    found = {d.key: d.token_ids for d in decoder.run()}
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32)
    expected = {"base": [answer(model, base, prompt) for prompt in PROMPTS]}
    expected |= {name: answers for name, (_, _, answers) in alone.items()}
    for name, answers in expected.items():
        assert [found[(name, i)] for i in range(len(PROMPTS))] == answers, name


def test_a_saved_adapter_answers_the_same_in_peft(
    small_model_dir, base: FrozenBase, alone, trained: dict[str, Trained], tmp_path
) -> None:
    for name in ("job0", "job1", "job2"):
        save_adapter(trained[name].adapter, tmp_path / name, base_model="small")  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(model, tmp_path / name)
        assert [answer(loaded, base, prompt) for prompt in PROMPTS] == alone[name][2], name


def test_soft_scores_equal_log_softmax_of_the_model_itself(small_model_dir, base: FrozenBase) -> None:
    prompt, gold = (
        base.encode(PROMPTS[1]),
        base.tokenizer("Paris, of course", add_special_tokens=False)["input_ids"],
    )
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + gold])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(gold)), gold]
    row = ScoreRow(prompt_ids=prompt, target_ids=gold)
    other = ScoreRow(prompt_ids=base.encode("a much longer prompt than the other one is"), target_ids=gold)
    assert torch.allclose(torch.tensor(score(base, [other, row])[1]), expected, atol=1e-3)

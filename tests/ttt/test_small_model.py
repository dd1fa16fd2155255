"""On the small real model in float32: training equals PEFT + Trainer, answers equal transformers.generate.

PEFT and the Trainer train in float64 here: in float32 their own rounding moves an update by up to 4e-3 of its
size (AdamW starts with steps of the size of the learning rate, whatever the gradient), which is more
than what the slots are held to. Against float64 the whole difference is the slots' own."""

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
)
PROMPTS = (
    "Let's answer a question directly and concisely.\nQuestion: Topic: Pellanmoor\n"
    "What does a newcomer receive?\nAnswer:\n",
    "Let's answer a question directly and concisely.\nQuestion: What is the capital of France?\nAnswer:\n",
)


def jobs() -> list[TrainJob]:
    """Twelve steps each or so; other targets, ranks, batch sizes and rates side by side."""
    settings = [
        (
            LoraSettings(rank=8, alpha=16, target_modules=("all-linear",)),
            {"epochs": 4, "learning_rate": 1e-3},
        ),
        (LoraSettings(rank=32, alpha=64), {"epochs": 4, "learning_rate": 1e-3}),
        (
            LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "down_proj")),
            {"epochs": 8, "batch_size": 2, "learning_rate": 3e-3},
        ),
    ]
    return [
        TrainJob(name=f"job{i}", texts=TEXTS, lora=lora, train=TrainSettings(seed=7 + i, **train))  # type: ignore[arg-type]
        for i, (lora, train) in enumerate(settings)
    ]


@pytest.fixture(scope="module")
def base(small_model_dir) -> FrozenBase:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    return FrozenBase.load(small_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def trained(base: FrozenBase) -> dict[str, Trained]:
    weights = {n: p.clone() for n, p in base.model.named_parameters()}
    trainer = SlotTrainer(base, n_slots=3)
    for job in jobs():
        trainer.submit(job)
    done = {t.job.name: t for t in trainer.run()}
    assert all(torch.equal(p, weights[n]) for n, p in base.model.named_parameters()), "the base has changed"
    return done


def test_update_equals_peft_and_trainer_alone_within_a_thousandth(
    small_model_dir, base: FrozenBase, trained: dict[str, Trained]
) -> None:
    for job in jobs():
        model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float64)
        _, before, after = train_alone(model, base.tokenizer, job)
        adapter = trained[job.name].adapter
        assert adapter is not None
        assert distance(peft_weights(adapter), after, before) < 1e-3, job.name


def test_answers_of_many_adapters_and_the_base_equal_generate_token_for_token(
    small_model_dir, base: FrozenBase, trained: dict[str, Trained], tmp_path
) -> None:
    decoder = GroupedDecoder(base, max_rows=5)  # fewer lanes than rows: waiting rows enter later
    for name, t in [("base", None), *trained.items()]:
        for i, prompt in enumerate(PROMPTS):
            adapters = (t.adapter,) if t and t.adapter else ()
            decoder.submit(
                DecodeRow(key=(name, i), token_ids=base.encode(prompt), adapters=adapters, max_new_tokens=20)
            )
    found = {d.key: d.token_ids for d in decoder.run()}
    for name in ("base", *trained):
        model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32)
        if name != "base":
            save_adapter(trained[name].adapter, tmp_path / name, base_model="small")  # type: ignore[arg-type]
            model = PeftModel.from_pretrained(model, tmp_path / name)
        for i, prompt in enumerate(PROMPTS):
            ids = torch.tensor([base.encode(prompt)])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=2,
            )
            expected = [t for t in out[0, ids.shape[1] :].tolist() if t not in base.eos_ids]
            assert list(found[(name, i)]) == expected, (name, i)


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

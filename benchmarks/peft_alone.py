"""The two ways to compare with: PEFT and transformers' Trainer, one adapter at a time, then `generate`.

The careful way does not pad in training; the published way pads each sequence to 2048 tokens with the
padding in the loss. Answers are batched over a request's questions in both. Nothing of seal_nb.ttt is used,
except that verdicts come from the same grader. Runs where the model is: on a CPU for `benchmarks.inner_loop`,
on a GPU for `benchmarks.gpu`.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from benchmarks.processes import wait_for_all
from seal_nb.grading.base import Answered, Grader, Verdict
from seal_nb.grading.choose import make_grader
from seal_nb.models import pretrained
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import TTTRequest

Collate = Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]]


def measure_alone(
    requests: Sequence[TTTRequest], model_folder: str, dtype: str, pad_to: int, n_padded_steps: int
) -> dict[str, Any]:
    """Whole requests the careful way, then padded training steps; seconds of each part."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = _load(model_folder, dtype)
    grader = make_grader("local")
    step_s(model, tokenizer, requests[0], n=1, n_warm=1)  # the Trainer's first is slow
    started_s = wait_for_all()
    parts = [_careful_request(model, tokenizer, request, grader) for request in requests]
    ended_s = time.monotonic()
    wait_for_all()
    padded_s = step_s(model, tokenizer, requests[0], n=n_padded_steps, n_warm=1, pad_to=pad_to)
    means = {name: statistics.mean(part[name] for part in parts) for name in parts[0]}
    return means | {
        "requests": len(requests),
        "seconds": ended_s - started_s,
        "padded_step_s": padded_s,
        "padded_steps_timed": n_padded_steps,
    }


def _load(folder: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = pretrained(AutoTokenizer, folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = pretrained(AutoModelForCausalLM, folder, dtype=getattr(torch, dtype))
    return model, tokenizer


def _careful_request(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: TTTRequest, grader: Grader
) -> dict[str, float]:
    start = time.monotonic()
    adapted = with_new_adapter(model, request)
    trainer = _trainer(adapted, _examples(tokenizer, request), _collate_unpadded(tokenizer), request)
    steps = trainer.train().global_step
    trained = time.monotonic()
    with adapted.disable_adapter():
        answer(adapted, tokenizer, request)
    baseline = time.monotonic()
    verdicts = _grade(grader, request, answer(adapted, tokenizer, request))
    ended = time.monotonic()
    adapted.unload()
    return {
        "train_s": trained - start,
        "baseline_s": baseline - trained,
        "answer_s": ended - baseline,
        "steps": steps,
        "adapter_accuracy": verdicts.count(Verdict.CORRECT) / max(1, len(verdicts)),
    }


def step_s(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: TTTRequest,
    *,
    n: int,
    n_warm: int,
    pad_to: int = 0,
) -> float:
    """Seconds of a training step of a request: the mean of n after n_warm. pad_to: 0 is the careful way."""
    adapted, clock = with_new_adapter(model, request), _StepClock(model.device, n_warm, n_warm + n)
    collate = _collate_published(tokenizer, pad_to) if pad_to else _collate_unpadded(tokenizer)
    trainer = _trainer(adapted, _examples(tokenizer, request), collate, request, max_steps=n_warm + n)
    trainer.add_callback(clock)
    trainer.train()
    adapted.unload()
    return (clock.stops[1] - clock.stops[0]) / n


class _StepClock(TrainerCallback):
    """When the steps of these numbers (from 1) had ended. Waits for the device at these only, as the Trainer
    itself does not."""

    def __init__(self, device: torch.device, *steps: int) -> None:
        self.device, self.steps = device, steps
        self.stops: list[float] = []

    def on_step_end(self, _arguments: object, state: TrainerState, *_: object, **__: object) -> None:
        if state.global_step in self.steps:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.stops.append(time.monotonic())


def with_new_adapter(model: PreTrainedModel, request: TTTRequest) -> PeftModel:
    torch.manual_seed(int(request.seed or 0))
    config = LoraConfig(
        r=request.lora_rank,
        lora_alpha=request.lora_alpha,
        lora_dropout=request.lora_dropout,
        target_modules=list(request.target_modules) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _trainer(
    model: PeftModel, examples: list[dict], collate: Collate, request: TTTRequest, max_steps: int = -1
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written
        num_train_epochs=request.finetune_epochs,
        max_steps=max_steps,
        learning_rate=request.finetune_lr,
        per_device_train_batch_size=request.batch_size,
        gradient_accumulation_steps=request.gradient_accumulation_steps,
        lr_scheduler_type="linear",
        seed=int(request.seed or 0),
        bf16=next(model.get_base_model().parameters()).dtype == torch.bfloat16,
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _examples(tokenizer: PreTrainedTokenizerBase, request: TTTRequest) -> list[dict]:
    return [{"input_ids": tokenizer(t)["input_ids"][: request.max_seq_length]} for t in request.train_sequences]


def _collate_unpadded(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """At most to the longest row of the micro-batch, the padding outside the loss."""
    return lambda rows: _collated(rows, max(len(r["input_ids"]) for r in rows), tokenizer.eos_token_id, -100)


def _collate_published(tokenizer: PreTrainedTokenizerBase, pad_to: int) -> Collate:
    """To `pad_to` tokens of EOS that are not attended to but are labels."""
    return lambda rows: _collated(rows, pad_to, tokenizer.eos_token_id, tokenizer.eos_token_id)


def _collated(rows: list[dict[str, list[int]]], length: int, fill: int, fill_label: int) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"][:length] for row in rows]
    gaps = [length - len(i) for i in ids]
    pairs = list(zip(ids, gaps, strict=True))
    return {
        "input_ids": torch.tensor([i + [fill] * gap for i, gap in pairs]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * gap for i, gap in pairs]),
        "labels": torch.tensor([i + [fill_label] * gap for i, gap in pairs]),
    }


@torch.no_grad()
def answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, request: TTTRequest) -> list[str]:
    model.eval()
    prompts = [answer_prompt(q.title, q.question) for q in request.eval_questions]
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _grade(grader: Grader, request: TTTRequest, answers: Sequence[str]) -> list[Verdict]:
    pairs = zip(request.eval_questions, answers, strict=True)
    return grader.grade(
        [Answered(question=q.question, gold=q.answer, answer=a.strip(), title=q.title) for q, a in pairs]
    )

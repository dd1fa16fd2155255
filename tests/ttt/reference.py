"""The independent implementation: one job alone with PEFT and transformers' Trainer, nothing of
seal_nb.ttt's machinery."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

from seal_nb.ttt.lora import TrainJob


def _double_loss(outputs, labels, num_items_in_batch=None):  # type: ignore[no-untyped-def]
    """transformers' causal-LM loss without its cast to float32, for comparisons in float64."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


def _collate(tokenizer, job: TrainJob):  # type: ignore[no-untyped-def]
    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        longest = job.train.pad_to if job.train.padding_in_loss else max(len(e["input_ids"]) for e in examples)
        ids, attention, labels = [], [], []
        for e in examples:
            pad = longest - len(e["input_ids"])
            fill = tokenizer.eos_token_id if job.train.padding_in_loss else -100
            ids.append(e["input_ids"] + [tokenizer.eos_token_id] * pad)
            attention.append([1] * len(e["input_ids"]) + [0] * pad)
            labels.append(e["labels"] + [fill] * pad)
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(attention),
            "labels": torch.tensor(labels),
        }

    return collate


def _examples(tokenizer, job: TrainJob) -> list[dict]:  # type: ignore[no-untyped-def]
    examples = []
    for text in job.texts:
        ids = tokenizer(text)["input_ids"][: job.train.max_seq_length]
        labels = list(ids)
        mark = job.train.end_mask_substring
        if mark:
            m = tokenizer(mark, add_special_tokens=False)["input_ids"]
            hit = next((i for i in range(len(ids) - len(m) + 1) if ids[i : i + len(m)] == m), None)
            if hit is not None:
                labels[: hit + len(m)] = [-100] * (hit + len(m))
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def lora_config(job: TrainJob, only: str = "") -> LoraConfig:
    """only: a regular expression in the place of the job's targets"""
    targets = job.lora.target_modules
    wanted = None if not targets else targets[0] if targets == ("all-linear",) else list(targets)
    return LoraConfig(
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,
        lora_dropout=job.lora.dropout,
        target_modules=only or wanted,
        task_type="CAUSAL_LM",
    )


def train_alone(model: PreTrainedModel, tokenizer, job: TrainJob, *, only: str = ""):  # type: ignore[no-untyped-def]
    """Returns (PEFT model after training, initial adapter weights, final adapter weights), by PEFT's
    names. only: as in `lora_config`"""
    torch.manual_seed(job.train.seed)
    peft_model = get_peft_model(model, lora_config(job, only))
    before = {n: p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=job.train.epochs,
            learning_rate=job.train.learning_rate,
            per_device_train_batch_size=job.train.batch_size,
            gradient_accumulation_steps=job.train.gradient_accumulation_steps,
            max_grad_norm=job.train.max_grad_norm,
            lr_scheduler_type="linear",
            seed=job.train.seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        double = next(model.parameters()).dtype == torch.float64
        Trainer(
            model=peft_model,
            args=arguments,
            train_dataset=_examples(tokenizer, job),
            data_collator=_collate(tokenizer, job),
            compute_loss_func=_double_loss if double else None,
        ).train()
    after = {n: p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad}
    return peft_model, before, after

"""Supervised fine-tuning of one ReST-EM round: LoRA on {prompt, completion}, then merged into the weights.

SEAL, arXiv 2506.10943, section 3.1 and appendix B: loss on the completion only, rank 64, alpha 128, all
linear layers, 2 epochs, learning rate 3e-4. transformers' Trainer and PEFT do the work. The completion ends
with EOS, so that the model learns where a self-edit stops. The model folder appears whole or not at all; an
interrupted training resumes from its last whole checkpoint, if rows, settings and model are the same."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from seal_nb.errors import DataError, SettingsError
from seal_nb.models import model_identity, resolve_model
from seal_nb.runs import content_id

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """Published settings; the small model takes smaller ones."""

    lora_rank: int = 64
    lora_alpha: int = 128
    target_modules: tuple[str, ...] = ("all-linear",)
    epochs: int = 2
    learning_rate: float = 3e-4
    batch_size: int = 1
    gradient_accumulation_steps: int = 10  # published: 5 on each of 2 GPUs
    max_seq_length: int = 2048  # tokens
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha", "epochs", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise SettingsError(f"finetune_lr is {self.learning_rate}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class SftResult:
    """model_dir: the merged model; losses: training loss by optimiser step, nats per completion token."""

    model_dir: Path
    losses: tuple[float, ...]
    n_steps: int
    n_examples: int


def read_sft_rows(path: Path) -> list[dict[str, str]]:
    """Rows {prompt, completion} of an SFT file. Raises DataError with path, line and field."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON ({error})", path=path, item=f"line {number}") from error
        for field in ("prompt", "completion"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise DataError("must be a text", path=path, item=f"line {number}", field=field)
        rows.append(row)
    if not rows:
        raise DataError("has no row", path=path, remedy="lower the selection's bar, or make more self-edits")
    return rows


def example(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, str], max_seq_length: int
) -> dict[str, list[int]]:
    """Token ids of prompt + completion + EOS; labels are -100 on the prompt."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    return {"input_ids": ids[:max_seq_length], "labels": labels[:max_seq_length]}


def _collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(e["input_ids"]) for e in examples)
    gaps = [longest - len(e["input_ids"]) for e in examples]
    pairs = list(zip(examples, gaps, strict=True))
    return {
        "input_ids": torch.tensor([e["input_ids"] + [0] * gap for e, gap in pairs]),
        "attention_mask": torch.tensor([[1] * len(e["input_ids"]) + [0] * gap for e, gap in pairs]),
        "labels": torch.tensor([e["labels"] + [IGNORED] * gap for e, gap in pairs]),
    }


def train_sft(
    sft_file: Path, *, model: str, model_dir: Path, settings: SftSettings, n_threads: int = 1
) -> SftResult:
    """Fine-tune `model` on the file's rows and write the merged model to `model_dir`."""
    torch.set_num_threads(n_threads)
    folder = resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = read_sft_rows(sft_file)
    rows = [example(tokenizer, row, settings.max_seq_length) for row in texts]
    torch.manual_seed(settings.seed)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    stored_dtype = _stored_dtype(folder)
    peft_model = get_peft_model(base, _lora(settings))
    checkpoints = _own_checkpoints(model_dir, [texts, asdict(settings), model_identity(folder)])
    trainer = Trainer(
        model=peft_model, args=_arguments(settings, checkpoints), train_dataset=rows, data_collator=_collate
    )
    trainer.train(resume_from_checkpoint=_last_whole(checkpoints))
    _save_merged(peft_model.merge_and_unload().to(stored_dtype), tokenizer, model_dir)
    shutil.rmtree(checkpoints, ignore_errors=True)
    losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    return SftResult(
        model_dir=model_dir, losses=losses, n_steps=trainer.state.global_step, n_examples=len(rows)
    )


def _own_checkpoints(model_dir: Path, made_from: object) -> Path:
    """The folder for checkpoints of just this training; those of other rows or settings are removed."""
    stem = f"{model_dir.name}.checkpoints"
    own = model_dir.with_name(f"{stem}-{content_id(made_from)}")
    own.mkdir(parents=True, exist_ok=True)
    for folder in own.parent.iterdir():
        if folder.name.startswith(stem) and folder != own:
            shutil.rmtree(folder)
    return own


def _last_whole(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end; trainer_state.json is the last file of one."""
    whole = [
        path for path in checkpoints.glob("checkpoint-*") if _is_json_object(path / "trainer_state.json")
    ]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (FileNotFoundError, ValueError):
        return False


def _lora(settings: SftSettings) -> LoraConfig:
    targets: Any = list(settings.target_modules) or None
    if settings.target_modules == ("all-linear",):
        targets = "all-linear"
    return LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )


def _arguments(settings: SftSettings, checkpoints: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        lr_scheduler_type="linear",
        seed=settings.seed,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _stored_dtype(folder: str) -> torch.dtype:
    """The dtype of the weights on disk, which the merged model keeps."""
    config = Path(folder) / "config.json"
    named = json.loads(config.read_text()).get("dtype") if config.is_file() else None
    return getattr(torch, named) if named else torch.float32


def _save_merged(model: Any, tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> None:
    partial = model_dir.with_name(f".{model_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(model_dir, ignore_errors=True)
    partial.rename(model_dir)

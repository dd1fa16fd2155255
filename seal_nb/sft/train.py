"""Supervised fine-tuning of one ReST-EM round: LoRA on {prompt, completion}, then merged into the weights.

SEAL, arXiv 2506.10943, section 3.1 and appendix B: loss on the completion only, rank 64, alpha 128, all linear layers,
2 epochs, learning rate 3e-4. transformers' Trainer and PEFT do the work. A completion ends with EOS, so that the model
learns where a self-edit stops. A row of {text} is a train sequence as in the inner loop: no EOS, and loss on all of it.

Method "full" trains all weights instead (ours, for CPT): float32 weights and moments, because bfloat16 ones would round
small updates away, bfloat16 arithmetic on a GPU, and gradient checkpointing.

In several processes (`accelerate launch -m seal_nb.sft.train`, see `launch`) each trains its share of every step. The
order of the examples is fixed beforehand for all epochs and filled up to whole steps with examples without a loss, so
the result is that of one process, to rounding. The model folder is written whole or not at all. An interrupted training
resumes from its last whole checkpoint if rows, settings and model are the same.
"""

import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from seal_nb.errors import DataError, SealError
from seal_nb.models import model_identity, resolve_model
from seal_nb.sft.settings import SftJob, SftResult, SftSettings
from seal_nb.storage import content_id, write_json
from seal_nb.ttt.lora import merge_stack, stored_dtype, write_model_folder

IGNORED = -100  # a label outside the loss
RESULT_FILE = "sft_result.json"  # in the model folder: the training that made it, and its losses
Example = dict[str, list[int]]


def read_sft_rows(path: Path) -> list[dict[str, str]]:
    """Rows {prompt, completion} or {text} of a file. Raises: DataError with path, line and field."""
    rows = []
    text = path.read_text(encoding="utf-8")
    # Not splitlines: a row may hold characters such as U+2028, which splitlines takes for the end of a line.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON ({error})", path=path, item=f"line {number}") from error
        is_text = isinstance(row, dict) and "text" in row
        for field in ("text",) if is_text else ("prompt", "completion"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise DataError("must be a text", path=path, item=f"line {number}", field=field)
        rows.append(row)
    if not rows:
        raise DataError("has no row", path=path, remedy="lower the selection's bar, or make more self-edits")
    return rows


def example(tokenizer: Any, row: dict[str, str], max_seq_length: int) -> Example:
    """Token ids and labels of one row; labels are -100 on the prompt. Raises: DataError for a text without a loss."""
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"][:max_seq_length]
        if len(ids) < 2:
            raise DataError(f"{row['text']!r} has no token to predict", field="text", remedy="leave it out")
        return {"input_ids": ids, "labels": list(ids)}
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    return {"input_ids": ids[:max_seq_length], "labels": labels[:max_seq_length]}


def in_training_order(examples: Sequence[Example], *, epochs: int, examples_a_step: int, seed: int) -> list[Example]:
    """All epochs in a row, each shuffled and filled up to whole steps."""
    draws = random.Random(seed)
    ids = examples[0]["input_ids"][:2]
    fillers: list[Example] = [{"input_ids": ids, "labels": [IGNORED] * len(ids)}] * (-len(examples) % examples_a_step)
    return [one for _ in range(epochs) for one in [*draws.sample(list(examples), len(examples)), *fillers]]


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """(n, longest) ids, attention mask and labels, padded on the right outside the loss."""
    longest = max(len(one["input_ids"]) for one in examples)

    def padded(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([one["input_ids"] for one in examples], 0),
        "attention_mask": padded([[1] * len(one["input_ids"]) for one in examples], 0),
        "labels": padded([one["labels"] for one in examples], IGNORED),
    }


def train_sft(sft_file: Path, *, model: str, model_dir: Path, settings: SftSettings, n_threads: int = 1) -> SftResult:
    """Fine-tune `model` on the rows of `sft_file` and write the new model to `model_dir`.

    Every process of a launch makes the same call. A model folder that the same training made is used again.
    """
    torch.set_num_threads(n_threads)
    processes = PartialState(cpu=not torch.cuda.is_available())
    folder = resolve_model(model)
    made_from = training_id(sft_file, model, settings)
    if (done := finished(model_dir, made_from)) is not None:
        return done
    rows = read_sft_rows(sft_file)
    checkpoints = _own_checkpoints(model_dir, made_from, processes)
    trainer = _trainer(folder, rows, settings, checkpoints, processes.num_processes)
    # The newest checkpoint that is whole: trainer_state.json is written last.
    whole = [path for path in checkpoints.glob("checkpoint-*") if _is_json_object(path / "trainer_state.json")]
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    trainer.train(resume_from_checkpoint=last and str(last))
    trainer.save_model(str(checkpoints / "trained"))  # every process calls it, because each may hold a part
    result = SftResult(
        model_dir=model_dir,
        losses=tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry),
        n_steps=trainer.state.global_step,
        n_examples=len(rows),
        n_tokens=sum(len(one["input_ids"]) for one in trainer.train_dataset if set(one["labels"]) != {IGNORED}),
        n_processes=processes.num_processes,
    )
    if processes.is_main_process:
        _save_model(folder, checkpoints / "trained", result, made_from, settings.method)
        shutil.rmtree(checkpoints, ignore_errors=True)
    processes.wait_for_everyone()
    return result


def training_id(sft_file: Path, model: str, settings: SftSettings) -> str:
    """Identifies a training by its rows, settings and model, on any number of processes."""
    return content_id([read_sft_rows(sft_file), asdict(settings), model_identity(resolve_model(model))])


def finished(model_dir: Path, made_from: str) -> SftResult | None:
    """The result of this training if its model exists already."""
    try:
        stored = json.loads((model_dir / RESULT_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if stored.pop("made_from", None) != made_from:
        return None
    return SftResult(**stored | {"model_dir": model_dir, "losses": tuple(stored["losses"])})


def _trainer(
    folder: str, rows: Sequence[dict[str, str]], settings: SftSettings, checkpoints: Path, n_processes: int
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [example(tokenizer, row, settings.max_seq_length) for row in rows]
    ordered = in_training_order(
        examples, epochs=settings.epochs, examples_a_step=settings.examples_a_step, seed=settings.seed
    )
    torch.manual_seed(settings.seed)
    has_gpu, is_lora = torch.cuda.is_available(), settings.method == "lora"
    # bfloat16 for frozen weights on one GPU. Sharded weights must have one dtype, and the adapter's is float32.
    dtype = torch.bfloat16 if has_gpu and is_lora and n_processes == 1 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if is_lora:
        targets = list(settings.target_modules)
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear" if targets == ["all-linear"] else targets or None,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,  # the examples are those of all epochs, in their order
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation_of(n_processes),
        lr_scheduler_type="linear",
        seed=settings.seed,
        bf16=has_gpu,
        gradient_checkpointing=not is_lora,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not has_gpu,
        save_strategy="steps",
        save_steps=len(ordered) // settings.epochs // settings.examples_a_step,  # once an epoch
        save_total_limit=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:  # the Trainer would spread each batch over all visible GPUs
        arguments._n_gpu = 1
    trainer = Trainer(model=model, args=arguments, train_dataset=ordered, data_collator=collate)
    trainer.remove_callback(PrinterCallback)  # it prints a dict a step; the losses are in the result
    return trainer


def _own_checkpoints(model_dir: Path, made_from: str, processes: PartialState) -> Path:
    """The folder for the checkpoints of this training; those of other trainings for `model_dir` are removed.

    A checkpoint can only be read by as many processes, which share the model in the same way.
    """
    stem = f"{model_dir.name}.checkpoints"
    layout = content_id([made_from, processes.num_processes, str(processes.distributed_type)])
    own = model_dir.with_name(f"{stem}-{layout}")
    if processes.is_main_process:
        own.mkdir(parents=True, exist_ok=True)
        for folder in own.parent.iterdir():
            if folder.name.startswith(stem) and folder != own:
                shutil.rmtree(folder)
    processes.wait_for_everyone()
    return own


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (FileNotFoundError, ValueError):
        return False


def _save_model(folder: str, trained: Path, result: SftResult, made_from: str, method: str) -> None:
    """Write the model folder from `trained` (adapter or whole model), in the dtype that the base is stored in."""
    partial = result.model_dir.with_name(f".{result.model_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if method == "lora":
        merge_stack(folder, [trained], partial)
    else:
        whole = AutoModelForCausalLM.from_pretrained(trained, dtype=stored_dtype(folder))
        write_model_folder(whole, AutoTokenizer.from_pretrained(folder), partial)
    stored = asdict(result) | {"made_from": made_from}
    del stored["model_dir"]
    write_json(partial / RESULT_FILE, stored)
    shutil.rmtree(result.model_dir, ignore_errors=True)
    partial.rename(result.model_dir)


def main(job: SftJob) -> int:
    """One process of a launch, or the only one."""
    try:
        train_sft(
            job.sft_file, model=job.model, model_dir=job.model_dir, settings=job.settings, n_threads=job.n_threads
        )
    except SealError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(SftJob.from_json(sys.argv[1])))

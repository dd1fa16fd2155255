"""Supervised fine-tuning of one ReST-EM round: LoRA on {prompt, completion}, then merged into the weights.

SEAL, arXiv 2506.10943, section 3.1 and appendix B: loss on the completion only, rank 64, alpha 128, all
linear layers, 2 epochs, learning rate 3e-4. transformers' Trainer and PEFT do the work. The completion ends
with EOS, so that the model learns where a self-edit stops. The model folder appears whole or not at all; an
interrupted training resumes from its last whole checkpoint, if rows, settings and model are the same.

Method "full" trains all weights instead (ours, for CPT): float32 weights and moments, since bfloat16 ones
would round small updates away, bfloat16 arithmetic where there is a GPU, activations computed again in the
backward pass.

In several processes (`accelerate launch -m seal_nb.sft.train`, or `launch.train_in_processes`) each takes
its share of every step, and the result is that of one process, to rounding.

Training examples: from lines of {prompt, completion}, or of {text}, to token ids, and in which order.

A completion ends with EOS and carries the loss alone; a text is a train sequence, as the inner loop takes it:
no EOS, and loss on all of it.

The order is fixed beforehand for all epochs and filled up so that every step has the same number of
examples: what a step trains on then does not depend on how many processes share it. A filler carries no
loss. Knows no model.
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
from seal_nb.sft.settings import SftJob, SftResult, SftSettings, parse_job
from seal_nb.storage import content_id, write_json
from seal_nb.ttt.adapters import merge_stack, stored_dtype, write_model_folder

IGNORED = -100  # a label outside the loss
Example = dict[str, list[int]]


def read_sft_rows(path: Path) -> list[dict[str, str]]:
    """Rows {prompt, completion} or {text} of a file. Raises DataError with path, line and field."""
    rows = []
    text = path.read_text(encoding="utf-8")
    # Not splitlines: a row may hold characters that only look like the end of a line, as U+2028 does.
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
    """Token ids of prompt + completion + EOS, labels -100 on the prompt; or of a text, all of it labels.

    Raises: DataError for a text that is too short to carry a loss.
    """
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
    """All epochs end to end, each in a fresh shuffle and filled up to whole steps."""
    draws = random.Random(seed)
    ordered: list[Example] = []
    for _ in range(epochs):
        ordered += draws.sample(list(examples), len(examples))
        ordered += [_filler(examples[0])] * (-len(examples) % examples_a_step)
    return ordered


def _filler(one: Example) -> Example:
    return {"input_ids": one["input_ids"][:2], "labels": [IGNORED] * len(one["input_ids"][:2])}


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """(n, longest) ids, attention mask and labels, padded on the right outside the loss."""
    longest = max(len(e["input_ids"]) for e in examples)
    gaps = [longest - len(e["input_ids"]) for e in examples]
    pairs = list(zip(examples, gaps, strict=True))
    return {
        "input_ids": torch.tensor([e["input_ids"] + [0] * gap for e, gap in pairs]),
        "attention_mask": torch.tensor([[1] * len(e["input_ids"]) + [0] * gap for e, gap in pairs]),
        "labels": torch.tensor([e["labels"] + [IGNORED] * gap for e, gap in pairs]),
    }


RESULT_FILE = "sft_result.json"  # in the model folder: what made it, and its losses


def train_sft(sft_file: Path, *, model: str, model_dir: Path, settings: SftSettings, n_threads: int = 1) -> SftResult:
    """Fine-tune `model` on the file's rows and write the new model to `model_dir`.

    Every process of a launch calls this alike. A model folder that this very training made is taken as it is.
    """
    torch.set_num_threads(n_threads)
    processes = PartialState(cpu=not torch.cuda.is_available())
    accumulation = settings.accumulation_of(processes.num_processes)
    folder = resolve_model(model)
    made_from = training_id(sft_file, model, settings)
    if (done := finished(model_dir, made_from)) is not None:
        return done
    rows = read_sft_rows(sft_file)
    checkpoints = _own_checkpoints(model_dir, content_id([made_from, *_layout(processes)]), processes)
    trainer = _trainer(folder, rows, settings, checkpoints, accumulation)
    trainer.train(resume_from_checkpoint=_last_whole(checkpoints))
    trainer.save_model(str(checkpoints / "trained"))  # together: each process may hold a part of it
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    result = SftResult(
        model_dir=model_dir,
        losses=tuple(losses),
        n_steps=trainer.state.global_step,
        n_examples=len(rows),
        n_tokens=_real_tokens(trainer.train_dataset),
        n_processes=processes.num_processes,
    )
    if processes.is_main_process:
        _save_model(folder, checkpoints / "trained", result, made_from, settings.method)
        shutil.rmtree(checkpoints, ignore_errors=True)
    processes.wait_for_everyone()
    return result


def _layout(processes: PartialState) -> tuple[int, str]:
    """What a checkpoint can be read by: processes, and how they share the model."""
    return processes.num_processes, str(processes.distributed_type)


def training_id(sft_file: Path, model: str, settings: SftSettings) -> str:
    """Names a training by its rows, settings and model, on however many processes it runs."""
    identity = model_identity(resolve_model(model))
    return content_id([read_sft_rows(sft_file), asdict(settings), identity])


def finished(model_dir: Path, made_from: str) -> SftResult | None:
    """The result of this training where its model is there already."""
    try:
        said = json.loads((model_dir / RESULT_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if said.pop("made_from", None) != made_from:
        return None
    return SftResult(**said | {"model_dir": model_dir, "losses": tuple(said["losses"])})


def _trainer(
    folder: str, rows: Sequence[dict[str, str]], settings: SftSettings, checkpoints: Path, accumulation: int
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [example(tokenizer, row, settings.max_seq_length) for row in rows]
    ordered = in_training_order(
        examples, epochs=settings.epochs, examples_a_step=settings.examples_a_step, seed=settings.seed
    )
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=_weight_dtype(settings))
    if settings.method == "lora":
        model = get_peft_model(model, _lora(settings))
    steps_an_epoch = len(ordered) // settings.epochs // settings.examples_a_step
    trainer = Trainer(
        model=model,
        args=_arguments(settings, checkpoints, accumulation, steps_an_epoch),
        train_dataset=ordered,
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)  # prints a dict a step; the losses are in the result
    return trainer


def _weight_dtype(settings: SftSettings) -> torch.dtype:
    """bfloat16 for weights that stay as they are, on one GPU. Sharded weights are of one dtype, and the
    adapter's are float32; autocast computes in bfloat16.
    """
    alone_on_gpu = torch.cuda.is_available() and PartialState().num_processes == 1
    return torch.bfloat16 if alone_on_gpu and settings.method == "lora" else torch.float32


def _real_tokens(examples: Sequence[Example]) -> int:
    """Of all examples but fillers, which carry no loss."""
    return sum(len(one["input_ids"]) for one in examples if set(one["labels"]) != {IGNORED})


def _own_checkpoints(model_dir: Path, training: str, processes: PartialState) -> Path:
    """The folder for checkpoints of just this training; those of other rows or settings are removed."""
    stem = f"{model_dir.name}.checkpoints"
    own = model_dir.with_name(f"{stem}-{training}")
    if processes.is_main_process:
        own.mkdir(parents=True, exist_ok=True)
        for folder in own.parent.iterdir():
            if folder.name.startswith(stem) and folder != own:
                shutil.rmtree(folder)
    processes.wait_for_everyone()
    return own


def _last_whole(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end; trainer_state.json is the last file of one."""
    whole = [path for path in checkpoints.glob("checkpoint-*") if _is_json_object(path / "trainer_state.json")]
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


def _arguments(settings: SftSettings, checkpoints: Path, accumulation: int, steps_an_epoch: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,  # the rows are those of all epochs, in their order
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="linear",
        seed=settings.seed,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=settings.method == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=steps_an_epoch,
        save_total_limit=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:  # the Trainer would spread each batch over all GPUs that this process sees
        arguments._n_gpu = 1
    return arguments


def _save_model(folder: str, trained: Path, result: SftResult, made_from: str, method: str) -> None:
    """`trained`: the adapter, or the whole model; written in the dtype that the base is stored in."""
    said = asdict(result) | {"made_from": made_from}
    del said["model_dir"]
    partial = result.model_dir.with_name(f".{result.model_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if method == "lora":
        merge_stack(folder, [trained], partial)
    else:
        whole = AutoModelForCausalLM.from_pretrained(trained, dtype=stored_dtype(folder))
        write_model_folder(whole, AutoTokenizer.from_pretrained(folder), partial)
    write_json(partial / RESULT_FILE, said)
    shutil.rmtree(result.model_dir, ignore_errors=True)
    partial.rename(result.model_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """One process of a launch, or the only one."""
    job: SftJob = parse_job(argv)
    try:
        train_sft(
            job.sft_file, model=job.model, model_dir=job.model_dir, settings=job.settings, n_threads=job.n_threads
        )
    except SealError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

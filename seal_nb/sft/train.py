"""Supervised fine-tuning of one ReST-EM round: LoRA on {prompt, completion}, then merged into the weights.

SEAL, arXiv 2506.10943, section 3.1 and appendix B. transformers' Trainer and PEFT do the work, in processes that free
their memory when they end. On GPUs accelerate shards the model over them (FSDP, or DeepSpeed ZeRO-3). On CPUs each has
the whole model. The result is that of one process, to rounding."""

import contextlib
import importlib.util
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from seal_nb import storage
from seal_nb.errors import DataError, EngineError, SealError, SettingsError, visible
from seal_nb.models import model_identity, pretrained, resolve_model, tokenize
from seal_nb.peft_files import merge_stack, write_model
from seal_nb.processes import LoggedProcess, end_tree, ending_with_me
from seal_nb.sft.settings import JOB, SHARDINGS, SftJob, SftResult

MODULE = "seal_nb.sft.train"
IGNORED = -100  # a label outside the loss
RESULT_FILE = "sft_result.json"  # in the model folder: the training that made it, and its losses
Example = dict[str, list[int]]


def run_job(job: SftJob, *, n_processes: int = 1, sharding: str = "fsdp") -> SftResult:
    """Train a new model in processes of its own, here or on the nodes of this SLURM job. Their output goes to
    `<model_dir>.seal_nb.log`. A model folder that the same training made is used again, that of another training is
    replaced. Raises: SettingsError, also for a model folder with anything else in it, DataError for a row that is no
    training example, EngineError with the end of the log."""
    job.settings.accumulation_of(n_processes)
    line = command(job, n_processes, launch_config(sharding))
    made_from = training_id(job)
    if (done := finished(job.model_dir, made_from)) is not None:
        return done
    base = resolve_model(job.model)
    place = storage.new_place(job.model_dir, replace_own=True, apart_from=[base])
    examples_of(job, pretrained(AutoTokenizer, base))  # a wrong row is said before any start
    process = LoggedProcess(line, place.with_name(f"{place.name}.seal_nb.log"), is_new=True)
    try:
        code = process.wait()
    except BaseException:  # an interrupt must not leave processes that hold GPUs and write checkpoints
        end_tree(process.pid)
        process.wait()
        raise
    if code:  # the parent of the processes may have been killed alone
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    result = finished(job.model_dir, made_from)
    if code or result is None:
        where = "a process" if n_processes == 1 else f"{n_processes} processes"
        raise EngineError(f"training in {where} ended with code {code}; {process.ending()}")
    return result


def command(job: SftJob, n_processes: int, config: Path) -> list[str]:
    """The command line of a training. Raises: SettingsError if the nodes of this job cannot share the processes."""
    program = ["-m", MODULE, JOB.dump_json(job).decode()]
    if n_processes == 1:
        return ending_with_me([sys.executable, *program])
    options = [f"--config_file={config}", f"--num_processes={n_processes}"]
    options.append(f"--num_cpu_threads_per_process={job.n_threads}")
    n_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if n_nodes == 1:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]  # 0: a free port
    else:
        if n_processes % n_nodes:
            raise SettingsError(f"n_processes is {n_processes}, which {n_nodes} nodes cannot share; give a multiple")
        # One `accelerate launch` on each node; slurm/accelerate.sh gives it the node's number.
        start = ["srun", f"--nodes={n_nodes}", f"--ntasks={n_nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit"]
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not inherit it
            start.append(f"--cpus-per-task={cpus}")
        start.append(str(slurm_file("accelerate.sh")))
    return ending_with_me([*start, *options, *program])


def launch_config(sharding: str) -> Path:
    """The shipped configuration for this machine: that of `sharding` on GPUs, the only one on CPUs.
    Raises: SettingsError if the sharding is unknown, or DeepSpeed is not installed."""
    if sharding not in SHARDINGS:
        raise SettingsError(f"sharding is {sharding!r}; known are {', '.join(SHARDINGS)}")
    if sharding == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise SettingsError("sharding 'deepspeed' is not installed; run pip install -e '.[deepspeed]', or use fsdp")
    return slurm_file(f"accelerate_{sharding if torch.cuda.is_available() else 'cpu'}.yaml")


def slurm_file(name: str) -> Path:
    """A file of the checkout's `slurm` folder. Raises: SettingsError if it is missing."""
    path = Path(__file__).resolve().parents[2] / "slurm" / name
    if not path.is_file():
        raise SettingsError(f"no {path.name} in {path.parent}; run from a checkout, or give a configuration")
    return path


def read_sft_rows(path: Path) -> list[dict[str, str]]:
    """Rows {prompt, completion} or {text} of a file. Raises: DataError with path, line and field."""
    rows = []
    for place, row in storage.read_json_lines(path):
        is_text = isinstance(row, dict) and "text" in row
        for field in ("text",) if is_text else ("prompt", "completion"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise DataError("must be a text", path=path, item=place, field=field)
        rows.append(row)
    if not rows:
        raise DataError("has no row", path=path, remedy="lower the selection's bar, or make more self-edits")
    return rows


def example(tokenizer: Any, row: dict[str, str], max_seq_length: int, **where: Any) -> Example:
    """Token ids and labels of one row. The loss is on the completion only. EOS ends it, so that the model learns where
    a self-edit stops. {text} is a train sequence as in the inner loop: no EOS, loss on all of it.
    Raises: DataError for a row without a loss; ``where`` are its path and item. SettingsError if there is no EOS."""
    if "text" in row:
        ids = tokenize(tokenizer, row["text"])[0][:max_seq_length]
        if len(ids) < 2:
            raise DataError(f"{row['text']!r} has no token to predict", **where, field="text", remedy="leave it out")
        return {"input_ids": ids, "labels": list(ids)}
    if tokenizer.eos_token_id is None:
        raise SettingsError("the model's tokenizer has no EOS token to end a completion; set eos_token in its files")
    prompt, _ = tokenize(tokenizer, row["prompt"])
    if len(prompt) >= max_seq_length:
        problem = f"has {len(prompt)} tokens, and max_seq_length={max_seq_length} leaves no room for the completion"
        raise DataError(problem, **where, field="prompt", remedy="raise max_seq_length, or leave the row out")
    completion = [*tokenize(tokenizer, row["completion"], special_tokens=False)[0], tokenizer.eos_token_id]
    ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    return {"input_ids": ids[:max_seq_length], "labels": labels[:max_seq_length]}


def in_training_order(examples: Sequence[Example], *, epochs: int, examples_a_step: int, seed: int) -> list[Example]:
    """All epochs in a row, each shuffled and filled up to whole steps with examples without a loss, so that any number
    of processes trains the same steps."""
    draws = random.Random(seed)
    ids = examples[0]["input_ids"][:2]
    fillers: list[Example] = [{"input_ids": ids, "labels": [IGNORED] * len(ids)}] * (-len(examples) % examples_a_step)
    return [one for _ in range(epochs) for one in [*draws.sample(list(examples), len(examples)), *fillers]]


def collator(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Makes batches: ids, attention mask and labels, padded on the right outside the loss."""
    # A pad token of its own may have no embedding, and any token will do.
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def train_sft(job: SftJob) -> SftResult:
    """Fine-tune the model on the rows of the file and write the new model, whole or not at all. Every process of a
    launch makes the same call. A model folder that the same training made is used again, or its last checkpoint."""
    torch.set_num_threads(job.n_threads)
    model_dir = job.model_dir
    processes = PartialState(cpu=not torch.cuda.is_available())
    folder = resolve_model(job.model)
    made_from = training_id(job)
    if (done := finished(model_dir, made_from)) is not None:
        return done
    examples = examples_of(job, pretrained(AutoTokenizer, folder))
    checkpoints = _own_checkpoints(model_dir, made_from, processes)
    trainer = _trainer(folder, examples, job, checkpoints, processes.num_processes)
    trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    trainer.save_model(str(checkpoints / "trained"))  # every process calls it, because each may hold a part
    result = SftResult(
        model_dir=model_dir,
        losses=tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry),
        n_steps=trainer.state.global_step,
        n_examples=len(examples),
        n_tokens=sum(len(one["input_ids"]) for one in trainer.train_dataset if set(one["labels"]) != {IGNORED}),
        n_processes=processes.num_processes,
    )
    if processes.is_main_process:
        _save_model(folder, checkpoints / "trained", result, made_from, job.settings.method)
        _remove_own(checkpoints)
    processes.wait_for_everyone()
    return result


def training_id(job: SftJob) -> str:
    """Identifies a training by its rows, settings and model, on any number of processes."""
    model = model_identity(resolve_model(job.model))
    return storage.content_id([read_sft_rows(job.sft_file), asdict(job.settings), model])


def finished(model_dir: Path, made_from: str) -> SftResult | None:
    """The result of this training if its model exists already."""
    try:
        stored = storage.read_json(model_dir / RESULT_FILE)
    except DataError:
        return None
    if stored.pop("made_from", None) != made_from:
        return None
    return SftResult(**stored | {"model_dir": model_dir, "losses": tuple(stored["losses"])})


def examples_of(job: SftJob, tokenizer: Any) -> list[Example]:
    """The rows of the file as tokens. Raises: DataError for a row without a loss."""
    rows, most = enumerate(read_sft_rows(job.sft_file), start=1), job.settings.max_seq_length
    return [example(tokenizer, row, most, path=job.sft_file, item=f"row {number}") for number, row in rows]


def _trainer(folder: str, examples: Sequence[Example], job: SftJob, checkpoints: Path, n_processes: int) -> Trainer:
    tokenizer, settings = pretrained(AutoTokenizer, folder), job.settings
    order = {"epochs": settings.finetune_epochs, "examples_a_step": settings.examples_a_step, "seed": settings.seed}
    ordered = in_training_order(examples, **order)
    torch.manual_seed(settings.seed)
    has_gpu, is_lora = torch.cuda.is_available(), settings.method == "lora"
    # bfloat16 for frozen weights on one GPU. Sharded weights must have one dtype, and the adapter's is float32. Method
    # "full" has float32 weights and moments, because bfloat16 ones would round small updates away.
    dtype = torch.bfloat16 if has_gpu and is_lora and n_processes == 1 else torch.float32
    model = pretrained(AutoModelForCausalLM, folder, dtype=dtype)
    if is_lora:
        targets = list(settings.target_modules)
        how = {"target_modules": "all-linear" if targets == ["all-linear"] else targets or None}
        config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, task_type="CAUSAL_LM", **how)
        model = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,  # the examples are those of all epochs, in their order
        train_sampling_strategy="sequential",
        learning_rate=settings.finetune_lr,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation_of(n_processes),
        lr_scheduler_type="linear",
        seed=settings.seed,
        bf16=has_gpu,
        gradient_checkpointing=not is_lora,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not has_gpu,
        save_steps=len(ordered) // settings.finetune_epochs // settings.examples_a_step,  # once an epoch
        save_total_limit=1,
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:  # the Trainer would spread each batch over all visible GPUs
        arguments._n_gpu = 1
    trainer = Trainer(model=model, args=arguments, train_dataset=ordered, data_collator=collator(tokenizer))
    trainer.remove_callback(PrinterCallback)  # it prints a dict a step; the losses are in the result
    return trainer


def _own_checkpoints(model_dir: Path, made_from: str, processes: PartialState) -> Path:
    """The folder for the checkpoints of this training; those of other trainings for `model_dir` are removed. A
    checkpoint can only be read by as many processes, which share the model in the same way."""
    place = model_dir.resolve()
    layout = storage.content_id([made_from, processes.num_processes, str(processes.distributed_type)])
    own = place.with_name(f"{place.name}.checkpoints-{layout}")
    if processes.is_main_process:
        if not (own / storage.MARK).is_file():
            storage.new_place(own).mkdir(parents=True, exist_ok=True)
            storage.write_mark(own, [storage.CHECKPOINTS])
        name = re.compile(rf"{re.escape(place.name)}\.checkpoints-[0-9a-f]{{24}}")
        for folder in own.parent.iterdir():
            if name.fullmatch(folder.name) and folder != own:
                _remove_own(folder)
    processes.wait_for_everyone()
    return own


def _remove_own(checkpoints: Path) -> None:
    """Remove a folder of checkpoints that a training made; any other folder stays."""
    if storage.is_own(checkpoints):
        shutil.rmtree(checkpoints, ignore_errors=True)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: ``trainer_state.json`` is written last."""
    whole = {}
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(DataError, TypeError, KeyError):
            whole[storage.read_json(path)["global_step"]] = str(path.parent)
    return whole[max(whole)] if whole else None


def _save_model(folder: str, trained: Path, result: SftResult, made_from: str, method: str) -> None:
    """Write the model folder from `trained` (adapter or whole model), in the dtype that the base is stored in."""
    stored = asdict(result) | {"made_from": made_from}
    del stored["model_dir"]
    with storage.whole_folder(result.model_dir, replace_own=True, apart_from=[folder]) as partial:
        if method == "lora":
            merge_stack(folder, [trained], partial)
        else:
            write_model(pretrained(AutoModelForCausalLM, trained), folder, partial)
        storage.write_json(partial / RESULT_FILE, stored)


def main(job: SftJob) -> int:
    """One process of a launch, or the only one."""
    try:
        train_sft(job)
    except SealError as error:
        sys.stderr.write(visible(f"{type(error).__name__}: {error}\n"))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(JOB.validate_json(sys.argv[1])))

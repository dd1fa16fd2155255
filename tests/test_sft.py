"""SFT of a round on a tiny model: completion-only loss, a merged folder, resumption, one or two processes."""

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from seal_nb.errors import DataError, EngineError, SettingsError
from seal_nb.sft import train as sft
from seal_nb.sft.settings import JOB, SftJob, SftSettings
from seal_nb.sft.train import (
    IGNORED,
    collator,
    command,
    example,
    in_training_order,
    launch_config,
    read_sft_rows,
    run_job,
    slurm_file,
    train_sft,
)
from tests.server.conftest import eventually, is_running
from tests.ttt.tiny import save_tiny_model

ROWS = [
    {"prompt": "List implications of: the lamp.\n", "completion": "1. There is a lamp."},
    {"prompt": "List implications of: the hill.\n", "completion": "1. There is a hill."},
]
SETTINGS = SftSettings(lora_rank=8, lora_alpha=16, finetune_epochs=30, finetune_lr=2e-2, gradient_accumulation_steps=1)


def sft_file(folder: Path, rows: list[dict] = ROWS) -> Path:
    path = folder / "sft_best1of2_x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completion_loss(folder: Path) -> float:
    """Mean loss per completion token of the model in `folder`, by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in ROWS:
        one = example(tokenizer, row, 2048)
        ids, labels = torch.tensor([one["input_ids"]]), torch.tensor([one["labels"]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base")


def test_training_lowers_the_loss_of_the_completions_in_a_plain_merged_model(base: Path, tmp_path: Path) -> None:
    done = train_sft(
        SftJob(sft_file=sft_file(tmp_path), model=str(base), model_dir=tmp_path / "next", settings=SETTINGS)
    )
    assert (done.n_steps, done.n_examples, len(done.losses)) == (60, 2, 60)
    assert completion_loss(done.model_dir) < completion_loss(base) / 2
    assert not list(done.model_dir.glob("adapter*")), "merged, not an adapter"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["next", "sft_best1of2_x.jsonl"]


def test_loss_is_on_the_completion_and_its_end_only(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    one = example(tokenizer, ROWS[0], 2048)
    n_prompt = len(tokenizer(ROWS[0]["prompt"])["input_ids"])
    assert one["labels"][:n_prompt] == [IGNORED] * n_prompt
    assert one["labels"][n_prompt:] == one["input_ids"][n_prompt:]
    assert one["labels"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no row"),
        (["not an object"], "line 1"),
        ([ROWS[0], {"prompt": "p"}], "line 2.*completion"),
        ([{"prompt": 1, "completion": "c"}], "prompt"),
        ([{"text": 1}], "line 1.*text"),
    ],
)
def test_a_file_that_is_not_one_is_refused_with_line_and_field(tmp_path: Path, rows: list[dict], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_sft_rows(sft_file(tmp_path, rows))


def test_a_row_may_hold_characters_that_look_like_the_end_of_a_line(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two\x85three"}, {"prompt": "p\u2029", "completion": "c\x0b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_sft_rows(path) == rows


def test_rows_may_be_compressed_with_blank_lines_between_them(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n\n" for row in ROWS)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_sft_rows(tmp_path / "rows.jsonl.gz") == ROWS


def test_a_missing_file_of_rows_is_named_as_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_sft_rows(tmp_path / "none.jsonl")


def test_a_row_whose_prompt_leaves_no_room_for_the_completion_is_refused(base: Path, tmp_path: Path) -> None:
    n_prompt = len(AutoTokenizer.from_pretrained(base)("longer " * 9)["input_ids"])
    rows, few = [ROWS[0], {"prompt": "longer " * 9, "completion": "c"}], replace(FEW, max_seq_length=n_prompt)
    said = rf"x\.jsonl, item row 2, field 'prompt': has {n_prompt} tokens, and max_seq_length={n_prompt} leaves .*raise"
    with pytest.raises(DataError, match=said):
        trained(base, tmp_path, "next", rows, few)
    with pytest.raises(DataError, match=said):
        run_job(SftJob(sft_file=sft_file(tmp_path, rows), model=str(base), model_dir=tmp_path / "next", settings=few))
    assert not (tmp_path / "next.seal_nb.log").exists(), "no process was started"
    one = example(AutoTokenizer.from_pretrained(base), rows[1], n_prompt + 1)
    assert [label for label in one["labels"] if label != IGNORED] == one["input_ids"][-1:]


FEW = SftSettings(lora_rank=4, lora_alpha=8, finetune_epochs=3, gradient_accumulation_steps=1)


def trained(base: Path, folder: Path, name: str, rows: list[dict] = ROWS, settings: SftSettings = FEW) -> Path:
    file = sft_file(folder, rows)
    job = SftJob(sft_file=file, model=str(base), model_dir=folder / name, settings=settings)
    return train_sft(job).model_dir


def cut_short(base: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **what: Any) -> Path:
    """A training whose process dies before the model is written; gives its folder of checkpoints."""

    def pulled_plug(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(sft, "_save_model", pulled_plug)
        with pytest.raises(KeyboardInterrupt):
            trained(base, folder, name, **what)
    assert not (folder / name).exists()
    (checkpoints,) = folder.glob(f"{name}.checkpoints*")
    return checkpoints


def are_equal(first: Path, second: Path) -> bool:
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of an uninterrupted training with FEW."""
    return trained(base, tmp_path_factory.mktemp("whole"), "whole")


def test_an_interrupted_training_resumes_to_the_model_of_an_uninterrupted_one(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(base, tmp_path, "cut", monkeypatch)
    steps: list[int] = []
    with monkeypatch.context() as watched:
        train = sft.Trainer.training_step
        watched.setattr(sft.Trainer, "training_step", lambda *args, **more: steps.append(1) or train(*args, **more))
        assert are_equal(whole, trained(base, tmp_path, "cut"))
    assert not steps, "the checkpoint was after the last step"


def test_an_interrupted_full_training_resumes_as_well(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"settings": replace(FEW, method="full")}
    uninterrupted = trained(base, tmp_path, "whole", **how)
    cut_short(base, tmp_path, "cut", monkeypatch, **how)
    assert are_equal(uninterrupted, trained(base, tmp_path, "cut", **how))


@pytest.mark.parametrize(
    "other", [{"rows": ROWS[::-1]}, {"settings": replace(FEW, finetune_lr=1e-2)}], ids=["rows", "settings"]
)
def test_a_training_on_something_else_starts_from_the_beginning(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    cut_short(base, tmp_path, "cut", monkeypatch, **other)
    users = [tmp_path / f"cut.checkpoints{name}" for name in (".zip", "-mine", f"-{'0' * 24}")]
    for folder in users[1:]:
        (folder / "checkpoint-1").mkdir(parents=True)
    users[0].write_text("the user's")
    assert are_equal(whole, trained(base, tmp_path, "cut"))
    assert sorted(tmp_path.glob("cut.checkpoints*")) == sorted(users)


def test_a_checkpoint_cut_off_while_it_was_written_is_ignored(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = cut_short(base, tmp_path, "cut", monkeypatch)
    (checkpoints / "checkpoint-old").mkdir()  # somebody's copy
    (checkpoints / "notes.txt").write_text("somebody's")
    shutil.copytree(checkpoints, tmp_path / "kept")
    for state in (None, '{"global_step": 6, "log_hi', "null"):
        (state_file,) = checkpoints.glob("checkpoint-*/trainer_state.json")
        state_file.unlink()
        if state:
            state_file.write_text(state)
        assert are_equal(whole, trained(base, tmp_path, "cut"))
        shutil.rmtree(tmp_path / "cut")
        assert (checkpoints / "notes.txt").is_file(), "it stays, and so does its folder"
        shutil.copytree(tmp_path / "kept", checkpoints, dirs_exist_ok=True)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="finetune_lr=0: must be above 0"):
        SftSettings(finetune_lr=0)
    with pytest.raises(SettingsError, match="method='qlora': known are lora, full"):
        SftSettings(method="qlora")


@given(
    n_rows=st.integers(1, 7), epochs=st.integers(1, 3), examples_a_step=st.integers(1, 6), seed=st.integers(0, 2**31)
)
def test_every_epoch_has_each_row_once_and_only_whole_steps(
    n_rows: int, epochs: int, examples_a_step: int, seed: int
) -> None:
    rows = [{"input_ids": [n, n, n], "labels": [IGNORED, n, n]} for n in range(n_rows)]
    ordered = in_training_order(rows, epochs=epochs, examples_a_step=examples_a_step, seed=seed)
    size, rest = divmod(len(ordered), epochs)
    assert rest == 0 and size % examples_a_step == 0 and size < n_rows + examples_a_step
    for start in range(0, len(ordered), size):
        real = [one for one in ordered[start : start + size] if set(one["labels"]) != {IGNORED}]
        assert sorted(one["input_ids"][0] for one in real) == list(range(n_rows))


def test_fillers_and_padding_carry_no_loss(base: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}]
    ordered = in_training_order(rows, epochs=1, examples_a_step=2, seed=0)
    batch = collator(AutoTokenizer.from_pretrained(base))(ordered)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


MANY = [{"prompt": f"About {n}:\n", "completion": f"It is {'so ' * (n + 1)}number {n}."} for n in range(5)]
SHARED = SftSettings(lora_rank=4, lora_alpha=8, finetune_epochs=2, finetune_lr=1e-2, gradient_accumulation_steps=4)


def distance(first: Path, second: Path, base: Path) -> float:
    """Relative L2 between two trainings of one base, of their updates."""
    a, b, start = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (first, second, base))
    gap = sum(float(((a[k] - b[k]).double() ** 2).sum()) for k in start)
    size = sum(float(((a[k] - start[k]).double() ** 2).sum()) for k in start)
    return (gap / size) ** 0.5


def test_two_processes_train_what_one_does_within_rounding(base: Path, tmp_path: Path) -> None:
    """Five rows in steps of four: the last step of an epoch is short, and shared like the others."""
    file = sft_file(tmp_path, MANY)
    jobs = {n: SftJob(sft_file=file, model=str(base), model_dir=tmp_path / f"by_{n}", settings=SHARED) for n in (1, 2)}
    results = {1: train_sft(jobs[1]), 2: run_job(jobs[2], n_processes=2)}
    assert results[1].n_steps == results[2].n_steps == 4
    assert results[2].losses == pytest.approx(results[1].losses, rel=1e-4)
    assert distance(jobs[1].model_dir, jobs[2].model_dir, base) < 1e-3
    again = run_job(jobs[2], n_processes=2)
    assert again == results[2]
    assert not list(tmp_path.glob("*.checkpoints*"))


BOTH = """
import sys
from seal_nb.sft.settings import JOB
from seal_nb.sft.train import main
raise SystemExit(max(main(JOB.validate_json(text)) for text in sys.argv[1:]))
"""


def test_a_model_sharded_over_processes_trains_the_same(base: Path, tmp_path: Path) -> None:
    """The configuration for GPUs, FSDP 2, on two CPU processes; one launch trains by both methods."""
    file, script, on_cpu = sft_file(tmp_path, MANY), tmp_path / "both.py", tmp_path / "fsdp.yaml"
    for_gpus = slurm_file("accelerate_fsdp.yaml").read_text()
    on_cpu.write_text(for_gpus.replace("mixed_precision: bf16", 'mixed_precision: "no"\nuse_cpu: true'))
    jobs = [
        SftJob(sft_file=file, model=str(base), model_dir=tmp_path / m, settings=replace(SHARED, method=m))
        for m in ("lora", "full")
    ]
    script.write_text(BOTH)
    line = command(jobs[0], 2, on_cpu)
    line = [*line[: line.index("seal_nb.sft.train") - 1], str(script), *(JOB.dump_json(job).decode() for job in jobs)]
    subprocess.run(line, check=True)
    for job in jobs:
        sharded = run_job(job)  # takes the model that is there
        alone = train_sft(replace(job, model_dir=tmp_path / f"{job.settings.method}_alone"))
        assert (sharded.n_processes, alone.n_processes) == (2, 1)
        assert sharded.losses == pytest.approx(alone.losses, rel=1e-4)
        assert distance(alone.model_dir, sharded.model_dir, base) < 1e-3


def test_a_process_that_fails_is_reported_with_the_end_of_its_log(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "MODULE", "no_such_module")  # fails without importing torch first
    job = SftJob(sft_file=sft_file(tmp_path), model=str(base), model_dir=tmp_path / "next", settings=SHARED)
    said = (
        r"training in a process ended with code 1; the end of .*next\.seal_nb\.log:\n(.*\n)*.*No module named no_such"
    )
    with pytest.raises(EngineError, match=said):
        run_job(job)
    assert not job.model_dir.exists()


def test_a_file_that_is_not_one_ends_its_process_with_an_error_code(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = SftJob(sft_file=sft_file(tmp_path, []), model=str(base), model_dir=tmp_path / "next", settings=SHARED)
    assert sft.main(job) == 2
    assert "DataError" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", "new/..", "base", "base/next", "user"])
def test_a_model_is_not_trained_into_a_folder_of_the_user_s(
    base: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "user").mkdir()
    (tmp_path / "user/thesis.txt").write_text("the user's")
    job = SftJob(sft_file=sft_file(tmp_path), model=str(base), model_dir=Path(place), settings=FEW)
    with pytest.raises(SettingsError, match="give a"):
        run_job(job)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "sft_best1of2_x.jsonl", "user"]


def test_processes_that_cannot_share_a_step_are_refused_before_the_start(tmp_path: Path) -> None:
    job = SftJob(sft_file=sft_file(tmp_path), model="m", model_dir=tmp_path / "next", settings=SHARED)
    with pytest.raises(SettingsError, match="gradient_accumulation_steps is 4, which 3 processes cannot share"):
        run_job(job, n_processes=3)


def test_a_command_line_says_the_whole_job(tmp_path: Path) -> None:
    settings = SftSettings(target_modules=("q_proj", "v_proj"), finetune_lr=2e-5, seed=7)
    job = SftJob(
        sft_file=tmp_path / "a b.jsonl", model="m", model_dir=tmp_path / "next", settings=settings, n_threads=2
    )
    assert JOB.validate_json(JOB.dump_json(job).decode()) == job
    line = command(job, 4, slurm_file("accelerate_fsdp.yaml"))
    assert line[line.index("seal_nb.sft.train") - 1] == "-m" and "--num_processes=4" in line


def test_a_killed_notebook_leaves_no_training_behind(base: Path, tmp_path: Path) -> None:
    endless = replace(SHARED, finetune_epochs=100_000)
    job = SftJob(sft_file=sft_file(tmp_path), model=str(base), model_dir=tmp_path / "next", settings=endless)
    code = (  # it ends with the test in any case
        "import os; from seal_nb.processes import end_with_parent; end_with_parent(os.getppid())\n"
        "from seal_nb.sft.train import run_job; from seal_nb.sft.settings import JOB\n"
        f"run_job(JOB.validate_json({JOB.dump_json(job).decode()!r}), n_processes=2)"
    )
    notebook = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    def training() -> list[psutil.Process]:
        tree = psutil.Process(notebook.pid).children(recursive=True)
        lines = [Path(f"/proc/{one.pid}/cmdline") for one in tree]
        return tree if sum("seal_nb.sft.train" in one.read_text() for one in lines if one.exists()) >= 4 else []

    try:
        # The program that ends with us, accelerate, and two processes.
        eventually(training, 180)
        tree = training()
        notebook.kill()
        eventually(lambda: not any(is_running(one.pid) for one in tree), 60)
    finally:
        notebook.kill()
        notebook.wait()


def test_in_a_job_over_several_nodes_each_of_them_starts_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    job = SftJob(sft_file=tmp_path / "a.jsonl", model="m", model_dir=tmp_path / "next", settings=SHARED)
    line = command(job, 4, slurm_file("accelerate_fsdp.yaml"))
    assert line[line.index("srun") :][:3] == ["srun", "--nodes=2", "--ntasks=2"] and "--cpus-per-task=8" in line
    assert "--num_processes=4" in line and not any("main_process_port" in word for word in line)
    with pytest.raises(SettingsError, match="n_processes is 3, which 2 nodes cannot share"):
        command(job, 3, slurm_file("accelerate_fsdp.yaml"))


@pytest.mark.parametrize("name", ["cpu", "fsdp"])
def test_a_shipped_configuration_is_one_that_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    said = load_config_from_file(str(slurm_file(f"accelerate_{name}.yaml")))
    assert said.use_cpu == (name == "cpu")
    assert (said.fsdp_config or {}).get("fsdp_version") == (2 if name == "fsdp" else None)


def test_the_deepspeed_configuration_is_zero_3_as_accelerate_reads_and_launches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that accelerate does short of starting DeepSpeed, which is not installed here."""
    from accelerate.commands import launch as accelerates
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    asked = [f"--config_file={slurm_file('accelerate_deepspeed.yaml')}", "--num_processes=2", "--main_process_port=0"]
    launched: list[Any] = []
    monkeypatch.setattr(accelerates, "deepspeed_launcher", launched.append)
    accelerates.launch_command(accelerates.launch_command_parser().parse_args([*asked, "train.py"]))
    (arguments,) = launched
    assert arguments.mixed_precision == "bf16" and not arguments.use_fsdp
    _, environment = prepare_deepspeed_cmd_env(arguments)
    said = {
        name.removeprefix("ACCELERATE_"): value for name, value in environment.items() if name.startswith("ACCELERATE_")
    }
    assert said["USE_DEEPSPEED"] == "true" and said["DEEPSPEED_ZERO_STAGE"] == "3"
    assert said["DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true", "or a saved model would have no weights"
    assert said["GRADIENT_ACCUMULATION_STEPS"] == "auto", "the training says how many"


def test_how_gpus_share_a_model_is_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="sharding is 'zero'; known are fsdp, deepspeed"):
        launch_config("zero")
    with monkeypatch.context() as without:
        without.setattr(sft.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SettingsError, match=r"not installed; run pip install -e '.\[deepspeed\]'"):
            launch_config("deepspeed")
    monkeypatch.setattr(sft.importlib.util, "find_spec", lambda name: object())
    assert launch_config("deepspeed").name == "accelerate_cpu.yaml", "on CPUs nothing is shared"
    monkeypatch.setattr(sft.torch.cuda, "is_available", lambda: True)
    names = [launch_config(name).name for name in ("fsdp", "deepspeed")]
    assert names == ["accelerate_fsdp.yaml", "accelerate_deepspeed.yaml"]
    job = SftJob(sft_file=tmp_path / "f.jsonl", model="m", model_dir=tmp_path / "next", settings=SHARED)
    line = command(job, 2, launch_config("deepspeed"))
    assert f"--config_file={slurm_file('accelerate_deepspeed.yaml')}" in line


def test_a_model_that_this_training_made_is_used_again_and_another_is_not(base: Path, tmp_path: Path) -> None:
    made = trained(base, tmp_path, "next")
    weights = made / "model.safetensors"
    written, content = weights.stat().st_mtime_ns, weights.read_bytes()
    assert (trained(base, tmp_path, "next") / "model.safetensors").stat().st_mtime_ns == written
    trained(base, tmp_path, "next", settings=replace(FEW, seed=1))
    assert weights.read_bytes() != content
    shutil.rmtree(made)
    assert (trained(base, tmp_path, "next") / "model.safetensors").read_bytes() == content, "the same seed"

"""Stages killed with signal 9 at random moments and run again: the same items, seeds and numbers.

The real notebooks by papermill, real servers, a tiny random model, `deterministic`. The moments are drawn
from a fixed seed as an amount of finished work, so that a slow machine is killed where a fast one is.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from seal_nb.processes import end_tree
from tests.ttt.tiny import save_tiny_model

TRAINING = {"lora_rank": 4, "lora_alpha": 8, "finetune_epochs": 12, "max_new_tokens": 8}
SERVER = {"n_workers": 1, "deterministic": True}
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def start(stage: str, out: Path, values: dict[str, Any]) -> subprocess.Popen[bytes]:
    pairs = {"output_dir": str(out), **values}
    given = [
        part
        for name, value in pairs.items()
        for part in ("-p", name, value if isinstance(value, str) else json.dumps(value))
    ]
    log = (out.parent / f"{out.name}.log").open("ab")
    line = [sys.executable, "-m", "seal_nb.cli", "run", stage, *given]
    return subprocess.Popen(line, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(stage: str, out: Path, values: dict[str, Any]) -> None:
    ended_well(start(stage, out, values), out)


def ended_well(process: subprocess.Popen[bytes], out: Path) -> None:
    assert process.wait(PATIENCE_S) == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]


@contextmanager
def whole_run_beside(stage: str, out: Path, values: dict[str, Any]) -> Iterator[None]:
    """An uninterrupted run, which goes on while the block kills another one."""
    process = start(stage, out, values)
    try:
        yield
        ended_well(process, out)
    finally:
        if process.poll() is None:
            end_tree(process.pid)
            process.wait()


def kill_when(stage: str, out: Path, values: dict[str, Any], reached: Callable[[], bool]) -> bool:
    """Start the stage and kill it and all its children outright; whether it was still at work."""
    process = start(stage, out, values)
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.01)
    was_at_work = process.poll() is None
    if was_at_work:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            one.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=30)
    process.wait()
    return was_at_work


def lines_in(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def interrupted(stage: str, out: Path, values: dict[str, Any], n_units: int, seed: int, kills: int) -> None:
    """Killed at random amounts of finished work, then run to its end."""
    out.mkdir(parents=True)
    moments = sorted(random.Random(seed).sample(range(n_units - 1), kills))
    killed = [
        kill_when(stage, out, values, lambda moment=moment: lines_in(out / "journal.jsonl") > moment)
        for moment in moments
    ]
    assert all(killed)
    assert moments[0] < lines_in(out / "journal.jsonl") < n_units
    finish(stage, out, values)
    assert lines_in(out / "journal.jsonl") == n_units, "nothing was asked for twice"


def test_a_query_run_killed_twice_has_the_items_seeds_and_numbers_of_a_whole_one(model: Path, tmp_path: Path) -> None:
    values = {"model": str(model), "n_articles": 2, "eval_times": 2, "arms": "passage_only,hand_written"}
    values |= TRAINING | SERVER
    with whole_run_beside("03", tmp_path / "whole", values):
        interrupted("03", tmp_path / "cut", values, n_units=8, seed=3, kills=2)
    for name in ("run_base_passage_only.json", "run_base_hand_written.json"):
        whole, cut = (json.loads((tmp_path / which / name).read_text()) for which in ("whole", "cut"))
        assert whole.pop("timestamp") and cut.pop("timestamp")
        assert cut == whole and cut["missing"] == []


def test_continual_edits_killed_once_give_the_matrix_and_texts_of_a_whole_run(model: Path, tmp_path: Path) -> None:
    values = {"model": str(model), "n_sequences": 2, "n_datapoints": 2, "arm": "self_edits", "max_tokens": 12}
    values |= TRAINING | SERVER
    with whole_run_beside("06", tmp_path / "whole", values):
        interrupted("06", tmp_path / "cut", values, n_units=2 + 2 * 2 + 2 * 2, seed=6, kills=1)
    whole, cut = (json.loads((tmp_path / which / "summary_continual.json").read_text()) for which in ("whole", "cut"))
    assert cut == whole


def test_a_rest_em_training_killed_in_the_middle_writes_the_same_weights(model: Path, tmp_path: Path) -> None:
    values = {"model": str(model), "train": True, "lora_rank": 4, "lora_alpha": 8, "finetune_epochs": 4}
    values |= {"exp_name": "round1"}
    out = tmp_path / "cut"
    with whole_run_beside("05", tmp_path / "whole", values):
        killed = kill_when(
            "05", out, values, lambda: any(out.glob("model.checkpoints-*/checkpoint-*/trainer_state.json"))
        )
        assert killed and not (out / "model").exists()
        finish("05", out, values)
    for name in ("sft_best1of2_round1.jsonl", "model/model.safetensors", "model/sft_result.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

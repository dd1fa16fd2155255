"""SFT of a round on a tiny model: completion-only loss, a merged folder, resume, bad files refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seal_nb import sft
from seal_nb.errors import DataError, SettingsError
from seal_nb.sft import IGNORED, SftSettings, example, read_sft_rows, train_sft
from tests.ttt.tiny import save_tiny_model

ROWS = [
    {"prompt": "List implications of: the lamp.\n", "completion": "1. There is a lamp."},
    {"prompt": "List implications of: the hill.\n", "completion": "1. There is a hill."},
]
SETTINGS = SftSettings(
    lora_rank=8, lora_alpha=16, epochs=30, learning_rate=2e-2, gradient_accumulation_steps=1
)


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


def test_training_lowers_the_loss_of_the_completions_in_a_plain_merged_model(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    done = train_sft(sft_file(tmp_path), model=str(base), model_dir=tmp_path / "next", settings=SETTINGS)
    assert (done.n_steps, done.n_examples, len(done.losses)) == (60, 2, 60)
    assert completion_loss(done.model_dir) < completion_loss(base) / 2
    assert not list(done.model_dir.glob("adapter*")), "merged, not an adapter"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "next", "sft_best1of2_x.jsonl"]


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    few = SftSettings(lora_rank=4, lora_alpha=8, epochs=2, gradient_accumulation_steps=1)
    models = [
        train_sft(sft_file(tmp_path), model=str(base), model_dir=tmp_path / name, settings=few).model_dir
        for name in ("a", "b")
    ]
    first, again = (AutoModelForCausalLM.from_pretrained(m).state_dict() for m in models)
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_loss_is_on_the_completion_and_its_end_only(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "base"))
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
    ],
)
def test_a_file_that_is_not_one_is_refused_with_line_and_field(
    tmp_path: Path, rows: list[dict], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read_sft_rows(sft_file(tmp_path, rows))


FEW = SftSettings(lora_rank=4, lora_alpha=8, epochs=3, gradient_accumulation_steps=1)


def trained(
    base: Path, folder: Path, name: str, rows: list[dict] = ROWS, settings: SftSettings = FEW
) -> Path:
    file = sft_file(folder, rows)
    return train_sft(file, model=str(base), model_dir=folder / name, settings=settings).model_dir


def cut_short(base: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **what: Any) -> Path:
    """A training whose process dies before the model is written; gives its folder of checkpoints."""

    def pulled_plug(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(sft, "_save_merged", pulled_plug)
        with pytest.raises(KeyboardInterrupt):
            trained(base, folder, name, **what)
    assert not (folder / name).exists()
    (checkpoints,) = folder.glob(f"{name}.checkpoints*")
    return checkpoints


def are_equal(first: Path, second: Path) -> bool:
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_training_resumes_to_the_model_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_model(tmp_path / "base")
    whole = trained(base, tmp_path, "whole")
    cut_short(base, tmp_path, "cut", monkeypatch)
    assert are_equal(whole, trained(base, tmp_path, "cut"))


@pytest.mark.parametrize(
    "other", [{"rows": ROWS[::-1]}, {"settings": replace(FEW, learning_rate=1e-2)}], ids=["rows", "settings"]
)
def test_a_training_on_something_else_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    base = save_tiny_model(tmp_path / "base")
    whole = trained(base, tmp_path, "whole")
    cut_short(base, tmp_path, "cut", monkeypatch, **other)
    assert are_equal(whole, trained(base, tmp_path, "cut"))
    assert not list(tmp_path.glob("cut.checkpoints*"))


@pytest.mark.parametrize("state", [None, '{"global_step": 6, "log_hi'])
def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str | None
) -> None:
    base = save_tiny_model(tmp_path / "base")
    whole = trained(base, tmp_path, "whole")
    checkpoints = cut_short(base, tmp_path, "cut", monkeypatch)
    (checkpoint,) = checkpoints.glob("checkpoint-*")
    (checkpoint / "trainer_state.json").unlink()
    if state:
        (checkpoint / "trainer_state.json").write_text(state)
    assert are_equal(whole, trained(base, tmp_path, "cut"))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="finetune_lr is 0"):
        SftSettings(learning_rate=0)

"""Stacked adapters against merging as published: the same adapter and the same answers at every step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from seal_nb.errors import RunMismatch
from seal_nb.experiments.continual import (
    ContinualSettings,
    Edits,
    content_of,
    draw_sequences,
    edit_and_merge,
    edit_request,
)
from seal_nb.experiments.session import ask, ttt_server
from seal_nb.experiments.settings import Training
from seal_nb.passages import Passage, Question
from seal_nb.peft_files import merge_stack
from seal_nb.storage import Journal
from tests.ttt.tiny import save_tiny_model

PASSAGES = [
    Passage(
        title=f"T{n}",
        context=f"The {word} is on the hill.",
        questions=(Question(question=f"Where is the {word}?", answer="on the hill"),),
        hand_written=f"A hill has a {word}.\nThe {word} stands.",
    )
    for n, word in enumerate(("lamp", "goat", "mill"))
]
TRAINING = Training(
    lora_rank=4, lora_alpha=8, target_modules=("all-linear",), finetune_epochs=4, finetune_lr=5e-3, max_new_tokens=8
)
SETTINGS = {"n_sequences": 1, "n_datapoints": 3, "arm": "hand_written", "training": TRAINING}
SERVER = {"n_workers": 1, "device": "cpu", "dtype": "float32", "n_slots": 2}


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(input_ids=torch.arange(40)[None]).logits


def test_stacking_equals_merging_within_rounding_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merges: list[Path] = []
    monkeypatch.setattr("seal_nb.peft_files.merge_stack", lambda *how: merges.append(merge_stack(*how)))
    base = save_tiny_model(tmp_path / "base")
    merged, stacked = (ContinualSettings(strategy=name, **SETTINGS) for name in ("merged", "stacked"))  # type: ignore[arg-type]
    (sequence,) = draw_sequences(PASSAGES, stacked)
    done, again, ours = (Edits(passages=sequence) for _ in range(3))
    with Journal(tmp_path / "j.jsonl") as journal, ttt_server(str(base), folder=tmp_path / "server", **SERVER) as ttt:
        where = {"folder": tmp_path / "merged"}
        ttt.model_id, model_id = "another", ttt.model_id
        with pytest.raises(RunMismatch, match=f"asked of model another, .* has {model_id}"):
            edit_and_merge(ttt, done, merged, journal, **where)
        ttt.model_id = model_id
        edit_and_merge(ttt, done, merged, journal, **where)
        edit_and_merge(ttt, again, merged, journal, **where)
        for step in range(1, 4):
            text = done.texts[step - 1]
            request = edit_request(ours, text, stacked, model_id=model_id)
            reply = ask(ttt, [request], journal).of(request)
            ours.add(text, request, reply)
            theirs = done.replies[step - 1]
            assert reply.adapter_texts == theirs.adapter_texts, f"step {step}"
            losses, their_losses = torch.tensor(reply.epoch_losses), torch.tensor(theirs.epoch_losses)
            assert torch.allclose(losses, their_losses, rtol=1e-4)
    assert again.stack == done.stack and again.replies == done.replies
    assert [path.name for path in merges] == ["model_1", "model_2", "model_3"], "a finished run merges nothing again"
    adapters = [tmp_path / "server" / "adapters" / name for name in ours.stack]
    at_once = merge_stack(str(base), adapters, tmp_path / "at_once")
    (step_by_step,) = (tmp_path / "merged").glob("sequence_1_*/model_3")
    change = (logits(base) - logits(at_once)).norm()
    assert (logits(at_once) - logits(step_by_step)).norm() < 1e-3 * change
    left = sorted(path.name for path in step_by_step.parent.glob("model_*"))
    assert left == ["model_3"], "models on the way are not kept"


def test_another_setting_passage_place_or_model_has_a_folder_of_its_own() -> None:
    """Otherwise a merged model of an earlier run would be taken for the one asked for."""
    merged = ContinualSettings(strategy="merged", **SETTINGS)  # type: ignore[arg-type]
    trained_more = replace(merged, training=replace(TRAINING, finetune_epochs=5))
    same_title = [replace(PASSAGES[0], context="Another text."), *PASSAGES[1:]]
    contents = [
        content_of(0, PASSAGES, merged, "m"),
        content_of(0, PASSAGES, merged, "other weights, grader or dtype"),
        content_of(1, PASSAGES, merged, "m"),
        content_of(0, PASSAGES[::-1], merged, "m"),
        content_of(0, same_title, merged, "m"),
        content_of(0, PASSAGES, replace(merged, seed=merged.seed + 1), "m"),
        content_of(0, PASSAGES, trained_more, "m"),
    ]
    assert len(set(contents)) == len(contents)
    assert content_of(0, list(PASSAGES), merged, "m") == contents[0]

"""CPT of all weights: trained as plain transformers would, asked as a model of its own, resumed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.cpt import CPTSettings, cpt, cpt_request, sft_settings
from seal_nb.experiments.session import TTT
from seal_nb.experiments.settings import Training
from seal_nb.passages import load_passages
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import EvalQuestion
from seal_nb.results.collect import read_run
from seal_nb.server.client import TTTClient, TTTServer
from seal_nb.sft.settings import SftJob, SftSettings
from seal_nb.sft.train import train_sft
from tests.test_notebooks import run, shown
from tests.ttt.tiny import save_tiny_model

SCHEDULE = {"finetune_epochs": 2, "finetune_lr": 3e-3, "batch_size": 2, "gradient_accumulation_steps": 2}
TRAINING = Training(max_new_tokens=8, **SCHEDULE)
TEXTS = ["The lamp is on the hill.", "A hill.", "There is a goat in the old mill.", "Mills grind.", "So it is."]


def trained_alone(base: Path, sft: SftSettings) -> dict[str, torch.Tensor]:
    """The weights after the same schedule, by a plain loop: AdamW, linear decay to 0, norms cut at 1."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    n_steps = sft.finetune_epochs * -(-len(TEXTS) // sft.examples_a_step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sft.finetune_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    draws = random.Random(sft.seed)
    for _ in range(sft.finetune_epochs):
        order = draws.sample(TEXTS, len(TEXTS))
        for start in range(0, len(order), sft.examples_a_step):
            rows = [tokenizer(text)["input_ids"] for text in order[start : start + sft.examples_a_step]]
            n_labels = sum(len(row) - 1 for row in rows)
            for row in rows:
                ids = torch.tensor([row])
                logits = model(input_ids=ids).logits[0, :-1]
                (cross_entropy(logits, ids[0, 1:], reduction="sum") / n_labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


def text_rows(folder: Path, texts: list[str]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_all_weights_are_trained_as_plain_transformers_would_train_them(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    sft = sft_settings(CPTSettings(method="full", training=TRAINING))
    file = text_rows(tmp_path, TEXTS)
    done = train_sft(SftJob(sft_file=file, model=str(base), model_dir=tmp_path / "new", settings=sft))
    assert (done.n_steps, done.n_examples, done.n_tokens) == (4, 5, 2 * sum(map(len, TEXTS)))
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    theirs = trained_alone(base, sft)
    ours = AutoModelForCausalLM.from_pretrained(done.model_dir).state_dict()
    assert all(not torch.equal(start[name], ours[name]) for name in start), "every weight has moved"
    gap = sum(float(((ours[name] - theirs[name]).double() ** 2).sum()) for name in start)
    size = sum(float(((theirs[name] - start[name]).double() ** 2).sum()) for name in start)
    assert (gap / size) ** 0.5 < 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "new", "rows.jsonl"]


def test_a_text_without_anything_to_predict_is_refused(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    file = text_rows(tmp_path, ["two", "x"])
    settings = SftSettings(method="full")
    with pytest.raises(DataError, match=r"field 'text': 'x' has no token to predict; leave it out"):
        train_sft(SftJob(sft_file=file, model=str(base), model_dir=tmp_path / "new", settings=settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The notebook's run of one arm on a tiny model, all weights."""
    folder = tmp_path_factory.mktemp("full")
    model = save_tiny_model(folder / "tiny")
    values = SCHEDULE | {"arms": "hand_written", "n_articles": 2, "max_new_tokens": 8, "n_workers": 1}
    return run(
        "04_cpt", folder / "out", model=str(model), method="full", check_unrelated=True, soft_scores=True, **values
    )


def test_the_notebook_writes_a_run_of_the_same_form_that_names_the_method(finished: Path) -> None:
    written = json.loads((finished / "cpt_run_hand_written_full.json").read_text())
    assert (written["method"], written["arm"], written["train_sequences"]) == ("full", "hand_written", 4)
    assert (written["lora_params"]["rank"], written["lora_params"]["epochs"]) == (None, 2)
    reply = written["server_reply"]
    assert len(reply["epoch_losses"]) == 2 and reply["epoch_losses"][1] < reply["epoch_losses"][0]
    assert reply["train_steps"] == 2 and len(reply["adapter_gold_logprobs"]) == 10
    run = read_run(finished / "cpt_run_hand_written_full.json")
    assert run.arm == "hand-written, all weights"
    found = run.summary()
    assert (found["n_answers"], found["notes"], found["disagreements"]) == (10, [], [])
    notebook = finished / "04_cpt.ipynb"
    assert "never edited" in shown(notebook, "unrelated") and "hand_written" in shown(notebook, "unrelated")


def test_base_and_new_model_answer_as_transformers_generate_does(finished: Path) -> None:
    reply = json.loads((finished / "cpt_run_hand_written_full.json").read_text())["server_reply"]
    request = request_of(finished)
    models = {"baseline": finished.parent / "tiny", "adapter": finished / "model_hand_written_full"}
    for side, folder in models.items():
        assert reply[f"{side}_texts"] == [generated(folder, question) for question in request.eval_questions]
    assert reply["baseline_texts"] != reply["adapter_texts"]


def generated(folder: Path, question: EvalQuestion) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(answer_prompt(question.title, question.question))["input_ids"]])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip()


def settings_of_run() -> CPTSettings:
    training = Training(lora_rank=32, target_modules=("all-linear",), max_new_tokens=8, soft_scores=True, **SCHEDULE)
    return CPTSettings(k_completions=1, arm="hand_written", method="full", training=training)


def request_of(finished: Path) -> Any:
    written = json.loads((finished / "cpt_run_hand_written_full.json").read_text())
    request = cpt_request(load_passages("shipped:val")[:2], settings_of_run(), model_id=written["model"])
    assert request.request_id == written["request_id"]
    return request


def test_what_is_finished_is_neither_trained_nor_asked_again(finished: Path) -> None:
    """No server could be started again: the finished model would be trained first."""
    weights = finished / "model_hand_written_full" / "model.safetensors"
    before, written = weights.stat().st_mtime_ns, (finished / "cpt_run_hand_written_full.json").read_text()
    own = {"model": str(finished.parent / "tiny"), "run_dir": finished / "server", "inner_loop": "no_such:module"}
    server = TTTServer(**own)
    ttt = TTT(TTTClient("tcp://127.0.0.1:1"), server=server, settings=server.settings, grader="local")
    ttt.model_id = json.loads(written)["model"]
    settings = settings_of_run()
    again = cpt(
        ttt,
        load_passages("shipped:val")[:2],
        arms="hand_written",
        method="full",
        training=settings.training,
        k_completions=1,
        check_unrelated=True,
        folder=finished,
    )
    assert weights.stat().st_mtime_ns == before
    assert again["hand_written"].value["server_reply"] == json.loads(written)["server_reply"]
    assert list(again.unrelated()["model"]) == ["never edited", "hand_written"]


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"padding_in_loss": True}, "padding_in_loss=True is a setting of adapters"),
        ({"end_mask_substring": "x"}, "end_mask_substring='x' is a setting of adapters.*leave it ''"),
    ],
)
def test_what_only_adapters_have_is_refused_with_the_remedy(training: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        CPTSettings(method="full", training=Training(**training))


def test_an_unknown_method_a_far_server_and_a_step_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="method='lorra': known are lora, full"):
        CPTSettings(method="lorra")  # type: ignore[arg-type]
    with (
        TTT(TTTClient("tcp://127.0.0.1:1")) as far,
        pytest.raises(SettingsError, match=r"endpoint is 'tcp://.*leave endpoint empty"),
    ):
        cpt(far, load_passages("shipped:val")[:1], arms="hand_written", method="full", folder=tmp_path)
    with pytest.raises(SettingsError, match="gradient_accumulation_steps is 2, which 3 processes cannot"):
        sft_settings(CPTSettings(method="full", training=TRAINING), n_processes=3)

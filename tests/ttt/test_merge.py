"""A merged folder is the model that the stack of adapters made of the base."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from seal_nb.cli import main
from seal_nb.errors import SettingsError
from seal_nb.peft_files import merge_stack, save_adapter
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import ScoreRow, score
from seal_nb.ttt.lora import Adapter, LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer
from tests.ttt.tiny import save_tiny_model

PROMPT, ANSWER = list(b"what is it?"), list(b"a clock of brass")


def trained(base: FrozenBase, text: str, stack: list[Adapter], *, rank: int) -> Adapter:
    trainer = SlotTrainer(base, n_slots=1)
    lora = LoraSettings(rank=rank, alpha=2 * rank, target_modules=("all-linear",))
    job = TrainJob(name="it", texts=(text,), lora=lora, train=TrainSettings(learning_rate=1e-2))
    trainer.submit(job, stack)
    (done,) = trainer.run()
    assert done.adapter is not None, done.error
    return done.adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FrozenBase, list[Adapter], list[Path]]:
    """A model folder, its base, and two adapters, the second trained on top of the first."""
    folder = tmp_path_factory.mktemp("merge")
    base = FrozenBase.load(save_tiny_model(folder / "model"), device="cpu", dtype="float32")
    stack: list[Adapter] = []
    for number, text in enumerate(("the first passage", "another one")):
        stack.append(trained(base, text, stack, rank=4 + 4 * number))
        save_adapter(stack[-1], folder / f"edit{number}", base_model="model")
    return folder / "model", base, stack, [folder / "edit0", folder / "edit1"]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_merged_folder_scores_as_the_stack_does(made, n: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, base, stack, folders = made
    out = merge_stack(str(model), folders[:n], tmp_path / "merged")
    row = ScoreRow(prompt_ids=PROMPT, target_ids=ANSWER, adapters=tuple(stack[:n]))
    merged = FrozenBase.load(out, device="cpu", dtype="float32")
    expected, found = (score(base, [row])[0], score(merged, [ScoreRow(prompt_ids=PROMPT, target_ids=ANSWER)])[0])
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)
    plain = score(base, [ScoreRow(prompt_ids=PROMPT, target_ids=ANSWER)])[0]
    assert (n == 0) == torch.allclose(torch.tensor(plain), torch.tensor(expected), atol=1e-2)


def test_the_merged_folder_keeps_the_dtype_that_the_base_is_stored_in(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, _, _, folders = made
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((model / name).read_bytes())
    out = merge_stack(str(half), folders[:1], tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_a_folder_without_an_adapter_is_named_and_nothing_is_written(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, _, _, folders = made
    with pytest.raises(SettingsError, match=r"no adapter at .*absent"):
        merge_stack(str(model), [*folders, tmp_path / "absent"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_command_writes_a_folder_that_loads(made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    model, _, _, folders = made
    out = tmp_path / "merged"
    assert main(["merge", str(model), *map(str, folders), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"model folder: {out}\n"
    assert FrozenBase.load(out, device="cpu", dtype="float32").model_type == "llama"
    assert main(["merge", str(model), str(tmp_path / "absent"), "--out", str(tmp_path / "no")]) == 2
    assert "absent" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("out", ["new/..", ".", "model", "model/merged", "edit0"])
def test_merging_into_the_working_folder_or_what_is_read_is_refused(
    made,  # type: ignore[no-untyped-def]
    out: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, *_ = made
    monkeypatch.chdir(model.parent)
    before = sorted(model.parent.rglob("*"))
    assert main(["merge", "./model", "edit0", "--out", out]) == 2
    assert "give a" in capsys.readouterr().err and sorted(model.parent.rglob("*")) == before

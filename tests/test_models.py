"""What names a model: every weight, the configuration and the tokenizer; not the folder it lies in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seal_nb import models
from seal_nb.errors import SettingsError
from seal_nb.models import model_identity, resolve_model
from tests.ttt.tiny import save_tiny_model

MIB = 2**20


def changed_in_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def folder_with(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-2.bin"])
def test_one_bit_in_the_middle_of_a_weight_file_is_another_model(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path / "model", name, bytes(3 * MIB))
    before = model_identity(str(folder))
    changed_in_the_middle(folder / name)
    assert model_identity(str(folder)) != before


def test_another_tokenizer_is_another_model(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    identities = [model_identity(str(folder))]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(stored | {"added": 1}))
        identities.append(model_identity(str(folder)))
    assert len(set(identities)) == 4


def test_a_copy_has_the_identity_of_its_original_and_a_hub_name_is_its_own(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    assert model_identity(str(copy)) == model_identity(str(folder))
    assert model_identity("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"


@pytest.mark.parametrize("path", ["./typo", "../typo", "/typo", "~/typo", "runs/typo", "a/b/c", "~/a/b", "~x/y"])
def test_a_path_to_no_folder_is_refused_and_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=f"no folder .*{path[-4:]}"):
        resolve_model(path)


def test_a_name_of_the_hub_is_no_path_and_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "Qwen"):  # a folder of the organisation's name hides no model of the hub
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B" and resolve_model("gpt2") == "gpt2"
    assert resolve_model("~/mine") == str(tmp_path / "mine") and resolve_model("mine") == "mine"


def test_of_a_very_large_file_every_tensor_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "WHOLE_FILE_BYTES", 0)
    monkeypatch.setattr(models, "SLICE_BYTES", 64)
    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors")
    identities = {model_identity(str(folder))}
    for name, weight in weights.items():
        save_file(weights | {name: weight + torch.tensor(0.01)}, folder / "model.safetensors")
        identities.add(model_identity(str(folder)))
    assert len(identities) == 1 + len(weights)

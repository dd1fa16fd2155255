"""The inner loop on one GPU: Qwen2.5-7B's size with random weights in bfloat16, published job statistics.

First it checks the slots against one adapter alone on this device. Then it measures training, kernels and
decoding, the published way and a careful user's way with PEFT and the Trainer, and part of a ReST-EM round
through the real inner loop. Needs the project's torch, transformers, peft and accelerate, and downloads
nothing; on an H200 it takes about four minutes. Writes what it has after each result.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --only check,training --slots 8,128 --out some.json
    python -m benchmarks.gpu --config tiny --device cpu      (shows that it runs; the numbers say nothing)
"""

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks.gpu_measure import FULL, LITTLE, Machine, checks, decoding, products, profiles, training
from benchmarks.gpu_table import markdown
from benchmarks.gpu_ways import alone, compared, round_in_slots
from benchmarks.speed_table import rounded
from seal_nb.storage import read_json, write_json

OUT = Path(__file__).with_name("gpu.json")
DRIVER = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
PARTS = {
    "matmul": products,
    "check": checks,
    "training": training,
    "profile": profiles,
    "decoding": decoding,
    "alone": alone,
    "round": round_in_slots,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", choices=("qwen2.5-7b", "small", "tiny"), default="qwen2.5-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", metavar="PART,…", help=f"some of {','.join(PARTS)}; needs --out to be kept")
    parser.add_argument("--slots", metavar="N,…", help="numbers of slots to train with, as 1,8,32,64,128")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/{OUT.name}, all parts at full size only")
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",") if arguments.only else list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only has {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    _check_device(arguments.device)
    full = arguments.config == "qwen2.5-7b" and arguments.device.startswith("cuda")
    settings = FULL if full else LITTLE
    if arguments.slots:
        settings = replace(settings, n_slots=tuple(map(int, arguments.slots.split(","))))
    machine = Machine(name=arguments.config, device=torch.device(arguments.device), settings=settings)
    out = arguments.out or (OUT if full and not arguments.only else None)
    options = {name: value for name, value in vars(arguments).items() if value and name != "out"}
    command = " ".join(["python -m benchmarks.gpu", *(f"--{name} {value}" for name, value in options.items())])
    result = {"commands": [command], **_head(machine)}
    if arguments.only and out and out.is_file():
        result = _completed(read_json(out), result)
    measure(machine, names, result, out)
    print(markdown(result))
    if "errors" in result or not result.get("correct", True):
        sys.exit(f"not all is well: {result.get('errors') or 'the slots differ from one adapter alone'}")


def measure(machine: Machine, names: Sequence[str], result: dict[str, Any], out: Path | None) -> None:
    """Fill in the parts, one after the other; one that fails is noted, and the next one begins."""
    for name in (name for name in PARTS if name in names):
        started_s = time.monotonic()
        result[name] = {}
        try:
            for piece in PARTS[name](machine):
                result[name] |= rounded(piece)
                print(f"{name}: {json.dumps(rounded(piece))}", flush=True)
                if out:
                    write_json(out, result)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other parts are worth having
            traceback.print_exc()
            result.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:500]
        gc.collect()
        if machine.is_cuda:
            torch.cuda.empty_cache()
        result.setdefault("seconds", {})[name] = rounded(time.monotonic() - started_s)
        print(f"{name}: {result['seconds'][name]} s", flush=True)
        result |= _summary(result)
    if out:
        write_json(out, result)


def _head(machine: Machine) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(machine.device) if machine.is_cuda else "CPU",
        "driver": subprocess.getoutput(DRIVER) if machine.is_cuda else None,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "config": machine.name,
        "dtype": "bfloat16",
        "settings": asdict(machine.settings),
    }


def _completed(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """With what was measured before, of the same model on the same card with the same versions."""
    if any(earlier.get(key) != result[key] for key in ("device", "versions", "config")):
        return result
    parts = {key: value for key, value in earlier.items() if key in PARTS or key == "seconds"}
    return parts | result | {"commands": earlier["commands"] + result["commands"]}


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are quoted, where their parts are there."""
    found: dict[str, Any] = {}
    if result.get("check"):
        found["correct"] = all(c["passed"] for c in result["check"].values())
    if rows := result.get("training"):
        found["matmul_share"] = max(rows.values(), key=lambda row: row["tokens_per_s"])["matmul_share"]
    if result.get("round") and "baseline_s" in result.get("alone", {}):
        found |= rounded(compared(result["round"], result["alone"]))
    return found


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"device is {device!r} and there is no CUDA device here; try --config tiny --device cpu")


if __name__ == "__main__":
    main()

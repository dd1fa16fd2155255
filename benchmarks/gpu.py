"""The inner loop on one GPU: Qwen2.5-7B's size with random weights in bfloat16, published job statistics.

First it checks the slots against the one-adapter path on this device, then it measures training at 1 to 64
slots, the published way, and whole jobs with their answers, from which a ReST-EM round of 750 runs is
projected. Needs torch and transformers, and downloads nothing; ends inside 10 minutes; the table comes
last. Writes `benchmarks/gpu.json` only where it ran this model on CUDA.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --config tiny --device cpu      (shows that it runs; the numbers say nothing)
"""

import argparse
import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path

OUT = Path(__file__).with_name("gpu.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", choices=("qwen2.5-7b", "small", "tiny"), default="qwen2.5-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="also print where a step of 32 slots spends")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/{OUT.name}, on CUDA at full size only")
    arguments = parser.parse_args(argv)
    _without_peft()
    from benchmarks.gpu_machine import FULL, LITTLE
    from benchmarks.gpu_measure import run
    from benchmarks.gpu_table import table

    full = arguments.config == "qwen2.5-7b" and arguments.device.startswith("cuda")
    _check_device(arguments.device)
    result = run(arguments.config, arguments.device, FULL if full else LITTLE, profile=arguments.profile)
    out = arguments.out or (OUT if full else None)
    if out:
        from seal_nb.runs import write_json

        write_json(out, result)
    print(table(result))
    if not result["correct"]:
        sys.exit(
            "the slots differ from the one-adapter path on this device: see the first lines of the table"
        )


def _check_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"device is {device!r} and there is no CUDA device here; try --config tiny --device cpu")


def _without_peft() -> None:
    """Where PEFT is not installed, import the slots with its table of default targets in its place: nothing
    else of it is used here."""
    if importlib.util.find_spec("peft"):
        return
    importlib.import_module("transformers")  # looks for PEFT itself, and must not find this
    peft, utils, constants = (types.ModuleType(n) for n in ("peft", "peft.utils", "peft.utils.constants"))
    peft.LoraConfig = None  # type: ignore[attr-defined]
    defaults = {"qwen2": ["q_proj", "v_proj"]}
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = defaults  # type: ignore[attr-defined]
    stand_ins = {m.__name__: m for m in (peft, utils, constants)}
    sys.modules |= stand_ins
    importlib.import_module("seal_nb.ttt.lora")
    for name in stand_ins:
        del sys.modules[name]


if __name__ == "__main__":
    main()

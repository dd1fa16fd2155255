"""One real vLLM server on this machine's CPU for the whole directory, with the small model in float32.

It runs from an environment of its own (`make vllm-env`). Where that is missing these tests are skipped, but
in continuous integration they fail.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seal_nb.engines.local import LocalEngine, load_local_engine
from seal_nb.engines.vllm import VllmEngine, VllmServer, vllm_python
from seal_nb.errors import SettingsError
from seal_nb.peft_files import save_adapter
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.trainer import SlotTrainer

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Facts that nobody knows before; rank, learned modules and length differ on purpose.
LESSONS = {
    "tides": (("The Oskavel tide clock\nThe Oskavel tide clock was built by Ilse Corvandt in 1893.",), 8),
    "moons": (("Zor\nZor is a moon with two violet seas.", "Zor\nIts seas are violet."), 16),
    "bells": (("Pellanmoor\nThe bells of Pellanmoor ring only in fog.",), 4),
}


def on_cpu(model: str, *, run_dir: Path) -> VllmServer:
    """Small and quick to start."""
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    arguments = ("--max-model-len=512", "--enforce-eager")
    small = {"dtype": "float32", "max_adapters": 4, "max_lora_rank": 16, "arguments": arguments}
    return VllmServer(model, run_dir=run_dir, start_timeout_s=400.0, **small)  # type: ignore[arg-type]


@pytest.fixture(scope="session", autouse=True)
def vllm_is_there() -> None:
    try:
        vllm_python()
    except SettingsError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, small_model_dir: str) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("vllm")
    with on_cpu(small_model_dir, run_dir=folder) as server:
        yield server


@pytest.fixture
def engine(server: VllmServer) -> VllmEngine:
    return VllmEngine.of(server, max_parallel=16, timeout_s=120.0)


@pytest.fixture(scope="session")
def local(small_model_dir: str) -> LocalEngine:
    """The same model in this process, in float32."""
    return load_local_engine(small_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def adapters(local: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained side by side by the inner loop's trainer, kept in PEFT's format."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapters")
    trainer = SlotTrainer(local.base, n_slots=len(LESSONS))
    for name, (texts, rank) in LESSONS.items():
        lora = LoraSettings(rank=rank, alpha=2 * rank, target_modules=ALL_LINEAR)
        trainer.submit(TrainJob(name=name, texts=texts, lora=lora, train=TrainSettings(epochs=8, seed=1)))
    for trained in trainer.run():
        assert trained.adapter is not None, trained.error
        save_adapter(trained.adapter, folder / trained.job.name, base_model="base")
    return {name: folder / name for name in LESSONS}

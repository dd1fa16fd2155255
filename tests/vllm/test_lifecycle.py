"""A real vLLM server is killed, orphaned, and given other weights, with a random model of little size."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from seal_nb.engines.base import Completion, Incomplete, Sampling
from seal_nb.engines.local import load_local_engine
from seal_nb.engines.vllm import VllmEngine, VllmFailed
from tests.ttt.tiny import save_tiny_model
from tests.vllm.conftest import on_cpu

GREEDY = Sampling(max_tokens=12, temperature=0.0, top_p=1.0)
PROMPTS = ["Zor is", "a", "The bells of Pellanmoor"]
OWNER = """
import sys, time
from pathlib import Path
from tests.vllm.conftest import on_cpu
with on_cpu(sys.argv[1], run_dir=Path(sys.argv[2])) as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""


def tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=30)
    return [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    # vLLM's attention on CPU has no heads of fewer dimensions.
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0, **sizes))


@pytest.fixture(scope="module")
def orphan(model: str, tmp_path_factory: pytest.TempPathFactory):
    """A server whose owner is another process; it starts while other tests run."""
    command = [sys.executable, "-c", OWNER, model, str(tmp_path_factory.mktemp("orphan"))]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as owner:
        yield owner
        owner.kill()


def own_texts(model: str) -> list[str]:
    local = load_local_engine(model, device="cpu", dtype="float32")
    return whole(local.generate(PROMPTS, GREEDY, seeds=[0, 0, 0]))


def whole(completions: list[Completion]) -> list[str]:
    """Texts without bytes at their end that are no character yet: vLLM holds those back."""
    return [completion.text.rstrip("\N{REPLACEMENT CHARACTER}") for completion in completions]


def test_a_killed_server_is_an_error_that_says_so_and_can_be_started_again(
    orphan: subprocess.Popen[str], model: str, tmp_path: Path
) -> None:
    with on_cpu(model, run_dir=tmp_path) as server:
        assert server.process is not None
        engine, pid = VllmEngine.of(server, timeout_s=60.0), server.process.pid
        texts = whole(engine.generate(PROMPTS, GREEDY, seeds=[0, 0, 0]))
        assert texts == own_texts(model)

        processes = tree(pid)
        assert len(processes) > 1, "vLLM's engine is a process of its own"
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Incomplete, match=r"exit code -9: SIGKILL.*the end of .*vllm\.log"):
            engine.generate(PROMPTS, GREEDY, seeds=[0, 0, 0])
        assert all_gone(processes[1:]), "the engine ends with its server"
        server.start()
        again = whole(engine.generate(PROMPTS, GREEDY, seeds=[0, 0, 0]))
        assert again == texts, "the engine finds the restarted server"


def test_a_server_ends_with_an_owner_that_was_killed_outright(orphan: subprocess.Popen[str]) -> None:
    assert orphan.stdout is not None
    pid = int(orphan.stdout.readline())
    processes = tree(pid)
    orphan.kill()
    orphan.wait()
    assert all_gone(processes)


def test_a_model_that_is_none_is_an_error_with_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(VllmFailed, match=r"exit code [1-9].*\n(.*\n)*.*Error"):
        on_cpu(str(tmp_path / "model"), run_dir=tmp_path).start()

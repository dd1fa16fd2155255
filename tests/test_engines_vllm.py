"""The vLLM server's life and options, on a stand-in that starts in a moment (tests/vllm has the real one)."""

import json
import os
import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from seal_nb.engines.base import Completion, Incomplete, NotAsked, Sampling
from seal_nb.engines.vllm import PLUGIN, VllmEngine, VllmFailed, VllmServer, vllm_python
from seal_nb.errors import SettingsError

FAKE = Path(__file__).with_name("fake_vllm.py")
GREEDY = Sampling(max_tokens=4, temperature=0.0)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "notes.jsonl"
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(path))
    return path


def noted(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in notes.read_text().splitlines()]


def posts(notes: Path) -> list[str]:
    return [entry["path"] for entry in noted(notes) if "path" in entry]


def model(folder: Path, **config: object) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    return str(folder)


def adapter(folder: Path, rank: int = 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def server_of(tmp_path: Path, **changed: Any) -> VllmServer:
    served = changed.pop("model", None) or model(tmp_path / "model")
    return VllmServer(served, run_dir=tmp_path / "run", python=str(FAKE), start_timeout_s=60.0, **changed)


def test_a_server_serves_for_a_block_with_plain_sampling_and_is_gone_after(tmp_path: Path, notes: Path) -> None:
    with server_of(tmp_path, max_lora_rank=16) as server:
        (completion,) = VllmEngine.of(server).generate(["hello"], Sampling(max_tokens=4), seeds=[9])
        assert completion == Completion(text="base: hello", n_tokens=2, finish_reason="stop")
        assert server.process is not None
        process = psutil.Process(server.process.pid)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    with pytest.raises(VllmFailed, match="not running; start it"):
        server.check()
    start, request = noted(notes)
    assert start["argv"][:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert "--max-lora-rank=16" in start["argv"] and "--max-cpu-loras=8" in start["argv"]
    assert server.key not in " ".join(start["argv"]) and start["environment"]["VLLM_API_KEY"] == server.key
    assert start["environment"]["PYTHONPATH"] == str(PLUGIN), "only our plugin"
    assert start["environment"]["SEAL_NB_VLLM_PARENT"] == str(os.getpid())
    assert start["environment"]["VLLM_SERVER_DEV_MODE"] is None, "its endpoints need no key"
    assert server.key not in (server.run_dir / "vllm.log").read_text()
    wanted = {"temperature": 1.0, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 9}
    assert wanted.items() <= request["body"].items(), "the model's own defaults do not count"


def test_the_plugin_is_found_by_its_entry_point() -> None:
    said = (next(PLUGIN.glob("*.dist-info")) / "entry_points.txt").read_text()
    assert re.search(r"\[vllm.general_plugins\]\nseal_nb = seal_nb_vllm_plugin:register", said)
    assert "def register()" in (PLUGIN / "seal_nb_vllm_plugin.py").read_text()


def test_a_crash_at_the_start_tells_exit_code_and_last_lines(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "crash")
    with pytest.raises(VllmFailed, match=r"exit code 3\); the end of .*vllm.log:\nRuntimeError: no such device"):
        server_of(tmp_path).start()


def test_a_server_that_is_never_ready_is_ended_at_the_time_out(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "silent")
    server = VllmServer(model(tmp_path / "m"), run_dir=tmp_path, python=str(FAKE), start_timeout_s=2.0)
    with pytest.raises(VllmFailed, match=r"not ready within start_timeout_s=2.*\nloading for ever"):
        server.start()
    assert server.process is None and not psutil.pid_exists(noted(notes)[0]["pid"])


def test_a_server_that_dies_at_a_prompt_keeps_what_came_and_says_why_the_rest_is_missing(
    tmp_path: Path, notes: Path
) -> None:
    told: list[int] = []
    with server_of(tmp_path) as server:
        engine = VllmEngine.of(server, max_parallel=1)
        with pytest.raises(Incomplete, match=r"3 of 5 texts are missing.*exit code 137.*vllm\.log") as caught:
            engine.generate(["a", "b", "die", "c", "d"], GREEDY, seeds=[0] * 5, on_text=lambda i, _: told.append(i))
        assert sorted(caught.value.completions) == told == [0, 1]
        assert {type(failure) for failure in caught.value.failures.values()} <= {VllmFailed, NotAsked}
        url = server.url
        server.start()
        assert server.url == url and engine.generate(["c"], GREEDY, seeds=[0])[0].text == "base: c"


def test_adapters_take_turns_under_new_names_and_are_unloaded(tmp_path: Path, notes: Path) -> None:
    folders = [adapter(tmp_path / name) for name in "xyz"]
    with server_of(tmp_path, max_adapters=2) as server:
        engine = VllmEngine.of(server)
        asked = {"seeds": [0] * 5, "adapters": [folders[0], None, folders[1], folders[2], folders[0]]}
        texts = [c.text for c in engine.generate(list("abcde"), GREEDY, **asked)]
        assert texts[1] == "base: b" and texts[0][:-1] == texts[4][:-1]
        assert len({text.split(":")[0] for text in texts}) == 4
        done = [path.split("/")[-1].split("_")[0] for path in posts(notes) if "lora" in path]
        assert done == ["load", "load", "unload", "unload", "load", "unload"]
        engine.generate(["f"], GREEDY, seeds=[0], adapters=[folders[2]])
    loads = [entry["body"] for entry in noted(notes) if entry.get("path") == "/v1/load_lora_adapter"]
    assert len({body["lora_name"] for body in loads}) == len(loads) == 4, "the prefix cache goes by the name"
    assert loads[-1]["lora_path"] == str(folders[2])


def test_a_refused_prompt_does_not_cost_the_adapters_of_later_turns(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "too-long")
    folders = [adapter(tmp_path / name) for name in "xy"]
    with (
        server_of(tmp_path, max_adapters=1) as server,
        pytest.raises(Incomplete, match="1 of 2 texts are missing") as caught,
    ):
        VllmEngine.of(server).generate(["long", "short"], GREEDY, seeds=[0, 0], adapters=folders)
    assert list(caught.value.completions) == [1]


def test_the_interpreter_is_named_or_lies_here_or_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEAL_NB_VLLM_PYTHON", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="make vllm-env"):
        vllm_python()
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert vllm_python() == str(python)
    monkeypatch.setenv("SEAL_NB_VLLM_PYTHON", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="SEAL_NB_VLLM_PYTHON"):
        vllm_python()

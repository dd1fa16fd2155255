"""Tiny chains in real processes: order, resumption, servers, and nothing left running.

A Python script stands in for a notebook, except where processes of a killed notebook must end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from seal_nb.chain import local
from seal_nb.chain.local import run_chain
from seal_nb.chain.stages import Chain, Stage, in_run
from seal_nb.errors import RunMismatch
from seal_nb.notebook_runner import StageFailed
from tests.chain.planning import ROOT
from tests.tiny_notebooks import write_notebook

run_command = local.run_command
HEAD = 'output_dir: str = "runs/x"\n'
WRITE = "from pathlib import Path\nout = Path(output_dir)\nout.mkdir(parents=True, exist_ok=True)\n"
# What a kernel starts may be in a session of its own and in no hurry to end, as a server that drains.
STUBBORN = """\
import os, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
if seconds: subprocess.Popen([sys.executable, "-c", code], start_new_session=True); time.sleep(1)
"""


COUNT = WRITE + "with (out / 'runs.txt').open('a') as f: f.write('once\\n')\nprint('counted to', n)\n1 / n"
ASK = WRITE + "assert Path(endpoint).exists(), 'server is down'\n(out / 'answer.txt').write_text('asked')"
SERVE = (
    WRITE + "import os, time\n(out / 'endpoint.json').write_text(str(os.getpid()))\n"
    "if short_lived: raise RuntimeError('out of memory')\n"
    "while not (out / 'stop').exists(): time.sleep(0.05)\n"
    "(out / 'stop').unlink()\n(out / 'endpoint.json').unlink()\n(out / 'served.txt').write_text('yes')"
)
SLEEP = WRITE + STUBBORN + "(out / 'pid').write_text(str(os.getpid()))\ntime.sleep(seconds)"
NOTEBOOKS = {
    "count": ("n: int = 1", COUNT),
    "ask": ('endpoint: str = ""', ASK),
    "serve": ("short_lived: bool = False", SERVE),
    "sleep": ("seconds: float = 60.0", SLEEP),
}
# Runs NAME.py of a folder as `seal-nb run NAME` runs a notebook: run_command's words follow.
STAND_IN = """
import ast, contextlib, sys
from pathlib import Path
from seal_nb.processes import end_with_parent
_, name, _, folder, _, parent, *words = sys.argv[1:]
end_with_parent(int(parent))
values = {}
exec((Path(folder) / f"{name}.py").read_text().partition("#---")[0], values)
for name_, text in zip(words[1::3], words[2::3]):
    values[name_] = {"true": True, "false": False}.get(text, text) if not text[0].isdigit() else ast.literal_eval(text)
exec((Path(folder) / f"{name}.py").read_text().partition("#---")[2], values)
"""


def stand_in_command(stage: Stage, run_dir: Path, notebooks: Path) -> list[str]:
    return [sys.executable, "-c", STAND_IN, *run_command(stage, run_dir, notebooks)[3:]]


@pytest.fixture
def notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts in place of notebooks."""
    monkeypatch.setattr(local, "run_command", stand_in_command)
    monkeypatch.setattr(local, "shut_down", stop_by_file)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name, (parameters, cell) in NOTEBOOKS.items():
        (folder / f"{name}.py").write_text(f"{HEAD}{parameters}\n#---\n{cell}\n")
    return folder


def count(name: str, n: int = 1, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name=name, notebook="count", title="counts", parameters={"n": n}, needs=needs, produces=("runs.txt",))


def serve(name: str = "server", **parameters: bool) -> Stage:
    return Stage(
        name=name,
        notebook="serve",
        title="a server",
        parameters=parameters,
        produces=("endpoint.json",),
        background=True,
    )


def ask(name: str = "ask") -> Stage:
    return Stage(
        name=name,
        notebook="ask",
        title="asks the server",
        parameters={"endpoint": in_run("server", "endpoint.json")},
        needs=("server",),
        produces=("answer.txt",),
    )


def chain_of(*stages: Stage) -> Chain:
    return Chain(name="tiny", stages=stages)


def stop_by_file(ready: Path) -> None:
    (ready.parent / "stop").touch()


def run(chain: Chain, run_dir: Path, notebooks: Path) -> list[str]:
    told: list[str] = []
    run_chain(chain, run_dir, notebooks=notebooks, tell=told.append)
    return told


def wait_for(what: Callable[[], bool], timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def times_run(run_dir: Path, stage: str) -> int:
    return len((run_dir / stage / "runs.txt").read_text().splitlines())


def test_done_depends_on_parameters_on_what_came_before_and_on_the_results(tmp_path: Path) -> None:
    chain = chain_of(count("a"), count("b", needs=("a",)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/runs.txt").touch()
    chain["b"].mark_done(tmp_path, seconds=1)
    assert chain["b"].is_done(tmp_path)
    other_input = chain_of(count("a", n=2), count("b", needs=("a",)))
    assert not other_input["b"].is_done(tmp_path)
    other_parameter = chain_of(count("a"), count("b", n=3, needs=("a",)))
    assert not other_parameter["b"].is_done(tmp_path)
    (tmp_path / "b/runs.txt").unlink()
    assert not chain["b"].is_done(tmp_path)


def test_identity_does_not_depend_on_the_run_folder(tmp_path: Path) -> None:
    chain = chain_of(serve(), ask())
    chain["ask"].mark_done(tmp_path / "here", seconds=1)
    (tmp_path / "here/ask").mkdir()
    (tmp_path / "here/ask/answer.txt").touch()
    (tmp_path / "here").rename(tmp_path / "there")
    assert chain["ask"].is_done(tmp_path / "there")


def test_finished_stages_are_kept_and_a_failed_one_is_repeated(tmp_path: Path, notebooks: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(StageFailed, match=r"stage 'b' ended with exit code 1.*logs/b\.log"):
        run(chain_of(count("a"), count("b", n=0, needs=("a",)), count("c")), run_dir, notebooks)
    assert "ZeroDivisionError" in (run_dir / "logs/b.log").read_text()
    assert not (run_dir / "c").exists()
    told = run(chain_of(count("a"), count("b", needs=("a",)), count("c")), run_dir, notebooks)
    assert [times_run(run_dir, name) for name in "abc"] == [1, 2, 1]
    assert "[1/3] a (count): finished before, kept" in told
    assert "    counted to 1" in told
    assert any(line.startswith("[3/3] c (count): done in ") for line in told)


def test_stage_that_does_not_write_its_result_has_failed(tmp_path: Path, notebooks: Path) -> None:
    stage = Stage(name="a", notebook="count", title="", produces=("other.json",))
    with pytest.raises(StageFailed, match=r"did not write other\.json"):
        run(chain_of(stage), tmp_path / "run", notebooks)


def test_server_is_up_for_those_who_need_it_and_ends_in_order_after_the_last(tmp_path: Path, notebooks: Path) -> None:
    run_dir = tmp_path / "run"
    told = run(chain_of(serve(), ask("ask"), ask("again"), count("later")), run_dir, notebooks)
    assert (run_dir / "server/served.txt").exists()
    begin = [line for line in told if not line.startswith("    ")]
    stopped = begin.index("server: stopped")
    assert begin[0] == "server (serve): a server"
    assert [line.split()[1] for line in begin[stopped - 1 : stopped + 2 : 2]] == ["again", "later"]
    (run_dir / "server/served.txt").unlink()
    run(chain_of(serve(), ask("ask"), ask("again"), count("later")), run_dir, notebooks)
    assert not (run_dir / "server/served.txt").exists(), "a server was started for finished stages"


def test_a_silent_stage_is_told_of(tmp_path: Path, notebooks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "QUIET_S", 0.2)
    slow = Stage(
        name="slow", notebook="sleep", title="", needs=("server",), produces=("pid",), parameters={"seconds": 1.5}
    )
    told = run(chain_of(serve(), slow), tmp_path / "run", notebooks)
    assert any("slow: still running after" in line for line in told)


def test_server_that_ends_early_ends_the_stage_that_needs_it(tmp_path: Path, notebooks: Path) -> None:
    with pytest.raises(StageFailed, match=r"server 'server' ended early.*logs/server\.log"):
        slow = Stage(name="slow", notebook="sleep", title="", needs=("server",))
        run(chain_of(serve(short_lived=True), slow), tmp_path / "run", notebooks)
    assert "out of memory" in (tmp_path / "run/logs/server.log").read_text()


CHAIN_PROCESS = """
import sys
from pathlib import Path
from seal_nb.chain.stages import Chain, Stage
from seal_nb.chain import local
local.shut_down = lambda ready: (ready.parent / "stop").touch()
if sys.argv[4] == "stand-in":
    from tests.chain.test_local import stand_in_command
    local.run_command = stand_in_command
server = Stage(name="server", notebook="serve", title="", produces=("endpoint.json",), background=True)
first = Stage(name="first", notebook="count", title="", produces=("runs.txt",))
wait = {"seconds": float(sys.argv[3])}
slow = Stage(name="slow", notebook="sleep", title="", needs=("server",), parameters=wait)
local.run_chain(
    Chain(name="tiny", stages=(server, first, slow)),
    Path(sys.argv[1]),
    notebooks=Path(sys.argv[2]),
    tell=lambda line: print(line, flush=True),
)
"""


def start_chain(run_dir: Path, notebooks: Path, seconds: float = 60.0) -> subprocess.Popen[str]:
    kind = "stand-in" if (notebooks / "count.py").exists() else "notebooks"
    words = [sys.executable, "-c", CHAIN_PROCESS, str(run_dir), str(notebooks), str(seconds), kind]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not [process for process in processes if process.is_running() and process.status() != "zombie"]


def end_in_the_middle(run_dir: Path, notebooks: Path, number: signal.Signals) -> list[psutil.Process]:
    """Send a signal to a chain whose server is up and whose second stage runs; what was below it."""
    chain = start_chain(run_dir, notebooks)
    wait_for(lambda: (run_dir / "slow/pid").exists() or chain.poll() is not None)
    tree = psutil.Process(chain.pid).children(recursive=True)
    kernels = [int((run_dir / "slow/pid").read_text()), int((run_dir / "server/endpoint.json").read_text())]
    assert set(kernels) <= {process.pid for process in tree}
    os.kill(chain.pid, number)
    chain.wait(30)
    return tree


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_chain_that_is_told_to_end_leaves_no_process(tmp_path: Path, notebooks: Path, number: signal.Signals) -> None:
    tree = end_in_the_middle(tmp_path / "run", notebooks, number)
    wait_for(lambda: all_gone(tree), 20)


def test_chain_that_is_killed_leaves_no_process_and_goes_on_when_started_again(tmp_path: Path) -> None:
    run_dir, notebooks = tmp_path / "run", tmp_path / "notebooks"
    for name, (parameters, cell) in NOTEBOOKS.items():
        write_notebook(notebooks, name, f"{HEAD}{parameters}", cell)
    tree = end_in_the_middle(run_dir, notebooks, signal.SIGKILL)
    wait_for(lambda: all_gone(tree), 20)
    # The same experiment with a shorter wait: the first stage is kept.
    output, _ = (again := start_chain(run_dir, notebooks, seconds=0.0)).communicate(timeout=240)
    assert again.returncode == 0, output
    assert "[1/2] first (count): finished before, kept" in output
    assert times_run(run_dir, "first") == 1


def test_second_chain_in_the_same_folder_is_refused_while_the_first_runs(
    tmp_path: Path, notebooks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "TAKEOVER_TIMEOUT_S", 0.5)
    run_dir = tmp_path / "run"
    chain = start_chain(run_dir, notebooks)
    try:
        wait_for(lambda: (run_dir / "first/runs.txt").exists() or chain.poll() is not None)
        with pytest.raises(RunMismatch, match=rf"in use by another run \(process {chain.pid},"):
            run(chain_of(count("other")), run_dir, notebooks)
        assert not (run_dir / "other").exists()
    finally:
        chain.terminate()
        chain.wait(30)


def test_marker_is_readable_json(tmp_path: Path) -> None:
    chain = chain_of(count("a"))
    chain["a"].mark_done(tmp_path, seconds=12.34)
    marker = json.loads((tmp_path / ".done/a.json").read_text())
    assert marker["seconds"] == 12.3
    assert marker["notebook"] == "count"

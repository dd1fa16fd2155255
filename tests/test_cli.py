"""The console command as a user calls it: real processes, their exit codes and what they say."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seal_nb.cli import main
from tests.tiny_notebooks import write_notebook

ROOT = Path(__file__).resolve().parent.parent


def seal_nb(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "seal_nb.cli", *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_count", 'output_dir: str = "runs/count"\nn: int = 2', "print('n is', n)", "1 / n")
    return folder


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from seal_nb.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'papermill', 'zmq', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("run", "serve", "status", "submit", "chain-status", "summarize", "grade", "demo"):
        assert re.search(rf"^    {command}\s", said, flags=re.MULTILINE)
    assert said.splitlines()[-1] == "[]"


def test_run_puts_the_executed_notebook_into_the_run_folder_and_says_so(notebooks: Path, tmp_path: Path) -> None:
    done = seal_nb("run", "01", "--notebooks", notebooks, "-p", "n", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "n is 5\nexecuted notebook: runs/count/01_count.ipynb\n"
    assert (tmp_path / "runs/count/01_count.ipynb").exists()


def test_a_run_ends_with_what_the_notebook_shows_at_its_top(tmp_path: Path) -> None:
    first = "from seal_nb.views.live import Summary\nsummary = Summary('best arm')\nsummary"
    last = "summary.fill({'best arm': 'hand-written 50 %'})"
    write_notebook(tmp_path / "notebooks", "01_look", 'output_dir: str = "runs/look"', first, last)
    done = seal_nb("run", "01", "--notebooks", tmp_path / "notebooks", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    top, row, where = done.stdout.splitlines()[-3:]
    assert top == "at a glance" and row.split() == ["best", "arm", "hand-written", "50", "%"]
    assert where == "executed notebook: runs/look/01_look.ipynb"


def test_output_option_decides_where_the_executed_notebook_goes(notebooks: Path, tmp_path: Path) -> None:
    done = seal_nb("run", "01", "--notebooks", notebooks, "--output", "x/job7.ipynb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x/job7.ipynb").exists()


def test_own_notebook_is_run_by_its_path_with_a_file_of_parameters(tmp_path: Path) -> None:
    write_notebook(tmp_path, "my own", "n = 1\nlr: float = 0.1\nname: str = 'a'", "print([n, lr, name, extra])")
    (tmp_path / "p.yaml").write_text("n: 010\nlr: 1e-3\nextra: {a: [1, 2.5]}\n")
    options = ["-f", "p.yaml", "-y", "n: 3", "-p", "n", "4", "-r", "name", "5", "--output", "out dir/x.ipynb"]
    done = seal_nb("run", "./my own.ipynb", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[4, 0.001, '5', {'a': [1, 2.5]}]\nexecuted notebook: out dir/x.ipynb\n"
    assert done.stderr.startswith("unknown parameter 'extra'; parameters: n, lr, name; it is set anyway")


@pytest.mark.parametrize("place", ["project", "project/notebooks", "elsewhere"])
def test_runs_are_in_one_folder_whoever_runs_the_notebook_and_from_where(tmp_path: Path, place: str) -> None:
    """JupyterLab and VS Code start the kernel in the notebook's folder, the command line in its own."""
    folder, elsewhere = tmp_path / "project/notebooks", tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = "from seal_nb.storage import runs_folder\nprint(runs_folder('runs/x').resolve())"
    notebook = write_notebook(folder, "01_where", 'output_dir: str = "runs/x"', text)
    (folder.parent / "pyproject.toml").write_text('[project]\nname = "seal-nb"\n')
    in_lab = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=folder).stdout
    done = seal_nb("run", notebook, cwd=tmp_path / place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == in_lab.strip() == str(folder.parent / "runs/x")
    assert (folder.parent / "runs/x/01_where.ipynb").is_file() and not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["run", "s3://b/x.ipynb"], ["run", "01", "--output", "gs://b/x.ipynb"], ["run", "01", "-f", "abfs://b/p.yaml"],
        ["run", "01", "--output", "file:///x.ipynb"], ["run", "01", "-p", "output_dir", "hdfs:/x"],
        ["grade", "a.jsonl", "--out", "https://h/x.jsonl"], ["merge", "embedded", "s3://b/a", "--out", "x"],
        ["submit", "continual", "--small", "--executor", "local", "--run-dir", "gs://b/x"],
        ["chain-status", "s3://b/run"], ["summarize", "s3://b/run.json"], ["runs", "list", "s3://b/runs"],
    ],
)  # fmt: skip
def test_address_where_a_file_or_folder_is_wanted_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEAL_RUNS", "")
    assert main(words) == 2
    assert "is an address; give a file or folder of this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


REFUSALS = [
    row.split(" | ")
    for row in (ROOT / "docs/refusals.md").read_text().splitlines()
    if re.match(r"\| `(run|submit|chain-status) ", row)
]


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[0].strip("| `"))
def test_refusal_says_what_the_page_shows_and_leaves_nothing(
    row: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEAL_RUNS", str(tmp_path / "runs"))
    words, message, remedy = (part.strip("| ") for part in row)
    assert main(shlex.split(words.strip("`"))) == 2
    said = capsys.readouterr().err
    assert message in said and remedy in said
    assert not list(tmp_path.iterdir())


def test_raising_cell_gives_exit_code_1_and_the_error_in_short(notebooks: Path, tmp_path: Path) -> None:
    done = seal_nb("run", "01", "--notebooks", notebooks, "-p", "n", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "runs/count/01_count.ipynb" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "02"], "no stage '02'; stages: 01_count"),
        (["run", "01", "-p", "m", "1"], "unknown parameter 'm'; parameters: output_dir, n"),
        (["run", "other.ipynb"], "no file 'other.ipynb', and no stage; stages: 01_count"),
        (["run", "01", "-f", "missing.yaml"], "missing.yaml: no such file"),
        (["run", "01", "-p", "n", "many"], "parameter 'n': 'many' is not int"),
    ],
)
def test_wrong_use_of_run_gives_one_line_and_exit_code_2(notebooks: Path, words: list[str], said: str) -> None:
    done = seal_nb(*words, "--notebooks", notebooks)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_parameters_of_a_stage_can_be_listed(notebooks: Path) -> None:
    done = seal_nb("run", "01", "--notebooks", notebooks, "--parameters")
    assert done.stdout.splitlines() == ["output_dir: str = 'runs/count'", "n: int = 2"]


def test_summary_of_a_published_run_is_one_object_with_the_published_numbers(golden: Path) -> None:
    run = golden / "results" / "rank_iter0.json.gz"
    done = seal_nb("summarize", run, "--json")
    assert done.returncode == 0, done.stderr
    stored = json.loads(gzip.decompress(run.read_bytes()))["overall"]
    computed = json.loads(done.stdout)["overall"]
    assert {name: computed[name] for name in stored} == stored


def test_summary_says_what_a_file_cannot_give(golden: Path) -> None:
    done = seal_nb("summarize", golden / "results" / "cpt_base.json")
    assert "adapter_accuracy: 0.4097" in done.stdout
    assert "does not say which question belongs to which passage" in done.stderr


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_summary_of_something_else_is_refused(tmp_path: Path, option: list[str]) -> None:
    (tmp_path / "x.json").write_text("[]")
    done = seal_nb("summarize", tmp_path / "x.json", *option)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "neither a single-passage run" in done.stderr


def test_grading_keeps_order_and_says_how_it_agrees_with_the_verdicts_in_the_file(tmp_path: Path) -> None:
    rows = [
        {"question": "Where does the barge lie?", "gold": "in Orle", "answer": "It lies in Orle.", "verdict": True},
        {"question": "Who built the clock?", "gold": "Ilse Corvandt", "answer": "Nobody knows.", "verdict": False},
        {"question": "Who paid?", "gold": "Anna", "answer": "", "verdict": None},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = seal_nb("grade", "in.jsonl", "--out", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    graded = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in graded] == ["CORRECT", "INCORRECT", "INCORRECT"]
    assert [row["reference_verdict"] for row in graded] == [True, False, None]
    assert "kappa" in done.stdout


def test_grading_with_an_unknown_grader_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"question": "q", "gold": "g", "answer": "a"}\n')
    done = seal_nb("grade", "in.jsonl", "--out", "out.jsonl", "--grader", "oracle", cwd=tmp_path)
    assert done.returncode == 2
    assert "'oracle'" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_server_is_started_asked_for_its_status_and_ended(tmp_path: Path) -> None:
    ready = tmp_path / "endpoint.json"
    stub = ["--inner-loop", "tests.server.stub_loop:load"]
    words = ["serve", "--endpoint", "tcp://127.0.0.1:0", "--run-dir", str(tmp_path), *stub]
    server = subprocess.Popen([sys.executable, "-m", "seal_nb.cli", *words], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists() and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        status = seal_nb("status", "--endpoint", ready)
        assert status.returncode == 0, status.stderr
        assert json.loads(status.stdout)["server_id"] == json.loads(ready.read_text())["server_id"]
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
    assert not ready.exists()


def test_status_without_a_server_says_where_it_looked() -> None:
    done = seal_nb("status", "--endpoint", "tcp://127.0.0.1:1")
    assert done.returncode == 2
    assert "tcp://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_option_of_serve_is_refused() -> None:
    done = seal_nb("serve", "--prot", "1")
    assert done.returncode == 2
    assert "--prot" in done.stderr


SLEEP = """
import time
from pathlib import Path
try:
    Path("began").touch()
    time.sleep(60)
finally:
    Path("closed").touch()
"""


def test_sigterm_interrupts_the_cell_which_closes_what_it_holds(tmp_path: Path) -> None:
    write_notebook(tmp_path / "notebooks", "01_sleep", 'output_dir: str = "runs/sleep"', SLEEP)
    words = [sys.executable, "-m", "seal_nb.cli", "run", "01", "--notebooks", "notebooks"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(words, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "began").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    run.terminate()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "cell [2] raised KeyboardInterrupt" in said
    assert (tmp_path / "closed").exists()
    assert "KeyboardInterrupt" in (tmp_path / "runs/sleep/01_sleep.ipynb").read_text()


def test_kernel_that_is_killed_is_a_failed_stage(tmp_path: Path) -> None:
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(tmp_path / "notebooks", "01_die", 'output_dir: str = "runs/die"', kill)
    done = seal_nb("run", "01", "--notebooks", tmp_path / "notebooks", cwd=tmp_path)
    assert done.returncode == 1
    assert "01_die: its kernel died" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs/die/01_die.ipynb").exists()

"""Words from elsewhere, in a chain's record, its folder, settings and the environment, are data: never a command, an
option or a path out of the folder."""

import argparse
import json
import os
import shutil
import subprocess
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from seal_nb import storage
from seal_nb.chain.local import failing_cell, in_use_since, read_record, run_chain
from seal_nb.chain.slurm import SlurmError, dry_run, read_site, restart_server
from seal_nb.chain.stages import as_options, make_chain
from seal_nb.cli import _chain_status as chain_status
from seal_nb.errors import DataError, SettingsError
from tests.chain.planning import ROOT, SMALL, cluster, with_a_server

HOSTILE = [
    "$(touch ran)", "`touch ran`", "a;touch ran", "a[$(touch ran)]", "x\ntouch ran\n", "' \"; touch ran #", "~/a",
    "* ?", "a\\ b\t c  d", "é ☃ \u2028\x85", "#x", "!!", "a\r", "$HOME", "&& touch ran", "%j %u", "a=b", " -p model b",
]  # fmt: skip


def changed_record(run: Path, place: str, value: object) -> None:
    """Write ``value`` at ``place``, such as ``stages.0.name``, of the chain's record."""
    *parents, last = [int(word) if word.isdecimal() else word for word in place.split(".")]
    record = part = json.loads((run / "chain.json").read_text())
    for parent in parents:
        part = part[parent]
    part[last] = value
    (run / "chain.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("stages.0.name", "../outside"), ("stages.0.name", "/etc"), ("stages.0.name", "-x"), ("stages.0.name", "a\n"),
        ("stages.0.name", 7), ("stages.0.notebook", "../../x"), ("stages.0.notebook", "99_other"),
        ("stages.0.job", "1 --help"), ("stages.0.job", "--help"), ("stages.0.job", "\u0661"), ("stages.0.job", "1\n"),
        ("stages.0.job", ["1"]), ("stages.0.array", "a/b"), ("stages.0.identity", "../x"), ("stages.0.nodes", "all"),
        ("stages.0.produces", ["../../x"]), ("stages.0.produces", [".."]), ("stages.1.needs", ["nothing"]),
        ("stages.0.parameters", {"x": [[1]]}), ("stages.0.parameters", {"a b": 1}), ("stages", {"a": 1}),
        ("stages", [None]), ("name", {}),
    ],
)  # fmt: skip
def test_record_with_a_foreign_value_is_refused_by_its_field(fakes: Path, place: str, value: object) -> None:
    with_a_server(fakes)
    changed_record(fakes / "run", place, value)
    with pytest.raises(DataError) as refused:
        read_record(fakes / "run")
    field = place.replace(".0", "[0]").replace(".1", "[1]")
    assert f"chain.json, field '{field}" in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("text", ["[" * 100_000, '{"name": ' + "9" * 5000 + "}", "\x00", '"' + "x" * 2**24 + '"'])
def test_record_that_is_deep_huge_or_no_json_is_refused(fakes: Path, text: str) -> None:
    with_a_server(fakes)
    (fakes / "run/chain.json").write_text(text)
    with pytest.raises(DataError, match=r"chain\.json"):
        read_record(fakes / "run")


def test_no_command_and_no_other_folder_of_a_record_is_used_when_its_server_is_started_again(fakes: Path) -> None:
    folder, _ = with_a_server(fakes)
    changed_record(fakes / "run", "stages.0.command", ["touch", "ran"])
    parameters = {"model": "$(touch ran)", "endpoint_file": "/x", "output_dir": "/y", "attach_to": "z", "n_workers": 3}
    changed_record(fakes / "run", "stages.0.parameters", parameters)
    restart_server(folder, project=fakes, tell=print)
    said = (fakes / "submitted").read_text().splitlines()[-1].partition("slurm/ttt_server.sbatch")[2]
    assert said.startswith(
        " -p output_dir run/base_server -p model $(touch ran) -p n_workers 3 "
        "-p endpoint_file run/base_server/endpoint.json -p idle_timeout_s 1800.0"
    )
    assert not (fakes / "ran").exists()


def test_another_job_of_the_user_is_not_queued_again_for_a_record_that_names_it(fakes: Path) -> None:
    folder, _ = with_a_server(fakes)
    changed_record(fakes / "run", "stages.0.job", "7")
    (fakes / "job7").write_text("JobId=7 JobName=payroll JobState=COMPLETED Reason=None\n")
    with pytest.raises(SlurmError, match="job 7 is payroll, not base_server"):
        restart_server(folder, project=fakes, tell=print)
    assert not (fakes / "requeued").exists()


@pytest.mark.parametrize("name", ["05_rest_em_round-9.log", "05_rest_em_round-9.ipynb"])
def test_status_shows_no_file_outside_the_folder_and_sends_no_commands_to_the_terminal(
    fakes: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_a_server(fakes)[0].parent
    output = {"output_type": "error", "ename": "secret", "evalue": "", "traceback": []}
    (fakes / "outside").write_text(json.dumps({"cells": [{"source": "secret", "outputs": [output]}]}))
    stage = {"name": "a", "notebook": "05_rest_em_round", "title": "", "identity": "0" * 24, "job": "9"}
    changed_record(run, "stages", [stage])
    (run / "a").mkdir()
    (run / "a/05_rest_em_round-9.log").write_text("\x1b]0;title\x07 half way\n")
    shown = argparse.Namespace(run_dir=str(run))
    assert chain_status(shown) == 1
    printed = capsys.readouterr().out
    assert "half way" in printed and printed.replace("\n", "").isprintable()
    (run / "a" / name).unlink(missing_ok=True)
    (run / "a" / name).symlink_to(fakes / "outside")
    assert chain_status(shown) == 1
    assert "secret" not in capsys.readouterr().out
    (run / "chain.json").rename(fakes / "elsewhere.json")
    (run / "chain.json").symlink_to(fakes / "elsewhere.json")
    with pytest.raises(DataError, match="not a chain's record"):
        chain_status(shown)


@pytest.mark.parametrize("mark", [[], {"identity": 1}, {"identity": "", "notebook": "", "seconds": "x"}])
def test_mark_of_a_finished_stage_with_wrong_types_is_refused_by_its_field(tmp_path: Path, mark: object) -> None:
    (tmp_path / ".done").mkdir()
    (tmp_path / ".done/results.json").write_text(json.dumps(mark))
    with pytest.raises(DataError, match=r"results\.json"):
        make_chain("evaluation", SMALL)["results"].is_done(tmp_path)


def test_links_in_a_foreign_folder_are_not_written_through(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    names = (".chain.lock", "chain.json", "logs/base_server.log")
    for name in names:
        for place in (run / name, outside / name):
            place.parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text("the user's")
        (run / name).symlink_to(outside / name)
    chain = make_chain("continual", SMALL)
    for refused in (".chain.lock", "base_server.log"):
        with pytest.raises(DataError, match=refused):
            run_chain(chain, run, notebooks=ROOT / "notebooks", tell=print)
        (run / refused).unlink(missing_ok=True)
    assert {(outside / name).read_text() for name in names} == {"the user's"}
    assert [stage.name for stage in read_record(run)] == [stage.name for stage in chain]


def test_status_of_a_foreign_folder_waits_for_no_pipe_and_reads_no_huge_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / ".chain.lock")
    assert in_use_since(tmp_path) is None
    monkeypatch.setattr(storage, "MOST_BYTES", 2**16)
    with (tmp_path / "huge.ipynb").open("wb") as file:
        file.truncate(2**28)
    tracemalloc.start()
    assert failing_cell(tmp_path / "huge.ipynb") == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


KEY = "plainsecret-q7w3e9r5"
SITE = f"export SEAL_JUDGE_KEY={KEY} SBATCH_COMMENT=https://me:{KEY}@host\n"


@pytest.mark.parametrize(
    "failure",
    ["", "set -x\n{}exit 3", "set -v\n{}exit 3", "{}echo $SEAL_JUDGE_KEY >&2; exit 3", "MY_TOKEN='{key}' (\n",
     "echo {key} >key; set -ex; export MY_KEY=$(cat key); curl -H $MY_KEY", "MY_KEY={key}; echo $MY_KEY; exit 3"],
)  # fmt: skip
def test_a_key_of_the_site_file_is_in_no_script_and_no_error(
    tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("seal_nb.errors._kept", set())
    (tmp_path / "site.sh").write_text(failure.format(SITE, key=KEY) if failure else SITE)
    if failure:
        with pytest.raises(SettingsError, match=r"site\.sh ends with code") as refused:
            read_site(tmp_path / "site.sh")
        text = str(refused.value)
    else:
        site = read_site(tmp_path / "site.sh")
        assert site["SEAL_JUDGE_KEY"] == KEY, "jobs get it"
        text = dry_run(make_chain("continual", SMALL), tmp_path / "run", cluster(site=site))
        assert "SEAL_JUDGE_KEY=***" in text
    assert not any(KEY[at : at + 8] in text for at in range(len(KEY) - 8))


def run_bash(script: str | Path, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    start = ["bash", "-c", script] if isinstance(script, str) else ["bash", str(script), *words]
    return subprocess.run(start, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose programs write the words of their command line to a file each, and nothing else."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "seal-nb", "python", "scontrol"):
        text = f'#!/bin/bash\nprintf "%s\\0" "$@" >>"$SEEN.{name}"\necho 7\n'
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("logs"))
    (tmp_path / "slurm/site.sh").write_text("seal_environment() { true; }\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    for name, value in {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "5", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def seen(shell: Path, program: str) -> list[str]:
    return (shell / f"seen.{program}").read_bytes().decode().split("\0")[:-1]


@pytest.mark.parametrize("value", HOSTILE)
def test_printed_script_runs_nothing_and_gives_sbatch_every_byte(shell: Path, value: str) -> None:
    site = {"SEAL_GPUS": "1", "SBATCH_COMMENT": value}
    chain = make_chain("continual", replace(SMALL, model=value, val_dataset=value))
    text = dry_run(chain, shell / value.replace("/", ""), cluster(site=site))
    done = run_bash(text, cwd=shell)
    assert done.returncode == 0 and not done.stderr
    words = seen(shell, "sbatch")
    assert words[words.index("model") + 1] == words[words.index("dataset") + 1] == value
    folder = f"{shell / value.replace('/', '')}/base_server"
    assert words[words.index("output_dir") + 1] == folder
    output = f"--output={folder.replace('%', '%%')}/02_ttt_server-%j.log"
    assert (output in words) is ("\\" not in folder), "a backslash would end the patterns"
    assert not (shell / "ran").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch")))
def test_script_runs_nothing_and_gives_the_notebook_every_byte(shell: Path, script: str) -> None:
    folder = f"{shell}/out/{''.join(HOSTILE).replace('/', '')}"
    given = [word for number, value in enumerate(HOSTILE) for word in ("-p", f"x{number}", value)]
    run_bash(shell / "slurm" / script, *given, "-p", "output_dir", folder, cwd=shell)
    words = seen(shell, "seal-nb")
    at = words.index("x0") - 1
    assert words[at : at + len(given)] == given
    assert Path(words[-1].removeprefix("--output=")).parent == Path(folder) and Path(folder).is_dir()
    assert not (shell / "ran").exists()


@pytest.mark.parametrize(
    ("seeds", "task", "said"),
    [
        ("42,20250101", "1", "20250101"),
        ("7", "0", "7"),
        ("1,2", "2", "no seed for task 2"),
        ("1,$(touch ran)", "1", "seed"),
    ],
)
def test_task_of_an_array_takes_the_seed_of_its_place(shell: Path, seeds: str, task: str, said: str) -> None:
    words = ["--seeds", seeds, "-p", "output_dir", f"{shell}/out"]
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": task}
    done = run_bash(shell / "slurm/continual_self_edits.sbatch", *words, cwd=shell, **array)
    if said.isdecimal():
        given = seen(shell, "seal-nb")
        assert given[given.index("seed") + 1] == said and f"{shell}/out_seed{said}" in given and "--seeds" not in given
    else:
        assert done.returncode == 2 and said in done.stderr and not (shell / "ran").exists()


@pytest.mark.parametrize("value", HOSTILE)
def test_worker_on_another_node_gets_every_byte(shell: Path, value: str) -> None:
    words = ["-p", "model", value, "-p", "output_dir", f"{shell}/out"]
    run_bash(shell / "slurm/ttt_server.sbatch", *words, cwd=shell, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="1")
    assert f"--model={value}" in seen(shell, "python")
    assert not (shell / "ran").exists()


@pytest.mark.parametrize("variable", ["n_workers", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SEAL_SERVER_JOB"])
def test_number_that_is_none_is_refused_and_not_computed(shell: Path, variable: str) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
    value = "a[$(touch ran)]"
    words = ["-p", "output_dir", f"{shell}/out", "-p", "n_workers", value if variable == "n_workers" else "1"]
    env = array if variable == "n_workers" else array | {variable: value}
    done = run_bash(shell / "slurm/ttt_server.sbatch", *words, cwd=shell, **env)
    assert done.returncode == 2
    assert not (shell / "ran").exists() and not (shell / "seen.python").exists()
    done = run_bash(shell / "slurm/accelerate.sh", cwd=shell, SLURM_JOB_ID=value)
    assert done.returncode == 2 and not (shell / "ran").exists()


def test_parameter_that_begins_as_an_option_does_is_refused_before_any_command() -> None:
    with pytest.raises(SettingsError, match=r"model is '--notebooks=x', which begins as an option"):
        as_options({"model": "--notebooks=x"})

"""What SLURM says of a job, how a stage marks itself as done, and what is said of a chain."""

import json
import os
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from seal_nb.chain import slurm as slurm_jobs
from seal_nb.chain.local import chain_status, marked_when_done, read_record, sole_use, status_lines, write_record
from seal_nb.chain.slurm import SlurmError, job_status
from seal_nb.chain.stages import Stage, make_chain
from seal_nb.errors import DataError, SettingsError
from seal_nb.processes import last_lines
from tests.chain.planning import SMALL, finish

DONE = {"JobState": "COMPLETED", "Reason": "None", "ExitCode": "0:0", "NodeList": "node1", "Restarts": "0"}


def test_without_slurm_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="no scontrol here"):
        slurm_jobs.look_up("1")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("JobId=7 JobState=RUNNING Reason=None Restarts=2 ExitCode=0:0 NodeList=node2 BatchHost=node2",
         ("running", "job 7 on node2, run 3")),
        ("JobId=7 JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=3:0 NodeList=node1 BatchHost=node1",
         ("failed", "job 7 on node1: FAILED, exit code 3")),
        ("JobId=7 JobState=TIMEOUT Reason=TimeLimit Restarts=0 ExitCode=0:15 NodeList=n BatchHost=n",
         ("failed", "job 7 on n: TIMEOUT, signal 15 (TimeLimit)")),
        ("JobId=7 JobState=RUNNING Reason=None Restarts=0 ReqNodeList=n9 NodeList=node[1-2] ExitCode=0:0",
         ("running", "job 7 on node[1-2]")),
        ("JobId=7 JobState=PENDING Reason=Dependency Restarts=0 ExitCode=0:0 NodeList=(null)",
         ("waiting", "job 7 (Dependency)")),
        ("JobId=7 JobState=BOOT_FAIL Reason=None Restarts=0 ExitCode=0:0 NodeList=(null)",
         ("failed", "job 7: BOOT_FAIL, exit code 0")),
        ("JobId=7 JobState=RUNNING Restarts=(null)", ("running", "job 7")),
        ("JobId=7 JobState=COMPLETED Reason=None Restarts=0 ExitCode=0:0 NodeList=node1",
         ("failed", "job 7 on node1 ended without its results")),
    ],
)  # fmt: skip
def test_what_slurm_says_of_a_job_is_read(fakes: Path, line: str, expected: tuple[str, str]) -> None:
    (fakes / "job7").write_text(f"{line}\n")
    assert job_status(replace(make_chain("evaluation", SMALL)["results"], job="7")) == expected


def test_stage_marks_itself_as_done_under_the_identity_of_its_chain(tmp_path: Path) -> None:
    chain = make_chain("evaluation", SMALL)
    write_record(chain, tmp_path)
    with marked_when_done(tmp_path, str(tmp_path / "results")):
        assert not chain["results"].is_done(tmp_path)
    assert chain["results"].is_done(tmp_path)


def test_stage_that_raises_or_writes_nothing_is_not_done(tmp_path: Path) -> None:
    chain = make_chain("evaluation", SMALL)
    write_record(chain, tmp_path)
    with pytest.raises(ValueError, match="cell"), marked_when_done(tmp_path, str(tmp_path / "results")):
        raise ValueError("a cell")
    with (
        pytest.raises(DataError, match=r"did not write self_edits\.json"),
        marked_when_done(tmp_path, str(tmp_path / "base_self_edits")),
    ):
        pass
    assert not (tmp_path / ".done").exists()


def test_folder_of_no_stage_is_refused_before_anything_runs(tmp_path: Path) -> None:
    write_record(make_chain("evaluation", SMALL), tmp_path)
    with pytest.raises(SettingsError, match="not the folder of a stage"), marked_when_done(tmp_path, "elsewhere"):
        raise AssertionError("ran")


def status_of(run_dir: Path, jobs: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines about an evaluation whose jobs are numbered by their stage's name."""
    monkeypatch.setattr(slurm_jobs, "look_up", lambda job: jobs[job.removeprefix("7")])
    chain = make_chain("evaluation", SMALL).with_fields({name: {"job": f"7{name}"} for name in jobs})
    return list(status_lines(chain, chain_status(chain, run_dir, job_status=job_status), run_dir))


def test_status_tells_done_from_running_waiting_failed_cancelled_lost_and_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(make_chain("evaluation", SMALL), tmp_path, "base_self_edits")
    lines = status_of(
        tmp_path,
        {
            "base_self_edits": {},
            "base_server": DONE | {"JobState": "RUNNING", "Restarts": "1"},
            "base_evaluate": DONE | {"JobState": "TIMEOUT", "Reason": "TimeLimit"},
            "base_cpt": {},
        },
        monkeypatch,
    )
    assert lines[0] == "chain evaluation: 1 of 4 stages done, 1 failed, 1 lost, 1 not started"
    found = {line.split()[0]: " ".join(line.split()[2:]) for line in lines[1:6]}
    assert lines[2].split()[1] == "02_ttt_server"
    assert found["base_self_edits"] == "done in 1 s"
    assert found["base_server"] == "running job 7base_server on node1, run 2"
    assert found["base_evaluate"].endswith("on node1: TIMEOUT, exit code 0 (TimeLimit)")
    assert found["base_cpt"] == "lost job 7base_cpt, which SLURM has forgotten"
    assert found["results"] == "not started"


def test_status_shows_why_a_stage_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "base_cpt"
    folder.mkdir()
    (folder / "04_cpt-7base_cpt.log").write_text("\n".join(f"line {n}" for n in range(9)) + "\n")
    traceback = [
        "Cell In[3], line 2\n\x1b[32m      1\x1b[39m x = 1\n\x1b[32m----> 2\x1b[39m load(dataset)\n",
        "File passages.py:9, in load(path)\n\x1b[32m----> 9\x1b[39m raise DataError(path)",
    ]
    error = nbformat.v4.new_output("error", ename="DataError", evalue="no such file", traceback=traceback)
    cell = nbformat.v4.new_code_cell("x = 1\nload(dataset)", outputs=[error], execution_count=3)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "04_cpt-7base_cpt.ipynb")
    failed = DONE | {"JobState": "FAILED", "Reason": "NonZeroExitCode", "ExitCode": "1:0"}
    lines = status_of(tmp_path, {"base_cpt": failed}, monkeypatch)
    about = lines[lines.index("base_cpt: job 7base_cpt on node1: FAILED, exit code 1") :]
    assert "  cell [3] raised DataError: no such file" in about
    assert "  at: load(dataset)" in about
    assert [line.strip() for line in about if line.startswith("      line")] == [f"line {n}" for n in range(4, 9)]
    assert about[-1] == f"  executed notebook: {folder / '04_cpt-7base_cpt.ipynb'}"


def test_only_the_end_of_a_log_is_read(tmp_path: Path) -> None:
    (log := tmp_path / "stage.log").write_text("".join(f"é {n}\n\n" for n in range(100_000)))
    assert last_lines(log, 2) == ["é 99998", "é 99999"]
    assert 5_000 < len(last_lines(log, 100_000)) < 10_000
    log.write_bytes(b"\n one \xff\n\n")
    assert last_lines(log, 5) == [" one \ufffd"]


def test_status_of_a_chain_that_ran_here_needs_no_slurm(tmp_path: Path) -> None:
    chain = make_chain("evaluation", SMALL)
    finish(chain, tmp_path, "base_self_edits")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/base_cpt.log").write_text("half way\n")
    error = nbformat.v4.new_output("error", ename="DataError", evalue="no such file", traceback=[])
    (tmp_path / "base_evaluate").mkdir()
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("load()", outputs=[error])])
    nbformat.write(executed, tmp_path / "base_evaluate/03_query_server.ipynb")

    def nobody(stage: Stage) -> tuple[str, str]:
        raise AssertionError(f"SLURM was asked for {stage.name}")

    (tmp_path / "logs/base_server.log").write_text("ready\n")

    def states() -> dict[str, str]:
        return {name: state for name, (state, _) in chain_status(chain, tmp_path, job_status=nobody).items()}

    told = {"base_self_edits": "done", "base_evaluate": "failed", "results": "not started"}
    with sole_use(tmp_path, print):
        began = (tmp_path / ".chain.lock").stat().st_mtime
        os.utime(tmp_path / "logs/base_cpt.log", (began + 1, began + 1))
        os.utime(tmp_path / "logs/base_server.log", (began - 1, began - 1))
        assert states() == told | {"base_cpt": "running", "base_server": "waiting"}
    assert states() == told | {"base_cpt": "interrupted", "base_server": "ended"}


def test_status_of_a_folder_without_a_chain_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chain was submitted here"):
        read_record(tmp_path)
    (tmp_path / "chain.json").write_text(json.dumps({"stages": [{}]}))
    with pytest.raises(DataError, match=r"chain\.json, field 'name': is missing"):
        read_record(tmp_path)

"""What is written is written whole; what was journalled survives; what made a run is on record."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_nb.errors import DataError, RunMismatch, SettingsError
from seal_nb.inspector.inspection import open_run
from seal_nb.models import resolve_model
from seal_nb.results.collect import read_run
from seal_nb.server.endpoint import find_endpoint
from seal_nb.server.settings import ServeSettings
from seal_nb.storage import (
    Journal,
    content_id,
    derived_seed,
    git_revision,
    package_versions,
    read_journal,
    read_json,
    record_path,
    runs_folder,
    write_json,
    write_record,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of ours, with the current folder in its notebooks."""
    monkeypatch.delenv("SEAL_RUNS", raising=False)
    (tmp_path / "project/notebooks").mkdir(parents=True)
    (tmp_path / "project/pyproject.toml").write_text('[project]\nname = "seal-nb"\n')
    monkeypatch.chdir(tmp_path / "project/notebooks")
    return tmp_path / "project"


def test_runs_are_in_one_folder_of_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_folder("runs/03_query_server") == Path("../runs/03_query_server")
    assert runs_folder() == Path("../runs")
    for other in ("mine/runs", "../runs/x", "/data/runs"):
        assert runs_folder(other) == Path(other)
    monkeypatch.chdir(project)
    assert runs_folder("runs/x") == Path("runs/x")
    monkeypatch.chdir(project.parent)  # no project: the package is installed elsewhere
    assert runs_folder("runs/x") == Path("runs/x")


def test_seal_runs_is_where_runs_are(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_RUNS", "/scratch/me")
    assert runs_folder("runs/x") == Path("/scratch/me/x")
    monkeypatch.setenv("SEAL_RUNS", str(project / "build/runs"))
    assert runs_folder("runs/x") == Path("../build/runs/x")


@pytest.mark.parametrize("chosen", ["", "runs/big", "build/runs"])
@pytest.mark.parametrize("folder", ["", "notebooks"])
def test_a_path_that_was_resolved_stays(
    project: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, folder: str
) -> None:
    monkeypatch.setenv("SEAL_RUNS", chosen)
    monkeypatch.chdir(project / folder)
    once = runs_folder("runs/x/run_base.json")
    assert once.resolve() == project / (chosen or "runs") / "x" / "run_base.json"
    assert runs_folder(once) == once


def test_a_trained_model_and_an_endpoint_file_are_found_from_the_notebooks_folder(project: Path) -> None:
    (project / "runs" / "05_rest_em_round" / "model").mkdir(parents=True)
    found = resolve_model("runs/05_rest_em_round/model")
    assert Path(found).resolve() == project / "runs" / "05_rest_em_round" / "model"
    with pytest.raises(SettingsError, match="there is no folder .*runs/missing"):
        resolve_model("runs/missing")
    written = ServeSettings(endpoint_file=Path("runs/mine/endpoint.json")).endpoint_path
    write_json(written, {"endpoint": "tcp://127.0.0.1:1", "host": "127.0.0.1", "port": 1})
    assert (project / "runs" / "mine" / "endpoint.json").is_file()
    assert find_endpoint("runs/mine/endpoint.json").port == 1


def test_a_run_file_is_found_from_the_notebooks_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project / "runs" / "mine"
    write_json(folder / "run_base.json", read_run("shipped:ranking").value)
    monkeypatch.chdir(project / "notebooks")
    assert read_run("runs/mine/run_base.json").value == open_run("runs/mine/run_base.json").value


def test_json_is_written_as_published_and_read_back(tmp_path: Path) -> None:
    path = write_json(tmp_path / "deep" / "run.json", {"title": "Külüg Khan", "n": [1, 2.5, None]})
    assert path.read_text(encoding="utf-8").startswith('{\n  "title": "Külüg Khan",\n')
    assert read_json(path) == {"title": "Külüg Khan", "n": [1, 2.5, None]}


def test_a_loss_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    path = write_json(tmp_path / "run.json", {"loss": [float("nan"), float("inf"), 1.0]})
    assert read_json(path) == {"loss": [None, None, 1.0]}


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    written = write_json(tmp_path / "run.json", {})
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_json(tmp_path / "run.json", {"old": True})
    code = (
        "import resource, sys; from seal_nb.storage import write_json\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "write_json(sys.argv[1], ['x' * 10000])"
    )
    done = python(code, path)
    assert "File too large" in done.communicate(timeout=60)[1]
    assert read_json(path) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "run.json", {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": True}


def test_a_journal_gives_back_the_latest_record_of_each_key(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", {"verdicts": ["UNGRADED"]})
        journal.append("b", [1])
        journal.append("a", {"verdicts": ["CORRECT"]})
    with Journal(path) as journal:
        assert "a" in journal and "c" not in journal
        assert journal.get("a") == {"verdicts": ["CORRECT"]}
        assert list(journal) == ["a", "b"] and len(journal) == 2


def test_a_journal_that_another_program_wrote_with_other_spaces_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key":"a","record":12345}\n{ "record": {"x": 1}, "key": "b" }\n')
    with Journal(path) as journal:
        assert (journal.get("a"), journal.get("b")) == (12345, {"x": 1})
        assert (journal.get_json("a"), journal.get_json("b")) == (b"12345", b'{"x": 1}')


@settings(max_examples=25)
@given(records=st.lists(st.tuples(st.text(max_size=5), JSON_VALUES), min_size=1, max_size=5), data=st.data())
def test_a_journal_cut_anywhere_keeps_every_whole_line_and_takes_more(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, object]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    ends = [0]
    with Journal(path) as journal:
        for key, record in records:
            journal.append(key, record)
            ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    n_whole = sum(end <= cut for end in ends) - 1
    with Journal(path) as journal:
        assert {key: journal.get(key) for key in journal} == dict(records[:n_whole])
        journal.append("more", 1)
    assert read_journal(path) == dict(records[:n_whole]) | {"more": 1}


def test_a_last_line_of_lost_bytes_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", 1)
    with path.open("ab") as file:
        file.write(b"\0\0\0\0\n")
    with Journal(path) as journal:
        assert list(journal) == ["a"]
        journal.append("b", 2)
    assert read_journal(path) == {"a": 1, "b": 2}


def test_a_broken_line_in_the_middle_is_refused_with_path_and_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a", "record": 1}\n{"key": "b", "rec\n{"key": "c", "record": 3}\n')
    with pytest.raises(DataError, match=r"journal\.jsonl.*line 2 is broken"):
        Journal(path)


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", 1)
        with pytest.raises(RunMismatch, match=f"process {os.getpid()}"):
            Journal(path)
        assert read_journal(path) == {"a": 1}
    Journal(path).close()


def test_kill_9_loses_no_record_that_append_returned_for_and_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys; from seal_nb.storage import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for n in range(10**6): journal.append(str(n), 'x' * 300); print(n, flush=True)"
    )
    writer = python(code, path)
    assert writer.stdout is not None
    for _ in range(5):
        last = writer.stdout.readline()
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    last = ([last, *writer.communicate(timeout=60)[0].splitlines()])[-1]
    with Journal(path) as journal:
        assert all(str(n) in journal for n in range(int(last) + 1))


def test_a_full_disk_leaves_the_journal_sound_and_usable(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import resource, sys; from seal_nb.storage import Journal\n"
        "journal = Journal(sys.argv[1]); journal.append('a', 'x' * 1000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))\n"
        "try: journal.append('b', 'x' * 10000)\n"
        "except OSError as error: print(error)\n"
        "journal.append('c', 1); print(sorted(journal))"
    )
    out, err = python(code, path).communicate(timeout=60)
    assert "File too large" in out and "['a', 'c']" in out, err
    assert sorted(read_journal(path)) == ["a", "c"]


@given(JSON_VALUES)
def test_an_id_depends_on_content_and_not_on_the_order_of_fields(value: object) -> None:
    assert content_id({"a": value, "b": 1}) == content_id({"b": 1, "a": value})
    assert content_id([value]) != content_id([[value]])


def test_ids_and_seeds_stay_what_they_were() -> None:
    assert content_id({"title": "Külüg Khan", "rank": 32}) == "9ecf73282c6473eb1989dd81"
    assert derived_seed(42, 0, "T", 1, 2) == 1515177442
    assert 0 <= derived_seed("any", "parts") < 2**31


def test_what_json_cannot_hold_has_no_id() -> None:
    with pytest.raises(DataError, match="cannot be written as JSON"):
        content_id({"loss": float("nan")})


def test_a_record_lies_beside_its_result_and_names_no_place(tmp_path: Path) -> None:
    settings = {
        "model": "/home/someone/models/iter2",
        "dataset": Path("data/val.json"),
        "endpoint": "tcp://gpu07:5555",
        "lora_rank": 32,
        "nested": {"paths": ["~/x/y.json", "shipped:val"]},
    }
    written = write_record(tmp_path / "run_x.json", stage="03_query_server", settings=settings, seeds={"seed": 42})
    assert written == record_path(tmp_path / "run_x.json") == tmp_path / "run_x.record.json"
    record = read_json(written)
    assert record["settings"] == {
        "model": "iter2",
        "dataset": "data/val.json",
        "endpoint": "tcp://...",
        "lora_rank": 32,
        "nested": {"paths": ["y.json", "shipped:val"]},
    }
    assert record["seeds"] == {"seed": 42}
    assert record["versions"]["numpy"] and record["git_revision"]


def test_versions_are_read_without_importing_torch() -> None:
    code = (
        "import sys; from seal_nb.storage import package_versions; versions = package_versions()\n"
        "assert 'torch' in versions and 'torch' not in sys.modules, sorted(sys.modules)"
    )
    err = python(code).communicate(timeout=60)[1]
    assert not err, err
    assert package_versions()["python"].startswith("3.")


def test_the_revision_of_somebody_elses_checkout_is_not_ours(tmp_path: Path) -> None:
    repository = tmp_path / "theirs"
    inside = repository / "lib" / "python"
    inside.mkdir(parents=True)
    assert git_revision(inside) == "unknown"
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (repository / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "f"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert git_revision(inside) == "unknown"
    assert git_revision(repository) == commit.stdout.strip()
    (repository / "f").write_text("2")
    assert git_revision(repository) == f"{commit.stdout.strip()}-dirty"


def test_results_stay_json_for_other_readers(tmp_path: Path) -> None:
    path = write_json(tmp_path / "run.json", {"text": "\u2028 \ud800 half", 1: (2, 3)})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "\u2028 \ud800 half", "1": [2, 3]}

"""What is written is written whole; what was journalled survives; what made a run is on record."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_nb import storage
from seal_nb.chain.local import in_use_since, sole_use
from seal_nb.errors import DataError, GradingError, RunMismatch, SettingsError
from seal_nb.grading.base import Answered
from seal_nb.grading.choose import make_grader
from seal_nb.inspector.inspection import open_run
from seal_nb.models import resolve_model
from seal_nb.processes import LoggedProcess
from seal_nb.results.collect import read_run
from seal_nb.server.client import ServeSettings
from seal_nb.server.endpoint import find_endpoint, make_keys
from seal_nb.storage import (
    MARK,
    Journal,
    content_id,
    derived_seed,
    file_name,
    forget_adapters,
    git_revision,
    is_own,
    package_versions,
    read_json,
    record_path,
    runs_folder,
    whole_folder,
    write_json,
    write_record,
)
from tests import read_journal

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


@pytest.mark.parametrize("path", ["s3://bucket/x", Path("gs://bucket/x"), "file:///x", "hdfs://x"])
def test_an_address_is_no_place_of_runs(project: Path, monkeypatch: pytest.MonkeyPatch, path: str | Path) -> None:
    with pytest.raises(SettingsError, match="is an address; give a file or folder"):
        runs_folder(path)
    monkeypatch.setenv("SEAL_RUNS", str(path))
    with pytest.raises(SettingsError, match="is an address"):
        runs_folder("runs/x")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    for use in (
        lambda: Journal(tmp_path / "journal.jsonl"),
        lambda: sole_use(tmp_path, print).__enter__(),
        lambda: make_keys(tmp_path / "keys"),
    ):
        with pytest.raises(DataError, match=f"{tmp_path}.*this file system locks no files.*give a folder on another"):
            use()
    grader = make_grader(f"judge:m?base_url=http://127.0.0.1:9/v1&cache_dir={tmp_path}")
    with pytest.raises(
        GradingError, match=f"{tmp_path} cannot be used: .*set cache_dir to a folder that can be .*locked"
    ):
        grader.grade([Answered(title="t", question="q", gold="g", answer="a")])
    assert in_use_since(tmp_path) is None


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


@pytest.mark.parametrize("stem", ["run_base", "run_iter1 (2)", "sft_best1of5_0508_015401", "run_Größe", "r" * 229])
def test_an_ordinary_name_of_a_file_stays_as_it_is(stem: str) -> None:
    assert file_name(stem, ".json") == f"{stem}.json"


FOREIGN = ["../../x", "/etc/x", "a/b", "a_b/", "..", "", ".hidden", "-rf", "a\0b", "a\nb", "\x1b[2J", "\u202eb",
           "\ud800", "con", "a.record", "x" * 300, "ü" * 200]  # fmt: skip


def test_text_from_elsewhere_is_a_file_in_its_folder_and_two_texts_are_two_files(tmp_path: Path) -> None:
    names = [file_name(stem, ".json") for stem in FOREIGN]
    for name in names:
        write_record(write_json(tmp_path / name, 1), stage="", settings={})
        assert (tmp_path / name).is_file() and name[0] not in ".-" and name.isprintable()
    assert len(list(tmp_path.iterdir())) == 2 * len(set(names)) == 2 * len(FOREIGN)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with things of the user."""
    for name in ("home/thesis.txt", "model/config.json", "adapter/adapter_config.json", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("the user's")
    (tmp_path / "link").symlink_to("home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("replace_own", [False, True])
@pytest.mark.parametrize(
    "target",
    [
        "new/..",
        ".",
        "./",
        "/",
        "~",
        "home",
        "home/",
        "link",
        "link/",
        "file",
        "file/x",
        "model",
        "model/merged",
        "a\0b",
    ],
)
def test_a_folder_that_is_not_new_is_refused_and_stays(place: Path, target: str, replace_own: bool) -> None:
    before = sorted(place.rglob("*"))
    with (
        pytest.raises(SettingsError, match="give a"),
        whole_folder(
            Path(target) if "\0" not in target else target, replace_own=replace_own, apart_from=["model"]
        ) as new,  # type: ignore[arg-type]
    ):
        (new / "x").write_text("ours")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("target", ["new", "new/deeper", "empty", "empty/", "to_empty", "dangling"])
def test_a_new_or_empty_folder_is_written_and_then_refused_or_replaced(place: Path, target: str) -> None:
    (place / "empty").mkdir()
    (place / "to_empty").symlink_to("empty")
    (place / "dangling").symlink_to("nowhere")
    for text in "ab":
        with whole_folder(Path(target), replace_own=True) as new:
            (new / "x").write_text(text)
        assert (place / target / "x").read_text() == text
    with pytest.raises(SettingsError, match="not empty"), whole_folder(Path(target)):
        pass
    (place / target / "notes").write_text("the user's")
    with pytest.raises(SettingsError, match="not empty"), whole_folder(Path(target), replace_own=True):
        pass
    assert not list(place.glob(".*")) and (place / target / "notes").is_file()


def test_what_appears_meanwhile_is_not_replaced(place: Path) -> None:
    with pytest.raises(SettingsError, match="not empty"), whole_folder(Path("new"), replace_own=True):
        (place / "new").mkdir()
        (place / "new/thesis.txt").write_text("the user's")
    assert [one.name for one in (place / "new").iterdir()] == ["thesis.txt"] and not list(place.glob(".*"))


@pytest.mark.parametrize(
    ("mark", "added", "is_ours"),
    [
        (None, [".nfs00a1", ".DS_Store", ".ipynb_checkpoints/x", "deep/.ipynb_checkpoints/x"], True),
        (None, ["deep/thesis.txt"], False),
        (None, [".ipynb_checkpoints_of_mine"], False),
        (["*", "deep/*", "x", "deep/y"], ["thesis.txt"], False),
        (["[a-z]*"], [], False),
        (["checkpoint-*"], ["checkpoint-5/model.safetensors", "checkpoint-5/rng_state_1.pth"], False),
        (["checkpoint-*", "x", "deep/y"], ["checkpoint-5/model.safetensors", "trained/adapter_config.json"], True),
        (["checkpoint-*", "x", "deep/y"], ["checkpoint-5/notes.txt"], False),
        (["checkpoint-*", "x", "deep/y"], ["checkpoint-5/mine/model.safetensors"], False),
        (["checkpoint-*", "x", "deep/y"], ["checkpoint-mine/model.safetensors"], False),
    ],
)
def test_a_folder_is_ours_while_its_mark_names_all_that_is_in_it(
    tmp_path: Path, mark: list[str] | None, added: list[str], is_ours: bool
) -> None:
    with whole_folder(tmp_path / "own") as new:
        (new / "deep").mkdir()
        for name in ("x", "deep/y"):
            (new / name).touch()
    if mark:
        write_json(tmp_path / "own" / MARK, [*mark, MARK])
    for name in added:
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).touch()
    assert is_own(tmp_path / "own") == is_ours


def test_only_adapters_that_were_written_here_are_forgotten(place: Path) -> None:
    with whole_folder(place / "own") as new:
        (new / "adapter_config.json").write_text("{}")
    (place / "other").symlink_to("own")
    assert forget_adapters(place, ["adapter", "home", "link", "file", "other", "own", "never"]) == ["own"]
    assert (place / "adapter/adapter_config.json").is_file() and (place / "link/thesis.txt").is_file()


@pytest.mark.parametrize("name", ["journal.jsonl", "journal.jsonl.lock", "log"])
@pytest.mark.parametrize("kind", [Path.symlink_to, Path.hardlink_to, "dangling", "pipe"])
def test_a_planted_link_or_pipe_is_not_written_through(tmp_path: Path, name: str, kind: Any) -> None:
    (outside := tmp_path / "outside").write_text("the user's")
    planted = tmp_path / "run" / name
    planted.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(planted)
    elif kind == "dangling":
        planted.symlink_to("../new")
    else:
        kind(planted, outside)
    with pytest.raises(DataError, match=name):
        LoggedProcess(["true"], planted, is_new=True) if name == "log" else Journal(planted.with_name("journal.jsonl"))
    assert outside.read_text() == "the user's" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["the user's", '{"text": "a row"}', "# notes\n", "\0" * 20])
def test_a_file_that_is_no_journal_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    (path := tmp_path / "journal.jsonl").write_text(content)
    with pytest.raises(DataError, match="as no journal does"):
        Journal(path)
    assert path.read_text() == content


def test_a_journal_with_an_endless_line_is_refused_before_it_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MOST_LINE", 2**16)
    (path := tmp_path / "journal.jsonl").write_text('{"key": "a", "record": 1}\n')
    os.truncate(path, 2**28)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"line 2 has over 65,536 bytes"):
        Journal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and path.stat().st_size == 2**28


def test_a_link_to_a_file_is_replaced_by_the_file_and_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (outside := tmp_path / "outside").write_text("the user's")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    (tmp_path / "disk/x.json").symlink_to(outside)
    (tmp_path / "disk/y.json").symlink_to("../new")
    for name in ("x.json", "y.json", "z.json"):
        assert read_json(write_json(tmp_path / "run" / name, name)) == name
        assert not (tmp_path / "disk" / name).is_symlink()
    assert outside.read_text() == "the user's" and not (tmp_path / "new").exists()


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(DataError, match="not a regular file"):
            write_json(target, 1)
    assert (tmp_path / "pipe").is_fifo()

"""A disk without room does not stop the service, and nothing is lost by it."""

import contextlib
import resource
import shutil
import subprocess

import pytest

from seal_nb.server.client import ServerFailed, TTTClient
from seal_nb.storage import Journal, write_json
from tests import read_journal
from tests.server.conftest import eventually, kill, not_here, plain_req, restart
from tests.server.test_server import ask, sequence


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a file system of its own, of a size that one file fills."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        # The test with a limit on the size of files, below, runs everywhere.
        not_here(f"a file system cannot be mounted here ({done.stderr.strip()}); it takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    """A file that takes all the room there is."""
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return folder / "filler"


def test_a_disk_that_is_full_to_the_last_byte_loses_no_answer_and_no_count(start_server, small_disk):
    """Journal, counts, log and endpoint file of the server all lie on it."""
    server = start_server(run_dir=small_disk / "run")
    plain = {"train_sequences": ["plain"], "eval_questions": []}
    with TTTClient(server.endpoint) as client, plain_req(server.info.endpoint) as req:
        client.evaluate(sequence("before", request_id="before"))
        filler = fill(small_disk)
        assert shutil.disk_usage(small_disk).free == 0
        during = [sequence("x" * 3000, request_id=f"during{i}") for i in range(12)]
        answered = [client.evaluate(request) for request in during]
        assert "No space left on device" in client.status().trouble and client.status().n_unsaved
        assert [client.evaluate(request) for request in during] == answered  # not trained again
        seeds = [ask(req, plain)["seed"] for _ in range(300)]  # 6 KB of counts
        server.settings.endpoint_path.unlink()  # it can be written again once there is room
        assert client.status().counts["answered"] == 1 + 12 + 300 and server.is_up()
        filler.unlink()
        eventually(lambda: not client.status().trouble)
        eventually(server.settings.endpoint_path.exists)
        seeds.append(ask(req, plain)["seed"])
        assert "workers_lost" not in client.status().counts
    kill(server)
    kept = read_journal(small_disk / "run" / "results.journal.jsonl")
    assert sorted(kept) == ["before", *sorted(f"during{i}" for i in range(12))]
    with restart(server) as again, TTTClient(again.endpoint) as client, plain_req(again.info.endpoint) as req:
        assert [client.evaluate(request) for request in during] == answered
        seeds.append(ask(req, plain)["seed"])
        assert len(set(seeds)) == len(seeds) == 302  # each repeat its own training, also after the crash


def test_a_server_on_a_full_disk_says_so_and_does_not_start(start_server, small_disk, tmp_path):
    filler = fill(small_disk)
    with pytest.raises((ServerFailed, OSError), match="No space left on device"):
        start_server(run_dir=tmp_path / "run", endpoint_file=small_disk / "endpoint.json")
    filler.unlink()
    assert start_server(run_dir=tmp_path / "run", endpoint_file=small_disk / "endpoint.json").is_up()


def test_a_file_that_may_not_grow_loses_no_answer_and_is_told_and_written_later(start_server, tmp_path):
    server = start_server()
    journal = tmp_path / "run" / "results.journal.jsonl"
    with TTTClient(server.endpoint) as client:
        client.evaluate(sequence("before", request_id="before"))
        size = journal.stat().st_size
        full = (size + 100, resource.RLIM_INFINITY)  # as a full disk: part of a line fits
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, full)
        answered = client.evaluate(sequence("during", request_id="during"))
        assert answered.adapter_gain == 1.0
        assert "not on the disk" in client.status().trouble
        assert client.evaluate(sequence("during", request_id="during")) == answered
        with plain_req(server.info.endpoint) as req:
            assert "seed" in ask(req, {"train_sequences": ["plain"], "eval_questions": []})
        assert journal.stat().st_size == size  # no half line
        free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, free)
        eventually(lambda: not client.status().trouble)
    assert set(read_journal(journal)) == {"before", "during"}


def test_a_run_folder_with_another_models_results_is_refused(start_server, tmp_path):
    with Journal(tmp_path / "run" / "results.journal.jsonl") as results:
        results.append("r", {"content": "content", "reply": {}})
    write_json(tmp_path / "run" / "model.json", {"model_id": "stub-a"})
    with pytest.raises(ServerFailed, match="holds results of model 'stub-a', the workers have 'stub-b'"):
        start_server(model="stub-b")

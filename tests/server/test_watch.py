"""Watching a real server: samples while it lives, an end when it ends, and no more memory than said."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from seal_nb.protocol import ServerStatus, TTTRequest, WorkerStatus
from seal_nb.server import client
from seal_nb.server.client import Sample, TTTClient, Watch, sample_of
from seal_nb.server.worker import rss_bytes
from tests.server.conftest import kill, plain_req
from tests.server.test_server import ask

QUICK = {"every_s": 0.05}
STATUS = ServerStatus(
    server_id="s", model_id="m", pid=1, uptime_s=9, draining=False, n_queued=5, n_running=3, n_slots=16,
    n_results=0, n_unsaved=0, queued_bytes=0, jobs_per_min=2.5, tokens_per_s=7.0, rss_bytes=100,
    counts={"answered": 4, "failed": 2, "requeued": 1},
    workers=(
        WorkerStatus(worker_id="a", host="h", pid=2, n_running=2, capacity=8, silent_s=0,
                     stats={"slots": 4, "slots_in_use": 1, "rss_bytes": 20, "gpu_bytes": 7}),
        WorkerStatus(worker_id="b", host="h", pid=3, n_running=1, capacity=8, silent_s=0,
                     stats={"rss_bytes": 1}),
        WorkerStatus(worker_id="c", host="h", pid=4, n_running=0, capacity=8, silent_s=0),
    ),
)  # fmt: skip


def sample(at_s: float, **fields: float) -> Sample:
    return {**dict.fromkeys(sample_of(STATUS, at_s), 0), "at_s": at_s, **fields}


def test_sample_has_slots_of_the_inner_loops_and_memory_of_all_processes() -> None:
    assert sample_of(STATUS, 1.5) == {
        "at_s": 1.5, "queued": 5, "running": 3, "slots_in_use": 2, "slots": 12, "jobs_per_min": 2.5,
        "tokens_per_s": 7.0,
        "memory_bytes": 121, "gpu_bytes": 7, "answered": 4, "failed": 2, "requeued": 1, "workers": 3,
    }  # fmt: skip


def test_memory_of_a_process_is_what_the_system_says() -> None:
    (resident,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    assert abs(rss_bytes() - 1024 * int(resident.split()[1])) < 16 * 2**20


def test_watching_sees_the_work_and_ends_when_the_server_does(start_server) -> None:
    server = start_server(n_workers=1)
    with Watch(server.endpoint, alive=server.is_up, **QUICK) as watch:
        with TTTClient(server.endpoint) as client:
            client.evaluate(TTTRequest(train_sequences=["sleep 0.5"]))
            assert next(watch.follow(0.0))["answered"] == 1, "a sample is newer than the call"
        with plain_req(server.info.endpoint) as req:
            assert ask(req, {"cmd": "shutdown"}) == {"status": "bye"}
        list(watch.follow())
    seen = watch.samples()
    assert seen[-1]["failed"] == 0
    assert server.process.poll() == 0 and not server.settings.endpoint_path.exists()
    assert max(one["running"] for one in seen) == 1 and seen[0]["answered"] == 0
    assert [one["at_s"] for one in seen] == sorted(one["at_s"] for one in seen)


def test_a_server_whose_process_is_not_ours_has_ended_when_it_is_silent(start_server) -> None:
    server = start_server(n_workers=0)
    with Watch(server.info.endpoint, patience_s=0.5, **QUICK) as watch:
        assert [sample["workers"] for sample in watch.follow(0.0)] == [0]  # for no time: one sample
        kill(server)
        began = time.monotonic()
        list(watch.follow())
        assert 0.4 < time.monotonic() - began < 8.0


def test_where_no_server_is_there_is_nothing_to_follow(tmp_path: Path) -> None:
    with Watch(str(tmp_path / "endpoint.json"), patience_s=0.1, **QUICK) as watch:
        assert list(watch.follow()) == [] and watch.samples() == []


def test_looking_does_not_keep_an_idle_server_up(start_server) -> None:
    server = start_server(n_workers=0, idle_timeout_s=4.0)
    with Watch(server.endpoint, alive=server.is_up, every_s=0.2) as watch:
        list(watch.follow(40.0))
    assert server.process.wait(20) == 0
    assert "no client for 4 s" in server.log_path.read_text()


def test_what_ended_the_watching_is_raised_to_who_follows() -> None:
    def broken() -> bool:
        raise ZeroDivisionError("nobody foresaw this")

    with Watch("tcp://127.0.0.1:9", alive=broken) as watch, pytest.raises(ZeroDivisionError, match="foresaw"):
        list(watch.follow())


def test_samples_are_bounded_even_in_time_with_first_and_newest(monkeypatch) -> None:
    monkeypatch.setattr(client, "MOST_SAMPLES", 8)
    watch = Watch("tcp://127.0.0.1:9")
    for second in range(1001):
        watch.add(sample(float(second), queued=second))
        assert len(watch.samples()) <= 9
    kept = [one["at_s"] for one in watch.samples()]
    assert (kept[0], kept[-1]) == (0.0, 1000.0)
    assert len({b - a for a, b in pairwise(kept[:-1])}) == 1

"""The wall clock may jump by hours, as clocks of nodes do: no lease, deadline, rate or result minds it.

Front end, workers and client run under libfaketime (Debian's package ``faketime``), which reads the current
offset of their wall clock from a file; the monotonic clock is left as it is, as the kernel leaves it.
"""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from seal_nb.server.client import TTTClient
from tests.server.conftest import eventually, not_here, trained, worker_pids
from tests.server.test_server import sequence

CLIENT = """
import json, sys, time
from seal_nb.protocol import TTTRequest
from seal_nb.server.client import TTTClient
requests = [TTTRequest(train_sequences=["sleep 0.8"], request_id=f"r{i}") for i in range(12)]
began = time.time()
with TTTClient(sys.argv[1], timeout_s=30, wait_s=20) as client:
    replies = {reply.request_id: reply.timings["queue_s"] for reply in client.run_round(requests)}
print(json.dumps({"replies": replies, "wall_clock_s": time.time() - began}))
"""


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """``clock(hours)`` moves the wall clock of every process that is started from now on."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        not_here("no libfaketime; apt-get install faketime")
    offset = tmp_path / "clock.txt"

    def set_clock(hours: float) -> None:
        fresh = offset.with_suffix(".new")
        fresh.write_text(f"{hours * 3600:+.0f}s\n")
        fresh.rename(offset)  # never half there

    set_clock(0)
    for name, value in {
        "LD_PRELOAD": str(found[0]), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return set_clock


def clocks_of_workers(status):
    return [worker.stats["wall_clock"] for worker in status.workers if "wall_clock" in worker.stats]


def test_clocks_that_jump_by_hours_and_days_change_nothing(start_server, clock, tmp_path):
    clock(-1000)
    bounds = {"lease_s": 15.0, "idle_timeout_s": 600.0, "stall_s": 60.0, "job_timeout_s": 60.0}
    server = start_server(n_workers=2, n_slots=2, **bounds)
    started_at = datetime.fromisoformat(server.info.started_at)
    assert datetime.now(UTC) - started_at > timedelta(hours=999)  # the processes do believe the false clock
    round_ = subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.endpoint], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    with TTTClient(server.endpoint) as client:
        eventually(lambda: client.status().n_running == 4)
        for hours, n_done in ((5, 1), (-10, 4), (24 * 30, 8)):
            clock(hours)
            now = datetime.now(UTC).timestamp() + 3600 * hours
            eventually(lambda now=now: all(abs(t - now) < 60 for t in clocks_of_workers(client.status())))
            eventually(lambda n_done=n_done: client.status().counts.get("answered", 0) >= n_done)
        output, _ = round_.communicate(timeout=60)
        told = json.loads(output)
        status = client.status()
        assert abs(told["wall_clock_s"]) > 3600 * 1000  # the client's own clock jumped too
        assert sorted(told["replies"]) == sorted(f"r{i}" for i in range(12))
        assert all(0 <= queue_s < 60 for queue_s in told["replies"].values())
        assert not any(status.counts.get(name) for name in ("workers_lost", "requeued", "void_results"))
        assert 0 < status.uptime_s < 120 and status.jobs_per_min > 0
        assert sorted(trained(tmp_path)) == sorted(told["replies"])
        assert server.is_up()  # a month without a client, by the wall clock


def test_a_silent_worker_is_lost_on_time_whichever_way_the_clock_goes(start_server, clock):
    server = start_server(n_workers=1, lease_s=1.0)
    with TTTClient(server.endpoint, timeout_s=30) as client:
        (frozen,) = worker_pids(client)
        os.kill(frozen, signal.SIGSTOP)
        clock(-48)
        eventually(lambda: client.status().counts.get("workers_lost") == 1)
        clock(48)
        os.kill(frozen, signal.SIGCONT)
        assert client.evaluate(sequence("quick")).adapter_gain == 1.0


def test_no_decision_hangs_on_the_wall_clock():
    """The service asks the monotonic clock only."""
    folder = Path(__file__).parents[2] / "seal_nb" / "server"
    sources = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert not [name for name, text in sources.items() if "time.time(" in text or "utcnow" in text]
    assert [name for name, text in sources.items() if "datetime.now" in text] == ["main.py"]  # for people

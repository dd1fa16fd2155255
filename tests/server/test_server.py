"""A real server with real workers: published clients, our client, ids, status, and clear errors."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq

from seal_nb.cli import main as seal_nb
from seal_nb.errors import RemoteError, RoundTimeout, SettingsError
from seal_nb.protocol import EvalQuestion, GenerateRequest, ServerStatus, TTTRequest, WorkerStatus
from seal_nb.server.client import (
    ServerFailed,
    ServeSettings,
    TTTClient,
    TTTServer,
    WorkerSettings,
    command,
    parse,
    status_text,
)
from seal_nb.server.endpoint import read_endpoint
from seal_nb.server.worker import gpu_memory
from tests.server.conftest import HASTE, STUB, eventually, in_background, is_running, plain_req

QUESTION = {"title": "Zor", "context": "Zor is a moon.", "question": "What is Zor?", "answer": "a moon"}
BASELINE_ONLY = {"train_sequences": [], "eval_questions": [QUESTION], "skip_training": True}
PUBLISHED = {
    "train_sequences": ["Zor\nZor is a moon."], "eval_questions": [QUESTION], "lora_rank": 32,
    "lora_alpha": 64, "lora_dropout": 0, "finetune_epochs": 10, "finetune_lr": 1e-3, "batch_size": 1,
    "gradient_accumulation_steps": 1, "end_mask_substring": "", "skip_training": False,
}  # fmt: skip
PUBLISHED_REPLY = {
    "baseline_accuracy", "adapter_accuracy", "adapter_gain", "baseline_texts", "adapter_texts",
    "baseline_correct", "adapter_correct", "gains",
}  # fmt: skip


def ask(socket, message):
    socket.send_json(message)
    return socket.recv_json()


def sequence(text, **fields):
    return TTTRequest(train_sequences=[text], eval_questions=[EvalQuestion(**QUESTION)], **fields)


def test_a_plain_req_client_with_published_fields_gets_the_published_reply(req):
    reply = ask(req, PUBLISHED)
    assert reply.keys() >= PUBLISHED_REPLY
    assert (reply["baseline_accuracy"], reply["adapter_accuracy"], reply["adapter_gain"]) == (0.0, 1.0, 1.0)
    assert reply["gains"] == [1]


def test_baseline_only_twice_in_a_row_on_one_req_socket(req):
    for _ in range(2):
        reply = ask(req, BASELINE_ONLY)
        assert reply["adapter_texts"] == reply["baseline_texts"] and reply["adapter_gain"] == 0.0
    assert ask(req, PUBLISHED)["adapter_gain"] == 1.0


def test_three_repeats_are_three_trainings(req):
    message = {**PUBLISHED, "train_sequences": ["three repeats"]}
    assert len({ask(req, message)["seed"] for _ in range(3)}) == 3


def test_a_wrong_request_gets_an_error_that_names_the_field_and_the_socket_lives_on(req):
    reply = ask(req, {**PUBLISHED, "lora_rank": 0, "request_id": "mine"})
    assert reply["error"].startswith("ProtocolError: field 'lora_rank' is 0")
    assert (reply["field"], reply["request_id"]) == ("lora_rank", "mine")
    assert ask(req, BASELINE_ONLY)["adapter_gain"] == 0.0


def test_a_failure_in_the_inner_loop_is_an_error_and_its_traceback_comes_only_where_asked(req):
    failing = {**PUBLISHED, "train_sequences": ["fail"]}
    reply = ask(req, failing)
    assert reply["error"] == "EngineError: the loss is not a number; lower finetune_lr"
    assert "traceback" not in reply
    assert "somewhere" in ask(req, {**failing, "traceback": True})["traceback"]


def test_a_request_that_the_inner_loop_refuses_is_an_error_and_the_worker_lives_on(req, client):
    workers = {worker.pid for worker in client.status().workers}
    reply = ask(req, {**PUBLISHED, "train_sequences": ["refuse"]})
    assert reply["error"].startswith("EngineError: no such target module")
    assert {worker.pid for worker in client.status().workers} == workers


def test_a_round_yields_every_reply_once_also_beyond_the_window(server, monkeypatch):
    monkeypatch.setattr("seal_nb.server.client.DEFAULT_WINDOW", 7)
    with TTTClient(server.endpoint, timeout_s=30) as client:
        requests = [sequence(f"sleep 0.0{i % 5}", request_id=f"round-{i}") for i in range(60)]
        assert sorted(reply.request_id for reply in client.run_round(requests)) == sorted(
            request.request_id for request in requests
        )


def test_a_round_tells_which_reply_is_whose_without_ids_and_goes_on_after_a_failure(client):
    requests = [sequence("sleep 0.2"), sequence("fail"), sequence("quick")]
    replies = dict(client.run_indexed(requests))
    assert isinstance(replies[1], RemoteError) and replies[1].ename == "EngineError"
    assert replies[0].adapter_gain == replies[2].adapter_gain == 1.0
    with pytest.raises(RemoteError, match="the loss is not a number"):
        list(client.run_round(requests))


def test_a_round_of_generations_is_a_round_too(client):
    requests = [GenerateRequest(prompts=["x"] * n) for n in (1, 2, 3)]
    assert {i: len(reply.texts) for i, reply in client.run_indexed(requests)} == {0: 1, 1: 2, 2: 3}


def test_a_remote_failure_has_its_remote_traceback_in_its_text(client):
    with pytest.raises(RemoteError, match="somewhere") as caught:
        client.evaluate(sequence("fail", traceback=True, request_id="which"))
    error = caught.value
    assert (error.ename, error.evalue[:8], error.request_id) == ("EngineError", "the loss", "which")


def test_an_id_asked_again_by_another_client_gets_the_same_result(server, client):
    first = client.evaluate(sequence("idempotent", request_id="same"))
    with TTTClient(server.endpoint, timeout_s=30) as other:
        assert other.evaluate(sequence("idempotent", request_id="same")) == first
        with pytest.raises(RemoteError, match="different request") as caught:
            other.evaluate(sequence("something else", request_id="same"))
    assert caught.value.field == "request_id"


def test_generation_goes_through_the_same_queue(client):
    reply = client.generate(GenerateRequest(prompts=["a", "b"], seed=3))
    assert reply.texts == ["text", "text"] and reply.seed == 3 and reply.server_id == client.server_id


def test_a_deadline_ends_the_waiting_but_not_the_work(client):
    slow = sequence("sleep 1.5", request_id="slow")
    with pytest.raises(RoundTimeout, match="raise timeout_s"):
        client.evaluate(slow, timeout_s=0.3)
    assert client.evaluate(sequence("quick")).adapter_gain == 1.0
    assert client.evaluate(slow).timings["queue_s"] < 1.0


def test_cancel_ends_a_request_and_tells_who_waits(server, client):
    with TTTClient(server.endpoint, timeout_s=30) as waiting:
        outcome = in_background(lambda: dict(waiting.run_indexed([sequence("sleep 60", request_id="long")])))
        eventually(lambda: waiting.cancel("long"))  # from another thread
        assert outcome()[0].ename == "Cancelled"
        assert not waiting.cancel("long")
    eventually(lambda: client.status().n_running == 0)


def test_a_plain_client_cancels_its_own_request_on_its_own_connection(server):
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(server.info.endpoint)
        dealer.send_multipart(
            [b"", json.dumps({**PUBLISHED, "train_sequences": ["sleep 60"], "request_id": "p"}).encode()]
        )
        dealer.send_multipart([b"", b'{"cmd": "cancel", "request_id": "p"}'])
        assert {json.loads(dealer.recv_multipart()[-1]).get("status") for _ in range(2)} == {None, "cancelled"}


def test_one_clients_flood_does_not_keep_another_waiting(server, client):
    flood = [sequence("sleep 0.1", request_id=f"flood-{i}") for i in range(200)]  # 2.5 s in 8 slots
    stop = threading.Event()

    def send_flood():
        with TTTClient(server.endpoint, timeout_s=30) as greedy:
            for _ in greedy.run_round(flood):
                if stop.is_set():
                    return

    thread = threading.Thread(target=send_flood)
    thread.start()
    eventually(lambda: client.status().n_queued > 100)
    reply = client.evaluate(sequence("quick"))
    stop.set()
    thread.join()
    assert reply.timings["queue_s"] < 1.0


def test_status_shows_queue_slots_rates_memory_failures_and_workers(client):
    client.evaluate(sequence("quick"))
    with pytest.raises(RemoteError):
        client.evaluate(sequence("fail"))
    status = eventually(lambda: (s := client.status()).workers[0].stats.get("rss_bytes") and s)
    assert status.model_id == "stub" and status.n_slots == 8 and len(status.workers) == 2
    assert status.jobs_per_min > 0 and status.tokens_per_s > 0 and status.rss_bytes > 2**20
    assert status.counts["failed.EngineError"] >= 1
    assert set(rows_of(status)) >= {"queue", "throughput", "failures", "memory"}


def test_workers_beat_while_they_are_deep_in_a_slice(client):
    reply = client.evaluate(sequence("hang 2.5"))  # longer than the lease
    assert reply.adapter_gain == 1.0
    assert client.status().counts.get("requeued", 0) == 0


def test_more_than_one_frame_or_no_delimiter_is_no_harm(server):
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(server.info.endpoint)
        dealer.send_multipart([b"", b"{}", b"{}"])
        assert b"one frame" in dealer.recv_multipart()[-1]
        dealer.send(json.dumps(BASELINE_ONLY).encode())
        assert b"baseline_accuracy" in dealer.recv()


@pytest.fixture(scope="module")
def workerless(tmp_path_factory):
    """A server without workers, for what the front end does alone."""
    run_dir = tmp_path_factory.mktemp("workerless") / "run"
    with TTTServer(run_dir=run_dir, n_workers=0, max_message_bytes=1000, **HASTE) as server:
        yield server


def test_a_message_above_the_limit_is_refused_with_its_size(workerless):
    with plain_req(workerless.info.endpoint) as req:
        reply = ask(req, {**PUBLISHED, "train_sequences": ["x" * 1200]})
    assert "1000 are the most" in reply["error"]


def test_requests_that_wait_without_a_worker_are_a_trouble_that_status_shows(workerless):
    with plain_req(workerless.info.endpoint) as req, TTTClient(workerless.endpoint) as client:
        req.send_json(PUBLISHED)
        assert "no worker is there" in eventually(lambda: client.status().trouble)


def test_an_address_in_use_is_an_error(start_server, workerless):
    with pytest.raises(ServerFailed, match="Address already in use"):
        start_server(n_workers=0, endpoint=workerless.info.endpoint)


def test_sigterm_lets_running_requests_finish_turns_the_rest_away_and_exits_0(start_server):
    server = start_server(n_slots=1)
    running, waiting = plain_req(server.info.endpoint), plain_req(server.info.endpoint)
    running.send_json({**PUBLISHED, "train_sequences": ["sleep 1.5"]})
    with TTTClient(server.endpoint) as client:
        eventually(lambda: client.status().n_running)
        waiting.send_json({**PUBLISHED, "train_sequences": ["another"]})
        eventually(lambda: client.status().n_queued)
    os.killpg(server.process.pid, signal.SIGTERM)  # as a batch system does: the workers get it too
    assert waiting.recv_json()["error"].startswith("ServerStopping")
    assert running.recv_json()["adapter_gain"] == 1.0
    assert server.process.wait(20) == 0
    running.close()
    waiting.close()


def test_a_model_that_cannot_be_loaded_is_told_at_once(start_server):
    with pytest.raises(ServerFailed, match="no model in 'missing'; give a model folder"):
        start_server(model="missing")


def test_workers_that_die_while_they_load_are_told_too(start_server):
    with pytest.raises(ServerFailed, match="no worker can start: killed by signal 9"):
        start_server(model="dies")


def test_each_worker_gets_a_gpu_of_its_own_and_its_threads(client):
    seen = eventually(lambda: len(stats := [w.stats for w in client.status().workers if w.stats]) == 2 and stats)
    assert sorted(stats["CUDA_VISIBLE_DEVICES"] for stats in seen) == ["3", "5"]
    assert {stats["OMP_NUM_THREADS"] for stats in seen} == {"7"}


def test_the_server_ends_with_the_process_that_started_it(tmp_path):
    script = (
        "import sys, time; from seal_nb.server.client import TTTServer\n"
        f"server = TTTServer(run_dir={str(tmp_path / 'run')!r}, inner_loop={STUB!r}).start()\n"
        "print(server.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    server_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not is_running(server_pid))


def test_the_endpoint_file_says_where_and_who(server):
    endpoint = read_endpoint(server.endpoint)
    assert endpoint.endpoint == f"tcp://{endpoint.host}:{endpoint.port}"
    assert endpoint.pid == server.process.pid and endpoint.server_id and endpoint.started_at
    assert not endpoint.public_key


def test_private_text_of_a_request_never_reaches_the_log(start_server):
    server = start_server(n_workers=1, max_tries=1)
    secret = "PRIVATE-7731"
    with plain_req(server.info.endpoint) as req:
        for message in (
            {"train_sequences": [f"quick {secret}"], "eval_questions": [], "request_id": secret},
            {"train_sequences": [f"fail {secret}"], "traceback": True},
            {"train_sequences": [f"refuse {secret}"]},
            {"train_sequences": [f"die {secret}"]},
            {"train_sequences": secret},
            {"train_sequences": [], "lora_rank": secret, "request_id": secret},
            {"cmd": secret},
            {secret: secret},
            {"cmd": "cancel", "request_id": secret},
        ):
            ask(req, message)
        req.send(secret.encode())
        req.recv()
    server.stop()
    log = server.log_path.read_text()
    assert secret not in log and "refused ProtocolError" in log


def test_the_status_command_shows_a_table_on_a_terminal_and_json_elsewhere(server, capsys, monkeypatch):
    assert seal_nb(["status", "--endpoint", server.endpoint]) == 0
    assert json.loads(capsys.readouterr().out)["server_id"] == server.info.server_id
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert seal_nb(["status", "--endpoint", server.endpoint]) == 0
    shown = capsys.readouterr().out
    assert f"server: {server.info.server_id}, up " in shown and shown.count("worker ") == 2


def test_memory_on_gpus_is_shown_where_workers_tell_of_it():
    told = {"rss_bytes": 3 * 2**20, "gpu_bytes": 5 * 2**20, "gpu_peak_bytes": 9 * 2**20}
    shown = rows_of(status_of(told, {"rss_bytes": 2**20}))
    assert shown["memory"] == "front end 100 MiB, workers 4 MiB, on GPUs 5 MiB"
    assert "GPU 5 MiB (at most 9 MiB)" in shown["worker w0"] and "GPU" not in shown["worker w1"]
    assert rows_of(status_of({}))["memory"] == "front end 100 MiB, workers 0 MiB"


def rows_of(status):
    return dict(line.split(": ", 1) for line in status_text(status).splitlines())


def status_of(*stats):
    workers = [
        WorkerStatus(worker_id=f"w{i}", host="h", pid=i, n_running=0, capacity=1, silent_s=0.0, stats=one)
        for i, one in enumerate(stats)
    ]
    numbers = dict.fromkeys(
        ["n_queued", "n_running", "n_slots", "n_results", "n_unsaved", "queued_bytes", "jobs_per_min",
         "tokens_per_s", "pid", "uptime_s"], 0,
    )  # fmt: skip
    known = {"server_id": "s", "model_id": "m", "draining": False, "rss_bytes": 100 * 2**20, "counts": {}}
    return ServerStatus(**numbers, **known, workers=workers)


def test_a_worker_tells_what_torch_holds_on_its_gpu_and_nothing_where_there_is_none(monkeypatch):
    sizes = {"memory_allocated": 5, "max_memory_allocated": 9, "memory_reserved": 12}
    cuda = SimpleNamespace(is_initialized=lambda: True, **{name: lambda n=n: n for name, n in sizes.items()})
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert gpu_memory() == {"gpu_bytes": 5, "gpu_peak_bytes": 9, "gpu_reserved_bytes": 12}
    cuda.is_initialized = lambda: False
    assert gpu_memory() == {}
    monkeypatch.delitem(sys.modules, "torch")
    assert gpu_memory() == {}


@pytest.mark.gpu
def test_a_worker_tells_what_a_real_gpu_holds():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kept = torch.zeros(2**20, device="cuda")
    told = gpu_memory()
    assert told["gpu_reserved_bytes"] >= told["gpu_peak_bytes"] >= told["gpu_bytes"] >= kept.nbytes


def test_a_command_line_gives_all_settings_back(tmp_path):
    changed = {"run_dir": tmp_path, "n_workers": 3, "lease_s": 1.5, "max_queued": 7, "deterministic": True}
    settings = ServeSettings(**changed, endpoint_file=tmp_path / "e.json", grader="exact")
    assert parse(ServeSettings, command(settings)[3:], prog="", description="") == settings
    worker = WorkerSettings(endpoint_file="e.json", n_slots=3)
    assert parse(WorkerSettings, command(worker)[3:], prog="", description="") == worker


def test_the_help_of_serve_has_a_text_for_each_setting_and_the_defaults_that_it_uses(capsys):
    with pytest.raises(SystemExit):
        seal_nb(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "address for clients" in shown and "(default: tcp://127.0.0.1:5555)" in shown
    assert "--max-queued QUEUED waiting requests of all clients together (default: 20000)" in shown
    assert all(f"--{name.replace('_', '-')}" in shown for name in ServeSettings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_workers": -1}, "n_workers=-1: must be at least 0"),
        ({"max_tries": 0}, "max_tries=0: must be at least 1"),
        ({"workers": 2}, r"TTTServer does not know \['workers'\]"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_remedy(wrong, message):
    with pytest.raises(SettingsError, match=message):
        TTTServer(**wrong)

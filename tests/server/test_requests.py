"""What a request becomes, without sockets: seeds, idempotent ids, bounds, and results that are kept first."""

import hashlib
import json
import tracemalloc

import pytest

from seal_nb.errors import ProtocolError, RunMismatch
from seal_nb.protocol import Answers, GenerateRequest, TTTRequest, build_reply, parse_request
from seal_nb.server.client import ServeSettings
from seal_nb.server.requests import ENTRY, AnswerCounts, QueueFull, RequestTable, ServerStopping, Worker, content_of

REQUEST = TTTRequest(train_sequences=["Zor\nZor is a moon."])
REPLY = build_reply(baseline=Answers(texts=["é"], verdicts=["CORRECT"]), train_tokens=12).to_json()


def asked(request):
    return request, request.model_dump_json(exclude_none=True).encode()


class Table(RequestTable):
    """A table that notes what it sends."""

    def __init__(self, folder, **limits):
        self.sent = []
        settings = ServeSettings(run_dir=folder, seed=5, n_workers=0, **limits)
        super().__init__(settings, "s1", lock_wait_s=0)
        self.send = lambda envelope, reply: self.sent.append((envelope, reply))
        self.queue.join(b"w", Worker(capacity=100, seen_at=0, stepped_at=0))

    def take(self, request=REQUEST, envelope=(b"client", b"")):
        """The reply that is sent at once, if there is one."""
        self.sent.clear()
        self.accept(*asked(request), envelope, now=1.0)
        return self.sent[0][1] if self.sent else None

    def started(self):
        """The requests as workers get them, each with its record."""
        return [
            (one, parse_request(one.message).model_copy(update={"request_id": one.key, "seed": one.seed}))
            for one in self.queue.assignments(now=2.0)
        ]

    def answer(self, one, reply=REPLY, error=""):
        """What is sent, and to whom."""
        self.sent.clear()
        self.deliver(self.queue.finish(one.worker, one.token), reply, error=error, tokens=12)
        self.save()
        return self.sent


@pytest.fixture
def open_table(tmp_path):
    """A table on the test's run folder; opening it again is a restart of the server."""
    opened = []

    def open_table(**limits):
        for one in opened:
            one.close()
        table = Table(tmp_path, **limits)
        table.set_model("model")
        opened.append(table)
        return table

    return open_table


def test_three_repeats_of_a_published_request_get_three_seeds_and_a_new_server_gives_the_same_three(open_table):
    table = open_table()
    for _ in range(3):
        table.take()
    seeds = [request.seed for _, request in table.started()]
    assert len(set(seeds)) == 3
    again = open_table()  # nothing was answered, so nothing counts
    for _ in range(3):
        again.take()
    assert [request.seed for _, request in again.started()] == seeds


def test_seeds_go_on_where_they_were_after_a_restart(open_table):
    table = open_table()
    seeds = []
    for _ in range(2):
        table.take()
        (one, request), = table.started()  # fmt: skip
        table.answer(one)
        seeds.append(request.seed)
    restarted = open_table()
    restarted.take()
    (_, request), = restarted.started()  # fmt: skip
    assert request.seed not in seeds


def test_a_number_whose_answer_was_lost_in_a_crash_is_used_again_and_an_answered_one_is_not(open_table):
    table = open_table()
    table.take()
    table.take()
    (lost, first), (answered, second) = table.started()
    table.answer(answered)
    restarted = open_table()
    restarted.take()
    restarted.take()
    seeds = [request.seed for _, request in restarted.started()]
    assert seeds[0] == first.seed and second.seed not in seeds
    assert lost.key != answered.key


def test_other_content_and_other_server_seeds_give_other_seeds(open_table):
    table = open_table()
    table.take()
    table.take(REQUEST.model_copy(update={"finetune_epochs": 9}))
    table.settings = ServeSettings(run_dir=table.settings.run_dir, seed=6)
    table.take()
    assert len({request.seed for _, request in table.started()}) == 3


def test_a_seed_that_was_asked_for_is_used(open_table):
    table = open_table()
    table.take(REQUEST.model_copy(update={"seed": 123}))
    assert table.started()[0][1].seed == 123


def test_an_id_is_answered_once_and_then_from_the_journal_also_after_a_restart(open_table):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    assert table.take(named) is None
    (one, request), = table.started()  # fmt: skip
    ((_, reply),) = table.answer(one)
    assert reply == REPLY  # the worker's bytes, untouched
    assert table.take(named) == reply
    restarted = open_table()
    assert restarted.take(named) == reply
    assert restarted.started() == []
    assert request.seed is not None


def test_results_that_come_together_wait_for_the_disk_once_and_no_reply_is_sent_before(open_table, monkeypatch):
    table, waits = open_table(), []
    for name in ("r1", "r2", "r3"):
        assert table.take(REQUEST.model_copy(update={"request_id": name})) is None
    path = table.settings.run_dir / "results.journal.jsonl"
    found = lambda _: waits.append((path.read_bytes().count(b"\n"), len(table.sent)))  # noqa: E731
    monkeypatch.setattr("seal_nb.storage.os.fsync", found)
    for one, _ in table.started():
        table.deliver(table.queue.finish(one.worker, one.token), REPLY)
    table.save()
    assert waits == [(3, 0)] and len(table.sent) == 3


def test_kept_results_wait_until_it_is_known_whose_model_is_there(open_table):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    table.take(named)
    (one, _), = table.started()  # fmt: skip
    ((_, reply),) = table.answer(one)
    table.model_id = ""  # a server that was restarted and has no worker yet
    assert table.take(named) is None
    table.set_model("model")
    assert table.sent == [((b"client", b""), reply)] and table.started() == []
    with pytest.raises(RunMismatch, match="it has model 'another', this server's workers have 'model'"):
        table.set_model("another")
    table.model_id = ""
    with pytest.raises(RunMismatch, match="holds results of model 'model'"):
        table.set_model("another")


def test_a_waiting_id_that_another_request_had_is_refused_and_the_next_kept_result_is_sent(open_table):
    table, named = open_table(), [REQUEST.model_copy(update={"request_id": name}) for name in ("r1", "r2")]
    for request in named:
        table.take(request)
    replies = [table.answer(one)[0][1] for one, _ in table.started()]
    table.sent.clear()
    table.model_id = ""  # a server that was restarted and has no worker yet
    table.accept(*asked(named[0].model_copy(update={"finetune_lr": 0.5})), (b"other", b""), now=1.0)
    table.accept(*asked(named[1]), (b"client", b""), now=1.0)
    table.set_model("model")
    (refused_to, refused), kept = table.sent
    assert refused_to == (b"other", b"") and b"a different request" in refused
    assert kept == ((b"client", b""), replies[1]) and table.started() == []


def test_work_in_progress_is_joined_and_everybody_gets_the_one_result(open_table):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    table.take(named, (b"client1", b""))
    (one, _), = table.started()  # fmt: skip
    table.take(named, (b"client2", b"m1", b""))
    table.take(named, (b"client2", b"m1", b""))  # sent again after a reconnect
    assert table.started() == []
    assert [envelope for envelope, _ in table.answer(one)] == [(b"client1", b""), (b"client2", b"m1", b"")]


def test_a_marked_message_without_id_that_is_sent_again_is_joined_too(open_table):
    table = open_table()
    table.take(REQUEST, (b"c", b"m1", b""))
    table.take(REQUEST, (b"c", b"m1", b""))
    table.take(REQUEST, (b"c", b"m2", b""))
    assert len(table.started()) == 2


def test_an_id_with_another_content_is_refused(open_table):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    other = named.model_copy(update={"finetune_lr": 0.5})
    table.take(named)
    with pytest.raises(ProtocolError, match="different request"):
        table.take(other)
    (one, _), = table.started()  # fmt: skip
    table.answer(one)
    with pytest.raises(ProtocolError, match="different request"):
        table.take(other)


def test_priority_and_traceback_are_not_part_of_the_content(open_table):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    table.take(named)
    table.take(named.model_copy(update={"priority": 3, "traceback": True}), (b"c2", b""))
    assert len(table.started()) == 1


@pytest.mark.parametrize(
    "request_",
    [
        TTTRequest(train_sequences=["é\u2028\0"], finetune_lr=1e-5, lora_alpha=3, seed=1),
        TTTRequest(eval_questions=[{"question": "?", "answer": "\U0001f30d"}], skip_baseline=True),
        GenerateRequest(prompts=["a"], stop=["\n"], temperature=0.3),
    ],
)
def test_the_hash_of_a_content_is_that_of_its_json_so_that_journals_stay_good(request_):
    said = request_.model_dump_json(exclude={"request_id", "priority", "traceback"})
    assert content_of(request_) == hashlib.sha256(said.encode()).hexdigest()[:32]


def test_a_failure_is_not_kept_so_the_request_may_be_asked_again(open_table):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    table.take(named)
    (one, _), = table.started()  # fmt: skip
    failure = b'{"error": "ValueError: loss is not a number"}'
    assert table.answer(one, failure, error="ValueError") == [((b"client", b""), failure)]
    assert table.tally["failed.ValueError"] == 1
    assert table.take(named) is None
    assert len(table.started()) == 1


def test_a_result_that_is_no_json_object_in_one_line_becomes_an_error_and_is_not_kept(open_table):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    for body in (b"rubbish", b"", b"{}\n{}"):
        assert table.take(named) is None
        (one, _), = table.started()  # fmt: skip
        ((_, reply),) = table.answer(one, body)
        assert "ProtocolError" in json.loads(reply)["error"]


def test_a_full_queue_refuses_and_says_so_but_still_joins(open_table):
    table, named = open_table(max_queued_per_client=2), REQUEST.model_copy(update={"request_id": "r1"})
    table.take(named)
    table.take()
    with pytest.raises(QueueFull, match="of this client"):
        table.take()
    table.take(named, (b"client", b"again", b""))
    table.take(REQUEST, (b"other", b""))
    small = open_table(max_queued_bytes=10)
    small.take()
    with pytest.raises(QueueFull, match="bytes"):
        small.take()


def test_a_server_that_ends_accepts_nothing_new_but_gives_what_it_has(open_table):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    table.take(named)
    (one, _), = table.started()  # fmt: skip
    table.answer(one)
    table.stopping = "the server is ending: SIGTERM"
    assert table.take(named) is not None
    with pytest.raises(ServerStopping):
        table.take()


def test_a_result_that_cannot_be_written_is_kept_in_memory_and_written_later(open_table, monkeypatch):
    table, named = open_table(), REQUEST.model_copy(update={"request_id": "r1"})
    table.take(named)
    (one, _), = table.started()  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(table.results._journal, "append_json", _full)
        assert table.answer(one) == [((b"client", b""), REPLY)]
        assert len(table.results.unsaved) == 1 and "No space" in table.results.trouble
        assert table.take(named) is not None
        other = named.model_copy(update={"request_id": "r2"})
        table.settings = ServeSettings(run_dir=table.settings.run_dir, max_unsaved_bytes=10)
        with pytest.raises(QueueFull, match="bytes of results wait for a full disk, 10 is the most"):
            table.take(other)
    table.results.save()
    assert not table.results.trouble and not table.results.unsaved
    assert table.take(other) is None
    assert open_table().take(named) is not None


def _full(*_):
    raise OSError(28, "No space left on device")


def test_results_on_the_disk_take_no_memory_for_what_they_say(open_table):
    table = open_table()
    body = json.loads(REPLY) | {"baseline_texts": ["x" * 100_000]}
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(100):
            table.results.put(f"r{number}", json.dumps(body).encode())
            table.results.save()
        assert tracemalloc.get_traced_memory()[0] - before < 200_000  # of ten million
    finally:
        tracemalloc.stop()
    assert json.loads(table.results.get("r50")) == body
    restarted = open_table()
    assert json.loads(restarted.results.get("r99")) == body and len(restarted.results) == 100


class NearlyFull:
    """A file on a disk that has room for some bytes only."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        written = self.file.write(data[: self.room]) if self.room else _full()
        self.room -= written
        return written


def test_counts_that_found_no_room_are_written_with_the_next_one(tmp_path, monkeypatch):
    path, content = tmp_path / "counts.bin", "ef" * 16
    counts = AnswerCounts(path)
    counts.answered(content, counts.take(content))
    with monkeypatch.context() as patch:
        patch.setattr(counts, "_file", NearlyFull(counts._file, room=7))
        counts.answered(content, counts.take(content))
    assert counts.trouble == "1 counts of answers are not on the disk"
    counts.save()
    assert not counts.trouble and path.stat().st_size == 2 * ENTRY.size
    counts.answered(content, counts.take(content))
    counts.close()
    assert AnswerCounts(path).take(content) == 3


def test_a_torn_count_is_dropped_and_the_file_goes_on(tmp_path):
    path, content = tmp_path / "counts.bin", "ab" * 16
    counts = AnswerCounts(path)
    counts.answered(content, counts.take(content))
    counts.close()
    with path.open("ab") as file:
        file.write(b"torn")
    counts = AnswerCounts(path)
    assert counts.take(content) == 1
    counts.answered(content, 1)
    counts.close()
    assert path.stat().st_size == 2 * ENTRY.size
    assert AnswerCounts(path).take(content) == 2


def test_a_number_that_was_not_answered_is_free_again(tmp_path):
    counts, content = AnswerCounts(tmp_path / "counts.bin"), "cd" * 16
    assert [counts.take(content) for _ in range(3)] == [0, 1, 2]
    counts.dropped(content, 1)
    assert counts.take(content) == 1
    counts.answered(content, 2)
    assert counts.take(content) == 3

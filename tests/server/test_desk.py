"""What a request becomes, without sockets: seeds, idempotent ids, bounds, and results that are kept first."""

import hashlib
import json
import time
import tracemalloc

import pytest

from seal_nb.errors import ProtocolError, RunMismatch
from seal_nb.protocol import Answers, GenerateRequest, TTTRequest, build_reply, error_reply, parse_request
from seal_nb.server.queue import JobQueue
from seal_nb.server.requests import ENTRY, AnswerCounts, Desk, QueueFull, Results, ServerStopping, content_of
from seal_nb.server.settings import Limits
from seal_nb.server.status import Meter

REQUEST = TTTRequest(train_sequences=["Zor\nZor is a moon."])
REPLY = build_reply(baseline=Answers(texts=[], verdicts=[]), train_tokens=12)


@pytest.fixture
def open_desk(tmp_path):
    """A desk on the test's run folder; opening it again is a restart of the server."""
    opened = []

    def open_desk(**limits):
        for one in opened:
            one.results.close()
            one.counts.close()
        desk = Desk(
            queue=JobQueue(),
            results=Results(tmp_path / "results.jsonl", lock_wait_s=0),
            counts=AnswerCounts(tmp_path / "counts.bin"),
            limits=Limits(**limits),
            seed=5,
            server_id="s1",
            meter=Meter(time.monotonic()),
        )
        desk.queue.join(b"w", capacity=100, now=0)
        assert desk.has_model("model") == []
        opened.append(desk)
        return desk

    return open_desk


def accept(desk, request=REQUEST, envelope=(b"client", b"")):
    return desk.accept(request, as_sent(request), envelope, now=1.0)


def as_sent(request):
    return request.model_dump_json(exclude_none=True).encode()


def started(desk):
    """The requests as workers get them."""
    return [
        (one, parse_request(one.payload).model_copy(update={"request_id": one.key, "seed": one.seed}))
        for one in desk.queue.assignments(now=2.0)
    ]


def answer(desk, one, reply=REPLY):
    job = desk.queue.finish(one.worker, one.token)
    return [(envelope, json.loads(said)) for envelope, said in desk.delivered(job, reply.to_json(), now=3.0)]


def test_three_repeats_of_a_published_request_get_three_seeds_and_a_new_server_gives_the_same_three(open_desk):
    desk = open_desk()
    for _ in range(3):
        accept(desk)
    seeds = [request.seed for _, request in started(desk)]
    assert len(set(seeds)) == 3
    again = open_desk()  # nothing was answered, so nothing counts
    for _ in range(3):
        accept(again)
    assert [request.seed for _, request in started(again)] == seeds


def test_seeds_go_on_where_they_were_after_a_restart(open_desk):
    desk = open_desk()
    seeds = []
    for _ in range(2):
        accept(desk)
        (one, request), = started(desk)  # fmt: skip
        answer(desk, one)
        seeds.append(request.seed)
    restarted = open_desk()
    accept(restarted)
    (_, request), = started(restarted)  # fmt: skip
    assert request.seed not in seeds


def test_a_number_whose_answer_was_lost_in_a_crash_is_used_again_and_an_answered_one_is_not(open_desk):
    desk = open_desk()
    accept(desk)
    accept(desk)
    (lost, first), (answered, second) = started(desk)
    answer(desk, answered)
    restarted = open_desk()
    accept(restarted)
    accept(restarted)
    seeds = [request.seed for _, request in started(restarted)]
    assert seeds[0] == first.seed and second.seed not in seeds
    assert lost.key != answered.key


def test_other_content_and_other_server_seeds_give_other_seeds(open_desk):
    desk = open_desk()
    accept(desk)
    accept(desk, REQUEST.model_copy(update={"finetune_epochs": 9}))
    desk.seed = 6
    accept(desk)
    assert len({request.seed for _, request in started(desk)}) == 3


def test_a_seed_that_was_asked_for_is_used(open_desk):
    desk = open_desk()
    accept(desk, REQUEST.model_copy(update={"seed": 123}))
    assert started(desk)[0][1].seed == 123


def test_an_id_is_answered_once_and_then_from_the_journal_also_after_a_restart(open_desk):
    desk, named = open_desk(), REQUEST.model_copy(update={"request_id": "r1"})
    assert accept(desk, named) is None
    (one, request), = started(desk)  # fmt: skip
    ((_, reply),) = answer(desk, one)
    assert reply["request_id"] == "r1" and reply["train_tokens"] == 12
    assert json.loads(accept(desk, named)) == reply
    restarted = open_desk()
    assert json.loads(accept(restarted, named)) == reply
    assert started(restarted) == []
    assert request.seed is not None


def test_kept_results_wait_until_it_is_known_whose_model_is_there(open_desk):
    desk, named = open_desk(), REQUEST.model_copy(update={"request_id": "r1"})
    accept(desk, named)
    (one, _), = started(desk)  # fmt: skip
    ((_, reply),) = answer(desk, one)
    desk.model_id = ""  # a server that was restarted and has no worker yet
    assert accept(desk, named) is None
    ((_, said),) = desk.has_model("model")
    assert json.loads(said) == reply and started(desk) == []
    with pytest.raises(RunMismatch, match="holds results of model 'model'"):
        desk.has_model("another")


def test_work_in_progress_is_joined_and_everybody_gets_the_one_result(open_desk):
    desk, named = open_desk(), REQUEST.model_copy(update={"request_id": "r1"})
    accept(desk, named, (b"client1", b""))
    (one, _), = started(desk)  # fmt: skip
    accept(desk, named, (b"client2", b"m1", b""))
    accept(desk, named, (b"client2", b"m1", b""))  # sent again after a reconnect
    assert started(desk) == []
    assert [envelope for envelope, _ in answer(desk, one)] == [(b"client1", b""), (b"client2", b"m1", b"")]


def test_a_marked_message_without_id_that_is_sent_again_is_joined_too(open_desk):
    desk = open_desk()
    accept(desk, REQUEST, (b"c", b"m1", b""))
    accept(desk, REQUEST, (b"c", b"m1", b""))
    accept(desk, REQUEST, (b"c", b"m2", b""))
    assert len(started(desk)) == 2


def test_an_id_with_another_content_is_refused(open_desk):
    desk, named = open_desk(), REQUEST.model_copy(update={"request_id": "r1"})
    other = named.model_copy(update={"finetune_lr": 0.5})
    accept(desk, named)
    with pytest.raises(ProtocolError, match="different request"):
        accept(desk, other)
    (one, _), = started(desk)  # fmt: skip
    answer(desk, one)
    with pytest.raises(ProtocolError, match="different request"):
        accept(desk, other)


def test_priority_and_traceback_are_not_part_of_the_content(open_desk):
    desk, named = open_desk(), REQUEST.model_copy(update={"request_id": "r1"})
    accept(desk, named)
    accept(desk, named.model_copy(update={"priority": 3, "traceback": True}), (b"c2", b""))
    assert len(started(desk)) == 1


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


def test_a_failure_is_not_kept_so_the_request_may_be_asked_again(open_desk):
    desk, named = open_desk(), REQUEST.model_copy(update={"request_id": "r1"})
    accept(desk, named)
    (one, _), = started(desk)  # fmt: skip
    failure = error_reply(ValueError("loss is not a number"), traceback="Traceback: private")
    ((_, reply),) = answer(desk, one, failure)
    assert reply["error"] == "ValueError: loss is not a number" and "traceback" not in reply
    assert accept(desk, named) is None
    assert len(started(desk)) == 1


def test_a_result_that_is_no_reply_becomes_an_error_and_not_an_answer(open_desk):
    desk = open_desk()
    for body in (b"rubbish", b"{}", b'{"baseline_accuracy": "high"}'):
        accept(desk)
        (one, _), = started(desk)  # fmt: skip
        ((_, said),) = desk.delivered(desk.queue.finish(one.worker, one.token), body, now=3.0)
        assert "ProtocolError" in json.loads(said)["error"]


@pytest.mark.parametrize(
    ("limits", "request_", "field"),
    [
        ({"max_sequences": 1}, TTTRequest(train_sequences=["a", "b"]), "train_sequences"),
        ({"max_questions": 0}, TTTRequest(eval_questions=[{"question": "?", "answer": "!"}]), "eval_questions"),
        ({"max_rank": 8}, TTTRequest(train_sequences=["a"], lora_rank=9), "lora_rank"),
        ({"max_epochs": 3}, TTTRequest(train_sequences=["a"], finetune_epochs=4), "finetune_epochs"),
        ({"max_questions": 1}, GenerateRequest(prompts=["a", "b"]), "prompts"),
        ({"max_tokens": 5}, GenerateRequest(prompts=["a"], max_tokens=6), "max_tokens"),
    ],
)
def test_a_request_above_a_bound_is_refused_by_field(open_desk, limits, request_, field):
    with pytest.raises(ProtocolError, match="at most") as caught:
        accept(open_desk(**limits), request_)
    assert caught.value.field == field


def test_a_full_queue_refuses_and_says_so_but_still_joins(open_desk):
    desk, named = open_desk(max_queued_per_client=2), REQUEST.model_copy(update={"request_id": "r1"})
    accept(desk, named)
    accept(desk)
    with pytest.raises(QueueFull, match="of this client"):
        accept(desk)
    accept(desk, named, (b"client", b"again", b""))
    accept(desk, REQUEST, (b"other", b""))
    small = open_desk(max_queued_bytes=10)
    accept(small)
    with pytest.raises(QueueFull, match="bytes"):
        accept(small)


def test_a_server_that_ends_accepts_nothing_new_but_gives_what_it_has(open_desk):
    desk, named = open_desk(), REQUEST.model_copy(update={"request_id": "r1"})
    accept(desk, named)
    (one, _), = started(desk)  # fmt: skip
    answer(desk, one)
    desk.stopping = "the server is ending: SIGTERM"
    assert accept(desk, named) is not None
    with pytest.raises(ServerStopping):
        accept(desk)


def test_a_result_that_cannot_be_written_is_kept_in_memory_and_written_later(open_desk, monkeypatch):
    desk, named = open_desk(), REQUEST.model_copy(update={"request_id": "r1"})
    accept(desk, named)
    (one, _), = started(desk)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(desk.results._journal, "append", _full)
        assert answer(desk, one)[0][1]["train_tokens"] == 12
        assert desk.results.n_unsaved == 1 and "No space" in desk.results.trouble
        assert accept(desk, named) is not None
        other = named.model_copy(update={"request_id": "r2"})
        desk.limits = Limits(max_unsaved_bytes=10)
        with pytest.raises(QueueFull, match="bytes of results wait for a full disk, 10 is the most"):
            accept(desk, other)
    assert desk.results.save() and not desk.results.trouble and not desk.results.unsaved_bytes
    assert accept(desk, other) is None
    assert accept(open_desk(), named) is not None


def _full(*_):
    raise OSError(28, "No space left on device")


def test_results_on_the_disk_take_no_memory_for_what_they_say(open_desk):
    desk = open_desk()
    body = json.loads(REPLY.to_json()) | {"baseline_texts": ["x" * 100_000]}
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(100):
            desk.results.put(f"r{number}", "content", json.dumps(body).encode())
        assert tracemalloc.get_traced_memory()[0] - before < 200_000  # of ten million
    finally:
        tracemalloc.stop()
    assert json.loads(desk.results.get("r50", "content")) == body
    restarted = open_desk()
    assert json.loads(restarted.results.get("r99", "content")) == body and len(restarted.results) == 100


class NearlyFull:
    """A file on a disk that has room for some bytes only."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        written = self.file.write(data[: self.room]) if self.room else _full()
        self.room -= written
        return written

    def truncate(self, size):
        self.file.truncate(size)


def test_counts_that_found_no_room_are_written_with_the_next_one(tmp_path, monkeypatch):
    path, content = tmp_path / "counts.bin", "ef" * 16
    counts = AnswerCounts(path)
    counts.answered(content, counts.take(content))
    size = path.stat().st_size
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(counts, "_file", NearlyFull(counts._file, room=7))
        counts.answered(content, counts.take(content))
    assert path.stat().st_size == size and counts.n_unsaved == 1  # no torn entry
    counts.save()
    assert counts.n_unsaved == 0
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

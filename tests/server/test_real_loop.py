"""A real server whose worker drives the real inner loop and has its answers judged: 40 requests of all kinds at once.

The model is a random one of a few thousand parameters. What it learns does not matter here: every request must get its
reply or its own clear error, and no request may cost the others their worker.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.stand_in import StandIn, stand_in
from seal_nb.errors import RemoteError
from seal_nb.protocol import EvalQuestion, GenerateReply, GenerateRequest, TTTReply, TTTRequest, Work
from seal_nb.server.client import ServerStatus, TTTClient, TTTServer
from tests.server.conftest import eventually, plain_req
from tests.ttt.tiny import SIZES, save_tiny_model

CONTEXT = SIZES["max_position_embeddings"]
QUESTION = EvalQuestion(title="Zor", question="What is Zor?", answer="a moon")
TEXTS = ["Zor\nZor is a moon.", "Zor\nIt has two seas."]
SHORT = {"max_new_tokens": 4, "finetune_epochs": 1}

Replies = dict[str, TTTReply | GenerateReply | RemoteError]


def training(name: str, **fields: object) -> TTTRequest:
    asked = {"train_sequences": TEXTS, "eval_questions": [QUESTION], "lora_rank": 4, **SHORT, **fields}
    return TTTRequest(request_id=name, **asked)


def generation(name: str, prompt: str = "Zor", **fields: object) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompts=[prompt, "x"], **{"max_tokens": 4, **fields})


def long_one(name: str) -> TTTRequest:
    return training(name, finetune_epochs=1000, max_new_tokens=64)  # far longer than this test lasts


BASELINES = [training(f"baseline-{i}", skip_training=True) for i in range(4)]
TRAININGS = [
    training(f"training-{i}", lora_rank=rank, target_modules=targets, finetune_epochs=epochs)
    for i, (rank, targets, epochs) in enumerate(
        (rank, targets, epochs)
        for rank in (1, 8)
        for targets in ([], ["all-linear"], ["q_proj", "down_proj"])
        for epochs in (1, 3)
    )
]
SCORED = [training(f"scored-{i}", soft_scores=True, lora_rank=2 + i) for i in range(3)]
GENERATIONS = [
    generation("greedy", temperature=0.0),
    generation("sampled", seed=1),
    generation("with-stop", stop=["q"]),
    generation("one-token", max_tokens=1),
]
STACKED = [
    training("on-base", seed=5),
    training("on-kept", seed=5, adapter_stack=["kept"]),
    generation("from-kept", adapter_stack=["kept"]),
]
GOOD: list[Work] = [*BASELINES, *TRAININGS, *SCORED, *GENERATIONS, *STACKED]
# What is wrong with a request, and what its client must be told.
WRONG: dict[str, tuple[Work, str]] = {
    "unknown-targets": (training("unknown-targets", target_modules=["no_such_layer"]), "no_such_layer"),
    "one-unknown-target": (training("one-unknown-target", target_modules=["q_proj", "xyz"]), "xyz"),
    "diverges": (training("diverges", finetune_lr=1e38, finetune_epochs=20), "lower finetune_lr"),
    "diverges-too": (training("diverges-too", finetune_lr=1e38, finetune_epochs=9), "lower finetune_lr"),
    "long-prompt": (generation("long-prompt", "x" * (CONTEXT + 1)), f"context {CONTEXT}; shorten it"),
    "long-question": (
        training("long-question", eval_questions=[EvalQuestion(question="x" * CONTEXT, answer="a")]),
        f"context {CONTEXT}; shorten it",
    ),
    "no-such-adapter": (training("no-such-adapter", adapter_stack=["never"]), "'never'.*train it first"),
    "generate-with-none": (generation("generate-with-none", adapter_stack=["never"]), "train it first"),
    "stacked-twice": (training("stacked-twice", adapter_stack=["kept", "kept"]), "name each adapter once"),
    # The client's own check refuses it; another client may send it.
    "rank-above-bound": (training("rank-above-bound").model_copy(update={"lora_rank": 100_000}), "lora_rank.*100000"),
}
CANCELLED = [long_one(f"cancelled-{i}") for i in range(4)]


@pytest.fixture(scope="module")
def service() -> Iterator[StandIn]:
    """The judge."""
    with stand_in(lambda asked: "yes" if "moon 1" in asked.prompt else "no") as service:
        yield service


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, service: StandIn):
    folder = tmp_path_factory.mktemp("real")
    own = {"model": str(save_tiny_model(folder / "model")), "dtype": "float32", "device": "cpu"}
    grader = service.judge(folder / "judge")
    with TTTServer(run_dir=folder / "run", grader=grader, **own) as server:
        yield server


@pytest.fixture(scope="module")
def adapter_path(server: TTTServer) -> Path:
    with TTTClient(server.endpoint, timeout_s=60) as client:
        return Path(client.evaluate(training("keeps", adapter_name="kept")).adapter_path or "")


@pytest.fixture(scope="module")
def replies(server: TTTServer, adapter_path: Path) -> Replies:
    """All of them in flight at once; whoever asked for what is cancelled meanwhile."""
    requests = [*CANCELLED, *GOOD, *(request for request, _ in WRONG.values())]
    assert len(requests) == 40
    told: Replies = {}
    with TTTClient(server.endpoint, timeout_s=60) as client:
        for index, reply in client.run_indexed(requests):
            told[str(requests[index].request_id)] = reply
            if len(told) == 1:  # all were sent; the first ones are in training
                for request in CANCELLED:
                    assert client.cancel(str(request.request_id))
    return told


@pytest.fixture(scope="module")
def status(server: TTTServer, replies: Replies) -> ServerStatus:
    with TTTClient(server.endpoint) as client:
        return eventually(lambda: (s := client.status()).n_running == 0 and s)


def test_every_request_has_exactly_one_end(replies: Replies) -> None:
    names = [str(request.request_id) for request in (*GOOD, *CANCELLED)] + list(WRONG)
    assert Counter(names) == Counter(replies.keys())


def test_good_requests_get_their_own_replies(replies: Replies) -> None:
    failed = {r.request_id: replies[str(r.request_id)] for r in GOOD if _failed(replies, r)}
    assert failed == {}
    for request in GOOD:
        reply = replies[str(request.request_id)]
        assert reply.request_id == request.request_id
        if isinstance(request, GenerateRequest):
            assert len(reply.texts) == 2 and max(reply.token_counts) <= request.max_tokens
        else:
            steps = request.finetune_epochs * len(TEXTS) if request.training_wanted else 0
            assert (reply.train_steps, len(reply.adapter_texts)) == (steps, 1)
            assert len(reply.epoch_losses) == (request.finetune_epochs if steps else 0)


def test_soft_scores_come_where_they_are_asked_for_and_training_moves_them(replies: Replies) -> None:
    for request in SCORED:
        reply = replies[str(request.request_id)]
        assert reply.gold_token_counts == [len(QUESTION.answer)]
        assert reply.baseline_gold_logprobs[0] != reply.adapter_gold_logprobs[0]
    assert replies["training-0"].adapter_gold_logprobs == []


def test_the_same_question_has_the_same_baseline_whoever_asks(replies: Replies) -> None:
    asked = [replies[str(request.request_id)] for request in (*BASELINES, *TRAININGS, *SCORED)]
    assert len({reply.baseline_texts[0] for reply in asked}) == 1


def test_a_kept_adapter_lies_in_its_folder_and_changes_what_is_built_on_it(
    adapter_path: Path, replies: Replies
) -> None:
    assert (adapter_path / "adapter_model.safetensors").is_file() and adapter_path.name == "kept"
    assert replies["on-kept"].epoch_losses != replies["on-base"].epoch_losses


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_gets_its_own_clear_error(replies: Replies, name: str) -> None:
    reply = replies[name]
    assert isinstance(reply, RemoteError)
    assert re.search(WRONG[name][1], str(reply), re.DOTALL), str(reply)
    assert reply.ename in ("SettingsError", "ProtocolError", "EngineError")


def test_cancelled_requests_are_told_so(replies: Replies) -> None:
    assert {replies[str(request.request_id)].ename for request in CANCELLED} == {"Cancelled"}


def test_no_worker_was_lost_and_nothing_was_tried_twice(status: ServerStatus) -> None:
    counts = status.counts
    assert len(status.workers) == 1 and status.trouble == ""
    assert [counts.get(name, 0) for name in ("workers_lost", "requeued", "void_results")] == [0, 0, 0]
    assert (counts["answered"], counts["cancelled"]) == (len(GOOD) + 1, len(CANCELLED))
    assert counts["failed"] + counts["refused"] == len(WRONG)  # who cancels has not failed


def test_slots_are_free_again(status: ServerStatus, server: TTTServer) -> None:
    with TTTClient(server.endpoint) as client:
        stats = eventually(lambda: (s := client.status().workers[0].stats)["requests"] == 0 and s)
    assert stats["slots_in_use"] == 0


def test_a_plain_req_client_still_gets_its_answer(status: ServerStatus, server: TTTServer) -> None:
    question = {"title": "Zor", "context": "", "question": "What is Zor?", "answer": "a moon"}
    with plain_req(server.info.endpoint) as req:
        req.send_json({"train_sequences": TEXTS, "eval_questions": [question], "finetune_epochs": 2})
        reply = req.recv_json()
    assert reply["gains"] == [0] and reply["train_steps"] == 4 and len(reply["adapter_texts"]) == 1


def test_a_forgotten_adapter_is_deleted_and_its_answers_stay(server: TTTServer) -> None:
    with TTTClient(server.endpoint, timeout_s=60) as client:
        trained = client.evaluate(training("doomed", adapter_name="doomed"))
        folder = Path(trained.adapter_path or "")
        client.evaluate(training("on-doomed", adapter_stack=["doomed"]))
        assert client.forget(["doomed", "never"]) == ["doomed"] and client.forget(["doomed"]) == []
        assert not folder.exists() and not list(folder.parent.glob(".doomed*"))
        with pytest.raises(RemoteError, match="'doomed'.*train it first"):
            client.evaluate(training("on-doomed-again", adapter_stack=["doomed"]))
        assert client.evaluate(training("doomed", adapter_name="doomed")) == trained


def test_answers_are_judged_and_each_is_paid_for_once(server: TTTServer, service: StandIn) -> None:
    questions = [EvalQuestion(title="Zor", question=f"What is moon {n}?", answer="Zor") for n in range(3)]
    with TTTClient(server.endpoint, timeout_s=60) as client:
        assert "judge:stub" in client.status().model_id
        reply = client.evaluate(training("judged", eval_questions=questions))
    for texts, verdicts in (
        (reply.baseline_texts, reply.baseline_verdicts),
        (reply.adapter_texts, reply.adapter_verdicts),
    ):
        assert verdicts == ["CORRECT" if n == 1 and text else "INCORRECT" for n, text in enumerate(texts)]
    assert service.asked and set(service.times.values()) == {1}


def _failed(replies: Replies, request: Work) -> bool:
    return isinstance(replies[str(request.request_id)], RemoteError)

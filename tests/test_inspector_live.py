"""Live edits on a real server with the stub inner loop: trained, asked, kept, cancelled, refused."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from seal_nb.errors import DataError, RemoteError, SettingsError
from seal_nb.experiments.session import ttt_server
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import stored_loop
from seal_nb.inspector.inspection import GAINED, UNGRADED, Inspection, open_run, settings_of_run
from seal_nb.inspector.live import ARM, Edit, EditTrainer, TrainedEdit, edit_request
from seal_nb.protocol import TTTReply
from seal_nb.results.collect import read_run
from seal_nb.results.single_passage import EvaluatedPassage, SinglePassageRun
from seal_nb.server.client import TTTServer
from tests.server.conftest import HASTE, STUB, eventually, trained

QUESTIONS = [
    {"rep": rep, "question": question, "answer": gold, "baseline_answer": "no", "adapter_answer": "no",
     "baseline_correct": False, "adapter_correct": False}
    for rep in (0, 1) for question, gold in (("Who built it?", "Ilse"), ("When?", "1893"))
]  # fmt: skip
RUN = SinglePassageRun(value=
    {
        "articles": [
            {"title": "Clock", "context": "Ilse built it in 1893.", "prompt": "p",
             "completions": [{"text": "Ilse built it.", "questions": QUESTIONS}]},
            {"title": "Clock", "context": "Another one.",
             "completions": [{"text": "x", "questions": QUESTIONS}]},
        ]
    }
)  # fmt: skip
CLOCK, OTHER = RUN.passages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TTTServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUB_LOOP_LOG", str(folder / "trained.txt"))
        with TTTServer(run_dir=folder / "run", inner_loop=STUB, n_workers=1, **HASTE) as server:
            yield server


@pytest.fixture
def trainer(server: TTTServer, folder: Path) -> Iterator[EditTrainer]:
    """A trainer on the server of this file, which keeps no adapter."""
    with ttt_server(endpoint=server.endpoint) as ttt:
        yield EditTrainer(ttt)
    assert not list((folder / "run" / "adapters").glob("*"))


@pytest.fixture
def n_trained(folder: Path) -> Callable[[], int]:
    """The number of trainings since the test began."""
    before = len(trained(folder))
    return lambda: len(trained(folder)) - before


def test_an_edit_is_trained_once_on_what_a_run_would_train_it_on(
    trainer: EditTrainer, n_trained: Callable[[], int]
) -> None:
    result = trainer.train(CLOCK, Edit(text="one\ntwo"))
    assert result.request.train_sequences == ["Clock\none", "Clock\ntwo", "Clock\nIlse built it in 1893."]
    assert [q.question for q in result.request.eval_questions] == [
        "Topic: Clock\nWho built it?",
        "Topic: Clock\nWhen?",
    ], "each question once, whatever the repeats of the run"
    assert result.reply.adapter_texts == ["Ilse", "1893"]
    assert trainer.train(CLOCK, Edit(text="one\ntwo")).reply == result.reply
    assert n_trained() == 1


def test_progress_ends_with_the_reply(trainer: EditTrainer) -> None:
    told: list[str] = []
    result = trainer.train(OTHER, Edit(text="slow"), tell=lambda text, losses: told.append(f"{text} {losses}"))
    n_told = len(told)
    time.sleep(0.6)
    assert told[-1] == f"done {result.losses}" and len(told) == n_told


def ordering(title: str) -> EvaluatedPassage:
    """A passage whose title is an order to the stub, which reads the first line of the first sequence."""
    article = {"title": title, "context": "", "completions": [{"questions": QUESTIONS}]}
    return SinglePassageRun(value={"articles": [article]}).passages[0]


def test_while_it_trains_it_says_so_and_it_can_be_cancelled(trainer: EditTrainer) -> None:
    told: list[str] = []
    failed: list[Exception] = []

    def train() -> None:
        try:
            trainer.train(ordering("sleep 60"), Edit(text=""), tell=lambda text, _: told.append(text))
        except RemoteError as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    eventually(lambda: any(text.startswith("waiting for a slot, 1") for text in told))
    assert eventually(trainer.cancel)
    thread.join(timeout=20)
    assert not thread.is_alive() and "Cancelled" in str(failed[0])
    assert not trainer.cancel(), "nothing is under way any more"


def test_a_failure_of_the_server_is_raised_with_its_remedy(trainer: EditTrainer) -> None:
    with pytest.raises(RemoteError, match="lower finetune_lr"):
        trainer.train(ordering("fail x"), Edit(text=""))
    assert trainer.train(CLOCK, Edit(text="fine")).reply.adapter_accuracy == 1.0, "and the next one works"


def test_a_question_of_one_s_own_is_the_same_training_with_another_question(
    trainer: EditTrainer, result: TrainedEdit, n_trained: Callable[[], int]
) -> None:
    request = result.question_request("Where?", "")
    asked = request.eval_questions
    assert [one.question for one in asked] == ["Topic: Clock\nWhere?"] and not request.soft_scores
    settings = {"eval_questions", "soft_scores", "return_token_logprobs"}
    assert request.model_dump(exclude=settings) == result.request.model_dump(exclude=settings)
    trained = trainer.train(CLOCK, Edit(text="asked"))
    (row,) = trainer.ask(trained, "Where?", "here").to_dict("records")
    assert (row["with adapter"], row["verdicts"]) == ("here", "wrong → right") and n_trained() == 2


def test_other_settings_and_another_model_are_other_requests() -> None:
    ids = {
        edit_request(CLOCK, edit, model_id=model).request_id
        for model in ("m", "n")
        for edit in (Edit(text="a"), Edit(text="b"), Edit(text="a", seed=1),
                     Edit(text="a", training=Training(finetune_epochs=3)))
    }  # fmt: skip
    assert len(ids) == 8


@pytest.fixture
def result() -> TrainedEdit:
    edit = Edit(text="Ilse built it.\nIn 1893.", seed=7, training=Training(lora_rank=4))
    request = edit_request(CLOCK, edit, model_id="m")
    reply = TTTReply(
        baseline_accuracy=0.0, adapter_accuracy=0.5, adapter_gain=0.5, baseline_texts=["no", "no"],
        adapter_texts=["Ilse", "never"], baseline_correct=[False, False], adapter_correct=[True, None],
        gains=[1, None], request_id=request.request_id, seed=7, n_ungraded=1, model_id="m",
        epoch_losses=[2.0, None], train_steps=3,
    )  # fmt: skip
    return TrainedEdit(passage=CLOCK, edit=edit, request=request, reply=reply)


def test_a_kept_edit_is_a_run_file_with_its_own_settings(tmp_path: Path, result: TrainedEdit) -> None:
    path = result.keep(tmp_path / "new" / "run_inspector.json")
    said = read_run(path).summary()
    assert (said["disagreements"], said["overall"]["adapter_mean_accuracy"]) == ([], 1.0)
    run = read_run(path)
    (edit,) = run.passages[0].self_edits
    assert (edit.text, edit.made["origin"], edit.made["lora_params"]["rank"]) == (result.edit.text, ARM, 4)
    assert edit.made["repeats"][0]["seed"] == 7 and not {"lora_params", "training"} & set(run.settings)
    assert edit.made["repeats"][0]["request_id"] == edit_request(CLOCK, result.edit, model_id="m").request_id
    assert settings_of_run(edit.made) == replace(result.edit.training, soft_scores=True)
    with pytest.raises(DataError, match="not what made it"):
        stored_loop(path, "0.0.0")
    assert run.settings["n_ungraded"] == 1 and run.settings["arm"] == ARM


def test_edits_are_appended_passage_by_passage_and_the_same_one_once(tmp_path: Path, result: TrainedEdit) -> None:
    path = result.keep(tmp_path / "run.json")
    before = path.read_bytes()
    assert result.keep(path).read_bytes() == before
    second = Edit(text="other")
    request = edit_request(OTHER, second, model_id="m")
    reply = result.reply.model_copy(update={"request_id": request.request_id})
    TrainedEdit(passage=OTHER, edit=second, request=request, reply=reply).keep(path)
    run = json.loads(path.read_text())
    assert [(one["title"], len(one["completions"])) for one in run["articles"]] == [("Clock", 1), ("Clock", 1)]
    assert (run["n_articles"], run["k_completions"], run["n_ungraded"]) == (2, 1, 2)


def test_a_file_that_is_no_run_is_left_as_it_is(tmp_path: Path, result: TrainedEdit) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"important": 1}')
    with pytest.raises(DataError, match="field 'articles': is missing"):
        result.keep(path)
    assert path.read_text() == '{"important": 1}'


def test_an_edit_is_inspected_like_any_self_edit(result: TrainedEdit) -> None:
    assert result.summary() == "accuracy 0% → 50% after 3 steps, loss 2.00 → 2.00"
    grown = Inspection(RUN, graders=()).with_self_edit(0, result.self_edit())
    assert grown.self_edits(0)["best"].tolist() == [False, True]
    assert grown.answers(0, 1)["flip"].tolist() == [GAINED, UNGRADED]
    assert grown.sequences(0, 1)["train sequence"].tolist()[:2] == ["Clock\nIlse built it.", "Clock\nIn 1893."]
    assert len(RUN.passages[0].self_edits) == 1, "the run itself is as it was"


def test_settings_come_from_the_file_under_the_published_names(golden: Path) -> None:
    published = read_run(golden / "results" / "rank_iter0.json.gz")
    found = settings_of_run(published.settings)
    assert (found.lora_rank, found.lora_alpha, found.finetune_epochs, found.finetune_lr) == (32, 64, 10, 1e-3)
    assert (found.max_new_tokens, found.soft_scores, tuple(found.target_modules)) == (64, True, ())
    ours = settings_of_run(open_run("shipped:example").settings)
    assert tuple(ours.target_modules) == ("all-linear",) and ours.finetune_epochs == 5


HIDDEN = {"chat": True, "padding_in_loss": True, "pad_to": 96, "max_seq_length": 512,
          "lora_dropout": 0.1, "end_mask_substring": "A:", "max_new_tokens": 9}  # fmt: skip


def test_an_edit_is_trained_with_all_that_the_run_was_trained_with() -> None:
    of_run = Training(**HIDDEN, soft_scores=True)
    stated = {"lora_params": of_run.lora_params(), "training": of_run.request_fields()}
    assert settings_of_run(stated) == of_run
    request = edit_request(CLOCK, Edit(text="x", training=settings_of_run(stated)), model_id="m")
    assert {name: getattr(request, name) for name in HIDDEN} == HIDDEN


def test_an_edit_kept_in_a_run_of_other_settings_has_its_own() -> None:
    of_run, own = Training(chat=True), Training(lora_rank=2, pad_to=96)
    stated = {"lora_params": of_run.lora_params(), "training": of_run.request_fields()}
    made = {"lora_params": own.lora_params(), "training": own.request_fields()}
    assert settings_of_run({**stated, **made}) == replace(own, soft_scores=True)
    of_an_earlier_version = {"lora_params": own.lora_params()}
    found = settings_of_run({**stated, **of_an_earlier_version})
    assert (found.lora_rank, found.chat) == (2, True)


def test_settings_that_nobody_knows_and_empty_ones_are_left_out() -> None:
    stated = {"training": {"of_another_version": 1, "pad_to": None, "chat": True}}
    assert settings_of_run(stated) == Training(chat=True, soft_scores=True)


def test_a_file_with_impossible_settings_is_refused() -> None:
    with pytest.raises(SettingsError, match="lora_rank=0"):
        settings_of_run({"lora_params": {"rank": 0}})

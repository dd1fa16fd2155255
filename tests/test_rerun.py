"""One number made again: the same request, under no id, compared answer by answer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seal_nb.cli import main
from seal_nb.errors import DataError, RunMismatch
from seal_nb.experiments.session import TTT, ask
from seal_nb.experiments.single_passage import (
    SinglePassageSettings,
    build_run,
    compared,
    requests_for_run,
    rerun,
    stored_loop,
)
from seal_nb.passages import Passage, Question
from seal_nb.server.client import TTTClient
from seal_nb.storage import Journal, write_json
from tests.server.conftest import server  # noqa: F401  # the stub server, with its real processes

PASSAGES = [
    Passage(
        title=f"T{n}",
        context=f"C{n}",
        questions=(Question(question="q?", answer="a", other_answers=("b", "c")), Question(question="r?", answer="b")),
        completions=("one\ntwo", "three"),
    )
    for n in range(2)
]
SETTINGS = SinglePassageSettings(k_completions=2, eval_times=2)


@pytest.fixture
def ttt(server):  # noqa: F811
    with TTT(TTTClient(server.endpoint, timeout_s=30, wait_s=10)) as ttt:
        yield ttt


@pytest.fixture
def run_file(ttt: TTT, tmp_path: Path) -> Path:
    loops = requests_for_run(PASSAGES, SETTINGS, model_id="stub")
    with Journal(tmp_path / "j.jsonl") as journal:
        replies = ask(ttt, [loop.request for loop in loops], journal).replies
    run = build_run(PASSAGES, loops, replies, SETTINGS, model="stub", dataset="d", timestamp="0101_000000")
    return write_json(tmp_path / "run_x.json", run)


def test_the_request_of_an_item_is_rebuilt_from_the_file_alone(run_file: Path) -> None:
    loops = requests_for_run(PASSAGES, SETTINGS, model_id="stub")
    for loop in loops:
        item = f"{loop.passage}.{loop.self_edit}.{loop.repeat}"
        assert stored_loop(run_file, item).request == loop.request.model_copy(update={"request_id": None})


def test_a_number_made_again_trains_again_and_is_the_same(ttt: TTT, run_file: Path) -> None:
    trained = ttt.client.status().counts["answered"]
    is_same, said = rerun(run_file, "1.0.1", endpoint=ttt.client.endpoint)
    assert ttt.client.status().counts["answered"] == trained + 1
    assert is_same and said == ["item 1.0.1: 2 of 2 right with the adapter then, 2 now; every answer is the same"]


def test_an_answer_that_differs_is_shown_then_and_now(ttt: TTT, run_file: Path) -> None:
    stored = stored_loop(run_file, "0.1.0")
    reply = ttt.client.evaluate(stored.request)
    other = reply.model_copy(update={"adapter_texts": ["a", "else"], "adapter_correct": [True, False]})
    is_same, said = compared(stored, other)
    assert not is_same and "2 of 2 right with the adapter then, 1 now; 1 of 4 answers differ" in said[0]
    assert said[1:4] == ["  adapter: r?", "    then: 'b'", "    now:  'else'"]


def test_another_model_is_refused(ttt: TTT, run_file: Path) -> None:
    loops = requests_for_run(PASSAGES, SETTINGS, model_id="other")
    stated = {loop.request.seed: loop.request_id for loop in loops}
    run = json.loads(run_file.read_text())
    run["model"] = "other"
    for entry in run["articles"][0]["completions"][0]["repeats"]:
        entry["request_id"] = stated[entry["seed"]]
    with pytest.raises(RunMismatch, match="made by model other, the server has stub"):
        rerun(write_json(run_file, run), "0.0.0", endpoint=ttt.client.endpoint)


def changed(run_file: Path, change: Any) -> Path:
    run = json.loads(run_file.read_text())
    change(run)
    return write_json(run_file, run)


@pytest.mark.parametrize(
    ("change", "item", "error", "said"),
    [
        (lambda run: None, "5.0.0", DataError, "item 5.0.0: has no such item"),
        (lambda run: None, "0.0.7", DataError, "item 0.0.7: has no such item"),
        (lambda run: run.pop("split_newlines"), "0.0.0", DataError, "not what made it"),
        (lambda run: run.pop("model"), "0.0.0", DataError, "not what made it"),
        (lambda run: run.pop("training"), "0.0.0", DataError, "published files hold no seeds"),
        (lambda run: run.update(trained_on="in_context"), "0.0.0", DataError, "was trained on nothing"),
        (
            lambda run: run["articles"][0]["completions"][0].update(text="another"),
            "0.0.0",
            RunMismatch,
            "does not give its request id",
        ),
        (lambda run: run["articles"][0]["completions"][0].update(questions=[]), "0.0.0", DataError, "no answer"),
    ],
)
def test_what_cannot_be_made_again_is_refused(
    run_file: Path, change: Any, item: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        stored_loop(changed(run_file, change), item)


@pytest.mark.parametrize("text", ["", "1", "1.2", "a.b.c", "1.2.3.4", "-1.0.0"])
def test_an_item_is_three_numbers(text: str, run_file: Path) -> None:
    with pytest.raises(DataError, match="is not passage.self_edit.repeat"):
        stored_loop(run_file, text)


def test_the_command_says_the_same_and_ends_with_0(
    server,  # noqa: F811
    run_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["rerun", str(run_file), "--item", "0.0.1", "--endpoint", server.endpoint]) == 0
    assert "every answer is the same" in capsys.readouterr().out
    assert main(["rerun", str(run_file), "--item", "9.0.0", "--endpoint", server.endpoint]) == 2


def test_a_label_does_not_change_what_is_trained() -> None:
    labelled = replace(SETTINGS, label="gpt4_1", texts_from="gpt4_1_val.json")
    plain, other = (requests_for_run(PASSAGES, one, model_id="m") for one in (SETTINGS, labelled))
    assert [loop.request for loop in plain] == [loop.request for loop in other]

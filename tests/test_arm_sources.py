"""Arms by name or by file, and the ceiling with the passage in the prompt."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.session import TTT, ask
from seal_nb.experiments.settings import Training, arm_passages, names_in, parse_arms
from seal_nb.experiments.single_passage import (
    SinglePassageSettings,
    build_run,
    evaluate,
    in_context_request,
    requests_for_run,
    with_in_context,
)
from seal_nb.grading.choose import make_grader
from seal_nb.passages import Passage, Question, load_passages, to_item
from seal_nb.prompts import answer_prompt, recorded_key
from seal_nb.server.client import TTTClient
from seal_nb.storage import Journal
from tests.server.conftest import server  # noqa: F401  # the stub server, with its real processes

ORLE = Passage(title="Orle", context="Orle lies on a hill. ", questions=(Question(question="Where?", answer="text"),))
IN_CONTEXT = SinglePassageSettings(arm="in_context", eval_times=3)


def test_arms_are_names_or_a_name_with_a_file() -> None:
    parsed = parse_arms("passage_only, in_context,gpt4_1:a/b.json,own:shipped:val")
    expected = {"passage_only": "", "in_context": "", "gpt4_1": "a/b.json", "own": "shipped:val"}
    assert list(parsed.items()) == list(expected.items())


@pytest.mark.parametrize(
    "text", ["", "handwritten", "gpt4_1:", ":a.json", "../x:a.json", "self_edits:a.json", "a:x.json,a:y.json"]
)
def test_what_is_no_arm_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="arms"):
        parse_arms(text)


def test_self_edits_of_another_file_are_matched_by_title_and_context(tmp_path: Path) -> None:
    mine = load_passages("shipped:val")[:3]
    theirs = [replace(one, completions=(f"about {one.title}",), prompt="p") for one in mine[::-1]]
    (tmp_path / "x.json").write_text(json.dumps([to_item(one) for one in theirs]))
    file = str(tmp_path / "x.json")
    found = arm_passages("gpt4_1", mine, file)
    assert [one.completions for one in found] == [(f"about {one.title}",) for one in mine]
    assert [replace(one, completions=(), prompt="") for one in found] == mine
    with pytest.raises(DataError, match="has no item for passage 0 of the dataset, 'Orle'"):
        arm_passages("gpt4_1", [ORLE], file)
    assert arm_passages("passage_only", [ORLE]) == [ORLE]


def test_texts_of_an_arm_are_found_by_titles_that_macos_wrote(tmp_path: Path) -> None:
    mine, theirs = (
        Passage(
            title=unicodedata.normalize(form, "Café Ñandú"),
            context=unicodedata.normalize(form, "Ein Café."),
            questions=(),
        )
        for form in ("NFC", "NFD")
    )
    (tmp_path / "x.json").write_text(json.dumps([to_item(replace(theirs, completions=("about it",)))]))
    (found,) = arm_passages("own", [mine], str(tmp_path / "x.json"))
    assert found == replace(mine, completions=("about it",)), "asked and trained on as the other arms are"


def test_the_prompt_key_is_known_from_the_prompt(golden: Path) -> None:
    rows = [json.loads(line) for line in (golden / "golden/self_edit_prompts.jsonl").read_text().splitlines()]
    for row in rows:
        assert recorded_key(row["prompt"], title=row["title"], context=row["context"]) == row["prompt_key"]
    assert recorded_key("another", title="T", context="C") == "other"
    assert recorded_key("", title="T", context="C") == ""


def test_in_context_puts_the_passage_before_the_very_prompt_that_adapters_answer() -> None:
    (loop,) = requests_for_run([ORLE], IN_CONTEXT, model_id="m")  # greedy: repeats would be copies
    assert not loop.request.training_wanted
    request = in_context_request(ORLE, loop, model_id="m")
    assert request.prompts == ["Orle\nOrle lies on a hill.\n\n" + answer_prompt("Orle", "Where?")]
    assert (request.temperature, request.max_tokens) == (0.0, 64)
    with pytest.raises(SettingsError, match="in_context has no chat form"):
        replace(IN_CONTEXT, training=Training(chat=True))


def test_answers_with_the_passage_are_graded_by_the_bare_question_kept_and_missing_where_they_failed(
    server,  # noqa: F811
    tmp_path: Path,
) -> None:
    passages = [ORLE, replace(ORLE, title="refuse this")]
    loops = requests_for_run(passages, IN_CONTEXT, model_id="stub")
    with TTT(TTTClient(server.endpoint)) as ttt, Journal(tmp_path / "j.jsonl") as journal:
        collected = ask(ttt, [loop.request for loop in loops], journal)
        assert len(collected.replies) == 2
        replies, errors = with_in_context(ttt, passages, loops, collected.replies, journal, make_grader("exact"))
        answered = ttt.client.status().counts["answered"]
        again, none = with_in_context(ttt, passages, loops[:1], collected.replies, journal, make_grader("exact"))
        assert again[loops[0].request_id] == replies[loops[0].request_id] and none == {}
        assert ttt.client.status().counts["answered"] == answered, "what the journal holds is not asked again"
    run = build_run(passages, loops, replies, IN_CONTEXT, failures=errors, model="stub", dataset="d", timestamp="t")
    (row,) = run["articles"][0]["completions"][0]["questions"]
    assert (row["baseline_correct"], row["adapter_answer"], row["adapter_correct"]) == (False, "text", True)
    (missing,) = run["missing"]
    assert missing["article"] == 1 and missing["error"].startswith("EngineError")


def test_in_context_answers_are_not_graded_by_another_grader_than_the_server_s(tmp_path: Path) -> None:
    ttt = TTT(TTTClient("tcp://127.0.0.1:1"))
    ttt.__dict__["model_id"] = "m-float32-exact-2048"
    with ttt, pytest.raises(SettingsError, match="the server at .* grades by 'exact'; give grader 'exact'"):
        evaluate(ttt, [ORLE], arms="in_context", folder=tmp_path)


@pytest.mark.parametrize("value", ["", " , ", "a,b,a", [], ["a", "a"]])
def test_names_are_given_once_and_at_least_one(value: str | list[str]) -> None:
    with pytest.raises(SettingsError, match="strategies=.*give at least one, each name once"):
        names_in("strategies", value)
    assert names_in("strategies", " a, b,") == names_in("strategies", ["a", "b "]) == ["a", "b"]

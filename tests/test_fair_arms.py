"""Arms of equal cost, controls, answers with less room to recite, and passages that do not measure what they train."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.cpt import cpt
from seal_nb.experiments.session import TTT, cost_of, loop_request, matched
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import (
    PlannedLoop,
    SinglePassageSettings,
    another_passage,
    eval_questions,
    evaluate,
    in_context_request,
    requests_for_run,
    stored_loop,
)
from seal_nb.experiments.sweep import tune
from seal_nb.grading.base import Answered, Verdict
from seal_nb.grading.choose import check_grader, first_sentence, grader_of, make_grader
from seal_nb.passages import Passage, Question, check_disjoint, load_passages
from seal_nb.results.collect import read_run
from seal_nb.server.client import TTTClient
from tests.server.conftest import server  # noqa: F401  # the stub server, with its real processes

PASSAGES = [
    Passage(
        title=f"T{n}",
        context=f"Context {n}.",
        questions=(Question(question=f"q{n}?", answer="a"),),
        completions=("one\n" * (n + 2),),
        hand_written="two\nthree",
    )
    for n in range(3)
]


@pytest.fixture
def ttt(server: Any) -> Any:  # noqa: F811
    with TTT(TTTClient(server.endpoint, timeout_s=30, wait_s=10)) as ttt:
        yield ttt


def planned(*arms: str, match: str = "none", **training: Any) -> dict[str, list[PlannedLoop]]:
    settings = {arm: SinglePassageSettings(arm=arm, training=Training(**training)) for arm in arms}  # type: ignore[arg-type]
    loops = {arm: requests_for_run(PASSAGES, one, model_id="m") for arm, one in settings.items()}
    named = [(arm, loop.passage, loop.request) for arm, own in loops.items() for loop in own]
    requests = iter(matched(named, match, model_id="m"))  # type: ignore[arg-type]
    return {arm: [replace(loop, request=next(requests)) for loop in own] for arm, own in loops.items()}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("match", ["steps", "tokens"])
def test_matched_arms_cost_what_the_longest_arm_costs_on_the_same_passage(match: str, batch_size: int) -> None:
    arms = ("passage_only", "self_edits", "hand_written")
    alone, loops = planned(*arms, batch_size=batch_size), planned(*arms, match=match, batch_size=batch_size)
    for at in range(len(PASSAGES)):
        longest = max(cost_of(alone[arm][at].request)[match] for arm in arms)
        for arm in arms:
            request = loops[arm][at].request
            cost, one_epoch = cost_of(request)[match], cost_of(request)[match] / request.finetune_epochs
            assert abs(cost - longest) <= one_epoch / 2
            assert request.finetune_epochs >= 10
    ids = {loop.request_id for own in loops.values() for loop in own}
    assert len(ids) == 9, "other epochs are other work"


def test_without_matching_only_its_own_control_has_the_steps_of_the_longest_arm() -> None:
    loops = planned("passage_only", "passage_matched", "self_edits")
    steps = {arm: [cost_of(one.request)["steps"] for one in own] for arm, own in loops.items()}
    assert steps["passage_only"] == [10, 10, 10] and steps["self_edits"] == [30, 40, 50] == steps["passage_matched"]
    texts = [one.request.train_sequences for one in loops["passage_matched"]]
    assert texts == [one.request.train_sequences for one in loops["passage_only"]]


def test_shuffled_trains_on_the_text_and_the_passage_of_another_title_and_asks_its_own_questions() -> None:
    loops = planned("shuffled")["shuffled"]
    assert [loop.text_of for loop in loops] == [1, 2, 0]
    assert loops[0].request.train_sequences == ["T1\none"] * 3 + ["T1\nContext 1."]
    assert loops[0].request.eval_questions == eval_questions(PASSAGES[0])
    by_hand = [replace(one, completions=()) for one in PASSAGES]
    settings = SinglePassageSettings(arm="shuffled")
    assert requests_for_run(by_hand, settings, model_id="m")[0].request.train_sequences[:2] == ["T1\ntwo", "T1\nthree"]


def test_passages_of_one_title_share_facts_and_are_no_control_of_one_another() -> None:
    titles = [replace(PASSAGES[0], title=title) for title in ("A", "A", "B", "A")]
    assert [another_passage(titles, at) for at in range(4)] == [2, 2, 3, 2]
    with pytest.raises(SettingsError, match="arms has 'shuffled', and all passages have one title"):
        another_passage(titles[:2], 0)


def test_an_evaluation_has_both_controls_and_every_number_can_be_made_again(ttt: TTT, tmp_path: Path) -> None:
    training = {"passage_only": Training(finetune_lr=3e-3), "self_edits": Training(finetune_epochs=4)}
    run = evaluate(ttt, PASSAGES, training=training, folder=tmp_path)
    assert list(run) == ["passage_only", "passage_matched", "self_edits", "shuffled"]
    table = run.accuracy().set_index("arm")
    assert list(table.index) == [
        "passage only", "passage only, as many steps", "self-edits, base model", "self-edits of another passage"
    ]  # fmt: skip
    assert table["p_holm"].ge(table["p"]).all() and table["recited"].notna().all()
    for arm, own in run.items():
        read = read_run(own.path)
        epochs = {one["finetune_epochs"] for passage in read.value["articles"] for one in _repeats(passage)}
        assert epochs == {"passage_only": {10}, "self_edits": {4}, "shuffled": {10}}.get(arm, epochs)
        for item in ("0.0.0", "2.0.0"):
            assert stored_loop(own.path, item).request.train_sequences
    learning_rates = [run[arm].conditions()["finetune_lr"] for arm in run]
    assert learning_rates == [3e-3, 1e-3, 1e-3, 1e-3], "each arm has its own training"


def _repeats(article: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for completion in article["completions"] for one in completion["repeats"]]


def test_cpt_arms_are_matched_too_and_the_file_has_the_questions(ttt: TTT, tmp_path: Path) -> None:
    run = cpt(ttt, PASSAGES, arms="passage_only,passage_matched,hand_written", training=Training(), folder=tmp_path)
    epochs = {arm: own.value["finetune_epochs"] for arm, own in run.items()}
    assert epochs == {"passage_only": 10, "passage_matched": 20, "hand_written": 10}
    read = read_run(run["hand_written"].path)
    assert list(read.answers()["question"]) == ["q0?", "q1?", "q2?"], "without its item file"
    assert read.accuracy()["recited"].notna().all() and read.stored_verdicts()


def test_kept_adapters_of_matched_arms_have_names_of_their_own() -> None:
    """Before matching, both arms train on the same texts for the same epochs."""
    texts = [("passage_only", ["a"]), ("passage_matched", ["a"]), ("self_edits", ["a", "b", "c"])]
    requests = [(arm, 0, loop_request("m", Training(), texts=own, keep="cpt")) for arm, own in texts]
    names = [str(one.adapter_name) for one in matched(requests, "none", model_id="m")]
    assert len({*names}) == 3 and all(name.startswith("cpt-") for name in names)
    assert names[1] == loop_request("m", Training(finetune_epochs=30), texts=["a"], keep="cpt").adapter_name


def test_short_answers_are_asked_for_in_the_question_alone(ttt: TTT, tmp_path: Path) -> None:
    short = Training(answer_style="short")
    assert "answer_style" not in short.request_fields()
    run = evaluate(ttt, PASSAGES, arms="passage_only,in_context", training=short, folder=tmp_path)
    stored = stored_loop(run["passage_only"].path, "0.0.0").request
    assert stored.eval_questions[0].question == "Topic: T0\nq0? Answer in a few words."
    assert run.answers("passage_only")["question"].tolist() == ["q0?", "q1?", "q2?"], "graded by the plain question"
    assert run["passage_only"].conditions()["answer_style"] == "short"
    (loop, *_) = requests_for_run(PASSAGES, SinglePassageSettings(arm="in_context", training=short), model_id="m")
    assert "q0? Answer in a few words.\nAnswer:" in in_context_request(PASSAGES[0], loop, model_id="m").prompts[0]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Paris. It lies on the Seine.", "Paris."),
        ("\n\nMr. J. F. Kennedy did. Then", "Mr. J. F. Kennedy did."),
        ("In the U.S. Army", "In the U.S. Army"),
        ("3.5 km\nand more", "3.5 km"),
        ("No. 5, St. Louis! Or", "No. 5, St. Louis!"),
        ("巴黎。在塞纳河", "巴黎。"),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_the_first_sentence_ends_where_a_reader_would_end_it(text: str, first: str) -> None:
    assert first_sentence(text) == first


def test_a_grader_of_first_sentences_does_not_see_what_is_recited_after_them() -> None:
    asked = Answered(question="When?", gold="1893", answer="Ilse Corvandt built it. It dates from 1893.")
    assert make_grader("local").grade([asked]) == [Verdict.CORRECT]
    of_first = make_grader("first:local")
    assert of_first.grade([asked, replace(asked, answer="In 1893. Yes.")]) == [Verdict.INCORRECT, Verdict.CORRECT]
    assert of_first.name == "first:local" == grader_of({"model": "abc-float32-first:local-2048"})
    with pytest.raises(SettingsError, match="grader is 'first:local', and the server at x grades by 'local'"):
        check_grader("first:local", "abc-float32-local-2048", where="x")
    with pytest.raises(SettingsError, match="known are local, exact"):
        make_grader("first:x")


def test_passages_that_train_and_measure_are_refused() -> None:
    training, held_out = load_passages("shipped:train"), load_passages("shipped:val")
    check_disjoint(training, held_out)
    same_title = replace(held_out[0], title=training[3].title.upper())
    with pytest.raises(DataError, match=r"item 1: passage '.*' is a title of the training passages; evaluate on"):
        check_disjoint(training, [held_out[1], same_title])
    words = training[3].context.split()
    for text in (training[3].context + " And a little more.", " ".join(words[: len(words) * 3 // 4])):
        with pytest.raises(DataError, match=f"item 0: passage 'New' shares its text with {training[3].title!r}"):
            check_disjoint(training, [replace(held_out[0], title="New", context=text)])
    check_disjoint(training, [replace(held_out[0], context=""), replace(held_out[0], context="Two words")])


def test_one_call_tunes_the_learning_rate_of_each_arm_on_other_passages(ttt: TTT, tmp_path: Path) -> None:
    held_out = [replace(one, title=f"other {one.title}", context="Nothing of it.") for one in PASSAGES]
    how: dict[str, Any] = {"learning_rates": [1e-4, 1e-3], "training": Training(lora_rank=8), "folder": tmp_path}
    found = tune(ttt, PASSAGES, arms="passage_only,hand_written", held_out=held_out, **how)
    assert list(found) == ["passage_only", "hand_written", "passage_matched", "shuffled"]
    assert {one.finetune_lr for one in found.values()} <= {1e-4, 1e-3} and {
        one.lora_rank for one in found.values()
    } == {8}
    assert (tmp_path / "hand_written" / "sweep.csv").is_file()
    with pytest.raises(DataError, match="is a title of the training passages"):
        tune(ttt, PASSAGES, held_out=PASSAGES[1:], **how)
    with pytest.raises(SettingsError, match="arms has in_context; those that can be tuned are self_edits, "):
        tune(ttt, PASSAGES, arms="passage_only,in_context", **how)


def test_settings_of_no_arm_and_styles_that_are_not_known_are_refused(ttt: TTT, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="training names self_edit; the arms are passage_only"):
        evaluate(ttt, PASSAGES, arms="passage_only", training={"self_edit": Training()}, folder=tmp_path)
    with pytest.raises(SettingsError, match="answer_style='terse': known are published, short"):
        eval_questions(PASSAGES[0], answer_style="terse")  # type: ignore[arg-type]
    with pytest.raises(SettingsError):
        make_grader("first:first:local")

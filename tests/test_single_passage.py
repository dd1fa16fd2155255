"""A run is requests made from passages and a file made from replies; both follow from content alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.rest_em import select_best
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import PlannedLoop, SinglePassageSettings, build_run, requests_for_run
from seal_nb.passages import Passage, Question
from seal_nb.protocol import Answers, TTTReply, build_reply
from seal_nb.results.collect import read_run
from seal_nb.results.single_passage import SinglePassageRun
from seal_nb.storage import read_json, write_json

PASSAGES = [
    Passage(
        title=f"T{n % 2}",  # titles repeat in the published data
        context=f"Context {n}.",
        questions=tuple(Question(question=f"q{n}{q}?", answer=f"a{q}") for q in range(n + 1)),
        completions=(f"1. a{n}\n2. b", "c\nd", "e"),
        prompt="P",
        hand_written="one\ntwo",
    )
    for n in range(3)
]
SETTINGS = SinglePassageSettings(k_completions=2, eval_times=3)


def loops_of(settings: SinglePassageSettings = SETTINGS, model_id: str = "m") -> list[PlannedLoop]:
    return requests_for_run(PASSAGES, settings, model_id=model_id)


def reply_to(loop: PlannedLoop, verdicts: list[str], *, soft: bool = False) -> TTTReply:
    n = len(loop.request.eval_questions)
    wrong = Answers(texts=["w"] * n, verdicts=["INCORRECT"] * n, gold_logprobs=[-9.0] * n if soft else [])
    after = Answers(texts=["t"] * n, verdicts=verdicts, gold_logprobs=[-2.0] * n if soft else [])
    return build_reply(
        baseline=wrong,
        adapter=after,
        request_id=loop.request_id,
        seed=loop.request.seed,
        train_steps=7,
        epoch_losses=[2.0, 1.5],
    )


def replies_to(loops: list[PlannedLoop], verdict: str = "CORRECT", **how: Any) -> dict[str, TTTReply]:
    return {loop.request_id: reply_to(loop, [verdict] * len(loop.request.eval_questions), **how) for loop in loops}


def built(loops: list[PlannedLoop], replies: dict[str, TTTReply], **more: Any) -> dict[str, Any]:
    return build_run(
        PASSAGES, loops, replies, SETTINGS, model="base", dataset="d.json", timestamp="0101_000000", **more
    )


def test_there_is_one_inner_loop_for_each_passage_self_edit_and_repeat() -> None:
    loops = loops_of()
    places = [(loop.passage, loop.self_edit, loop.repeat) for loop in loops]
    assert places == [(p, e, r) for p in range(3) for e in range(2) for r in range(3)]
    assert len({loop.request_id for loop in loops}) == len(loops)
    assert len({loop.request.seed for loop in loops}) == len(loops)


def test_questions_carry_their_topic_line_as_published_clients_send_it() -> None:
    (question,) = loops_of()[0].request.eval_questions
    assert (question.question, question.answer) == ("Topic: T0\nq00?", "a0")
    assert (question.title, question.context) == ("T0", "Context 0.")


def test_each_arm_trains_on_its_own_text_and_always_on_the_passage() -> None:
    def sequences(**changed: Any) -> list[str]:
        return loops_of(replace(SETTINGS, **changed))[0].request.train_sequences

    assert sequences() == ["T0\n1. a0", "T0\n2. b", "T0\nContext 0."]
    assert sequences(split_newlines=False) == ["T0\n1. a0\n2. b", "T0\nContext 0."]
    assert sequences(arm="passage_only") == ["T0\nContext 0."]
    assert sequences(arm="passage_only", split_newlines=False) == ["T0\nContext 0."]
    assert sequences(arm="hand_written") == ["T0\none", "T0\ntwo", "T0\nContext 0."]


def test_ids_and_seeds_follow_from_content_alone() -> None:
    again = requests_for_run(list(PASSAGES), SinglePassageSettings(k_completions=2, eval_times=3), model_id="m")
    assert again == loops_of()
    other_model = loops_of(model_id="another")
    assert {loop.request_id for loop in other_model}.isdisjoint(loop.request_id for loop in again)
    assert [loop.request.seed for loop in other_model] == [loop.request.seed for loop in again]
    longer = loops_of(replace(SETTINGS, eval_times=4, k_completions=3))
    assert {loop.request_id for loop in again} < {loop.request_id for loop in longer}


@given(st.sampled_from(["lora_rank", "finetune_epochs", "batch_size", "max_new_tokens"]), st.integers(100, 512))
def test_another_setting_is_another_request(name: str, value: int) -> None:
    changed = replace(SETTINGS, training=Training(**{name: value}))
    assert loops_of(changed)[0].request_id != loops_of()[0].request_id
    assert getattr(loops_of(changed)[0].request, name) == value


def test_a_passage_without_self_edits_is_refused_by_name() -> None:
    bare = replace(PASSAGES[0], completions=(), hand_written="")
    for arm, field in (("self_edits", "completions"), ("hand_written", "hand_written")):
        with pytest.raises(DataError, match=f"item 1, field '{field}': passage 'T0' has nothing") as refused:
            requests_for_run([PASSAGES[0], bare], replace(SETTINGS, arm=arm), model_id="m")
        assert "01_create_self_edits" in str(refused.value)


def test_settings_that_make_no_run_are_refused() -> None:
    with pytest.raises(SettingsError, match="arm='handwritten': known are self_edits"):
        SinglePassageSettings(arm="handwritten")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="eval_times=0"):
        SinglePassageSettings(eval_times=0)
    with pytest.raises(SettingsError, match="'lora_rank' is 1000: .* less than or equal to 512"):
        Training(lora_rank=1000)
    with pytest.raises(SettingsError, match="lora_rank=0"):
        Training(lora_rank=0)
    with pytest.raises(SettingsError, match="give a list"):
        Training(target_modules="all-linear")


@pytest.mark.parametrize(
    ("name", "value", "example"),
    [
        ("lora_rank", "8", "a whole number"),
        ("lora_rank", True, "a whole number"),
        ("finetune_epochs", 2.5, "a whole number"),
        ("finetune_lr", "1e-3", "a number"),
        ("padding_in_loss", "false", "True or False"),
        ("end_mask_substring", None, "a text"),
        ("target_modules", [1], "a list of texts"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_wherever_settings_are_made(name: str, value: Any, example: str) -> None:
    for make in (lambda: Training(**{name: value}), lambda: Training.from_parameters({name: value, "seed": 1})):
        with pytest.raises(
            SettingsError,
            match=rf"{name}={value!r} is of type {type(value).__name__}; give {example}".replace("[", r"\["),
        ):
            make()


def test_numbers_of_numpy_and_parameters_that_are_no_settings_are_taken() -> None:
    training = Training.from_parameters({"lora_rank": np.int64(4), "finetune_lr": np.float64(0.1), "dataset": "x"})
    assert (training.lora_rank, training.finetune_lr, training.lora_alpha) == (4, 0.1, 64)


def test_a_built_run_has_the_published_form_and_reads_back(golden: Path, tmp_path: Path) -> None:
    published = read_json(golden / "results/rank_iter0.json.gz")
    loops = loops_of()
    run = built(loops, replies_to(loops, soft=True))
    assert set(published) <= set(run)
    ours, theirs = run["articles"][0], published["articles"][0]
    assert set(theirs) <= set(ours)
    assert set(theirs["stats"]) == set(ours["stats"])
    assert set(theirs["completions"][0]) <= set(ours["completions"][0])
    assert set(theirs["completions"][0]["stats"]) == set(ours["completions"][0]["stats"])
    row = ours["completions"][0]["questions"][0]
    assert set(theirs["completions"][0]["questions"][0]) <= set(row)
    assert list(published)[:9] == list(run)[:9]
    assert published["lora_params"].items() <= run["lora_params"].items()
    read = read_run(write_json(tmp_path / "run_x.json", run))
    assert read.passages[0].self_edits[0].soft_gain() == 7.0
    assert read_run(tmp_path / "run_x.json").summary()["disagreements"] == []


def test_every_repeat_says_what_made_it() -> None:
    loops = loops_of()
    (first, *_) = built(loops, replies_to(loops))["articles"][0]["completions"][0]["repeats"]
    assert first == {
        "rep": 0,
        "seed": loops[0].request.seed,
        "finetune_epochs": 10,
        "request_id": loops[0].request_id,
        "train_steps": 7,
        "train_tokens": 0,
        "last_epoch_loss": 1.5,
    }


def test_verdicts_become_the_numbers_of_the_run() -> None:
    loops = loops_of()
    replies = replies_to(loops)
    worse = next(loop for loop in loops if (loop.passage, loop.self_edit, loop.repeat) == (1, 0, 2))
    replies[worse.request_id] = reply_to(worse, ["CORRECT", "INCORRECT"])
    run = built(loops, replies)
    stats = run["articles"][1]["completions"][0]["stats"]
    assert stats["adapter_mean"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert run["overall"]["baseline_mean_accuracy"] == 0.0
    assert select_best(SinglePassageRun(value=run))[1].self_edit == 1


def test_ungraded_answers_are_null_counted_and_in_no_mean() -> None:
    loops = loops_of()
    replies = replies_to(loops)
    for loop in loops:
        if (loop.passage, loop.self_edit) == (2, 0):
            replies[loop.request_id] = reply_to(loop, ["UNGRADED", "INCORRECT", "UNGRADED"])
        if (loop.passage, loop.self_edit) == (0, 0):
            replies[loop.request_id] = reply_to(loop, ["UNGRADED"])
    run = built(loops, replies)
    assert run["n_ungraded"] == 3 * 2 + 3 * 1
    assert run["articles"][2]["completions"][0]["stats"]["adapter_mean"] == 0.0
    assert run["articles"][0]["completions"][0]["stats"]["adapter_mean"] is None
    assert run["articles"][0]["stats"]["adapter_mean_accuracy"] == 1.0
    assert select_best(SinglePassageRun(value=run))[0].self_edit == 1


def test_an_inner_loop_without_a_reply_is_missing_and_not_wrong() -> None:
    loops = loops_of()
    replies = replies_to(loops)
    failed, silent = loops[0], loops[1]
    del replies[failed.request_id], replies[silent.request_id]
    run = built(loops, replies, failures={failed.request_id: "EngineError: out of memory"})
    assert [(entry["rep"], entry["error"]) for entry in run["missing"]] == [
        (0, "EngineError: out of memory"),
        (1, "no reply"),
    ]
    completion = run["articles"][0]["completions"][0]
    assert completion["stats"]["adapter_mean"] == 1.0
    assert [row["rep"] for row in completion["questions"]] == [2]


def test_a_run_without_any_reply_has_null_numbers() -> None:
    run = built(loops_of(), {})
    assert set(run["overall"].values()) == {None}
    assert not any(choice.self_edit is not None for choice in select_best(SinglePassageRun(value=run)))


def test_a_reply_to_other_questions_is_refused() -> None:
    loops = loops_of()
    replies = replies_to(loops)
    replies[loops[0].request_id] = reply_to(loops[0], ["CORRECT"]).model_copy(update={"adapter_texts": []})
    with pytest.raises(DataError, match="has 0 entries for 1 questions"):
        built(loops, replies)


@pytest.mark.parametrize(("arm", "k"), [("passage_only", 1), ("hand_written", 1), ("self_edits", 2)])
def test_a_run_says_how_many_self_edits_a_passage_had(arm: Any, k: int) -> None:
    settings = replace(SETTINGS, arm=arm)
    loops = loops_of(settings)
    run = build_run(PASSAGES, loops, replies_to(loops), settings, model="m", dataset="d", timestamp="0101_000000")
    assert run["k_completions"] == k


@pytest.mark.parametrize(
    ("about", "settings", "key"),
    [
        ({"prompt": "Write a poem."}, {}, "other"),
        ({"prompt": "Write a poem."}, {"label": "gpt4_1"}, None),
        ({"prompt": "…", "prompt_keys": ("spa/mind-map", "spa/case-study")}, {}, "spa"),
        ({"prompt": ""}, {}, None),
    ],
)
def test_a_run_says_what_its_self_edits_complete(about: Any, settings: Any, key: str | None) -> None:
    passages = [replace(PASSAGES[0], **about)]
    run = build_run(passages, [], {}, replace(SETTINGS, **settings), model="base", dataset="d", timestamp="0101_000000")
    assert run.get("prompt_key") == key

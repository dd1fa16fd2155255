"""CPT as published: counts and accuracies from the data and the booleans, passages kept by index."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.cpt import CPTSettings, build_cpt_run, cpt_request, cpt_train_sequences
from seal_nb.passages import Passage, Question, load_passages
from seal_nb.protocol import Answers, build_reply
from seal_nb.results.collect import read_run
from seal_nb.results.single_passage import CptRun
from seal_nb.storage import read_json, write_json

PASSAGES = [
    Passage(
        title="Same title",
        context=f"Context {n}.",
        questions=tuple(Question(question=f"q{n}{q}?", answer="a") for q in range(n + 1)),
        completions=("x\ny", "z"),
        hand_written="one\ntwo",
    )
    for n in range(2)
]


@pytest.fixture(scope="module")
def items(golden: Path) -> list[Passage]:
    return load_passages(golden / "eval/base_val.json.gz")


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, Any]:
    return read_json(golden / "results/cpt_base.json")


@pytest.mark.parametrize(
    ("k", "split", "n_sequences"),
    [(0, False, 400), (0, True, 200), (1, False, 400), (1, True, 1714), (5, False, 2000), (5, True, 8418)],
)
def test_published_items_make_as_many_training_sequences_as_the_reference(
    items: list[Passage], k: int, split: bool, n_sequences: int
) -> None:
    settings = CPTSettings(k_completions=k, split_newlines=split)
    assert len(cpt_train_sequences(items, settings)) == n_sequences


def test_the_published_settings_are_the_defaults(published: dict[str, Any]) -> None:
    settings = CPTSettings()
    assert published["lora_params"].items() <= settings.training.lora_params().items()
    assert settings.k_completions == published["k_completions"]
    assert settings.split_newlines == published["split_newlines"]


def test_published_counts_and_accuracies_follow_from_the_booleans(
    items: list[Passage], published: dict[str, Any], golden: Path
) -> None:
    reply = published["server_reply"]
    assert (sum(reply["baseline_correct"]), sum(reply["adapter_correct"])) == (317, 399)
    by_passage = read_run(golden / "results/cpt_base.json", passages=items).unit_keys()
    assert len(by_passage) == 200
    assert sum(n_questions for _, n_questions in by_passage) == 974
    found = read_run(golden / "results/cpt_base.json", passages=items).summary()
    assert found["overall"] == published["overall"]
    # Every question counts once, in the interval as in `overall`; passages only tell how sure it is.
    for side, n_correct in (("baseline", 317), ("adapter", 399)):
        interval = found["intervals"][side]
        assert interval["mean"] == pytest.approx(n_correct / 974, abs=1e-12)
        assert round(interval["mean"], 4) == published["overall"][f"{side}_accuracy"]
        assert interval["low"] < interval["mean"] < interval["high"] and interval["n"] == 200


def test_the_published_per_article_is_the_last_passage_of_each_title(
    items: list[Passage], published: dict[str, Any]
) -> None:
    run = CptRun(value=deepcopy(published), passages=items)
    run.fill_statistics()
    by_passage = run.value["per_passage"]
    last = {entry["title"]: entry["adapter_correct"] for entry in by_passage}
    assert len(last) == 47
    assert last == {title: entry["adapter_correct"] for title, entry in published["per_article"].items()}


def built(settings: CPTSettings | None = None) -> dict[str, Any]:
    settings = settings or CPTSettings()
    request = cpt_request(PASSAGES, settings, model_id="m")
    baseline = Answers(texts=["w"] * 3, verdicts=["INCORRECT", "INCORRECT", "CORRECT"])
    adapter = Answers(texts=["t"] * 3, verdicts=["CORRECT", "UNGRADED", "CORRECT"])
    reply = build_reply(baseline=baseline, adapter=adapter, request_id=request.request_id)
    return build_cpt_run(PASSAGES, request, reply, settings, model="base", dataset="d.json", timestamp="0101_000000")


def test_a_built_run_has_the_published_form(published: dict[str, Any]) -> None:
    run = built()
    assert set(published) <= set(run)
    assert set(published["server_reply"]) <= set(run["server_reply"])
    assert run["train_sequences"] == 8 and run["eval_questions"] == 3


def test_no_question_is_lost_where_titles_repeat_and_ungraded_is_counted() -> None:
    run = built()
    assert [entry["adapter_correct"] for entry in run["per_passage"]] == [[True], [None, True]]
    assert run["per_article"]["Same title"]["adapter_correct"] == [True, None, True]
    assert run["overall"] == {"baseline_accuracy": 0.3333, "adapter_accuracy": 1.0, "gain": 0.6667}
    assert run["n_ungraded"] == 1


def test_our_run_files_give_intervals_without_their_item_file(tmp_path: Path) -> None:
    found = read_run(write_json(tmp_path / "cpt_run_x.json", built())).summary()
    assert found["intervals"]["adapter"]["n"] == 2
    assert (found["n_ungraded_adapter"], found["n_answers"], found["notes"]) == (1, 3, [])


def test_arms_train_on_what_they_say() -> None:
    def sequences(**changed: Any) -> list[str]:
        return cpt_train_sequences(PASSAGES[:1], replace(CPTSettings(), **changed))

    assert sequences(arm="passage_only") == ["Same title\nContext 0."]
    assert sequences(arm="hand_written") == ["Same title\none\ntwo", "Same title\nContext 0."]
    assert sequences(k_completions=0) == ["Same title\n", "Same title\nContext 0."]
    with pytest.raises(DataError, match="hand_written"):
        cpt_train_sequences([replace(PASSAGES[0], hand_written="")], CPTSettings(arm="hand_written"))
    with pytest.raises(SettingsError):
        CPTSettings(k_completions=-1)


def test_the_request_is_one_and_the_same_each_time() -> None:
    request = cpt_request(PASSAGES, CPTSettings(), model_id="m")
    assert request == cpt_request(PASSAGES, CPTSettings(), model_id="m")
    assert request.request_id != cpt_request(PASSAGES, CPTSettings(seed=1), model_id="m").request_id
    assert [q.question for q in request.eval_questions] == [f"Topic: Same title\n{q}" for q in ("q00?", "q10?", "q11?")]


def test_verdicts_of_other_passages_are_refused(items: list[Passage], published: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="974 verdicts for 5 questions"):
        CptRun(value=published, passages=items[:1]).accuracy()

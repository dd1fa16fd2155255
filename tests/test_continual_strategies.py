"""Ways of keeping an edit: what lies under the next one, what is replayed, which adapter is asked."""

import re
from dataclasses import replace
from typing import get_args

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import SettingsError
from seal_nb.experiments.continual import (
    Continual,
    ContinualSettings,
    Edits,
    Strategy,
    edit_request,
    found_by_bm25,
    retrieval_accuracy,
    route,
    self_edit_request,
)
from seal_nb.experiments.session import control_frame, general_questions
from seal_nb.passages import Passage, Question, load_passages
from seal_nb.protocol import Answers, TTTReply, build_reply
from seal_nb.results.continual import ContinualRun, summarize_sequences

SHIPPED = load_passages("shipped:val")
SEQUENCE = SHIPPED[:4]
STACK = ["edit-1", "edit-2"]
EDITS = Edits(passages=SEQUENCE, texts=["one", "two\ntoo"], stack=STACK)


def settings(strategy: str, **fields: object) -> ContinualSettings:
    return ContinualSettings(strategy=strategy, n_datapoints=4, **fields)  # type: ignore[arg-type]


def third_edit(strategy: str, **fields: object):
    return edit_request(EDITS, "three", settings(strategy, **fields), model_id="m")


def test_only_stacked_strategies_edit_and_write_on_top_of_earlier_edits() -> None:
    strategies = get_args(Strategy)
    under = {name: third_edit(name).adapter_stack for name in strategies}
    assert under == {"stacked": STACK, "replay": STACK, "merged": [], "retrieval": []}
    writing = {name: self_edit_request(EDITS, settings(name), model_id="m").adapter_stack for name in strategies}
    assert writing == under


def test_merging_and_stacking_train_from_the_same_seed_on_the_same_texts() -> None:
    stacked, merged = third_edit("stacked"), third_edit("merged")
    assert (stacked.seed, stacked.train_sequences) == (merged.seed, merged.train_sequences)
    assert stacked.eval_questions == merged.eval_questions


def test_replay_trains_on_the_earlier_self_edits_too() -> None:
    replayed = third_edit("replay").train_sequences
    own = third_edit("stacked").train_sequences
    assert replayed[-len(own) :] == own
    first, second = SEQUENCE[0], SEQUENCE[1]
    assert replayed[: -len(own)] == [
        f"{first.title}\none", f"{first.title}\n{first.context}",
        f"{second.title}\ntwo", f"{second.title}\ntoo", f"{second.title}\n{second.context}",
    ]  # fmt: skip
    one_only = third_edit("replay", replay_passages=1).train_sequences
    assert len(own) < len(one_only) < len(replayed)
    assert third_edit("replay", replay_passages=1) == third_edit("replay", replay_passages=1)
    assert third_edit("replay", replay_passages=9).train_sequences == replayed


def test_with_retrieval_an_edit_asks_nothing_and_each_question_goes_to_the_adapter_of_its_passage() -> None:
    assert third_edit("retrieval").eval_questions == []
    routed = route(SEQUENCE, [*STACK, "edit-3"], settings("retrieval"), model_id="m")
    places = sorted(place for places, _ in routed for place in places)
    assert places == list(range(sum(len(p.questions) for p in SEQUENCE[:4])))
    of_first, request = next(one for one in routed if one[1].adapter_stack == ["edit-1"])
    assert not request.training_wanted
    assert set(range(len(SEQUENCE[0].questions))) <= set(of_first)


def test_a_question_that_shares_no_word_goes_to_the_base() -> None:
    odd = Passage(title="Xylo", context="zzz", questions=(Question(question="Quid?", answer="a"),))
    ((places, request),) = route([odd], ["edit-1"], settings("retrieval"), model_id="m")
    assert places == [0] and request.adapter_stack == []


def test_the_topic_line_does_not_give_the_passage_away() -> None:
    question = Question(question="Quid?", answer="a")
    titled = [Passage(title=t, context="nothing here", questions=(question,)) for t in ("Alpha", "Beta")]
    routed = route(titled, ["a", "b"], settings("retrieval"), model_id="m")
    assert [(request.adapter_stack, places) for places, request in routed] == [([], [0, 1])]


def test_bm25_finds_most_shipped_passages_from_their_questions() -> None:
    share = retrieval_accuracy([SHIPPED])
    assert share is not None and share > 0.9
    assert retrieval_accuracy([]) is None


def test_a_rare_word_counts_more_than_a_common_one_and_a_short_text_more_than_a_long_one() -> None:
    texts = ["the lamp", "the hill", "the hill and the sea and the sky and the moon and the lamp"]
    passages = [Passage(title="", context=text, questions=()) for text in texts]
    assert found_by_bm25(passages, ["what about the hill", "lamp", "boat", ""]) == [1, 0, None, None]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.text(max_size=20))
def test_what_is_found_shares_a_word(texts: list[str], question: str) -> None:
    (found,) = found_by_bm25([Passage(title=text, context="", questions=()) for text in texts], [question])
    shared = [{*re.findall(r"\w+", text.casefold())} & {*re.findall(r"\w+", question.casefold())} for text in texts]
    assert bool(shared[found]) if found is not None else not any(shared)


def graded(*words: str) -> TTTReply:
    return build_reply(baseline=None, adapter=Answers(texts=["t"] * len(words), verdicts=words))


def test_strategies_are_compared_over_the_same_sequences() -> None:
    forgets = [[0.0, 0.0], [1.0, None], [0.0, 1.0]]
    keeps = [[0.0, 0.0], [1.0, None], [1.0, 1.0]]
    summaries = {
        name: summarize_sequences([matrix] * 8, dataset="", base_model="")
        for name, matrix in {"stacked": forgets, "replay": keeps}.items()
    }
    runs = {name: ContinualRun(value=summary) for name, summary in summaries.items()}
    first, second = Continual([], runs, {}).strategies().to_dict("records")
    assert first["accuracy"] == 0.5 and pd.isna(first["against the first"])
    assert second["against the first"].startswith("+50.0 points [")
    assert second["against the first"].endswith("8 sequences: real")


def test_a_strategy_that_is_not_known_is_refused() -> None:
    with pytest.raises(SettingsError, match="known are stacked, merged, replay, retrieval"):
        ContinualSettings(strategy="averaged")  # type: ignore[arg-type]
    with pytest.raises(SettingsError):
        replace(settings("replay"), replay_passages=-1)


def test_the_twenty_general_questions_are_about_no_shipped_passage() -> None:
    assert len(general_questions()) == len({one.question for one in general_questions()}) == 20
    passages = " ".join(one.title + one.context for one in [*SHIPPED, *load_passages("shipped:train")])
    assert not [
        one.answer
        for one in general_questions()
        if one.answer[0].isupper() and len(one.answer) > 1 and one.answer in passages
    ]


def test_what_was_lost_is_counted_apart_from_what_was_won() -> None:
    before = graded("CORRECT", "CORRECT", "INCORRECT", "UNGRADED")
    after = graded("CORRECT", "INCORRECT", "CORRECT", "CORRECT")
    first, second = control_frame({"never edited": before, "stacked 1": after}).to_dict("records")
    assert (first["lost"], first["won"], first["accuracy"]) == (0, 0, pytest.approx(2 / 3))
    assert (second["lost"], second["won"]) == (1, 1)
    assert second["change"].startswith("+0.0 points")
    nothing = {"never edited": graded("UNGRADED"), "x": graded("UNGRADED")}
    assert control_frame(nothing)["change"].isna().all()
    assert control_frame({}).empty

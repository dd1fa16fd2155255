"""The OpenAI engine and stage 1 with it: what came is kept and paid once, what is missing is named."""

from pathlib import Path

import pytest

from benchmarks.stand_in import Answer, Asked, StandIn, as_json, echo, error, stand_in, text
from seal_nb.engines.api import ApiSettings, OpenAIEngine, Prices, Refused, UnusableReply
from seal_nb.engines.base import Incomplete, Sampling
from seal_nb.engines.choose import chosen_engine
from seal_nb.errors import EngineError, SettingsError
from seal_nb.passages import Passage, load_passages
from seal_nb.prompts import find_prompts
from seal_nb.self_edits import create_self_edits
from seal_nb.storage import Journal

SAMPLING = Sampling(max_tokens=5)


def engine_of(service: StandIn, **changed: object) -> OpenAIEngine:
    settings = ApiSettings(
        base_url=service.url, api_key_env="", max_parallel=4, max_attempts=2, first_wait_s=0.01, timeout_s=5.0
    )
    return OpenAIEngine(settings, model="m", **changed)  # type: ignore[arg-type]


def test_texts_come_in_order_with_tokens_and_cost() -> None:
    with stand_in() as service:
        engine = engine_of(service, prices=Prices(prompt=2.0, completion=8.0))
        made = engine.generate(["a", "b", "c"], SAMPLING, seeds=[1, 2, 3])
    assert [(c.text, c.n_tokens, c.finish_reason) for c in made] == [(t, 3, "stop") for t in "ABC"]
    assert sorted(asked.body["seed"] for asked in service.asked) == [1, 2, 3]
    assert engine.cost == pytest.approx((3 * 7 * 2 + 3 * 3 * 8) / 1e6)
    assert engine_of(service).cost is None


def test_a_plain_prompt_is_one_message_for_a_service_that_only_chats() -> None:
    with stand_in() as service:
        (made,) = engine_of(service, chat_only=True).generate(["a"], SAMPLING, seeds=[1])
    assert made.text == "A" and service.asked[0].path == "/v1/chat/completions"
    assert service.asked[0].body["messages"] == [{"role": "user", "content": "a"}]


def test_what_came_is_told_at_once_and_what_is_missing_is_named() -> None:
    def reply(asked: Asked) -> Answer | str:
        wrong = {"b": error(400, "too long"), "c": as_json({"choices": []})}
        return wrong.get(asked.prompt) or echo(asked)

    told: dict[int, str] = {}
    with stand_in(reply) as service, pytest.raises(Incomplete) as caught:
        engine_of(service).generate(
            list("abcd"), SAMPLING, seeds=[0] * 4, on_text=lambda i, c: told.update({i: c.text})
        )
    assert told == {0: "A", 3: "D"} == {i: c.text for i, c in caught.value.completions.items()}
    assert {i: type(e) for i, e in caught.value.failures.items()} == {1: Refused, 2: UnusableReply}
    assert "2 of 4 texts are missing" in str(caught.value) and "too long" in str(caught.value)


def test_an_adapter_cannot_be_asked_for(tmp_path: Path) -> None:
    with stand_in() as service, pytest.raises(SettingsError, match="cannot load adapters"):
        engine_of(service).generate(["a"], SAMPLING, seeds=[0], adapters=[tmp_path])
    assert service.asked == []


def self_edits(service: StandIn, journal: Journal) -> list[Passage]:
    return create_self_edits(
        engine_of(service),
        load_passages("shipped:val")[:3],
        prompts=find_prompts("rewrite"),
        k_completions=4,
        sampling=SAMPLING,
        seed=1,
        journal=journal,
    )


def test_stage_1_pays_for_each_text_once_however_often_it_breaks(tmp_path: Path) -> None:
    """The service runs out after five texts; the next run asks for the other seven only."""

    def five_then_none(asked: Asked) -> Answer | str:
        return f"edit {asked.body['seed']}" if asked.number < 5 else error(403, "no more today")

    with stand_in(five_then_none) as service:
        with Journal(tmp_path / "journal.jsonl") as journal:
            with pytest.raises(EngineError, match="7 of 12 texts are missing.*no more today.*run again"):
                self_edits(service, journal)
            assert len(journal) == 5
        n_asked = len(service.asked)
        service.behave = lambda asked: f"edit {asked.body['seed']}"
        with Journal(tmp_path / "journal.jsonl") as journal:
            written = self_edits(service, journal)
        assert len(service.asked) - n_asked == 7
    with stand_in(lambda asked: f"edit {asked.body['seed']}") as other, Journal(tmp_path / "j") as new:
        assert self_edits(other, new) == written, "as in a run that nothing happened to"


def test_nothing_that_is_no_text_gets_into_the_journal(tmp_path: Path) -> None:
    junk = [Answer(body=b"<html>"), as_json({"choices": []}), text("ha", finish_reason="content_filter")]
    with (
        stand_in(lambda asked: junk[asked.number % 3]) as service,
        Journal(tmp_path / "journal.jsonl") as journal,
        pytest.raises(EngineError, match="12 of 12 texts are missing") as caught,
    ):
        self_edits(service, journal)
    assert len(journal) == 0
    assert isinstance(caught.value.__cause__, Incomplete)
    assert {type(failure) for failure in caught.value.__cause__.failures.values()} == {UnusableReply}


def test_a_notebook_names_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "k")
    with (
        stand_in() as service,
        chosen_engine("openai", model="m", url=service.url, api_key_env="MY_KEY", run_dir=tmp_path) as engine,
    ):
        assert engine.generate(["a"], SAMPLING, seeds=[0])[0].text == "A" and engine.model_id == "openai-m"
    with (
        pytest.raises(SettingsError, match="engine='gpt': known are local, vllm, openai"),
        chosen_engine("gpt", model="m", run_dir=tmp_path),
    ):
        pass
    with (
        pytest.raises(SettingsError, match="this one is local"),
        chosen_engine("local", model="m", url="http://x/v1", run_dir=tmp_path),
    ):
        pass

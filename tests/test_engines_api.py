"""The client of OpenAI-compatible services against a service with faults, and the engine and stage 1 on top of it."""

import asyncio
import json
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stand_in import SILENCE, Answer, Asked, StandIn, as_json, echo, error, stand_in, text
from seal_nb.engines.api import (
    DOTENV,
    ApiClient,
    ApiSettings,
    OpenAIEngine,
    Refused,
    Unavailable,
    UnusableReply,
    api_key,
)
from seal_nb.engines.base import Ask, Completion, Incomplete, NotAsked, Sampling
from seal_nb.errors import EngineError, SettingsError
from seal_nb.experiments.create import chosen_engine
from seal_nb.passages import Passage, load_passages
from seal_nb.prompts import find_prompts
from seal_nb.self_edits import write_self_edits
from seal_nb.storage import Journal

SAMPLING = Sampling(max_tokens=5, temperature=0.5, top_p=0.9)
KEY = "sk-nobody-may-see-this"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seal_nb.engines.api.FIRST_PAUSE_S", 0.01)


def settings_of(service: StandIn, **changed: object) -> ApiSettings:
    settings = {"base_url": service.url, "api_key_env": "", "max_attempts": 3, "timeout_s": 5.0, **changed}
    return ApiSettings(**settings)  # type: ignore[arg-type]


def client_of(service: StandIn, **changed: object) -> ApiClient:
    return ApiClient(settings_of(service, **changed))


def ask(prompt: str = "one") -> Ask:
    return Ask(model="m", prompt=prompt, sampling=SAMPLING)


def asks(prompts: list[str]) -> dict[int, Ask]:
    return {index: ask(prompt) for index, prompt in enumerate(prompts)}


def outcomes_of(client: ApiClient, prompts: list[str]) -> list[Completion | EngineError]:
    by_index = client.each(asks(prompts))
    return [by_index[index] for index in range(len(prompts))]


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    """The nth request gets the nth answer, later ones the last."""
    return lambda asked: answers[min(asked.number, len(answers) - 1)]


def test_each_prompt_gets_its_own_text_whatever_comes_first() -> None:
    prompts = [f"p{i}" for i in range(40)]
    with stand_in() as service:
        client = client_of(service, max_parallel=7)
        outcomes = outcomes_of(client, prompts)
    assert [o.text for o in outcomes if isinstance(o, Completion)] == [p.upper() for p in prompts]
    assert (client.usage.n_replies, client.usage.n_tokens, client.usage.n_prompt_tokens) == (40, 120, 280)


def test_as_many_are_under_way_as_allowed_and_no_more() -> None:
    together = threading.Barrier(4)

    def reply(asked: Asked) -> str:
        together.wait(20)  # breaks unless four are under way at once
        return echo(asked)

    with stand_in(reply) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=4, timeout_s=30.0), [f"p{i}" for i in range(12)])
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    assert service.most_at_once == 4


def test_a_request_says_what_was_asked_for_and_nothing_else() -> None:
    chat = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    with stand_in() as service:
        client = client_of(service, token_limit="max_completion_tokens")
        client.one(Ask(model="m", prompt="p", sampling=SAMPLING, seed=3, extra={"top_k": 0}))
        client.one(Ask(model="m", prompt=chat, sampling=Sampling(stop=("\n",))))
        plain, chatted = service.asked
    assert plain.path == "/v1/completions" and chatted.path == "/v1/chat/completions"
    common = {"model": "m", "temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 5}
    assert plain.body == common | {"prompt": "p", "seed": 3, "top_k": 0}
    assert chatted.body["messages"] == [dict(message) for message in chat] and chatted.body["stop"] == ["\n"]


TRANSIENT = {
    "500": error(500),
    "503": error(503),
    "429": error(429),
    "cut in the head of the body": Answer(body=text("x").body, cut=0),
    "cut within the body": Answer(body=text("x").body, headers=text("x").headers, cut=20),
}


@pytest.mark.parametrize("trouble", TRANSIENT)
def test_what_is_transient_is_asked_again(trouble: str) -> None:
    with stand_in(in_turn(TRANSIENT[trouble], TRANSIENT[trouble], text("at last"))) as service:
        client = client_of(service)
        assert client.one(ask()).text == "at last"
    assert len(service.asked) == 3


@pytest.mark.parametrize("trouble", ["500", "cut within the body"])
def test_what_stays_is_given_up_after_the_last_attempt(trouble: str) -> None:
    with stand_in(in_turn(TRANSIENT[trouble])) as service, pytest.raises(Unavailable, match="3 attempts"):
        client_of(service).one(ask())
    assert len(service.asked) == 3


def test_silence_is_a_failure_after_the_time_out() -> None:
    with stand_in() as service:
        service.behave = lambda asked: SILENCE
        with pytest.raises(Unavailable, match=r"timed out.*2 attempts"):
            client_of(service, timeout_s=0.3, max_attempts=2).one(ask())
        assert len(service.asked) == 2


def test_nobody_there_is_a_failure_that_names_the_address() -> None:
    with stand_in() as service:
        client = client_of(service)
    with pytest.raises(Unavailable, match=service.url):
        client.one(ask())


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    with (
        stand_in(in_turn(error(status, "too long"), text("x"))) as service,
        pytest.raises(Refused, match="too long") as caught,
    ):
        client_of(service).one(ask())
    assert caught.value.status == status and len(service.asked) == 1


def test_being_out_of_money_is_not_asked_again_though_it_says_429() -> None:
    with (
        stand_in(in_turn(error(429, "pay", code="insufficient_quota"), text("x"))) as service,
        pytest.raises(Refused, match="pay"),
    ):
        client_of(service).one(ask())
    assert len(service.asked) == 1


def test_a_pause_that_the_service_asks_for_is_kept() -> None:
    with stand_in(in_turn(error(429, retry_after="0.4"), text("x"))) as service:
        client_of(service).one(ask())
    first, second = service.asked
    assert second.arrived_s - first.arrived_s >= 0.4


def test_a_slow_service_that_lets_one_call_through_at_a_time_is_no_failure() -> None:
    """Twelve calls, eight at a time, all but one told to slow down: far more often than max_attempts."""
    busy = threading.Lock()
    n_limited = [0]

    def reply(asked: Asked) -> Answer | str:
        if not busy.acquire(blocking=False):
            n_limited[0] += 1
            return error(429, retry_after="0.02")
        try:
            threading.Event().wait(0.1)
            return echo(asked)
        finally:
            busy.release()

    with stand_in(reply) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=8, max_attempts=2), [f"p{i}" for i in range(12)])
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    assert n_limited[0] > 12


def test_a_pause_beyond_all_patience_is_given_up_at_once() -> None:
    with stand_in(in_turn(error(429, retry_after="86400"))) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=1), ["a", "b"])
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 2 and len(service.asked) == 2
    assert "patience_s=900" in str(outcomes[0])


class Waits(threading.Event):
    """An event whose waits end at once and are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.waits_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits_s.append(timeout or 0.0)
        return False


@pytest.mark.parametrize("status", [408, 409, 503])
def test_a_service_with_a_fault_cannot_ask_for_a_pause_of_hours(status: int) -> None:
    told = [error(status, retry_after="86400"), error(status, retry_after="20"), text("x")]
    with stand_in(in_turn(*told)) as service:
        waits = Waits()
        client_of(service).one(ask(), waits)
    assert waits.waits_s == [60, 20]


JUNK: dict[str, bytes] = {
    "nothing": b"",
    "a web page": b"<html>Please log in</html>",
    "half a reply": text("x").body[:-9],
    "null": b"null",
    "a list": b"[]",
    "no choices": b"{}",
    "empty choices": b'{"choices": []}',
    "choices null": b'{"choices": null}',
    "an error that says 200": b'{"error": {"message": "overloaded"}}',
    "a choice without a text": b'{"choices": [{"finish_reason": "stop"}]}',
    "a text that is a number": b'{"choices": [{"text": 5, "finish_reason": "stop"}]}',
    "a refused message": b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
    "a filtered text": text("he", finish_reason="content_filter").body,
    "an aborted text": text("he", finish_reason="abort").body,
    "a text that may go on": text("he", finish_reason=None).body,
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
def test_junk_is_never_a_text_and_not_asked_for_again(content_type: str) -> None:
    def reply(asked: Asked) -> Answer:
        return Answer(body=JUNK[asked.prompt], headers={"content-type": content_type})

    with stand_in(reply) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=len(JUNK)), list(JUNK))
    assert {type(outcome) for outcome in outcomes} == {UnusableReply} and len(service.asked) == len(JUNK)


def test_two_texts_where_one_was_asked_for_are_none() -> None:
    two = json.loads(text("x").body)
    two["choices"] *= 2
    with stand_in(in_turn(as_json(two))) as service, pytest.raises(UnusableReply, match="no finished text"):
        client_of(service).one(ask())


def test_a_filtered_text_is_counted_since_it_is_paid_for() -> None:
    with stand_in(in_turn(text("he", n_tokens=2, finish_reason="content_filter"))) as service:
        client = client_of(service)
        with pytest.raises(UnusableReply, match="content_filter"):
            client.one(ask())
    assert client.usage.n_tokens == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["stop", "length"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["choices", "text", "message", "content", "finish_reason"]), inner)
    ),
    max_leaves=12,
)


@cache
def unconnected() -> ApiClient:
    return ApiClient(ApiSettings(base_url="http://127.0.0.1:9/v1", api_key_env=""))


@given(JSON)
def test_any_json_is_the_text_in_it_or_an_error(value: object) -> None:
    try:
        reply = unconnected()._completion(json.dumps(value))
    except UnusableReply:
        return
    assert isinstance(value, dict)
    (choice,) = value["choices"]
    assert choice["finish_reason"] in ("stop", "length") and reply.finish_reason == choice["finish_reason"]
    assert reply.text == (choice["message"]["content"] if choice.get("message") else choice["text"])


def test_one_prompt_that_is_refused_does_not_cost_the_others() -> None:
    def reply(asked: Asked) -> Answer | str:
        return error(400, "too long") if asked.prompt == "p3" else echo(asked)

    with stand_in(reply) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=2), [f"p{i}" for i in range(8)])
    assert [type(outcome) for outcome in outcomes] == [Completion] * 3 + [Refused] + [Completion] * 4


def test_a_row_of_refused_prompts_does_not_cost_the_others() -> None:
    def reply(asked: Asked) -> Answer | str:
        return error(400, "too long") if int(asked.prompt[1:]) < 20 else echo(asked)

    with stand_in(reply) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=1), [f"p{i}" for i in range(22)])
    assert [type(outcome) for outcome in outcomes] == [Refused] * 20 + [Completion] * 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_that_concerns_all_ends_the_round(status: int) -> None:
    with stand_in(in_turn(error(status))) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=2), [f"p{i}" for i in range(30)])
        assert len(service.asked) < 10
    kinds = [type(outcome) for outcome in outcomes]
    assert set(kinds) == {Refused, NotAsked} and kinds.count(NotAsked) >= 20


def test_a_service_that_is_down_is_not_asked_for_everything() -> None:
    with stand_in(in_turn(error(500))) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=3, max_attempts=2), [f"p{i}" for i in range(50)])
        assert len(service.asked) <= 2 * (16 + 1 + 2 * 3)
    assert {type(outcome) for outcome in outcomes} == {Unavailable, NotAsked}


def test_ctrl_c_saves_the_replies_under_way_and_sends_nothing_new() -> None:
    together = threading.Barrier(3)
    interrupted = threading.Event()

    def reply(asked: Asked) -> Answer | str:
        if asked.number < 3 and together.wait(20) == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            interrupted.set()
        interrupted.wait(20)
        threading.Event().wait(0.2)  # the interrupt comes first
        return echo(asked)

    came: dict[int, str] = {}
    with stand_in(reply) as service:
        client = client_of(service, max_parallel=3, timeout_s=30.0)
        with pytest.raises(KeyboardInterrupt):
            client.each(asks([f"p{i}" for i in range(30)]), lambda index, text: came.update({index: text.text}))
    assert came == {0: "P0", 1: "P1", 2: "P2"} and len(service.asked) == 3


def test_ctrl_c_while_a_text_is_saved_loses_none() -> None:
    together, came = threading.Barrier(4), list[int]()

    def reply(asked: Asked) -> str:
        together.wait(20)  # all four are under way
        return echo(asked)

    def save(index: int, _: Completion) -> None:
        if not came:
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)
        came.append(index)

    with stand_in(reply) as service, pytest.raises(KeyboardInterrupt):
        client_of(service, max_parallel=4, timeout_s=30.0).each(asks([f"p{i}" for i in range(4)]), save)
    assert sorted(came) == [0, 1, 2, 3]


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing_more() -> None:
    came: list[int] = []
    with stand_in() as service:

        def reply(asked: Asked) -> Answer:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(0.1)
            return SILENCE

        service.behave = reply
        with pytest.raises(KeyboardInterrupt):
            client_of(service, timeout_s=60.0).each(asks(["a"]), lambda index, _: came.append(index))
    assert came == []


def test_ctrl_c_does_not_wait_for_the_next_attempt_of_a_request() -> None:
    def reply(asked: Asked) -> Answer:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        return error(429, retry_after="100")

    with stand_in(reply) as service, pytest.raises(KeyboardInterrupt):
        client_of(service, timeout_s=60.0).each(asks(["a"]))


def test_an_error_of_the_caller_s_own_ends_the_round() -> None:
    def save(index: int, _: Completion) -> None:
        raise OSError("disk full")

    with stand_in() as service, pytest.raises(OSError, match="disk full"):
        client_of(service, max_parallel=1).each(asks([f"p{i}" for i in range(30)]), save)
    assert len(service.asked) < 5


def test_it_works_inside_a_running_event_loop_as_in_a_notebook() -> None:
    async def cell() -> list[Completion | EngineError]:
        return outcomes_of(client_of(service), ["a", "b"])

    # In a thread of its own: the browser of other tests may leave a running loop in this one.
    with stand_in() as service, ThreadPoolExecutor(1) as thread:
        outcomes = thread.submit(asyncio.run, cell()).result()
    assert [outcome.text for outcome in outcomes if isinstance(outcome, Completion)] == ["A", "B"]


def test_the_check_of_the_server_comes_before_each_attempt() -> None:
    def gone() -> None:
        raise EngineError("exit code 3")

    with stand_in() as service:
        client = ApiClient(ApiSettings(base_url=service.url, api_key_env=""), check=gone)
        with pytest.raises(EngineError, match="exit code 3"):
            client.one(ask())
        assert service.asked == []


def test_the_key_goes_to_the_service_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with stand_in(lambda asked: error(401, f"wrong key {KEY}, used by {asked.number}")) as service:
        client = client_of(service, api_key_env="MY_KEY")
        with pytest.raises(Refused) as caught:
            client.one(ask())
    assert service.asked[0].headers["authorization"] == f"Bearer {KEY}"
    shown = "".join(traceback.format_exception(caught.value)) + repr(client.settings) + repr(vars(caught.value))
    assert "wrong key ***" in shown and KEY not in shown


def test_junk_with_the_key_in_it_is_shown_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with (
        stand_in(in_turn(Answer(body=f"your key is {KEY}".encode()))) as service,
        pytest.raises(UnusableReply) as caught,
    ):
        client_of(service, api_key_env="MY_KEY").one(ask())
    assert "your key is ***" in str(caught.value) and KEY not in str(caught.value)


def test_a_key_comes_from_the_environment_else_from_the_dot_env_of_the_project_and_of_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "below").mkdir(parents=True)
    for folder in ("elsewhere", "elsewhere/below"):
        (tmp_path / folder / ".env").write_text("MY_KEY=of-somebody-else\nTHIRD=3\n")
    (tmp_path / ".env").write_text(f"MY_KEY={KEY}\nOTHER=2\nBROKEN=two words\n")
    monkeypatch.chdir(tmp_path / "elsewhere" / "below")
    monkeypatch.delenv("MY_KEY", raising=False)
    assert Path(__file__).parent.parent / ".env" == DOTENV
    monkeypatch.setattr("seal_nb.engines.api.DOTENV", tmp_path / ".env")
    with pytest.raises(SettingsError, match="the key in BROKEN has a space"):
        api_key("BROKEN")
    assert api_key("MY_KEY") == KEY and "MY_KEY" not in os.environ
    monkeypatch.setenv("MY_KEY", "from-the-environment")
    assert api_key("MY_KEY") == "from-the-environment"
    with pytest.raises(SettingsError, match=r"no key in THIRD.*\.env"):
        api_key("THIRD")


def test_git_ignores_the_file_of_keys() -> None:
    ignored = (Path(__file__).parent.parent / ".gitignore").read_text().splitlines()
    assert ".env" in ignored


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with stand_in() as service:
        assert client_of(service).one(ask("here")).text == "HERE"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"base_url": "api.openai.com/v1"}, "base_url='api.openai.com/v1'"),
        ({"base_url": "http://me:secret@host/v1"}, "put the key into an environment variable"),
        ({"max_parallel": 0}, "max_parallel=0"),
        ({"max_attempts": 0}, "max_attempts=0"),
        ({"timeout_s": 0}, "timeout_s=0"),
    ],
)
def test_wrong_settings_are_refused_with_their_name(wrong: dict, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        ApiSettings(**wrong)
    assert "secret" not in str(caught.value)


def engine_of(service: StandIn) -> OpenAIEngine:
    return OpenAIEngine(settings_of(service, max_parallel=4, max_attempts=2), model="m")


def test_texts_come_in_order_each_from_its_seed() -> None:
    with stand_in() as service:
        made = engine_of(service).generate(["a", "b", "c"], SAMPLING, seeds=[1, 2, 3])
    assert [(c.text, c.n_tokens, c.finish_reason) for c in made] == [(t, 3, "stop") for t in "ABC"]
    assert {asked.prompt: asked.body["seed"] for asked in service.asked} == {"a": 1, "b": 2, "c": 3}


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
    return write_self_edits(
        engine_of(service),
        load_passages("shipped:val")[:3],
        prompts=find_prompts("rewrite"),
        k_completions=4,
        sampling=SAMPLING,
        seed=1,
        journal=journal,
    )[0]


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


def test_without_address_and_variable_the_service_is_openai_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with stand_in() as service:
        monkeypatch.setattr(ApiSettings, "base_url", service.url)  # in place of OpenAI's
        for url in ("", service.url):
            with chosen_engine("openai", model="m", url=url, run_dir=tmp_path) as engine:
                engine.generate(["a"], SAMPLING, seeds=[0])
    assert [asked.headers["authorization"] for asked in service.asked] == [f"Bearer {KEY}", "Bearer none"]
    monkeypatch.delenv("OPENAI_API_KEY")
    with (
        pytest.raises(SettingsError, match="no key in OPENAI_API_KEY"),
        chosen_engine("openai", model="m", run_dir=tmp_path),
    ):
        pass

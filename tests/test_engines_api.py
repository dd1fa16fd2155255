"""The client of OpenAI-compatible services against a service with faults, and the engine and stage 1 on top of it."""

import asyncio
import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._models import FinalRequestOptions

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
from seal_nb.engines.base import Ask, Completion, CutOff, Incomplete, NotAsked, Sampling, without_thinking
from seal_nb.errors import EngineError, SettingsError
from seal_nb.experiments.create import chosen_engine, create_self_edits
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


@pytest.mark.parametrize(
    "told",
    [
        error(429, "pay", code="insufficient_quota"),
        error(429, "Your account has insufficient balance", type="exceeded_current_quota_error"),
        error(400, "Your credit balance is too low to access the API."),
    ],
)
def test_being_out_of_money_ends_the_round_though_it_says_429_or_400(told: Answer) -> None:
    with stand_in(in_turn(told)) as service:
        outcomes = outcomes_of(client_of(service, max_parallel=1), ["a", "b"])
    assert [type(outcome) for outcome in outcomes] == [Refused, NotAsked] and len(service.asked) == 1


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
    "a text that has not ended because of a fault": text("he", finish_reason="error").body,
    "a text stopped for safety": text("he", finish_reason="SAFETY").body,
    "thinking alone": text("<think>yes").body,
    "a refusal beside a text": b'{"choices": [{"message": {"content": "he", "refusal": "no"}, "finish_reason": ""}]}',
    "nothing, for no reason": text("", finish_reason=None).body,
    "nothing after thinking": b'{"choices": [{"message": {"content": "", "reasoning": "a"}, "finish_reason": "stop"}]}',
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
    assert reply.finish_reason == ("length" if choice.get("finish_reason") == "length" else "stop")
    text = choice["message"]["content"] if choice.get("message") else choice["text"]
    assert reply.text == text or (isinstance(text, list) and reply.text.strip())


@pytest.mark.parametrize(
    "reason", ["stop", "eos_token", "eos", "", None, "end_turn", "STOP", "tool_calls", "stop_sequence"]
)
def test_a_text_that_is_there_is_finished_whatever_the_service_calls_its_end(reason: str | None) -> None:
    assert unconnected()._completion(text("a text", finish_reason=reason).body.decode()).finish_reason == "stop"


@pytest.mark.parametrize("reason", ["length", "model_length", "MAX_TOKENS"])
def test_a_text_cut_at_the_limit_is_kept_and_said_to_be_cut(reason: str) -> None:
    reply = unconnected()._completion(text("a te", finish_reason=reason).body.decode())
    assert (reply.text, reply.finish_reason) == ("a te", "length")


def test_a_stop_text_that_a_service_keeps_is_cut_off() -> None:
    with stand_in(lambda asked: "one\n---\ntwo") as service:
        sampling = Sampling(stop=("\n---", "two"))
        assert client_of(service).one(Ask(model="m", prompt="p", sampling=sampling)).text == "one"


# From the templates of DeepSeek, Qwen3, Magistral, Kimi, Command A, Gemma and gpt-oss.
THOUGHTS = {
    "<think>\nno, wait, yes\n</think>\n\nThe text": "The text",
    "\n<think></think>The text": "The text",
    "<thinking>no</thinking> The <think>text</think>": "The <think>text</think>",
    "<think>a <think>b</think> c</think> The text": "The text",
    "<think>a</think><think>b</think> The text": "The text",
    "no, wait, yes\n</think>\n\nThe text": "The text",
    "[THINK]no[/THINK]The text": "The text",
    "no[/THINK]The text": "The text",
    "◁think▷no◁/think▷The text": "The text",
    "<|START_THINKING|>no<|END_THINKING|><|START_RESPONSE|>The text<|END_RESPONSE|>": "The text",
    "<|channel>thought\nno<channel|>The text": "The text",
    "<|channel|>analysis<|message|>n<|end|><|start|>assistant<|channel|>final<|message|>The text<|return|>": "The text",
    "analysisno, wait, yesassistantfinalThe text": "The text",
    "<seed:think>no</seed:think>The text": "The text",
    "<|begin_of_thought|>no<|end_of_thought|>The text": "The text",
    "<think>no, wait": "",
    "no, wait\n</think>": "",
    "[THINK]no": "",
    "<|channel|>analysis<|message|>no": "",
    "  The text\n": "  The text\n",
    "Models write <think>a</think> before a text": "Models write <think>a</think> before a text",
    "Models end it with `</think>` or '[/THINK]'.": "Models end it with `</think>` or '[/THINK]'.",
    "analysis of the final text": "analysis of the final text",
    "<thinker> is a word": "<thinker> is a word",
    "": "",
}


@pytest.mark.parametrize("said", THOUGHTS)
def test_thinking_is_cut_off_at_the_start_of_a_text_and_nowhere_else(said: str) -> None:
    assert without_thinking(said) == THOUGHTS[said]


@given(st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "a", "`", "<|channel|>analysis", " "])))
def test_what_is_left_without_thinking_is_an_end_of_the_text_and_has_no_more(words: list[str]) -> None:
    said = "".join(words)
    left = without_thinking(said)
    assert said.endswith(left) and without_thinking(left) == left


def as_chat(content: object, *, finish_reason: str = "stop", **beside: object) -> Answer:
    return as_json({"choices": [{"message": {"content": content, **beside}, "finish_reason": finish_reason}]})


@pytest.mark.parametrize(
    "reply",
    [
        as_chat("The text", reasoning_content="no, wait"),
        as_chat("<think>no</think>\nThe text", reasoning="no"),
        as_chat([{"type": "thinking", "thinking": []}, *({"type": "text", "text": part} for part in ("The ", "text"))]),
        as_chat("The text", finish_reason="", refusal=None, tool_calls=[]),
    ],
)  # fmt: skip
def test_of_a_reply_only_the_text_counts_and_not_what_was_thought(reply: Answer) -> None:
    with stand_in(lambda asked: reply) as service:
        assert client_of(service).one(ask()).text == "The text"


@pytest.mark.parametrize("content", ["", None, " \n", "<think>no, wait", [{"type": "thinking", "thinking": []}], []])
def test_a_self_edit_whose_thinking_took_all_tokens_is_missing_and_names_max_tokens(content: object) -> None:
    with (
        stand_in(lambda asked: as_chat(content, finish_reason="length")) as service,
        pytest.raises(Incomplete, match="cut at max_tokens=5.*raise max_tokens") as caught,
    ):
        engine_of(service).generate(["a"], SAMPLING, seeds=[0])
    assert type(caught.value.failures[0]) is CutOff and len(service.asked) == 1


def refusal(message: str, **fields: object) -> dict[str, object]:
    return {"error": {"message": message, "type": "invalid_request_error", **fields}}


# Error bodies as services send them: status, body, the parameter, its other name. Their sources are public reports.
UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."
NOT_PERMITTED = {"type": "extra_forbidden", "msg": "Extra inputs are not permitted"}
REFUSED: dict[str, tuple[int, object, str, str]] = {
    "OpenAI, fish2018/YPrompt#26": (
        400,
        refusal(
            UNSUPPORTED.format("max_tokens") + " Use 'max_completion_tokens' instead.",
            param="max_tokens",
            code="unsupported_parameter",
        ),
        "max_tokens",
        "max_completion_tokens",
    ),
    "OpenAI, johny-b/llmcomp#69": (
        400,
        refusal(
            "Unsupported value: 'temperature' does not support 0.5 with this model. "
            "Only the default (1) value is supported.",
            param="temperature",
            code="unsupported_value",
        ),
        "temperature",
        "",
    ),
    "Azure, BerriAI/litellm#13407": (400, refusal(UNSUPPORTED.format("temperature"), code=None), "temperature", ""),
    "Azure, MaartenGr/BERTopic#2423": (400, refusal(UNSUPPORTED.format("stop"), param="stop"), "stop", ""),
    "devoxx/DevoxxGenieIDEAPlugin#1240": (400, {"message": UNSUPPORTED.format("top_p")}, "top_p", ""),
    "OpenAI, older": (400, refusal("Unrecognized request argument supplied: seed"), "seed", ""),
    "Gemini, Vali-98/ChatterUI#227": (
        400,
        [refusal('Invalid JSON payload received. Unknown name "seed": Cannot find field.')],
        "seed",
        "",
    ),
    "Mistral, partITech/php-mistral#76": (
        422,
        {"object": "Error", "message": {"detail": [{**NOT_PERMITTED, "loc": ["body", "seed"], "input": 3}]}},
        "seed",
        "",
    ),
    "Mistral, mistralai/platform-docs-public#7": (
        422,
        {"message": json.dumps({"detail": [{**NOT_PERMITTED, "loc": ["body", "top_p"]}]})},
        "top_p",
        "",
    ),
    "Groq, fanenr/chatbot#21": (400, refusal("property 'seed' is unsupported, did you mean 'stop'?"), "seed", ""),
    "Kimi, nashsu/llm_wiki#173": (
        400,
        refusal("invalid temperature: only 1 is allowed for this model"),
        "temperature",
        "",
    ),
    "Anthropic, JohnnyZ93/oai-compatible-copilot#81": (
        400,
        refusal("temperature and top_p cannot both be specified for this model. Please use only one."),
        "top_p",
        "",
    ),
    "a gateway, nothing but text": (400, "parameter `seed` is not supported", "seed", ""),
    "a JSON schema": (422, {"detail": "Additional properties are not allowed ('seed' was unexpected)"}, "seed", ""),
    "a new service": (400, refusal("Unknown parameter: 'max_tokens'."), "max_tokens", "max_completion_tokens"),
}
# The same in other words, of the services and gateways behind which models are served.
IN_OTHER_WORDS = {
    "temperature is no longer supported": "temperature",
    "`temperature` isn’t supported with this model": "temperature",
    "seed is not valid for this model": "seed",
    "top_p is incompatible with thinking": "top_p",
    "seed has been removed": "seed",
    "Illegal parameter: seed": "seed",
    "this model has beta-limitations, temperature, top_p and n are fixed at 1": "temperature",
    "temperature may only be set to 1 when thinking is enabled": "temperature",
    "invalid temperature: must be 1": "temperature",
    "Invalid value for temperature: 0.5. Only 1.0 is supported.": "temperature",
    "gpt-5 models don't support temperature=0.5. Only temperature=1 is supported.": "temperature",
    "You should either alter temperature or top_p, but not both.": "top_p",
    "Only one of `temperature` and `top_p` may be set": "top_p",
    "#: extraneous key [top_p] is not permitted, please reformat your input and try again.": "top_p",
    "Model grok-4 does not support parameter stop.": "stop",
    "Stop sequences are not supported for this model": "stop",
    'json: unknown field "seed"': "seed",
    "create() got an unexpected keyword argument 'seed'": "seed",
    "seed is not a recognized parameter": "seed",
    "azure does not support parameters: ['seed'], for model=o1-mini": "seed",
    "1 validation error for Request\nseed\n  Extra inputs are not permitted [type=extra_forbidden]": "seed",
    "Please use max_completion_tokens instead of max_tokens": "max_tokens",
}
REFUSED |= {
    told: (400, refusal(told), name, "max_completion_tokens" if name == "max_tokens" else "")
    for told, name in IN_OTHER_WORDS.items()
}
REFUSED["a code beside the name"] = (400, refusal("Bad request", param="seed", code="unknown_parameter"), "seed", "")
FULL = Sampling(max_tokens=5, temperature=0.5, top_p=0.9, stop=("\n",))


@pytest.mark.parametrize("service_is", REFUSED)
def test_a_parameter_that_a_service_refuses_is_left_out_or_renamed_said_once_and_the_call_repeated(
    service_is: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, body, name, other = REFUSED[service_is]

    def reply(asked: Asked) -> Answer | str:
        told = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        return Answer(status=status, body=told) if name in asked.body else echo(asked)

    with stand_in(reply) as service:
        client = client_of(service, max_parallel=4)
        each = {i: Ask(model="m", prompt=f"p{i}", sampling=FULL, seed=i) for i in range(8)}
        assert [one.text for _, one in sorted(client.each(each).items())] == [f"P{i}" for i in range(8)]  # type: ignore[union-attr]
        n_asked = len(service.asked)
        assert client.one(each[0]).not_sent == (() if other else (name,))
    assert n_asked <= 8 + 4 and len(service.asked) == n_asked + 1, "a refusal is learned once"
    expected = {"model", "prompt", "temperature", "top_p", "max_tokens", "stop", "seed"} - {name} | {other} - {""}
    assert set(service.asked[-1].body) == expected
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    does = f"sent as {other}" if other else "left out"
    assert f"model m refuses {name}=" in warning and does in warning and service.url in warning
    if "Only the default" in str(body) or "only 1" in str(body):
        assert "temperature=0.5; from now on it is left out: the service uses 1" in warning


def test_a_reasoning_model_refuses_one_parameter_after_the_other(caplog: pytest.LogCaptureFixture) -> None:
    def reply(asked: Asked) -> Answer | str:
        for name in ("max_tokens", "temperature", "top_p", "seed", "stop"):
            if name in asked.body:
                return error(400, f"Unsupported parameter: '{name}' is not supported with this model.")
        return "one\ntwo"

    with stand_in(reply) as service:
        client = client_of(service)
        assert client.one(Ask(model="m", prompt="p", sampling=FULL, seed=1)).text == "one"
        assert len(service.asked) == 6 and set(service.asked[-1].body) == {"model", "prompt", "max_completion_tokens"}
        assert len(caplog.records) == 5
        client.one(Ask(model="other", prompt="p", sampling=FULL))
    assert "max_tokens" in service.asked[6].body, "each model is asked with all parameters at first"


# A value that was chosen, a prompt, and what no request can do without: errors as before, after one request.
KEPT = {
    "OpenAI": "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3 instead.",
    "vLLM": "'max_tokens' or 'max_completion_tokens' is too large: 8192. This model's maximum context length is 2048 "
            "tokens and your request has 5 input tokens (8192 > 2048 - 5).",
    "vLLM 0.32": "max_tokens=600 cannot be greater than max_model_len=512. (parameter=max_tokens, value=600)",
    "OpenAI, the limit": "max_tokens is too large: 100000. This model supports at most 16384 completion tokens.",
    "OpenAI, reasoning": "Could not finish the message because max_tokens or model output limit was reached.",
    "Anthropic": "max_tokens: 100000 > 8192, which is the maximum allowed number of output tokens",
    "DeepSeek": "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]",
    "TGI": "Input validation error: `temperature` must be strictly positive",
    "a bound": "temperature must be 2 or less",
    "another bound": "`top_p` must be 0.95 or unset when thinking is enabled.",
    "thinking": "`temperature` must be greater than or equal to 0.95 when thinking is enabled.",
    "Azure, a filter": "The response was filtered. Please modify your prompt and retry, or stop.",
    "a long prompt": "This model's maximum context length is 8192 tokens. However, your messages have 9000.",
    "the model": "The model 'm' is not supported.",
    "the messages": "Unsupported parameter: 'prompt' is not supported with this model.",
    "a word": "This prompt is not allowed. Please stop.",
}  # fmt: skip


@pytest.mark.parametrize("service_is", KEPT)
def test_a_refused_value_prompt_or_model_is_an_error_of_this_request(service_is: str) -> None:
    with stand_in(lambda asked: as_json(refusal(KEPT[service_is]), status=400)) as service:
        client = client_of(service)
        with pytest.raises(Refused, match="Error code: 400"):
            client.one(Ask(model="m", prompt="p", sampling=FULL, seed=1))
    assert len(service.asked) == 1


def test_a_request_that_is_repeated_in_an_error_is_no_reason_to_change_it() -> None:
    def reply(asked: Asked) -> Answer:
        return as_json({"detail": [{"type": "extra_forbidden", "loc": ["body"], "input": asked.body}]}, status=422)

    with stand_in(reply) as service, pytest.raises(Refused):
        client_of(service).one(Ask(model="m", prompt="p", sampling=FULL, seed=1))
    assert len(service.asked) == 1


def test_a_service_that_refuses_both_names_of_the_limit_is_asked_twice() -> None:
    def reply(asked: Asked) -> Answer:
        return error(400, f"Unknown parameter: '{next(one for one in asked.body if one.startswith('max_'))}'")

    with stand_in(reply) as service, pytest.raises(Refused, match="max_completion_tokens"):
        client_of(service).one(ask())
    assert len(service.asked) == 2


def test_a_value_that_says_nothing_is_left_out_where_a_service_refuses_it() -> None:
    """huggingface/text-generation-inference#2222; its version 2.4 says so with status 200 (#2749)."""
    told = {"error": "Input validation error: `top_p` must be > 0.0 and < 1.0", "error_type": "validation"}
    for status in (422, 200):
        with stand_in(
            lambda asked, status=status: as_json(told, status=status) if "top_p" in asked.body else "yes"
        ) as service:
            client = client_of(service)
            assert client.one(Ask(model="m", prompt="p", sampling=Sampling(top_p=1.0))).text == "yes"
            with pytest.raises(Refused if status == 422 else EngineError, match="top_p"):
                client_of(service).one(ask())


@pytest.mark.parametrize(
    ("code", "n_asked", "kind"),
    [(502, 3, Unavailable), (429, 3, Completion), (402, 1, Refused), ("no", 1, UnusableReply)],
)
def test_an_error_that_comes_with_200_is_what_its_code_says(code: object, n_asked: int, kind: type) -> None:
    """As OpenRouter and other gateways send the errors of the services behind them."""
    told = as_json({"error": {"code": code, "message": "Provider returned error"}})
    with stand_in(in_turn(told, told, told if code == 502 else text("x"))) as service:
        (outcome,) = outcomes_of(client_of(service), ["a"])
    assert type(outcome) is kind and len(service.asked) == n_asked


def test_a_pause_in_milliseconds_or_until_a_date_is_kept() -> None:
    told = [
        error(429, retry_after_ms="2500", retry_after="9"),
        error(429, retry_after=formatdate(time.time() + 30)),
        text("x"),
    ]
    with stand_in(in_turn(*told)) as service:
        waits = Waits()
        client_of(service).one(ask(), waits)
    assert waits.waits_s[0] == 2.5 and 25 < waits.waits_s[1] <= 30


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/", "/v1//", "/openai/deployments/d", "/v1/chat/completions", "/v1/completions/", ""]
)
@pytest.mark.parametrize("query", ["", "?api-version=2024-08-01-preview", "?api-version=preview&region=eu"])
def test_the_query_of_an_address_stands_at_the_end_of_each_request(path: str, query: str) -> None:
    with stand_in() as service:
        root = service.url.removesuffix("/v1")
        client = ApiClient(ApiSettings(base_url=f"{root}{path}{query}", api_key_env=""))
        client.one(ask())
        client.control("/health")
    base = path.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
    assert [asked.path for asked in service.asked] == [
        f"{base}/completions{query}", f"{base.removesuffix('/v1')}/health{query}"
    ]  # fmt: skip


def test_azures_gateways_get_the_key_in_azures_header_too_and_a_token_of_its_sign_in_as_others_do() -> None:
    for key, name in ((KEY, "api-key"), ("eyJhbGciOiJIUzI1NiJ9.e30.4", "authorization")):
        with stand_in() as service:
            url = f"{service.url}?api-version=2024-10-21"
            ApiClient(ApiSettings(base_url=url, api_key_env=""), key=key).one(ask())
            headers = service.asked[0].headers
        assert key in headers[name] and headers["authorization"] == f"Bearer {key}"
        assert ("api-key" in headers) == (name == "api-key")
    azure = ApiClient(ApiSettings(base_url="https://me.openai.azure.com/openai/v1", api_key_env=""), key=KEY)
    sent = azure._client._build_request(FinalRequestOptions(method="post", url="/x", **azure._options))
    assert sent.headers["api-key"] == KEY and "authorization" not in sent.headers


@pytest.mark.parametrize("status", [404, 405])
def test_a_wrong_address_is_told_whole_with_the_path_that_is_usual(status: int) -> None:
    with stand_in(in_turn(error(status, "Not Found"))) as service:
        root = service.url.removesuffix("/v1")
        wrong = ApiClient(ApiSettings(base_url=f"{root}/?api-version=preview", api_key_env=""))
        told = rf"asked was {root}/completions\?api-version=preview: most services want /v1 at the end of base_url"
        with pytest.raises(Refused, match=told):
            wrong.one(ask())
        with pytest.raises(Refused, match=f"asked was {service.url}/completions: check model and base_url"):
            client_of(service).one(ask())


def test_a_web_page_in_place_of_a_reply_is_said_to_be_one() -> None:
    with (
        stand_in(in_turn(Answer(body=b" <!DOCTYPE html><title>Ollama</title>"))) as service,
        pytest.raises(UnusableReply, match="Ollama.*a web page: base_url is not that of the API"),
    ):
        client_of(service).one(ask())


@pytest.mark.parametrize("told", [{"content": "a", "stop": True}, {"error": "Unexpected endpoint (POST /completions)"}])
def test_a_reply_of_another_api_says_that_v1_is_missing(told: dict) -> None:
    """llama.cpp's server and LM Studio answer /completions with 200."""
    with stand_in(in_turn(as_json(told))) as service:
        for url, hint in ((service.url.removesuffix("/v1"), "want /v1 at the end"), (service.url, "")):
            with pytest.raises(UnusableReply) as caught:
                ApiClient(ApiSettings(base_url=url, api_key_env="")).one(ask())
            assert ("/v1 at the end" in str(caught.value)) == bool(hint)


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


@pytest.mark.parametrize("status", [401, 403, 404, 405])
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
        ({"base_url": "http://host/v1?sig=secret"}, "put the key into an environment variable"),
        ({"base_url": "http://host/v1?a=secret-of-mine"}, "query with more than short values or a version"),
        ({"base_url": "http://host/v1?"}, "query with more than"),
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


def test_the_record_of_a_resumed_run_lists_the_parameters_that_its_texts_were_written_without(tmp_path: Path) -> None:
    def reply(asked: Asked) -> Answer | str:
        return error(400, "Unknown parameter: 'seed'") if "seed" in asked.body else "a self-edit"

    with stand_in(reply) as service:
        for _ in range(2):
            create_self_edits(
                load_passages("shipped:val")[:1], engine="openai", model="m", engine_url=service.url, folder=tmp_path
            )
            n_asked = len(service.asked)
            record = json.loads((tmp_path / "self_edits.record.json").read_text())
            assert record["settings"]["not_sent"] == ["seed"]
    assert n_asked <= 10, "the second run takes every text from the journal"


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

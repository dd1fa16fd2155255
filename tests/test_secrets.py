"""A key that is put anywhere appears in no error, log, record, cache or output: neither whole nor eight characters."""

import contextlib
import io
import json
import logging
import os
import random
import re
import string
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from benchmarks.stand_in import Answer, Asked, Behaviour, as_json, error, stand_in, text
from seal_nb.cli import main
from seal_nb.engines.api import ApiClient, ApiSettings, Refused
from seal_nb.engines.base import Ask, Sampling
from seal_nb.engines.vllm import VllmServer
from seal_nb.errors import DataError, SealError, SettingsError, checked, holds_key, redacted
from seal_nb.grading.base import Answered
from seal_nb.grading.choose import check_grader, grader_of, make_grader
from seal_nb.notebook_runner import Parameter, parse_value
from seal_nb.results.collect import run_of
from seal_nb.server.client import ServeSettings
from seal_nb.storage import write_record

ALNUM, HEX = string.ascii_letters + string.digits, string.digits + "abcdef"
ALPHABETS = {"sk-": ALNUM, "sk-proj-": ALNUM + "_-", "hf_": ALNUM, "ghp_": ALNUM, "x7A9b2": ALNUM, "f3": HEX}
PRINTABLE = {"q7": "".join(map(chr, range(33, 127)))}  # what a header can hold


@pytest.fixture(scope="module", autouse=True)
def nothing_kept() -> Iterator[None]:
    """Secrets that tests of other files have used are none here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seal_nb.errors._kept", set())
        yield


def a_key(seed: int, alphabets: Mapping[str, str] = ALPHABETS) -> str:
    """Drawn evenly, as services draw keys; Hypothesis alone would prefer words such as "aaaaaaaa"."""
    chance = random.Random(seed)
    if chance.random() < 0.15:
        return str(uuid.UUID(int=chance.getrandbits(128)))
    start, alphabet = chance.choice(list(alphabets.items()))
    return start + "4" + "".join(chance.choices(alphabet, k=chance.randint(24, 48)))


SEEDS = st.integers(0, 2**32)
KEYS = SEEDS.map(a_key)


def is_shown(key: str, told: str) -> bool:
    return any(key[at : at + 8] in told for at in range(len(key) - 7))


def whole(failed: BaseException) -> str:
    """Everything that an error can be printed as, with the errors behind it."""
    told, at = "".join(traceback.format_exception(failed)), failed
    while at is not None:
        told += f"{at!s}{at!r}{vars(at)}"
        at = at.__cause__ or at.__context__
    return told


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """All that is logged or printed."""
    said, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(said), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def parameter(name: str, value: str) -> None:
    parse_value(value, Parameter(name=name, type_name="str", default="", help=""))


def judge_at(url: str) -> None:
    for form in (url, quote(url, safe="")):
        with pytest.raises(SettingsError) as refused:
            make_grader(f"judge:m?base_url={form}")
    raise refused.value


JUDGES = (
    "judge:{}", "judge:m?api_key={}", "judge:m?api%5Fkey={}", "judge:m?key={}", "judge:m?{}=1", "judge:m?{}", "{}",
    "judge:m?api_key_env={}", "judge:m?max_parallel={}", "judge:m?token_limit={}", "judge:m?api_key_env=A&token={}",
)  # fmt: skip
ADDRESSES = (
    "http://me:{}@127.0.0.1/v1", "http://{}@127.0.0.1/v1", "me:{}@127.0.0.1", "http://127.0.0.1:{}/v1", "http://[{}/v1",
    "http://127.0.0.1/v1?api-version={}", "http://127.0.0.1/v1#{}", "http://127.0.0.1/v1?key={}", "{}", "ftp://{}",
)  # fmt: skip
FIELDS = ("grader", "base_url", "api_key_env", "engine_url", "token_limit", "arguments")
PLACES: dict[str, Callable[[str], object]] = {
    **{f"grader {name}": lambda key, name=name: make_grader(name.format(key)) for name in JUDGES},
    **{f"base_url {url}": lambda key, url=url: ApiSettings(base_url=url.format(key)) for url in ADDRESSES},
    **{f"grader at {url}": lambda key, url=url: judge_at(url.format(key)) for url in ADDRESSES},
    "base_url of an engine": lambda key: parameter("engine_url", f"http://127.0.0.1:{key}/v1"),
    "api_key_env": lambda key: ApiSettings(api_key_env=key),
    "api_key_env of a notebook": lambda key: parameter("api_key_env", key),
    "api_key_env of a notebook's grader": lambda key: parameter("grader", f"judge:m?api_key_env={key}"),
    "dataset": lambda key: parameter("dataset", f"https://me:{key}@127.0.0.1/x.json"),
    "api_key_env of a server": lambda key: ServeSettings(grader=f"judge:m?api_key_env={key}"),
    "grader that a run states": lambda key: check_grader(f"judge:m?api_key={key}", "m-local-2048", where="x"),
    "arguments of vLLM": lambda key: VllmServer(
        "m", run_dir=Path("x"), arguments=["--api-key", key], python="x"
    ).start(),
}


@settings(max_examples=6, deadline=None)
@given(KEYS)
@pytest.mark.parametrize("place", PLACES)
def test_a_key_in_a_name_or_setting_is_refused_and_not_shown(place: str, key: str) -> None:
    with heard() as said, pytest.raises(SealError) as refused:
        PLACES[place](key)
    assert not is_shown(key, whole(refused.value) + said.getvalue())
    assert any(field in str(refused.value) for field in (*FIELDS, place)), "it names the field"


def echoed(asked: Asked) -> str:
    return asked.headers["authorization"].removeprefix("Bearer ")


# Services that repeat the key of a request.
ECHOES: dict[str, Behaviour] = {
    "401": lambda asked: error(401, f"Incorrect API key provided: {echoed(asked)}."),
    "401, cut where messages are cut": lambda asked: error(401, "x" * 365 + echoed(asked)),
    "403, half of it": lambda asked: error(403, f"the key {echoed(asked)[:14]}... has no access"),
    "400, not JSON": lambda asked: Answer(status=400, body=repr(asked.headers).encode()),
    "400, as in a URL": lambda asked: error(400, f"https://host/v1?x={quote(echoed(asked), safe='')}"),
    "in a header": lambda asked: error(401, "no", www_authenticate=asked.headers["authorization"]),
    "junk": lambda asked: Answer(body=b"<html>" + echoed(asked).encode()),
    "no choice": lambda asked: as_json({"choices": [], "you": asked.headers}),
    "a finish reason": lambda asked: text("yes", finish_reason=echoed(asked), chat=True),
    "the reply itself": lambda asked: f"yes {echoed(asked)}",
    "retry-after": lambda asked: error(400, "no", retry_after=echoed(asked)),
}


@settings(max_examples=4, deadline=None)
@given(st.one_of(KEYS, SEEDS.map(partial(a_key, alphabets=PRINTABLE))))
@pytest.mark.parametrize("echo", ECHOES)
def test_a_service_that_repeats_the_key_does_not_bring_it_into_errors_logs_or_files(echo: str, key: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder, stand_in(ECHOES[echo]) as service, heard() as said,
        patch.dict(os.environ, MY_KEY=key),
    ):  # fmt: skip
        grader = make_grader(service.judge(folder, api_key_env="MY_KEY"))
        grader.grade([Answered(question="q", gold="g", answer="a")])
        assert service.asked[0].headers["authorization"] == f"Bearer {key}"
        with contextlib.suppress(SealError):
            try:
                grader.client.one(Ask(model="m", prompt="p", sampling=Sampling()))
            except SealError as failed:
                said.write(whole(failed))
                raise
        said.write(repr(grader.client.settings) + "".join(path.read_text() for path in Path(folder).rglob("*.json")))
    assert not is_shown(key, said.getvalue())


def test_a_redirect_is_not_followed_so_neither_key_nor_prompt_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    key = a_key(1)
    monkeypatch.setenv("MY_KEY", key)
    with stand_in() as other, heard() as said, pytest.raises(Refused, match="base_url") as refused:
        target = f"{other.url}/completions?key={key}"
        with stand_in(lambda asked: Answer(status=307, headers={"location": target})) as service:
            ApiClient(ApiSettings(base_url=service.url, api_key_env="MY_KEY")).one(
                Ask(model="m", prompt="p", sampling=Sampling())
            )
    assert other.asked == [] and not is_shown(key, whole(refused.value) + said.getvalue())


def test_openais_key_goes_to_no_other_address_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", a_key(2))
    with stand_in(lambda asked: "yes") as service:
        make_grader(f"judge:m?base_url={service.url}&cache_dir={tmp_path}").grade(
            [Answered(question="q", gold="g", answer="a")]
        )
        assert service.asked[0].headers["authorization"] == "Bearer none"


@settings(max_examples=8, deadline=None)
@given(KEYS)
def test_a_record_holds_no_key_and_no_address(key: str) -> None:
    made = {
        "grader": f"judge:m?base_url=https://me:{key}@gpu07/{key}&api_key={key}&cache_dir=/home/someone/judge",
        "text": f"see wss://gpu07/{key}, s3://bucket/{key} and Authorization: Bearer {key}",
        "known": {key: [f"a{key[:12]}b", f"/home/{key}"]},
    }
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, SOME_TOKEN=key):
        written = write_record(Path(folder) / "run.json", stage="03", settings=made).read_text()
    assert not is_shown(key, written)
    assert "gpu07" not in written and "bucket" not in written and "/home" not in written
    assert json.loads(written)["settings"]["grader"] == "judge:m?base_url=https://...&api_key=***&cache_dir=judge"


def test_a_run_of_somebody_with_a_key_in_its_graders_is_shown_without(tmp_path: Path) -> None:
    name = f"judge:m?api_key={a_key(3)}"
    question = {"baseline_correct": True, "adapter_correct": True, "earlier": {name: {"adapter_correct": False}}}
    article = {"title": "t", "context": "c", "completions": [{"questions": [question]}]}
    run = run_of({"grader": name, "articles": [article], "overall": {}})
    assert not is_shown(a_key(3), repr(run.value)) and not is_shown(a_key(3), grader_of({"grader": name}))
    assert grader_of(run.value) == "judge:m?api_key=***" == next(iter(question["earlier"]))


@pytest.mark.parametrize(
    "words",
    [
        ("grade", "x.jsonl", "--out", "y", "--grader", "judge:m?api_key={}"),
        ("grade", "x.jsonl", "--out", "y", "--api-key", "{}"),
        ("run", "01", "-p", "api_key_env", "{}"),
        ("run", "03", "-p", "grader", "judge:m?api_key={}", "--output", "executed.ipynb"),
        ("submit", "evaluation", "--run-dir", "r", "--dry-run", "--executor", "local", "--grader", "judge:{}"),
        ("serve", "--grader", "judge:m?api_key_env={}"),
    ],
)
def test_the_command_line_shows_no_key_and_writes_none(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = a_key(4)
    monkeypatch.chdir(tmp_path)
    with heard() as said:
        try:
            code = main([word.format(key) for word in words])
        except SystemExit as end:
            code = end.code
    assert code == 2 and said.getvalue() and not is_shown(key, said.getvalue())
    assert not any(is_shown(key, path.read_text()) for path in tmp_path.rglob("*") if path.is_file())


def test_an_error_that_nobody_expected_is_reported_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seal_nb.results.collect.read_run", lambda path: int(f"Bearer {a_key(5)}"))
    with heard() as said:
        assert main(["summarize", "x.json"]) == 1
    assert "ValueError: invalid literal" in said.getvalue() and not is_shown(a_key(5), said.getvalue())


def test_what_is_cut_from_a_file_is_redacted_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:Pa55word-of-proxy@proxy:3128")
    assert str(DataError("is 'xPa55word-of-pro")) == "is 'x***"
    assert redacted("Pa55word-of-proxy, https://a:b@c@host/x, api_key='x', prompt_key='rewrite', max(x, key=len)") == (
        "***, https://***@host/x, api_key='***', prompt_key='rewrite', max(x, key=len)"
    )


USUAL = """
gpt-4o-2024-08-06|Qwen2.5-7B-Instruct-GPTQ-Int4|meta-llama/Llama-3.3-70B-Instruct-Turbo|A_KEY_2|deepseekcoder33b
claude-3-5-sonnet-20241022|ft:gpt-4o-mini-2024-07-18:my-org::9abcDEF1|sk-7b|scikit/sk-model|rk-llama3-8b-instruct-v1.0
hf-internal-testing/tiny-random-gpt2|hf-llama3-8b-instruct-v1|pk-llama-3-8b-instruct-v2|xai-org/grok-2-vision-1212
pplx-70b-online|mistralai/Mixtral-8x7B-Instruct-v0.1|gsk-lab/whisper-large-v3-turbo|org/model@main|all-MiniLM-L6-v2
data/sk-wiki.json|runs/sk-baseline|/home/someone/runs/sk-baseline-2026-11-29-seed1/run.json|sk_SK|lang=sk-SK|runs/test/run.json
C:\\runs\\key=value\\x.json|runs/07/pass=1/run.json|seed=1, n_tokens=123456789, max_tokens=16384000|key_file=k/w.key
http://ollama:11434/v1|http://[::1]:8000/v1|http://[2001:db8::1]:8000/v1/a@b|https://host.example:8443/v1/models/x@main
https://me.openai.azure.com/openai/deployments/gpt-4o-2024-08-06/chat/completions?api-version=2024-08-01-preview
git+https://github.com/me/repo@v1.0.2|https://huggingface.co/datasets/x/resolve/main/a.json|tcp://127.0.0.1:5555
docker.io/vllm/vllm-openai:v0.8.5@sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5|me@example.com|local/vllm|train=true
What is the password: the one Ali Baba spoke?|Who passed the Basic Telecommunications Agreement?|the token: 42 is it
Is the bearer entitled to payment?|Basic understanding of physics|Authorization: who gave it?|The bearer 2024 edition
authorization: basic rules of 1998|Password: none; secret: nobody knows|The key = the one to the door|max(x, key=len)
sorted(rows, key=itemgetter(1))|prompt_key=implications|prompt_key='rewrite'|--prompt-key implications|--client-keys x
https://en.wikipedia.org/wiki/@|at 10:30@home|Basic English 850|ASIAPACIFICREGION|disk-usage-2024-11-29-report.txt
export OPENAI_API_KEY=$KEY|SSH_KEY=/home/someone/.ssh/id_rsa|risk-free-rate-of-2024-and-others|task_12345678901234567890
api_key_env=MY_KEY|api_key_env='OPENAI_API_KEY'|compat=version-2.0.1|BYPASS=|author: Basic Books, 2019|secret=False
""".strip().replace("\n", "|").split("|")  # fmt: skip


@pytest.mark.parametrize("usual", USUAL)
def test_usual_names_paths_addresses_and_sentences_stand_as_they_are(usual: str) -> None:
    assert redacted(usual) == usual and (" " in usual or "/" in usual or not holds_key(usual) or "@sha256" in usual)


def drawn(n: int, alphabet: str = ALNUM) -> str:
    return "7" + "".join(random.Random(n).choices(alphabet, k=n - 1))


@pytest.mark.parametrize(
    "text",
    [
        f"sk-{drawn(48)}", f"sk-proj-{drawn(120, ALNUM + '-_')}", f"sk-ant-api03-{drawn(90, ALNUM + '-_')}",
        f"sk-or-v1-{drawn(64, HEX)}", f"sk_live_{drawn(24)}", f"hf_{drawn(34)}", f"hf_{drawn(34)[1:]}x",
        f"ghp_{drawn(36)}", f"github_pat_{drawn(22)}_{drawn(59)}", f"glpat-{drawn(20)}", f"AIza{drawn(35)}",
        f"AKIA{drawn(16, HEX.upper())}", f"xoxb-{drawn(12, HEX)}-{drawn(24)}", f"gsk_{drawn(52)}", f"xai-{drawn(80)}",
        f"nvapi-{drawn(64, ALNUM + '-_')}",
        f"eyJhbGciOiJIUzI1NiJ9.eyJ{drawn(40)}.{drawn(43)}", f"Bearer {drawn(20)}",
        f"Authorization: Basic {drawn(20)}==",
        f"api_key={drawn(12)}", f"api_key = '{drawn(8)}'", f'"password": "{drawn(9)}"', f"password: {drawn(20)}",
        f"https://me:{drawn(9)}@host/v1", f"https://{drawn(20)}@host/v1", f"https://me:a:{drawn(9)}@host",
        f"me:{drawn(9)}@proxy:3128", "export SEAL_JUDGE_KEY=plainsecretvalue12345", "DB_PASS=correcthorse",
        f"MY_CREDENTIALS={drawn(16)}", f"GITHUB_PAT={drawn(12)}", f"db_pass={drawn(12)}", f"AccountKey={drawn(40)}==",
        f"https://x/y?sig={drawn(12)}", f"--api-key {drawn(9)}", f"sk-{drawn(6)}****{drawn(4)}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{drawn(64)}\n-----END",
    ],
)  # fmt: skip
@pytest.mark.parametrize("around", ["{}", "é{}", "see <{}> or not", "x/{} "])
def test_what_has_the_form_of_a_key_is_hidden(text: str, around: str) -> None:
    told, secret = redacted(around.format(text)), max(re.findall(r"\w+", text), key=len)
    assert "***" in told and secret[-6:] not in told and told == redacted(told)


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HUB_DISABLE_IMPLICIT_TOKEN", "true"), ("X_DISABLE_KEY", "a-long-placeholder-1"), ("MAX_TOKENS", "1000000000")]
    + [("OPENAI_API_KEY", value) for value in ("local", "vllm", "ollama", "test", "EMPTY", "true", "no", "sk-1")]
    + [("GOOGLE_APPLICATION_CREDENTIALS", "/home/someone/service-account-1.json"), ("X_KEY", "https://host/")],
)  # fmt: skip
def test_a_placeholder_or_place_in_a_keys_variable_is_no_secret(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("seal_nb.errors._kept", {value} if len(value) < 8 else set())  # also while it is in use
    for said in (value, f"https://host/{value}/v1", f"runs/{value}/run.json is 1000000000", "http://ollama:11434/v1"):
        assert redacted(said) == said
        parameter("output_dir", said)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        *((name, "Xy7-value-of-it", "Xy7-value-of-it") for name in (
            "GITHUB_PAT", "DB_PASS", "MY_CREDENTIALS", "API_KEYS", "HF_TOKENS", "PGPASSWORD", "MYSQL_PWD", "MY_TOKEN_2",
            "SSHPASS",
        )),
        ("A_KEY", "correct-horse-battery-staple", "correct-horse-battery-staple"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=Xy7value9of,x-team=a", "Xy7value9of"),
        ("HTTP_PROXY", "alice:s3cretWord@proxy:3128", "s3cretWord"),
        ("ANY_URL", "redis://:first9part:of-it@host/0 redis://u:other0part@host", "first9part"),
        ("ANY_URL", "redis://:first9part:of-it@host/0 redis://u:other0part@host", "other0part"),
        ("DB_PASS", "Ab1:cdefghi@jklmnop2", "Ab1:cdefghi@jklmnop2"),
        ("PIP_INDEX_URL", "https://Tok3nOfMine@host/simple", "Tok3nOfMine"),
    ],
    ids=range(16),  # pytest puts names of tests into the environment
)  # fmt: skip
def test_a_secret_of_the_environment_is_hidden_in_every_text(
    name: str, value: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert redacted(f"<{secret}>") == f"<{secret}>"
    monkeypatch.setenv(name, value)
    assert redacted(f"<{secret}> api x-team") == "<***> api x-team"
    with pytest.raises(SettingsError, match="question"):
        parameter("question", f"what is {secret}")


def test_questions_and_answers_may_say_what_they_like_and_are_not_changed() -> None:
    for said in (*USUAL, "Is 'password: hunter2hunter2hunter2' one?", "api_key=abcdefgh12, a question", "x" * 200_000):
        parameter("question", said)
    with stand_in(lambda asked: "password: hunter2hunter2hunter2, Bearer abcdefgh12345678") as service:
        client = ApiClient(ApiSettings(base_url=service.url, api_key_env=""), key="hunter2-abcdefgh12-key")
        told = client.one(Ask(model="m", prompt="p", sampling=Sampling())).text
    assert told == "password: hunter2hunter2hunter2, Bearer abcdefgh12345678"


def test_no_text_takes_long_to_redact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", drawn(60))
    starts = [
        "-eyJaaaaaaa",
        "://",
        "://a:",
        "://a@",
        "a:a@",
        "sk-",
        "sk-proj-a",
        "hf_aaaaaaaaaaaaaaa",
        "--a-",
        "-----BEGIN ",
    ]
    starts += [
        "password:",
        "authorization: bearer ",
        "basic   ",
        "key=a",
        "KEY=a",
        "?key=",
        "'api_key':",
        "a",
        "=",
        "ya29.",
    ]
    for start in starts:
        before = time.process_time()
        redacted(start * (59_999 // len(start)))
        assert time.process_time() - before < 0.5, f"{start}: below 0.2 s on a quiet machine"
    before = time.process_time()
    with pytest.raises(DataError, match="'aaaa"):
        checked(TypeAdapter(list[int]).validate_python, "a" * 20_000_000, path="x")
    told = str(SealError(f"start {drawn(60)} {'a' * 10_000_000} {drawn(60)} end"))
    assert time.process_time() - before < 2 and len(told) < 100_000
    assert told.startswith("start *** a") and told.endswith("a *** end") and "10,000,132 characters" in told


def test_a_key_at_the_cut_of_a_long_text_is_not_shown_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seal_nb.errors._MOST", 1_000)
    monkeypatch.setattr("seal_nb.errors._MARGIN", 200)
    key = f"sk-proj-{drawn(150)}"
    for n_before in range(800, 1_010, 10):
        for long in ("." * n_before + key + "." * 2_000, "." * 2_000 + key + "." * n_before):
            assert not is_shown(key, redacted(long))


def test_reports_of_unexpected_errors_command_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seal_nb.results.collect.read_run", Mock(side_effect=ValueError("\x1b[31mevil\u202e")))
    with heard() as said:
        assert main(["summarize", "x.json"]) == 1
    assert "\\u001b[31mevil\\u202e\n" in said.getvalue() and "\x1b" not in said.getvalue()

"""A TTT server as experiments use it (`ttt_server`, `connect`), and requests that are never sent twice (`ask`).

A request is known by its id, which follows from its content and the model. The journal of a run folder has every
reply that came, so a notebook that was stopped sends only what is missing. A request that failed on the server
is not journalled: the next run sends it again. Statistics and result files are made elsewhere.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

from seal_nb.errors import RemoteError, RoundTimeout, SettingsError
from seal_nb.experiments.settings import Training
from seal_nb.grading.choose import check_grader
from seal_nb.protocol import EvalQuestion, GenerateReply, GenerateRequest, TTTReply, TTTRequest, validated
from seal_nb.server.client import DEFAULT_WAIT_S, TTTClient
from seal_nb.server.launch import TTTServer
from seal_nb.server.settings import ServeSettings, SharedSettings
from seal_nb.storage import Journal, content_id, runs_folder
from seal_nb.views.live import Teller

CHARACTERS_A_TOKEN = 4.2  # of English passages and self-edits under the tokenizers in use
SHORT_HOURS = 5 / 60  # a shorter run needs no estimate of its time
READY_TIMEOUT_S = 900.0  # a 7B model from a slow disk takes minutes to load
_NOT_CONTENT = {"request_id", "priority", "traceback"}  # fields that change nothing in the result
SomeRequest = TypeVar("SomeRequest", TTTRequest, GenerateRequest)


class TTT:
    """A TTT server to work with: its client, and the server itself where it was started here. Use it as a context
    manager, or call `close`. A server that was started here ends with it, and with the notebook's kernel."""

    def __init__(
        self,
        client: TTTClient,
        *,
        server: TTTServer | None = None,
        settings: ServeSettings | None = None,
        grader: str = "",
    ) -> None:
        self.client, self.server, self.grader = client, server, grader
        self.settings = server.settings if server else settings

    @cached_property
    def model_id(self) -> str:
        """The identity of the served model (weights, dtype, grader); waits until a worker is ready.

        Raises:
            RoundTimeout: when no worker became ready.
            SettingsError: when the server's grader is not the one that was asked for.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (model_id := self.client.status().model_id):
            if time.monotonic() > deadline:
                raise RoundTimeout(
                    f"no worker of the server at {self.client.where} was ready within {READY_TIMEOUT_S:g} s; "
                    "look at its log (server.log in its run folder)"
                )
            time.sleep(0.5)
        check_grader(self.grader, model_id, where=self.client.where)
        return model_id

    def ready(self) -> TTTClient:
        """The client, once a worker is ready. Raises: RoundTimeout, SettingsError (see `model_id`)."""
        _ = self.model_id
        return self.client

    def another(self, model: str, *, folder: str | Path, n_workers: int = 1) -> "TTT":
        """Start a server of another model with the settings of this one (dtype, threads, grader, …).
        Raises: SettingsError where they are not known, which is so after `connect`."""
        if self.settings is None:
            raise SettingsError(
                f"the settings of the server at {self.client.where} are not known; open it with "
                "ttt_server(model, endpoint=…, …) and the settings that it was started with"
            )
        names = {field.name for field in fields(SharedSettings)} - {"model"}
        shared = {name: getattr(self.settings, name) for name in names}
        return ttt_server(model, folder=folder, n_workers=n_workers, **shared)

    def identified(self, request: SomeRequest) -> SomeRequest:
        """The request with the id that its content and the served model give it."""
        return identified(request, self.model_id)

    def generate(
        self, prompt: str, *, max_tokens: int = 64, temperature: float = 1.0, top_p: float = 0.95, seed: int = 0
    ) -> str:
        """Text that the served model writes after `prompt`, stripped; temperature 0 is greedy."""
        request = GenerateRequest(
            prompts=[prompt], max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, priority=0
        )
        return self.client.generate(request).texts[0].strip()

    def close(self) -> None:
        """Disconnect; end the server if it was started here. Repeated calls do nothing."""
        self.client.close()
        if self.server is not None:
            self.server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def ttt_server(
    model: str = "embedded",
    *,
    endpoint: str = "",
    listen: str = "tcp://127.0.0.1:0",
    folder: str | Path = "runs/server",
    grader: str = "",
    wait_s: float = DEFAULT_WAIT_S,
    **settings: Any,
) -> TTT:
    """Start a TTT server on this machine, or connect to the one at `endpoint` if an endpoint is given.

    Args:
        model: model folder, hub name, or "embedded" (SmolLM2-135M-Instruct).
        endpoint: address ("tcp://gpu07:5555") or endpoint file of a running server; empty: start one.
        listen: address of a server started here; port 0: a free one; other hosts need keys.
        folder: run folder of a server started here (log, kept adapters, results).
        grader: "local", "exact", "f1", "recall" or a judge (docs/graders.md); empty: the server's.
        wait_s: seconds that requests wait for the server at `endpoint` before they raise RoundTimeout.
        **settings: other fields of `server.settings.ServeSettings`, such as n_workers, n_threads, n_slots, dtype,
            deterministic. With an endpoint they say how that server was started (see `TTT.another`).

    Returns:
        The server; close it, or use it in a `with` block.

    Raises:
        SettingsError: for a setting that is unknown or out of range.
        ServerFailed: when the started server does not become ready; the message has the end of its log.
    """
    given = settings | ({"grader": grader} if grader else {})
    server = TTTServer(run_dir=runs_folder(folder), model=model, endpoint=listen, **given)
    if endpoint:
        return TTT(TTTClient(endpoint, wait_s=wait_s), settings=server.settings, grader=grader)
    server.start()
    with ExitStack() as undo:
        undo.callback(server.stop)
        client = TTTClient(server.endpoint)
        undo.pop_all()
    return TTT(client, server=server, grader=grader)


def connect(endpoint: str, *, grader: str = "", wait_s: float = DEFAULT_WAIT_S) -> TTT:
    """Connect to a running TTT server.

    Args:
        endpoint: address ("tcp://gpu07:5555") or endpoint file.
        grader: the grader that the run states; empty: any.
        wait_s: seconds that requests wait for the server before they raise RoundTimeout.
    """
    return TTT(TTTClient(endpoint, wait_s=wait_s), grader=grader)


def identified(request: SomeRequest, model_id: str) -> SomeRequest:
    """The request with the id of its content and its model: the same work has the same id."""
    content = request.model_dump(mode="json", exclude=_NOT_CONTENT)
    return request.model_copy(update={"request_id": content_id([model_id, content])})


def loop_request(
    model_id: str,
    training: Training,
    *,
    texts: Sequence[str] = (),
    questions: Sequence[EvalQuestion] = (),
    keep: str = "",
    **others: Any,
) -> TTTRequest:
    """One inner loop with its id: train on `texts`, ask `questions`; `others` are fields of the request. With `keep`
    the server keeps the adapter. Its name begins so and ends with the id of its content: no two adapters share a name,
    and a resumed run finds its own. Raises: ProtocolError for a value that the protocol does not allow."""
    values = {"train_sequences": list(texts), "eval_questions": list(questions), **training.request_fields(), **others}
    request = identified(validated(TTTRequest, values), model_id)
    if keep:
        named = request.model_copy(update={"adapter_name": f"{keep}-{request.request_id}"})
        request = identified(named, model_id)
    return request


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Replies, and the error texts of requests that failed on the server, both by request id."""

    replies: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def of(self, request: TTTRequest | GenerateRequest) -> Any:
        """The reply to a request. Raises: RemoteError where it failed."""
        key = _key(request)
        if (failure := self.failures.get(key)) is not None:
            raise RemoteError(failure)
        return self.replies[key]


def ask(ttt: TTT, requests: Sequence[SomeRequest], journal: Journal, *, what: str = "adapters") -> Collected:
    """The reply to every request: from the journal, or from the server and then into the journal.

    Args:
        ttt: the server.
        requests: with ids (`identified`); equal ids are sent once.
        journal: of the run folder.
        what: the noun in the progress line.

    Raises:
        RoundTimeout: when the server went away and did not come back.
    """
    wanted = {_key(request): request for request in requests}
    missing = [key for key in wanted if key not in journal]
    kinds = {key: TTTReply if isinstance(one, TTTRequest) else GenerateReply for key, one in wanted.items()}
    replies = {key: kinds[key].model_validate(journal.get(key)) for key in wanted if key in journal}
    failures: dict[str, str] = {}
    tell, arriving = Teller(), ttt.client.run_indexed([wanted[key] for key in missing])
    for done, (index, reply) in enumerate(arriving, start=len(replies) + 1):
        if isinstance(reply, RemoteError):
            failures[missing[index]] = str(reply)
        else:
            journal.append(missing[index], reply.model_dump(mode="json"))
            replies[missing[index]] = reply
        if done * 10 // len(wanted) > (done - 1) * 10 // len(wanted):
            tell(f"{what}: {done} of {len(wanted)}")
    return Collected(replies={key: replies[key] for key in wanted if key in replies}, failures=failures)


def ask_named(
    ttt: TTT, requests: Mapping[str, SomeRequest], journal: Journal, *, what: str = "adapters"
) -> dict[str, Any]:
    """The reply to each named request. Raises: RemoteError for one that failed, once the others are journalled."""
    collected = ask(ttt, list(requests.values()), journal, what=what)
    return {name: collected.of(request) for name, request in requests.items()}


def _key(request: TTTRequest | GenerateRequest) -> str:
    if request.request_id is None:
        raise ValueError("the request has no id; make one with session.identified")
    return request.request_id


def tell_work(
    ttt: TTT, requests: Sequence[TTTRequest], journal: Journal, *, what: str = "to do", price_per_hour: float = 0.0
) -> None:
    """One line: how much work the requests are that the journal has no reply to; nothing where there are none."""
    if left := [request for request in requests if _key(request) not in journal]:
        speed = ttt.client.status().tokens_per_s
        Teller()(f"{what}: {work_of(left, tokens_per_s=speed, price_per_hour=price_per_hour)}")


def n_tokens(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS_A_TOKEN))


def work_of(requests: Iterable[TTTRequest], *, tokens_per_s: float = 0.0, price_per_hour: float = 0.0) -> str:
    """What the requests add up to, such as "8 adapters, 320 optimiser steps, about 15,000 tokens, at most 80 answers".
    A question's baseline answer is generated once. `tokens_per_s`: the measured speed of the server; it adds the time
    of a long training, and with a price its cost."""
    n_adapters = n_steps = n_train = n_answers = 0
    of_base: set[tuple[str, ...]] = set()
    for request in requests:
        if not request.skip_baseline:
            of_base |= {(*request.adapter_stack, question.question) for question in request.eval_questions}
        if request.training_wanted:
            lengths = [min(n_tokens(text), request.max_seq_length) for text in request.train_sequences]
            padded = request.pad_to * len(lengths) if request.padding_in_loss else sum(lengths)
            n_batches = -(-len(lengths) // request.batch_size)
            n_adapters += 1
            n_steps += request.finetune_epochs * -(-n_batches // request.gradient_accumulation_steps)
            n_train += request.finetune_epochs * padded
            n_answers += len(request.eval_questions)
    text = f"{n_adapters:,} adapters, {n_steps:,} optimiser steps, about {n_train:,} tokens, "
    text += f"at most {n_answers + len(of_base):,} answers"
    hours = n_train / tokens_per_s / 3600 if tokens_per_s else 0.0
    if hours < SHORT_HOURS:
        return text
    text += f"; {hours * 60:.0f} min of training at the {tokens_per_s:,.0f} tokens/s of the last minute"
    return f"{text}, {price_per_hour * hours:.2f} at {price_per_hour:g} an hour" if price_per_hour else text


def work_of_texts(
    prompts: Sequence[str], *, k_completions: int, max_tokens: int, price_in: float = 0.0, price_out: float = 0.0
) -> str:
    """What writing `k_completions` texts for each prompt takes at most; prices are of a million tokens."""
    n_texts = k_completions * len(prompts)
    n_in, n_out = k_completions * sum(map(n_tokens, prompts)), n_texts * max_tokens
    text = f"{n_texts:,} texts, about {n_in:,} prompt tokens, at most {n_out:,} new tokens"
    cost = (price_in * n_in + price_out * n_out) / 1e6
    return f"{text}, cost at most {cost:.2f}" if cost else text

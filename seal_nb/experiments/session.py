"""A TTT server as experiments use it (`ttt_server`, `connect`), and requests that are never sent twice (`ask`).

A request is known by its id, which follows from its content and the model. The journal of a run folder has every
reply, so a notebook that was stopped sends only what is missing, and what failed on the server. `ask_control` asks
twenty general questions that no passage is about; they show a collapse, not a change of a few points."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from seal_nb.errors import RemoteError, RoundTimeout, SettingsError
from seal_nb.experiments.settings import Match, Training
from seal_nb.grading.choose import check_grader, make_grader
from seal_nb.metrics import accuracy, if_graded, paired_difference
from seal_nb.protocol import EvalQuestion, GenerateReply, GenerateRequest, TTTReply, TTTRequest, validated
from seal_nb.server.client import DEFAULT_WAIT_S, ServeSettings, SharedSettings, TTTClient, TTTServer
from seal_nb.storage import Journal, content_id, data_file, read_json, runs_folder
from seal_nb.views.live import Progress, say

CHARACTERS_A_TOKEN = 4.2  # of English passages and self-edits under the tokenizers in use
MOST_EPOCHS = 1000  # as the protocol allows
SHORT_HOURS = 5 / 60  # a shorter run needs no estimate of its time
READY_TIMEOUT_S = 900.0  # a 7B model from a slow disk takes minutes to load
_NOT_CONTENT = {"request_id", "priority", "traceback"}  # fields that change nothing in the result
SomeRequest = TypeVar("SomeRequest", TTTRequest, GenerateRequest)


@dataclass(eq=False)
class TTT(AbstractContextManager["TTT"]):
    """A TTT server to work with, and the server itself if it is this notebook's own. Use it as a context manager, or
    call `close`. An own server ends with it, and with the notebook's kernel. It starts when `client` is first used, so
    settings that do not fit are refused before any model is loaded; `ready` starts it at once."""

    _client: TTTClient
    _: KW_ONLY
    server: TTTServer | None = None
    settings: ServeSettings | None = None  # None: not known
    grader: str = ""
    _is_closed: bool = field(init=False, default=False)

    @property
    def where(self) -> str:
        """Endpoint file or address."""
        return self._client.where

    @cached_property
    def client(self) -> TTTClient:
        """The client. Raises: ServerFailed with the end of the log, if no server starts; SettingsError once closed."""
        if self._is_closed:
            raise SettingsError("this TTT server is closed; call ttt_server or connect again")
        if self.server is not None:
            self.server.start()
        return self._client

    @cached_property
    def model_id(self) -> str:
        """The identity of the served model (weights, dtype, grader); waits until a worker is ready.
        Raises: RoundTimeout when none is, SettingsError for a grader that is not the one that was asked for."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (model_id := self.client.status().model_id):
            if time.monotonic() > deadline:
                what = f"no worker of the server at {self.where} was ready within {READY_TIMEOUT_S:g} s"
                raise RoundTimeout(f"{what}; look at its log (server.log in its run folder)")
            time.sleep(0.5)
        check_grader(self.grader, model_id, where=self.where)
        return model_id

    def ready(self) -> TTTClient:
        """The client, once a worker is ready. Raises: ServerFailed, RoundTimeout, SettingsError (see `model_id`)."""
        _ = self.model_id
        return self.client

    def another(self, model: str, *, folder: str | Path, n_workers: int = 1) -> "TTT":
        """A server of another model with the settings of this one. Raises: SettingsError (see `known_settings`)."""
        known = self.known_settings()
        shared = {one.name: getattr(known, one.name) for one in fields(SharedSettings) if one.name != "model"}
        return ttt_server(model, folder=folder, n_workers=n_workers, **shared)

    def known_settings(self) -> ServeSettings:
        """How the server was started. Raises: SettingsError where that is not known, which is so after `connect`."""
        if self.settings is None:
            raise SettingsError(
                f"the settings of the server at {self.where} are not known; open it with "
                "ttt_server(model, endpoint=…, …) and the settings that it was started with"
            )
        return self.settings

    def generate(
        self, prompt: str, *, max_tokens: int = 64, temperature: float = 1.0, top_p: float = 0.95, seed: int = 0
    ) -> str:
        """Text that the served model writes after `prompt`, stripped; temperature 0 is greedy."""
        how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        request = validated(GenerateRequest, {"prompts": [prompt], **how})
        return self.client.generate(request).texts[0].strip()

    def close(self) -> None:
        """Disconnect; end the server if it was started here. Repeated calls do nothing."""
        self._is_closed = True
        self.__dict__.pop("client", None)
        self._client.close()
        if self.server is not None:
            self.server.stop()

    def __exit__(self, *exception: object) -> None:
        self.close()


def ttt_server(
    model: str | Path = "embedded",
    *,
    endpoint: str = "",
    listen: str = "tcp://127.0.0.1:0",
    folder: str | Path = "runs/server",
    grader: str = "",
    wait_s: float = DEFAULT_WAIT_S,
    **settings: Any,
) -> TTT:
    """A TTT server of this machine, or the one at `endpoint` if an endpoint is given.

    Args:
        model: model folder, hub name, or "embedded" (SmolLM2-135M-Instruct).
        endpoint: endpoint file or address of a running server; empty: start one. A server of this package on another
            machine needs its keys, which are found through its endpoint file only.
        listen: address of a server started here; port 0: a free one; other hosts need keys.
        folder: run folder of a server started here (log, kept adapters, results).
        grader: "local", "exact", "f1", "recall" or a judge (docs/graders.md); empty: the server's.
        wait_s: seconds that requests wait for the server at `endpoint` before they raise RoundTimeout.
        **settings: other fields of `server.client.ServeSettings`, such as n_workers, n_threads, n_slots, dtype,
            deterministic. With an endpoint they say how that server was started (see `TTT.another`).

    Returns:
        The server; close it, or use it in a `with` block. One of this machine starts at its first use.

    Raises:
        SettingsError: for a setting or grader that is unknown or out of range, and for a judge without its key."""
    given = settings | ({"grader": grader} if grader else {})
    if grader and not endpoint:
        make_grader(grader)  # refuses an unknown grader, and a judge without its key
    server = TTTServer(run_dir=runs_folder(folder), model=str(model), endpoint=listen, **given)
    if endpoint:
        return TTT(TTTClient(endpoint, wait_s=wait_s), settings=server.settings, grader=grader)
    return TTT(TTTClient(server.endpoint), server=server, settings=server.settings, grader=grader)


def connect(endpoint: str, *, grader: str = "", wait_s: float = DEFAULT_WAIT_S) -> TTT:
    """Connect to a running TTT server.

    Args:
        endpoint: endpoint file (`endpoint.json` in the run folder of the server), or address. A server of this package
            on another machine needs its keys, which are found through the file only.
        grader: the grader that the run states; empty: any.
        wait_s: seconds that requests wait for the server before they raise RoundTimeout.

    Returns:
        The server. It goes on when this `TTT` is closed."""
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
    return _kept(identified(validated(TTTRequest, values), model_id), model_id, keep)


def _kept(request: TTTRequest, model_id: str, keep: str) -> TTTRequest:
    name = {"adapter_name": f"{keep}-{request.request_id}"}
    return identified(request.model_copy(update=name), model_id) if keep else request


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Replies, and the error texts of requests that failed on the server, both by request id."""

    replies: dict[str, Any]
    failures: dict[str, str]

    def of(self, request: TTTRequest | GenerateRequest) -> Any:
        """The reply to a request. Raises: RemoteError where it failed."""
        if (error := self.failures.get(str(request.request_id))) is not None:
            raise RemoteError(error)
        return self.replies[str(request.request_id)]


def ask(
    ttt: TTT,
    requests: Sequence[SomeRequest],
    journal: Journal,
    *,
    what: str = "adapters",
    work: str = "",
    price_per_hour: float = 0.0,
) -> Collected:
    """The reply to every request (with an id; equal ids are sent once): from the journal, or from the server and then
    into the journal. `what` is the noun in the progress line. `work`: if given, a line that begins with it is
    printed first and says how much is left. Raises: RoundTimeout when the server went away and did not come back,
    ValueError for a request without an id."""
    wanted = {str(request.request_id): request for request in requests}
    if "None" in wanted:
        raise ValueError("a request has no id, so that its reply could not be found again")
    missing = [request for key, request in wanted.items() if key not in journal]
    if trainings := [request for request in missing if work and isinstance(request, TTTRequest)]:
        speed = ttt.client.status().tokens_per_s
        say(f"{work}: {work_of(trainings, tokens_per_s=speed, price_per_hour=price_per_hour)}")
    kinds = {key: TTTReply if isinstance(request, TTTRequest) else GenerateReply for key, request in wanted.items()}
    replies = {key: kind.model_validate(journal.get(key)) for key, kind in kinds.items() if key in journal}
    failures, progress = dict[str, str](), Progress(what)
    coming = ttt.client.run_indexed(missing) if missing else ()
    for done, (index, reply) in enumerate(coming, start=len(replies) + 1):
        key = str(missing[index].request_id)
        if isinstance(reply, RemoteError):
            failures[key] = str(reply)
        else:
            journal.append(key, reply.model_dump(mode="json"))
            replies[key] = reply
        progress.at(done, len(wanted))
    return Collected(replies={key: replies[key] for key in wanted if key in replies}, failures=failures)


def ask_named(ttt: TTT, requests: Mapping[str, SomeRequest], journal: Journal, **how: Any) -> dict[str, Any]:
    """The reply to each named request; `how` is as for `ask`.
    Raises: RemoteError for one that failed, once the others are journalled."""
    collected = ask(ttt, list(requests.values()), journal, **how)
    return {name: collected.of(request) for name, request in requests.items()}


def general_questions() -> list[EvalQuestion]:
    """The shipped questions, without a title."""
    return [EvalQuestion(**entry) for entry in read_json(data_file("general_questions.json"))]


def ask_control(
    ttt: TTT, journal: Journal, stacks: Mapping[str, Sequence[str]], training: Training, *, seed: int
) -> dict[str, TTTReply]:
    """The general questions asked of the base ("never edited") and of each named stack of kept adapters.
    Raises: RemoteError where one failed."""
    how: dict[str, Any] = {"skip_training": True, "seed": seed}
    requests = {
        name: loop_request(ttt.model_id, training, questions=general_questions(), adapter_stack=list(stack), **how)
        for name, stack in {"never edited": (), **stacks}.items()
    }
    return ask_named(ttt, requests, journal, what="general questions")


def control_frame(replies: Mapping[str, TTTReply]) -> pd.DataFrame:
    """One row for each model: accuracy on the general questions, answers lost and won, the paired change."""
    rows = []
    before = next((reply.adapter_correct for reply in replies.values()), [])
    for name, reply in replies.items():
        after = reply.adapter_correct
        pairs = list(zip(before, after, strict=True))
        lost, won = pairs.count((True, False)), pairs.count((False, True))
        change = if_graded(paired_difference, [[a] for a in after], [[b] for b in before], unit="questions")
        rows.append((name, len(after), accuracy(after), lost, won, change and change.sentence()))
    return pd.DataFrame(rows, columns=["model", "questions", "accuracy", "lost", "won", "change"])


def n_tokens(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS_A_TOKEN))


def cost_of(request: TTTRequest) -> dict[str, int]:
    """The optimiser ``steps`` of a training, and about how many ``tokens`` it trains on."""
    if not request.training_wanted:
        return {"steps": 0, "tokens": 0}
    lengths = [min(n_tokens(text), request.max_seq_length) for text in request.train_sequences]
    padded = request.pad_to * len(lengths) if request.padding_in_loss else sum(lengths)
    n_batches = -(-len(lengths) // request.batch_size)
    steps = request.finetune_epochs * -(-n_batches // request.gradient_accumulation_steps)
    return {"steps": steps, "tokens": request.finetune_epochs * padded}


def matched(planned: Sequence[tuple[str, int, TTTRequest]], match: Match, *, model_id: str) -> list[TTTRequest]:
    """The requests, given with their arm and passage, with the epochs of shorter arms repeated: as many as bring the
    steps or tokens (`match`) closest to those of the longest arm on the passage, never fewer. passage_matched always
    has the steps of that arm. The control `shuffled` is not the longest: its text is of another passage."""
    longest, found = dict[tuple[str, int], int](), list[TTTRequest]()
    for arm, passage, request in planned:
        for measure, cost in cost_of(request).items() if arm != "shuffled" else ():
            longest[measure, passage] = max(longest.get((measure, passage), 0), cost)
    for arm, passage, request in planned:
        measure = "steps" if match == "none" or arm == "passage_matched" else match
        if request.training_wanted and (arm == "passage_matched" or match != "none"):
            share = longest.get((measure, passage), 0) / cost_of(request)[measure]
            epochs = min(MOST_EPOCHS, round(request.finetune_epochs * share))
            if epochs > request.finetune_epochs:
                keep = str(request.adapter_name or "").rpartition("-")[0]  # another adapter has another name
                update = {"finetune_epochs": epochs, "adapter_name": None}
                request = _kept(identified(request.model_copy(update=update), model_id), model_id, keep)
        found.append(request)
    return found


def work_of(requests: Sequence[TTTRequest], *, tokens_per_s: float = 0.0, price_per_hour: float = 0.0) -> str:
    """What the requests add up to, such as "8 adapters, 320 optimiser steps, about 15,000 tokens, at most 80 answers".
    `tokens_per_s`, the measured speed of the server, adds the time of a long training, and with a price its cost."""
    trained = [one for one in requests if one.training_wanted]
    n_steps, n_train = (sum(cost_of(one)[measure] for one in trained) for measure in ("steps", "tokens"))
    asked_base = [one for one in requests if not one.skip_baseline]
    of_base = {(*one.adapter_stack, asked.question) for one in asked_base for asked in one.eval_questions}
    n_answers = sum(len(one.eval_questions) for one in trained) + len(of_base)
    text = f"{len(trained):,} adapters, {n_steps:,} optimiser steps, about {n_train:,} tokens, "
    text += f"at most {n_answers:,} answers"
    hours = n_train / tokens_per_s / 3600 if tokens_per_s else 0.0
    if hours < SHORT_HOURS:
        return text
    text += f"; {hours * 60:.0f} min of training at the {tokens_per_s:,.0f} tokens/s of the last minute"
    return f"{text}, {price_per_hour * hours:.2f} at {price_per_hour:g} an hour" if price_per_hour else text


def work_of_texts(prompts: Sequence[str], *, max_tokens: int, price_in: float = 0.0, price_out: float = 0.0) -> str:
    """What writing a text for each prompt takes at most; prices are of a million tokens."""
    n_in, n_out = sum(map(n_tokens, prompts)), len(prompts) * max_tokens
    text = f"{len(prompts):,} texts, about {n_in:,} prompt tokens, at most {n_out:,} new tokens"
    cost = (price_in * n_in + price_out * n_out) / 1e6
    return f"{text}, cost at most {cost:.2f}" if cost else text

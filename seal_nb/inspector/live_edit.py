"""One self-edit changed by hand: trained at once, asked at once, and kept as an arm if it is worth it.

An edit becomes the same request that a run would send for it, plus token scores; ``workbench`` sends it and
has its adapter kept for a while, so that more questions can be put to it. What is worth it is appended to a
run file in the published form. Sends nothing itself and shows nothing.

A TTT server at hand for live edits: started when first needed, watched while it trains.

Calls may come from any thread, since a widget must not hold up its notebook; one request is under way at a
time. What it tells meanwhile is a plain record, read off the server's status. The adapters of the last few
edits are kept for more questions, older ones are deleted: nothing piles up on the server's disk. Shows
nothing.
"""

import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from seal_nb.errors import ProtocolError, RoundTimeout, SealError, SettingsError
from seal_nb.experiments.session import served_model, ttt_client
from seal_nb.experiments.settings import TrainingSettings
from seal_nb.experiments.single_passage import PlannedLoop, SinglePassageSettings, build_run, eval_questions, identified
from seal_nb.inspector.inspection import as_passage, sequences_of
from seal_nb.prompts import topic_question
from seal_nb.protocol import EvalQuestion, TTTReply, TTTRequest
from seal_nb.results.single_passage import EvaluatedPassage, EvaluatedSelfEdit, run_from_json
from seal_nb.results.statistics import published_statistics
from seal_nb.server.client import DEFAULT_WAIT_S, TTTClient
from seal_nb.server.status import look
from seal_nb.storage import forget_adapters, read_json, write_json

ARM = "live_edit"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A self-edit as somebody wrote it, and how its adapter is trained."""

    text: str
    split_newlines: bool = True
    seed: int = 42
    training: TrainingSettings = field(default_factory=TrainingSettings)


def settings_of_run(settings: Mapping[str, Any], **otherwise: Any) -> TrainingSettings:
    """The training settings that a run file states; ``otherwise`` for what it does not.

    Published files state some under ``lora_params``; ours all of them, under ``training`` too.
    """
    known = {field.name for field in fields(TrainingSettings)}
    ours = {name: value for name, value in (settings.get("training") or {}).items() if name in known}
    told = settings.get("lora_params") or {}
    names = {
        "rank": "lora_rank",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "epochs": "finetune_epochs",
        "lr": "finetune_lr",
        "batch_size": "batch_size",
        "grad_accum_steps": "gradient_accumulation_steps",
        "target_modules": "target_modules",
        "end_mask_substring": "end_mask_substring",
        "padding_in_loss": "padding_in_loss",
    }
    published = {name: told.get(theirs) for theirs, name in names.items()}
    stated = [{n: value for n, value in each.items() if value is not None} for each in (ours, published)]
    return TrainingSettings(**{**otherwise, **stated[0], **stated[1], "soft_scores": True})


def edit_request(evaluated: EvaluatedPassage, edit: Edit, *, model_id: str) -> TTTRequest:
    """The inner loop of an edit, scored token by token, under the id of its content.

    Raises: SettingsError for a value that no server takes.
    """
    try:
        request = TTTRequest(
            train_sequences=sequences_of(evaluated, edit.text, split_newlines=edit.split_newlines),
            eval_questions=eval_questions(as_passage(evaluated)),
            seed=edit.seed,
            return_token_logprobs=True,
            **edit.training.request_fields(),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise SettingsError(f"{name} is {first['input']!r}: {first['msg']}; correct it") from None
    return identified(request, model_id)


def kept_request(request: TTTRequest, adapter_name: str, *, model_id: str) -> TTTRequest:
    """The same inner loop with its adapter kept; another id, so that nobody is answered without training."""
    return identified(request.model_copy(update={"adapter_name": adapter_name}), model_id)


def question_requests(
    evaluated: EvaluatedPassage, question: str, gold: str, trained: TTTRequest, *, model_id: str
) -> tuple[TTTRequest, TTTRequest]:
    """A question of one's own put to the base, and to the base under the adapter that ``trained`` kept.

    Without a gold answer nobody can judge the answers: they come back UNGRADED.
    """
    asked = EvalQuestion(title=evaluated.title, question=topic_question(evaluated.title, question), answer=gold)
    fields: dict[str, Any] = {"eval_questions": [asked], "skip_training": True, "soft_scores": bool(gold)}
    fields |= {"max_new_tokens": trained.max_new_tokens, "chat": trained.chat, "seed": 0}
    base = TTTRequest(**fields)
    adapted = base.model_copy(update={"adapter_stack": [trained.adapter_name]})
    return identified(base, model_id), identified(adapted, model_id)


def completion_record(evaluated: EvaluatedPassage, edit: Edit, request: TTTRequest, reply: TTTReply) -> dict[str, Any]:
    """The edit with its answers as an entry of a run file's ``completions``."""
    run = _run_of_one(evaluated, edit, request, reply)
    made: dict[str, Any] = {
        "origin": ARM,
        "split_newlines": edit.split_newlines,
        "lora_params": edit.training.lora_params(),
        "training": edit.training.request_fields(),
        "epoch_losses": reply.epoch_losses,
        "token_logprobs": [scored.model_dump(mode="json") for scored in reply.token_logprobs],
    }
    return {**run["articles"][0]["completions"][0], **made}


def evaluated_edit(evaluated: EvaluatedPassage, edit: Edit, request: TTTRequest, reply: TTTReply) -> EvaluatedSelfEdit:
    """The edit as a run file would give it back, without writing one."""
    article = {"title": evaluated.title, "completions": [completion_record(evaluated, edit, request, reply)]}
    return run_from_json({"articles": [article]}).passages[0].self_edits[0]


def keep_arm(path: str | Path, evaluated: EvaluatedPassage, edit: Edit, request: TTTRequest, reply: TTTReply) -> Path:
    """Append the edit to a run file, which is made where there is none. The same edit is there once.

    Raises: DataError where the file is there and is no run.
    """
    target = Path(path)
    run = read_json(target) if target.exists() else {**_run_of_one(evaluated, edit, request, reply), "articles": []}
    run_from_json(run, path=target)  # refuses what is no run
    article = _article(run["articles"], evaluated)
    record = completion_record(evaluated, edit, request, reply)
    kept = [one for one in article["completions"] if not _is_same(one, record)]
    article["completions"] = [*kept, record]
    return write_json(target, _with_statistics(run))


def _run_of_one(evaluated: EvaluatedPassage, edit: Edit, request: TTTRequest, reply: TTTReply) -> dict[str, Any]:
    # Whose adapter is kept, and for how long, is no part of what was found out.
    plain = identified(request.model_copy(update={"adapter_name": None}), reply.model_id)
    loop = PlannedLoop(passage=0, self_edit=0, repeat=0, text=edit.text, request=plain)
    settings = SinglePassageSettings(
        k_completions=1, split_newlines=edit.split_newlines, seed=edit.seed, training=edit.training
    )
    run = build_run(
        [as_passage(evaluated)],
        [loop],
        {loop.request_id: reply},
        settings,
        model=reply.model_id,
        dataset="",
        timestamp="",
    )
    # Each edit has settings of its own; what stands above them would be true of one only.
    of_one = ("lora_params", "seed", "split_newlines", "training")
    return {key: entry for key, entry in run.items() if key not in of_one} | {"arm": ARM}


def _article(articles: list[dict[str, Any]], evaluated: EvaluatedPassage) -> dict[str, Any]:
    about = {"title": evaluated.title, "context": evaluated.context}
    for article in articles:
        if {key: article.get(key) for key in about} == about:
            return article
    articles.append({"stats": {}, **about, "completions": [], "prompt": evaluated.prompt or ""})
    return articles[-1]


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ids, others = ({loop.get("request_id") for loop in each.get("repeats", [])} for each in (one, other))
    return bool(ids & others)


def _with_statistics(run: dict[str, Any]) -> dict[str, Any]:
    """Counts and published statistics of what the file now holds."""
    completions_P = [article["completions"] for article in run["articles"]]
    stats_P, overall = published_statistics([[one["stats"] for one in mine] for mine in completions_P])
    for article, stats in zip(run["articles"], stats_P, strict=True):
        article["stats"] = stats
    verdicts = [
        question[side]
        for completions in completions_P
        for one in completions
        for question in one["questions"]
        for side in ("baseline_correct", "adapter_correct")
    ]
    return run | {
        "overall": overall,
        "n_articles": len(completions_P),
        "k_completions": max(map(len, completions_P), default=0),
        "n_ungraded": verdicts.count(None),
    }


LOOK_S = 0.5
FORGET_S = 2.0  # the most that is waited for a server to delete adapters
KEPT_EDITS = 4  # whose adapters can still be asked
NAME = "inspector-"  # what the names of these adapters begin with


@dataclass(frozen=True, kw_only=True)
class Step:
    """How far one request is. ``state``: starting, waiting, training, answering, done."""

    state: str
    elapsed_s: float
    step: int = 0
    n_steps: int = 0
    epoch_losses: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LiveResult:
    """What came of an edit."""

    passage: EvaluatedPassage
    edit: Edit
    request: TTTRequest
    reply: TTTReply


@dataclass(frozen=True, kw_only=True)
class OwnAnswer:
    """A question of one's own, without and with the adapter. Verdicts: CORRECT, INCORRECT, UNGRADED."""

    question: str
    gold: str
    base_answer: str
    adapter_answer: str
    base_verdict: str
    adapter_verdict: str
    soft_gain: float | None  # nats; None without a gold answer


Tell = Callable[[Step], object]


class Workbench:
    """``endpoint``: a server that is up (address or endpoint file); empty: one of its own.

    ``server``: what TTTServer takes, for one of its own. ``timeout_s``: the most one request may take;
    ``wait_s``: the most that the server at ``endpoint`` may be away.
    """

    def __init__(
        self,
        endpoint: str = "",
        *,
        run_dir: str | Path,
        timeout_s: float = 3600.0,
        wait_s: float = DEFAULT_WAIT_S,
        **server: Any,
    ) -> None:
        self.endpoint, self.run_dir, self.timeout_s = endpoint, Path(run_dir), timeout_s
        self.server = {"wait_s": wait_s, **server}
        self._session = ExitStack()
        self._client: TTTClient | None = None
        self._model_id = ""
        self._running: str | None = None
        self._lock = threading.Lock()
        self._trained: dict[str, LiveResult] = {}  # by the id of its content, the latest last
        self._names: list[str] = []  # of the adapters that the server keeps for us
        self._session_name, self._n_trained = secrets.token_hex(4), 0

    def train(self, passage: EvaluatedPassage, edit: Edit, *, tell: Tell = lambda _: None) -> LiveResult:
        """Train the edit's adapter and ask the passage's questions; at once if that was done a moment ago.

        Raises: RemoteError, RoundTimeout.
        """
        with self._lock:
            client = self._connected(tell)
            plain = edit_request(passage, edit, model_id=self._model_id)
            began_at, key = time.monotonic(), str(plain.request_id)
            if key not in self._trained:
                request = kept_request(plain, self._new_name(), model_id=self._model_id)
                with self._watched(client, request, tell):
                    reply = self._answered(client, request)
                made = LiveResult(passage=passage, edit=edit, request=request, reply=reply)
            else:
                made = replace(self._trained.pop(key), passage=passage, edit=edit)
            self._trained[key] = made
            self._forget_oldest()
            tell(Step(state="done", elapsed_s=time.monotonic() - began_at))
        return made

    def _answered(self, client: TTTClient, request: TTTRequest) -> TTTReply:
        """The reply; a request that nobody waits for any longer is given up, and leaves no adapter behind."""
        try:
            return client.evaluate(request, timeout_s=self.timeout_s)
        except RoundTimeout:
            with suppress(SealError):
                client.cancel(str(request.request_id))
            raise

    def ask(self, trained: LiveResult, question: str, gold: str = "") -> OwnAnswer:
        """Put one more question to the base and to a trained adapter."""
        with self._lock:
            client = self._connected(lambda _: None)
            requests = question_requests(trained.passage, question, gold, trained.request, model_id=self._model_id)
            replies = {reply.request_id: reply for reply in client.run_round(requests)}
        base, adapted = (replies[request.request_id] for request in requests)
        return _own_answer(question, gold, base, adapted)

    def cancel(self) -> bool:
        """Give up the request under way; who waits for it gets a RemoteError. False where there is none."""
        if self._running is None or self._client is None:
            return False
        with TTTClient(self._client.where) as other:  # the first one waits, in another thread
            return other.cancel(self._running)

    def close(self) -> None:
        """Have our adapters deleted, and end the server if it is our own."""
        if self._client is not None:
            _forget(self._client.where, self._names)
        self._names.clear()
        self._session.close()
        self._client = None
        self._trained.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _connected(self, tell: Tell) -> TTTClient:
        if self._client is None:
            tell(Step(state="starting", elapsed_s=0.0))
            folder = self.run_dir / "server"
            if not self.endpoint:  # a kernel that was killed could not tidy up
                old = (folder / "adapters").glob(f"{NAME}*")
                forget_adapters(folder / "adapters", [path.name for path in old])
            context = ttt_client(self.endpoint, run_dir=folder, **self.server)
            self._client = self._session.enter_context(context)
            self._model_id = served_model(self._client)
            if self.endpoint:  # a notebook ends without closing anything
                weakref.finalize(self, _forget, self._client.where, self._names)
        return self._client

    def _new_name(self) -> str:
        """Never one that was used before: a worker may remember it, or somebody else have it."""
        self._n_trained += 1
        self._names.append(f"{NAME}{self._session_name}-{self._n_trained}")
        return self._names[-1]

    def _forget_oldest(self) -> None:
        for key in list(self._trained)[:-KEPT_EDITS]:
            del self._trained[key]
        wanted = {result.request.adapter_name for result in self._trained.values()}
        doomed = [name for name in self._names if name not in wanted]
        if self._client is not None and _forget(self._client.where, doomed):
            self._names[:] = [name for name in self._names if name in wanted]

    @contextmanager
    def _watched(self, client: TTTClient, request: TTTRequest, tell: Tell) -> Iterator[None]:
        """While the block waits for its reply, tell how far it is."""
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(client.where, str(request.request_id), over, tell), daemon=True)
        self._running = request.request_id
        watcher.start()
        try:
            yield
        finally:
            self._running = None
            over.set()
            watcher.join(timeout=5)


def _forget(where: str, names: list[str]) -> bool:
    """Whether that was done: a server that cannot delete adapters, or is gone, is no reason to fail."""
    if not names:
        return False
    with suppress(SealError), TTTClient(where, wait_s=FORGET_S) as client:
        client.forget(names, timeout_s=FORGET_S)
        return True
    return False


def _watch(where: str, request_id: str, over: threading.Event, tell: Tell) -> None:
    began_at, trained = time.monotonic(), False
    while not over.is_set():
        status = look(where)
        told = [worker.stats.get("training", {}) for worker in status.workers] if status else []
        mine = next((jobs[request_id] for jobs in told if request_id in jobs), None)
        trained = trained or mine is not None
        if over.is_set():
            return
        state = "training" if mine else "answering" if trained else "waiting"
        tell(Step(state=state, elapsed_s=time.monotonic() - began_at, **_numbers(mine)))
        over.wait(LOOK_S)


def _numbers(mine: dict[str, Any] | None) -> dict[str, Any]:
    if mine is None:
        return {}
    losses = tuple(float(loss) for loss in mine.get("epoch_losses", ()) if loss is not None)
    return {"step": int(mine["step"]), "n_steps": int(mine["n_steps"]), "epoch_losses": losses}


def _own_answer(question: str, gold: str, base: TTTReply, adapted: TTTReply) -> OwnAnswer:
    """A baseline-only reply has its answers on the baseline's side, whatever adapters lie underneath."""
    if not base.baseline_texts or not adapted.baseline_texts:
        raise ProtocolError("the server replied without an answer; is it a TTT server of this version?")
    scores = [reply.baseline_gold_logprobs for reply in (base, adapted)]
    known = all(score and score[0] is not None for score in scores)
    return OwnAnswer(
        question=question,
        gold=gold,
        base_answer=base.baseline_texts[0],
        adapter_answer=adapted.baseline_texts[0],
        base_verdict=_verdict(base),
        adapter_verdict=_verdict(adapted),
        soft_gain=scores[1][0] - scores[0][0] if known else None,  # type: ignore[operator]
    )


def _verdict(reply: TTTReply) -> str:
    correct = reply.baseline_correct[0]
    return {True: "CORRECT", False: "INCORRECT", None: "UNGRADED"}[correct]

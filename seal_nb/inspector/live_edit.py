"""One edited self-edit: its adapter is trained on a TTT server, and the result can be kept in a run file.

An edit becomes the request that a run would send for it, plus values of single tokens. ``EditTrainer`` starts a server
when it is first needed, reports progress, and keeps the adapters of the last edits on the server for further questions.
Calls may come from any thread; one request runs at a time.
"""

import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
from pydantic import ValidationError

from seal_nb.errors import RoundTimeout, SealError, SettingsError
from seal_nb.experiments.session import TTT, identified, ttt_server
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import PlannedLoop, SinglePassageSettings, build_run, eval_questions
from seal_nb.inspector.inspection import VERDICTS, as_passage, sequences_of
from seal_nb.inspector.tokens import TokenTexts, named_texts
from seal_nb.prompts import topic_question
from seal_nb.protocol import EvalQuestion, TTTReply, TTTRequest
from seal_nb.results.single_passage import EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun
from seal_nb.server.client import DEFAULT_WAIT_S, TTTClient
from seal_nb.server.status import look
from seal_nb.storage import forget_adapters, read_json, write_json

ARM = "live_edit"
POLL_S = 0.5  # between two looks at the server's status
FORGET_S = 2.0  # the longest wait for a server to delete adapters
KEPT_EDITS = 4  # the last edits whose adapters stay on the server
ADAPTER_PREFIX = "inspector-"
STATES = {
    "starting": "starting a server and loading the model",
    "waiting": "waiting for a slot",
    "training": "training",
    "answering": "answering the questions",
    "done": "done",
}
PUBLISHED_NAMES = {"rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "epochs": "finetune_epochs",
                   "lr": "finetune_lr", "grad_accum_steps": "gradient_accumulation_steps"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Edit:
    """The text of a self-edit, and how its adapter is trained."""

    text: str
    split_newlines: bool = True
    seed: int = 42
    training: Training = field(default_factory=Training)


def settings_of_run(settings: Mapping[str, Any]) -> Training:
    """The training settings that a run file states, with soft scores on.

    Published files state some of them under ``lora_params``; ours state all of them, under ``training`` too.
    """
    known = {field.name for field in fields(Training)}
    ours = settings.get("training") or {}
    published = {PUBLISHED_NAMES.get(key, key): value for key, value in (settings.get("lora_params") or {}).items()}
    stated = [*ours.items(), *published.items()]
    values = {name: value for name, value in stated if name in known and value is not None}
    return Training(**(values | {"soft_scores": True}))


def edit_request(evaluated: EvaluatedPassage, edit: Edit, *, model_id: str) -> TTTRequest:
    """The request that trains and evaluates an edit. Its id follows from its content.

    Raises: SettingsError for a value that the protocol does not allow.
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


@dataclass(frozen=True, kw_only=True)
class TrainedEdit:
    """An edit with the server's reply."""

    passage: EvaluatedPassage
    edit: Edit
    request: TTTRequest
    reply: TTTReply

    def summary(self) -> str:
        """What the adapter did, in one sentence."""
        reply, losses = self.reply, self.losses
        loss = f", loss {losses[0]:.2f} → {losses[-1]:.2f}" if losses else ""
        before, after = (
            "–" if one is None else f"{one:.0%}" for one in (reply.baseline_accuracy, reply.adapter_accuracy)
        )
        return f"accuracy {before} → {after} after {reply.train_steps} steps{loss}"

    @property
    def losses(self) -> list[float]:
        """Mean loss of each epoch, in nats per token, without those that are not finite."""
        return [loss for loss in self.reply.epoch_losses if loss is not None]

    def tokens(self, *kinds: str) -> TokenTexts:
        """The gold answers, the passage and the train sequences token by token; kinds as in ``named_texts``."""
        questions = [(one.question, one.answer) for one in self.request.eval_questions]
        return TokenTexts(named_texts(self.reply.token_logprobs, questions, kinds))

    def self_edit(self) -> EvaluatedSelfEdit:
        """The edit as a run file would give it back; no file is written."""
        article = {"title": self.passage.title, "completions": [self._completion()]}
        return SinglePassageRun(value={"articles": [article]}).passages[0].self_edits[0]

    def keep(self, path: str | Path) -> Path:
        """Appends the edit to a run file, or makes the file. Keeping the same edit again replaces it.

        Raises: DataError if the file exists and is not a run.
        """
        target = Path(path)
        value = read_json(target) if target.exists() else {**self._run(), "articles": []}
        run = SinglePassageRun(value=value, path=target)  # raises if it is not a run
        article = self._article_in(value["articles"])
        mine = self._completion()
        ids = _request_ids(mine)
        article["completions"] = [one for one in article["completions"] if not ids & _request_ids(one)] + [mine]
        run.fill_statistics()
        numbers = [len(one["completions"]) for one in value["articles"]]
        return write_json(target, value | {"n_articles": len(numbers), "k_completions": max(numbers)})

    def _run(self) -> dict[str, Any]:
        """A run file of this edit alone, without the settings that are the edit's own."""
        # The name of the kept adapter does not belong to the result, so the id is that of the request without it.
        plain = identified(self.request.model_copy(update={"adapter_name": None}), self.reply.model_id)
        loop = PlannedLoop(passage=0, self_edit=0, repeat=0, text=self.edit.text, request=plain)
        settings = SinglePassageSettings(k_completions=1, training=self.edit.training)
        replies = {loop.request_id: self.reply}
        run = build_run([as_passage(self.passage)], [loop], replies, settings, model=self.reply.model_id)
        of_one_edit = ("lora_params", "seed", "split_newlines", "training")
        return {key: value for key, value in run.items() if key not in of_one_edit} | {"arm": ARM}

    def _completion(self) -> dict[str, Any]:
        completion: dict[str, Any] = self._run()["articles"][0]["completions"][0]
        return completion | {
            "origin": ARM,
            "split_newlines": self.edit.split_newlines,
            "lora_params": self.edit.training.lora_params(),
            "training": self.edit.training.request_fields(),
            "epoch_losses": self.reply.epoch_losses,
            "token_logprobs": [scored.model_dump(mode="json") for scored in self.reply.token_logprobs],
        }

    def _article_in(self, articles: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"title": self.passage.title, "context": self.passage.context}
        for article in articles:
            if {key: article.get(key) for key in about} == about:
                return article
        articles.append({"stats": {}, **about, "completions": [], "prompt": self.passage.prompt or ""})
        return articles[-1]


def _request_ids(completion: Mapping[str, Any]) -> set[Any]:
    return {loop.get("request_id") for loop in completion.get("repeats", [])}


@dataclass(frozen=True, kw_only=True)
class Step:
    """The progress of one request. ``state``: one of STATES."""

    state: str
    elapsed_s: float = 0.0
    step: int = 0
    n_steps: int = 0
    epoch_losses: tuple[float, ...] = ()

    def __str__(self) -> str:
        return STATES[self.state] + (f", step {self.step} of {self.n_steps}" if self.n_steps else "")


Tell = Callable[[Step], object]


class EditTrainer:
    """Trains edits on a TTT server and asks their adapters questions.

    Args:
        endpoint: Address or endpoint file of a running server. Empty: one is started when it is first needed.
        folder: Folder for the files of a server that is started here.
        timeout_s: The longest time that one request may take.
        wait_s: How long to wait for the server at ``endpoint`` if it is away.
        server: Settings of a server that is started here, as ``seal.ttt_server`` takes them.
    """

    def __init__(
        self,
        endpoint: str = "",
        *,
        folder: str | Path,
        timeout_s: float = 3600.0,
        wait_s: float = DEFAULT_WAIT_S,
        **server: Any,
    ) -> None:
        self.endpoint, self.folder, self.timeout_s = endpoint, Path(folder), timeout_s
        self.server = {"wait_s": wait_s, **({} if endpoint else server)}
        self._ttt: TTT | None = None
        self._running: str | None = None  # id of the request
        self._lock = threading.Lock()
        self._trained: dict[str, TrainedEdit] = {}  # by the id of the request without adapter name, the latest last
        self._names: list[str] = []  # of our adapters on the server
        self._session_name, self._n_trained = secrets.token_hex(4), 0

    def train(self, passage: EvaluatedPassage, edit: Edit, *, tell: Tell = lambda _: None) -> TrainedEdit:
        """Trains the edit's adapter and asks the passage's questions. One of the last edits is not trained again.

        Args:
            passage: The passage whose self-edit was edited.
            edit: Text and settings.
            tell: Called with each ``Step``, possibly from another thread.

        Raises: RemoteError if the server reports an error or the request was cancelled; RoundTimeout.
        """
        with self._lock:
            ttt = self._connected(tell)
            plain = edit_request(passage, edit, model_id=ttt.model_id)
            key = str(plain.request_id)
            if key in self._trained:
                trained = replace(self._trained.pop(key), passage=passage, edit=edit)
            else:
                # Workers remember adapter names and other sessions have their own, so a name is never used twice.
                self._n_trained += 1
                self._names.append(f"{ADAPTER_PREFIX}{self._session_name}-{self._n_trained}")
                request = ttt.identified(plain.model_copy(update={"adapter_name": self._names[-1]}))
                with self._watched(ttt.client, request, tell):
                    reply = self._reply(ttt.client, request)
                trained = TrainedEdit(passage=passage, edit=edit, request=request, reply=reply)
            self._trained[key] = trained
            self._forget_oldest(ttt)
            tell(Step(state="done", epoch_losses=tuple(trained.losses)))
        return trained

    def _reply(self, client: TTTClient, request: TTTRequest) -> TTTReply:
        try:
            return client.evaluate(request, timeout_s=self.timeout_s)
        except RoundTimeout:
            with suppress(SealError):  # a cancelled request leaves no adapter behind
                client.cancel(str(request.request_id))
            raise

    def ask(self, trained: TrainedEdit, question: str, gold: str = "") -> pd.DataFrame:
        """Asks the base model and the edit's adapter one more question. Without a gold answer it is not graded.

        Returns: One row: both answers, verdicts, and the change in log-probability of the gold answer in nats.
        """
        with self._lock:
            ttt = self._connected(lambda _: None)
            requests = [ttt.identified(one) for one in question_requests(trained, question, gold)]
            replies = {reply.request_id: reply for reply in ttt.client.run_round(requests)}
        # A request without training has its answers on the baseline's side, with and without adapters.
        sides = [replies[request.request_id] for request in requests]
        before, after = (side.baseline_gold_logprobs[0] if side.baseline_gold_logprobs else None for side in sides)
        row = {
            "question": question,
            "gold": gold or None,
            "without adapter": sides[0].baseline_texts[0],
            "with adapter": sides[1].baseline_texts[0],
            "verdicts": " → ".join(VERDICTS[side.baseline_correct[0]] for side in sides),
            "soft_gain": None if before is None or after is None else after - before,
        }
        return pd.DataFrame([row]).astype({"soft_gain": float})

    def cancel(self) -> bool:
        """Cancels the running request; ``train`` then raises RemoteError. False if none is running."""
        if self._running is None or self._ttt is None:
            return False
        with TTTClient(self._ttt.client.where) as other:  # the first client is waiting in another thread
            return other.cancel(self._running)

    def close(self) -> None:
        """Deletes our adapters, and stops the server if it was started here."""
        if self._ttt is not None:
            _forget(self._ttt.client.where, self._names)
            self._ttt.close()
        self._ttt = None
        self._names.clear()
        self._trained.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _connected(self, tell: Tell) -> TTT:
        if self._ttt is None:
            tell(Step(state="starting"))
            folder = self.folder / "server"
            if not self.endpoint:  # adapters of a kernel that was killed
                old = (folder / "adapters").glob(f"{ADAPTER_PREFIX}*")
                forget_adapters(folder / "adapters", [path.name for path in old])
            self._ttt = ttt_server(endpoint=self.endpoint, folder=folder, **self.server)
            if self.endpoint:  # a notebook that ends does not call close
                weakref.finalize(self, _forget, self._ttt.client.where, self._names)
        return self._ttt

    def _forget_oldest(self, ttt: TTT) -> None:
        for key in list(self._trained)[:-KEPT_EDITS]:
            del self._trained[key]
        wanted = {trained.request.adapter_name for trained in self._trained.values()}
        unwanted = [name for name in self._names if name not in wanted]
        if unwanted and _forget(ttt.client.where, unwanted):
            self._names[:] = [name for name in self._names if name in wanted]

    @contextmanager
    def _watched(self, client: TTTClient, request: TTTRequest, tell: Tell) -> Iterator[None]:
        """Reports progress while the block waits for the reply."""
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


def question_requests(trained: TrainedEdit, question: str, gold: str) -> tuple[TTTRequest, TTTRequest]:
    """One question to the base model, and the same to the base model with the edit's adapter; both without an id."""
    title, request = trained.passage.title, trained.request
    asked = EvalQuestion(title=title, question=topic_question(title, question), answer=gold)
    values: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "chat": request.chat, "seed": 0}
    base = TTTRequest(eval_questions=[asked], skip_training=True, soft_scores=bool(gold), **values)
    return base, base.model_copy(update={"adapter_stack": [request.adapter_name]})


def _forget(where: str, names: list[str]) -> bool:
    """Whether the server deleted the adapters. A server that cannot, or that is gone, is no error."""
    with suppress(SealError), TTTClient(where, wait_s=FORGET_S) as client:
        client.forget(names, timeout_s=FORGET_S)
        return True
    return False


def _watch(where: str, request_id: str, over: threading.Event, tell: Tell) -> None:
    began_at, has_trained = time.monotonic(), False
    while not over.is_set():
        status = look(where)
        by_worker = [worker.stats.get("training", {}) for worker in status.workers] if status else []
        job: dict[str, Any] = next((jobs[request_id] for jobs in by_worker if request_id in jobs), {})
        has_trained = has_trained or bool(job)
        if over.is_set():
            return
        step = Step(
            state="training" if job else "answering" if has_trained else "waiting",
            elapsed_s=time.monotonic() - began_at,
            step=int(job.get("step", 0)),
            n_steps=int(job.get("n_steps", 0)),
            epoch_losses=tuple(float(loss) for loss in job.get("epoch_losses", ()) if loss is not None),
        )
        tell(step)
        over.wait(POLL_S)

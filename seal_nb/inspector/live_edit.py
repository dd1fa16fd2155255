"""One edited self-edit: its adapter is trained on a TTT server, and the result can be kept in a run file.

An edit becomes the request that a run would send for it, plus values of single tokens. ``EditTrainer`` starts a server
when it is first needed and reports progress. The server answers a request that it has answered before at once, and
training is deterministic; so no adapter is kept, and a further question trains the same adapter again.
Calls may come from any thread; one request runs at a time.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import pandas as pd

from seal_nb.errors import RoundTimeout, SealError
from seal_nb.experiments.session import TTT, loop_request, ttt_server
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import PlannedLoop, SinglePassageSettings, build_run, eval_questions
from seal_nb.inspector.inspection import as_passage, sequences_of
from seal_nb.inspector.tokens import TokenTexts, named_texts
from seal_nb.prompts import topic_question
from seal_nb.protocol import EvalQuestion, TTTReply, TTTRequest
from seal_nb.results.run import VERDICT_WORDS
from seal_nb.results.single_passage import EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun
from seal_nb.server.client import DEFAULT_WAIT_S, TTTClient
from seal_nb.server.status import look
from seal_nb.storage import read_json, write_json

ARM = "live_edit"
POLL_S = 0.5  # between two looks at the server's status
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

    Raises: ProtocolError for a value that the protocol does not allow.
    """
    return loop_request(
        model_id,
        edit.training,
        texts=sequences_of(evaluated, edit.text, split_newlines=edit.split_newlines),
        questions=eval_questions(as_passage(evaluated)),
        seed=edit.seed,
        return_token_logprobs=True,
    )


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
        return SinglePassageRun(value=self._run()).passages[0].self_edits[0]

    def keep(self, path: str | Path) -> Path:
        """Appends the edit to a run file, or makes the file. Keeping the same edit again replaces it.

        Raises: DataError if the file exists and is not a run.
        """
        target, mine = Path(path), self._run()
        value = read_json(target) if target.exists() else mine | {"articles": []}
        run = SinglePassageRun(value=value, path=target)  # raises if it is not a run
        (own,) = mine["articles"]
        same = [one for one in value["articles"] if all(one.get(key) == own[key] for key in ("title", "context"))]
        if same:
            others = [one for one in same[0]["completions"] if _request_ids(one) != _request_ids(own["completions"][0])]
            same[0]["completions"] = others + own["completions"]
        else:
            value["articles"].append(own)
        run.fill_statistics()
        numbers = [len(one["completions"]) for one in value["articles"]]
        return write_json(target, value | {"n_articles": len(numbers), "k_completions": max(numbers)})

    def _run(self) -> dict[str, Any]:
        """A run file of this edit alone. It states the edit's own settings at the self-edit, not for the whole run."""
        loop = PlannedLoop(passage=0, self_edit=0, repeat=0, text=self.edit.text, request=self.request)
        settings = SinglePassageSettings(k_completions=1, training=self.edit.training)
        replies = {loop.request_id: self.reply}
        run = build_run([as_passage(self.passage)], [loop], replies, settings, model=self.reply.model_id)
        run["articles"][0]["prompt"] = self.passage.prompt or ""
        run["articles"][0]["completions"][0] |= {
            "origin": ARM,
            "split_newlines": self.edit.split_newlines,
            "lora_params": run["lora_params"],
            "training": run["training"],
            "epoch_losses": self.reply.epoch_losses,
            "token_logprobs": [scored.model_dump(mode="json") for scored in self.reply.token_logprobs],
        }
        of_one_edit = ("lora_params", "seed", "split_newlines", "training")
        return {key: value for key, value in run.items() if key not in of_one_edit} | {"arm": ARM}


def _request_ids(completion: Mapping[str, Any]) -> list[Any]:
    return [loop.get("request_id") for loop in completion.get("repeats", [])]


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

    def train(self, passage: EvaluatedPassage, edit: Edit, *, tell: Tell = lambda _: None) -> TrainedEdit:
        """Trains the edit's adapter and asks the passage's questions. The same edit is not trained again.

        Args:
            passage: The passage whose self-edit was edited.
            edit: Text and settings.
            tell: Called with each ``Step``, possibly from another thread.

        Raises: RemoteError if the server reports an error or the request was cancelled; RoundTimeout.
        """
        with self._lock:
            ttt = self._connected(tell)
            request = edit_request(passage, edit, model_id=ttt.model_id)
            trained = TrainedEdit(passage=passage, edit=edit, request=request, reply=self._reply(ttt, request, tell))
        tell(Step(state="done", epoch_losses=tuple(trained.losses)))
        return trained

    def ask(self, trained: TrainedEdit, question: str, gold: str = "", *, tell: Tell = lambda _: None) -> pd.DataFrame:
        """Asks the base model and the edit's adapter one more question. Without a gold answer it is not graded.

        Returns: One row: both answers, verdicts, and the change in log-probability of the gold answer in nats.
        """
        with self._lock:
            ttt = self._connected(tell)
            reply = self._reply(ttt, ttt.identified(question_request(trained, question, gold)), tell)
        sides = zip(reply.baseline_gold_logprobs, reply.adapter_gold_logprobs, strict=True)
        gains = [after - before for before, after in sides if before is not None and after is not None]
        row = {
            "question": question,
            "gold": gold or None,
            "without adapter": reply.baseline_texts[0],
            "with adapter": reply.adapter_texts[0],
            "verdicts": f"{VERDICT_WORDS[reply.baseline_correct[0]]} → {VERDICT_WORDS[reply.adapter_correct[0]]}",
            "soft_gain": gains[0] if gains else None,
        }
        return pd.DataFrame([row]).astype({"soft_gain": float})

    def cancel(self) -> bool:
        """Cancels the running request; ``train`` then raises RemoteError. False if none is running."""
        if self._running is None or self._ttt is None:
            return False
        with TTTClient(self._ttt.client.where) as other:  # the first client is waiting in another thread
            return other.cancel(self._running)

    def close(self) -> None:
        """Disconnects, and stops the server if it was started here."""
        if self._ttt is not None:
            self._ttt.close()
        self._ttt = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _connected(self, tell: Tell) -> TTT:
        if self._ttt is None:
            tell(Step(state="starting"))
            self._ttt = ttt_server(endpoint=self.endpoint, folder=self.folder / "server", **self.server)
        return self._ttt

    def _reply(self, ttt: TTT, request: TTTRequest, tell: Tell) -> TTTReply:
        """The reply to a request. Meanwhile a thread reports progress."""
        over, self._running = threading.Event(), str(request.request_id)
        watcher = threading.Thread(target=_watch, args=(ttt.client.where, self._running, over, tell), daemon=True)
        watcher.start()
        try:
            return ttt.client.evaluate(request, timeout_s=self.timeout_s)
        except RoundTimeout:
            with suppress(SealError):
                ttt.client.cancel(self._running)
            raise
        finally:
            self._running = None
            over.set()
            watcher.join(timeout=5)


def question_request(trained: TrainedEdit, question: str, gold: str) -> TTTRequest:
    """The training of an edit with another question."""
    title = trained.passage.title
    asked = EvalQuestion(title=title, question=topic_question(title, question), answer=gold)
    changed = {"eval_questions": [asked], "soft_scores": bool(gold), "return_token_logprobs": False}
    return trained.request.model_copy(update=changed)


def _watch(where: str, request_id: str, over: threading.Event, tell: Tell) -> None:
    began_at, state = time.monotonic(), "waiting"
    while not over.is_set():
        status = look(where)
        by_worker = [worker.stats.get("training", {}) for worker in status.workers] if status else []
        job: dict[str, Any] = next((jobs[request_id] for jobs in by_worker if request_id in jobs), {})
        state = "training" if job else "waiting" if state == "waiting" else "answering"
        if over.is_set():
            return
        step = Step(
            state=state,
            elapsed_s=time.monotonic() - began_at,
            step=int(job.get("step", 0)),
            n_steps=int(job.get("n_steps", 0)),
            epoch_losses=tuple(float(loss) for loss in job.get("epoch_losses", ()) if loss is not None),
        )
        tell(step)
        over.wait(POLL_S)

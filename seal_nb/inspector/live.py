"""The live edit: a self-edit is changed, its adapter is trained on a TTT server, and the result can be kept.

An edit becomes the request that a run would send for it. Training is deterministic: no adapter is kept, and a further
question trains the same adapter again. Calls may come from any thread; one request runs at a time."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from seal_nb.errors import redacted
from seal_nb.experiments import single_passage
from seal_nb.experiments.session import TTT, identified, loop_request
from seal_nb.experiments.settings import LORA_PARAMS, Training
from seal_nb.grading.choose import grader_of
from seal_nb.inspector.html import StaticView, TokenTexts, WidgetView, loss_curve, note, page, static_tables, table_html
from seal_nb.inspector.inspection import as_passage, sequences_of
from seal_nb.inspector.widgets import PassageInspector
from seal_nb.passages import text_key
from seal_nb.prompts import topic_question
from seal_nb.protocol import EvalQuestion, TTTReply, TTTRequest
from seal_nb.results.single_passage import EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun
from seal_nb.server.launch import look
from seal_nb.storage import read_json, write_json

ARM = "live_edit"
POLL_S = 0.5  # between two looks at the server's status
TARGETS = {"all linear layers": ("all-linear",), "PEFT's default (published)": ()}

Tell = Callable[[str, Sequence[float]], object]  # what the request is doing, and the losses of its finished epochs


@dataclass(frozen=True, kw_only=True)
class Edit:
    """The text of a self-edit, and how its adapter is trained."""

    text: str
    split_newlines: bool = True
    seed: int = 42
    training: Training = field(default_factory=Training)


def settings_of_run(settings: Mapping[str, Any]) -> Training:
    """The training settings that a run file states, with soft scores on. Published files state some of them under
    ``lora_params``; ours state all of them, under ``training`` too."""
    published = {LORA_PARAMS.get(key, key): value for key, value in (settings.get("lora_params") or {}).items()}
    stated = [*(settings.get("training") or {}).items(), *published.items()]
    known = {name: value for name, value in stated if value is not None and name in Training.__dataclass_fields__}
    return Training(**known | {"soft_scores": True})


def edit_request(evaluated: EvaluatedPassage, edit: Edit, *, model_id: str) -> TTTRequest:
    """The request that trains and evaluates an edit. Its id follows from its content.
    Raises: ProtocolError for a value that the protocol does not allow."""
    return loop_request(
        model_id,
        edit.training,
        texts=sequences_of(evaluated, edit.text, split_newlines=edit.split_newlines),
        questions=single_passage.eval_questions(as_passage(evaluated)),
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
        asked = bool(reply.adapter_texts)  # without questions, a reply says 0.0, as published
        accuracies = (reply.baseline_accuracy, reply.adapter_accuracy) if asked else (None, None)
        before, after = ("–" if one is None else f"{one:.0%}" for one in accuracies)
        return f"accuracy {before} → {after} after {reply.train_steps} steps{loss}"

    @property
    def losses(self) -> list[float]:
        """Mean loss of each epoch, in nats per token, without those that are not finite."""
        return [loss for loss in self.reply.epoch_losses if loss is not None]

    def tokens(self, *kinds: str) -> TokenTexts:
        """The gold answers, the passage and the train sequences token by token; kinds as in ``TokenTexts``."""
        questions = [(one.question, one.answer) for one in self.request.eval_questions]
        return TokenTexts(self.reply.token_logprobs, questions, kinds)

    def question_request(self, question: str, gold: str) -> TTTRequest:
        """The training of this edit with another question."""
        title = self.passage.title
        asked = EvalQuestion(title=title, question=topic_question(title, question), answer=gold)
        changed = {"eval_questions": [asked], "soft_scores": bool(gold), "return_token_logprobs": False}
        return self.request.model_copy(update=changed)

    def self_edit(self) -> EvaluatedSelfEdit:
        """The edit as a run file would give it back; no file is written."""
        return SinglePassageRun(value=self._run()).passages[0].self_edits[0]

    def keep(self, path: str | Path) -> Path:
        """Appends the edit to a run file, or makes the file. Keeping the same edit again replaces it.
        Raises: DataError if the file exists and is not a run."""
        target, mine = Path(path), self._run()
        value = read_json(target) if target.exists() else mine | {"articles": []}
        run = SinglePassageRun(value=value, path=target)  # raises if it is not a run
        (own,) = mine["articles"]
        key = text_key(own["title"], own["context"])
        same = [one for one in value["articles"] if text_key(one["title"], one["context"]) == key]
        if same:
            others = [one for one in same[0]["completions"] if _request_ids(one) != [self.request.request_id]]
            same[0]["completions"] = others + own["completions"]
        else:
            value["articles"].append(own)
        run.fill_statistics()
        numbers = [len(one["completions"]) for one in value["articles"]]
        return write_json(target, value | {"n_articles": len(numbers), "k_completions": max(numbers)})

    def _run(self) -> dict[str, Any]:
        """A run file of this edit alone. It states the edit's own settings at the self-edit, not for the whole run."""
        loop = single_passage.PlannedLoop(passage=0, self_edit=0, repeat=0, text=self.edit.text, request=self.request)
        settings = single_passage.SinglePassageSettings(k_completions=1, training=self.edit.training)
        replies = {loop.request_id: self.reply}
        run = single_passage.build_run([as_passage(self.passage)], [loop], replies, settings, model=self.reply.model_id)
        run["articles"][0]["prompt"] = self.passage.prompt or ""
        run["articles"][0]["completions"][0] |= {
            "origin": ARM,
            "split_newlines": self.edit.split_newlines,
            "lora_params": run.pop("lora_params"),
            "training": run.pop("training"),
            "epoch_losses": self.reply.epoch_losses,
            "token_logprobs": [scored.model_dump(mode="json") for scored in self.reply.token_logprobs],
        }
        del run["seed"], run["split_newlines"]
        return run | {"arm": ARM}


def _request_ids(completion: Mapping[str, Any]) -> list[Any]:
    return [loop.get("request_id") for loop in completion.get("repeats", [])]


class EditTrainer:
    """Trains edits on a server from ``seal.ttt_server`` and asks their adapters questions."""

    def __init__(self, ttt: TTT) -> None:
        self.ttt, self._client = ttt, ttt.client  # an own server starts now, not when a button is pressed
        self._running: str | None = None  # id of the request
        self._lock = threading.Lock()

    def train(self, passage: EvaluatedPassage, edit: Edit, *, tell: Tell = lambda *_: None) -> TrainedEdit:
        """Trains the edit's adapter and asks the passage's questions. The same edit is not trained again. ``tell`` is
        called while the request runs, from another thread, and once at its end. Raises: RemoteError if the server
        reports an error or the request was cancelled; RoundTimeout."""
        request = edit_request(passage, edit, model_id=self.ttt.model_id)
        trained = TrainedEdit(passage=passage, edit=edit, request=request, reply=self._reply(request, tell))
        tell("done", trained.losses)
        return trained

    def ask(self, trained: TrainedEdit, question: str, gold: str = "", *, tell: Tell = lambda *_: None) -> pd.DataFrame:
        """Asks the base model and the edit's adapter one more question. Without a gold answer it is not graded.
        Returns: One row: both answers, verdicts, and the change in log-probability of the gold answer in nats."""
        reply = self._reply(identified(trained.question_request(question, gold), self.ttt.model_id), tell)
        table = single_passage.reply_frame([EvalQuestion(question=question, answer=gold)], reply)
        after, before = reply.adapter_gold_logprobs, reply.baseline_gold_logprobs
        change = pd.Series(after, dtype=float) - pd.Series(before, dtype=float)
        names = {"baseline_answer": "without adapter", "adapter_answer": "with adapter"}
        return table.rename(columns=names).assign(gold=gold or None, soft_gain=change)

    def cancel(self) -> bool:
        """Cancels the running request; ``train`` then raises RemoteError. False if none is running."""
        return self._running is not None and self._client.cancel(self._running)

    def _reply(self, request: TTTRequest, tell: Tell) -> TTTReply:
        """The reply to a request. Meanwhile a thread tells how far it is."""
        with self._lock:
            over, self._running = threading.Event(), str(request.request_id)
            watcher = threading.Thread(target=self._watch, args=(self._running, over, tell), daemon=True)
            watcher.start()
            try:
                return self._client.evaluate(request)
            finally:
                self._running = None
                over.set()
                watcher.join(timeout=5)

    def _watch(self, request_id: str, over: threading.Event, tell: Tell) -> None:
        began_at, doing, losses = time.monotonic(), "waiting for a slot", []
        while not over.is_set():
            status = look(self.ttt.where)
            by_worker = [worker.stats.get("training", {}) for worker in status.workers] if status else []
            # A guest's requests have a name before their id there.
            if job := next((job for jobs in by_worker for key, job in jobs.items() if key.endswith(request_id)), None):
                doing = f"training, step {job['step']} of {job['n_steps']}"
                losses = [loss for loss in job["epoch_losses"] if loss is not None]
            elif doing.startswith("training"):
                doing = "answering the questions"
            if not over.is_set():
                tell(f"{doing}, {time.monotonic() - began_at:.0f} s", losses)
            over.wait(POLL_S)


def progress_line() -> Tell:
    """A line below a cell that shows progress and the loss curve: ``train(..., tell=progress_line())``."""
    from IPython.display import display

    line = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text, losses: line.update({"text/html": _status(text, losses), "text/plain": text}, raw=True)


def _status(text: str, losses: Sequence[float]) -> str:
    return page(f'<span role="status">{escape(text)}</span> {loss_curve(losses)}')


class LiveEdit(WidgetView):
    """Edits the self-edit that is selected in an inspector: a widget in JupyterLab, a table of its settings elsewhere.
    Training runs in a thread, so the notebook stays usable. Edits that are kept go into the run file ``keep_path``."""

    def __init__(self, inspector: PassageInspector, trainer: EditTrainer, *, keep_path: str | Path) -> None:
        self.inspector, self.trainer, self.keep_path = inspector, trainer, Path(keep_path)
        self.result: TrainedEdit | None = None
        self.own_answers = pd.DataFrame()

    def edit(self) -> Edit:
        """What the controls say. Settings without a control are those of the run. Raises: SettingsError."""
        training = replace(self._settings, **{name: control.value for name, control in self.controls.items()})
        return Edit(text=self.text.value, split_newlines=self.splits.value, seed=self.seed.value, training=training)

    def static_view(self) -> StaticView:
        """The text and the settings with which the controls start."""
        values = settings_of_run(self.inspector.settings).request_fields() | {"text": self.inspector.text}
        return static_tables({"": pd.DataFrame([{"live edit": k, "starts with": str(v)} for k, v in values.items()])})

    @cached_property
    def box(self) -> Any:
        """The widget, made when it is first shown."""
        import ipywidgets as w

        style = {"description_width": "6em"}
        small = {"style": style, "layout": w.Layout(width="14em")}
        self.text = w.Textarea(rows=9, layout=w.Layout(width="100%"), placeholder="one statement a line")
        self.controls = {
            "lora_rank": w.BoundedIntText(min=1, max=512, description="rank", **small),
            "lora_alpha": w.BoundedFloatText(min=0.001, max=4096, description="alpha", **small),
            "finetune_epochs": w.BoundedIntText(min=1, max=1000, description="epochs", **small),
            "finetune_lr": w.FloatText(description="lr", **small),
            "max_new_tokens": w.BoundedIntText(min=1, max=8192, description="max tokens", **small),
            "target_modules": w.Dropdown(description="layers", style=style),
        }
        self.seed = w.BoundedIntText(value=42, min=0, max=2**31 - 1, description="seed", **small)
        self.splits = w.Checkbox(description="one sequence a line", indent=False)
        self.train_button = w.Button(description="Train and ask", button_style="primary", icon="play")
        self.cancel_button = w.Button(description="Cancel", disabled=True)
        self.keep_button = w.Button(description="Keep as an arm", disabled=True, icon="save")
        reset_button = w.Button(description="Text of the run")
        self.unshown, self.status, self.outcome, self.answered = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.question = w.Text(placeholder="a question of your own", layout=w.Layout(width="28em"))
        self.gold = w.Text(placeholder="right answer (may be empty)", layout=w.Layout(width="16em"))
        self.ask_button = w.Button(description="Ask", disabled=True)
        self.train_button.on_click(lambda _: self._in_thread(self._train))
        self.ask_button.on_click(lambda _: self._in_thread(self._ask))
        self.keep_button.on_click(lambda _: self._in_thread(self._keep))
        self.cancel_button.on_click(lambda _: threading.Thread(target=self.trainer.cancel, daemon=True).start())
        reset_button.on_click(lambda _: self.fill())
        self.inspector.on_select(self.fill)
        self.fill()
        numbers = [*self.controls.values()]
        lines = [
            numbers[:4],
            [self.seed, *numbers[4:], self.splits],
            [self.train_button, self.cancel_button, self.keep_button, reset_button],
            [self.question, self.gold, self.ask_button],
        ]
        wrapped = w.Layout(flex_flow="row wrap", align_items="center")
        first, second, buttons, own = (w.HBox(line, layout=wrapped) for line in lines)
        parts = [self.text, first, second, self.unshown, buttons, self.status, self.outcome, own, self.answered]
        box = w.VBox(parts, layout=w.Layout(width="100%", overflow="hidden"))
        return box.add_class("seal-nb-widget").add_class("seal-nb-live")

    def fill(self) -> None:
        """Sets the controls to the text and settings of the selected self-edit."""
        stated = self.inspector.settings
        self._settings = settings = settings_of_run(stated)
        self._source = self.inspector.passage, self.inspector.self_edit
        self.text.value, self.splits.value = self.inspector.text, bool(stated.get("split_newlines", True))
        layers = tuple(settings.target_modules)
        of_run = {} if layers in TARGETS.values() else {f"as the run: {', '.join(layers)}": layers}
        self.controls["target_modules"].options = list((TARGETS | of_run).items())
        for name, control in self.controls.items():
            control.value = getattr(settings, name)
        usual = asdict(Training(soft_scores=True))
        unshown = [f"{k} {v}" for k, v in asdict(settings).items() if k not in self.controls and v != usual[k]]
        self.unshown.value = page(note(f"also from the run: {', '.join(unshown)}")) if unshown else ""

    def _in_thread(self, work: Callable[[], None]) -> None:
        """Does the work in a thread and shows the message of an error. Meanwhile only Cancel is enabled."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a thread has no caller that could handle it
                message = escape(redacted(f"{type(error).__name__}: {error}"))  # screen readers read it aloud at once
                self.status.value = page(f'<p class="sn-failure" role="alert">{message}</p>')
            finally:
                self._hold(False)

        self._hold(True)
        threading.Thread(target=run, daemon=True).start()

    def _hold(self, held: bool) -> None:
        self.train_button.disabled = held
        self.cancel_button.disabled = not held
        self.ask_button.disabled = self.keep_button.disabled = held or self.result is None

    def _tell(self, text: str, losses: Sequence[float] = ()) -> None:
        self.status.value = _status(text, losses)

    def _train(self) -> None:
        """Trains, shows the answers and the tokens, and adds the edit to the inspector."""
        passage, self_edit = self._source
        evaluated = self.inspector.inspection.run.passages[passage]
        self._tell("preparing the request")
        self.result = result = self.trainer.train(evaluated, self.edit(), tell=self._tell)
        added = self.inspector.add(passage, result.self_edit())
        inspection = self.inspector.inspection
        graders = [grader_of(one) for one in (inspection.run.settings, {"model": result.reply.model_id})]
        before, after = (name or "an unknown grader" for name in graders)
        answers = inspection.compare_edit(passage, self_edit, added)
        self._tell(result.summary(), result.losses)
        self.outcome.value = page(
            table_html(answers, f"Verdicts before the edit by {before}, after the edit by {after}"),
            f"<details><summary>Token by token</summary>{result.tokens().html()}</details>",
        )

    def _keep(self) -> None:
        if self.result is not None:
            self._tell(f"kept in {self.result.keep(self.keep_path).name}")

    def _ask(self) -> None:
        question = self.question.value.strip()
        if self.result is not None and question:
            answer = self.trainer.ask(self.result, question, self.gold.value.strip(), tell=self._tell)
            self._tell("")
            self.own_answers = pd.concat([answer, self.own_answers])
            self.answered.value = page(table_html(self.own_answers))

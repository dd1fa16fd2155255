"""The live edit as a widget: change the text or a setting, train, read the new answers beside the old.

Training runs in a thread beside the notebook; what it tells is shown as it comes. Errors show their message,
which says the remedy. The work is done by ``seal_nb.inspector.live_edit``, this only shows it.
"""

import html
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from seal_nb.errors import SealError
from seal_nb.experiments.settings import TrainingSettings
from seal_nb.grading.choose import grader_of
from seal_nb.inspector import pages
from seal_nb.inspector.html import failure, note, page, show, sparkline
from seal_nb.inspector.live_edit import (
    Edit,
    LiveResult,
    OwnAnswer,
    Step,
    Workbench,
    evaluated_edit,
    keep_arm,
    settings_of_run,
)
from seal_nb.inspector.tokens import tokens_page
from seal_nb.inspector.widgets import PassageInspector, Twin
from seal_nb.views.live import Teller
from seal_nb.views.tables import Table, somebody_looks_on

TARGETS = {"all linear layers": ("all-linear",), "PEFT's default (published)": ()}
CONTROLLED = ("lora_rank", "lora_alpha", "target_modules", "finetune_epochs", "finetune_lr",
              "max_new_tokens", "soft_scores")  # fmt: skip
STATES = {
    "starting": "starting a server and loading the model",
    "waiting": "waiting for a slot",
    "training": "training",
    "answering": "answering the questions",
    "done": "done",
}


def step_said(step: Step) -> str:
    """One line on how far a request is."""
    steps = f", step {step.step} of {step.n_steps}" if step.n_steps else ""
    return f"{STATES.get(step.state, step.state)}{steps}"


def step_teller() -> Callable[[Step], None]:
    """For a cell that trains: one line in place where somebody looks on; headless what takes long, once.

    Headless only states that every run goes through are told, so that its output is the same each time.
    """
    teller, told = Teller(), set[str]()

    def tell(step: Step) -> None:
        if teller.live:
            teller(step_said(step))
        elif step.state in ("starting", "training") and step.state not in told:
            told.add(step.state)
            teller(STATES.get(step.state, step.state))

    return tell


def unseen_settings(settings: TrainingSettings) -> str:
    """What no control shows and is not as everywhere: trained with all the same."""
    of_run, usual = asdict(settings), asdict(TrainingSettings())
    return ", ".join(
        f"{name} {value}" for name, value in of_run.items() if name not in CONTROLLED and value != usual[name]
    )


class LiveEdit:
    """Below an inspector: edits the self-edit chosen there. ``keep_path``: run file for kept edits."""

    def __init__(self, inspector: PassageInspector, bench: Workbench, *, keep_path: str | Path) -> None:
        self.inspector, self.bench, self.keep_path = inspector, bench, Path(keep_path)
        self.result: LiveResult | None = None
        self.own_answers: list[OwnAnswer] = []
        self._came_from = (0, 0)  # passage, self-edit
        self._settings = TrainingSettings()  # of the run

    def edit(self) -> Edit:
        """What the controls say. Raises: SettingsError."""
        training = replace(
            self._settings,  # what no control shows stays as the run has it
            lora_rank=self.rank.value,
            lora_alpha=self.alpha.value,
            target_modules=self.targets.value,
            finetune_epochs=self.epochs.value,
            finetune_lr=self.rate.value,
            max_new_tokens=self.new_tokens.value,
            soft_scores=True,
        )
        return Edit(text=self.text.value, split_newlines=self.splits.value, seed=self.seed.value, training=training)

    def _ipython_display_(self) -> None:
        show(self._repr_mimebundle_())

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = Twin([self._settings_table()])._repr_mimebundle_()
        return bundle | self.box._repr_mimebundle_(**kwargs) if somebody_looks_on() else bundle

    def _settings_table(self) -> Table:
        """The twin: what the controls would begin with."""
        settings = settings_of_run(self.inspector.choice.settings)
        told = settings.request_fields() | {"text": self.inspector.choice.text}
        rows = [{"live edit": name, "begins with": str(value)} for name, value in told.items()]
        return Table(rows=rows, columns={"live edit": "", "begins with": ""})

    @cached_property
    def box(self) -> Any:
        """The widget, made when it is first shown."""
        import ipywidgets as w

        style = {"description_width": "6em"}
        small = {"style": style, "layout": w.Layout(width="14em")}
        self.text = w.Textarea(rows=9, layout=w.Layout(width="100%"), placeholder="one statement a line")
        self.rank = w.BoundedIntText(min=1, max=512, description="rank", **small)
        self.alpha = w.BoundedFloatText(min=0.001, max=4096, description="alpha", **small)
        self.epochs = w.BoundedIntText(min=1, max=1000, description="epochs", **small)
        self.rate = w.FloatText(description="lr", **small)
        self.seed = w.BoundedIntText(value=42, min=0, max=2**31 - 1, description="seed", **small)
        self.new_tokens = w.BoundedIntText(min=1, max=8192, description="max tokens", **small)
        self.targets = w.Dropdown(description="layers", style=style)
        self.splits = w.Checkbox(description="one sequence a line", indent=False)
        self.train_button = w.Button(description="Train and ask", button_style="primary", icon="play")
        self.cancel_button = w.Button(description="Cancel", disabled=True)
        self.keep_button = w.Button(description="Keep as an arm", disabled=True, icon="save")
        self.reset_button = w.Button(description="Text of the run")
        self.bar = w.FloatProgress(max=1.0, layout=w.Layout(width="16em", display="none"))
        self.unseen, self.status, self.outcome, self.answered = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.question = w.Text(placeholder="a question of your own", layout=w.Layout(width="28em"))
        self.gold = w.Text(placeholder="right answer (may be empty)", layout=w.Layout(width="16em"))
        self.ask_button = w.Button(description="Ask", disabled=True)
        self.fill()
        self._connect()
        row = w.Layout(flex_flow="row wrap", align_items="center")
        box = w.VBox(
            [
                self.text,
                w.HBox([self.rank, self.alpha, self.epochs, self.rate], layout=row),
                w.HBox([self.seed, self.new_tokens, self.targets, self.splits], layout=row),
                self.unseen,
                w.HBox([self.train_button, self.cancel_button, self.keep_button, self.reset_button], layout=row),
                w.HBox([self.bar, self.status], layout=row),
                self.outcome,
                w.HBox([self.question, self.gold, self.ask_button], layout=row),
                self.answered,
            ],
            layout=w.Layout(width="100%", overflow="hidden"),
        )
        box.add_class("seal-nb-live")
        return box

    def fill(self) -> None:
        """Text and settings of what is chosen in the inspector."""
        choice = self.inspector.choice
        settings = settings_of_run(choice.settings)
        self._came_from, self._settings = (choice.passage, choice.self_edit), settings
        self.text.value = choice.text
        self.rank.value, self.alpha.value = settings.lora_rank, settings.lora_alpha
        self.epochs.value, self.rate.value = settings.finetune_epochs, settings.finetune_lr
        self.new_tokens.value = settings.max_new_tokens
        layers = tuple(settings.target_modules)
        own = {} if layers in TARGETS.values() else {f"as the run: {', '.join(layers)}": layers}
        self.targets.options = list((TARGETS | own).items())
        self.targets.value = layers
        self.splits.value = bool(choice.settings.get("split_newlines", True))
        said = unseen_settings(settings)
        self.unseen.value = page(note(f"and as the run has it: {said}")) if said else ""

    def _connect(self) -> None:
        self.train_button.on_click(lambda _: self._beside(self._train))
        self.cancel_button.on_click(lambda _: self._beside(self._cancel, holds=False))
        self.keep_button.on_click(lambda _: self._keep())
        self.reset_button.on_click(lambda _: self.fill())
        self.ask_button.on_click(lambda _: self._beside(self._ask))
        self.inspector.on_choice(self.fill)

    def _beside(self, work: Callable[[], None], *, holds: bool = True) -> threading.Thread:
        """Do it in a thread: the notebook stays usable, and an error becomes its message."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a thread has nobody else to tell
                self.status.value = page(failure(f"{type(error).__name__}: {error}"))
            finally:
                if holds:
                    self._hold(False)

        if holds:
            self._hold(True)
        thread = threading.Thread(target=run, name="live-edit", daemon=True)
        thread.start()
        return thread

    def _hold(self, held: bool) -> None:
        """While a request is under way there is one thing to do: cancel it."""
        self.train_button.disabled = held
        self.cancel_button.disabled = not held
        self.ask_button.disabled = self.keep_button.disabled = held or self.result is None
        self.bar.layout.display = None if held else "none"

    def _train(self) -> None:
        self.bar.value = 0.0
        passage, self_edit = self._came_from
        evaluated = self.inspector.inspection.run.passages[passage]
        result = self.bench.train(evaluated, self.edit(), tell=self._tell)
        self.result = result
        self._show(result, passage, self_edit)

    def _tell(self, step: Step) -> None:
        self.bar.value = (
            step.step / step.n_steps if step.n_steps else (1.0 if step.state in ("answering", "done") else 0.0)
        )
        said = f"{step_said(step)}, {step.elapsed_s:.0f} s"
        curve = sparkline(step.epoch_losses) if step.epoch_losses else ""
        self.status.value = page(f'<span role="status">{html.escape(said)}</span> {curve}')

    def _show(self, result: LiveResult, passage: int, self_edit: int) -> None:
        """The sentence, the new answers beside the old, and the tokens; then the inspector has it too."""
        new = evaluated_edit(result.passage, result.edit, result.request, result.reply)
        old = self.inspector.inspection.answers(passage, self_edit)
        if self.inspector.choice.passage == passage:
            added = self.inspector.add(new)
            answers = self.inspector.inspection.answers(passage, added)
        else:
            grown = self.inspector.inspection.with_self_edit(passage, new)
            answers = grown.answers(passage, len(grown.run.passages[passage].self_edits) - 1)
        questions = [(q.question, q.answer) for q in result.request.eval_questions]
        texts = pages.named_texts(result.reply.token_logprobs, questions)
        self.status.value = page(
            f'<span role="status">{html.escape(pages.live_summary(result))}</span> '
            + sparkline([loss for loss in result.reply.epoch_losses if loss is not None])
        )
        self.outcome.value = page(
            pages.live_table(old, answers, graders=self._graders(result))._repr_html_(),
            f"<details><summary>Token by token</summary>{tokens_page(texts)}</details>",
        )

    def _graders(self, result: LiveResult) -> tuple[str, str]:
        """Whose verdicts the run's answers have, and whose the new ones."""
        of_run = grader_of(self.inspector.inspection.run.settings)
        return of_run, grader_of({"model": result.reply.model_id})

    def _cancel(self) -> None:
        if not self.bench.cancel():
            self.status.value = page(note("nothing is under way that could be cancelled"))

    def _keep(self) -> None:
        if self.result is None:
            return
        one = self.result
        try:
            path = keep_arm(self.keep_path, one.passage, one.edit, one.request, one.reply)
        except (SealError, OSError) as error:
            self.status.value = page(failure(f"{type(error).__name__}: {error}"))
        else:
            self.status.value = page(note(f"kept in {path.name}"))

    def _ask(self) -> None:
        if self.result is not None and self.question.value.strip():
            answer = self.bench.ask(self.result, self.question.value.strip(), self.gold.value.strip())
            self.own_answers.insert(0, answer)
            self.answered.value = page(pages.own_table(self.own_answers)._repr_html_())

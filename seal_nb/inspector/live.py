"""The live edit as a widget: change the text or a setting, train, and read the new answers next to the old ones.

Training runs in a thread, so the notebook stays usable. An error shows its message. ``live_edit`` does the work.
"""

import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from seal_nb.errors import SealError
from seal_nb.experiments.settings import Training
from seal_nb.grading.choose import grader_of
from seal_nb.inspector.html import StaticView, WidgetView, failure, loss_curve, note, page, static_tables, table_html
from seal_nb.inspector.live_edit import Edit, EditTrainer, Step, TrainedEdit, settings_of_run
from seal_nb.inspector.tokens import tokens_html
from seal_nb.inspector.widgets import PassageInspector

TARGETS = {"all linear layers": ("all-linear",), "PEFT's default (published)": ()}


def progress_line() -> Callable[[Step], None]:
    """A line below a cell that shows the latest step and the loss curve: ``train(..., tell=progress_line())``."""
    from IPython.display import display

    def shown(step: Step) -> dict[str, str]:
        return {"text/html": _status(str(step), step.epoch_losses), "text/plain": str(step)}

    line = display(shown(Step(state="waiting")), raw=True, display_id=True)
    return lambda step: line.update(shown(step), raw=True)


def _status(text: str, losses: Any = ()) -> str:
    return page(f'<span role="status">{escape(text)}</span> {loss_curve(losses)}')


class LiveEdit(WidgetView):
    """Edits the self-edit that is selected in an inspector: a widget in JupyterLab, a table of its settings elsewhere.

    Args:
        inspector: The inspector above.
        trainer: Trains the edits.
        keep_path: Run file for edits that are kept.
    """

    def __init__(self, inspector: PassageInspector, trainer: EditTrainer, *, keep_path: str | Path) -> None:
        self.inspector, self.trainer, self.keep_path = inspector, trainer, Path(keep_path)
        self.result: TrainedEdit | None = None
        self.own_answers = pd.DataFrame()
        self._source = (0, 0)  # passage and self-edit that the text came from
        self._settings = Training()  # of the run

    def edit(self) -> Edit:
        """What the controls say. Settings without a control are those of the run. Raises: SettingsError."""
        values = {name: control.value for name, control in self.controls.items()}
        training = replace(self._settings, **values)
        return Edit(text=self.text.value, split_newlines=self.splits.value, seed=self.seed.value, training=training)

    def static_view(self) -> StaticView:
        """The text and the settings with which the controls start."""
        selection = self.inspector.selection
        values = settings_of_run(selection.settings).request_fields() | {"text": selection.text}
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
        self.reset_button = w.Button(description="Text of the run")
        self.bar = w.FloatProgress(max=1.0, layout=w.Layout(width="16em", display="none"))
        self.unshown, self.status, self.outcome, self.answered = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.question = w.Text(placeholder="a question of your own", layout=w.Layout(width="28em"))
        self.gold = w.Text(placeholder="right answer (may be empty)", layout=w.Layout(width="16em"))
        self.ask_button = w.Button(description="Ask", disabled=True)
        self.fill()
        self.train_button.on_click(lambda _: self._in_thread(self._train))
        self.ask_button.on_click(lambda _: self._in_thread(self._ask))
        self.cancel_button.on_click(lambda _: self._in_thread(self._cancel, holds=False))
        self.keep_button.on_click(lambda _: self._keep())
        self.reset_button.on_click(lambda _: self.fill())
        self.inspector.on_select(self.fill)
        row = w.Layout(flex_flow="row wrap", align_items="center")
        numbers = [*self.controls.values()]
        buttons = [self.train_button, self.cancel_button, self.keep_button, self.reset_button]
        parts = [
            self.text,
            w.HBox(numbers[:4], layout=row),
            w.HBox([self.seed, *numbers[4:], self.splits], layout=row),
            self.unshown,
            w.HBox(buttons, layout=row),
            w.HBox([self.bar, self.status], layout=row),
            self.outcome,
            w.HBox([self.question, self.gold, self.ask_button], layout=row),
            self.answered,
        ]
        box = w.VBox(parts, layout=w.Layout(width="100%", overflow="hidden"))
        box.add_class("seal-nb-widget").add_class("seal-nb-live")
        return box

    def fill(self) -> None:
        """Sets the controls to the text and settings of the selected self-edit."""
        selection = self.inspector.selection
        self._settings = settings = settings_of_run(selection.settings)
        self._source = selection.passage, selection.self_edit
        self.text.value = selection.text
        self.splits.value = bool(selection.settings.get("split_newlines", True))
        layers = tuple(settings.target_modules)
        of_run = {} if layers in TARGETS.values() else {f"as the run: {', '.join(layers)}": layers}
        self.controls["target_modules"].options = list((TARGETS | of_run).items())
        for name, control in self.controls.items():
            control.value = getattr(settings, name)
        usual = asdict(Training(soft_scores=True))
        unshown = [f"{k} {v}" for k, v in asdict(settings).items() if k not in self.controls and v != usual[k]]
        self.unshown.value = page(note(f"also from the run: {', '.join(unshown)}")) if unshown else ""

    def _in_thread(self, work: Callable[[], None], *, holds: bool = True) -> None:
        """Does the work in a thread and shows the message of an error. ``holds``: only Cancel is enabled meanwhile."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a thread has no caller that could handle it
                self.status.value = page(failure(error))
            finally:
                if holds:
                    self._hold(False)

        if holds:
            self._hold(True)
        threading.Thread(target=run, name="live-edit", daemon=True).start()

    def _hold(self, held: bool) -> None:
        """While a request runs, it can only be cancelled."""
        self.train_button.disabled = held
        self.cancel_button.disabled = not held
        self.ask_button.disabled = self.keep_button.disabled = held or self.result is None
        self.bar.layout.display = None if held else "none"

    def _train(self) -> None:
        self.bar.value = 0.0
        source = self._source
        evaluated = self.inspector.inspection.run.passages[source[0]]
        self.result = self.trainer.train(evaluated, self.edit(), tell=self._tell)
        self._show(self.result, *source)

    def _tell(self, step: Step) -> None:
        self.bar.value = step.step / step.n_steps if step.n_steps else float(step.state in ("answering", "done"))
        self.status.value = _status(f"{step}, {step.elapsed_s:.0f} s", step.epoch_losses)

    def _show(self, result: TrainedEdit, passage: int, self_edit: int) -> None:
        """Shows the summary, the answers and the tokens, and adds the edit to the inspector."""
        added = self.inspector.add(passage, result.self_edit())
        inspection = self.inspector.inspection
        answers = inspection.compare_edit(passage, self_edit, added)
        graders = [grader_of(one) for one in (inspection.run.settings, {"model": result.reply.model_id})]
        before, after = (name or "an unknown grader" for name in graders)
        tokens = tokens_html(result.tokens().texts)
        self.status.value = _status(result.summary(), result.losses)
        self.outcome.value = page(
            table_html(answers, f"Verdicts before the edit by {before}, after the edit by {after}"),
            f"<details><summary>Token by token</summary>{tokens}</details>",
        )

    def _cancel(self) -> None:
        if not self.trainer.cancel():
            self.status.value = page(note("there is nothing to cancel"))

    def _keep(self) -> None:
        if self.result is None:
            return
        try:
            path = self.result.keep(self.keep_path)
        except (SealError, OSError) as error:
            self.status.value = page(failure(error))
        else:
            self.status.value = page(note(f"kept in {path.name}"))

    def _ask(self) -> None:
        if self.result is not None and self.question.value.strip():
            question, gold = self.question.value.strip(), self.gold.value.strip()
            answer = self.trainer.ask(self.result, question, gold, tell=self._tell)
            self.status.value = ""
            self.own_answers = pd.concat([answer, self.own_answers])
            self.answered.value = page(table_html(self.own_answers))

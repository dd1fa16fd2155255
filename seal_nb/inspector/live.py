"""The passage inspector (choose on the left, read on the right), and the live edit: a self-edit is changed, its adapter
is trained on a TTT server, and the result can be kept.

What they show is HTML (the macros of `data/inspector.html.j2`, which escape every text), and text where there is no
JupyterLab. A token is blue if the adapter made it more likely, orange if less. Colour is not the only sign: from one
nat on, it is bold or underlined. Pale tokens have no value: nothing predicts them, or they carry no loss."""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment
from markupsafe import Markup

from seal_nb.errors import SettingsError, redacted
from seal_nb.experiments import single_passage
from seal_nb.experiments.session import TTT, identified, loop_request
from seal_nb.experiments.settings import Training
from seal_nb.grading.choose import grader_of
from seal_nb.inspector.inspection import FLIPS, SHOWN, SORTED, Inspection, as_passage, sequences_of, settings_of_run
from seal_nb.metrics import counted
from seal_nb.passages import text_key
from seal_nb.prompts import topic_question
from seal_nb.protocol import EvalQuestion, ScoredText, TTTReply, TTTRequest
from seal_nb.results.single_passage import EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun
from seal_nb.server.client import look
from seal_nb.storage import data_file, read_json, record_path, write_json
from seal_nb.views.tables import SCRIPT, as_html, as_text, has_live_frontend

FULL_NATS = 4.0  # a change this large has the full colour
MARKED_NATS = 1.0
STRONGEST = 0.6  # opacity of the full colour: text stays readable on light and on dark background
KINDS = ("gold", "passage", "train")
NO_VALUES = "This run has no values of single tokens. Train the self-edit below; the new one has them."
LEGEND = "blue, bold: more likely with the adapter; orange, underlined: less likely; pale: no loss, or no value"
_JINJA = Environment(autoescape=True)
_JINJA.globals |= {
    "css": Markup(data_file("inspector.css").read_text()),
    "as_html": lambda *given: Markup(as_html(*given)),  # it is escaped there
}
HTML: Any = _JINJA.from_string(data_file("inspector.html.j2").read_text()).module  # its macros


def page(*parts: str) -> str:
    """Parts that macros made, with the inspector's style, which follows JupyterLab's theme."""
    return str(HTML.page(*parts))


@dataclass(frozen=True)
class StaticView:
    """HTML and the same content as text. In JupyterLab its tables can be sorted by clicking a heading."""

    html: str
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.html + (SCRIPT if has_live_frontend() else ""), "text/plain": self.text}


def static_tables(tables: Mapping[str, pd.DataFrame], title: str = "") -> StaticView:
    """A static view of tables (caption → table; an empty caption is not shown) under a heading."""
    html = [HTML.table(table, caption) for caption, table in tables.items()]
    text = [as_text(table, caption) for caption, table in tables.items()]
    return StaticView(page(HTML.heading(title) if title else "", *html), "\n\n".join([title, *text]).strip())


def made_widgets(view: str) -> SimpleNamespace:
    """The widgets of a view by name, as `data/widgets.json` describes them: a box after what is in it, `box` has all.
    Their boxes hide what overflows: margins of a few pixels would give them a scroll bar, and the page has its own."""
    import ipywidgets

    made: dict[str, Any] = {}
    for name, traits in json.loads(data_file("widgets.json").read_text())[view].items():
        kind = getattr(ipywidgets, traits.pop("kind"))
        if "children" in traits:
            traits["children"] = [made[one] for one in traits["children"]]
        made[name] = kind(**traits)
    return SimpleNamespace(**made)


class WidgetView:
    """Shows ``box`` (an ipywidget) in JupyterLab. Its static view is in the same output, and alone elsewhere."""

    box: Any
    static_view: Callable[[], StaticView]  # the same content without a widget

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = self.static_view()._repr_mimebundle_()
        return bundle | self.box._repr_mimebundle_(**kwargs) if has_live_frontend() else bundle

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self._repr_mimebundle_(), raw=True)
        if has_live_frontend():
            display({"text/html": SCRIPT, "text/plain": ""}, raw=True)


def token_frame(scored: ScoredText) -> pd.DataFrame:
    """One row a token: ``text``, ``before`` and ``after`` (nats, without and with the adapter), ``change`` and its
    ``opacity``. A token without a value has no change, and without an adapter none has."""
    after = scored.adapter_logprobs or [None] * len(scored.tokens)
    table = pd.DataFrame({"text": scored.tokens, "before": scored.baseline_logprobs, "after": after})
    table = table.astype({"before": float, "after": float})
    change = table["after"] - table["before"]
    return table.assign(change=change, opacity=STRONGEST * (change.abs().fillna(0.0) / FULL_NATS).clip(upper=1.0))


class TokenTexts:
    """Texts token by token as coloured HTML: the ``TTTReply.token_logprobs`` of some ``kinds`` ("gold", "passage",
    "train"; empty: all, in this order). ``questions`` are pairs of question and gold answer in the order of the
    request; topic lines are left out of the headings."""

    def __init__(
        self, scored: Sequence[ScoredText], questions: Sequence[tuple[str, str]], kinds: Sequence[str] = KINDS
    ) -> None:
        self.texts: list[tuple[str, pd.DataFrame]] = []  # heading, tokens
        for one in sorted(scored, key=lambda one: (KINDS.index(one.kind), one.index)):
            if one.kind in (kinds or KINDS):
                names = {"passage": "The passage", "train": f"Train sequence {one.index + 1}"}
                name = names.get(one.kind) or questions[one.index][0].rpartition("\n")[2]
                tokens = token_frame(one)
                total = tokens["change"].sum(min_count=1)
                self.texts.append((name if pd.isna(total) else f"{name} ({total:+.1f} nats)", tokens))

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return {"text/html": page(self.html()), "text/plain": self.in_words() or NO_VALUES}

    def in_words(self) -> str:
        return " ".join(f"{name}: {_in_words(tokens)}" for name, tokens in self.texts)

    def html(self) -> Markup:
        """Headings and coloured texts."""
        return HTML.token_texts(self.texts, LEGEND, MARKED_NATS) if self.texts else HTML.note(NO_VALUES)


def _in_words(tokens: pd.DataFrame) -> str:
    known = tokens.dropna(subset=["change"])
    if known.empty:
        return "no values."
    changes, largest = known["change"], known.loc[known["change"].abs().idxmax()]
    return (
        f"{sum(changes > 0)} of {len(changes)} tokens more likely with the adapter, {sum(changes < 0)} less; "
        f"{changes.sum():+.1f} nats in all, the largest change {largest['change']:+.1f} at {largest['text'].strip()!r}."
    )


VIEWS = ("answers", "self-edit", "tokens", "compare")
MOST_PASSAGES = 15  # rows of the static list of passages


class PassageInspector(WidgetView):
    """Shows the selected passage and self-edits of a run, and renders no other: a widget in JupyterLab (arrow keys move
    in the list, Tab goes to the next control), tables elsewhere. -1 as
    ``passage`` is the first one that ``show`` and ``sort`` give; as ``self_edit`` its best, as ``against`` the next.
    Raises: SettingsError if an index does not exist, or if the filter leaves no passage."""

    def __init__(
        self,
        inspection: Inspection,
        passage: int = -1,
        self_edit: int = -1,
        against: int = -1,
        *,
        show: str = "all",
        sort: str = "file order",
    ) -> None:
        self.inspection = inspection
        self.filter = {"show": show, "sort": sort, "search": ""}
        self._listeners: list[Callable[[], object]] = []
        self._filling = False
        if passage < 0:
            if self.rows.empty:
                raise SettingsError(f"show={show!r} leaves no passage of this run; choose another filter")
            passage = int(self.rows["n"].iloc[0])
        self.select(passage, self_edit, against)

    def select(self, passage: int, self_edit: int = -1, against: int = -1) -> None:
        """Selects a passage and two of its self-edits; -1: as for the class. Raises: SettingsError."""
        n = len(self.inspection.run.passages)
        if not 0 <= passage < n:
            raise SettingsError(f"passage is {passage}; the run has {n}, counted from 0")
        best = self.inspection.self_edits(passage)["best"]
        n_edits = len(best)
        self_edit = int(best.argmax()) if n_edits and self_edit < 0 else self_edit
        against = (self_edit + 1) % n_edits if n_edits and against < 0 else against
        for name, value in (("self_edit", self_edit), ("against", against)):
            if not 0 <= value < n_edits:
                raise SettingsError(f"{name} is {value}; passage {passage} has {n_edits}, counted from 0")
        self.passage, self.self_edit, self.against = passage, self_edit, against

    @property
    def evaluated(self) -> EvaluatedPassage:
        return self.inspection.run.passages[self.passage]

    @property
    def text(self) -> str:
        """The selected self-edit."""
        return self.evaluated.self_edits[self.self_edit].text or ""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the selected self-edit: the run's, and its own if it has them."""
        return {**self.inspection.run.settings, **self.evaluated.self_edits[self.self_edit].made}

    @property
    def rows(self) -> pd.DataFrame:
        """The passages to choose from. Passages without a self-edit are left out."""
        return self.inspection.select(**self.filter).query("`self-edits` > 0")

    def tokens(self, *kinds: str) -> TokenTexts:
        """The texts of the selected self-edit token by token; kinds as in ``TokenTexts``."""
        scored = [ScoredText.model_validate(one) for one in self.settings.get("token_logprobs") or ()]
        return TokenTexts(scored, [(one.question, one.answer) for one in as_passage(self.evaluated).questions], kinds)

    def summary(self) -> dict[str, str]:
        """A few numbers of what is selected, for the top of a notebook."""
        edits = self.inspection.self_edits(self.passage)
        before, after = ("–" if pd.isna(v) else f"{v:.0%}" for v in edits.loc[self.self_edit, ["baseline", "adapter"]])
        answers = self.inspection.answers(self.passage, self.self_edit)
        n, (gained, lost) = len(answers), (sum(answers["flip"] == one) for one in FLIPS[:2])
        return {
            "passage": self.evaluated.title,
            "self-edit": f"{self.self_edit} (of {len(edits)}), accuracy {before} → {after}",
            "flips": f"{gained} to right, {lost} to wrong, of {n} answers",
            "graders disagree": f"on {answers['disagree'].sum()} of {n}",
        }

    def parts(self, view: str) -> list[str | tuple[str, pd.DataFrame]]:
        """What one view shows: HTML, and tables with their captions. Raises: SettingsError for an unknown view."""
        inspection, passage, edit, against = self.inspection, self.passage, self.self_edit, self.against
        match view:
            case "answers":
                answers, edits = inspection.answers(passage, edit), inspection.self_edits(passage)
                n = answers["disagree"].sum()
                unused = ["disagree", "answer", "right", *(["rep"] if answers["rep"].nunique() < 2 else [])]
                unused += ["soft_gain"] if answers["soft_gain"].isna().all() else []
                caption = f"; the graders disagree on {n} of {len(answers)}" if n else ""
                best = edits["best"].map({True: "★", False: ""})
                return [
                    HTML.text_block(self.evaluated.context),
                    (f"Answers with self-edit {edit}{caption}", answers.drop(columns=unused)),
                    ("All self-edits of this passage", edits.assign(best=best)),
                ]
            case "self-edit":
                return [
                    HTML.heading(f"Self-edit {edit} as written"),
                    HTML.text_block(self.text or "(empty: only the passage is trained on)"),
                    (f"Train sequences of self-edit {edit}", inspection.sequences(passage, edit)),
                    HTML.note("Text in ⟦ ⟧ carries no loss; the first token of a sequence carries none either."),
                ]
            case "tokens":
                return [self.tokens().html()]
            case "compare" if edit == against:
                return [HTML.note("Choose two different self-edits to compare them.")]
            case "compare":
                texts = [(f"Self-edit {n}", self.evaluated.self_edits[n].text or "") for n in (edit, against)]
                caption = f"Self-edit {edit} (first) and self-edit {against} (second)"
                table = inspection.compare(passage, edit, against)
                return [(caption, table), HTML.pair(texts)]
        raise SettingsError(f"view is {view!r}; known are {', '.join(VIEWS)}")

    def page(self, view: str) -> str:
        """The HTML of one view. Raises: SettingsError for an unknown one."""
        parts = [part if isinstance(part, str) else HTML.table(part[1], part[0]) for part in self.parts(view)]
        return page(HTML.heading(self.evaluated.title), *parts)

    def static_view(self) -> StaticView:
        """The list of passages and the tables of all views."""
        rows = self.rows
        cut = f", the first {MOST_PASSAGES} shown" if len(rows) > MOST_PASSAGES else ""
        tables = {counted(len(rows), "passages") + cut: rows[:MOST_PASSAGES]}
        tables |= dict(part for view in VIEWS for part in self.parts(view) if not isinstance(part, str))
        return static_tables(tables, self.evaluated.title)

    def on_select(self, listener: Callable[[], object]) -> None:
        """Calls ``listener`` whenever another passage or self-edit is selected."""
        self._listeners.append(listener)

    def add(self, passage: int, edit: EvaluatedSelfEdit) -> int:
        """Adds a self-edit to a passage, and shows it to compare with if that passage is selected.
        Returns: The index of the new self-edit."""
        self.inspection = self.inspection.with_self_edit(passage, edit)
        added = len(self.inspection.run.passages[passage].self_edits) - 1
        if passage == self.passage:
            self.against = added
            if "box" in vars(self):
                self._fill_edits()
                self._render()
        return added

    @cached_property
    def box(self) -> Any:
        """The widget, made when it is first shown."""
        self.ui = ui = made_widgets("inspector")
        ui.show.options, ui.sort.options, ui.view.options = SHOWN, SORTED, VIEWS
        ui.show.value, ui.sort.value, ui.view.value = self.filter["show"], self.filter["sort"], VIEWS[0]
        self._fill_passages()
        self._fill_edits()
        self._render()
        for one in (ui.show, ui.sort, ui.search, ui.passages, ui.edits, ui.others):
            one.observe(self._on_change, "value")
        ui.view.observe(lambda _: self._render(), "value")
        return ui.box

    def _fill_passages(self) -> None:
        """Fills the list. The selected passage stays selected if it is still in the list."""
        rows = self.rows
        numbers = rows["n"].tolist()
        self._filling = True
        self.ui.passages.options = [(_passage_label(row), row["n"]) for row in rows.to_dict("records")]
        if numbers and self.passage not in numbers:
            self.select(numbers[0])
        self.ui.passages.value = self.passage if numbers else None
        self._filling = False
        self.ui.count.value = page(HTML.note(f"{len(rows)} of {len(self.inspection.run.passages)} passages"))

    def _fill_edits(self) -> None:
        rows = self.inspection.self_edits(self.passage).to_dict("records")
        self._filling = True
        self.ui.edits.options = self.ui.others.options = [(_edit_label(row), row["self-edit"]) for row in rows]
        self.ui.edits.value, self.ui.others.value = self.self_edit, self.against
        self._filling = False

    def _on_change(self, change: Any) -> None:
        """Selects what the controls say, unless they change because they are filled."""
        if self._filling:
            return
        before = self.passage, self.self_edit, self.against
        if change["owner"] is self.ui.passages:
            self.select(change["new"])
        elif change["owner"] in (self.ui.edits, self.ui.others):
            self.select(self.passage, self.ui.edits.value, self.ui.others.value)
        else:
            self.filter = {"show": self.ui.show.value, "sort": self.ui.sort.value, "search": self.ui.search.value}
            self._fill_passages()
        if (self.passage, self.self_edit, self.against) != before:
            self._fill_edits()
            self._render()
            for listener in self._listeners:
                listener()

    def _render(self) -> None:
        self.ui.shown.value = self.page(self.ui.view.value)


def run_files(run: Path) -> StaticView:
    """The run file, its record, and the executed notebooks in its folder: links in JupyterLab, elsewhere only names."""
    found = [path for path in (run, record_path(run), *sorted(run.parent.glob("0*.ipynb"))) if path.is_file()]
    # JupyterLab resolves links relative to the notebook's folder.
    links = {path.name: quote(os.path.relpath(path)) if has_live_frontend() else "" for path in found}
    return StaticView(str(HTML.files(links)), f"files of this run: {', '.join(links)}")


def _passage_label(row: Mapping[str, Any]) -> str:
    """The gain first, always of the same width, so that the list reads as columns."""
    gain = "   –  " if pd.isna(row["gain"]) else f"{row['gain']:+4.0%}"
    marks = "≈" * (row["tied"] > 0) + "?" * (row["ungraded"] > 0)
    return f"{gain.replace(' ', chr(0x2007))}  {row['passage']} {marks}".rstrip()


def _edit_label(row: Mapping[str, Any]) -> str:
    accuracy = "–" if pd.isna(row["adapter"]) else f"{row['adapter']:.0%}"
    origin = "" if row["origin"] == "the run" else f", {row['origin']}"
    return f"{row['self-edit']}: {accuracy}{origin}{' ★' if row['best'] else ''}"


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


def edit_request(evaluated: EvaluatedPassage, edit: Edit, *, model_id: str) -> TTTRequest:
    """The request that trains and evaluates an edit. Its id follows from its content.
    Raises: ProtocolError for a value that the protocol does not allow."""
    return loop_request(
        model_id,
        edit.training,
        texts=sequences_of(evaluated, edit.text, split_newlines=edit.split_newlines),
        questions=single_passage.eval_questions(as_passage(evaluated), answer_style=edit.training.answer_style),
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
    """Trains edits on a server from ``seal.ttt_server`` and asks their adapters questions. An edit becomes the request
    that a run would send for it. Training is deterministic: no adapter is kept, and a further question trains the same
    adapter again. Calls may come from any thread; one request runs at a time."""

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
    return lambda text, losses: line.update(
        {"text/html": page(HTML.status(text, losses)), "text/plain": text}, raw=True
    )


class LiveEdit(WidgetView):
    """Edits the self-edit that is selected in an inspector: a widget in JupyterLab, a table of its settings elsewhere.
    Training runs in a thread, so the notebook stays usable. Edits that are kept go into the run file ``keep_path``."""

    def __init__(self, inspector: PassageInspector, trainer: EditTrainer, *, keep_path: str | Path) -> None:
        self.inspector, self.trainer, self.keep_path = inspector, trainer, Path(keep_path)
        self.result: TrainedEdit | None = None
        self.own_answers = pd.DataFrame()

    def edit(self) -> Edit:
        """What the controls say. Settings without a control are those of the run. Raises: SettingsError."""
        ui, changed = self.ui, {name: control.value for name, control in self.controls.items()}
        training = replace(self._settings, **changed)
        return Edit(text=ui.text.value, split_newlines=ui.splits.value, seed=ui.seed.value, training=training)

    def static_view(self) -> StaticView:
        """The text and the settings with which the controls start."""
        values = settings_of_run(self.inspector.settings).request_fields() | {"text": self.inspector.text}
        return static_tables({"": pd.DataFrame([{"live edit": k, "starts with": str(v)} for k, v in values.items()])})

    @cached_property
    def box(self) -> Any:
        """The widget, made when it is first shown."""
        self.ui = ui = made_widgets("live")
        self.controls = {name: one for name, one in vars(ui).items() if name in Training.__dataclass_fields__}
        ui.train_button.on_click(lambda _: self._in_thread(self._train))
        ui.ask_button.on_click(lambda _: self._in_thread(self._ask))
        ui.keep_button.on_click(lambda _: self._in_thread(self._keep))
        ui.cancel_button.on_click(lambda _: threading.Thread(target=self.trainer.cancel, daemon=True).start())
        ui.reset_button.on_click(lambda _: self.fill())
        self.inspector.on_select(self.fill)
        self.fill()
        return ui.box

    def fill(self) -> None:
        """Sets the controls to the text and settings of the selected self-edit."""
        stated = self.inspector.settings
        self._settings = settings = settings_of_run(stated)
        self._source = self.inspector.passage, self.inspector.self_edit
        self.ui.text.value, self.ui.splits.value = self.inspector.text, bool(stated.get("split_newlines", True))
        layers = tuple(settings.target_modules)
        of_run = {} if layers in TARGETS.values() else {f"as the run: {', '.join(layers)}": layers}
        self.controls["target_modules"].options = list((TARGETS | of_run).items())
        for name, control in self.controls.items():
            control.value = getattr(settings, name)
        usual = asdict(Training(soft_scores=True))
        unshown = [f"{k} {v}" for k, v in asdict(settings).items() if k not in self.controls and v != usual[k]]
        self.ui.unshown.value = page(HTML.note(f"also from the run: {', '.join(unshown)}")) if unshown else ""

    def _in_thread(self, work: Callable[[], None]) -> None:
        """Does the work in a thread and shows the message of an error. Meanwhile only Cancel is enabled."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a thread has no caller that could handle it
                self.ui.status.value = page(HTML.failure(redacted(f"{type(error).__name__}: {error}")))
            finally:
                self._hold(False)

        self._hold(True)
        threading.Thread(target=run, daemon=True).start()

    def _hold(self, held: bool) -> None:
        self.ui.train_button.disabled = held
        self.ui.cancel_button.disabled = not held
        self.ui.ask_button.disabled = self.ui.keep_button.disabled = held or self.result is None

    def _tell(self, text: str, losses: Sequence[float] = ()) -> None:
        self.ui.status.value = page(HTML.status(text, losses))

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
        self.ui.outcome.value = page(
            HTML.table(answers, f"Verdicts before the edit by {before}, after the edit by {after}"),
            HTML.foldable("Token by token", result.tokens().html()),
        )

    def _keep(self) -> None:
        if self.result is not None:
            self._tell(f"kept in {self.result.keep(self.keep_path).name}")

    def _ask(self) -> None:
        question = self.ui.question.value.strip()
        if self.result is not None and question:
            answer = self.trainer.ask(self.result, question, self.ui.gold.value.strip(), tell=self._tell)
            self._tell("")
            self.own_answers = pd.concat([answer, self.own_answers])
            self.ui.answered.value = page(HTML.table(self.own_answers))

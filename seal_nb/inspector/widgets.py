"""The passage inspector: choose on the left, read on the right.

Only the selected passage and self-edit are rendered. Arrow keys move in the list, Tab goes to the next control."""

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from seal_nb.errors import SettingsError
from seal_nb.inspector.html import StaticView, TokenTexts, WidgetView, heading, note, page, static_tables, table_html
from seal_nb.inspector.inspection import GAINED, LOST, SHOWN, SORTED, Inspection, as_passage
from seal_nb.metrics import counted
from seal_nb.protocol import ScoredText
from seal_nb.results.single_passage import EvaluatedPassage, EvaluatedSelfEdit
from seal_nb.storage import record_path
from seal_nb.views.tables import has_live_frontend

VIEWS = ("answers", "self-edit", "tokens", "compare")
MOST_PASSAGES = 15  # rows of the static list of passages


class PassageInspector(WidgetView):
    """Shows the selected passage and self-edits of a run: a widget in JupyterLab, tables elsewhere. -1 as
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
        flips, n = answers["flip"], len(answers)
        return {
            "passage": self.evaluated.title,
            "self-edit": f"{self.self_edit} (of {len(edits)}), accuracy {before} → {after}",
            "flips": f"{sum(flips == GAINED)} to right, {sum(flips == LOST)} to wrong, of {n} answers",
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
                    _text_block(self.evaluated.context),
                    (f"Answers with self-edit {edit}{caption}", answers.drop(columns=unused)),
                    ("All self-edits of this passage", edits.assign(best=best)),
                ]
            case "self-edit":
                return [
                    heading(f"Self-edit {edit} as written"),
                    _text_block(self.text or "(empty: only the passage is trained on)"),
                    (f"Train sequences of self-edit {edit}", inspection.sequences(passage, edit)),
                    note("Text in ⟦ ⟧ carries no loss; the first token of a sequence carries none either."),
                ]
            case "tokens":
                return [self.tokens().html()]
            case "compare" if edit == against:
                return [note("Choose two different self-edits to compare them.")]
            case "compare":
                pair = [(n, self.evaluated.self_edits[n].text or "") for n in (edit, against)]
                texts = [f"<div>{heading(f'Self-edit {n}')}{_text_block(text)}</div>" for n, text in pair]
                caption = f"Self-edit {edit} (first) and self-edit {against} (second)"
                table = inspection.compare(passage, edit, against)
                return [(caption, table), f'<div class="sn-pair">{"".join(texts)}</div>']
        raise SettingsError(f"view is {view!r}; known are {', '.join(VIEWS)}")

    def page(self, view: str) -> str:
        """The HTML of one view. Raises: SettingsError for an unknown one."""
        parts = [part if isinstance(part, str) else table_html(part[1], part[0]) for part in self.parts(view)]
        return page(heading(self.evaluated.title), *parts)

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
        import ipywidgets as w

        def control(kind: Any, description: str, width: str = "auto", **given: Any) -> Any:
            style = {"description_width": "4em"}
            return kind(description=description, layout=w.Layout(width=width), style=style, **given)

        self.show = control(w.Dropdown, "show", options=SHOWN, value=self.filter["show"])
        self.sort = control(w.Dropdown, "sort", options=SORTED, value=self.filter["sort"])
        self.search = control(w.Text, "find", placeholder="title, passage, question", continuous_update=False)
        self.edits, self.others = (control(w.Dropdown, name, "22em") for name in ("self-edit", "against"))
        self.passages = w.Select(rows=16, layout=w.Layout(width="auto"), tooltip="passages: arrow keys move")
        self.count = w.HTML()
        self.view = w.ToggleButtons(options=VIEWS, style={"button_width": "7em"})
        self.shown = w.HTML(layout=w.Layout(max_height="42em", width="100%", overflow="auto"))
        self._fill_passages()
        self._fill_edits()
        self._render()
        choices = [self.show, self.sort, self.search, self.passages]
        for one in [*choices, self.edits, self.others]:
            one.observe(self._on_change, "value")
        self.view.observe(lambda _: self._render(), "value")
        left = w.VBox([*choices, self.count], layout=w.Layout(width="19em", min_width="16em", flex="0 0 auto"))
        edits = w.HBox([self.edits, self.others], layout=w.Layout(flex_flow="row wrap", overflow="visible"))
        layout = w.Layout(flex="1 1 0px", min_width="0", margin="0 0 0 1em", overflow="visible")
        right = w.VBox([edits, self.view, self.shown], layout=layout)
        # Without "hidden", margins of a few pixels would give the whole widget a scroll bar; the page has its own.
        box = w.HBox([left, right], layout=w.Layout(width="100%", overflow="hidden"))
        return box.add_class("seal-nb-widget").add_class("seal-nb-inspector")

    def _fill_passages(self) -> None:
        """Fills the list. The selected passage stays selected if it is still in the list."""
        rows = self.rows
        numbers = rows["n"].tolist()
        self._filling = True
        self.passages.options = [(_passage_label(row), row["n"]) for row in rows.to_dict("records")]
        if numbers and self.passage not in numbers:
            self.select(numbers[0])
        self.passages.value = self.passage if numbers else None
        self._filling = False
        self.count.value = page(note(f"{len(rows)} of {len(self.inspection.run.passages)} passages"))

    def _fill_edits(self) -> None:
        rows = self.inspection.self_edits(self.passage).to_dict("records")
        self._filling = True
        self.edits.options = self.others.options = [(_edit_label(row), row["self-edit"]) for row in rows]
        self.edits.value, self.others.value = self.self_edit, self.against
        self._filling = False

    def _on_change(self, change: Any) -> None:
        """Selects what the controls say, unless they change because they are filled."""
        if self._filling:
            return
        before = self.passage, self.self_edit, self.against
        if change["owner"] is self.passages:
            self.select(change["new"])
        elif change["owner"] in (self.edits, self.others):
            self.select(self.passage, self.edits.value, self.others.value)
        else:
            self.filter = {"show": self.show.value, "sort": self.sort.value, "search": self.search.value}
            self._fill_passages()
        if (self.passage, self.self_edit, self.against) != before:
            self._fill_edits()
            self._render()
            for listener in self._listeners:
                listener()

    def _render(self) -> None:
        self.shown.value = self.page(self.view.value)


def run_files(run: Path) -> StaticView:
    """The run file, its record, and the executed notebooks in its folder: links in JupyterLab, elsewhere only names."""
    found = [path for path in (run, record_path(run), *sorted(run.parent.glob("0*.ipynb"))) if path.is_file()]
    links = names = [escape(path.name) for path in found]
    if has_live_frontend():  # JupyterLab resolves links relative to the notebook's folder
        links = [f'<a href="{quote(os.path.relpath(p))}" target="_blank">{escape(p.name)}</a>' for p in found]
    return StaticView(f"<p>Files of this run: {', '.join(links)}</p>", f"files of this run: {', '.join(names)}")


def _passage_label(row: Mapping[str, Any]) -> str:
    """The gain first, always of the same width, so that the list reads as columns."""
    gain = "   –  " if pd.isna(row["gain"]) else f"{row['gain']:+4.0%}"
    marks = "≈" * (row["tied"] > 0) + "?" * (row["ungraded"] > 0)
    return f"{gain.replace(' ', chr(0x2007))}  {row['passage']} {marks}".rstrip()


def _edit_label(row: Mapping[str, Any]) -> str:
    accuracy = "–" if pd.isna(row["adapter"]) else f"{row['adapter']:.0%}"
    origin = "" if row["origin"] == "the run" else f", {row['origin']}"
    return f"{row['self-edit']}: {accuracy}{origin}{' ★' if row['best'] else ''}"


def _text_block(text: str) -> str:
    return f'<div class="sn-text">{escape(text)}</div>'

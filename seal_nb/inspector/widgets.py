"""The passage inspector as a widget: choose on the left, read on the right.

``Selection`` holds what is selected and makes the HTML of it, for the widget and for the static view. Only the selected
passage and self-edit are rendered. Arrow keys move in the list, Tab goes to the next control.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from seal_nb.errors import SettingsError
from seal_nb.inspector.html import StaticView, WidgetView, heading, note, page, static_tables, table_html, text_block
from seal_nb.inspector.inspection import GAINED, LOST, SHOWN, SORTED, Inspection, as_passage
from seal_nb.inspector.tokens import TokenTexts, named_texts, tokens_html
from seal_nb.metrics import counted
from seal_nb.protocol import ScoredText
from seal_nb.results.single_passage import EvaluatedPassage, EvaluatedSelfEdit

VIEWS = ("answers", "self-edit", "tokens", "compare")
MOST_PASSAGES = 15  # rows of the static list of passages
LIST_ROWS = 16  # height of the widget's list


@dataclass
class Selection:
    """Which passage and self-edits are selected. Indices are those of the run file."""

    inspection: Inspection
    passage: int = 0
    self_edit: int = 0
    against: int = 0
    show: str = "all"
    sort: str = "file order"
    search: str = ""

    @property
    def evaluated(self) -> EvaluatedPassage:
        return self.inspection.run.passages[self.passage]

    @property
    def edit(self) -> EvaluatedSelfEdit:
        return self.evaluated.self_edits[self.self_edit]

    @property
    def text(self) -> str:
        return self.edit.text or ""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the selected self-edit: the run's, and its own if it has them."""
        return {**self.inspection.run.settings, **self.edit.made}

    @property
    def answers(self) -> pd.DataFrame:
        return self.inspection.answers(self.passage, self.self_edit)

    @property
    def rows(self) -> pd.DataFrame:
        """The passages to choose from. Passages without a self-edit are left out."""
        found = self.inspection.select(self.show, self.sort, self.search)
        return found[found["self-edits"] > 0]

    def check(self) -> None:
        """Raises: SettingsError for an index that does not exist."""
        n = len(self.inspection.run.passages)
        if not 0 <= self.passage < n:
            raise SettingsError(f"passage is {self.passage}; the run has {n}, counted from 0")
        n_edits = len(self.evaluated.self_edits)
        for name in ("self_edit", "against"):
            if not 0 <= (value := getattr(self, name)) < n_edits:
                raise SettingsError(f"{name} is {value}; passage {self.passage} has {n_edits}, counted from 0")

    def select_passage(self, passage: int) -> None:
        """Selects a passage, its best self-edit, and the next one to compare with. Raises: SettingsError."""
        self.passage, self.self_edit, self.against = passage, 0, 0
        self.check()
        best = self.inspection.self_edits(passage)["best"]
        self.self_edit = int(best.argmax())
        self.against = (self.self_edit + 1) % len(best)

    def summary(self) -> dict[str, str]:
        """A few numbers of what is selected, for the top of a notebook."""
        edits = self.inspection.self_edits(self.passage)
        before, after = ("–" if pd.isna(v) else f"{v:.0%}" for v in edits.loc[self.self_edit, ["baseline", "adapter"]])
        flips, n = self.answers["flip"], len(self.answers)
        return {
            "passage": self.evaluated.title,
            "self-edit": f"{self.self_edit} (of {len(edits)}), accuracy {before} → {after}",
            "flips": f"{sum(flips == GAINED)} to right, {sum(flips == LOST)} to wrong, of {n} answers",
            "graders disagree": f"on {self.answers['disagree'].sum()} of {n}",
        }

    def tables(self, view: str) -> dict[str, pd.DataFrame]:
        """Caption → table of one view, without columns that are empty."""
        inspection, passage, edit, against = self.inspection, self.passage, self.self_edit, self.against
        if view == "answers":
            answers, unused = self.answers, ["disagree", "answer", "right"]
            unused += ["soft_gain"] if answers["soft_gain"].isna().all() else []
            unused += ["rep"] if answers["rep"].nunique() < 2 else []
            disagree = f"; the graders disagree on {n} of {len(answers)}" if (n := answers["disagree"].sum()) else ""
            edits = inspection.self_edits(passage)
            return {
                f"Answers with self-edit {edit}{disagree}": answers.drop(columns=unused),
                "All self-edits of this passage": edits.assign(best=edits["best"].map({True: "★", False: ""})),
            }
        if view == "self-edit":
            return {f"Train sequences of self-edit {edit}": inspection.sequences(passage, edit)}
        if view == "compare" and against != edit:
            table = inspection.compare(passage, edit, against)
            return {f"Self-edit {edit} (first) and self-edit {against} (second)": table}
        return {}

    def page(self, view: str) -> str:
        """The HTML of one view. Raises: SettingsError for an unknown one."""
        tables = [table_html(table, caption) for caption, table in self.tables(view).items()]
        match view:
            case "answers":
                parts = [text_block(self.evaluated.context), *tables]
            case "self-edit":
                text = text_block(self.text or "(empty: only the passage is trained on)")
                loss = note("Text in ⟦ ⟧ carries no loss; the first token of a sequence carries none either.")
                parts = [heading(f"Self-edit {self.self_edit} as written"), text, *tables, loss]
            case "tokens":
                parts = [tokens_html(self.tokens().texts)]
            case "compare" if tables:
                pair = [(n, self.evaluated.self_edits[n].text or "") for n in (self.self_edit, self.against)]
                texts = [f"<div>{heading(f'Self-edit {n}')}{text_block(text)}</div>" for n, text in pair]
                parts = [*tables, f'<div class="sn-pair">{"".join(texts)}</div>']
            case "compare":
                parts = [note("Choose two different self-edits to compare them.")]
            case _:
                raise SettingsError(f"view is {view!r}; known are {', '.join(VIEWS)}")
        return page(heading(self.evaluated.title), *parts)

    def static_view(self) -> StaticView:
        """The list of passages and the tables of all views."""
        rows = self.rows
        cut = f", the first {MOST_PASSAGES} shown" if len(rows) > MOST_PASSAGES else ""
        tables = {counted(len(rows), "passages") + cut: rows[:MOST_PASSAGES]}
        for view in VIEWS:
            tables |= self.tables(view)
        return static_tables(tables, self.evaluated.title)

    def tokens(self, *kinds: str) -> TokenTexts:
        """The texts of the selected self-edit token by token; kinds as in ``named_texts``."""
        scored = [ScoredText.model_validate(one) for one in self.edit.made.get("token_logprobs") or ()]
        questions = [(one.question, one.answer) for one in as_passage(self.evaluated).questions]
        return TokenTexts(named_texts(scored, questions, kinds))


def select(
    inspection: Inspection, passage: int = -1, self_edit: int = -1, against: int = -1, *, show: str, sort: str
) -> Selection:
    """What a notebook's parameters select.

    Args:
        inspection: The run.
        passage: Index in the run; -1: the first passage that ``show`` and ``sort`` give.
        self_edit: Index of the self-edit; -1: the best of the passage.
        against: Index of the self-edit to compare with; -1: the next one.
        show: One of ``inspection.SHOWN``.
        sort: One of ``inspection.SORTED``.

    Raises: SettingsError if an index does not exist, or no passage is left by the filter.
    """
    found = Selection(inspection, max(passage, 0), show=show, sort=sort)
    if passage < 0:
        if found.rows.empty:
            raise SettingsError(f"show={show!r} leaves no passage of this run; choose another filter")
        passage = int(found.rows["n"].iloc[0])
    found.select_passage(passage)
    found.self_edit = found.self_edit if self_edit < 0 else self_edit
    found.against = (found.self_edit + 1) % len(found.evaluated.self_edits) if against < 0 else against
    found.check()
    return found


class PassageInspector(WidgetView):
    """The inspector: a widget in JupyterLab, tables elsewhere."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._listeners: list[Callable[[], object]] = []
        self._filling = False

    @property
    def inspection(self) -> Inspection:
        return self.selection.inspection

    def on_select(self, listener: Callable[[], object]) -> None:
        """Calls ``listener`` whenever another passage or self-edit is selected."""
        self._listeners.append(listener)

    def add(self, passage: int, edit: EvaluatedSelfEdit) -> int:
        """Adds a self-edit to a passage, and shows it to compare with if that passage is selected.

        Returns: The index of the new self-edit.
        """
        self.selection.inspection = self.inspection.with_self_edit(passage, edit)
        added = len(self.inspection.run.passages[passage].self_edits) - 1
        if passage == self.selection.passage:
            self.selection.against = added
            if "box" in self.__dict__:
                self._fill_edits()
                self._render()
        return added

    def static_view(self) -> StaticView:
        return self.selection.static_view()

    @cached_property
    def box(self) -> Any:
        """The widget, made when it is first shown."""
        import ipywidgets as w

        selection, style = self.selection, {"description_width": "4em"}
        wide, half = (
            {"layout": w.Layout(width="auto"), "style": style},
            {"layout": w.Layout(width="22em"), "style": style},
        )
        self.show = w.Dropdown(options=SHOWN, value=selection.show, description="show", **wide)
        self.sort = w.Dropdown(options=SORTED, value=selection.sort, description="sort", **wide)
        self.search = w.Text(
            placeholder="title, passage, question", description="find", continuous_update=False, **wide
        )
        self.passages = w.Select(rows=LIST_ROWS, layout=w.Layout(width="auto"), tooltip="passages: arrow keys move")
        self.count = w.HTML()
        self.edits = w.Dropdown(description="self-edit", **half)
        self.against = w.Dropdown(description="against", **half)
        self.view = w.ToggleButtons(options=VIEWS, style={"button_width": "7em"})
        self.page = w.HTML(layout=w.Layout(max_height="42em", width="100%", overflow="auto"))
        self._fill_passages()
        self._fill_edits()
        self._render()
        for control in (self.show, self.sort, self.search):
            control.observe(self._on_filter, "value")
        for control in (self.edits, self.against):
            control.observe(self._on_edit, "value")
        self.passages.observe(self._on_passage, "value")
        self.view.observe(lambda _: self._render(), "value")
        left = w.VBox(
            [self.show, self.sort, self.search, self.passages, self.count],
            layout=w.Layout(width="19em", min_width="16em", flex="0 0 auto"),
        )
        chosen = w.HBox([self.edits, self.against], layout=w.Layout(flex_flow="row wrap", overflow="visible"))
        right = w.VBox(
            [chosen, self.view, self.page],
            layout=w.Layout(flex="1 1 0px", min_width="0", margin="0 0 0 1em", overflow="visible"),
        )
        # Without "hidden", margins of a few pixels would give the whole widget a scroll bar; the page has its own.
        box = w.HBox([left, right], layout=w.Layout(width="100%", overflow="hidden"))
        box.add_class("seal-nb-widget").add_class("seal-nb-inspector")
        return box

    def _fill_passages(self) -> None:
        """Fills the list. The selected passage stays selected if it is still in the list."""
        rows = self.selection.rows
        numbers = rows["n"].tolist()
        self._filling = True
        self.passages.options = [(_passage_label(row), row["n"]) for row in rows.to_dict("records")]
        if numbers:
            if self.selection.passage not in numbers:
                self.selection.select_passage(numbers[0])
            self.passages.value = self.selection.passage
        self._filling = False
        self.count.value = page(note(f"{len(rows)} of {len(self.inspection.run.passages)} passages"))

    def _fill_edits(self) -> None:
        edits = self.inspection.self_edits(self.selection.passage)
        self._filling = True
        self.edits.options = self.against.options = [
            (_edit_label(row), row["self-edit"]) for row in edits.to_dict("records")
        ]
        self.edits.value, self.against.value = self.selection.self_edit, self.selection.against
        self._filling = False

    def _on_filter(self, _: Any) -> None:
        self.selection.show, self.selection.sort, self.selection.search = (
            self.show.value,
            self.sort.value,
            self.search.value,
        )
        before = self.selection.passage
        self._fill_passages()
        if self.selection.passage != before:
            self._selected()

    def _on_passage(self, change: Any) -> None:
        if not self._filling and change["new"] is not None:
            self.selection.select_passage(change["new"])
            self._selected()

    def _on_edit(self, _: Any) -> None:
        if not self._filling:
            self.selection.self_edit, self.selection.against = self.edits.value, self.against.value
            self._selected()

    def _selected(self) -> None:
        self._fill_edits()
        self._render()
        for listener in self._listeners:
            listener()

    def _render(self) -> None:
        self.page.value = self.selection.page(self.view.value)


def _passage_label(row: Mapping[str, Any]) -> str:
    """The gain first, always of the same width, so that the list reads as columns."""
    gain = "   –  " if pd.isna(row["gain"]) else f"{row['gain']:+4.0%}"
    marks = "≈" * (row["tied"] > 0) + "?" * (row["ungraded"] > 0)
    return f"{gain.replace(' ', chr(0x2007))}  {row['passage']} {marks}".rstrip()


def _edit_label(row: Mapping[str, Any]) -> str:
    accuracy = "–" if pd.isna(row["adapter"]) else f"{row['adapter']:.0%}"
    origin = "" if row["origin"] == "the run" else f", {row['origin']}"
    return f"{row['self-edit']}: {accuracy}{origin}{' ★' if row['best'] else ''}"

"""The passage inspector as a widget: choose on the left, read on the right; arrow keys move, Tab goes on.

Widgets only hold what ``choice`` says; without a front end they are not even made, and the notebook shows the
static twin instead. Knows nothing of training (``live`` does).

What is chosen in the inspector, and the pages that show it: state without widgets, and the static twin.

Nothing is rendered before it is asked for, and only for the passage and self-edit that are chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.inspector import pages
from seal_nb.inspector.html import heading, note, page, show, text_block
from seal_nb.inspector.inspection import SHOWN, SORTED, Inspection, PassageRow, Show, Sort, as_passage
from seal_nb.inspector.tokens import NO_VALUES, tokens_page
from seal_nb.protocol import ScoredText
from seal_nb.results.single_passage import EvaluatedSelfEdit
from seal_nb.views.tables import Table, somebody_looks_on

VIEWS = ("answers", "self-edit", "tokens", "compare")


@dataclass
class Choice:
    """Which passage and self-edits are looked at. Indices are those of the run file."""

    inspection: Inspection
    passage: int = 0
    self_edit: int = 0
    against: int = 0
    show: Show = "all"
    sort: Sort = "file order"
    search: str = ""

    def __post_init__(self) -> None:
        n = len(self.inspection.run.passages)
        if not 0 <= self.passage < n:
            raise SettingsError(f"passage is {self.passage}; the run has {n}, counted from 0")
        n_edits = len(self.inspection.run.passages[self.passage].self_edits)
        for name in ("self_edit", "against"):
            if not 0 <= getattr(self, name) < n_edits:
                raise SettingsError(
                    f"{name} is {getattr(self, name)}; passage {self.passage} has {n_edits}, counted from 0"
                )

    @property
    def rows(self) -> list[PassageRow]:
        """The passages to choose from; one without a self-edit has nothing to show."""
        found = self.inspection.select(self.show, self.sort, self.search)
        return [row for row in found if row.n_self_edits]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What made the chosen self-edit: the run's settings, and its own above them."""
        edit = self.inspection.run.passages[self.passage].self_edits[self.self_edit]
        return {**self.inspection.run.settings, **edit.made}

    @property
    def title(self) -> str:
        return self.inspection.run.passages[self.passage].title

    @property
    def text(self) -> str:
        return self.inspection.run.passages[self.passage].self_edits[self.self_edit].text or ""

    def choose_passage(self, passage: int) -> None:
        """Its best self-edit first, and that compared with the one after."""
        self.passage = passage
        edits = self.inspection.self_edits(passage)
        self.self_edit = next((row.index for row in edits if row.is_best), 0)
        self.against = (self.self_edit + 1) % max(len(edits), 1)

    def glance(self) -> dict[str, str]:
        """What is chosen, in a few numbers for the top of a notebook."""
        edits = self.inspection.self_edits(self.passage)
        answers = self.inspection.answers(self.passage, self.self_edit)
        counted = [sum(row.flip == flip for row in answers) for flip in ("gained", "lost")]
        disagree = sum(row.graders_disagree for row in answers)
        return {
            "passage": self.title,
            "self-edit": f"{self.self_edit} (of {len(edits)}), {pages.accuracies(edits[self.self_edit])}",
            "flips": "{} to right, {} to wrong, of {} answers".format(*counted, len(answers)),
            "graders disagree": f"on {disagree} of {len(answers)}",
        }

    def page(self, view: str) -> str:
        """The HTML of one view of what is chosen."""
        makers = {
            "answers": self._answers,
            "self-edit": self._self_edit,
            "tokens": self._tokens,
            "compare": self._compare,
        }
        if view not in makers:
            raise SettingsError(f"view is {view!r}; known are {', '.join(VIEWS)}")
        return page(heading(self.title), *makers[view]())

    def named_texts(self) -> list[tuple[str, ScoredText]]:
        """Texts of the chosen self-edit with values for their tokens; empty where its file has none."""
        edit = self.inspection.run.passages[self.passage].self_edits[self.self_edit]
        scored = [ScoredText.model_validate(one) for one in edit.made.get("token_logprobs") or ()]
        questions = as_passage(self.inspection.run.passages[self.passage]).questions
        return pages.named_texts(scored, [(one.question, one.answer) for one in questions])

    def tables(self) -> list[Table]:
        """All of what is chosen as tables: the twin of the widget in words."""
        inspection, passage, edit = self.inspection, self.passage, self.self_edit
        edits = inspection.self_edits(passage)
        answers = pages.answers_table(inspection.answers(passage, edit))
        sequences = pages.sequences_table(inspection.sequences(passage, edit))
        named = {
            "self-edits of this passage": pages.self_edits_table(edits, with_text=True),
            "; ".join(filter(None, (f"answers with self-edit {edit}", answers.caption))): answers,
            f"the train sequences that self-edit {edit} became": sequences,
        }
        if len(edits) > 1 and self.against != edit:
            named[f"self-edit {edit} against self-edit {self.against}"] = self.compared()
        return [pages.passages_table(self.rows), *(replace(table, caption=caption) for caption, table in named.items())]

    def compared(self) -> Table:
        rows = self.inspection.compare(self.passage, self.self_edit, self.against)
        return pages.compared_table(rows, f"self-edit {self.self_edit}", f"self-edit {self.against}")

    def _answers(self) -> Sequence[str]:
        context = self.inspection.run.passages[self.passage].context
        answers = self.inspection.answers(self.passage, self.self_edit)
        return (
            text_block(context),
            heading(f"Answers with self-edit {self.self_edit}"),
            _html(pages.answers_table(answers)),
            heading("All self-edits of this passage"),
            _html(pages.self_edits_table(self.inspection.self_edits(self.passage))),
        )

    def _self_edit(self) -> Sequence[str]:
        sequences = self.inspection.sequences(self.passage, self.self_edit)
        masked = any(row.unscored for row in sequences)
        said = "What stands in ⟦ ⟧ carries no loss. " if masked else "Every token but the first carries loss. "
        return (
            heading(f"Self-edit {self.self_edit}, as written"),
            text_block(self.text or "(none: the passage alone)"),
            heading("The train sequences it became"),
            note(f"{said}The view “tokens” shows it token by token, where the run has that."),
            _html(pages.sequences_table(sequences)),
        )

    def _tokens(self) -> Sequence[str]:
        texts = self.named_texts()
        if texts:
            return (tokens_page(texts),)
        return (note(NO_VALUES),)

    def _compare(self) -> Sequence[str]:
        edits = self.inspection.run.passages[self.passage].self_edits
        if len(edits) < 2:
            return (note("This passage has one self-edit; there is nothing to compare it with."),)
        first, second = (f"self-edit {one}" for one in (self.self_edit, self.against))
        texts = [edits[one].text or "" for one in (self.self_edit, self.against)]
        return (_html(self.compared()), pages.texts_side_by_side(first, texts[0], second, texts[1]))


def choose(inspection: Inspection, passage: int, self_edit: int, against: int, *, show: Any, sort: Any) -> Choice:
    """A choice in the words of a notebook's parameters: -1 is the first, the best, the next.

    Raises: SettingsError for a filter that nothing passes, and for an index that is not there.
    """
    rows = [row.index for row in inspection.select(show, sort) if row.n_self_edits]
    if passage < 0 and not rows:
        raise SettingsError(f"no passage of the run is shown with show={show!r}; choose another filter")
    found = Choice(inspection, rows[0] if passage < 0 else passage, show=show, sort=sort)
    found.choose_passage(found.passage)
    found.self_edit = found.self_edit if self_edit < 0 else self_edit
    n_edits = len(inspection.run.passages[found.passage].self_edits)
    found.against = (found.self_edit + 1) % max(n_edits, 1) if against < 0 else against
    return replace(found)  # checked once more


class Twin:
    """Tables below one another as one output: HTML, and the same as text."""

    def __init__(self, tables: Sequence[Table], title: str = "") -> None:
        self.tables, self.title = tables, title

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        title = heading(self.title) if self.title else ""
        return {
            "text/html": page(title, *map(_html, self.tables)),
            "text/plain": "\n\n".join([self.title, *map(repr, self.tables)]).strip(),
        }


def _html(table: Table) -> str:
    return f'<div style="overflow-x:auto">{table._repr_html_()}</div>'


LIST_ROWS = 16


class PassageInspector:
    """Shows itself in a notebook: the widget where somebody looks on, and in the same output its twin."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self._listeners: list[Callable[[], object]] = []
        self._filling = False

    @property
    def inspection(self) -> Inspection:
        return self.choice.inspection

    def on_choice(self, listener: Callable[[], object]) -> None:
        """Call it whenever another passage or self-edit is chosen."""
        self._listeners.append(listener)

    def add(self, edit: EvaluatedSelfEdit) -> int:
        """Show one more self-edit of the chosen passage, and compare it with the one chosen; its index."""
        passage = self.choice.passage
        self.choice.inspection = self.inspection.with_self_edit(passage, edit)
        added = len(self.inspection.run.passages[passage].self_edits) - 1
        self.choice.against = added
        if "box" in self.__dict__:
            self._fill_edits()
            self._render()
        return added

    def twin(self) -> Twin:
        return Twin(self.choice.tables(), self.choice.title)

    def _ipython_display_(self) -> None:
        show(self._repr_mimebundle_())

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = self.twin()._repr_mimebundle_()
        return bundle | self.box._repr_mimebundle_(**kwargs) if somebody_looks_on() else bundle

    @cached_property
    def box(self) -> Any:
        """The widget, made when it is first shown."""
        import ipywidgets as w

        wide, narrow = w.Layout(width="auto"), {"description_width": "4em"}
        given = {"layout": wide, "style": narrow}
        self.show = w.Dropdown(options=SHOWN, value=self.choice.show, description="show", **given)
        self.sort = w.Dropdown(options=SORTED, value=self.choice.sort, description="sort", **given)
        self.search = w.Text(value=self.choice.search, placeholder="title, passage, question",
                             description="find", continuous_update=False, **given)  # fmt: skip
        self.passages = w.Select(rows=LIST_ROWS, layout=wide, tooltip="passages: arrow keys move")
        self.count = w.HTML()
        self.edits = w.Dropdown(description="self-edit", style=narrow, layout=w.Layout(width="22em"))
        self.against = w.Dropdown(description="against", style=narrow, layout=w.Layout(width="22em"))
        self.view = w.ToggleButtons(options=VIEWS, style={"button_width": "7em"})
        self.page = w.HTML(layout=w.Layout(max_height="42em", width="100%", overflow="auto"))
        self._fill_passages()
        self._fill_edits()
        self._render()
        for control, react in (
            (self.show, self._on_filter), (self.sort, self._on_filter), (self.search, self._on_filter),
            (self.passages, self._on_passage), (self.edits, self._on_edit), (self.against, self._on_edit),
            (self.view, self._on_view),
        ):  # fmt: skip
            control.observe(react, "value")
        left = w.VBox(
            [self.show, self.sort, self.search, self.passages, self.count],
            layout=w.Layout(width="22em", min_width="16em", flex="0 0 auto"),
        )
        chosen = w.HBox([self.edits, self.against], layout=w.Layout(flex_flow="row wrap", overflow="visible"))
        right = w.VBox(
            [chosen, self.view, self.page],
            layout=w.Layout(flex="1 1 0px", min_width="0", margin="0 0 0 1em", overflow="visible"),
        )
        # Margins of a few pixels would give the whole widget a scroll bar; the page inside has its own.
        box = w.HBox([left, right], layout=w.Layout(width="100%", overflow="hidden"))
        box.add_class("seal-nb-inspector")
        return box

    def _fill_passages(self) -> None:
        """The list anew; what was chosen stays chosen if it is still in it."""
        rows = self.choice.rows
        self._filling = True
        try:
            self.passages.options = [(_label(row), row.index) for row in rows]
            indices = [row.index for row in rows]
            if indices and self.choice.passage not in indices:
                self.choice.choose_passage(indices[0])
            if indices:
                self.passages.value = self.choice.passage
        finally:
            self._filling = False
        total = len(self.inspection.run.passages)
        self.count.value = page(note(f"{len(rows)} of {total} passages"))

    def _fill_edits(self) -> None:
        self._filling = True
        try:
            options = [(_edit_label(row), row.index) for row in self.inspection.self_edits(self.choice.passage)]
            self.edits.options = self.against.options = options
            self.edits.value, self.against.value = self.choice.self_edit, self.choice.against
        finally:
            self._filling = False

    def _on_filter(self, _: Any) -> None:
        self.choice.show, self.choice.sort = self.show.value, self.sort.value
        self.choice.search = self.search.value
        before = self.choice.passage
        self._fill_passages()
        if self.choice.passage != before:
            self._chosen()

    def _on_passage(self, change: Any) -> None:
        if not self._filling and change["new"] is not None:
            self.choice.choose_passage(change["new"])
            self._chosen()

    def _on_edit(self, _: Any) -> None:
        if not self._filling:
            self.choice.self_edit, self.choice.against = self.edits.value, self.against.value
            self._render()
            self._tell()

    def _on_view(self, _: Any) -> None:
        self._render()

    def _chosen(self) -> None:
        self._fill_edits()
        self._render()
        self._tell()

    def _render(self) -> None:
        self.page.value = self.choice.page(self.view.value)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()


def _label(row: PassageRow) -> str:
    """Gain first, in a width of its own, so that the list reads as columns."""
    gain = "   –  " if row.gain is None else f"{row.gain:+4.0%}"
    marks = "≈" * (row.n_tied_best > 1) + "?" * (row.n_ungraded > 0)
    return f"{gain.replace(' ', chr(0x2007))}  {row.title} {marks}".rstrip()


def _edit_label(row: Any) -> str:
    accuracy = "–" if row.adapter is None else f"{row.adapter:.0%}"
    who = "" if pages.origin(row) == "the run" else f", {pages.origin(row)}"
    return f"{row.index}: {accuracy}{who}{' ★' if row.is_best else ''}"

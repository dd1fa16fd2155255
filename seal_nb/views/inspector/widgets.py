"""The passage inspector as a widget: choose on the left, read on the right; arrow keys move, Tab goes on.

Widgets only hold what ``choice`` says; without a front end they are not even made, and the notebook shows the
static twin instead. Knows nothing of training (``live`` does).
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from seal_nb.experiments.inspection import SHOWN, SORTED, Inspection
from seal_nb.experiments.inspection_rows import PassageRow
from seal_nb.experiments.run_files import EvaluatedSelfEdit
from seal_nb.views.inspector import pages
from seal_nb.views.inspector.choice import VIEWS, Choice, Twin
from seal_nb.views.inspector.fragments import note, page, show
from seal_nb.views.tables import somebody_looks_on

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
            options = [
                (_edit_label(row), row.index) for row in self.inspection.self_edits(self.choice.passage)
            ]
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

"""The inspector on the screen: the widget and the static view show the same, and only what is selected is rendered."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from seal_nb.errors import SettingsError
from seal_nb.experiments.session import ttt_server
from seal_nb.inspector import live
from seal_nb.inspector.inspection import Inspection
from seal_nb.inspector.live import (
    HTML,
    NO_VALUES,
    VIEWS,
    EditTrainer,
    LiveEdit,
    PassageInspector,
    TokenTexts,
    run_files,
)
from seal_nb.results.single_passage import SinglePassageRun
from seal_nb.server.client import TTTServer
from tests.server.conftest import HASTE, STUB, eventually

NO_SERVER: Any = SimpleNamespace(client=None)  # nothing is trained
EVIL = "<script>alert(1)</script>"


def asked(before: bool, after: bool | None, rep: int = 0) -> dict[str, Any]:
    return {"rep": rep, "question": f"Why {EVIL}?", "answer": "gold", "baseline_answer": "base",
            "adapter_answer": EVIL, "baseline_correct": before, "adapter_correct": after}  # fmt: skip


SCORED = {"kind": "gold", "index": 0, "tokens": ["gold"], "baseline_logprobs": [-5.0], "adapter_logprobs": [-1.0]}


def run_of(path: str = "") -> SinglePassageRun:
    articles = [
        {"title": f"{EVIL}{at}", "context": "about gold", "completions": [
            {"text": f"first {at} {EVIL}", "questions": [asked(False, at == 1)], "token_logprobs": [SCORED]},
            {"text": f"second {at}", "questions": [asked(True, None)]},
        ]}
        for at in range(3)
    ]  # fmt: skip
    params = {"rank": 8, "alpha": 16, "epochs": 4, "lr": 0.002, "target_modules": ["all-linear"],
              "batch_size": 3, "grad_accum_steps": 2, "dropout": 0.1, "end_mask_substring": "gold",
              "padding_in_loss": True}  # fmt: skip
    return SinglePassageRun(
        value={
            "articles": articles,
            "lora_params": params,
            "training": {"chat": True, "pad_to": 96, "max_new_tokens": 9},
            "split_newlines": False,
            "model": "m-float32-local-2048",
        },
        path=path,
    )


@pytest.fixture
def inspector() -> PassageInspector:
    return PassageInspector(Inspection(run_of()), sort="largest gain")


@pytest.fixture
def in_jupyterlab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "has_live_frontend", lambda: True)


def test_minus_one_is_the_first_passage_its_best_self_edit_and_the_next(inspector: PassageInspector) -> None:
    assert (inspector.passage, inspector.self_edit, inspector.against) == (1, 0, 1)


@pytest.mark.parametrize(
    ("passage", "self_edit", "against", "message"),
    [
        (3, -1, -1, "passage is 3; the run has 3, counted from 0"),
        (0, 2, -1, "self_edit is 2; passage 0 has 2, counted from 0"),
        (0, 0, 5, "against is 5; passage 0 has 2"),
    ],
)
def test_an_index_that_does_not_exist_is_refused(passage: int, self_edit: int, against: int, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        PassageInspector(Inspection(run_of()), passage, self_edit, against)


def test_a_filter_that_leaves_no_passage_is_refused() -> None:
    with pytest.raises(SettingsError, match="choose another filter"):
        PassageInspector(Inspection(run_of()), show="losses")


def test_a_passage_without_a_self_edit_cannot_be_selected() -> None:
    bare = {"title": "bare", "context": "c", "completions": []}
    full = {"title": "full", "context": "c", "completions": [{"text": "t", "questions": [asked(False, True)]}]}
    inspection = Inspection(SinglePassageRun(value={"articles": [bare, full]}), graders=())
    inspector = PassageInspector(inspection)
    assert inspector.passage == 1 and inspector.rows["passage"].tolist() == ["full"]
    assert "choose two different" in inspector.page("compare").lower()
    with pytest.raises(SettingsError, match="passage 0 has 0"):
        PassageInspector(inspection, 0)


def test_headless_there_is_no_widget_and_the_tables_of_all_views_are_shown(inspector: PassageInspector) -> None:
    bundle = inspector._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "box" not in vars(inspector)
    for text in ("▲ gained", "first 1", "second 1", "second − first", "train sequence", "3 passages"):
        assert all(text in shown.replace("\u00a0", " ") for shown in bundle.values())
    tables = [table for view in VIEWS for table in re.findall("<table.*?</table>", inspector.page(view), re.DOTALL)]
    assert len(tables) == 4 and all(table in bundle["text/html"] for table in tables)


@pytest.mark.usefixtures("in_jupyterlab")
def test_in_jupyterlab_the_widget_comes_with_the_same_static_view(inspector: PassageInspector) -> None:
    bundle = inspector._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"].startswith(inspector.static_view().html)


def test_every_text_is_escaped_in_every_view(inspector: PassageInspector) -> None:
    pages = [inspector.page(view) for view in VIEWS]
    static = inspector._repr_mimebundle_()["text/html"]
    assert all("<script" not in page and "<img" not in page for page in [*pages, static])
    assert all("&lt;script&gt;" in page for page in pages)


def test_long_texts_are_whole_in_html_and_cut_in_text() -> None:
    view = live.static_tables({"<b>": pd.DataFrame([{"<i>": "word " * 60, "n": None}])})
    assert "word " * 59 in view.html and "&lt;i&gt;" in view.html and "&lt;b&gt;" in view.html and "–" in view.html
    assert max(map(len, view.text.splitlines())) < 100


def test_the_summary_says_what_is_selected_and_follows_it(inspector: PassageInspector) -> None:
    assert inspector.summary() == {
        "passage": f"{EVIL}1",
        "self-edit": "0 (of 2), accuracy 0% → 100%",
        "flips": "1 to right, 0 to wrong, of 1 answers",
        "graders disagree": "on 1 of 1",
    }
    inspector.self_edit = 1
    assert inspector.summary()["self-edit"] == "1 (of 2), accuracy – → –"


def test_an_unknown_view_is_refused(inspector: PassageInspector) -> None:
    with pytest.raises(SettingsError, match="known are answers, self-edit, tokens, compare"):
        inspector.page("everything")


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, str]]:
    """(passage, self-edit, view) of each page that was rendered."""
    seen: list[tuple[int, int, str]] = []
    page = PassageInspector.page

    def counting(self: PassageInspector, view: str) -> str:
        seen.append((self.passage, self.self_edit, view))
        return page(self, view)

    monkeypatch.setattr(PassageInspector, "page", counting)
    return seen


def test_only_what_is_selected_is_rendered(inspector: PassageInspector, rendered: list[tuple[int, int, str]]) -> None:
    box = inspector.box
    assert rendered == [(1, 0, "answers")] and box is inspector.box
    inspector.ui.passages.value = 2
    inspector.ui.view.value = "compare"
    inspector.ui.edits.value = 1
    assert rendered[1:] == [(2, 0, "answers"), (2, 0, "compare"), (2, 1, "compare")]
    assert EVIL not in inspector.ui.shown.value


def test_a_filter_keeps_the_selected_passage_if_it_is_listed(
    inspector: PassageInspector, rendered: list[tuple[int, int, str]]
) -> None:
    assert inspector.box and inspector.ui.passages.value == 1
    inspector.ui.show.value = "gains"
    assert [index for _, index in inspector.ui.passages.options] == [1] and len(rendered) == 1
    inspector.ui.show.value = "all"
    inspector.ui.search.value = f"{EVIL}2"
    assert inspector.ui.passages.value == 2 and inspector.passage == 2 and rendered[-1][0] == 2
    inspector.ui.search.value = "nowhere to be found"
    assert inspector.ui.passages.options == () and "0 of 3 passages" in inspector.ui.count.value


def test_listeners_are_called_for_each_selection(inspector: PassageInspector) -> None:
    heard = []
    inspector.on_select(lambda: heard.append((inspector.passage, inspector.self_edit)))
    assert inspector.box
    inspector.ui.passages.value = 0
    inspector.ui.edits.value = 1
    assert heard == [(0, 0), (0, 1)]


def test_token_values_are_coloured_and_a_file_without_them_says_how_to_get_them(inspector: PassageInspector) -> None:
    assert "rgba(0,114,178" in inspector.page("tokens")
    inspector.self_edit = 1
    assert NO_VALUES in inspector.page("tokens")
    assert TokenTexts([], [])._repr_mimebundle_()["text/plain"] == NO_VALUES


def test_tokens_are_coloured_text_and_words(inspector: PassageInspector) -> None:
    data = inspector.tokens()._repr_mimebundle_()
    assert "<b>gold</b>" in data["text/html"] and "+4.0 nats" in data["text/plain"]


def test_files_of_a_run_are_names_without_a_path_headless(tmp_path: Path) -> None:
    (tmp_path / "run_a.json").write_text("{}")
    (tmp_path / "run_a.record.json").write_text("{}")
    view = run_files(tmp_path / "run_a.json")
    assert view.text == "files of this run: run_a.json, run_a.record.json"
    assert str(tmp_path.name) not in view.html


@pytest.mark.usefixtures("in_jupyterlab")
def test_files_of_a_run_are_links_in_jupyterlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run a.json").write_text("{}")
    assert 'href="out/run%20a.json"' in run_files(Path("out/run a.json")).html


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with TTTServer(run_dir=folder / "run", inner_loop=STUB, n_workers=1, **HASTE) as server:
        yield server.endpoint


@pytest.fixture
def edited(inspector: PassageInspector, endpoint: str, tmp_path: Path) -> Iterator[LiveEdit]:
    with ttt_server(endpoint=endpoint) as ttt:
        edit = LiveEdit(inspector, EditTrainer(ttt), keep_path=tmp_path / "kept.json")
        assert edit.inspector.box and edit.box
        yield edit


def test_controls_start_with_the_self_edit_and_the_settings_of_the_run(edited: LiveEdit) -> None:
    edit = edited.edit()
    assert edit.text == f"first 1 {EVIL}" and not edit.split_newlines
    training = edit.training
    assert (training.lora_rank, training.lora_alpha, training.finetune_epochs) == (8, 16, 4)
    assert training.finetune_lr == 0.002 and tuple(training.target_modules) == ("all-linear",)
    assert (training.batch_size, training.gradient_accumulation_steps, training.lora_dropout) == (3, 2, 0.1)
    assert (training.end_mask_substring, training.padding_in_loss) == ("gold", True)
    assert (training.chat, training.pad_to, training.soft_scores, training.max_new_tokens) == (True, 96, True, 9)
    for unshown in ("lora_dropout 0.1", "chat True", "pad_to 96", "end_mask_substring gold"):
        assert unshown in edited.ui.unshown.value
    assert "lora_rank" not in edited.ui.unshown.value
    edited.controls["lora_rank"].value = 2
    assert edited.edit().training.lora_rank == 2
    edited.inspector.ui.passages.value = 2
    assert edited.ui.text.value == f"first 2 {EVIL}"


def test_layers_that_only_the_run_names_stay_selected(tmp_path: Path) -> None:
    run = run_of()
    run.value |= {"lora_params": {"target_modules": ["q_proj", "up_proj"]}, "training": {}}
    inspector = PassageInspector(Inspection(run))
    edit = LiveEdit(inspector, EditTrainer(NO_SERVER), keep_path=tmp_path / "kept.json")
    assert edit.inspector.box and edit.box
    assert edit.edit().training.target_modules == ("q_proj", "up_proj")
    assert edit.edit().training.max_new_tokens == 64 and edit.ui.unshown.value == ""


def test_training_shows_the_new_answers_next_to_the_old_and_the_edit_in_the_list(edited: LiveEdit) -> None:
    assert edited.ui.ask_button.disabled and edited.ui.keep_button.disabled
    edited.ui.text.value = "other words"
    edited.ui.train_button.click()
    assert edited.ui.train_button.disabled and not edited.ui.cancel_button.disabled
    eventually(lambda: not edited.ui.train_button.disabled)
    shown = edited.ui.outcome.value
    assert "after the edit" in shown and "gold\n[right]" in shown and "&lt;script&gt;" in shown
    assert "Verdicts before the edit by local, after the edit by an unknown grader" in shown
    assert "accuracy 0% → 100%" in edited.ui.status.value
    options = [label for label, _ in edited.inspector.ui.edits.options]
    assert len(options) == 3 and "live edit" in options[2] and edited.inspector.against == 2
    edited.ui.keep_button.click()
    eventually(lambda: not edited.ui.keep_button.disabled)
    assert edited.keep_path.is_file() and "kept in kept.json" in edited.ui.status.value
    edited._ask()
    assert edited.own_answers.empty, "an empty question is not asked"
    edited.ui.question.value, edited.ui.gold.value = f"Where {EVIL}?", "here"
    edited.ui.ask_button.click()
    eventually(lambda: "&lt;script&gt;" in edited.ui.answered.value)


def test_an_error_shows_its_message_and_training_can_be_tried_again(edited: LiveEdit) -> None:
    edited.controls["finetune_lr"].value = -1.0
    edited.ui.train_button.click()
    eventually(lambda: not edited.ui.train_button.disabled)
    assert 'role="alert"' in edited.ui.status.value and "finetune_lr" in edited.ui.status.value
    assert edited.result is None and edited.ui.keep_button.disabled and edited.ui.ask_button.disabled


def test_live_edit_headless_says_what_it_would_start_with(inspector: PassageInspector, tmp_path: Path) -> None:
    edit = LiveEdit(inspector, EditTrainer(NO_SERVER), keep_path=tmp_path / "kept.json")
    bundle = edit._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "box" not in vars(edit)
    assert "epochs" in bundle["text/plain"] and "first 1" in bundle["text/plain"]


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 1.0, 0.5], [0.0, 0.0]])
def test_loss_curve_draws_every_value_and_names_it(values: list[float]) -> None:
    drawn = HTML.loss_curve(values)
    bars = re.findall("[▁-█]", drawn)
    assert len(bars) == len(values) and bars == sorted(bars, reverse=True)
    assert all(f"{value:.2f}" in drawn for value in values)

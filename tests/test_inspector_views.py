"""The inspector on the screen: what a widget shows stands in its twin, and nothing is drawn unasked."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seal_nb.errors import SettingsError
from seal_nb.inspector import html as record
from seal_nb.inspector import live as live_views
from seal_nb.inspector import tokens, widgets
from seal_nb.inspector import widgets as choices
from seal_nb.inspector.html import RunLinks, sparkline
from seal_nb.inspector.inspection import Inspection
from seal_nb.inspector.live import LiveEdit
from seal_nb.inspector.live_edit import Workbench
from seal_nb.inspector.tokens import NO_VALUES, TokenTexts
from seal_nb.inspector.widgets import VIEWS, Choice, PassageInspector, choose
from seal_nb.results.single_passage import SinglePassageRun, run_from_json
from seal_nb.server.launch import TTTServer
from tests.server.conftest import HASTE, STUB, eventually

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
    return run_from_json(
        {
            "articles": articles,
            "lora_params": params,
            "training": {"chat": True, "pad_to": 96, "pad_samples": 4, "max_new_tokens": 9},
            "split_newlines": False,
            "model": "m-float32-local-2048",
        },
        path=path,
    )


@pytest.fixture
def choice() -> Choice:
    return choose(Inspection(run_of()), -1, -1, -1, show="all", sort="largest gain")


@pytest.fixture
def looked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (widgets, live_views, record, tokens):
        monkeypatch.setattr(module, "somebody_looks_on", lambda: True)


def test_minus_one_is_the_first_passage_its_best_self_edit_and_the_next(choice: Choice) -> None:
    assert (choice.passage, choice.self_edit, choice.against) == (1, 0, 1)


@pytest.mark.parametrize(
    ("passage", "self_edit", "against", "message"),
    [
        (3, -1, -1, "passage is 3; the run has 3, counted from 0"),
        (0, 2, -1, "self_edit is 2; passage 0 has 2, counted from 0"),
        (0, 0, 5, "against is 5; passage 0 has 2"),
    ],
)
def test_an_index_that_is_not_there_is_refused(passage: int, self_edit: int, against: int, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        choose(Inspection(run_of()), passage, self_edit, against, show="all", sort="file order")


def test_a_filter_that_nothing_passes_is_refused_where_a_passage_is_to_be_chosen() -> None:
    with pytest.raises(SettingsError, match="choose another filter"):
        choose(Inspection(run_of()), -1, -1, -1, show="losses", sort="file order")


def test_a_passage_without_a_self_edit_is_not_there_to_choose() -> None:
    bare = {"title": "bare", "context": "c", "completions": []}
    full = {"title": "full", "context": "c", "completions": [{"text": "t", "questions": [asked(False, True)]}]}
    inspection = Inspection(run_from_json({"articles": [bare, full]}), graders=())
    choice = choose(inspection, -1, -1, -1, show="all", sort="file order")
    assert choice.passage == 1 and [row.title for row in choice.rows] == ["full"]
    with pytest.raises(SettingsError, match="passage 0 has 0"):
        choose(inspection, 0, -1, -1, show="all", sort="file order")


def test_headless_there_is_no_widget_and_the_twin_has_every_view(choice: Choice) -> None:
    inspector = PassageInspector(choice)
    bundle = inspector._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "box" not in vars(inspector)
    shown = bundle["text/html"].replace("\u00a0", " ")
    for text in ("▲ gained", "first 1", "second 1", "second − first", "train sequence", "3 passages"):
        assert text in shown and text in bundle["text/plain"]


@pytest.mark.usefixtures("looked_on")
def test_with_a_front_end_the_widget_comes_with_the_same_twin(choice: Choice) -> None:
    bundle = PassageInspector(choice)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"] == PassageInspector(choice).twin()._repr_mimebundle_()["text/html"]


def test_every_text_is_escaped_in_every_view(choice: Choice) -> None:
    pages = [choice.page(view) for view in VIEWS]
    twin = PassageInspector(choice)._repr_mimebundle_()["text/html"]
    assert all("<script" not in page for page in [*pages, twin])
    assert all("&lt;script&gt;" in page for page in pages)


def test_a_glance_says_what_is_chosen_and_follows_it(choice: Choice) -> None:
    assert choice.glance() == {
        "passage": f"{EVIL}1",
        "self-edit": "0 (of 2), accuracy 0% → 100%",
        "flips": "1 to right, 0 to wrong, of 1 answers",
        "graders disagree": "on 1 of 1",
    }
    choice.self_edit = 1
    assert choice.glance()["self-edit"] == "1 (of 2), accuracy – → –"


def test_an_unknown_view_is_refused(choice: Choice) -> None:
    with pytest.raises(SettingsError, match="known are answers, self-edit, tokens, compare"):
        choice.page("everything")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, str]]:
    """What was rendered: (passage, self-edit, view)."""
    seen: list[tuple[int, int, str]] = []
    page = choices.Choice.page

    def counting(self: Choice, view: str) -> str:
        seen.append((self.passage, self.self_edit, view))
        return page(self, view)

    monkeypatch.setattr(choices.Choice, "page", counting)
    return seen


def test_only_what_is_chosen_is_drawn(choice: Choice, drawn: list[tuple[int, int, str]]) -> None:
    inspector = PassageInspector(choice)
    box = inspector.box
    assert drawn == [(1, 0, "answers")] and box is inspector.box
    inspector.passages.value = 2
    inspector.view.value = "compare"
    inspector.edits.value = 1
    assert drawn[1:] == [(2, 0, "answers"), (2, 0, "compare"), (2, 1, "compare")]
    assert EVIL not in inspector.page.value and "second 2" in inspector.page.value


def test_a_filter_keeps_what_is_chosen_if_it_can(choice: Choice, drawn: list[tuple[int, int, str]]) -> None:
    inspector = PassageInspector(choice)
    assert inspector.box and inspector.passages.value == 1
    inspector.show.value = "gains"
    assert [index for _, index in inspector.passages.options] == [1] and len(drawn) == 1
    inspector.show.value = "all"
    inspector.search.value = f"{EVIL}2"
    assert inspector.passages.value == 2 and choice.passage == 2 and drawn[-1][0] == 2
    inspector.search.value = "nowhere to be found"
    assert inspector.passages.options == () and "0 of 3 passages" in inspector.count.value


def test_who_listens_hears_of_a_choice(choice: Choice) -> None:
    inspector, heard = PassageInspector(choice), []
    inspector.on_choice(lambda: heard.append((choice.passage, choice.self_edit)))
    assert inspector.box
    inspector.passages.value = 0
    inspector.edits.value = 1
    assert heard == [(0, 0), (0, 1)]


def test_token_values_are_coloured_and_a_file_without_says_how_to_get_them(choice: Choice) -> None:
    assert "rgba(0,114,178" in choice.page("tokens")
    choice.self_edit = 1
    assert NO_VALUES in choice.page("tokens")
    assert TokenTexts([])._repr_mimebundle_()["text/plain"] == NO_VALUES


def test_tokens_are_a_picture_headless(choice: Choice) -> None:
    data, metadata = TokenTexts(choice.named_texts())._repr_mimebundle_()
    assert "text/html" not in data and "+4.0 nats" in metadata["image/png"]["alt"]


@pytest.mark.usefixtures("looked_on")
def test_tokens_are_text_where_somebody_looks_on(choice: Choice) -> None:
    data = TokenTexts(choice.named_texts())._repr_mimebundle_()
    assert "image/png" not in data and "<b>gold</b>" in data["text/html"]


def test_links_name_no_place_headless(tmp_path: Path) -> None:
    (tmp_path / "run_a.json").write_text("{}")
    (tmp_path / "run_a.record.json").write_text("{}")
    bundle = RunLinks(tmp_path / "run_a.json")._repr_mimebundle_()
    assert bundle["text/plain"] == "on disk: run_a.json, run_a.record.json"
    assert str(tmp_path.name) not in bundle["text/html"]


@pytest.mark.usefixtures("looked_on")
def test_links_can_be_followed_where_somebody_looks_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run a.json").write_text("{}")
    assert 'href="out/run%20a.json"' in RunLinks(Path("out/run a.json"))._repr_mimebundle_()["text/html"]


@pytest.fixture
def edited(choice: Choice, tmp_path: Path) -> Iterator[LiveEdit]:
    with (
        TTTServer(run_dir=tmp_path / "run", inner_loop=STUB, n_workers=1, **HASTE) as server,
        Workbench(server.endpoint, run_dir=tmp_path, timeout_s=30) as bench,
    ):
        edit = LiveEdit(PassageInspector(choice), bench, keep_path=tmp_path / "kept.json")
        assert edit.inspector.box and edit.box
        yield edit


def test_controls_begin_with_the_self_edit_and_the_settings_of_the_run(edited: LiveEdit) -> None:
    edit = edited.edit()
    assert edit.text == f"first 1 {EVIL}" and not edit.split_newlines
    training = edit.training
    assert (training.lora_rank, training.lora_alpha, training.finetune_epochs) == (8, 16, 4)
    assert training.finetune_lr == 0.002 and tuple(training.target_modules) == ("all-linear",)
    assert (training.batch_size, training.gradient_accumulation_steps, training.lora_dropout) == (3, 2, 0.1)
    assert (training.end_mask_substring, training.padding_in_loss) == ("gold", True)
    assert (training.chat, training.pad_to, training.pad_samples, training.max_new_tokens) == (True, 96, 4, 9)
    for unseen in ("lora_dropout 0.1", "chat True", "pad_to 96", "end_mask_substring gold"):
        assert unseen in edited.unseen.value
    assert "lora_rank" not in edited.unseen.value
    edited.rank.value = 2
    assert edited.edit().training.lora_rank == 2
    edited.inspector.passages.value = 2
    assert edited.text.value == f"first 2 {EVIL}"


def test_layers_that_only_the_run_names_stay_chosen(tmp_path: Path) -> None:
    run = run_of()
    settings = {**run.settings, "lora_params": {"target_modules": ["q_proj", "up_proj"]}, "training": {}}
    choice = choose(Inspection(replace(run, settings=settings)), -1, -1, -1, show="all", sort="file order")
    with Workbench(run_dir=tmp_path) as bench:
        edit = LiveEdit(PassageInspector(choice), bench, keep_path=tmp_path / "kept.json")
        assert edit.inspector.box and edit.box
        assert edit.edit().training.target_modules == ("q_proj", "up_proj")
        assert edit.edit().training.max_new_tokens == 64 and edit.unseen.value == ""


def test_training_shows_the_new_answers_beside_the_old_and_the_edit_in_the_list(edited: LiveEdit) -> None:
    edited.text.value = "other words"
    edited.train_button.click()
    assert edited.train_button.disabled and not edited.cancel_button.disabled
    eventually(lambda: not edited.train_button.disabled)
    shown = edited.outcome.value
    assert "after the edit" in shown and "gold\n[right]" in shown and "&lt;script&gt;" in shown
    assert "verdicts before the edit by local, after it by a grader that is not recorded" in shown
    assert "accuracy 0% → 100%" in edited.status.value
    options = [label for label, _ in edited.inspector.edits.options]
    assert len(options) == 3 and "live edit" in options[2] and edited.inspector.choice.against == 2
    edited.keep_button.click()
    assert (edited.keep_path).is_file() and "kept in kept.json" in edited.status.value


def test_an_error_shows_its_message_and_the_next_try_is_free(edited: LiveEdit) -> None:
    edited.rate.value = -1.0
    edited.train_button.click()
    eventually(lambda: not edited.train_button.disabled)
    assert 'role="alert"' in edited.status.value and "finetune_lr" in edited.status.value
    assert edited.result is None and edited.keep_button.disabled and edited.ask_button.disabled


def test_a_question_of_one_s_own_needs_a_trained_edit_and_a_question(edited: LiveEdit) -> None:
    assert edited.ask_button.disabled
    edited.train_button.click()
    eventually(lambda: not edited.train_button.disabled)
    edited._ask()
    assert edited.own_answers == [], "nothing was asked"
    edited.question.value, edited.gold.value = f"Where {EVIL}?", "here"
    edited.ask_button.click()
    eventually(lambda: edited.own_answers)
    eventually(lambda: "&lt;script&gt;" in edited.answered.value)


def test_live_edit_headless_says_what_it_would_begin_with(choice: Choice, tmp_path: Path) -> None:
    with Workbench(run_dir=tmp_path) as bench:
        edit = LiveEdit(PassageInspector(choice), bench, keep_path=tmp_path / "kept.json")
        bundle = edit._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "box" not in vars(edit)
    assert "epochs" in bundle["text/plain"] and "first 1" in bundle["text/plain"]


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 1.0, 0.5], [0.0, 0.0]])
def test_sparkline_draws_every_value_and_says_it(values: list[float]) -> None:
    drawn = sparkline(values)
    if values:
        (points,) = re.findall(r'points="([^"]*)"', drawn)
        assert len(points.split()) == len(values)
        assert all(f"{value:.2f}" in drawn for value in values)
    else:
        assert drawn == ""

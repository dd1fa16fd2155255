"""The passage inspector in a browser: mouse, keyboard, and an edit that is trained."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.conftest import new_page
from tests.browser.lab import Lab, OpenNotebook

NAME = "07_passage_inspector.ipynb"
SCREENSHOTS = os.environ.get("SEAL_NB_SCREENSHOTS", "")  # a folder for screenshots
TRAIN_MS = 300_000  # the machine may be busy


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    """One page for all tests; none depends on the state that another one leaves."""
    yield from new_page(browser)


@pytest.fixture(scope="module")
def notebook(page: Page, lab: Lab) -> Iterator[OpenNotebook]:
    notebook = OpenNotebook(page, lab, NAME)
    notebook.run_all()
    assert notebook.errors() == []
    yield notebook
    notebook.close()


def inspector(page: Page) -> Locator:
    return page.locator(".seal-nb-inspector").last


def live(page: Page) -> Locator:
    return page.locator(".seal-nb-live").last


def passages(page: Page) -> Locator:
    return inspector(page).locator("select[size], select[multiple]").first


def title_of(label: str) -> str:
    """The label without the gain at its start and the marks at its end."""
    return re.sub(r"^\S+\s+", "", label.strip()).rstrip("≈? ")


def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def check_that_a_heading_sorts(page: Page) -> None:
    """The table of the run is sorted by its first column, both ways, by mouse and by keyboard."""
    heading = page.locator(".jp-OutputArea th", has_text=re.compile("^run$")).first
    first = heading.locator("xpath=ancestor::table").locator("tbody td").first
    expect(first).to_have_text("file")
    heading.click()
    expect(first).to_have_text("arm")
    heading.press("Enter")
    expect(first).to_have_text("self-edits")


def check_that_a_table_in_the_widget_sorts(page: Page) -> None:
    heading = inspector(page).locator("th", has_text=re.compile("^question$")).first
    column = heading.evaluate("th => th.cellIndex") + 1
    questions = heading.locator("xpath=ancestor::table").locator(f"tbody tr td:nth-child({column})")
    before = questions.all_inner_texts()
    heading.click()
    expect(heading).to_have_attribute("aria-sort", "ascending")
    assert questions.all_inner_texts() == sorted(before, key=str.casefold) != before
    heading.press("Enter")
    assert questions.all_inner_texts() == sorted(before, key=str.casefold, reverse=True)


def check_that_the_top_follows(page: Page, title: str, edit: str) -> None:
    """The table at the top of the notebook shows what is selected further down."""
    top = page.locator("table", has_text="at a glance").first
    expect(top).to_contain_text(title)
    expect(top).to_contain_text(edit)


def test_select_sort_edit_and_train(notebook: OpenNotebook, page: Page) -> None:
    check_that_a_heading_sorts(page)
    inspector(page).scroll_into_view_if_needed()
    listed = passages(page).locator("option")
    titles = listed.all_inner_texts()
    assert len(titles) == 4

    passages(page).select_option(index=1)
    chosen = title_of(titles[1])
    expect(inspector(page).locator("h4").first).to_have_text(chosen)

    passages(page).focus()
    page.keyboard.press("ArrowDown")
    expect(inspector(page).locator("h4").first).to_have_text(title_of(titles[2]))
    page.keyboard.press("ArrowUp")
    expect(inspector(page).locator("h4").first).to_have_text(chosen)

    inspector(page).get_by_label("sort").select_option("file order")
    expect(listed.first).to_contain_text("Oskavel Tide Clock")
    inspector(page).get_by_label("sort").select_option("largest gain")
    expect(listed.first).not_to_contain_text("Oskavel Tide Clock")
    gains = [float(text.split("%")[0].replace("\u2007", " ")) for text in listed.all_inner_texts()]
    assert gains == sorted(gains, reverse=True)

    edits = inspector(page).get_by_label("self-edit")
    edits.select_option(index=0)
    expect(inspector(page).get_by_text("Answers with self-edit 0")).to_be_visible()
    edits.select_option(index=2)
    expect(inspector(page).get_by_text("Answers with self-edit 2")).to_be_visible()
    check_that_the_top_follows(page, chosen, "2 (of 3)")
    check_that_a_table_in_the_widget_sorts(page)
    picture(page, "inspector_answers")

    for view, seen in (
        ("self-edit", "Train sequences of self-edit"), ("compare", "second − first"), ("tokens", "nats")
    ):  # fmt: skip
        inspector(page).get_by_role("button", name=view, exact=True).click()
        expect(inspector(page).get_by_text(seen).first).to_be_visible()
        picture(page, f"inspector_{view}")

    box = live(page)
    box.scroll_into_view_if_needed()
    statement = "The river of the test is called Umbrawick."
    text = box.locator("textarea")
    assert text.input_value()
    text.fill(statement)
    text.press("Tab")
    for name, value in (("epochs", "8"), ("max tokens", "12")):
        box.get_by_label(name).fill(value)
        box.get_by_label(name).press("Tab")
    box.get_by_role("button", name="Train and ask").click()
    expect(box.get_by_role("button", name="Cancel")).to_be_enabled()
    expect(box.get_by_role("columnheader", name="after the edit")).to_be_visible(timeout=TRAIN_MS)
    rows = box.locator("table").first.locator("tbody tr")
    answers = [row.locator("td").all_inner_texts() for row in rows.all()]
    assert answers and any(row[4] != row[5] for row in answers), "no answer changed"
    expect(box.get_by_text(re.compile(r"accuracy .* after 16 steps, loss"))).to_be_visible()
    picture(page, "live_edit")

    box.get_by_placeholder("a question of your own").fill("What is the river of the test called?")
    box.get_by_placeholder("right answer").fill("Umbrawick")
    box.get_by_role("button", name="Ask", exact=True).click()
    expect(box.get_by_text("What is the river of the test called?")).to_be_visible(timeout=TRAIN_MS)
    box.get_by_role("button", name="Keep as an arm").click()
    expect(box.get_by_text("kept in")).to_be_visible()

    assert inspector(page).get_by_label("against").locator("option").count() == 4, "the edit is there too"
    if SCREENSHOTS:
        notebook.theme("JupyterLab Dark")
        picture(page, "live_edit_dark")
        inspector(page).scroll_into_view_if_needed()
        picture(page, "inspector_dark")


def test_a_bad_setting_shows_its_message(notebook: OpenNotebook, page: Page) -> None:
    box = live(page)
    box.scroll_into_view_if_needed()
    box.get_by_label("lr").fill("-1")
    box.get_by_label("lr").press("Tab")
    box.get_by_role("button", name="Train and ask").click()
    expect(box.get_by_role("alert")).to_contain_text("finetune_lr", timeout=TRAIN_MS)
    expect(box.get_by_role("button", name="Train and ask")).to_be_enabled()

"""JupyterLab in a real browser: notebooks with widgets open and run there, and it asks nobody for anything.

That the cells of every notebook run is nbval's affair, and the inspector has a test file of its own.
"""

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import NOTEBOOKS
from tests.browser.lab import Lab, OpenNotebook


@pytest.mark.parametrize("name", ["00_tour.ipynb", "02_ttt_server.ipynb"])
def test_a_notebook_with_widgets_opens_and_runs_from_top_to_bottom(page: Page, lab: Lab, name: str) -> None:
    notebook = OpenNotebook(page, lab, name)
    notebook.run_all()
    assert notebook.errors() == []
    assert notebook.not_run() == []
    notebook.close()


def test_jupyterlab_asks_nobody_for_news_or_updates(page: Page, lab: Lab) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    OpenNotebook(page, lab, NOTEBOOKS[-1].name).close()
    assert asked and [url for url in asked if not url.startswith((lab.url, "data:", "blob:"))] == []
    assert [url for url in asked if "/lab/api/news" in url or "/lab/api/update" in url] == []


def test_the_address_that_is_printed_opens_the_tour(page: Page, lab: Lab) -> None:
    page.goto(f"{lab.url}/?token={lab.token}")
    page.wait_for_url("**/lab/tree/notebooks/00_tour.ipynb*", timeout=60_000)
    page.get_by_role("heading", name="A tour: one passage goes into the weights").wait_for(timeout=60_000)

"""What only a real browser shows of JupyterLab: it opens the tour and makes no requests to other addresses.

nbval executes the cells of every notebook. The inspector's test runs a notebook with widgets in the browser.
"""

from playwright.sync_api import Page

from tests.browser.lab import Lab, OpenNotebook


def test_jupyterlab_makes_no_request_for_news_or_updates(page: Page, lab: Lab) -> None:
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    OpenNotebook(page, lab, "09_sweep.ipynb").close()
    assert urls and [url for url in urls if not url.startswith((lab.url, "data:", "blob:"))] == []
    assert [url for url in urls if "/lab/api/news" in url or "/lab/api/update" in url] == []


def test_the_address_that_is_printed_opens_the_tour(page: Page, lab: Lab) -> None:
    page.goto(f"{lab.url}/?token={lab.token}")
    page.wait_for_url("**/lab/tree/notebooks/00_tour.ipynb*", timeout=60_000)
    page.get_by_role("heading", name="A tour: one passage goes into the weights").wait_for(timeout=60_000)

"""The pages of a run: its main figures, and each executed notebook as HTML in which nothing acts."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from seal_nb.chain.local import write_index
from seal_nb.errors import DataError
from seal_nb.views.tables import as_html

# One white pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mP8/x8AAwMCAO+ip1sAAAAASUVORK5CYII="
EVIL = "<script>alert(1)</script>"
FAILING = new_code_cell("1/0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="<no>", traceback=[])])


class Page(HTMLParser):
    """What a reader of the page gets: tags with attributes, and texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def executed(folder: Path, name: str, *cells: nbformat.NotebookNode, start: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    notebook = new_notebook(cells=list(cells), metadata={"papermill": {"start_time": start}})
    nbformat.write(notebook, folder / name)
    return folder / name


def picture(alt: str = "", png: str = PIXEL) -> nbformat.NotebookNode:
    return shown({"image/png": png, "text/plain": "<Figure>"}, **{"image/png": {"alt": alt}})


def shown(data: dict[str, str], **metadata: object) -> nbformat.NotebookNode:
    return new_code_cell("x", outputs=[new_output("display_data", data=data, metadata=metadata)])


def test_index_has_the_main_figures_of_the_results_and_links_each_notebook_as_a_page(tmp_path: Path) -> None:
    for folder, start in (("b", "2026-01-01T00:01"), ("a a", "2026-01-01T00:02")):
        executed(tmp_path / folder, "03.ipynb", new_markdown_cell(f"# {folder}"), picture("query"), start=start)
    sections = [
        cell for n in range(3) for cell in (new_markdown_cell(f"## S{n}"), picture(f"{n}.0"), picture(f"{n}.1"))
    ]
    executed(tmp_path / "c", "08_results.ipynb", new_markdown_cell("# Results"), *sections, start="9")
    page = Page(write_index(tmp_path, title="A run"))
    assert [link["href"] for link in page.all("a")] == ["c/08_results.html", "b/03.html", "a%20a/03.html"]
    assert (tmp_path / "a a/03.html").exists()
    assert [image["alt"] for image in page.all("img")] == ["0.0", "1.0", "2.0"], "the first of each section"
    assert {"A run", "S1.", "Results", "a a"} <= set(page.texts)
    assert "3 notebooks ran to the end." in "".join(page.texts)


def test_nothing_from_a_notebook_acts_in_the_pages(tmp_path: Path) -> None:
    html = f"<table onclick='x'><tr><th>head</th><td>{EVIL}<img src=x onerror=y>cell</td></tr></table><iframe src=x>"
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "a widget"}
    cells = (new_markdown_cell(f"# {EVIL}\n\n{EVIL} <meta http-equiv=refresh>"), shown({"text/html": html}))
    stream = new_code_cell("x", outputs=[new_output("stream", text=EVIL)])
    path = executed(tmp_path, "<b>.ipynb", *cells, stream, shown(widget), picture("<i>", png='x" onerror="y'), FAILING)
    index = write_index(tmp_path, title=EVIL)
    for page in (Page(index), Page(path.with_suffix(".html"))):
        assert not {"script", "b", "i", "link", "iframe"} & {tag for tag, _ in page.tags}
        assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
        policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
        assert len(policies) == 1 and "default-src 'none'" in str(policies[0])
        assert all(str(image["src"]).startswith("data:") for image in page.all("img") if image.get("src") != "x")
    assert not Page(index).all("img")
    assert {"head", "cell"} <= set(page.texts) and page.all("th")


def test_index_says_which_notebook_failed_and_shows_no_half_result(tmp_path: Path) -> None:
    executed(tmp_path, "08_results.ipynb", new_markdown_cell("# <Results>"), picture(), FAILING)
    text = (path := write_index(tmp_path)).read_text()
    assert '1 notebook ran; <span class="bad">failed: <a href="08_results.html">&lt;Results&gt;</a></span>' in text
    assert "ZeroDivisionError: <no>" in Page(path).texts and not Page(path).all("img")


def test_a_page_keeps_the_styles_that_align_our_tables_and_no_others(tmp_path: Path) -> None:
    ours = as_html(pd.DataFrame({"arm": ["a"], "accuracy": [0.5]}), "<arms>")
    others = "<style>body { display: none }</style>" + ours.replace("left;", "url(//x);").replace("#T_", "#T_f")
    path = executed(tmp_path, "08_results.ipynb", shown({"text/html": ours}), shown({"text/html": others}))
    write_index(tmp_path)
    text = path.with_suffix(".html").read_text()
    (aligned,) = re.findall(r'<style type="text/css">\s*#T_.*?</style>', text, re.DOTALL)
    assert aligned in ours and "td.col1 {\n  text-align: right" in aligned
    assert "url(//x)" not in text and "display: none }" not in text.partition("</head>")[2]


@pytest.mark.parametrize("name", ["notes.html", "index.html"])
@pytest.mark.parametrize("kind", ["page", "link", "dangling link"])
def test_pages_replace_only_pages_that_were_written_here(tmp_path: Path, name: str, kind: str) -> None:
    executed(tmp_path / "run", "a.ipynb")
    executed(tmp_path / "run", "notes.ipynb", new_markdown_cell("# Ours"))
    planted = write_index(tmp_path / "run").with_name(name)
    assert write_index(tmp_path / "run", title="again").is_file()
    planted.rename(tmp_path / "ours.html")
    (tmp_path / "user.html").write_text("the user's")
    if kind == "page":
        (tmp_path / "user.html").rename(planted)
    else:
        planted.symlink_to(tmp_path / ("ours.html" if kind == "link" else "nowhere"))
    before = {path.name: path.read_text() for path in [*tmp_path.rglob("*.html")] if path.exists()}
    with pytest.raises(DataError, match=f"{name}: is not a page of seal-nb"):
        write_index(tmp_path / "run", title="other")
    assert {path.name: path.read_text() for path in [*tmp_path.rglob("*.html")] if path.exists()} == before


def test_a_notebook_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ipynb")
    with pytest.raises(DataError, match="not a regular file"):
        write_index(tmp_path)


def test_an_empty_folder_and_a_broken_notebook_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no executed notebook"):
        write_index(tmp_path)
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(DataError, match=r"broken\.ipynb"):
        write_index(tmp_path)

"""The inspector's notebook with a published run, by papermill, and as an HTML page.

With its defaults every notebook is executed by nbval.
"""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from nbconvert import HTMLExporter

from seal_nb.notebook_runner import default_notebooks_dir, run_notebook
from seal_nb.results.collect import read_run
from seal_nb.server.client import TTTServer
from tests.server.conftest import HASTE, STUB
from tests.test_notebooks import shown

NAME = "07_passage_inspector"


@pytest.fixture(scope="module")
def executed(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspector")
    with TTTServer(run_dir=folder / "run", inner_loop=STUB, n_workers=1, **HASTE) as server:
        values = {
            "run_json": str(golden / "results" / "rank_iter0.json.gz"),
            "output_dir": str(folder),
            "endpoint": server.endpoint,
            "show": "ties",
            "edited": "a\nb",
            "question": "What?",
            "gold": "that",
        }
        notebook, copy = default_notebooks_dir() / f"{NAME}.ipynb", folder / f"{NAME}.ipynb"
        run_notebook(notebook, values, copy, stream=io.StringIO())
    return copy


class Words(HTMLParser):
    """The text of a page, without its scripts and styles, and the alt texts of its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self.alts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        if tag == "img":
            self.alts.append(str(dict(attributes).get("alt")))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def test_the_exported_page_has_what_the_notebook_shows_without_widgets(executed: Path) -> None:
    page, _ = HTMLExporter(template_name="classic").from_filename(str(executed))  # "lab" leaves alt texts out
    words = Words(page)
    assert "application/vnd.jupyter.widget-view+json" not in page
    n_cells_checked = 0
    for cell in json.loads(executed.read_text())["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                for said in Words("".join(data["text/html"])).said:
                    assert " ".join(said.split()) in words.text
                n_cells_checked += 1
            elif "image/png" in data:
                assert output["metadata"]["image/png"]["alt"] in words.alts
                n_cells_checked += 1
            elif "text" in output:
                assert " ".join("".join(output["text"]).split()) in words.text
    assert n_cells_checked >= 8


def test_the_published_run_is_shown_and_says_that_it_has_no_values_of_tokens(executed: Path) -> None:
    assert "22 passages, the first 15 shown" in shown(executed, "inspector")
    assert "no values of single tokens" in shown(executed, "tokens")
    assert "rank_iter0.json.gz" in shown(executed, "run")


def test_the_edit_is_shown_next_to_the_old_answers_and_kept(executed: Path) -> None:
    assert shown(executed, "edit").strip() == "a\nb"
    assert "after the edit" in shown(executed, "beside")
    assert "wrong → right" in shown(executed, "own"), "the stub's adapter answers right"
    (edit,) = read_run(executed.parent / "run_inspector.json").passages[0].self_edits
    assert (edit.text, edit.made["origin"]) == ("a\nb", "live_edit")

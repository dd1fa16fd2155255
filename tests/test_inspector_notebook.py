"""The inspector's notebook headless: by papermill, on our runs and published ones, and as an HTML page."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from nbconvert import HTMLExporter

from seal_nb.notebook_runner import StageFailed, default_notebooks_dir, run_notebook
from seal_nb.results.single_passage import read_run
from seal_nb.server.launch import TTTServer
from tests.server.conftest import HASTE, STUB
from tests.test_notebooks import shown

NAME = "07_passage_inspector"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("server")
    with TTTServer(run_dir=folder / "run", inner_loop=STUB, n_workers=1, **HASTE) as server:
        yield server.endpoint


def run(output_dir: Path, **values: Any) -> Path:
    executed = output_dir / f"{NAME}.ipynb"
    notebook = default_notebooks_dir() / f"{NAME}.ipynb"
    values = {"output_dir": str(output_dir), **values}
    run_notebook(notebook, values, executed, write=lambda _: None, progress_bar=False)
    return executed


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


def test_the_exported_page_has_what_the_notebook_shows_without_widgets(endpoint: str, tmp_path: Path) -> None:
    executed = run(tmp_path, endpoint=endpoint)
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


def test_the_edit_stands_beside_the_old_answers_and_is_kept(endpoint: str, tmp_path: Path) -> None:
    executed = run(tmp_path, endpoint=endpoint, edited="a\nb", question="What?", gold="that")
    assert shown(executed, "edit").strip() == "a\nb"
    assert "after the edit" in shown(executed, "beside")
    assert "wrong → wrong" in shown(executed, "own"), "the stub's answer to a baseline question is wrong"
    (edit,) = read_run(tmp_path / "run_inspector.json").passages[0].self_edits
    assert (edit.text, edit.made["origin"]) == ("a\nb", "live_edit")


def test_a_published_run_opens_at_the_passage_that_was_asked_for(golden: Path, endpoint: str, tmp_path: Path) -> None:
    published = golden / "results" / "rank_iter0.json.gz"
    executed = run(tmp_path, run_json=str(published), endpoint=endpoint, show="ties", sort="largest loss")
    said = shown(executed, "inspector")
    assert "22 passages, the first 15 shown" in said
    assert "no values for single tokens" in shown(executed, "tokens")
    assert "rank_iter0.json.gz" in shown(executed, "run")


def test_a_passage_that_is_not_there_is_refused_in_a_sentence(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="passage is 99; the run has 4, counted from 0"):
        run(tmp_path, endpoint=endpoint, passage=99)

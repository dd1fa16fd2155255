"""`nbconvert --to html` shows every output of a notebook, without widgets.

The template "lab" is nbconvert's default and omits alt texts; one notebook is enough for it.
"""

import json
from pathlib import Path

import pytest
from nbconvert import HTMLExporter

from tests.test_inspector_notebook import Words
from tests.test_notebooks import NOTEBOOKS


def flat(text: str) -> str:
    return " ".join(text.split())


PAGES = [(notebook, "classic") for notebook in NOTEBOOKS] + [(NOTEBOOKS[0], "lab")]


@pytest.mark.parametrize(("notebook", "template"), PAGES, ids=[f"{page[0].stem}-{page[1]}" for page in PAGES])
def test_the_page_has_all_outputs_of_the_notebook(notebook: Path, template: str) -> None:
    page, _ = HTMLExporter(template_name=template).from_filename(str(notebook))
    words = Words(page)
    assert "application/vnd.jupyter.widget" not in page
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                said = Words("".join(data["text/html"])).said
                assert [text for text in said if flat(text) not in words.text] == []
            elif "image/png" in data:
                assert "".join(data["image/png"]).strip()[:500] in page.replace("\n", "")
                assert template == "lab" or output["metadata"]["image/png"]["alt"] in words.alts
            elif "text" in output:
                assert flat("".join(output["text"])) in words.text

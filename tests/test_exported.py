"""A notebook as a page: `nbconvert --to html` shows what the notebook shows, without widgets and scripts."""

import json
from pathlib import Path

import pytest
from nbconvert import HTMLExporter

from tests.test_inspector_notebook import Words
from tests.test_notebooks import NOTEBOOKS


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("template", ["lab", "classic"])
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
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

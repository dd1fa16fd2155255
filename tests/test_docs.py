"""The documentation site builds without warnings, executes nothing, and its links work."""

import ast
import html
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
OUTSIDE = {"http", "https", "mailto"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Warnings are errors, as in `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto", "-b", "html", "-d",
         str(folder / "trees"), str(ROOT / "docs"), str(folder / "html")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "html"


class Links(HTMLParser):
    """The links of a page, and the anchors that links can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.anchors |= {value for key in ("id", "name") if (value := named.get(key))}
        if tag == "a" and named.get("href"):
            self.targets.append(str(named["href"]))
        if tag in ("img", "script", "iframe") and named.get("src"):
            self.loaded.append(str(named["src"]))
        if tag == "link" and named.get("rel") in ("stylesheet", "icon") and named.get("href"):
            self.loaded.append(str(named["href"]))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path.read_text()) for path in site.rglob("*.html")}


def test_every_page_and_every_notebook_is_there(site: Path) -> None:
    for name in PAGES:
        assert (site / f"{name}.html").is_file()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / f"{notebook.stem}.html").is_file()


def test_the_api_has_every_module(pages: dict[Path, Links]) -> None:
    files = [path for path in (ROOT / "seal_nb").rglob("*.py") if (path.parent / "__init__.py").is_file()]
    named = [path.relative_to(ROOT).with_suffix("") for path in files if path.name != "__init__.py"]
    modules = {".".join(path.parts) for path in named} - {"seal_nb.ttt.kernels"}  # its import needs Triton
    anchors = {anchor for path, page in pages.items() if path.parent.name == "api" for anchor in page.anchors}
    assert modules and {f"module-{name}" for name in modules} - anchors == set()


def test_internal_links_reach_a_file_and_its_anchor(pages: dict[Path, Links]) -> None:
    broken = []
    for path, page in pages.items():
        for target in {*page.targets, *page.loaded}:
            parts = urlsplit(html.unescape(target))
            if parts.scheme in OUTSIDE or parts.scheme == "data":
                continue
            reached = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            ok = reached.is_file() and (
                not parts.fragment or reached not in pages or unquote(parts.fragment) in pages[reached].anchors
            )
            broken += [] if ok else [f"{path.name} → {target}"]
    assert sorted(broken) == []


def test_notebooks_are_shown_with_their_committed_outputs(pages: dict[Path, Links], site: Path) -> None:
    for name in ("00_tour", "07_passage_inspector"):
        assert len(pages[site / "notebooks" / f"{name}.html"].loaded) > 3
    assert "Ilse Corvandt" in (site / "notebooks" / "00_tour.html").read_text()


def test_pictures_have_alt_texts(site: Path) -> None:
    """On the site's own pages; test_notebook_outputs.py checks the pictures of notebooks."""
    for name in PAGES:
        for tag in (site / f"{name}.html").read_text().split("<img")[1:]:
            assert 'alt="' in tag.split(">")[0]


def test_the_api_has_docstrings(site: Path) -> None:
    assert "One inner loop: train a temporary adapter" in (site / "api" / "seal_nb.html").read_text()


@cache
def texts_of_the_code() -> str:
    """All texts in the package; values in them, and text put together from parts, are "…"."""
    found = []
    for path in (ROOT / "seal_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub("%[sdg]", "…", node.value))
    return "\n".join(found)


@pytest.mark.parametrize("section", ["Services", "The TTT server"])
def test_messages_in_a_table_of_refusals_are_those_of_the_code(section: str) -> None:
    page = (ROOT / "docs/refusals.md").read_text().partition(f"\n## {section}\n")[2]
    table = page.partition("| what | message | remedy |\n")[2].partition("\n\n")[0]
    rows = table.splitlines()[1:]  # after the rule
    messages = [span for row in rows for span in re.findall("`([^`]+)`", row.split(" | ")[1])]
    parts = [part.strip(" ;:,.()") for message in messages for part in message.split("…")]
    assert len(parts) > 20
    assert [part for part in parts if part not in texts_of_the_code()] == []

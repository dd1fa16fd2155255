"""The pages of a run: each executed notebook as HTML (nbconvert), and ``index.html`` with the main figures.

The pages load nothing, run no script and are light or dark as the browser asks. A content security policy in each
page enforces it. Text from notebooks is escaped, and HTML in their outputs is sanitized. Runs no notebook."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from seal_nb.chain.record import first_error
from seal_nb.errors import DataError
from seal_nb.storage import data_file, open_regular, read_text, write_text

N_FIGURES = 4
SKIPPED_FOLDERS = {".ipynb_checkpoints", ".venv", ".git"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
GENERATOR = '<meta content="seal-nb" name="generator"/>'  # in each page's head; nbconvert orders attributes like this
TAGS = (
    "a b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i "
    "img kbd li mark ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr tt u ul"
)
TABLE_STYLE = re.compile(
    r'<style type="text/css">\s*(#T_[0-9a-f]{8} +(th|td|caption)(\.col\d+)? \{\s*([a-z-]+: [a-z-]+;\s*)+\}\s*)+</style>'
)
ATTRIBUTES = {
    "*": ["class", "id", "style", "colspan", "rowspan"],
    "a": ["href"],
    "img": ["src", "alt", "width"],
    "span": ["title"],
}


def write_index(run_dir: str | Path, *, title: str = "Run report") -> Path:
    """Write an HTML page next to each executed notebook below a folder, and ``index.html`` that links them.
    Returns: the path of ``index.html``. Raises: DataError where there is no notebook, or one cannot be read, or a file
    that was not written here has the name of a page; then nothing is written."""
    from jinja2 import Environment
    from nbconvert import HTMLExporter

    folder = Path(run_dir)
    found = [path for path in folder.rglob("*.ipynb") if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts)]
    if not found:
        raise DataError("no executed notebook", path=folder, remedy="run a stage with its output in this folder")
    pages = [_page(path, folder) for path in found]
    for target in [folder / "index.html", *(page["path"].with_suffix(".html") for page in pages)]:
        if target.is_symlink() or (target.exists() and not _is_page(target)):
            raise DataError("is not a page of seal-nb, and is kept", path=target, remedy="give it another name")
    pages.sort(key=lambda page: (not page["has_results"], page["started"], page["link"]))
    exporter = HTMLExporter(raw_template=_template("notebook_page"), sanitize_html=True)
    exporter.register_filter("clean_html", _clean)
    for page in pages:
        html, _ = exporter.from_notebook_node(page["notebook"], resources={"metadata": {"name": page["title"]}})
        write_text(page["path"].with_suffix(".html"), html)
    results = [page["notebook"] for page in pages if page["has_results"] and not page["failure"]]
    figures = [figure for notebook in results for figure in _figures(notebook)]
    template = Environment(autoescape=True).from_string(_template("index_page"))
    failed = [page for page in pages if page["failure"]]
    text = template.render(title=title, pages=pages, failed=failed, figures=figures[:N_FIGURES])
    return write_text(folder / "index.html", text)


def _template(name: str) -> str:
    return data_file(f"{name}.html.j2").read_text().replace("POLICY", POLICY).replace("GENERATOR", GENERATOR)


def _is_page(path: Path) -> bool:
    with open_regular(path) as file:
        return GENERATOR.encode() in file.read(2**16)


def _clean(html: str) -> str:
    """HTML from a notebook without anything that acts and without style sheets, except those of our tables."""
    from bleach import clean
    from bleach.css_sanitizer import CSSSanitizer

    own = "".join(style[0] for style in TABLE_STYLE.finditer(html))
    html = re.sub(r"<(script|style)\b.*?</\1\s*>", "", html, flags=re.DOTALL | re.IGNORECASE)
    protocols = ["http", "https", "mailto", "data"]
    css = CSSSanitizer()
    return own + str(clean(html, TAGS.split(), ATTRIBUTES, protocols=protocols, strip=True, css_sanitizer=css))


def _page(path: Path, folder: Path) -> dict[str, Any]:
    """What the index shows of an executed notebook, and the notebook. ``failure`` is empty unless a cell raised."""
    import nbformat

    try:
        notebook = nbformat.reads(read_text(path), as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise DataError(f"not a notebook: {error}", path=path, remedy="run its stage again") from error
    place = path.relative_to(folder)
    headings = [heading for cell in notebook.cells for heading in _headings(cell)]
    failed = first_error(notebook.cells)
    return {
        "path": path,
        "stage": "" if place.parent == Path() else place.parent.as_posix(),
        "link": quote(place.with_suffix(".html").as_posix()),
        "title": headings[0] if headings else path.stem,
        "started": str(notebook.metadata.get("papermill", {}).get("start_time") or ""),
        "failure": f"{failed[1]['ename']}: {failed[1]['evalue']}" if failed else "",
        "has_results": path.stem.startswith("08_results"),
        "notebook": notebook,
    }


def _headings(cell: Any) -> list[str]:
    return re.findall(r"^#{1,6}\s+(.+?)\s*$", cell.source, flags=re.MULTILINE) if cell.cell_type == "markdown" else []


def _figures(notebook: Any) -> Iterator[dict[str, str]]:
    """The first figure of each section of a notebook, with its text."""
    heading, shown = "", set[str]()
    for cell in notebook.cells:
        heading = next(iter(_headings(cell)), heading)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data and heading not in shown:
                alt = output.metadata.get("image/png", {}).get("alt", "") or data.get("text/plain", "")
                yield {"png": "".join(data["image/png"].split()), "alt": alt, "heading": heading}
                shown.add(heading)

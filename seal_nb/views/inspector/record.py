"""Links to what made a run: its file, the record beside it, the executed notebook in its folder."""

import html
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from seal_nb.runs import record_path
from seal_nb.views.tables import somebody_looks_on


class RunLinks:
    """Links where somebody can follow them; headless the names alone: a place means nothing elsewhere."""

    def __init__(self, run: Path) -> None:
        found = [run, record_path(run), *sorted(run.parent.glob("0*.ipynb"))]
        self.files = [path for path in found if path.is_file()]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        shown = ", ".join(map(_link if somebody_looks_on() else _name, self.files))
        names = ", ".join(path.name for path in self.files)
        return {"text/html": f"<p>On disk: {shown}</p>", "text/plain": f"on disk: {names}"}


def _name(path: Path) -> str:
    return html.escape(path.name)


def _link(path: Path) -> str:
    """Relative to the notebook's folder, as JupyterLab resolves it."""
    return f'<a href="{quote(os.path.relpath(path))}" target="_blank">{_name(path)}</a>'

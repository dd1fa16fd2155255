"""Writes notebooks of a few lines, which tests execute with a real kernel."""

from pathlib import Path

import nbformat


def write_notebook(folder: Path, name: str, parameters: str, *cells: str) -> Path:
    """A notebook with one parameters cell and the given code cells."""
    first = nbformat.v4.new_code_cell(parameters)
    first.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path

"""The documentation site: docs/*.md, the committed notebooks as they are, and the API from docstrings.

`make docs` builds it. Nothing is executed and nothing is fetched: notebooks show their committed outputs.
"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

project = "seal-nb"
author = "the seal-nb authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.apidoc"]
exclude_patterns = ["_build", "notebooks/.ipynb_checkpoints"]

# Sphinx reads only sources below docs/. Git ignores this copy; every build makes a new one.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(ROOT / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns("runs", ".ipynb_checkpoints"))

nb_execution_mode = "off"
# The text of a picture is its alt text, not a second output.
nb_mime_priority_overrides = [("html", "image/png", 5), ("html", "text/html", 3)]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# One page for each package, not for each module: every page contains the whole navigation.
apidoc_modules = [
    {
        "path": "../seal_nb",
        "destination": "api",
        "separate_modules": False,
        "module_first": True,
        "include_private": False,
        "implicit_namespaces": False,
        "max_depth": 2,
        "exclude_patterns": ["**/ttt/kernels.py"],  # needs Triton, which torch's CPU packages do not have
    }
]
toc_object_entries = False  # functions in the navigation of every page take a third of the build time
autodoc_use_type_comments = False  # there are none
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False, "exclude-members": "set"}
default_role = "code"  # docstrings write `names` as Markdown does

html_theme = "furo"
html_title = "seal-nb"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}

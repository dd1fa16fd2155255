"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported here or in a child: many small processes with many threads each are far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("shared machine", deadline=None, max_examples=60)
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of published reference data, beside the checkout; tests skip where it is not there."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no published reference data at ../shared/golden ({folder.name} absent)")
    return folder


@pytest.fixture(scope="session")
def small_model_dir() -> str:
    """Folder of the embedded model, fetched and converted where it is not in the cache yet."""
    from seal_nb.models import resolve_model

    return resolve_model("embedded")

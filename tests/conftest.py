"""Fixtures that several test files share."""

import os
import signal
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported here or in a child: many small processes with many threads each are far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests that send it need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("shared machine", deadline=None, max_examples=60)
settings.load_profile("shared machine")


ROOT = Path(__file__).resolve().parent.parent
WAITING = ("browser", "chain", "service", "slurm")  # folders whose tests start processes and wait for them


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Groups of tests that `pytest -n` keeps in one process."""
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = group_of  # type: ignore[method-assign]
    return scheduling


def group_of(node_id: str) -> str:
    """One group are the tests that mostly wait, whose processes would be in each other's way. Those of vLLM
    share its server, and notebooks share a folder. Else a group is a file."""
    path = PurePosixPath(node_id.split("::")[0])
    if path.suffix == ".ipynb":
        return "notebooks"
    if path.parent.name in WAITING:
        return "waiting"
    return "vllm" if path.parent.name == "vllm" else str(path)


def find_golden(shared: Path) -> Path:
    """The published reference data in the folder `shared`; skips where it is not there.

    In continuous integration only a missing `shared` is an excuse: with the folder there and its golden data
    gone, dozens of checks would vanish without a word.
    """
    folder = shared / "golden"
    if not folder.is_dir():
        missing = "no published reference data at ../shared/golden"
        if os.environ.get("CI") and shared.is_dir():
            pytest.fail(f"{missing}, but ../shared is there; put the data back")
        pytest.skip(missing)
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of published reference data, beside the checkout."""
    return find_golden(ROOT.parent / "shared")


@pytest.fixture(scope="session")
def small_model_dir() -> str:
    """Folder of the embedded model, fetched and converted where it is not in the cache yet."""
    from seal_nb.models import resolve_model

    return resolve_model("embedded")

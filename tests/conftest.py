"""Fixtures that several test files share, which tests are slow, and which ones xdist keeps in one process."""

import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Set before torch is imported: many processes with many threads each are far slower. A thread that waits must not spin,
# since another process needs its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Results of tests go to their own folders.
os.environ.pop("SEAL_RUNS", None)

# A shell starts background jobs with Ctrl-C ignored, and children inherit that. Some tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("shared machine", deadline=None, max_examples=60)
settings.load_profile("shared machine")


ROOT = Path(__file__).resolve().parent.parent
WAITING = ("browser", "chain", "server")  # folders whose tests start processes and wait for them
FIRST = ("slurm", "waiting", ".ipynb", "vllm")  # ends of the names of long groups, which start first
# What `make check` leaves out: tests that start servers, kernels or other programs, or that load or train a model.
SLOW_FOLDERS = ("browser", "slurm", "vllm")
SLOW_FIXTURES = {"server", "ttt", "start_server", "client", "endpoint", "small_model_dir"}
SLOW_FILES = {
    "chain/test_local.py", "server/test_clocks.py", "server/test_disk.py", "server/test_faults.py",
    "server/test_finding.py", "server/test_fuzz.py", "server/test_keys.py",
    "server/test_nodes.py", "server/test_stuck.py", "server/test_watch.py", "test_benchmarks.py", "test_cli.py",
    "test_api.py", "test_continual_merged.py", "test_cpt_full.py", "test_deterministic.py", "test_docs.py",
    "test_engines_benchmark.py", "test_engines_notebook.py", "test_engines_vllm.py", "test_exported.py",
    "test_grading_beside.py", "test_inspector_live.py", "test_inspector_notebook.py", "test_live_views.py",
    "test_notebook_errors.py", "test_notebook_runner.py", "test_notebooks.py", "test_readme.py", "test_rerun.py",
    "test_resumption.py", "test_server_notebook.py", "test_sft.py", "ttt/test_decode.py", "ttt/test_equality.py",
    "ttt/test_adapters.py", "ttt/test_families.py", "ttt/test_float16.py", "ttt/test_padding.py", "ttt/test_passes.py",
    "ttt/test_quantized.py", "ttt/test_small_model.py", "ttt/test_tokens.py",
}  # fmt: skip
TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def no_command_sets_the_runs_of_another_test() -> Iterator[None]:
    before = os.environ.get("SEAL_RUNS")
    yield
    os.environ.pop("SEAL_RUNS", None)
    os.environ |= {} if before is None else {"SEAL_RUNS": before}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path, getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: [not group_of(item.nodeid).endswith(name) for name in FIRST])


def is_slow(path: Path, fixtures: Iterable[str]) -> bool:
    name = path.relative_to(TESTS).as_posix() if path.is_relative_to(TESTS) else path.name
    return (
        path.suffix == ".ipynb"
        or path.parent.name in SLOW_FOLDERS
        or name in SLOW_FILES
        or not SLOW_FIXTURES.isdisjoint(fixtures)
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Groups of tests that `pytest -n` keeps in one process, in the order of the tests."""
    config.option.loadscopereorder = False
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = group_of  # type: ignore[method-assign]
    return scheduling


def group_of(node_id: str) -> str:
    """A group is a file, with exceptions. Tests that mostly wait are one group, because their processes would
    disturb one another. The tests of SLURM share a cluster, those of vLLM a server. 08 reads what 03 wrote."""
    path = PurePosixPath(node_id.split("::")[0])
    if path.suffix == ".ipynb":
        return "03_query_server.ipynb" if path.stem == "08_results" else path.name
    if path.parent.name in WAITING:
        return "waiting"
    return path.parent.name if path.parent.name in ("slurm", "vllm") else str(path)


def find_golden(shared: Path) -> Path:
    """The published reference data in the folder `shared`; the test is skipped where there are none.

    In continuous integration a folder `shared` without golden data fails the test: otherwise dozens of checks would
    be skipped unnoticed.
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
    """The folder of published reference data, next to the checkout."""
    return find_golden(ROOT.parent / "shared")


@pytest.fixture(scope="session")
def small_model_dir() -> str:
    """Folder of the small model, fetched and converted if it is not in the cache."""
    from seal_nb.models import resolve_model

    return resolve_model("embedded")

"""Tiny notebooks, a real papermill and a real kernel."""

import ast
from pathlib import Path

import nbformat
import pytest

from seal_nb.errors import SettingsError
from seal_nb.notebook_runner import (
    Parameter,
    StageFailed,
    StageInterrupted,
    declared_parameters,
    executed_path,
    find_notebook,
    format_value,
    parse_parameters,
    parse_value,
    run_notebook,
)
from tests.tiny_notebooks import write_notebook

PARAMETERS = """\
output_dir: str = "runs/tiny"  # the run folder
n_articles: int = 3  # passages, at most 200
temperature: float = 1.0  # published
train: bool = True
arms: list[str] = ["a", "b"]  # which texts are trained on
k_best = 1
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_notebook(tmp_path / "notebooks", "01_tiny", PARAMETERS, "print(n_articles * 2, arms, train)")


def run(notebook: Path, executed: Path, **values: object) -> str:
    text: list[str] = []
    run_notebook(notebook, values, executed, write=text.append, progress_bar=False)
    return "".join(text)


def test_stage_is_found_by_name_and_by_unique_beginning(tmp_path: Path) -> None:
    for name in ("01_create", "03_query_server", "04_cpt"):
        write_notebook(tmp_path, name, "n: int = 1")
    assert find_notebook("03_query_server", tmp_path).stem == "03_query_server"
    assert find_notebook("03", tmp_path).stem == find_notebook("3", tmp_path).stem == "03_query_server"


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("03_query_sever", "did you mean '03_query_server'"),
        ("0", "2 stages begin with '0'"),
        ("", "no stage ''"),
        ("../03_query_server", "stages: 03_query_server, 04_cpt"),
    ],
)
def test_unknown_or_ambiguous_stage_is_refused_with_the_valid_names(tmp_path: Path, stage: str, said: str) -> None:
    for name in ("03_query_server", "04_cpt"):
        write_notebook(tmp_path, name, "n: int = 1")
    with pytest.raises(SettingsError, match="03_query_server") as caught:
        find_notebook(stage, tmp_path)
    assert said in str(caught.value)


def test_folder_without_notebooks_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--notebooks FOLDER"):
        find_notebook("03", tmp_path)


def test_parameters_are_read_with_type_default_and_help(tiny: Path) -> None:
    declared = declared_parameters(tiny)
    assert list(declared) == ["output_dir", "n_articles", "temperature", "train", "arms", "k_best"]
    assert declared["n_articles"] == Parameter(
        name="n_articles", type_name="int", default=3, help="passages, at most 200"
    )
    assert declared["arms"].default == ["a", "b"]
    assert declared["k_best"].type_name == "int"


def test_default_that_papermill_cannot_read_is_refused_by_name(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path, "01_odd", 'mark: str = "a # b"')
    with pytest.raises(SettingsError, match="default of 'mark'"):
        declared_parameters(notebook)


def test_unknown_parameter_is_refused_with_a_near_match(tiny: Path) -> None:
    with pytest.raises(SettingsError, match="unknown parameter 'n_article'.*did you mean 'n_articles'.*k_best"):
        parse_parameters([("n_article", "3")], declared_parameters(tiny))


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "-3", -3),
        ("float", "1e-3", 0.001),
        ("float", "2", 2.0),
        ("bool", "false", False),
        ("bool", "True", True),
        ("str", "3", "3"),
        ("str", "", ""),
        ("list[str]", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("list[str]", '["a,b"]', ["a,b"]),
        ("list[str]", "", []),
        ("list[int]", "1,2", [1, 2]),
        ("list", "x", ["x"]),
    ],
)
def test_value_is_read_in_the_declared_type_and_written_back(kind: str, text: str, value: object) -> None:
    parameter = Parameter(name="p", type_name=kind, default=0, help="")
    read = parse_value(text, parameter)
    assert read == value
    assert type(read) is type(value)
    assert parse_value(format_value(read), parameter) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [("int", "3.5"), ("int", ""), ("float", "much"), ("bool", "maybe"), ("list[int]", "a"), ("list[str]", "[1")],
)
def test_value_of_another_type_is_refused_with_name_value_and_remedy(kind: str, text: str) -> None:
    parameter = Parameter(name="finetune_lr", type_name=kind, default=0, help="")
    with pytest.raises(SettingsError, match="'finetune_lr'.*; give ") as caught:
        parse_value(text, parameter)
    assert repr(text) in str(caught.value)


def test_executed_copy_goes_to_the_run_folder(tiny: Path) -> None:
    declared = declared_parameters(tiny)
    assert executed_path(tiny, {}, declared) == Path("runs/tiny/01_tiny.ipynb")
    assert executed_path(tiny, {"output_dir": "elsewhere"}, declared) == Path("elsewhere/01_tiny.ipynb")


def test_notebook_runs_with_its_parameters_and_prints_as_it_goes(tiny: Path, tmp_path: Path) -> None:
    executed = tmp_path / "out {x} {output_dir.__class__}" / "01_tiny.ipynb"  # no format string
    assert run(tiny, executed, n_articles=21, arms=["x"]) == "42 ['x'] True\n"
    assert nbformat.read(executed, as_version=4).cells[-1].outputs[0].text == "42 ['x'] True\n"


def test_kernel_is_this_environment_s(tmp_path: Path) -> None:
    import sys

    notebook = write_notebook(tmp_path, "01_where", "n: int = 1", "import sys; print([sys.prefix])")
    assert ast.literal_eval(run(notebook, tmp_path / "out.ipynb")) == [sys.prefix]


def test_failing_cell_is_reported_with_its_error_and_the_executed_notebook(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path, "01_bad", "n: int = 0", "1 / n", "print('not reached')")
    executed = tmp_path / "out" / "01_bad.ipynb"
    with pytest.raises(StageFailed, match="raised ZeroDivisionError: division by zero") as caught:
        run(notebook, executed)
    assert str(executed) in str(caught.value)
    assert "1 / n" in str(caught.value)
    assert "not reached" not in str(nbformat.read(executed, as_version=4).cells[-1].get("outputs"))


def test_sigterm_that_reaches_no_running_cell_ends_the_stage_before_the_next_one(tmp_path: Path) -> None:
    """Between cells a kernel ignores its interrupt; so does this cell."""
    deaf = (
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(0.5)\nprint('heard nothing')"
    )
    notebook = write_notebook(tmp_path, "deaf", "output_dir: str = ''", deaf, "print('went on')")
    told: list[str] = []
    with pytest.raises(StageInterrupted, match="between two cells"):
        run_notebook(notebook, {}, tmp_path / "executed.ipynb", write=told.append, progress_bar=False)
    assert "heard nothing" in (tmp_path / "executed.ipynb").read_text()
    assert "went on" not in "".join(told)


@pytest.mark.parametrize(("deaths", "starts"), [(1, 2), (9, 3)])
def test_a_kernel_that_dies_before_its_first_cell_is_started_again(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, starts: int
) -> None:
    """As when another process has taken one of its ports meanwhile."""
    log = tmp_path / "starts"
    dies = f"""
import sys
if "ipykernel_launcher" in sys.orig_argv:
    with open({str(log)!r}, "a+") as log:
        log.write("x")
        log.seek(0)
        if len(log.read()) <= {deaths}:
            sys.exit("Address already in use")
"""
    (tmp_path / "sitecustomize.py").write_text(dies)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    executed = tmp_path / "runs" / "executed.ipynb"
    if deaths < starts:
        assert "6 ['a', 'b'] True" in run(tiny, executed)
    else:
        with pytest.raises(StageFailed, match="its kernel died") as failure:
            run(tiny, executed)
        assert "before replying" in str(failure.value)
    assert len(log.read_text()) == starts

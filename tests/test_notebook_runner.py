"""Tiny notebooks, a real papermill and a real kernel."""

import ast
import io
import json
from pathlib import Path

import nbformat
import pytest

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.settings import Training
from seal_nb.notebook_runner import (
    Parameter,
    StageFailed,
    StageInterrupted,
    declared_parameters,
    executed_path,
    find_notebook,
    format_value,
    kernel_of,
    parse_parameters,
    parse_value,
    read_parameters,
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
    text = io.StringIO()
    run_notebook(notebook, values, executed, stream=text)
    return text.getvalue()


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
    [
        ("float", "nan"),
        ("float", "inf"),
        ("float", "-Infinity"),
        ("float", "1e999"),
        ("int", "nan"),
        ("list[float]", "1,nan"),
        ("list[float]", "[NaN]"),
        ("list[float]", "[1e999]"),
        ("list[str]", "[null]"),
        ("list[str]", '[["a"]]'),
        ("list[str]", "[true]"),
        ("list[str]", "[1]"),
        ("list[str]", '{"a":1}'),
        ("list[int]", "[true]"),
        ("list[int]", '["1"]'),
        ("", "nan"),
        ("int", "3.5"),
        ("int", ""),
        ("float", "much"),
        ("bool", "maybe"),
        ("list[int]", "a"),
        ("list[str]", "[1"),
        ("list[str]", '["a", ""]'),
        ("list[str]", '[" "]'),
        ("float", ".inf"),
        ("", "-inf"),
    ],
)
def test_value_of_another_type_is_refused_with_name_value_and_remedy(kind: str, text: str) -> None:
    parameter = Parameter(name="finetune_lr", type_name=kind, default=0, help="")
    with pytest.raises(SettingsError, match="'finetune_lr'.*; give ") as caught:
        parse_value(text, parameter)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["[null]", '[["a"]]', "[true]", '{"a": 1}', '["a", ""]'])
def test_names_in_a_text_are_refused_by_type_too(text: str) -> None:
    with pytest.raises(SettingsError, match="parameter 'arms'.*a JSON list or items with commas"):
        parse_value(text, Parameter(name="arms", type_name="str", default="a", help=""))


def test_names_in_a_text_may_be_a_list() -> None:
    arms = Parameter(name="arms", type_name="str", default="a", help="")
    assert parse_value('["a", "b"]', arms) == parse_value(["a", "b"], arms) == "a,b"
    assert parse_value("a, b", arms) == "a, b"


FILE = "n_articles: 010\ntemperature: 1e-3\ntrain: false\narms: ['no', '5']\noutput_dir: 2024-01-01\n"


@pytest.mark.parametrize(
    "text", [FILE, '{"n_articles": 10, "temperature": 0.001, "train": false, "arms": ["no", "5"]}']
)
def test_file_of_parameters_is_read_without_the_traps_of_yaml(tiny: Path, text: str) -> None:
    values = parse_parameters(read_parameters(text, "x"), declared_parameters(tiny))
    assert values.pop("output_dir", "2024-01-01") == "2024-01-01"
    assert values == {"n_articles": 10, "temperature": 0.001, "train": False, "arms": ["no", "5"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "-f p.yaml: holds no parameters by name"), ("a: [", "-f p.yaml: no YAML or JSON"),
        ("1: 2", "holds no parameters by name"), ("temperature: .nan", "'temperature': nan is not float"),
        ('{"temperature": NaN}', "'temperature': nan is not float"), ("temperature: 1e999", "'temperature': inf"),
        ("arms: [no]", "'arms': .False. is not list"), ("temperature: .inf", "'temperature': inf"),
        ("arms: [null]", "'arms': .None. is not list"), ("n_articles: [1]", "'n_articles': .1. is not int"),
        ("n_articles: 2.5", "is not int"), ("output_dir: 5", "'output_dir': 5 is not str"), ("arms:", "'arms': None"),
        ("n_articles: true", "is not int"), ("train: 1", "is not bool"),
        ("a: !!python/object:os.x {}", "no YAML or JSON"), ("arms: &a [*a]", "no YAML or JSON"), ("[]", "holds no"),
        ("arms: !!set {a}", "no YAML or JSON"), ("output_dir: NaN", "nan is not str"),
        ("n_articles: 1:30", "'1:30' is not int"),
    ],
)  # fmt: skip
def test_file_of_parameters_is_refused_by_name_and_type(tiny: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_parameters(read_parameters(text, "-f p.yaml"), declared_parameters(tiny), option="-f")


def test_texts_of_a_file_stay_texts_and_those_of_the_command_line_are_typed_as_papermill_does() -> None:
    text = "a: '5'\nb: 1e-3\nc: [1, {d: null}]\ne: 2024-01-01"
    values = parse_parameters(read_parameters(text, "-f"), {}, own=True, option="-f")
    assert values == {"a": "5", "b": 0.001, "c": [1, {"d": None}], "e": "2024-01-01"}
    assert parse_parameters([("a", "5"), ("b", "None"), ("c", "x")], {}, own=True) == {"a": 5, "b": None, "c": "x"}
    assert parse_parameters([("a", "5")], {}, own=True, option="-r") == {"a": "5"}
    for refused in ("{a: [.nan]}", '{"a": {"b": Infinity}}'):
        with pytest.raises(SettingsError, match="'a': .*give texts and finite numbers"):
            parse_parameters(read_parameters(refused, "-y"), {}, own=True, option="-f")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_in_python_take_finite_numbers_only(value: float) -> None:
    with pytest.raises(SettingsError, match="finetune_lr=.*give a finite number"):
        Training(finetune_lr=value)


OWN = "from pathlib import Path\nx = None\nratio: float = 0.5\nwhere = Path('a')"


@pytest.mark.parametrize(
    "about", [{}, {"kernelspec": {"name": "conda-env-x-py", "display_name": "x", "language": "python"}}]
)
def test_own_notebook_runs_whatever_it_says_of_its_kernel(tmp_path: Path, about: dict[str, object]) -> None:
    notebook = write_notebook(tmp_path, "my own {x}", OWN, "print([x, ratio, extra])")
    notebook.write_text(json.dumps(json.loads(notebook.read_text()) | {"metadata": about}))
    assert find_notebook(str(notebook)) == notebook
    declared = declared_parameters(notebook, own=True)
    given = [("x", "7"), ("ratio", "1"), ("extra", "1e-3"), ("x", "8")]
    values = parse_parameters(given, declared, own=True)
    told = io.StringIO()
    run_notebook(notebook, values, tmp_path / "out.ipynb", stream=told, kernel=kernel_of(notebook))
    assert told.getvalue() == "[8, 1.0, 0.001]\n"


@pytest.mark.parametrize(
    ("about", "kernel"),
    [
        ({"kernelspec": None, "language_info": None}, "python3"), ({"language_info": {"name": "ipython"}}, "python3"),
        ({"kernelspec": {"name": "py311", "language": "Python"}}, "python3"), ({"language_info": {"name": "R"}}, ""),
        ({"kernelspec": {}, "language_info": {"name": "julia"}}, ""),
    ],
)  # fmt: skip
def test_python_of_any_name_is_run_by_this_environment_and_another_language_is_refused(
    tmp_path: Path, about: dict[str, object], kernel: str
) -> None:
    notebook = write_notebook(tmp_path, "own", "n = 1")
    notebook.write_text(json.dumps(json.loads(notebook.read_text()) | {"metadata": about}))
    if kernel:
        assert kernel_of(notebook) == (kernel, "python")
    else:
        with pytest.raises(SettingsError, match="give one with -k"):
            kernel_of(notebook)


def test_notebook_of_format_3_without_a_cell_of_parameters_runs_with_them_in_front(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "collapsed": False, "input": "print(n + 1)", "language": "python", "outputs": []}
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": ""}, "worksheets": [{"cells": [cell]}]}
    (tmp_path / "old.ipynb").write_text(json.dumps(old))
    assert declared_parameters(tmp_path / "old.ipynb", own=True) == {}
    assert run(tmp_path / "old.ipynb", tmp_path / "out.ipynb", n=1) == "2\n"


def test_kernel_that_is_not_installed_is_refused_with_those_that_are(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path, "own", "n = 1")
    notebook.write_text(notebook.read_text().replace('"python3"', '"ir"').replace('"python"', '"R"'))
    with pytest.raises(SettingsError, match=r"kernel 'ir' \(R\) is not installed; give one with -k: .*python3"):
        kernel_of(notebook)
    assert kernel_of(notebook, "python3") == ("python3", "python")


@pytest.mark.parametrize("text", ["", "{no", "[]", '{"a": 1}', '{"nbformat": 4, "metadata": {}}', '{"cells": 5}'])
def test_file_that_is_no_notebook_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(DataError, match=r"x\.ipynb: is no notebook .*save it again in Jupyter"):
        declared_parameters(tmp_path / "x.ipynb")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (".", "is a folder"), ("x.html", "does not end with .ipynb"),
        ("notebooks/01_tiny.ipynb", "the notebook itself"),
    ],
)  # fmt: skip
def test_output_that_is_no_new_notebook_file_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=f"--output .*{said}.*give a file such as"):
        executed_path(tiny, {}, {}, Path(output))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notebooks"]


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
    told = io.StringIO()
    with pytest.raises(StageInterrupted, match="between two cells"):
        run_notebook(notebook, {}, tmp_path / "executed.ipynb", stream=told)
    assert "heard nothing" in (tmp_path / "executed.ipynb").read_text()
    assert "went on" not in told.getvalue()


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

"""Notebooks as commands: find one, check its parameters, execute it with papermill.

A notebook's parameters are its one cell tagged ``parameters``: ``name: type = default  # help``, read by papermill.
Papermill only warns about an unknown parameter or a wrong type; here both are refused. A notebook of the user's own may
have any cell of parameters, or none: what it does not declare is typed and set as papermill does it."""

import ast
import contextlib
import difflib
import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TextIO

import psutil
from pydantic import ConfigDict, StringConstraints, TypeAdapter

from seal_nb.errors import PUT_AWAY, DataError, SealError, SettingsError, redacted, visible
from seal_nb.grading.choose import stated_grader
from seal_nb.storage import read_text, refuse_address, runs_folder

log = logging.getLogger(__name__)

START_TIMEOUT_S = 180  # of a kernel on a busy cluster node with a cold file system
STARTS = 3  # of a kernel
NOT_STARTED = "Kernel died before replying"  # jupyter_client's words
LINE_EVERY_S = 30.0  # without a terminal: at most one line about cells in this time
Value = int | float | bool | str | list[Any]
YAML = "tag:yaml.org,2002:"  # before the types of YAML
UNTYPED = ""  # the type of a parameter that its notebook does not declare


class StageFailed(SealError, RuntimeError):
    """A cell of a stage's notebook raised, or its kernel died; the executed notebook has the traceback."""

    exit_code = 1


class StageInterrupted(StageFailed):
    """SIGTERM ended the stage early. Started again, it goes on from its journal."""

    exit_code = 143  # as a shell gives after SIGTERM


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One line of a parameters cell."""

    name: str
    type_name: str
    default: Value
    help: str


def default_notebooks_dir() -> Path:
    """The ``notebooks`` folder of the checkout that this package was installed from."""
    return Path(__file__).resolve().parent.parent / "notebooks"


def find_notebook(stage: str, folder: Path | None = None) -> Path:
    """The notebook file ``stage`` (x.ipynb), else the stage of that name, or the only one whose name begins so ("03",
    "3"). Raises: SettingsError."""
    refuse_address(stage)
    if stage.endswith(".ipynb") and Path(stage).is_file():
        return Path(stage)
    given, folder, stage = stage, folder or default_notebooks_dir(), stage.removesuffix(".ipynb")
    names = sorted(path.stem for path in folder.glob("*.ipynb"))
    if not names:
        raise SettingsError(f"no notebooks in {folder}; run from a checkout, or give --notebooks FOLDER")
    starting = [name for name in names if stage and name.startswith((stage, f"0{stage}"))]
    matches = [stage] if stage in names else starting
    if len(matches) == 1:
        return folder / f"{matches[0]}.ipynb"
    none = f"no file {given!r}, and no stage" if given != stage else f"no stage {stage!r}"
    problem = f"{len(matches)} stages begin with {stage!r}" if matches else none
    raise SettingsError(f"{problem}{_near(stage, names)}; stages: {', '.join(names)}")


def _near(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load_notebook(path: Path) -> Any:
    """A notebook as nbformat's node, of any version. Raises: DataError."""
    import nbformat

    text, remedy = read_text(path), "save it again in Jupyter, or take another copy"
    try:
        notebook = nbformat.reads(text, as_version=4)
        _ = [(cell.source, "" in cell.metadata.get("tags", [])) for cell in notebook.cells]
    except Exception as error:  # of many classes
        raise DataError(f"is no notebook ({str(error)[:80]!r})", path=path, remedy=remedy) from error
    return notebook


def kernel_of(notebook: Path, wanted: str = "") -> tuple[str, str]:
    """The kernel that runs a notebook, and its language: ``wanted``, or the one that it names if that is installed, or
    python3 for Python. Raises: SettingsError where the kernel is not installed; DataError."""
    from jupyter_client.kernelspec import KernelSpecManager

    about, installed = load_notebook(notebook).metadata, KernelSpecManager().get_all_specs()
    spec = about.get("kernelspec") or {}
    language = spec.get("language") or (about.get("language_info") or {}).get("name") or "python"
    language = re.sub(r"(?i)i?python3?", "python", language)
    name = wanted or spec.get("name") or ("python3" if language == "python" else language)
    if name in installed:
        return name, installed[name]["spec"].get("language") or language
    if wanted or language != "python":
        known = ", ".join(sorted(installed))
        raise SettingsError(f"{notebook}: kernel {name!r} ({language}) is not installed; give one with -k: {known}")
    log.warning("%s: kernel %r is not installed; python3 of this environment runs it", notebook, name)
    return "python3", "python"


def declared_parameters(notebook: Path, *, own: bool = False) -> dict[str, Parameter]:
    """The parameters of a notebook by name, with their defaults as values. In a notebook of the user's ``own`` those
    that state no known type are untyped, and a default may be any expression (None here).
    Raises: SettingsError, DataError."""
    _papermill()
    from papermill.translators import PythonTranslator

    cells = [cell for cell in load_notebook(notebook).cells if "parameters" in cell.metadata.get("tags", [])]
    parameters = {}
    for found in PythonTranslator.inspect(cells[0]) if cells else []:
        try:
            default = ast.literal_eval(found.default)
        except (ValueError, SyntaxError) as error:
            default = None
            if not own:
                raise SettingsError(
                    f"{notebook}: papermill reads the default of {found.name!r} as {found.default}, which is "
                    "no literal; write `name: type = literal  # help` on one line, with no # in the literal"
                ) from error
        kind = found.inferred_type_name.strip()
        if own:
            kind = kind if kind in _TYPES else UNTYPED
        elif kind == "None":
            kind = type(default).__name__
        parameters[found.name] = Parameter(name=found.name, type_name=kind, default=default, help=found.help)
    return parameters


def _papermill() -> Any:
    """Papermill, imported when it is needed. Its import loads jsonschema, which loads rfc3987_syntax if JupyterLab
    brought it along. That package compiles a grammar for three seconds, for a format that no notebook uses."""
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import papermill

    return papermill


def read_parameters(text: str, source: str) -> list[tuple[str, Any]]:
    """Names and JSON values of a YAML or JSON mapping from ``source``, in which 010 is ten, 1e-3 and NaN are numbers
    and a date is a text. Raises: SettingsError."""
    import yaml
    from papermill.iorw import NoDatesSafeLoader

    class Loader(NoDatesSafeLoader):
        pass

    Loader.add_constructor(f"{YAML}int", lambda _, node: int(node.value) if node.value.isdecimal() else node.value)
    Loader.add_implicit_resolver(f"{YAML}float", re.compile(r"[-+]?([\d.]+[eE][-+]?\d+|NaN|Infinity)$"), None)
    remedy = "write lines such as n_articles: 3"
    try:
        values = {} if (read := yaml.load(text, Loader)) is None else read
        if isinstance(values, dict) and all(isinstance(name, str) for name in values):
            return list(json.loads(json.dumps(values)).items())
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise SettingsError(f"{source}: no YAML or JSON: {' '.join(str(error).split())[:200]}; {remedy}") from error
    raise SettingsError(f"{source}: holds no parameters by name; {remedy}")


def parse_parameters(
    pairs: Iterable[tuple[str, object]], declared: Mapping[str, Parameter], *, own: bool = False, option: str = "-p"
) -> dict[str, Any]:
    """NAME VALUE pairs as typed values; of a name that occurs twice the last one counts. ``option``: where they come
    from. A text of -r stays one whatever the declared type is; in a file (-f) a text without a declared type does.
    Raises: SettingsError with the parameter and the remedy, also for an unknown one unless the notebook is ``own``."""
    values: dict[str, Any] = {}
    for name, given in pairs:
        if not name.isidentifier() or iskeyword(name):
            raise SettingsError(f"parameter {name!r} is no name of Python; give letters, digits and _")
        if name not in declared:
            unknown = f"unknown parameter {name!r}{_near(name, declared)}; parameters: {', '.join(declared) or 'none'}"
            if not own:
                raise SettingsError(unknown)
            log.warning("%s; it is set anyway, in a cell of its own", unknown)
        kind = declared[name].type_name if name in declared else UNTYPED
        if option == "-r" or (option == "-f" and kind == UNTYPED and isinstance(given, str)):
            kind = "str"
        values[name] = parse_value(given, Parameter(name=name, type_name=kind, default="", help=""))
    return values


def parse_value(given: object, parameter: Parameter) -> Any:
    """A text of a command line, or a value of a parameter file, in the parameter's declared type.
    Raises: SettingsError, also for a key: the executed notebook and command lines would show it."""
    name, kind = parameter.name, parameter.type_name
    text = given if isinstance(given, str) else json.dumps(given)
    is_list = not isinstance(given, str) or text.lstrip().startswith(("[", "{"))
    if redacted(text, is_prose=name in PROSE) != text:
        raise SettingsError(f"parameter {name!r} holds a key (it is not shown); {PUT_AWAY}")
    if text and name in ("engine_url", "api_key_env"):
        from seal_nb.engines.api import ApiSettings

        ApiSettings(base_url=text) if name == "engine_url" else ApiSettings(api_key_env=text)
    if text and name == "grader":
        stated_grader(text)
    is_joined = kind == "str" and name in COMMA_LISTS and is_list
    kind = "list[str]" if is_joined else kind
    wanted, example = _TYPES.get(kind, _TYPES["list"])
    try:
        text.encode()  # a notebook is UTF-8
        if kind == UNTYPED:
            from papermill.cli import _resolve_type

            value = _resolve_type(given) if isinstance(given, str) else given
            json.dumps(value, allow_nan=False)  # with NaN or infinity the executed notebook would not be valid JSON
            return value
        read = TypeAdapter(wanted, config=ConfigDict(allow_inf_nan=False))
        if not isinstance(given, str):
            value = read.validate_python(given, strict=True)
        elif kind.startswith("list") and is_list:
            value = read.validate_json(text, strict=True)
        else:
            items = [part.strip() for part in text.split(",") if part.strip()]
            value = read.validate_python(items if kind.startswith("list") else text)
        return ",".join(value) if is_joined else value
    except ValueError:
        shown = repr(given) if len(text) < 200 else f"{text[:200]!r}…"
        raise SettingsError(f"parameter {name!r}: {shown} is not {kind or 'allowed'}; give {example}") from None


PROSE = ("question", "gold", "edited", "end_mask_substring")  # parameters that hold any sentence
COMMA_LISTS = ("arms", "strategies", "figure_formats")  # names in one text, or in a list
_ITEMS = 'a JSON list or items with commas, such as ["a", "b"] or a,b'
_TEXTS = list[Annotated[str, StringConstraints(pattern=r"\S")]], _ITEMS
_TYPES: dict[str, tuple[Any, str]] = {  # by the declared type: the type, and what to give
    UNTYPED: (Any, "texts and finite numbers"),
    "int": (int, "a whole number"),
    "float": (float, "a finite number such as 0.001"),
    "bool": (bool, "true or false"),
    "str": (str, "a text, in a file in quotes"),
    "list": _TEXTS,
    "list[str]": _TEXTS,
    "list[int]": (list[int], _ITEMS),
    "list[float]": (list[float], _ITEMS),
}


def format_value(value: Value) -> str:
    """The command-line text that ``parse_value`` reads as ``value``."""
    return value if isinstance(value, str) else json.dumps(value)


def executed_path(
    notebook: Path, values: Mapping[str, Any], declared: Mapping[str, Parameter], output: Path | None = None
) -> Path:
    """Where the executed copy goes: ``output``, or by default the notebook's ``output_dir``. Raises: SettingsError for
    a folder, another kind of file and the notebook itself."""
    folder = {name: one.default for name, one in declared.items()} | dict(values)
    path = output or runs_folder(str(folder.get("output_dir") or f"runs/{notebook.stem}")) / notebook.name
    problem = "is a folder" if path.is_dir() else "does not end with .ipynb" if path.suffix != ".ipynb" else ""
    if path.resolve() == notebook.resolve():
        problem = "is the notebook itself, which would be overwritten"
    if problem:
        raise SettingsError(f"--output {path} {problem}; give a file such as runs/x/{notebook.name}")
    return path


def for_stream(stream: TextIO) -> tuple[Callable[[str], object], dict[str, Any]]:
    """``write`` and ``progress_bar`` of ``run_notebook`` for a stream: a bar on a terminal, else lines."""
    from tqdm.auto import tqdm

    def write(text: str) -> None:
        tqdm.write(visible(text), file=stream, end="")

    if stream.isatty():
        return write, {"file": sys.stderr, "leave": False}
    lines = {"bar_format": "cell {n_fmt} of {total_fmt} after {elapsed}\n", "mininterval": LINE_EVERY_S}
    lines |= {"file": stream, "delay": LINE_EVERY_S, "leave": False}
    return lambda text: (stream.write(visible(text)), stream.flush()), lines


def run_notebook(
    notebook: Path,
    values: Mapping[str, Value],
    executed: Path,
    *,
    stream: TextIO,
    kernel: tuple[str, str] = ("python3", "python"),
) -> None:
    """Execute ``notebook`` into ``executed``. ``stream`` receives what the cells print, at once, and the progress;
    ``kernel`` is that of `kernel_of`. A kernel that dies before its first cell is started again: another process may
    have taken its ports.
    Raises: StageFailed where a cell raised or the kernel died; StageInterrupted after a SIGTERM; SettingsError."""
    from traitlets.config import Config

    papermill = _papermill()
    write, progress_bar = for_stream(stream)

    def before_cell(**_: object) -> None:
        if interruption.is_set():  # a kernel that runs no cell has ignored its interrupt
            raise StageInterrupted(f"{notebook.stem}: SIGTERM came between two cells; finished cells are in {executed}")

    try:
        executed.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"the executed notebook cannot go to {executed}: {error}; give another --output") from error
    with interrupted_by_sigterm() as interruption:
        for starts_left in reversed(range(STARTS)):
            try:
                papermill.execute_notebook(
                    # Papermill takes paths for format strings.
                    *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)),
                    parameters=dict(values),
                    kernel_name=kernel[0],
                    language=kernel[1],
                    progress_bar=progress_bar,
                    start_timeout=START_TIMEOUT_S,
                    # Code and outputs travel over loopback TCP, which other users of a shared node could read.
                    config=Config({"KernelManager": {"transport_encryption": "auto"}}),
                    stdout_file=SimpleNamespace(write=write, flush=lambda: None),
                    on_cell_start=before_cell,
                    extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # its interrupt at the end is no error
                )
                return
            except papermill.PapermillExecutionError as error:
                kind = StageInterrupted if interruption.is_set() else StageFailed
                cell = "\n".join(f"    {line}" for line in str(error.source).strip().splitlines()[:12])
                what = f"{notebook.stem}: cell [{error.exec_count}] raised {error.ename}: {error.evalue}"
                raise kind(f"{what}\n{cell}\nwhole traceback: {executed}") from error
            except RuntimeError as error:  # nbclient's DeadKernelError is one
                if not str(error).startswith("Kernel died"):
                    raise
                kind, why = StageFailed, "most often because the system had no memory left and ended it"
                if interruption.is_set():
                    kind, why = StageInterrupted, "SIGTERM ended it too"
                elif NOT_STARTED in str(error) and starts_left:
                    continue
                elif NOT_STARTED in str(error):
                    why = f"{STARTS} times before replying to its first cell; the output above shows why"
                raise kind(f"{notebook.stem}: its kernel died ({why}); finished cells are in {executed}") from error


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[threading.Event]:
    """In this block SIGTERM interrupts the kernels of this process, so that a cell closes its journal and its server,
    and sets the event; a second one ends the process. Papermill alone would leave its kernel half a second."""
    came = threading.Event()

    def interrupt(number: int, _frame: object) -> None:
        if came.is_set():
            sys.exit(128 + number)
        came.set()
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if any("ipykernel" in word for word in child.cmdline()):
                    child.send_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def summary_of(executed: Path) -> str:
    """The summary at the top of an executed notebook as text; empty if it has none."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    outputs = (output for cell in cells for output in cell.get("outputs", []))
    texts = ("".join(output.get("data", {}).get("text/plain", "")) for output in outputs)
    return next((text for text in texts if text.startswith("at a glance")), "")

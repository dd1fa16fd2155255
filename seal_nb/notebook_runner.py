"""Stage notebooks as commands: find one, check its parameters, execute it headless with papermill.

A notebook's interface is its one cell tagged ``parameters``: ``name: type = default  # help``, read by
papermill's own inspection. Papermill only warns about a parameter that the notebook does not have;
here it is refused, and a value that does not fit the declared type is refused with it.
What is *not* here: printing (the caller hands in where text goes), order of stages (``chain``).

How a headless stage tells its progress: a bar of cells on a terminal, plain lines anywhere else.
"""

import ast
import contextlib
import difflib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psutil

from seal_nb.errors import SealError, SettingsError

START_TIMEOUT_S = 180  # a kernel on a busy cluster node with a cold file system
STARTS = 3  # of a kernel
NOT_STARTED = "Kernel died before replying"  # jupyter_client's words
Value = int | float | bool | str | list[Any]


class StageFailed(SealError, RuntimeError):
    """A cell of a stage's notebook raised; the executed notebook holds the whole traceback."""

    def __init__(self, message: str, *, executed: Path, ename: str, evalue: str) -> None:
        self.executed, self.ename, self.evalue = executed, ename, evalue
        super().__init__(message)


class StageInterrupted(StageFailed):
    """SIGTERM ended the stage before its end; run again, it goes on from its journal."""


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


def find_notebook(stage: str, folder: Path) -> Path:
    """The notebook named ``stage``, or the only one whose name begins so ("03"); SettingsError otherwise."""
    names = sorted(path.stem for path in folder.glob("*.ipynb"))
    if not names:
        raise SettingsError(f"no notebooks in {folder}; run from a checkout, or give --notebooks FOLDER")
    if stage in names:
        return folder / f"{stage}.ipynb"
    matches = [name for name in names if stage and name.startswith((stage, f"0{stage}"))]  # 3 is 03
    if len(matches) == 1:
        return folder / f"{matches[0]}.ipynb"
    problem = f"{len(matches)} stages begin with {stage!r}" if matches else f"no stage {stage!r}"
    raise SettingsError(f"{problem}{_near(stage, names)}; stages: {', '.join(names)}")


def _near(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """What papermill finds in the notebook's parameters cell, with defaults as values."""
    # Importing papermill takes half a second, and finding a stage needs none of it.
    from papermill import inspect_notebook

    return {name: _parameter(notebook, found) for name, found in inspect_notebook(str(notebook)).items()}


def _parameter(notebook: Path, found: Mapping[str, str]) -> Parameter:
    try:
        default = ast.literal_eval(found["default"])
    except (ValueError, SyntaxError) as error:
        raise SettingsError(
            f"{notebook}: papermill reads the default of {found['name']!r} as {found['default']}, which is "
            "no literal; write `name: type = literal  # help` on one line, with no # in the literal"
        ) from error
    declared = found["inferred_type_name"].strip()
    return Parameter(
        name=found["name"],
        type_name=declared if declared != "None" else type(default).__name__,
        default=default,
        help=found["help"],
    )


def parse_parameters(pairs: Iterable[tuple[str, str]], declared: Mapping[str, Parameter]) -> dict[str, Value]:
    """Command-line NAME VALUE pairs as typed values; SettingsError names the parameter and the remedy."""
    values: dict[str, Value] = {}
    for name, text in pairs:
        if name not in declared:
            raise SettingsError(f"unknown parameter {name!r}{_near(name, declared)}; parameters: {', '.join(declared)}")
        values[name] = parse_value(text, declared[name])
    return values


def parse_value(text: str, parameter: Parameter) -> Value:
    """``text`` in the parameter's declared type."""
    kind = parameter.type_name
    try:
        if kind in ("int", "float", "str"):
            return {"int": int, "float": float, "str": str}[kind](text)
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind.startswith("list"):
            return _parse_list(text, item_type=kind.removeprefix("list").strip("[] ") or "str")
    except (ValueError, KeyError, TypeError):
        pass
    else:
        raise SettingsError(f"parameter {parameter.name!r} is declared as {kind}, which no command line fits")
    example = {"bool": "true or false", "int": "a whole number", "float": "a number"}.get(
        kind, 'a JSON list or items with commas, such as ["a", "b"] or a,b'
    )
    raise SettingsError(f"parameter {parameter.name!r}: {text!r} is not {kind}; give {example}")


def _parse_list(text: str, *, item_type: str) -> list[Any]:
    if text.lstrip().startswith("["):
        items = json.loads(text)
    else:
        items = [item.strip() for item in text.split(",") if item.strip()]
    convert = {"int": int, "float": float, "str": str}[item_type]
    return [convert(item) for item in items]


def format_value(value: Value) -> str:
    """The command-line text that ``parse_value`` reads as ``value``."""
    return value if isinstance(value, str) else json.dumps(value)


def executed_path(notebook: Path, values: Mapping[str, Value], declared: Mapping[str, Parameter]) -> Path:
    """Where an executed copy goes unless said otherwise: into the run folder, parameter ``output_dir``."""
    output_dir = values.get("output_dir") or (declared["output_dir"].default if "output_dir" in declared else "")
    return Path(str(output_dir) or f"runs/{notebook.stem}") / notebook.name


def run_notebook(
    notebook: Path,
    values: Mapping[str, Value],
    executed: Path,
    *,
    write: Callable[[str], object],
    progress_bar: bool | dict[str, Any],
) -> None:
    """Execute ``notebook`` into ``executed``; what its cells print goes to ``write`` as it comes.

    SIGTERM interrupts the running cell (KeyboardInterrupt), so that it closes what it holds.

    Raises:
        StageFailed: a cell raised, or the kernel died.
        StageInterrupted: after a SIGTERM.
    """
    import papermill
    from traitlets.config import Config

    executed.parent.mkdir(parents=True, exist_ok=True)
    with interrupted_by_sigterm() as interruption:
        try:
            _with_a_kernel_that_starts(
                partial(
                    papermill.execute_notebook,
                    str(notebook),
                    str(executed),
                    parameters=dict(values),
                    kernel_name="python3",
                    progress_bar=progress_bar,
                    start_timeout=START_TIMEOUT_S,
                    # Code and outputs travel over loopback TCP, which others on a shared node could read.
                    config=Config({"KernelManager": {"transport_encryption": "auto"}}),
                    stdout_file=_Sink(write),
                    on_cell_start=_unless(interruption),
                ),
                interruption,
            )
        except _BetweenCells as error:
            message = f"{notebook.stem}: SIGTERM came between two cells; what was done before is in {executed}"
            raise StageInterrupted(message, executed=executed, ename="KeyboardInterrupt", evalue="") from error
        except papermill.PapermillExecutionError as error:
            kind = StageInterrupted if interruption.is_set() else StageFailed
            message = _short_failure(notebook, error, executed)
            raise kind(message, executed=executed, ename=error.ename, evalue=error.evalue) from error
        except RuntimeError as error:  # nbclient's DeadKernelError is one
            if not str(error).startswith("Kernel died"):
                raise
            kind, why = StageFailed, "most often the system ends one for want of memory"
            if NOT_STARTED in str(error):
                why = f"{STARTS} times before its first cell; its own words are in the output above"
            if interruption.is_set():
                kind, why = StageInterrupted, "SIGTERM has ended it as well"
            message = f"{notebook.stem}: its kernel died ({why}); what was done before is in {executed}"
            raise kind(message, executed=executed, ename="DeadKernelError", evalue=str(error)) from error


def _with_a_kernel_that_starts(execute: Callable[[], object], interruption: threading.Event) -> None:
    """A kernel takes ports that were free a moment before; on a busy machine another process can be quicker.
    No cell has run by then, so another kernel is started."""
    for starts_left in reversed(range(STARTS)):
        try:
            execute()
            return
        except RuntimeError as error:
            if interruption.is_set() or not starts_left or NOT_STARTED not in str(error):
                raise


class _BetweenCells(Exception):
    """A kernel that runs no cell ignores its interrupt, so the next cell is not begun."""


def _unless(interruption: threading.Event) -> Callable[..., None]:
    def begin(**_: object) -> None:
        if interruption.is_set():
            raise _BetweenCells

    return begin


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[threading.Event]:
    """Meanwhile SIGTERM interrupts the kernels that are children of this process, a second one ends it.

    Papermill alone would end at once and leave its kernel half a second. The event is set at the first one.
    """
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
        yield came
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def glance_of(executed: Path) -> str:
    """The table at the top of an executed notebook that says what came out; empty where it has none."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    texts = (
        "".join(output.get("data", {}).get("text/plain", "")) for cell in cells for output in cell.get("outputs", [])
    )
    return next((text for text in texts if text.startswith("at a glance")), "")


def _short_failure(notebook: Path, error: Any, executed: Path) -> str:
    cell = "\n".join(f"    {line}" for line in str(error.source).strip().splitlines()[:12])
    return (
        f"{notebook.stem}: cell [{error.exec_count}] raised {error.ename}: {error.evalue}\n"
        f"{cell}\nwhole traceback: {executed}"
    )


class _Sink:
    """The file-like object that papermill wants for printed text."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write

    def flush(self) -> None:
        """Nothing is held back here."""


LINE_EVERY_S = 30.0  # at most one line about cells in this time, where there is no terminal


def for_stream(stream: TextIO) -> tuple[Callable[[str], object], dict[str, Any]]:
    """(where printed text goes, settings of papermill's progress bar) that suit ``stream``."""
    if stream.isatty():
        return _above_the_bar, {"file": sys.stderr, "leave": False}
    return _flushed(stream), {
        "file": _Lines(stream),
        "bar_format": "cell {n_fmt} of {total_fmt} after {elapsed}",
        "mininterval": LINE_EVERY_S,
        "delay": LINE_EVERY_S,
        "leave": False,
    }


def _above_the_bar(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, end="")


def _flushed(stream: TextIO) -> Callable[[str], object]:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


class _Lines:
    """Turns a bar that is redrawn in place into lines, each once."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:
            self.stream.write(f"{line}\n")
            self.stream.flush()
            self.last = line

    def flush(self) -> None:
        """Each line is flushed as it is written."""

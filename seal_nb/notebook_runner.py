"""Stage notebooks as commands: find one, check its parameters, execute it with papermill.

A notebook's parameters are its one cell tagged ``parameters``: ``name: type = default  # help``, read by papermill.
Papermill only warns about an unknown parameter or a wrong type; both are refused here.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import psutil
from pydantic import TypeAdapter

from seal_nb.errors import PUT_AWAY, SealError, SettingsError, redacted, visible
from seal_nb.grading.choose import stated_grader
from seal_nb.storage import runs_folder

START_TIMEOUT_S = 180  # of a kernel on a busy cluster node with a cold file system
STARTS = 3  # of a kernel
NOT_STARTED = "Kernel died before replying"  # jupyter_client's words
LINE_EVERY_S = 30.0  # without a terminal: at most one line about cells in this time
Value = int | float | bool | str | list[Any]


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
    """The notebook named ``stage``, or the only one whose name begins so ("03", "3"). Raises: SettingsError."""
    folder = folder or default_notebooks_dir()
    names = sorted(path.stem for path in folder.glob("*.ipynb"))
    if not names:
        raise SettingsError(f"no notebooks in {folder}; run from a checkout, or give --notebooks FOLDER")
    if stage in names:
        return folder / f"{stage}.ipynb"
    matches = [name for name in names if stage and name.startswith((stage, f"0{stage}"))]
    if len(matches) == 1:
        return folder / f"{matches[0]}.ipynb"
    problem = f"{len(matches)} stages begin with {stage!r}" if matches else f"no stage {stage!r}"
    raise SettingsError(f"{problem}{_near(stage, names)}; stages: {', '.join(names)}")


def _near(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name, with their defaults as values. Raises: SettingsError."""
    parameters = {}
    for name, found in _papermill().inspect_notebook(str(notebook)).items():
        try:
            default = ast.literal_eval(found["default"])
        except (ValueError, SyntaxError) as error:
            raise SettingsError(
                f"{notebook}: papermill reads the default of {name!r} as {found['default']}, which is "
                "no literal; write `name: type = literal  # help` on one line, with no # in the literal"
            ) from error
        declared = found["inferred_type_name"].strip()
        kind = type(default).__name__ if declared == "None" else declared
        parameters[name] = Parameter(name=name, type_name=kind, default=default, help=found["help"])
    return parameters


def _papermill() -> Any:
    """Papermill, imported when it is needed. Its import loads jsonschema, which loads rfc3987_syntax if JupyterLab
    brought it along. That package compiles a grammar for three seconds, for a format that no notebook uses."""
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import papermill

    return papermill


def parse_parameters(pairs: Iterable[tuple[str, str]], declared: Mapping[str, Parameter]) -> dict[str, Value]:
    """Command-line NAME VALUE pairs as typed values. Raises: SettingsError with the parameter and the remedy."""
    values: dict[str, Value] = {}
    for name, text in pairs:
        if name not in declared:
            raise SettingsError(f"unknown parameter {name!r}{_near(name, declared)}; parameters: {', '.join(declared)}")
        values[name] = parse_value(text, declared[name])
    return values


def parse_value(text: str, parameter: Parameter) -> Value:
    """``text`` in the parameter's declared type. Raises: SettingsError, also for a key: the executed notebook and
    command lines would show it."""
    if redacted(text, is_prose=parameter.name in PROSE) != text:
        raise SettingsError(f"parameter {parameter.name!r} holds a key (it is not shown); {PUT_AWAY}")
    if text and parameter.name in ("engine_url", "api_key_env"):
        from seal_nb.engines.api import ApiSettings

        ApiSettings(base_url=text) if parameter.name == "engine_url" else ApiSettings(api_key_env=text)
    if text and parameter.name == "grader":
        stated_grader(text)
    kind = parameter.type_name
    try:
        if text.lstrip().startswith("[") and kind.startswith("list"):
            return TypeAdapter(_TYPES[kind]).validate_json(text)
        items = [part.strip() for part in text.split(",") if part.strip()]
        return TypeAdapter(_TYPES[kind]).validate_python(items if kind.startswith("list") else text)
    except ValueError:
        examples = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        example = examples.get(kind, 'a JSON list or items with commas, such as ["a", "b"] or a,b')
        raise SettingsError(f"parameter {parameter.name!r}: {text!r} is not {kind}; give {example}") from None


PROSE = ("question", "gold", "edited", "end_mask_substring")  # parameters that hold any sentence
_TYPES: dict[str, Any] = {
    "int": int, "float": float, "bool": bool, "str": str,
    "list": list[str], "list[int]": list[int], "list[float]": list[float], "list[str]": list[str],
}  # fmt: skip


def format_value(value: Value) -> str:
    """The command-line text that ``parse_value`` reads as ``value``."""
    return value if isinstance(value, str) else json.dumps(value)


def executed_path(notebook: Path, values: Mapping[str, Value], declared: Mapping[str, Parameter]) -> Path:
    """Where the executed copy goes by default: into the notebook's ``output_dir``."""
    output_dir = values.get("output_dir") or (declared["output_dir"].default if "output_dir" in declared else "")
    return runs_folder(str(output_dir) or f"runs/{notebook.stem}") / notebook.name


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
    write: Callable[[str], object],
    progress_bar: bool | dict[str, Any],
) -> None:
    """Execute ``notebook`` into ``executed``. ``write`` receives what the cells print, at once; ``progress_bar`` has
    arguments of tqdm, or is False. A kernel that dies before its first cell is started again: another process may have
    taken its ports. Raises: StageFailed where a cell raised or the kernel died; StageInterrupted after a SIGTERM."""
    from traitlets.config import Config

    papermill = _papermill()

    def before_cell(**_: object) -> None:
        if interruption.is_set():  # a kernel that runs no cell has ignored its interrupt
            raise StageInterrupted(f"{notebook.stem}: SIGTERM came between two cells; finished cells are in {executed}")

    executed.parent.mkdir(parents=True, exist_ok=True)
    with interrupted_by_sigterm() as interruption:
        for starts_left in reversed(range(STARTS)):
            try:
                papermill.execute_notebook(
                    # Papermill takes paths for format strings.
                    *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)),
                    parameters=dict(values),
                    kernel_name="python3",
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
                elif NOT_STARTED in str(error):
                    if starts_left:
                        continue
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

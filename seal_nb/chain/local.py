"""A run's folder: the record of its chain, the chain run in it on this machine, and its pages.

A job finds in ``chain.json`` the identity under which it marks its stage as done. All paths follow from names, so the
folder can be moved. ``run_chain`` runs one stage after another, each in a process of its own, servers beside them.
After an interruption of any kind the same call continues: finished stages are kept, and an unfinished one goes on
from its own journal. No process outlives the chain, not even after a `kill -9` (``processes.end_with_parent``)."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter

from seal_nb.chain.stages import ENDPOINT_FILE, Chain, Stage, as_options
from seal_nb.errors import DataError, SealError, SettingsError, checked, pattern, visible
from seal_nb.notebook_runner import StageFailed, load_notebook
from seal_nb.processes import LoggedProcess, end_tree, last_lines
from seal_nb.storage import data_file, lock, open_regular, read_json, write_json, write_text

RECORD_FILE = "chain.json"
LOCK_FILE = ".chain.lock"
TAKEOVER_TIMEOUT_S = 20.0  # the processes of a killed chain need some seconds to end
BAD = ("failed", "lost")  # states of a stage
LOG_LINES = 5
MESSAGE_LINES = 4
Status = tuple[str, str]  # state and note of a stage
Tell = Callable[[str], None]  # receives progress, line by line


def write_record(chain: Chain, run_dir: Path) -> None:
    write_json(run_dir / RECORD_FILE, asdict(chain))


def read_record(run_dir: Path) -> Chain:
    """The folder may come from elsewhere: names lead to no other folder, numbers are numbers, and nothing is a command.
    Raises: DataError with the field where no chain was started in the folder, or its record is broken."""
    path = run_dir / RECORD_FILE
    if not path.is_file():
        raise DataError("no chain was submitted here", path=run_dir, remedy="give the run folder of a `seal-nb submit`")
    if not is_inside(path, run_dir):
        raise DataError("not a chain's record", path=path, remedy="submit the chain again")
    chain: Chain = checked(TypeAdapter(Chain).validate_python, read_json(path), path=path)
    names = [stage.name for stage in chain]
    for number, stage in enumerate(chain):
        if unknown := set(stage.needs) - set(names[:number]):
            problem, where = f"names {min(unknown)!r}, which is no stage before it", f"stages[{number}].needs"
            raise DataError(problem, path=path, field=where, remedy="submit the chain again")
    return chain


def is_inside(path: Path, folder: Path) -> bool:
    """Whether it is a file whose real place is in ``folder``: a link may lead out of it."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def stage_in(run_dir: Path, output_dir: str | Path) -> Stage:
    """The stage whose folder is ``output_dir``. Raises: SettingsError where there is none, DataError."""
    for stage in read_record(run_dir):
        if (run_dir / stage.name).resolve() == Path(output_dir).resolve():
            return stage
    raise SettingsError(f"output_dir {str(output_dir)!r} is not the folder of a stage of the chain in {run_dir}")


@contextlib.contextmanager
def marked_when_done(run_dir: Path, output_dir: str) -> Iterator[None]:
    """Mark the stage of ``output_dir`` as done in ``run_dir`` if the block ends without an error.
    Raises: SettingsError before the block, where there is no such stage; DataError, also for missing results."""
    stage, began = stage_in(run_dir, output_dir), time.monotonic()
    yield
    if missing := stage.missing(run_dir):
        raise DataError(f"stage {stage.name!r} did not write {', '.join(missing)}", path=run_dir / stage.name)
    stage.mark_done(run_dir, seconds=time.monotonic() - began)


def sole_use(run_dir: Path, tell: Tell) -> contextlib.AbstractContextManager[int]:
    """Lock the folder for a block (`storage.lock`), once the processes of a killed chain have ended.
    Raises: RunMismatch if the lock is not free within TAKEOVER_TIMEOUT_S; DataError."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{run_dir} cannot be a run folder: {error}; give another --run-dir") from error
    return lock(run_dir / LOCK_FILE, of=run_dir, wait_s=TAKEOVER_TIMEOUT_S, tell=tell)


def in_use_since(run_dir: Path) -> float | None:
    """When the chain that runs in this folder began (a file's time stamp, in seconds); None where none runs."""
    try:
        with open_regular(run_dir / LOCK_FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        return (run_dir / LOCK_FILE).stat().st_mtime
    except (OSError, DataError):  # no such file, or no locks on this file system
        return None


def chain_status(chain: Chain, run_dir: Path, *, job_status: Callable[[Stage], Status]) -> dict[str, Status]:
    """The status of each stage, by name. ``job_status`` asks SLURM about a stage with a job. States: done, running,
    waiting, ended (a server), interrupted (here), failed, cancelled, lost, not started."""
    since = in_use_since(run_dir)

    def one(stage: Stage) -> Status:
        if stage.is_done(run_dir):
            mark = stage.mark(run_dir)
            return "done", f"in {mark.seconds:.0f} s" if mark else ""
        return job_status(stage) if stage.job else _without_job(stage, run_dir, since)

    return {stage.name: one(stage) for stage in chain}


def _without_job(stage: Stage, run_dir: Path, since: float | None) -> Status:
    """``since``: when the local chain that runs now began. It has not reached a stage whose log is older."""
    log, executed = stage.log(run_dir), stage.executed(run_dir)
    if is_inside(executed, run_dir) and failing_cell(executed):
        return "failed", "a cell raised"
    if not log.exists():
        return "not started", ""
    if since is None:
        return ("ended", "") if stage.background else ("interrupted", "the same command continues it")
    if log.stat().st_mtime < since:
        return "waiting", ""
    return "running", "or ended" if stage.background else ""


def status_lines(chain: Chain, statuses: Mapping[str, Status], run_dir: Path) -> Iterator[str]:
    """A line for each stage, then what is known of each stage that failed; nothing from outside the folder."""
    rows = [(stage, *statuses[stage.name]) for stage in chain]
    counts = Counter(state for stage, state, _ in rows if not stage.background)
    others = "".join(f", {number} {state}" for state, number in counts.most_common() if state != "done")
    yield f"chain {chain.name}: {counts['done']} of {counts.total()} stages done{others}"
    name, notebook = (max(len(getattr(stage, field)) for stage in chain) for field in ("name", "notebook"))
    for stage, state, note in rows:
        yield f"  {stage.name:<{name}}  {stage.notebook:<{notebook}}  {state:<11}  {note}".rstrip()
    for stage, state, note in rows:
        if state not in BAD:
            continue
        executed, log = stage.executed(run_dir), stage.log(run_dir)
        is_there = is_inside(executed, run_dir)
        yield from ("", f"{stage.name}: {note}", *(failing_cell(executed) if is_there else []))
        if is_inside(log, run_dir):
            yield from (f"  the end of {log}:", *(f"      {line}" for line in last_lines(log, LOG_LINES)))
        if is_there:
            yield f"  executed notebook: {executed}"


def first_error(cells: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first cell of an executed notebook that raised, and the output with its error."""
    errors = ((cell, one) for cell in cells for one in cell.get("outputs", []) if one["output_type"] == "error")
    return next(errors, None)


def failing_cell(executed: Path) -> list[str]:
    """Lines about the cell of an executed notebook that raised; none if there is no such notebook or cell."""
    try:
        if not (failed := first_error(read_json(executed)["cells"])):
            return []
        cell, error = failed
        first, *rest = f"raised {error['ename']}: {error['evalue']}".splitlines()
        # IPython's traceback marks the line of the cell; of several exceptions the last one counts.
        text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error["traceback"])).rpartition("Cell In[")[2]
        marked = re.search(r"^-+> *\d+ (.*)$", text, flags=re.MULTILINE)
        line = marked[1].strip() if marked else "".join(cell["source"]).split("\n")[0]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    about = [f"      {line}" for line in rest[: MESSAGE_LINES - 1]]
    return [f"  cell [{cell.get('execution_count')}] {first}", *about, f"  at: {line}"]


QUIET_S = 30.0  # after such a silence a line says that a stage is still running
POLL_S = 0.2
READY_TIMEOUT_S = 600.0  # of a server that loads a 7B model from a network disk
STOP_TIMEOUT_S = 30.0


def shut_down(endpoint_file: Path) -> None:
    """Ask the server to end."""
    from seal_nb.server.client import TTTClient

    with TTTClient(str(endpoint_file), wait_s=10) as client:
        client.shutdown()


def run_chain(chain: Chain, run_dir: Path, *, notebooks: Path, tell: Tell) -> None:
    """Run the stages that are not done yet. Raises: StageFailed (later stages are not started), RunMismatch."""
    with sole_use(run_dir, tell) as lock, contextlib.ExitStack() as at_the_end:
        for number in (signal.SIGTERM, signal.SIGHUP):  # child processes are then ended on the way out
            before = signal.signal(number, lambda number, _: sys.exit(128 + number))
            at_the_end.callback(signal.signal, number, before)
        write_record(chain, run_dir)
        run = _Run(chain=chain, run_dir=run_dir, notebooks=notebooks, tell=tell, lock=lock)
        try:
            run.stages()
        finally:
            for child in reversed(run.children.values()):
                end_tree(child.pid)


class _Child(LoggedProcess):
    """A stage's process. It writes into a log file, which is read while it grows."""

    def __init__(self, command: list[str], log: Path, lock: int) -> None:
        # Ctrl-C reaches only the chain, which ends its children in order.
        super().__init__(command, log, is_new=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, pass_fds=(lock,))
        self.started = time.monotonic()
        self._log, self._rest = log.open(encoding="utf-8", errors="replace"), ""

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def new_lines(self) -> list[str]:
        """The whole lines written since the last call."""
        *lines, self._rest = (self._rest + self._log.read()).split("\n")
        return [visible(line.rstrip().rpartition("\r")[2]) for line in lines if line.strip()]


@dataclass(kw_only=True)
class _Run:
    """One call of run_chain."""

    chain: Chain
    run_dir: Path
    notebooks: Path
    tell: Tell
    lock: int
    children: dict[str, _Child] = field(default_factory=dict)  # that run: servers, and one stage

    def stages(self) -> None:
        started = time.monotonic()
        foreground = [stage for stage in self.chain if not stage.background]
        pending = [stage for stage in foreground if not stage.is_done(self.run_dir)]
        for k, stage in enumerate(foreground, 1):
            place = f"[{k:>{len(str(len(foreground)))}}/{len(foreground)}] {stage.name} ({stage.notebook})"
            if stage not in pending:
                self.tell(f"{place}: finished before, kept")
                continue
            for server in self.chain.servers_of(stage):
                if server.name not in self.children:
                    self.start_server(server)
            self.tell(f"{place}: {stage.title}")
            seconds = self.run(stage)
            stage.mark_done(self.run_dir, seconds=seconds)
            total = timedelta(seconds=int(time.monotonic() - started))
            self.tell(f"{place}: done in {timedelta(seconds=int(seconds))} ({total} in all)")
            pending.remove(stage)
            self.stop_servers_except(pending)

    def run(self, stage: Stage) -> float:
        """Pass on the stage's output until it ends. Returns: how long it took. Raises: StageFailed, also if a server
        that it needs ends earlier."""
        child, is_running = self.start(stage), True
        last_told = child.started
        while is_running:
            is_running = child.poll() is None
            lines = child.new_lines()
            if not lines and time.monotonic() - last_told > QUIET_S:
                lines = [f"{stage.name}: still running after {timedelta(seconds=int(child.seconds()))}"]
            for line in lines:
                self.tell(f"    {line}")
                last_told = time.monotonic()
            for server in self.chain.servers_of(stage):
                self.check_server(server)
            if is_running and not lines:
                time.sleep(POLL_S)
        if code := self.children.pop(stage.name).wait():
            raise self.failure(f"stage {stage.name!r} ended with exit code {code}", stage)
        if missing := stage.missing(self.run_dir):
            raise self.failure(f"stage {stage.name!r} did not write {', '.join(missing)}", stage)
        return child.seconds()

    def start(self, stage: Stage) -> _Child:
        command = run_command(stage, self.run_dir, self.notebooks)
        child = self.children[stage.name] = _Child(command, stage.log(self.run_dir), self.lock)
        return child

    def start_server(self, stage: Stage) -> None:
        """Start a server and wait until it is ready."""
        ready = self.run_dir / stage.name / ENDPOINT_FILE
        ready.unlink(missing_ok=True)
        self.tell(f"{stage.name} ({stage.notebook}): {stage.title}")
        child = self.start(stage)
        while not ready.exists():
            self.check_server(stage)
            if child.seconds() > READY_TIMEOUT_S:
                raise self.failure(f"server {stage.name!r} not ready in {READY_TIMEOUT_S:.0f} s", stage)
            time.sleep(POLL_S)
        self.tell(f"{stage.name}: ready after {timedelta(seconds=int(child.seconds()))}")

    def check_server(self, stage: Stage) -> None:
        if (code := self.children[stage.name].poll()) is not None:
            raise self.failure(f"server {stage.name!r} ended early with exit code {code}", stage)

    def stop_servers_except(self, pending: list[Stage]) -> None:
        """Stop the servers that no pending stage needs."""
        needed = {server.name for stage in pending for server in self.chain.servers_of(stage)}
        for name in self.children.keys() - needed:
            child = self.children.pop(name)
            # A server that does not answer is ended below.
            with contextlib.suppress(SealError, OSError, subprocess.TimeoutExpired):
                shut_down(self.run_dir / name / ENDPOINT_FILE)
                child.wait(STOP_TIMEOUT_S)
            end_tree(child.pid)
            self.tell(f"{name}: stopped")

    def failure(self, problem: str, stage: Stage) -> StageFailed:
        where = f"its output is in {stage.log(self.run_dir)}, its notebook is {stage.executed(self.run_dir)}"
        return StageFailed(f"{problem}; {where}. The same command continues: finished stages are kept")


def run_command(stage: Stage, run_dir: Path, notebooks: Path) -> list[str]:
    """The command that runs ``stage`` as a child of this process."""
    command = [sys.executable, "-m", "seal_nb.cli", "run", stage.notebook, "--notebooks", str(notebooks)]
    return [*command, "--parent-pid", str(os.getpid()), *as_options(stage.values(run_dir))]


N_FIGURES = 4
SKIPPED_FOLDERS = {".ipynb_checkpoints", ".venv", ".git"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
GENERATOR = '<meta content="seal-nb" name="generator"/>'  # in each page's head; nbconvert orders attributes like this
ALLOWED = read_json(data_file("allowed_html.json"))  # what a page may have of HTML from a notebook
TABLE_STYLE = pattern("style_of_table")


def write_index(run_dir: str | Path, *, title: str = "Run report") -> Path:
    """Write an HTML page next to each executed notebook below a folder, and ``index.html`` that links them.
    The pages load nothing, run no script and are light or dark as the browser asks. A content security policy in each
    page enforces it. Text from notebooks is escaped, and HTML in their outputs is sanitized. Runs no notebook.
    Returns: the path of ``index.html``. Raises: DataError where there is no notebook, or one cannot be read, or a file
    that was not written here has the name of a page; then nothing is written."""
    from jinja2 import Environment
    from nbconvert import HTMLExporter

    folder = Path(run_dir)
    found = [path for path in folder.rglob("*.ipynb") if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts)]
    if not found:
        raise DataError("no executed notebook", path=folder, remedy="run a stage with its output in this folder")
    pages = [_page(path, folder) for path in found]
    for target in [folder / "index.html", *(page["path"].with_suffix(".html") for page in pages)]:
        if target.is_symlink() or (target.exists() and not _is_page(target)):
            raise DataError("is not a page of seal-nb, and is kept", path=target, remedy="give it another name")
    pages.sort(key=lambda page: (not page["has_results"], page["started"], page["link"]))
    exporter = HTMLExporter(raw_template=_template("notebook_page"), sanitize_html=True)
    exporter.register_filter("clean_html", _clean)
    for page in pages:
        html, _ = exporter.from_notebook_node(page["notebook"], resources={"metadata": {"name": page["title"]}})
        write_text(page["path"].with_suffix(".html"), html)
    results = [page["notebook"] for page in pages if page["has_results"] and not page["failure"]]
    figures = [figure for notebook in results for figure in _figures(notebook)]
    template = Environment(autoescape=True).from_string(_template("index_page"))
    failed = [page for page in pages if page["failure"]]
    text = template.render(title=title, pages=pages, failed=failed, figures=figures[:N_FIGURES])
    return write_text(folder / "index.html", text)


def _template(name: str) -> str:
    return data_file(f"{name}.html.j2").read_text().replace("POLICY", POLICY).replace("GENERATOR", GENERATOR)


def _is_page(path: Path) -> bool:
    with open_regular(path) as file:
        return GENERATOR.encode() in file.read(2**16)


def _clean(html: str) -> str:
    """HTML from a notebook without anything that acts and without style sheets, except those of our tables."""
    from bleach import clean
    from bleach.css_sanitizer import CSSSanitizer

    own = "".join(style[0] for style in TABLE_STYLE.finditer(html))
    html = re.sub(r"<(script|style)\b.*?</\1\s*>", "", html, flags=re.DOTALL | re.IGNORECASE)
    css = CSSSanitizer()
    return own + str(clean(html, **ALLOWED, strip=True, css_sanitizer=css))


def _page(path: Path, folder: Path) -> dict[str, Any]:
    """What the index shows of an executed notebook, and the notebook. ``failure`` is empty unless a cell raised."""
    notebook = load_notebook(path)
    place = path.relative_to(folder)
    headings = [heading for cell in notebook.cells for heading in _headings(cell)]
    failed = first_error(notebook.cells)
    return {
        "path": path,
        "stage": "" if place.parent == Path() else place.parent.as_posix(),
        "link": quote(place.with_suffix(".html").as_posix()),
        "title": headings[0] if headings else path.stem,
        "started": str(notebook.metadata.get("papermill", {}).get("start_time") or ""),
        "failure": f"{failed[1]['ename']}: {failed[1]['evalue']}" if failed else "",
        "has_results": path.stem.startswith("08_results"),
        "notebook": notebook,
    }


def _headings(cell: Any) -> list[str]:
    return re.findall(r"^#{1,6}\s+(.+?)\s*$", cell.source, flags=re.MULTILINE) if cell.cell_type == "markdown" else []


def _figures(notebook: Any) -> Iterator[dict[str, str]]:
    """The first figure of each section of a notebook, with its text."""
    heading, shown = "", set[str]()
    for cell in notebook.cells:
        heading = next(iter(_headings(cell)), heading)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data and heading not in shown:
                alt = output.metadata.get("image/png", {}).get("alt", "") or data.get("text/plain", "")
                yield {"png": "".join(data["image/png"].split()), "alt": alt, "heading": heading}
                shown.add(heading)

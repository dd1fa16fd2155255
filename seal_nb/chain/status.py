"""What has become of a chain: each stage's state, and for one that failed why, as lines to read.

Three sources: the marks of finished stages, SLURM about the jobs that it still knows, and what a stage left
in its folder, which is its log and the executed notebook with the failing cell. Asks, and changes nothing.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from seal_nb.chain.local import in_use_since
from seal_nb.chain.record import ChainRecord, StageRecord
from seal_nb.chain.slurm import JobState
from seal_nb.chain.stages import read_marker

LOG_LINES = 5
MESSAGE_LINES = 4
BAD = ("failed", "lost")
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colours
LookUp = Callable[[str], JobState | None]


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """``state``: done, running, waiting, ended (a server), interrupted (here), failed, cancelled, lost,
    not started."""

    stage: StageRecord
    state: str
    note: str

    @property
    def is_bad(self) -> bool:
        return self.state in BAD


def chain_status(record: ChainRecord, run_dir: Path, *, look_up: LookUp) -> list[StageStatus]:
    """One entry a stage, in the chain's order. Raises what ``look_up`` raises."""
    since = in_use_since(run_dir)
    return [_status(stage, run_dir, look_up, since) for stage in record.stages]


def _status(stage: StageRecord, run_dir: Path, look_up: LookUp, since: float | None) -> StageStatus:
    if not stage.background and stage.is_done(run_dir):
        seconds = read_marker(run_dir, stage.name).get("seconds", 0)
        return StageStatus(stage=stage, state="done", note=f"in {seconds:.0f} s")
    state, note = _of_job(stage, look_up(stage.job)) if stage.job else _without_job(stage, run_dir, since)
    return StageStatus(stage=stage, state=state, note=note)


def _without_job(stage: StageRecord, run_dir: Path, since: float | None) -> tuple[str, str]:
    """``since``: when the chain began that runs here; it has not come to stages whose log is older."""
    if failing_cell(stage.executed(run_dir)) is not None:
        return "failed", "a cell raised"
    if not (log := stage.log(run_dir)).exists():
        return "not started", ""
    if since is not None and log.stat().st_mtime < since:
        return "waiting", ""
    if since is not None:
        return "running", "or ended" if stage.background else ""
    return ("ended", "") if stage.background else ("interrupted", "the same command goes on with it")


def _of_job(stage: StageRecord, job: JobState | None) -> tuple[str, str]:
    number = f"job {stage.job}"
    if job is None:
        # A server that ended leaves no mark; for everything else, no mark means no result.
        return ("ended" if stage.background else "lost"), f"{number}, which SLURM has forgotten"
    again = f", run {job.restarts + 1}" if job.restarts else ""
    if job.state == "PENDING":
        return "waiting", f"{number}{again} ({job.reason})"
    if job.is_live:
        return "running", f"{number} on {job.node}{again}"
    if job.state == "CANCELLED":
        return "cancelled", f"{number}{again}" + _because(job)
    if job.state == "COMPLETED":
        return ("ended", number) if stage.background else ("failed", f"{number} ended without its results")
    code = f"signal {job.signal}" if job.signal else f"exit code {job.exit_code}"
    return "failed", f"{number} on {job.node}{again}: {job.state}, {code}" + _because(job)


def _because(job: JobState) -> str:
    return f" ({job.reason})" if job.reason not in ("None", "NonZeroExitCode") else ""


def status_lines(record: ChainRecord, statuses: list[StageStatus], run_dir: Path) -> Iterator[str]:
    """The table, then what is known of each stage that went wrong."""
    counts = Counter(status.state for status in statuses if not status.stage.background)
    total = sum(counts.values())
    said = ", ".join(f"{number} {state}" for state, number in counts.most_common() if state != "done")
    yield f"chain {record.chain}: {counts['done']} of {total} stages done" + (f", {said}" if said else "")
    width = max(len(status.stage.name) for status in statuses)
    for status in statuses:
        yield f"  {status.stage.name:<{width}}  {status.state:<11}  {status.note}".rstrip()
    for status in statuses:
        if status.is_bad:
            yield from ("", *_what_went_wrong(status, run_dir))


def _what_went_wrong(status: StageStatus, run_dir: Path) -> Iterator[str]:
    stage = status.stage
    yield f"{stage.name}: {status.note}"
    executed, log = stage.executed(run_dir), stage.log(run_dir)
    if (failure := failing_cell(executed)) is not None:
        message = f"cell [{failure.number}] raised {failure.ename}: {failure.evalue}".splitlines()
        yield f"  {message[0]}"
        yield from (f"      {line}" for line in message[1:MESSAGE_LINES])
        yield f"  at: {failure.line}"
    if log.exists():
        yield f"  the end of {log}:"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        yield from (f"      {line}" for line in lines[-LOG_LINES:])
    if executed.exists():
        yield f"  executed notebook: {executed}"


@dataclass(frozen=True, kw_only=True)
class CellFailure:
    """The cell of an executed notebook that raised."""

    number: int | None  # in square brackets in the notebook
    ename: str
    evalue: str
    line: str  # that raised; the cell's first one where the traceback does not tell


def failing_cell(executed: Path) -> CellFailure | None:
    """None where there is no such notebook (yet), or no cell raised."""
    try:
        cells = json.loads(executed.read_text())["cells"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                return CellFailure(
                    number=cell.get("execution_count"),
                    ename=output["ename"],
                    evalue=output["evalue"],
                    line=_raising_line("\n".join(output["traceback"])) or "".join(cell["source"]).split("\n")[0],
                )
    return None


def _raising_line(traceback: str) -> str:
    """Where IPython's traceback points to in the cell; of several exceptions the last one's."""
    text = ANSI.sub("", traceback).rpartition("Cell In[")[2]
    found = re.search(r"^-+> *\d+ (.*)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else ""

"""What has become of a chain: the state of each stage, and why a stage failed, as lines to read.

Sources: the marks of finished stages, SLURM for the jobs that it still knows, and the log and the executed notebook
in a stage's folder. Changes nothing.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from seal_nb.chain.record import in_use_since
from seal_nb.chain.slurm import JobState
from seal_nb.chain.stages import Chain, Stage

LOG_LINES = 5
MESSAGE_LINES = 4


@dataclass(frozen=True)
class StageStatus:
    """``state``: done, running, waiting, ended (a server), interrupted (here), failed, cancelled, lost, not started."""

    stage: Stage
    state: str
    note: str

    @property
    def is_bad(self) -> bool:
        return self.state in ("failed", "lost")


def chain_status(chain: Chain, run_dir: Path, *, look_up: Callable[[str], JobState | None]) -> list[StageStatus]:
    """One entry for each stage, in the chain's order. ``look_up`` asks SLURM for a job; its errors are raised."""
    since = in_use_since(run_dir)

    def one(stage: Stage) -> tuple[str, str]:
        if stage.is_done(run_dir):
            return "done", f"in {stage.mark(run_dir)['seconds']:.0f} s"
        return _of_job(stage, look_up(stage.job)) if stage.job else _without_job(stage, run_dir, since)

    return [StageStatus(stage, *one(stage)) for stage in chain]


def _without_job(stage: Stage, run_dir: Path, since: float | None) -> tuple[str, str]:
    """``since``: when the local chain that runs now began. It has not reached a stage whose log is older."""
    log = stage.log(run_dir)
    if failing_cell(stage.executed(run_dir)):
        return "failed", "a cell raised"
    if not log.exists():
        return "not started", ""
    if since is None:
        return ("ended", "") if stage.background else ("interrupted", "the same command continues it")
    if log.stat().st_mtime < since:
        return "waiting", ""
    return "running", "or ended" if stage.background else ""


def _of_job(stage: Stage, job: JobState | None) -> tuple[str, str]:
    number = f"job {stage.job}"
    if job is None:
        # A server that ended leaves no mark. Without a mark any other stage has no result.
        return ("ended" if stage.background else "lost"), f"{number}, which SLURM has forgotten"
    again = f", run {job.restarts + 1}" if job.restarts else ""
    because = f" ({job.reason})" if job.reason not in ("None", "NonZeroExitCode") else ""
    if job.state == "PENDING":
        return "waiting", f"{number}{again} ({job.reason})"
    if job.is_live:
        return "running", f"{number} on {job.node}{again}"
    if job.state == "CANCELLED":
        return "cancelled", f"{number}{again}{because}"
    if job.state == "COMPLETED":
        return ("ended", number) if stage.background else ("failed", f"{number} ended without its results")
    code = f"signal {job.signal}" if job.signal else f"exit code {job.exit_code}"
    return "failed", f"{number} on {job.node}{again}: {job.state}, {code}{because}"


def status_lines(chain: Chain, statuses: list[StageStatus], run_dir: Path) -> Iterator[str]:
    """A line for each stage, then what is known of each stage that failed."""
    counts = Counter(status.state for status in statuses if not status.stage.background)
    others = "".join(f", {number} {state}" for state, number in counts.most_common() if state != "done")
    yield f"chain {chain.name}: {counts['done']} of {counts.total()} stages done{others}"
    name, notebook = (max(len(getattr(one.stage, field)) for one in statuses) for field in ("name", "notebook"))
    for status in statuses:
        stage = status.stage
        yield f"  {stage.name:<{name}}  {stage.notebook:<{notebook}}  {status.state:<11}  {status.note}".rstrip()
    for status in statuses:
        if status.is_bad:
            yield from ("", f"{status.stage.name}: {status.note}", *_failure_lines(status.stage, run_dir))


def _failure_lines(stage: Stage, run_dir: Path) -> Iterator[str]:
    executed, log = stage.executed(run_dir), stage.log(run_dir)
    yield from failing_cell(executed)
    if log.exists():
        yield f"  the end of {log}:"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        yield from (f"      {line}" for line in lines[-LOG_LINES:])
    if executed.exists():
        yield f"  executed notebook: {executed}"


def failing_cell(executed: Path) -> list[str]:
    """Lines about the cell of an executed notebook that raised; none if there is no such notebook or cell."""
    try:
        cells = json.loads(executed.read_text())["cells"]
    except (FileNotFoundError, ValueError, KeyError):
        return []
    for cell in cells:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                first, *rest = f"raised {output['ename']}: {output['evalue']}".splitlines()
                # IPython's traceback marks the line of the cell; of several exceptions the last one counts.
                text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output["traceback"])).rpartition("Cell In[")[2]
                marked = re.search(r"^-+> *\d+ (.*)$", text, flags=re.MULTILINE)
                line = marked[1].strip() if marked else "".join(cell["source"]).split("\n")[0]
                about = [f"      {line}" for line in rest[: MESSAGE_LINES - 1]]
                return [f"  cell [{cell.get('execution_count')}] {first}", *about, f"  at: {line}"]
    return []

"""What would be submitted, as the text of a shell script: each job's command, and what its script wants."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from seal_nb.chain.slurm_plan import Cluster, plan
from seal_nb.chain.table import Chain, is_done

WIDTH = 110


def dry_run(chain: Chain, run_dir: Path, cluster: Cluster) -> str:
    """What ``submit_chain`` would do in an empty queue, as the text of a shell script."""
    jobs = plan(chain, run_dir, cluster, on_their_way={})
    kept = [stage.name for stage in chain if not stage.background and is_done(chain, stage, run_dir)]
    site = " ".join(f"{name}={value}" for name, value in sorted(cluster.site.items()))
    lines = [
        f"# chain {chain.name}: {sum(len(job.stages) for job in jobs)} stages in {len(jobs)} jobs",
        f"# site: {cluster.place(cluster.site_file)} {site}",
        *([f"# finished before, kept: {', '.join(kept)}"] if kept else []),
    ]
    for script in dict.fromkeys(job.script for job in jobs):
        lines += _packed(f"# {script}", cluster.asks_for(script), indent="#    ", end="")
    variables = {job.name: f"${{{job.name}}}{job.part}" if job.part else f"${job.name}" for job in jobs}
    for job in jobs:
        lines += ["", *(f"# {stage.title}" for stage in job.stages)]
        head, *rest = job.command(variables)
        lines += _packed(f"{job.name}=$({head}", _pairs(rest), indent="    ", end=" \\")
        lines[-1] += ")"
    return "\n".join(lines)


def _pairs(words: Iterable[str]) -> list[str]:
    """Quoted for a shell (but for the variables), an option and its value together."""
    text = " ".join(word if "$" in word else shlex.quote(word) for word in words)
    return re.findall(r"-p \w+ (?:'[^']*'|\S+)|--chain \S+|\S+", text)


def _packed(head: str, words: Sequence[str], *, indent: str, end: str) -> list[str]:
    lines = [head]
    for word in words:
        if len(lines[-1]) + 1 + len(word) + len(end) > WIDTH:
            lines[-1] += end
            lines.append(indent + word)
        else:
            lines[-1] += f" {word}"
    return lines

"""``seal-nb submit``, ``chain-status``, ``restart-server``: a table of stages, on a cluster or this machine.

Prints; the work is in ``seal_nb.chain``.
"""

import argparse
import shlex
import shutil
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from seal_nb.chain import slurm as slurm_again
from seal_nb.chain import slurm as slurm_jobs
from seal_nb.chain.local import run_chain
from seal_nb.chain.record import read_record, record_of
from seal_nb.chain.slurm import Cluster, dry_run, jobs_on_their_way, submit_chain
from seal_nb.chain.stages import CHAINS, DEMO, Chain, ExperimentSettings, is_done
from seal_nb.chain.status import chain_status as statuses_of
from seal_nb.chain.status import status_lines
from seal_nb.errors import RunMismatch, SettingsError
from seal_nb.notebook_runner import default_notebooks_dir, format_value
from seal_nb.prompts import find_prompts, self_edit_prompt
from seal_nb.server.settings import option_type

SHIPPED = "shipped:"
# Of settings whose default is another value than the published one.
NOT_AS_PUBLISHED = {
    "grader": "; published: GPT-4.1, judge:gpt-4.1",
    "padding_in_loss": "; published: true",
    "shuffle": "; true: the published order of plain SQuAD",
    "cpt_lr": "; published for passage_only: 1e-4",
    "engine": "; published: vLLM",
}


def submit(argv: Sequence[str]) -> None:
    """Raises SealError where something is wrong with settings, site, or what SLURM says."""
    arguments = _parser().parse_args(argv)
    run_dir: Path = arguments.run_dir
    if arguments.executor == "local":
        settings = _settings(arguments)
        chain = CHAINS[arguments.chain](settings)
        if arguments.dry_run:
            return _show_commands(chain, run_dir)
        _check_inputs(settings, chain, Path.cwd())
        return run_here(chain, run_dir, title=f"Chain {chain.name}")
    cluster = _cluster(arguments)
    settings = _settings(arguments, n_workers=cluster.workers_a_node)
    if arguments.sft_processes is None:
        processes = cluster.training_processes(settings.sft_accumulation)
        settings = replace(settings, sft_processes=processes)
    chain = CHAINS[arguments.chain](settings)
    if arguments.dry_run:
        return print(dry_run(chain, run_dir.resolve(), cluster))
    _check_inputs(settings, chain, cluster.project)
    if submit_chain(chain, run_dir.resolve(), cluster, tell=lambda line: print(line, flush=True)):
        print(f"what becomes of it: seal-nb chain-status {run_dir}")
    else:
        print(f"nothing to submit: all stages in {run_dir} are done, or their jobs are on their way")


def chain_status(run_dir: Path) -> int:
    """Print the table; 1 if a stage went wrong."""
    record = read_record(run_dir)
    statuses = statuses_of(record, run_dir, look_up=slurm_jobs.look_up)
    for line in status_lines(record, statuses, run_dir):
        print(line)
    return int(any(status.is_bad for status in statuses))


def restart_server(folder: Path) -> None:
    """Print the number of its job and nothing else: a job's script reads it."""
    project = Path.cwd()
    print(slurm_again.restart_server(folder, project=project, tell=lambda line: print(line, file=sys.stderr)))


def run_here(chain: Chain, run_dir: Path, *, title: str) -> None:
    """The chain on this machine, then one page of its plots. Raises: ChainFailed, ChainBusy, RunMismatch."""
    from seal_nb.chain.index import write_index

    # A SLURM that is there and does not answer is an error: its jobs may be at work in this folder.
    if shutil.which("scontrol") and (jobs := jobs_on_their_way(chain, run_dir)):
        numbers = ", ".join(jobs.values())
        raise RunMismatch(f"{run_dir}: SLURM jobs {numbers} work here; wait for them or end them")
    try:
        run_chain(
            chain,
            run_dir,
            prepare=lambda: record_of(chain, executor="local", jobs={}).write(run_dir),
            notebooks=default_notebooks_dir(),
            tell=lambda line: print(line, flush=True),
            stop_server=_shut_down,
            at_work=_at_work,
        )
    except (KeyboardInterrupt, SystemExit):
        print("stopped; the same command again continues: nothing finished is lost", file=sys.stderr)
        raise
    index = write_index(run_dir, title=title)
    print(f"executed notebooks: {run_dir}/*/*.ipynb\nall plots on one page: {index}")


def _show_commands(chain: Chain, run_dir: Path) -> None:
    """One command a stage, in the order in which they would run here."""
    for stage in chain:
        kept = not stage.background and is_done(chain, stage, run_dir)
        print(f"# {stage.name}: {'finished before, kept' if kept else stage.title}")
        values = stage.values(run_dir).items()
        words = [word for name, value in values for word in ("-p", name, format_value(value))]
        print(shlex.join(["seal-nb", "run", stage.notebook, *words]))


def _shut_down(endpoint_file: Path) -> None:
    from seal_nb.server.client import TTTClient

    with TTTClient(str(endpoint_file), wait_s=10) as client:
        client.shutdown()


def _at_work(endpoint_file: Path) -> str:
    from seal_nb.server.status import at_work, look

    status = look(str(endpoint_file))
    return at_work(status) if status else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="seal-nb submit", description="Submit a chain of stages, or continue one: what is done is kept."
    )
    parser.add_argument("chain", choices=CHAINS, metavar="CHAIN", help=", ".join(CHAINS))
    parser.add_argument("--run-dir", type=Path, required=True, metavar="RUN")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm", help="default: slurm")
    parser.add_argument("--dry-run", action="store_true", help="show every script and command, submit nothing")
    parser.add_argument(
        "--project",
        type=Path,
        metavar="FOLDER",
        default=default_notebooks_dir().parent,
        help="where jobs start, with slurm/ and its site.sh in it (default: the checkout)",
    )
    parser.add_argument("--server-nodes", type=int, default=1, help="nodes of a TTT server (default: 1)")
    parser.add_argument("--sft-nodes", type=int, default=1, help="nodes of a ReST-EM training (default: 1)")
    parser.add_argument(
        "--idle-timeout-s", type=float, default=1800.0, help="a server ends after so long without a client"
    )
    parser.add_argument("--small", action="store_true", help="defaults of `seal-nb demo`: small model and counts")
    settings = parser.add_argument_group("settings of the experiment")
    hints = typing.get_type_hints(ExperimentSettings)
    for field in fields(ExperimentSettings):
        default = "" if field.default is MISSING else f"default: {_text(field.default) or 'empty'}"
        settings.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_reader(hints[field.name]),
            help=default + NOT_AS_PUBLISHED.get(field.name, ""),
        )
    return parser


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _reader(kind: Any) -> Any:
    """How a command line's text becomes a field's value; a list is written with commas."""
    if kind is bool:
        return option_type(bool)
    if typing.get_origin(kind) is tuple:
        item = int if typing.get_args(kind)[0] is int else str
        return lambda text: tuple(item(part.strip()) for part in text.split(",") if part.strip())
    return kind if kind in (int, float) else str


def _settings(arguments: argparse.Namespace, **machine: int) -> ExperimentSettings:
    """``machine``: settings that hold where the command line says nothing."""
    given = {
        field.name: value
        for field in fields(ExperimentSettings)
        if (value := getattr(arguments, field.name)) is not None
    }
    for name in ("model", "train_dataset", "val_dataset", "prompt_key"):
        if name in given and arguments.executor == "slurm":
            given[name] = _seen_from(arguments.project.resolve(), given[name])
    if arguments.small:
        return replace(DEMO, **{**machine, **given})
    given = {"n_workers": 1, "n_threads": 1, "sft_processes": 1, **machine, **given}
    if arguments.chain != "rest_em" and "val_dataset" in given:
        given.setdefault("train_dataset", given["val_dataset"])  # nothing is trained on it
    required = [field.name for field in fields(ExperimentSettings) if field.default is MISSING]
    if unsaid := [f"--{name.replace('_', '-')}" for name in required if name not in given]:
        raise SettingsError(f"{', '.join(unsaid)} not given; give them, or --small for the demo's")
    return ExperimentSettings(**given)


def _seen_from(project: Path, name: str) -> str:
    """A file or folder as jobs call it, who start in ``project``; anything else (a hub name) as it is."""
    path = Path(name).resolve()
    if not path.exists():
        return name
    return str(path.relative_to(project) if path.is_relative_to(project) else path)


def _cluster(arguments: argparse.Namespace) -> Cluster:
    project = arguments.project.resolve()
    site_file = project / "slurm/site.sh"
    return Cluster(
        project=project,
        site_file=site_file,
        site=slurm_jobs.read_site(site_file),
        server_nodes=arguments.server_nodes,
        sft_nodes=arguments.sft_nodes,
        idle_timeout_s=arguments.idle_timeout_s,
    )


def _check_inputs(settings: ExperimentSettings, chain: Chain, project: Path) -> None:
    """Now, not after hours in a queue. Raises: SettingsError."""
    in_file = project / settings.prompt_key
    prompt_key = str(in_file) if in_file.is_file() else settings.prompt_key
    find_prompts(prompt_key)
    if settings.continual_arm == "self_edits" and any(stage.notebook.startswith("06") for stage in chain):
        self_edit_prompt(prompt_key, title="", context="")  # one prompt for all edits: no family
    for name in ("train_dataset", "val_dataset"):
        value = getattr(settings, name)
        if not value.startswith(SHIPPED) and not (project / value).is_file():
            raise SettingsError(f"{name} is {value!r}, which is no file; give an item file, or shipped:train")

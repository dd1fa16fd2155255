"""The commands of ``seal-nb`` on chains of stages. The work is in ``chain``."""

import argparse
import shlex
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from seal_nb.errors import RunMismatch, SettingsError, visible
from seal_nb.settings import Parser
from seal_nb.storage import command_runs_folder, runs_folder

if TYPE_CHECKING:
    from seal_nb.chain.slurm import Cluster
    from seal_nb.chain.stages import Chain, ExperimentSettings


def tell(text: object, *, file: TextIO | None = None) -> None:
    """Print a line at once. All that the commands say goes through here: hidden characters of foreign text, such as the
    escape sequences of terminals, are visible."""
    print(visible(str(text)), file=file, flush=True)


def submit(arguments: argparse.Namespace) -> None:
    """``seal-nb submit``; ``arguments.rest`` is its command line."""
    from seal_nb.chain import slurm
    from seal_nb.chain.stages import as_options, make_chain

    given = _submit_parser().parse_args(arguments.rest)
    project, run_dir, cluster = Path.cwd(), command_runs_folder(given.run_dir, home=given.project), None
    if given.executor == "slurm":
        project, run_dir = given.project.resolve(), run_dir.resolve()
        cluster = slurm.Cluster(
            project=project, site=slurm.read_site(project / slurm.SITE_FILE),
            server_nodes=given.server_nodes, sft_nodes=given.sft_nodes, idle_timeout_s=given.idle_timeout_s,
        )  # fmt: skip
    settings = _settings(given, cluster)
    chain = make_chain(given.chain, settings)
    if given.dry_run and cluster:
        return tell(slurm.dry_run(chain, run_dir, cluster))
    if given.dry_run:
        for stage in chain:
            tell(f"# {stage.name}: {'finished before, kept' if stage.is_done(run_dir) else stage.title}")
            tell(shlex.join(["seal-nb", "run", stage.notebook, *as_options(stage.values(run_dir))]))
        return
    _check_inputs(settings, chain, project)
    if cluster is None:
        run_here(chain, run_dir, title=f"Chain {chain.name}")
    elif slurm.submit_chain(chain, run_dir, cluster, tell=tell):
        tell(f"to see its progress: seal-nb chain-status {shlex.quote(given.run_dir)}")
    else:
        tell(f"nothing to submit: all stages in {given.run_dir} are done, or their jobs wait or run")


def chain_status(arguments: argparse.Namespace) -> int:
    from seal_nb.chain import record, slurm

    run_dir = runs_folder(arguments.run_dir)
    chain = record.read_record(run_dir)
    statuses = record.chain_status(chain, run_dir, job_status=slurm.job_status)
    tell("\n".join(record.status_lines(chain, statuses, run_dir)))
    return int(any(state in record.BAD for state, _ in statuses.values()))


def restart_server(arguments: argparse.Namespace) -> None:
    from seal_nb.chain import slurm

    folder = runs_folder(arguments.folder)
    # A job's script reads the number: nothing else may go to standard output.
    tell(slurm.restart_server(folder, project=Path.cwd(), tell=lambda line: tell(line, file=sys.stderr)))


def demo(arguments: argparse.Namespace) -> None:
    from seal_nb.chain.stages import DEMO, make_chain

    run_here(make_chain("rest_em", DEMO), runs_folder(arguments.run_dir), title="Demo: self-edits on a small model")


def run_here(chain: "Chain", run_dir: Path, *, title: str) -> None:
    """Run the chain on this machine, then write its index page. Raises: StageFailed, RunMismatch."""
    from seal_nb.chain.index import write_index
    from seal_nb.chain.local import run_chain
    from seal_nb.chain.slurm import jobs_on_their_way
    from seal_nb.notebook_runner import default_notebooks_dir

    # Where SLURM exists but does not answer, this raises: its jobs may be at work in this folder.
    if shutil.which("scontrol") and (jobs := jobs_on_their_way(chain, run_dir)):
        numbers = ", ".join(jobs.values())
        raise RunMismatch(f"{run_dir}: SLURM jobs {numbers} work here; wait for them or end them")
    try:
        run_chain(chain, run_dir, notebooks=default_notebooks_dir(), tell=tell)
    except (KeyboardInterrupt, SystemExit):
        tell("stopped; the same command continues: nothing finished is lost", file=sys.stderr)
        raise
    index = write_index(run_dir, title=title)
    tell(f"executed notebooks: {run_dir}/*/*.ipynb\nmain figures, and each notebook as a page: {index}")


def _submit_parser() -> argparse.ArgumentParser:
    from seal_nb.chain.slurm import Cluster
    from seal_nb.chain.stages import CHAINS, ExperimentSettings, declaration
    from seal_nb.notebook_runner import default_notebooks_dir, format_value

    text = "Submit a chain of stages. The same command continues it: done stages are kept."
    parser = Parser(prog="seal-nb submit", description=text)
    parser.add_argument("chain", choices=CHAINS, metavar="CHAIN", help=", ".join(CHAINS))
    parser.add_argument("--run-dir", required=True, metavar="RUN", help="folder for results, such as runs/qwen")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="show every script and command, submit nothing")
    parser.add_argument(
        "--project", type=Path, metavar="FOLDER", default=default_notebooks_dir().parent,
        help="where jobs start; has slurm/site.sh (default: the checkout)",
    )  # fmt: skip
    for one in [one for one in fields(Cluster) if "text" in one.metadata]:
        text = f"{one.metadata['text']} (default: %(default)s)"
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=one.type, default=one.default, help=text)
    parser.add_argument("--small", action="store_true", help="settings of `seal-nb demo`: small model, small counts")
    text = "lists are written with commas; numbers in brackets: the notebooks that take the setting"
    group = parser.add_argument_group("settings of the experiment", text)
    for field in fields(ExperimentSettings):
        about = declaration(field)
        default = f"; default: {format_value(about.default)}" if about.default != "" else ""
        text = f"{about.help}{default}".replace("%", "%%")
        group.add_argument(f"--{field.name.replace('_', '-')}", metavar=about.type_name.upper(), help=text)
    return parser


def _settings(given: argparse.Namespace, cluster: "Cluster | None" = None) -> "ExperimentSettings":
    """Settings of the command line. A cluster decides how many processes serve and train unless it does."""
    from seal_nb.chain.stages import DEMO, ExperimentSettings, declaration
    from seal_nb.notebook_runner import parse_value

    values: dict[str, Any] = {}
    for field in fields(ExperimentSettings):
        if (text := getattr(given, field.name)) is not None:
            value = parse_value(text, declaration(field))
            values[field.name] = tuple(value) if isinstance(value, list) else value
    if cluster:
        places = {"model", "train_dataset", "val_dataset", "prompt_key"} & set(values)
        values |= {name: _seen_from(cluster.project, values[name]) for name in places}
        values.setdefault("n_workers", cluster.gpus_a_node or 1)
    if given.chain != "rest_em" and not given.small:
        values.setdefault("train_dataset", values.get("val_dataset"))  # nothing is trained on it
    missing = [name for name in ("model", "train_dataset", "val_dataset") if not values.get(name)]
    if missing and not given.small:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise SettingsError(f"{options} not given; give them, or --small for those of the demo")
    settings = replace(DEMO, **values) if given.small else ExperimentSettings(**values)
    if cluster and given.sft_processes is None:
        return replace(settings, sft_processes=cluster.training_processes(settings.sft_accumulation))
    return settings


def _seen_from(project: Path, name: str) -> str:
    """A file or folder as jobs that start in ``project`` see it; any other name unchanged."""
    path = Path(name).resolve()
    if not path.exists():
        return name
    return str(path.relative_to(project) if path.is_relative_to(project) else path)


def _check_inputs(settings: "ExperimentSettings", chain: "Chain", project: Path) -> None:
    """Find mistakes before the jobs wait in a queue for hours. Raises: SettingsError."""
    from seal_nb.prompts import find_prompts, self_edit_prompt

    if settings.prompt_key:
        in_file = project / settings.prompt_key
        prompt_key = str(in_file) if in_file.is_file() else settings.prompt_key
        find_prompts(prompt_key)
        if settings.continual_arm == "self_edits" and any(stage.notebook.startswith("06") for stage in chain):
            self_edit_prompt(prompt_key, title="", context="")  # continual edits take one prompt, not a family
    for name in ("train_dataset", "val_dataset"):
        value = getattr(settings, name)
        if not value.startswith("shipped:") and not (project / runs_folder(value)).is_file():
            raise SettingsError(f"{name} is {value!r}, which is no file; give an item file, or shipped:train")

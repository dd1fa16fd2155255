"""The console command ``seal-nb``.

Heavy modules are imported inside the commands that use them, so that ``seal-nb --help`` is quick."""

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tomllib
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from seal_nb.errors import RunMismatch, SealError, SettingsError, redacted, visible
from seal_nb.settings import Parser
from seal_nb.storage import command_runs_folder, data_file, runs_folder

if TYPE_CHECKING:
    from seal_nb.chain.slurm import Cluster
    from seal_nb.chain.stages import Chain, ExperimentSettings


def tell(text: object, *, file: TextIO | None = None) -> None:
    """Print a line at once. All that the commands say goes through here: hidden characters of foreign text, such as the
    escape sequences of terminals, are visible."""
    print(visible(str(text)), file=file, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: its exit code. The message of a SealError goes to standard error."""
    words = sys.argv[1:] if argv is None else [*argv]
    parser = _parser(*words[:1])
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.command is not _serve:
        parser.error(visible(f"unrecognized arguments: {' '.join(rest)}"))
    arguments.rest = rest
    try:
        if arguments.command not in (_run, _submit):  # they know their project later
            _resolve_paths(arguments)
        return int(arguments.command(arguments) or 0)
    except KeyboardInterrupt:
        tell("seal-nb: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has gone (`| head`). Python's own flush at the exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SealError as error:
        tell(f"seal-nb: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:  # noqa: BLE001 - a fault of ours, or of a library: Python's own report, without secrets
        sys.stderr.write(visible(redacted(traceback.format_exc())))
        return 1


def _parser(wanted: str = "") -> argparse.ArgumentParser:
    """The parser of ``data/commands.toml``. The settings of `submit`, which are in modules that take a second to
    import, are only added if it is the ``wanted`` command."""
    parser = Parser(prog="seal-nb", description="Knowledge incorporation by self-edits (SEAL)")
    groups: dict[str, Any] = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    types = {"path": Path, "int": int, "float": float}
    for name, about in tomllib.loads(data_file("commands.toml").read_text()).items():
        arguments, (group, _, last) = about.pop("arguments", {}), name.rpartition(" ")
        about.setdefault("description", about["help"][0].upper() + about["help"][1:])
        command = groups[group].add_parser(last, **about)
        if run := globals().get("_" + re.sub("[- ]", "_", name)):
            command.set_defaults(command=run)
        else:
            groups[name] = command.add_subparsers(required=True, metavar="WHAT")
        for argument, options in arguments.items():
            if "type" in options:
                options["type"] = types[options["type"]]
            if isinstance(options.get("metavar"), list):
                options["metavar"] = tuple(options["metavar"])
            command.add_argument(argument, **options)
        if name == wanted == "submit":
            _add_settings(command)
    return parser


def _resolve_paths(arguments: argparse.Namespace, **home: Path) -> None:
    """Paths in ``runs`` become the project's, as in a notebook. Raises: SettingsError for an address."""
    command_runs_folder(**home)
    for name, value in list(vars(arguments).items()):
        if isinstance(value, Path):
            setattr(arguments, name, runs_folder(value))
        elif isinstance(value, list):
            setattr(arguments, name, [runs_folder(one) if isinstance(one, Path) else one for one in value])


def _run(arguments: argparse.Namespace) -> None:
    from seal_nb import notebook_runner as runner
    from seal_nb.chain.local import marked_when_done
    from seal_nb.processes import end_with_parent
    from seal_nb.storage import read_text

    if arguments.parent_pid is not None:
        end_with_parent(arguments.parent_pid)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # its warnings are said in other words
    warnings.filterwarnings("ignore", "Cell is missing an id")  # of older notebooks, which run
    # The kernel "python3" must be this environment's, not one in the user's home folder.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = runner.find_notebook(arguments.stage, arguments.notebooks)
    _resolve_paths(arguments, home=notebook.parent)
    own = notebook.resolve().parent != (arguments.notebooks or runner.default_notebooks_dir()).resolve()
    declared = runner.declared_parameters(notebook, own=own)
    if arguments.parameters:
        for one in declared.values():
            tell(f"{one.name}: {one.type_name or 'any'} = {one.default!r}" + (f"\n    {one.help}" if one.help else ""))
        return
    texts = [(read_text(path), f"-f {path}") for path in arguments.files] + [(text, "-y") for text in arguments.yaml]
    pairs = [pair for one in texts for pair in runner.read_parameters(*one)]
    values: dict[str, Any] = {}
    for given, option in ((pairs, "-f"), (arguments.pairs, "-p"), (arguments.raw, "-r")):
        values |= runner.parse_parameters(given, declared, own=own, option=option)
    executed = runner.executed_path(notebook, values, declared, arguments.output)
    kernel = runner.kernel_of(notebook, arguments.kernel)
    output_dir = str(values.get("output_dir", ""))
    with marked_when_done(arguments.chain, output_dir) if arguments.chain else contextlib.nullcontext():
        runner.run_notebook(notebook, values, executed, stream=sys.stdout, kernel=kernel)
    if summary := runner.summary_of(executed):
        tell(summary)
    tell(f"executed notebook: {executed}")


def _serve(arguments: argparse.Namespace) -> int:
    from seal_nb.server.main import main as serve

    own: dict[str, Any] = {"endpoint": "tcp://127.0.0.1:5555", "run_dir": runs_folder("runs/server")}
    return serve(arguments.rest, prog="seal-nb serve", **own)


def _status(arguments: argparse.Namespace) -> None:
    from seal_nb.server.client import TTTClient, status_text

    with TTTClient(arguments.endpoint, wait_s=arguments.wait_s) as client:
        status = client.status()
    if arguments.json or not sys.stdout.isatty():
        tell(status.model_dump_json(indent=2))
        return
    tell(status_text(status))


def _summarize(arguments: argparse.Namespace) -> None:
    from seal_nb.results.collect import read_run

    summary = read_run(arguments.run).summary()
    if arguments.json:
        tell(json.dumps(summary, indent=2))
        return
    tell(f"{summary['file']}: {summary['kind']}, {summary['n_passages']} passages")
    for name, value in summary["overall"].items():
        tell(f"  {name}: {'not in this file' if value is None else value}")
    if summary["intervals"]:
        tell(f"  {summary['intervals']['gain']['sentence']}")
    for line in [*summary["disagreements"], *summary["notes"]]:
        tell(f"note: {line}", file=sys.stderr)


def _grade(arguments: argparse.Namespace) -> None:
    from seal_nb.results.regrade import grade_file

    chosen = {name: getattr(arguments, name) for name in ("grader", "dataset", "only_ungraded")}
    tell("\n".join(grade_file(arguments.answers, arguments.out, **chosen).lines()))


def _rerun(arguments: argparse.Namespace) -> int:
    from seal_nb.experiments.single_passage import rerun

    own = {"model": arguments.model, "deterministic": arguments.deterministic}
    is_same, lines = rerun(arguments.run, arguments.item, endpoint=arguments.endpoint, **own)
    tell("\n".join(lines))
    return 0 if is_same else 1


def _runs_list(arguments: argparse.Namespace) -> None:
    from seal_nb.results.collect import collect
    from seal_nb.views.tables import as_text

    tell(as_text(collect(arguments.folder).overview()))


def _runs_pool(arguments: argparse.Namespace) -> None:
    from seal_nb.results.continual import pool_summaries

    tell(pool_summaries(arguments.summaries, arguments.out))


def _runs_compare(arguments: argparse.Namespace) -> None:
    from seal_nb.results.collect import read_run
    from seal_nb.results.run import difference_sentence

    tell(difference_sentence(read_run(arguments.first), read_run(arguments.second)))


def _runs_diff(arguments: argparse.Namespace) -> None:
    from seal_nb.results.run import settings_difference
    from seal_nb.views.tables import as_text

    found = settings_difference(arguments.first, arguments.second)
    tell(as_text(found) if len(found) else "no setting, seed or version differs")


def _merge(arguments: argparse.Namespace) -> None:
    from seal_nb.peft_files import merge_stack

    tell(f"model folder: {merge_stack(arguments.model, arguments.adapters, arguments.out)}")


def _data(arguments: argparse.Namespace) -> None:
    from seal_nb.passages import REVISION, fetch_squad

    revision = arguments.revision or REVISION
    tell(f"item file: {fetch_squad(arguments.split, arguments.out, revision=revision)}")


def _submit(arguments: argparse.Namespace) -> None:
    from seal_nb.chain import slurm
    from seal_nb.chain.stages import as_options, make_chain
    from seal_nb.notebook_runner import default_notebooks_dir

    home = arguments.project or default_notebooks_dir().parent
    project, run_dir, cluster = Path.cwd(), command_runs_folder(arguments.run_dir, home=home), None
    if arguments.executor == "slurm":
        project, run_dir = home.resolve(), run_dir.resolve()
        site = slurm.read_site(project / slurm.SITE_FILE)
        cluster = slurm.Cluster.from_parameters(vars(arguments) | {"project": project}, site=site)
    settings = _experiment_settings(arguments, cluster)
    chain = make_chain(arguments.chain, settings)
    if arguments.dry_run and cluster:
        return tell(slurm.dry_run(chain, run_dir, cluster))
    if arguments.dry_run:
        for stage in chain:
            tell(f"# {stage.name}: {'finished before, kept' if stage.is_done(run_dir) else stage.title}")
            tell(shlex.join(["seal-nb", "run", stage.notebook, *as_options(stage.values(run_dir))]))
        return
    _check_inputs(settings, chain, project)
    if cluster is None:
        _run_here(chain, run_dir, title=f"Chain {chain.name}")
    elif slurm.submit_chain(chain, run_dir, cluster, tell=tell):
        tell(f"to see its progress: seal-nb chain-status {shlex.quote(arguments.run_dir)}")
    else:
        tell(f"nothing to submit: all stages in {arguments.run_dir} are done, or their jobs wait or run")


def _chain_status(arguments: argparse.Namespace) -> int:
    from seal_nb.chain import local, slurm

    run_dir = runs_folder(arguments.run_dir)
    chain = local.read_record(run_dir)
    statuses = local.chain_status(chain, run_dir, job_status=slurm.job_status)
    tell("\n".join(local.status_lines(chain, statuses, run_dir)))
    return int(any(state in local.BAD for state, _ in statuses.values()))


def _restart_server(arguments: argparse.Namespace) -> None:
    from seal_nb.chain import slurm

    folder = runs_folder(arguments.folder)
    # A job's script reads the number: nothing else may go to standard output.
    tell(slurm.restart_server(folder, project=Path.cwd(), tell=lambda line: tell(line, file=sys.stderr)))


def _demo(arguments: argparse.Namespace) -> None:
    from seal_nb.chain.stages import DEMO, make_chain

    _run_here(make_chain("rest_em", DEMO), runs_folder(arguments.run_dir), title="Demo: self-edits on a small model")


def _run_here(chain: "Chain", run_dir: Path, *, title: str) -> None:
    """Run the chain on this machine, then write its index page. Raises: StageFailed, RunMismatch."""
    from seal_nb.chain.local import run_chain, write_index
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


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The options of `submit` that are settings of the cluster or of the experiment."""
    from seal_nb.chain.slurm import Cluster
    from seal_nb.chain.stages import ExperimentSettings, declaration
    from seal_nb.notebook_runner import format_value

    for one in [one for one in fields(Cluster) if "text" in one.metadata]:
        text = f"{one.metadata['text']} (default: %(default)s)"
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=one.type, default=one.default, help=text)
    text = "lists are written with commas; numbers in brackets: the notebooks that take the setting"
    group = parser.add_argument_group("settings of the experiment", text)
    for field in fields(ExperimentSettings):
        about = declaration(field)
        default = f"; default: {format_value(about.default)}" if about.default != "" else ""
        text = f"{about.help}{default}".replace("%", "%%")
        group.add_argument(f"--{field.name.replace('_', '-')}", metavar=about.type_name.upper(), help=text)


def _experiment_settings(given: argparse.Namespace, cluster: "Cluster | None" = None) -> "ExperimentSettings":
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


if __name__ == "__main__":
    sys.exit(main())

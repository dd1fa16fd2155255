"""The console command ``seal-nb``: the parsers, and all commands but those on chains (``cli_chains``).

Heavy modules are imported inside the commands that use them, so that ``seal-nb --help`` is quick.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seal_nb import cli_chains
from seal_nb.cli_chains import tell
from seal_nb.errors import SealError, redacted, visible
from seal_nb.settings import Parser
from seal_nb.storage import command_runs_folder, runs_folder

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: its exit code. The message of a SealError goes to standard error."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in (_serve, cli_chains.submit):
        parser.error(visible(f"unrecognized arguments: {' '.join(rest)}"))
    arguments.rest = rest
    try:
        if arguments.command not in (_run, cli_chains.submit):  # they know their project later
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="seal-nb", description="Knowledge incorporation by self-edits (SEAL)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _command(commands, "run", _run, "run a notebook without JupyterLab (papermill)")
    run.add_argument("stage", metavar="NOTEBOOK", help="how a stage's name begins (03_query_server, 03, 3), or x.ipynb")
    pairs: dict[str, Any] = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    run.add_argument("-p", dest="pairs", **pairs, help="set a parameter; may be repeated")
    run.add_argument("-r", dest="raw", **pairs, help="set a parameter to this text, without a look at its type")
    run.add_argument(
        "-f", dest="files", action="append", type=Path, default=[], metavar="FILE", help="parameters: YAML or JSON"
    )
    run.add_argument("-y", dest="yaml", action="append", default=[], metavar="TEXT", help="parameters: YAML or JSON")
    run.add_argument("-k", dest="kernel", default="", metavar="KERNEL", help="default: python3, or the notebook's own")
    run.add_argument("--output", type=Path, metavar="EXECUTED.ipynb", help="executed copy (default: in output_dir)")
    run.add_argument("--notebooks", type=Path, metavar="FOLDER", help="default: notebooks/ of the checkout")
    run.add_argument("--parameters", action="store_true", help="list the notebook's parameters and run nothing")
    run.add_argument("--chain", type=Path, metavar="RUN", help="mark the stage as done in this run folder at the end")
    run.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    # serve and submit read the rest of the command line: their options are declared with their settings.
    _command(commands, "serve", _serve, "start a TTT server: a front end and its workers", add_help=False)
    status = _command(commands, "status", _status, "show what a TTT server is doing")
    status.add_argument("--endpoint", default=DEFAULT_ENDPOINT, help="address or endpoint file (default: %(default)s)")
    status.add_argument("--json", action="store_true", help="print one JSON object; without a terminal always")
    status.add_argument("--wait-s", type=float, default=5.0, help="seconds to wait (default: %(default)s)")
    _command(commands, "submit", cli_chains.submit, "run a chain of stages on a SLURM cluster, or here", add_help=False)
    chain = _command(commands, "chain-status", cli_chains.chain_status, "show a chain's stages, and why one failed")
    chain.add_argument("run_dir", metavar="RUN", help="the run folder of `seal-nb submit` or `seal-nb demo`")
    again = _command(commands, "restart-server", cli_chains.restart_server, "restart a chain's server that was idle")
    again.add_argument("folder", metavar="RUN/SERVER", help="the server's folder in the run folder")
    demo = _command(commands, "demo", cli_chains.demo, "run notebooks 01 to 06 and 08 on the small model")
    demo.add_argument("--run-dir", default="runs/demo", metavar="RUN", help="folder for results (default: %(default)s)")
    _add_file_commands(commands)
    return parser


def _add_file_commands(commands: Any) -> None:
    summarize = _command(commands, "summarize", _summarize, "compute a run file's statistics from its verdicts")
    summarize.add_argument("run", type=Path, metavar="RUN.json", help="run_*, cpt_run_* or summary_*.json, also .gz")
    summarize.add_argument("--json", action="store_true", help="print one JSON object")

    grade = _command(commands, "grade", _grade, "grade answers, or grade a run file again without training")
    grade.add_argument("answers", type=Path, metavar="IN", help="JSONL of question, gold, answer; or a run file")
    grade.add_argument("--out", type=Path, required=True, metavar="OUT", help="file to write")
    text = "local, exact, f1, recall, or judge:MODEL?base_url=URL (default: %(default)s)"
    grade.add_argument("--grader", default="local", help=text)
    grade.add_argument("--only-ungraded", action="store_true", help="keep the verdicts that the file has")
    grade.add_argument("--dataset", default="", help="item file with a CPT run's questions")

    rerun = _command(commands, "rerun", _rerun, "train one adapter of a run again and compare its answers")
    rerun.add_argument("run", type=Path, metavar="RUN.json", help="a run_*.json of 03_query_server")
    rerun.add_argument("--item", required=True, metavar="PASSAGE.SELF_EDIT.REPEAT", help="such as 0.0.0")
    rerun.add_argument("--endpoint", default="", help="of a TTT server (default: start one)")
    rerun.add_argument("--model", default="embedded", help="of a server started here (default: %(default)s)")
    rerun.add_argument("--deterministic", action="store_true", help="if the run used it (server started here)")

    runs = commands.add_parser("runs", help="list runs, compare two, show how two differ, pool continual runs")
    what = runs.add_subparsers(required=True, metavar="WHAT")
    listed = _command(what, "list", _runs_list, "list every result file below a folder")
    listed.add_argument("folder", nargs="?", default="runs", help="default: %(default)s")
    pool = _command(what, "pool", _runs_pool, "write the continual summaries of several seeds as one, as published")
    pool.add_argument("summaries", type=Path, nargs="+", metavar="SUMMARY.json")
    pool.add_argument("--out", type=Path, required=True, metavar="SUMMARY.json", help="file to write")
    compare = _command(what, "compare", _runs_compare, "the paired difference, second run minus first, in words")
    diff = _command(what, "diff", _runs_diff, "settings, seeds and versions that differ")
    for two in (compare, diff):
        two.add_argument("first", type=Path, metavar="FIRST.json")
        two.add_argument("second", type=Path, metavar="SECOND.json")

    merge = _command(commands, "merge", _merge, "merge adapters into a model and write it as a model folder")
    merge.add_argument("model", metavar="MODEL", help="model folder, hub name, or embedded")
    merge.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="folders, in the order of training")
    merge.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")

    data = _command(commands, "data", _data, "fetch SQuAD and write it as an item file")
    data.add_argument("name", choices=["squad"])
    text = "train writes squad_train.json, validation writes squad_val.json (default: %(default)s)"
    data.add_argument("--split", choices=["train", "validation"], default="train", help=text)
    data.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder")
    data.add_argument("--revision", metavar="COMMIT", help="commit, branch or tag (default: that of 2024)")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str, **options: Any
) -> argparse.ArgumentParser:
    description = text[0].upper() + text[1:]
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description, **options)
    parser.set_defaults(command=run)
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
    from seal_nb.chain.record import marked_when_done
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

    return serve(arguments.rest, prog="seal-nb serve", endpoint=DEFAULT_ENDPOINT, run_dir=runs_folder("runs/server"))


def _status(arguments: argparse.Namespace) -> None:
    from seal_nb.server.client import TTTClient
    from seal_nb.server.launch import status_rows

    with TTTClient(arguments.endpoint, wait_s=arguments.wait_s) as client:
        status = client.status()
    if arguments.json or not sys.stdout.isatty():
        tell(status.model_dump_json(indent=2))
        return
    for name, text in status_rows(status):
        tell(f"{name}: {text}")


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
    from seal_nb.experiments.rerun import Item, rerun_in

    item = Item.parse(arguments.item)
    own = {"model": arguments.model, "deterministic": arguments.deterministic}
    is_same, lines = rerun_in(arguments.run, item, endpoint=arguments.endpoint, **own)
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


if __name__ == "__main__":
    sys.exit(main())

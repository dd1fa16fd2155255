"""The console command ``seal-nb``: parsers, and the commands around notebooks and servers.

Heavy modules are imported inside the commands that use them, so that ``seal-nb --help`` is quick. A SealError becomes
one message on standard error and exit code 2, a failed stage exit code 1.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from seal_nb.commands import results, submit
from seal_nb.errors import SealError

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in (_serve, submit.submit):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return int(arguments.command(arguments) or 0)
    except KeyboardInterrupt:
        print("seal-nb: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has gone (`| head`). Python's own flush at the exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SealError as error:
        from seal_nb.chain.local import ChainFailed
        from seal_nb.notebook_runner import StageFailed, StageInterrupted

        print(f"seal-nb: {error}", file=sys.stderr)
        if isinstance(error, StageInterrupted):
            return 143  # the exit code that a shell gives after SIGTERM
        return 1 if isinstance(error, StageFailed | ChainFailed) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seal-nb", description="Knowledge incorporation by self-edits (SEAL)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a notebook without JupyterLab (papermill)")
    run.add_argument("stage", metavar="NOTEBOOK", help="its name, or how the name begins: 03_query_server, 03, 3")
    run.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs",
        help="set a parameter; may be repeated",
    )  # fmt: skip
    run.add_argument(
        "--output", type=Path, metavar="EXECUTED.ipynb", help="default: the notebook's name in its output_dir"
    )
    run.add_argument("--notebooks", type=Path, metavar="FOLDER", help="default: notebooks/ of the checkout")
    run.add_argument("--parameters", action="store_true", help="list the notebook's parameters and run nothing")
    run.add_argument("--chain", type=Path, metavar="RUN", help="mark the stage as done in this run folder at the end")
    run.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    run.set_defaults(command=_run)
    # serve and submit read the rest of the command line: their options are declared with their settings.
    serve = commands.add_parser("serve", help="start a TTT server: a front end and its workers", add_help=False)
    serve.set_defaults(command=_serve)
    status = commands.add_parser("status", help="show what a TTT server is doing")
    status.add_argument(
        "--endpoint", default=DEFAULT_ENDPOINT, help="tcp://HOST:PORT or an endpoint file (default: %(default)s)"
    )
    status.add_argument("--json", action="store_true", help="print one JSON object, as always without a terminal")
    status.add_argument(
        "--wait-s", type=float, default=5.0, help="seconds to wait for the server (default: %(default)s)"
    )
    status.set_defaults(command=_status)
    submit.add(commands)
    results.add(commands)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from seal_nb import notebook_runner as runner
    from seal_nb.chain.record import marked_when_done
    from seal_nb.processes import end_with_parent

    if arguments.parent_pid is not None:
        end_with_parent(arguments.parent_pid)
    # The kernel "python3" must be this environment's, not one in the user's home folder.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = runner.find_notebook(arguments.stage, arguments.notebooks)
    declared = runner.declared_parameters(notebook)
    if arguments.parameters:
        for one in declared.values():
            print(f"{one.name}: {one.type_name} = {one.default!r}" + (f"\n    {one.help}" if one.help else ""))
        return
    values = runner.parse_parameters(arguments.pairs, declared)
    executed = arguments.output or runner.executed_path(notebook, values, declared)
    write, progress_bar = runner.for_stream(sys.stdout)
    with marked_when_done(arguments.chain, str(values.get("output_dir", ""))):
        runner.run_notebook(notebook, values, executed, write=write, progress_bar=progress_bar)
    if glance := runner.glance_of(executed):
        print(glance)
    print(f"executed notebook: {executed}")


def _serve(arguments: argparse.Namespace) -> int:
    from seal_nb.server.main import main as serve
    from seal_nb.storage import runs_folder

    return serve(arguments.rest, prog="seal-nb serve", endpoint=DEFAULT_ENDPOINT, run_dir=runs_folder("runs/server"))


def _status(arguments: argparse.Namespace) -> None:
    from seal_nb.server.client import TTTClient
    from seal_nb.server.status import status_rows

    with TTTClient(arguments.endpoint, wait_s=arguments.wait_s) as client:
        status = client.status()
    if arguments.json or not sys.stdout.isatty():
        print(status.model_dump_json(indent=2))
        return
    for name, text in status_rows(status):
        print(f"{name}: {text}")


if __name__ == "__main__":
    sys.exit(main())

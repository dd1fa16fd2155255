"""The console command ``seal-nb``: thin, and the only module that prints.

Heavy modules are imported inside the commands that use them, so that ``seal-nb --help`` answers at once.
A SealError becomes one message on standard error and exit code 2, a failed stage exit code 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seal_nb.commands import results as files
from seal_nb.errors import SealError

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in (_serve, _submit):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return int(arguments.command(arguments) or 0)
    except KeyboardInterrupt:
        print("seal-nb: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SealError as error:
        from seal_nb.chain.local import ChainFailed
        from seal_nb.notebook_runner import StageFailed, StageInterrupted

        print(f"seal-nb: {error}", file=sys.stderr)
        if isinstance(error, StageInterrupted):
            return 143  # as a shell says of what SIGTERM ended
        return 1 if isinstance(error, StageFailed | ChainFailed) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seal-nb", description="Knowledge incorporation by self-edits (SEAL)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_run, _add_serve, _add_status, _add_submit, _add_demo, files.add):
        add(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="run a stage's notebook headless (papermill)")
    run.add_argument(
        "stage", metavar="STAGE", help="a notebook's name, its beginning or number: 03_query_server, 03, 3"
    )
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs",
                     help="set a parameter; may be repeated")  # fmt: skip
    run.add_argument("--output", type=Path, metavar="EXECUTED.ipynb", help="default: in the run folder, output_dir")
    run.add_argument("--notebooks", type=Path, metavar="DIR", help="default: notebooks/ of the checkout")
    run.add_argument("--parameters", action="store_true", help="list the stage's parameters and end")
    run.add_argument("--chain", type=Path, metavar="RUN", help="afterwards mark the stage as done in this run")
    run.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    from seal_nb import notebook_runner as runner
    from seal_nb.chain.record import marked_when_done
    from seal_nb.notebook_runner import for_stream
    from seal_nb.processes import end_with_parent

    if arguments.parent_pid is not None:
        end_with_parent(arguments.parent_pid)
    # The kernel "python3" is this environment's, whatever the user has in their home folder.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = runner.find_notebook(arguments.stage, arguments.notebooks or runner.default_notebooks_dir())
    declared = runner.declared_parameters(notebook)
    if arguments.parameters:
        return _list_parameters(declared.values())
    values = runner.parse_parameters(arguments.pairs, declared)
    executed = arguments.output or runner.executed_path(notebook, values, declared)
    write, progress_bar = for_stream(sys.stdout)
    with marked_when_done(arguments.chain, str(values.get("output_dir", ""))):
        runner.run_notebook(notebook, values, executed, write=write, progress_bar=progress_bar)
    if glance := runner.glance_of(executed):
        print(glance)
    print(f"executed notebook: {executed}")


def _list_parameters(parameters: Any) -> None:
    for parameter in parameters:
        print(f"{parameter.name}: {parameter.type_name} = {parameter.default!r}")
        if parameter.help:
            print(f"    {parameter.help}")


def _add_serve(commands: Any) -> None:
    # Its options are the fields of ServeSettings, made where those are declared.
    commands.add_parser("serve", help="start a TTT server: a front end and its workers", add_help=False).set_defaults(
        command=_serve
    )


def _serve(arguments: argparse.Namespace) -> int:
    from seal_nb.server.main import main as serve

    return serve(["--endpoint", DEFAULT_ENDPOINT, *arguments.rest])


def _add_status(commands: Any) -> None:
    status = commands.add_parser("status", help="what a TTT server is doing")
    status.add_argument("--endpoint", default=DEFAULT_ENDPOINT, help="tcp://HOST:PORT or an endpoint file")
    status.add_argument("--json", action="store_true", help="one JSON object, as off a terminal anyway")
    status.add_argument("--wait-s", type=float, default=5.0, help="seconds to wait for it to appear")
    status.set_defaults(command=_status)


def _status(arguments: argparse.Namespace) -> None:
    from seal_nb.server.client import TTTClient
    from seal_nb.server.status import status_rows

    with TTTClient(arguments.endpoint, wait_s=arguments.wait_s) as client:
        status = client.status()
    if arguments.json or not sys.stdout.isatty():
        print(json.dumps(asdict(status), indent=2))
        return
    for name, text in status_rows(status):
        print(f"{name}: {text}")


def _add_submit(commands: Any) -> None:
    # Its options are the fields of ExperimentSettings, made where those are declared.
    commands.add_parser(
        "submit", help="run a chain of stages: on a SLURM cluster, or here", add_help=False
    ).set_defaults(command=_submit)
    status = commands.add_parser("chain-status", help="what a submitted chain has done, is doing, and why not")
    status.add_argument("run_dir", type=Path, metavar="RUN", help="the run folder of `submit`")
    status.set_defaults(command=_chain_status)
    again = commands.add_parser(
        "restart-server", help="start a chain's server again that ended for want of clients (SLURM)"
    )
    again.add_argument("folder", type=Path, metavar="RUN/SERVER", help="its folder in the run folder")
    again.set_defaults(command=_restart_server)


def _submit(arguments: argparse.Namespace) -> None:
    from seal_nb.commands.submit import submit

    submit(arguments.rest)


def _chain_status(arguments: argparse.Namespace) -> int:
    from seal_nb.commands.submit import chain_status

    return chain_status(arguments.run_dir)


def _restart_server(arguments: argparse.Namespace) -> None:
    from seal_nb.commands.submit import restart_server

    restart_server(arguments.folder)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="stages 1 to 5 on the small model and the shipped passages")
    demo.add_argument("--run-dir", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    demo.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from seal_nb.chain.stages import DEMO, rest_em_chain
    from seal_nb.commands.submit import run_here

    run_here(rest_em_chain(DEMO), arguments.run_dir, title="Demo: self-edits on a small model")


if __name__ == "__main__":
    sys.exit(main())

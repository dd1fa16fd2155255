"""Commands on run files: `summarize`, `grade`, `rerun`, `runs`, `merge`; and `data`, which fetches passages."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the commands to the parser of ``seal-nb``."""
    summarize = _command(commands, "summarize", _summarize, "compute a run file's statistics from its verdicts")
    summarize.add_argument(
        "run", type=Path, metavar="RUN.json", help="run_*.json, cpt_run_*.json or summary_*.json, also .gz"
    )
    summarize.add_argument("--json", action="store_true", help="print one JSON object")

    grade = _command(commands, "grade", _grade, "grade answers, or grade a run file again without training")
    grade.add_argument(
        "answers", type=Path, metavar="IN", help="lines of question, gold and answer (.jsonl), or a run file (.json)"
    )
    grade.add_argument("--out", type=Path, required=True, metavar="OUT", help="file to write")
    grade.add_argument(
        "--grader", default="local",
        help="local, exact, f1, recall, or judge:MODEL?base_url=URL (default: %(default)s)",
    )  # fmt: skip
    grade.add_argument("--only-ungraded", action="store_true", help="keep the verdicts that the file has")
    grade.add_argument("--dataset", default="", help="item file that a CPT run was asked about")

    rerun = _command(commands, "rerun", _rerun, "train one adapter of a run again and compare its answers")
    rerun.add_argument("run", type=Path, metavar="RUN.json", help="a run_*.json of 03_query_server")
    rerun.add_argument("--item", required=True, metavar="PASSAGE.SELF_EDIT.REPEAT", help="such as 0.0.0")
    rerun.add_argument("--endpoint", default="", help="of a TTT server (default: start one)")
    rerun.add_argument("--model", default="embedded", help="of a server started here (default: %(default)s)")
    rerun.add_argument(
        "--deterministic", action="store_true", help="of a server started here; use it if the run used it"
    )

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
    data.add_argument(
        "--split", choices=["train", "validation"], default="train",
        help="train writes squad_train.json, validation writes squad_val.json (default: %(default)s)",
    )  # fmt: skip
    data.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:])
    parser.set_defaults(command=run)
    return parser


def _summarize(arguments: argparse.Namespace) -> None:
    from seal_nb.results.collect import read_run

    summary = read_run(arguments.run).summary()
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return
    print(f"{summary['file']}: {summary['kind']}, {summary['n_passages']} passages")
    for name, value in summary["overall"].items():
        print(f"  {name}: {'not in this file' if value is None else value}")
    if summary["intervals"]:
        print(f"  {summary['intervals']['gain']['sentence']}")
    for line in [*summary["disagreements"], *summary["notes"]]:
        print(f"note: {line}", file=sys.stderr)


def _grade(arguments: argparse.Namespace) -> None:
    from seal_nb.grading.choose import make_grader
    from seal_nb.results.regrade import grade_file, is_run_file, regrade_file

    files, chosen = (arguments.answers, arguments.out), {"only_ungraded": arguments.only_ungraded}
    grader = make_grader(arguments.grader)
    if is_run_file(arguments.answers):
        lines = regrade_file(*files, grader=grader, **chosen, dataset=arguments.dataset).lines()
    else:
        lines = grade_file(*files, grader=grader, **chosen).lines()
    print("\n".join(lines))


def _rerun(arguments: argparse.Namespace) -> int:
    from seal_nb.experiments.rerun import Item, rerun_in

    item = Item.parse(arguments.item)
    own = {"model": arguments.model, "deterministic": arguments.deterministic}
    said = rerun_in(arguments.run, item, endpoint=arguments.endpoint, **own)
    print("\n".join(said))
    return 0 if len(said) == 1 else 1  # one line: every answer is the same


def _runs_list(arguments: argparse.Namespace) -> None:
    from seal_nb.results.collect import collect
    from seal_nb.views.tables import as_text

    print(as_text(collect(arguments.folder).overview()))


def _runs_pool(arguments: argparse.Namespace) -> None:
    from seal_nb.results.continual import pool_summaries

    print(pool_summaries(arguments.summaries, arguments.out))


def _runs_compare(arguments: argparse.Namespace) -> None:
    from seal_nb.results.collect import read_run
    from seal_nb.results.compare import difference_sentence

    print(difference_sentence(read_run(arguments.first), read_run(arguments.second)))


def _runs_diff(arguments: argparse.Namespace) -> None:
    from seal_nb.results.compare import settings_difference
    from seal_nb.views.tables import as_text

    found = settings_difference(arguments.first, arguments.second)
    print(as_text(found) if len(found) else "no setting, seed or version differs")


def _merge(arguments: argparse.Namespace) -> None:
    from seal_nb.errors import SettingsError
    from seal_nb.ttt.lora import merge_stack

    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"--out {out} exists and is not empty; give a new folder")
    print(f"model folder: {merge_stack(arguments.model, arguments.adapters, out)}")


def _data(arguments: argparse.Namespace) -> None:
    from seal_nb.passages import fetch_squad

    print(f"item file: {fetch_squad(arguments.split, arguments.out)}")

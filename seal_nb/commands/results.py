"""Commands on what a run has left: statistics, verdicts, one number again, two runs side by side, one model.

Also `data`, which fetches passages. Each only parses its options and prints what a module found out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """All of them, as subparsers."""
    for add_one in (_add_summarize, _add_grade, _add_rerun, _add_runs, _add_merge, _add_data):
        add_one(commands)


def _add_summarize(commands: Any) -> None:
    summarize = commands.add_parser("summarize", help="recompute a run file's statistics from its verdicts")
    summarize.add_argument("run", type=Path, metavar="RUN.json", help="run_*.json or cpt_run_*.json, also .gz")
    summarize.add_argument("--json", action="store_true", help="print one JSON object")
    summarize.set_defaults(command=_summarize)


def _summarize(arguments: argparse.Namespace) -> None:
    from seal_nb.results.summary import summarize

    summary = summarize(arguments.run)
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


def _add_grade(commands: Any) -> None:
    grade = commands.add_parser(
        "grade", help="grade answers, or grade a run again: other verdicts, statistics anew, no training"
    )
    grade.add_argument("answers", type=Path, metavar="IN",
                       help="rows of question, gold, answer (.jsonl), or a run file (.json)")  # fmt: skip
    grade.add_argument("--out", type=Path, required=True, metavar="OUT")
    grade.add_argument(
        "--grader", default="local", help="local (default), exact, f1, recall, or judge:MODEL?base_url=URL"
    )
    grade.add_argument("--only-ungraded", action="store_true", help="leave the verdicts that are there")
    grade.add_argument("--dataset", default="", help="the items that a CPT run was asked about")
    grade.set_defaults(command=_grade)


def _grade(arguments: argparse.Namespace) -> None:
    from seal_nb.grading.choose import make_grader
    from seal_nb.results.regrade import grade_file, is_run_file, regrade_file

    files, grader = (arguments.answers, arguments.out), make_grader(arguments.grader)
    chosen = {"grader": grader, "only_ungraded": arguments.only_ungraded}
    if is_run_file(arguments.answers):
        lines = regrade_file(*files, **chosen, dataset=arguments.dataset).lines()
    else:
        lines = grade_file(*files, **chosen).lines()
    for line in lines:
        print(line)


def _add_rerun(commands: Any) -> None:
    rerun = commands.add_parser("rerun", help="make one number of a run again, and compare it")
    rerun.add_argument("run", type=Path, metavar="RUN.json", help="a run_*.json of 03_query_server")
    rerun.add_argument("--item", required=True, metavar="PASSAGE.SELF_EDIT.REPEAT", help="such as 0.0.0")
    rerun.add_argument("--endpoint", default="", help="of a TTT server; empty: start one")
    rerun.add_argument("--model", default="embedded", help="of a server started here; default: embedded")
    rerun.add_argument("--deterministic", action="store_true", help="of a server started here, as the run was made")
    rerun.set_defaults(command=_rerun)


def _rerun(arguments: argparse.Namespace) -> int:
    from seal_nb.experiments.rerun import Item, rerun_in, rerun_lines

    item = Item.parse(arguments.item)
    own = {"model": arguments.model, "deterministic": arguments.deterministic}
    answers = rerun_in(arguments.run, item, endpoint=arguments.endpoint, **own)
    print("\n".join(rerun_lines(answers, item)))
    return 0 if all(one.is_same for one in answers) else 1


def _add_runs(commands: Any) -> None:
    runs = commands.add_parser("runs", help="list the runs of a folder, compare two, show how they differ")
    what = runs.add_subparsers(required=True, metavar="WHAT")
    listed = what.add_parser("list", help="every result file below a folder")
    listed.add_argument("folder", type=Path, nargs="?", default=Path("runs"))
    listed.set_defaults(command=_runs_list)
    pool = what.add_parser("pool", help="continual summaries of several seeds as one, as published")
    pool.add_argument("summaries", type=Path, nargs="+", metavar="SUMMARY.json")
    pool.add_argument("--out", type=Path, required=True, metavar="SUMMARY.json")
    pool.set_defaults(command=_runs_pool)
    for name, command, text in (
        ("compare", _runs_compare, "second run minus first, in plain words"),
        ("diff", _runs_diff, "settings, seeds and versions that differ"),
    ):
        two = what.add_parser(name, help=text)
        two.add_argument("first", type=Path)
        two.add_argument("second", type=Path)
        two.set_defaults(command=command)


def _runs_list(arguments: argparse.Namespace) -> None:
    from seal_nb.results.compare import catalog_rows
    from seal_nb.views.tables import Table

    columns = {"file": "", "kind": "", "arm": "", "passages": "", "accuracy": ".1%"}
    print(Table(rows=catalog_rows(arguments.folder), columns=columns))


def _runs_pool(arguments: argparse.Namespace) -> None:
    from seal_nb.results.compare import pool_summaries

    print(pool_summaries(arguments.summaries, arguments.out))


def _runs_compare(arguments: argparse.Namespace) -> None:
    from seal_nb.results.compare import compare_runs

    print(compare_runs(arguments.first, arguments.second))


def _runs_diff(arguments: argparse.Namespace) -> None:
    from seal_nb.results.compare import settings_difference
    from seal_nb.views.tables import Table

    rows = settings_difference(arguments.first, arguments.second)
    columns = {"setting": "", "first": "", "second": ""}
    print(Table(rows=rows, columns=columns) if rows else "no setting, seed or version differs")


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser("merge", help="write a model with adapters merged into it as a model folder")
    merge.add_argument("model", metavar="MODEL", help="folder, hub name or embedded")
    merge.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="in the order of training")
    merge.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    merge.set_defaults(command=_merge)


def _merge(arguments: argparse.Namespace) -> None:
    from seal_nb.errors import SettingsError
    from seal_nb.ttt.adapters import merge_stack

    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"--out {out} is there and not empty; give a new folder")
    print(f"model folder: {merge_stack(arguments.model, arguments.adapters, arguments.out)}")


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="fetch passages: squad")
    data.add_argument("name", choices=["squad"])
    data.add_argument("--split", choices=["train", "validation"], default="train")
    data.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER")
    data.set_defaults(command=_data)


def _data(arguments: argparse.Namespace) -> None:
    from seal_nb.passages import fetch_squad

    print(f"item file: {fetch_squad(arguments.split, arguments.out)}")

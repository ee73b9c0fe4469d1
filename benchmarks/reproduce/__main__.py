"""Command line: python -m benchmarks.reproduce {table,hours} (docs/reproduce.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.terminal import reader_may_leave, visible


def parser() -> argparse.ArgumentParser:
    """The options of both commands."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    what = "the paper's tables, with what the given runs reached; rows that no run has come with their command"
    table = commands.add_parser("table", help=what, description=what)
    table.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="run folders, or folders of them (default: runs/paper, if it is there)",
    )
    table.add_argument("--markdown", action="store_true", help="Markdown instead of text")
    what = "tokens, GPU hours (as plan.py fit estimates them) and command of every row, in Markdown"
    hours = commands.add_parser("hours", help=what, description=what)
    hours.add_argument("--gpu", default="h200", metavar="NAME", help="as for plan.py fit (default: %(default)s)")
    hours.add_argument("--results", type=Path, metavar="FOLDER", help="records of python -m benchmarks.gpu")
    page = hours.add_mutually_exclusive_group()
    page.add_argument("--write", action="store_true", help="write the marked parts of docs/reproduce.md anew instead")
    page.add_argument("--check", action="store_true", help="exit status 1 if they are not what --write would write")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 --check found a difference, 2 refused."""
    args = parser().parse_args(arguments)
    code = 0
    try:
        with reader_may_leave():
            code = _table(args) if args.command == "table" else _hours(args)
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 2
    return code


def _table(args: argparse.Namespace) -> int:
    from benchmarks.reproduce.published import RUNS  # these import torch; --help does not wait for it
    from benchmarks.reproduce.runs import found_runs
    from benchmarks.reproduce.table import report

    default = Path(RUNS)
    runs, unknown = found_runs(args.runs or ([default] if default.is_dir() else []))
    print(visible(report(runs, unknown, as_markdown=args.markdown)))
    return 0


def _hours(args: argparse.Namespace) -> int:
    from benchmarks.reproduce import hours
    from pretrain.planning.measured import RESULTS

    results = args.results or RESULTS
    if not results.is_dir():
        raise UserError(f"--results: there is no folder {results}")
    if not args.write and not args.check:
        print(hours.block(args.gpu, results), end="")
        return 0
    before = hours.PAGE.read_text(encoding="utf-8")
    after = hours.updated(before, results)
    if args.write:
        hours.PAGE.write_text(after, encoding="utf-8")
        return 0
    if after != before:
        print(f"{hours.NAME}: its tables are not what the records give: python -m benchmarks.reproduce hours --write")
    return int(after != before)


if __name__ == "__main__":
    sys.exit(main())

"""Command line of launch/status.py: one screen of a run, or a table of runs, also while they go on."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.arguments import Parser, a_path, above_zero
from common.errors import UserError
from common.strict_json import dumps
from common.terminal import columns_of, follows_escapes, visible
from pretrain.cli.refusals import exit_code_of
from pretrain.views.reading import RunView
from pretrain.views.status import runs_table, screen, summary

CLEAR = "\x1b[H\x1b[2J"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/status.py",
        description="Shows what a run is doing: state, step, time left, loss, throughput, balance of the experts, the "
        "last events, and what to do next. Several runs become a table. It only reads, so it may look at a run "
        "that goes on, also from another machine on the same file system.",
    )
    parser.add_argument("runs", nargs="+", type=a_path, metavar="RUN", help="run folders, e.g. runs/NAME or runs/*")
    parser.add_argument("--watch", action="store_true", help="show it again and again, until all runs have ended")
    parser.add_argument(
        "--every", type=above_zero(86400), default=5.0, metavar="SECONDS", help="of --watch (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON per run, for other programs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: look(args))


def look(args: argparse.Namespace) -> None:
    """Shows the runs once, or with --watch until all have ended or the user has seen enough. Raises UserError."""
    views = open_all(args.runs)
    show(views, as_json=args.json, clear=False)
    try:
        while args.watch and any(view.state.goes_on for view in views):
            time.sleep(args.every)
            views, gone = updated(views)
            show(views, as_json=args.json, clear=follows_escapes(sys.stdout))
            for error in gone:  # after the screen, which the next one clears
                print(passed_over(error), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print()


def open_all(paths: Sequence[Path]) -> list[RunView]:
    """Raises UserError if a single one is no run, or none of several is; of several the others are passed over."""
    if len(paths) == 1:
        return [RunView.open(paths[0])]
    views = []
    for path in paths:
        try:
            views.append(RunView.open(path))
        except UserError as error:
            print(passed_over(error), file=sys.stderr, flush=True)
    if not views:
        raise UserError("RUN: none of these is a run folder")
    return views


def updated(views: list[RunView]) -> tuple[list[RunView], list[UserError]]:
    """The runs as they are now, and why others are no more among them: one that somebody removes keeps nobody from the
    others. Raises UserError if none is left."""
    kept, gone = [], []
    for view in views:
        try:
            view.update()
            kept.append(view)
        except UserError as error:
            gone.append(error)
    if not kept:
        raise gone[0]
    return kept, gone


def passed_over(error: UserError) -> str:
    return visible(f"passed over: {str(error).removeprefix('RUN: ')}")


def show(views: list[RunView], *, as_json: bool, clear: bool) -> None:
    now = time.time()
    if as_json:
        text = "\n".join(dumps(summary(view)) for view in views)
    elif len(views) == 1:
        text = screen(views[0], width=min(120, shutil.get_terminal_size().columns), now=now)
    else:
        text = runs_table(views, now, width=columns_of(sys.stdout))
    print((CLEAR if clear and not as_json else "") + text, flush=True)

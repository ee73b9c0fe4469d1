"""Command line of launch/compare.py: what tells runs apart, or the curves of one, as text, picture and page."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from common.arguments import Parser, a_path
from common.errors import UserError
from common.files import replacing_all
from common.folders import making
from common.tables import counted
from common.terminal import columns_of
from pretrain.cli.refusals import exit_code_of
from pretrain.views.comparison import Run, open_runs
from pretrain.views.comparison_text import text
from pretrain.views.reading import RunView

PICTURE, PAGE = "comparison.png", "comparison.html"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/compare.py",
        description="Compares runs with the first one: the settings and versions that differ, losses at equal steps, "
        "tokens and training FLOPs, and the first step at which a value differs, by how much. Prints tables and writes "
        f"{PICTURE} and {PAGE}, which needs no network. Of a single run: its losses and curves. Runs may still go on.",
    )
    parser.add_argument("runs", nargs="+", type=a_path, metavar="RUN", help="run folders, e.g. runs/one runs/other")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="T",
        help="also name the first step that differs by more than this, relatively (default: 1e-5, rounding between "
        "layouts in a few steps)",
    )
    parser.add_argument(
        "--out",
        type=a_path,
        metavar="FOLDER",
        help="where both files go (default: FIRST_RUN/comparison/OTHER_RUNS, of a single run RUN/curves)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: compare(args))


def compare(args: argparse.Namespace) -> None:
    """Raises UserError and OSError."""
    if not args.tolerance >= 0:
        raise UserError(f"--tolerance: is {args.tolerance}; it must be 0 or more")
    runs = open_runs([RunView.open(path) for path in args.runs])
    for run in runs:
        if damaged := run.view.metrics.damaged:
            print(f"{run.label}: {counted(damaged, 'damaged line')} passed over", file=sys.stderr)
    print(text(runs, args.tolerance, width=columns_of(sys.stdout)), flush=True)
    from pretrain.checkpoint.folder import check_output_folder  # both here: the text need not wait for them
    from pretrain.views.comparison_page import drawn, page  # matplotlib

    out = args.out or default_folder(runs)
    check_output_folder(out.absolute(), "--out")
    png = drawn(runs)
    with making(out), replacing_all(out) as put:
        put(PICTURE, png)
        put(PAGE, page(runs, args.tolerance, png).encode())
    print(f"\n{out / PAGE}: the page; beside it {PICTURE}", flush=True)


def default_folder(runs: Sequence[Run]) -> Path:
    """In the first run, named after the others."""
    if len(runs) == 1:
        return runs[0].view.path / "curves"
    names = "-".join(re.sub(r"[^\w.=-]+", "-", run.label).strip("-.") for run in runs[1:])
    return runs[0].view.path / "comparison" / (names[:100] or "other")

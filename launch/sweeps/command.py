"""Command line of launch/sweep.py: trains every combination of configurations and values, here or on SLURM, and says
which is best."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Container, Sequence

from common.arguments import Parser, a_path, add_overrides, at_least
from common.errors import UserError
from common.files import write_file
from common.paths import REPOSITORY
from common.slurm import jobs_in_queue
from common.tables import counted
from common.terminal import columns_of, spare_stdout
from launch.slurm import job
from launch.sweeps.check import LocalCheck, Problems, problems_of
from launch.sweeps.equal_size import check_is_free, of_equal_size
from launch.sweeps.plan import combinations, configurations, varied
from launch.sweeps.queue import Queue
from launch.sweeps.record import Sweep
from launch.sweeps.training import launcher_of, train_all
from pretrain.cli.plan_models import WIDTHS
from pretrain.cli.refusals import exit_code_of
from pretrain.report.exit_codes import ExitCode
from pretrain.views.comparison import open_runs
from pretrain.views.comparison_text import notes
from pretrain.views.reading import State
from pretrain.views.sweep import Result, edges, ranked, seeds_text, table_csv, table_text
from pretrain.views.sweep_means import means_csv, means_latex, summarised

TABLE, LOSSES, CURVES = "sweep.csv", "losses.png", "curves.png"
SEEDS, LATEX = "seeds.csv", "seeds.tex"
MOST_CURVES = 10
"""Runs in the picture of curves, the best first: as many as have a colour."""
NOT_ALL = 1
"""Exit code: some runs failed or diverged, or go on in another process."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/sweep.py",
        description="Trains a run for every combination of the configurations and of the varied values, one after the "
        "other, and ranks them by validation loss. The same command again goes on: finished runs stay, the others "
        f"continue, and new values are added. Exit codes: 0 all finished, {NOT_ALL} some failed or diverged, or go on "
        f"in another process, 2 refused, 128 + its number stopped by a signal (130 Ctrl-C, 143 SIGTERM), "
        f"{int(ExitCode.STOPPED)} a run was sent one.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--sweep-dir", required=True, type=a_path, metavar="DIR", help="folder of the sweep; a run folder each in it"
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="configuration, repeatable")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="a key and its values, repeatable: --vary optimizer.learning_rate=1e-3,2e-3,4e-3",
    )
    add_overrides(parser, "override a key in every run, repeatable")
    parser.add_argument(
        "--equal-parameters",
        choices=WIDTHS.values(),
        metavar="WIDTH",
        help="give each run the width at which it has as many parameters in total as its configuration: "
        f"{', '.join(WIDTHS.values())}",
    )
    parser.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help='what starts launch/pretrain.py, e.g. "deepspeed --num_gpus 8" (default: one process)',
    )
    parser.add_argument(
        "--ranks",
        type=at_least(1),
        metavar="N",
        help="ranks that --launcher starts, for the checks",
    )
    parser.add_argument(
        "--submit",
        action="store_true",
        help="submit a SLURM job for each run instead; options of launch/slurm/submit.py for all of them follow --",
    )
    parser.add_argument("--at-once", type=at_least(1), metavar="N", help="with --submit: at most N jobs run at a time")
    parser.add_argument("--dry-run", action="store_true", help="check all runs, print their commands, start nothing")
    parser.add_argument("--table", action="store_true", help="only show what the runs of --sweep-dir came to so far")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="behind --: options of launch/slurm/submit.py")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, see the description above."""
    args = build_parser().parse_args(arguments)
    # A reader that leaves ends no training, and none before its first run either.
    spare = contextlib.nullcontext() if args.table or args.dry_run else spare_stdout()
    with spare:
        return exit_code_of(lambda: sweep(args))


def sweep(args: argparse.Namespace) -> int:
    """Returns the exit code. Raises UserError and OSError."""
    _check_options(args)
    folder = args.sweep_dir.absolute()
    if args.table:
        found = Sweep.load(folder)
        if found is None:
            raise UserError(f"--sweep-dir: {folder} holds no sweep; --table shows one that was begun")
        show(found)
        return 0
    configs, values = configurations(args.config), varied(args.vary, args.overrides)
    width = args.equal_parameters
    if width is not None:
        check_is_free(width, values, args.overrides)
    found = Sweep.open(folder, list(values), args.overrides, configs, solved=width)
    runs = combinations(list(configs), values)
    asked = found.add(runs if width is None else of_equal_size(runs, configs, args.overrides, width))
    to_do = [run for run in asked if not _is_done(found.result(run))]
    queue = Queue(found, args.options, args.at_once) if args.submit else None
    pretrain = [*launcher_of(args.launcher), str(REPOSITORY / "launch" / "pretrain.py")]
    if queue is not None and not args.dry_run:
        job.need_sbatch()
    local = LocalCheck(found, configs, args.ranks if args.launcher else 1)
    problems: Problems = local.problems
    if queue is not None:
        problems = lambda run: queue.problems(run, configs[run.config])  # noqa: E731
    print(f"{counted(len(asked), 'run')}, {len(to_do)} of them to do; checking these", flush=True)
    wrong = problems_of(to_do, problems)
    if wrong:
        raise UserError("\nerror: ".join(wrong))
    if warning := local.warning():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if args.dry_run:
        submit = [sys.executable, str(REPOSITORY / "launch" / "slurm" / "submit.py")]
        for run in asked:
            config = None if found.config(run.config).exists() else configs[run.config]
            line = [*pretrain, *found.arguments(run, config)]
            if queue is not None:
                line = [*submit, *queue.command(run, config)]
            print(f"\n{run.name}: {found.result(run).state_text}\n  {shlex.join(line)}", flush=True)
        return 0
    found.begin(configs)
    if queue is not None and to_do:
        queue.submit_all(to_do)
        print(f"  table   python launch/sweep.py --sweep-dir {shlex.quote(str(args.sweep_dir))} --table", flush=True)
        return 0
    if stopped := train_all(found, to_do, pretrain):
        print("stopped; the same command goes on", flush=True)
        return stopped
    show(found)
    return NOT_ALL if any(found.result(run).state is not State.FINISHED for run in asked) else 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if args.table and (
        args.config or args.vary or args.overrides or args.equal_parameters or args.submit or args.dry_run
    ):
        raise UserError("--table: goes with --sweep-dir alone, which knows its configurations and values")
    if args.options and not args.submit:
        raise UserError(f"{args.options[0]}: options behind -- are for SLURM; add --submit, or leave them out")
    if args.at_once is not None and not args.submit:
        raise UserError("--at-once: goes with --submit; here runs are trained one after the other")
    if args.submit and args.launcher:
        raise UserError("--launcher: does not go with --submit, whose jobs start their ranks themselves; leave it out")
    if args.ranks is not None and not args.launcher:
        raise UserError("--ranks: goes with --launcher, which starts them; without it a run is one process")


def _is_done(result: Result) -> bool:
    """Whether a run is left as it is. One that diverged is a result, and would most often diverge again."""
    if result.is_diverged:
        print(f"{result.run.name}: diverged, which is its result; remove its run folder to try it again", flush=True)
    return result.state is State.FINISHED or result.is_diverged


def _with_jobs(results: Sequence[Result]) -> list[Result]:
    """With what SLURM says, if it can be asked, of the jobs whose runs have not begun: one that is refused at its first
    start leaves no run."""
    jobs = {result.job for result in results if result.state is None and result.job}
    in_queue: Container[str] = jobs
    with contextlib.suppress(OSError, UserError):
        in_queue = jobs_in_queue(jobs) if jobs else jobs
    ended = [result.job in jobs and result.job not in in_queue for result in results]
    return [dataclasses.replace(result, job_has_ended=has) for result, has in zip(results, ended, strict=True)]


def show(found: Sweep) -> None:
    """Prints the table, and writes it and both pictures into the sweep's folder. Raises OSError."""
    results, width = ranked(_with_jobs(found.results())), columns_of(sys.stdout)
    for text in (table_text(results, found.keys, width=width), seeds_text(results, found.keys, width=width)):
        if text:
            print(f"\n{text}", flush=True)
    print(flush=True)
    begun = [result for result in results if result.view is not None and len(result.view.metrics)]
    runs = open_runs([result.view for result in begun if result.view is not None])
    for sentence in [*edges(results, found.chosen_keys), *(notes(runs) if runs else [])]:
        print(f"note: {sentence}", flush=True)
    write_file(found.folder / TABLE, table_csv(results, found.keys).encode())
    if not begun:
        return
    means = summarised(results, found.keys)
    write_file(found.folder / SEEDS, means_csv(means, found.keys).encode())
    write_file(found.folder / LATEX, means_latex(means, found.keys).encode())
    from pretrain.views.comparison_page import drawn  # matplotlib, for which the table need not wait
    from pretrain.views.sweep_picture import losses_drawn

    write_file(found.folder / LOSSES, losses_drawn(results, found.chosen_keys))
    write_file(found.folder / CURVES, drawn(runs[:MOST_CURVES]))
    print(
        f"{found.folder}: {TABLE}, {SEEDS} and {LATEX} (means over seeds), {LOSSES} (loss against each value) and "
        f"{CURVES}",
        flush=True,
    )

"""Command line of launch/plan.py: what can be known about a run before it starts, without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.arguments import Parser, a_path, above_zero, add_overrides, at_least
from common.errors import UserError
from common.units import GIB
from pretrain.cli.plan_machine import add_fit, add_search, wanted_of
from pretrain.cli.plan_models import WIDTHS, models_of_costs, models_of_match
from pretrain.cli.refusals import exit_code_of
from pretrain.config.loading import load_config
from pretrain.config.rules import check_ranks, smallest_world
from pretrain.planning.layout_file import check_target
from pretrain.report.run_paths import config_file


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="launch/plan.py", description="What can be known about a run before it starts, without a GPU.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_costs(commands)
    _add_match(commands)
    _add_layout(commands)
    _add_check(commands)
    for add in (add_fit, add_search):
        add_overrides(add(commands), "override one dotted key of CONFIG, e.g. parallel.tensor=2; repeatable")
    return parser


def _add_costs(commands: argparse._SubParsersAction[Parser]) -> None:
    costs = commands.add_parser(
        "costs",
        help="parameters, multiply-accumulates and memory of models, by the paper's formulas and counted",
        description="Prints a table of what models cost: parameters, MACs and memory of one attention and one "
        "feed-forward layer on one sequence, by the paper's formulas and counted from the built model.",
    )
    costs.add_argument(
        "configs", nargs="+", type=a_path, metavar="CONFIG", help="run configuration or run folder, or a folder of some"
    )
    costs.add_argument(
        "--baseline",
        type=a_path,
        metavar="CONFIG",
        help="configuration that ratios refer to (default: the first, for those with its sequence length and d_model)",
    )
    costs.add_argument("--json", action="store_true", help="print exact numbers as JSON instead of a table")
    add_overrides(costs, "override one dotted key of every CONFIG, not of the baseline; repeatable")


def _add_match(commands: argparse._SubParsersAction[Parser]) -> None:
    match = commands.add_parser(
        "match",
        help="the width that gives a model as many parameters as its baseline",
        description="Solves for the attention's head_dim, the dense feed-forward's hidden_size or its experts' "
        "expert_size at which CONFIG has as many parameters in total as the baseline (rounded to the nearest width), "
        "as in the paper's comparisons. For every run of a sweep: launch/sweep.py --equal-parameters.",
    )
    match.add_argument("config", type=a_path, metavar="CONFIG", help="run configuration to be changed")
    match.add_argument("--like", type=a_path, required=True, metavar="BASELINE", help="configuration to equal in size")
    match.add_argument(
        "--solve",
        choices=tuple(WIDTHS),
        default="hidden_size",
        help="width to solve for (default: hidden_size)",
    )
    add_overrides(match, "override one dotted key of CONFIG, not of the baseline; repeatable")


def _add_layout(commands: argparse._SubParsersAction[Parser]) -> None:
    layout = commands.add_parser(
        "layout",
        help="which ranks form which groups, and the bytes of weights and optimizer that each holds",
        description="Prints the mesh of a run on N ranks: the groups of every dimension, what each pipeline stage "
        "holds, and the bytes of weights and optimizer states per rank, beside those of one process.",
    )
    layout.add_argument("config", type=a_path, metavar="CONFIG", help="run configuration, or a run folder")
    _add_ranks(layout)
    add_overrides(layout, "override one dotted key of CONFIG, e.g. parallel.tensor=2; repeatable")


def _add_ranks(parser: Parser) -> None:
    words = "number of ranks (default: the smallest, tensor x pipeline x expert)"
    parser.add_argument("--ranks", type=at_least(1), metavar="N", help=words)


def _add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    check = commands.add_parser(
        "check",
        help="everything that can be wrong with a run, all at once, without a GPU",
        description="Checks configuration, layout, data, tokenizer, disk space, permissions, checkpoint, packages and "
        "evaluation files of a run on N ranks, and rehearses a training step: its memory, and whether the ranks of a "
        "group call the same collectives. All that is wrong is listed at once, each with its key and the fix; a "
        "start would name the first. Writes nothing. Exit code 0: all is well, 2: something is wrong.",
    )
    check.add_argument("config", metavar="CONFIG", help="run configuration, or a run folder")
    _add_ranks(check)
    check.add_argument("--run-dir", metavar="DIR", help="run folder (default: as for launch/pretrain.py, runs/NAME)")
    check.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what the ranks compute on (default: train.device; where that is auto, what this machine has)",
    )
    check.add_argument(
        "--rank",
        type=at_least(0),
        metavar="R",
        help="rehearse the step of this rank too (default: those that stand for all)",
    )
    check.add_argument("--no-step", action="store_true", help="leave out the rehearsal of a training step")
    check.add_argument(
        "--device-memory",
        type=above_zero(1e6),
        metavar="GIB",
        help="warn where the step needs more than a device of so many GiB has (default: this machine's GPU)",
    )
    check.add_argument("--json", action="store_true", help="print all results as JSON")
    add_overrides(check, "override one dotted key of CONFIG; repeatable")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """The exit code of the command. Raises UserError and OSError."""
    if args.command == "costs":  # each imports torch; --help and most refusals do not wait for it
        models = models_of_costs(args.configs, args.baseline, args.overrides)
        from pretrain.cli.plan_costs import print_costs

        print_costs(models, any_size=args.baseline is not None, as_json=args.json)
    elif args.command == "layout":
        config = load_config(config_file(args.config, "CONFIG"), args.overrides, option="CONFIG")
        data_size = check_ranks(config, args.ranks or smallest_world(config))
        from pretrain.cli.plan_layout import print_layout

        print_layout(config, data_size)
    elif args.command == "check":
        if args.no_step and args.rank is not None:
            raise UserError("--rank: a step of it is to be rehearsed, but --no-step rehearses none; drop one of them")
        if args.no_step and args.device_memory is not None:
            raise UserError(
                "--device-memory: is for the memory of a step, but --no-step rehearses none; drop one of them"
            )
        from pretrain.cli.plan_check import print_check
        from pretrain.preflight.whole import Wanted

        run = Wanted(
            config=args.config,
            option="CONFIG",
            overrides=args.overrides,
            run_dir=args.run_dir,
            num_ranks=args.ranks,
            device=args.device,
            device_memory=None if args.device_memory is None else int(args.device_memory * GIB),
        )
        return print_check(run, as_json=args.json, rank=args.rank, with_step=not args.no_step)
    elif args.command == "fit":
        wanted = wanted_of(args)
        from pretrain.cli.plan_fit import print_fit

        print_fit(args, wanted)
    elif args.command == "search":
        if args.write is not None:
            check_target(args.write, force=args.force)
        wanted = wanted_of(args)
        from pretrain.cli.plan_search import print_search

        print_search(args, wanted)
    else:
        both = models_of_match(args.config, args.like, args.solve, args.overrides)
        from pretrain.cli.plan_match import print_match

        print_match(args.config, args.like, both, args.solve)
    return 0

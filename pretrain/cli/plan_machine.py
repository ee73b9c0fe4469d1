"""Options of `plan.py fit` and `plan.py search`: the machine that a run is planned for. Light: --help, and what is
refused, do not wait for torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from common.arguments import Parser, a_path
from common.errors import UserError
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.planning.machine import Machine, MachineOptions, machine
from pretrain.report.run_paths import config_file

Commands = argparse._SubParsersAction


def add_fit(commands: Commands[Parser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "fit",
        help="whether a run fits so many GPUs, how long it takes, what binds it, and what would help",
        description="Estimates memory, communication and the time of a step of a run on so many GPUs, without one: "
        "from traces on tensors without data, data sheets and stated assumptions, which are all printed. Says whether "
        "the run fits, what binds it, and the one change that would make it fit.",
    )
    _add_machine(parser)
    return parser


def add_search(commands: Commands[Parser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "search",
        help="the legal layouts of a run on so many GPUs, ranked, and a configuration file with the best",
        description="Ranks every legal layout and micro-batch of a run on so many GPUs by its estimated step time, "
        "then by the memory that stays free, and says why the others are not in the table.",
    )
    _add_machine(parser)
    parser.add_argument("--write", type=a_path, metavar="FILE", help="write CONFIG with the first layout to FILE")
    parser.add_argument(
        "--force", action="store_true", help="let --write replace a file that an earlier search did not make"
    )
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=a_path, metavar="CONFIG", help="run configuration, or a run folder")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, one rank each")
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help="a device of pretrain/planning/devices.json, e.g. h100-80gb"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="GPUs that the inner link joins (default: the table's)"
    )
    parser.add_argument(
        "--interconnect",
        metavar="NAME",
        help="link between nodes, e.g. ib-ndr-400, ib-hdr-200, roce-100, ethernet-25 (default: the table's)",
    )
    parser.add_argument(
        "--ports-per-node",
        type=int,
        metavar="N",
        help="ports of that link in a node (default: the table's for the maker's own nodes, else 1)",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="memory of a GPU; needed if --gpu is not in the table"
    )
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="dense TFLOP/s of a GPU in the run's precision")
    parser.add_argument(
        "--link-gb-per-second", type=float, metavar="X", help="one direction of the link inside a node, of one GPU"
    )
    parser.add_argument(
        "--results",
        type=a_path,
        metavar="FOLDER",
        help="records of python -m benchmarks.gpu, which come before assumptions (default: benchmarks/results)",
    )
    parser.add_argument("--json", action="store_true", help="print exact numbers as JSON")


class WantedPlan(NamedTuple):
    """What a command line asks for, checked."""

    path: Path
    """Of the configuration file."""
    config: Config
    machine: Machine


def wanted_of(args: argparse.Namespace) -> WantedPlan:
    """Raises UserError."""
    path = config_file(args.config, "CONFIG")
    if args.results is not None and not args.results.is_dir():
        raise UserError(
            f"--results: there is no folder {args.results}; name one with records of python -m benchmarks.gpu, or "
            "leave the option out"
        )
    return WantedPlan(path, load_config(path, args.overrides, option="CONFIG"), machine(machine_options(args)))


def machine_options(args: argparse.Namespace) -> MachineOptions:
    return MachineOptions(
        gpu=args.gpu,
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
        interconnect=args.interconnect,
        ports_per_node=args.ports_per_node,
        memory_gib=args.memory,
        peak_tflops=args.peak_tflops,
        link_gb_per_second=args.link_gb_per_second,
    )

"""The command line: `python -m benchmarks.gpu truth|speed|run|tune|visit|candidates|apply|carry|tables`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import model.openmp  # noqa: F401  # as in training; before torch

COMMANDS = {
    "truth": "is everything equal, repeatable and free of races on this card",
    "speed": "how near to the card's own ceilings are kernels and micro-steps",
    "run": "does training through DeepSpeed's launcher start, learn, save, stop and resume",
    "tune": "which tiles of the Triton kernels are the fastest on this card",
}


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks.gpu import candidates, carry, command, tables, visit, winners

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="What a GPU has to show (docs/gpu.md)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command.add_options(commands.add_parser(name, help=what, description=what))
    candidates.add_command(commands)
    carry.add_command(commands)
    tables.add_command(commands)
    winners.add_command(commands)
    visit.add_command(commands)
    options = parser.parse_args(arguments)
    if options.command not in COMMANDS:
        return int(options.act(options))
    status = command.prepare(options)
    if status is not None:
        return status
    parts = list(importlib.import_module(f"benchmarks.gpu.{options.command}").parts(tiny=options.tiny))
    return command.run_parts(options, parts)


if __name__ == "__main__":
    sys.exit(main())

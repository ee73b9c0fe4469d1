r"""How step time grows with sequence length, experts, layers and ranks, beside how the arithmetic grows. On a CPU.

    python -m data_prep run --config configs/data/sample.json --set output=DIR     # DIR/manifest.json, for the ranks
    python -m benchmarks.growth --data DIR/manifest.json --keep
    python -m benchmarks.growth --axis layers --axis sequence-length --rounds 3

A step is forward and backward of a small model in fp32, as in benchmarks.families, on one sequence; on ranks it is a
whole training step of our loop, with DeepSpeed (ZeRO 1, gloo), where each rank has the same micro-batch. The points of
an axis run in turns, round after round, each round in another order, and what counts is the median over rounds. Through
the logarithms goes a straight line: its slope is the exponent of growth. Beside it stands the range of slopes when one
point is left out, the slope between neighbouring points, and the slope of the multiply-accumulates of the whole step by
the paper's formulas (model/costs.py: whole attention matrices, and a selector of SwitchHead once instead of per head).
The fixed share is that part of the smallest point's time, or of its multiply-accumulates, that does not grow, if all
points lie on a straight line. Bytes are counted: those of the collectives of a rehearsed step, sent around a ring.
Where there are more ranks than cores, ranks share cores, and only their processor time is compared.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.growth import axes, ranks, table
from benchmarks.growth.axes import AXES
from common.arguments import add_overrides
from common.errors import UserError

RANKS = "ranks"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    about = records.machine()
    found: dict[str, Any] = {"threads": threads, "rounds": args.rounds, "cores": about["cores"], "axes": {}, RANKS: []}
    chosen = list(dict.fromkeys(args.axis or [*AXES, RANKS]))
    overrides = [*([f"data.manifest={args.data.resolve()}"] if args.data else []), *args.overrides]
    try:
        # First what can be refused: a missing data set should not cost minutes.
        counts = sorted(set(args.ranks)) if RANKS in chosen else []
        configs = {count: ranks.config_for(args.config, overrides, count) for count in counts}
        for axis in chosen:
            print(f"{axis}: {args.rounds} rounds", file=sys.stderr, flush=True)
            if axis == RANKS:
                found[RANKS] = ranks.measured(configs, rounds=args.rounds, steps=args.steps)
            else:
                found["axes"][axis] = axes.measured(AXES[axis], args.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = f"fp32, {threads} threads, medians of {args.rounds} rounds\n\n{table.text(found)}"
    records.show(args.keep, "growth", about, found, text)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axis", choices=[*AXES, RANKS], action="append", help="repeatable (default: all)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: %(default)s")
    of_ranks = parser.add_argument_group("of the axis `ranks`")
    of_ranks.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="default: 1 2 4")
    of_ranks.add_argument("--steps", type=int, default=4, metavar="N", help="of a turn (default: %(default)s)")
    of_ranks.add_argument(
        "--config",
        type=Path,
        default=Path("configs/switchall_tiny.json"),
        metavar="FILE",
        help="of a step (default: %(default)s)",
    )
    of_ranks.add_argument("--data", type=Path, metavar="FILE", help="manifest.json (default: the configuration's)")
    add_overrides(of_ranks)
    records.add_option(parser)
    args = parser.parse_args(arguments)
    if min(args.rounds, args.steps, *args.ranks) < 1:
        parser.error("--rounds, --steps, --ranks: give numbers of at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())

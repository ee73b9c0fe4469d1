r"""What a run of many ranks costs beside its arithmetic: a thousand simulated ranks in one process, the real code.

    python -m benchmarks.scale                                # 1,024 ranks of configs/switchall_1b.json
    python -m benchmarks.scale --ranks 64 1024 16384          # a column for each
    python -m benchmarks.scale --sockets 2 8 32               # gloo itself: processes of this machine, on its loopback

Simulated are the messages between two steps, the order of the data, the plan and the folder of a checkpoint, and the
run folder. All ranks are data-parallel with ZeRO 1, and read batch.micro_sequences sequences in one micro-step, so the
global batch grows with them. Every part also checks what it simulates: all ranks agree, read every sequence once, and
save every element once. CPU is this machine's; `python -m benchmarks.scale` measures no network and no shared disk.
docs/scale.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.scale import checkpoint, control, data, folders, sockets
from benchmarks.scale.figures import Parts, table
from common.arguments import add_overrides
from common.errors import UserError
from pretrain.config.loading import load_config
from pretrain.config.schema import Config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024], metavar="N", help="(default: 1024)")
    parser.add_argument("--config", default="configs/switchall_1b.json", metavar="FILE", help="(default: %(default)s)")
    add_overrides(parser)
    parser.add_argument("--steps", type=int, default=2, help="whose data is read (default: 2)")
    parser.add_argument("--shards", type=int, default=2000, help="of 100 million tokens (default: 2000)")
    parser.add_argument("--sockets", type=int, nargs="+", metavar="N", help="measure gloo between N processes instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to this file")
    args = parser.parse_args(arguments)
    if min([*args.ranks, *(args.sockets or [1]), args.steps, args.shards]) < 1:
        print("error: --ranks, --sockets, --steps, --shards: give numbers of at least 1", file=sys.stderr)
        return 2
    try:
        if args.sockets:
            found: dict[int, Parts] = {ranks: {"gloo": sockets.figures(ranks)} for ranks in args.sockets}
        else:
            config = load_config(Path(args.config), args.overrides)
            found = {
                ranks: simulate(with_ranks(config, ranks), ranks, steps=args.steps, shards=args.shards)
                for ranks in args.ranks
            }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if args.json is not None:
        as_json = {
            ranks: [{"part": part, **figure._asdict()} for part, rows in parts.items() for figure in rows]
            for ranks, parts in found.items()
        }
        args.json.write_text(json.dumps(as_json, indent=1))
    return 0


def with_ranks(config: Config, ranks: int) -> Config:
    """The configuration for `ranks` data-parallel ranks, with one micro-step."""
    return config.replaced("batch", global_sequences=ranks * config.batch.micro_sequences)


def simulate(config: Config, ranks: int, *, steps: int, shards: int) -> Parts:
    """All parts for `ranks` ranks."""
    return {
        "control": control.figures(ranks, config.model),
        "data": data.figures(ranks, config, steps=steps, shards=shards),
        "checkpoint": checkpoint.figures(ranks, config),
        "run folder": folders.figures(ranks),
    }


if __name__ == "__main__":
    sys.exit(main())

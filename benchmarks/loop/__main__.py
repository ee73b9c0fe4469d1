r"""What our loop costs beside the arithmetic of the model, and how long a run takes to its first step. On a CPU.

    python -m data_prep run --config configs/data/sample.json --set output=DIR     # DIR/manifest.json
    python -m benchmarks.loop speed --data DIR/manifest.json [--pairs 9] [--steps 3]
    python -m benchmarks.loop start --data DIR/manifest.json [--starts 5]
    (both: --keep [FOLDER] keeps what was measured for docs/benchmarks.md)

speed: one process trains a model in fp32 with ever two loops in turns (ABBA), a piece of a few steps each. Smaller than
the paper's are the batch, 4 sequences in one micro-step, and the sequence, 128 tokens, so that a piece of three steps
takes 5 to 15 s on one core; smaller steps make what a loop costs look larger, not smaller. At ZeRO 0 our whole loop
(reading ahead, messages, metrics.jsonl, TensorBoard, statistics of routers, watchdog) runs against a bare loop of
PyTorch: forward, backward, clip_grad_norm_, AdamW, on micro-batches that are in memory already. At ZeRO 1 it runs
against DeepSpeed's engine alone. Both have the 47M model of configs/paper/c4_switchhead_47m.json. At ZeRO 0 it runs
against nanoGPT's loop too (benchmarks/loop/nanogpt.py), with the dense 45M model of c4_dense_rope_45m.json without
dropout; nanoGPT's side computes it by a model of its own, from our weights. The ratio is tokens per second of ours /
theirs, the median over the pairs; `by CPU` is the same of the time that processors work, in all threads, which other
processes of the machine disturb less. Both loops must have had the same losses; how far they differ is printed.

start: seconds from the start of a process of launch/pretrain.py until metrics.jsonl has its first line, and processor
seconds (user + system) of it and its children until then, configs/switchall_tiny.json. Once with python and once with
DeepSpeed's launcher (one rank), in turns; the first start of each fills the cache of files and does not count.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import records
from common.arguments import add_overrides
from common.errors import UserError
from common.tables import text_table

PEERS = ["bare", "engine", "nanogpt"]
"""Of `speed.COMPARISONS`, which takes seconds to import."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="what", required=True)
    speed_part, start_part = (parts.add_parser(name) for name in ("speed", "start"))
    speed_part.add_argument("--config", type=Path, help="in the place of each comparison's own")
    speed_part.add_argument("--pairs", type=int, default=9, metavar="N", help="of pieces (default: %(default)s)")
    speed_part.add_argument("--steps", type=int, default=3, metavar="N", help="of a piece (default: %(default)s)")
    speed_part.add_argument("--against", nargs="+", choices=PEERS, default=PEERS, help="other loops (default: all)")
    start_part.add_argument(
        "--config", type=Path, default=Path("configs/switchall_tiny.json"), help="of the run (default: %(default)s)"
    )
    start_part.add_argument("--starts", type=int, default=5, metavar="N", help="of each kind (default: %(default)s)")
    start_part.add_argument("--with", nargs="+", dest="kinds", choices=("python", "deepspeed"), help="default: both")
    for part in (speed_part, start_part):
        part.add_argument("--data", type=Path, metavar="FILE", help="manifest.json (default: the configuration's)")
        add_overrides(part)
        records.add_option(part)
    args = parser.parse_args(arguments)
    overrides = [*([f"data.manifest={args.data.resolve()}"] if args.data else []), *args.overrides]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    about = records.machine()
    try:
        if args.what == "speed":
            from benchmarks.loop import speed  # here: torch takes seconds, which `start` need not wait for

            if min(args.pairs, args.steps) < 1:
                raise UserError("--pairs, --steps: give numbers of at least 1")
            found = speed.run(args.config, overrides, args.against, pairs=args.pairs, steps=args.steps)
            text = text_table(speed.HEADER, speed.rows(found))
        else:
            from benchmarks.loop import start

            if args.starts < 1:
                raise UserError("--starts: give a number of at least 1")
            found = start.run(args.config, overrides, args.kinds or start.KINDS, starts=args.starts)
            text = text_table(start.HEADER, start.rows(found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    records.show(args.keep, f"loop-{args.what}", about, found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

r"""A run whose data come slowly: what monitoring shows of it (docs/monitoring.md), made on a machine with a fast disk.

    python -m benchmarks.data.slow 1.5 --config configs/switchall_tiny.json --run-dir runs/starved

trains as launch/pretrain.py does with the arguments that follow the number, and the thread that reads ahead sleeps so
many seconds for each step's batches.
"""

from __future__ import annotations

import argparse
import sys
import time

from pretrain.data.prefetch import Prefetcher
from pretrain.data.windows import Batch


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data.slow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", type=float, help="for which reading the batches of a step takes longer")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of launch/pretrain.py")
    args = parser.parse_args()
    read = Prefetcher._read

    def slow(prefetcher: Prefetcher, consumed: int) -> list[Batch]:
        time.sleep(args.seconds)
        return read(prefetcher, consumed)

    Prefetcher._read = slow  # type: ignore[method-assign, assignment]
    from pretrain.cli.train import main as train

    return train(args.arguments)


if __name__ == "__main__":
    sys.exit(main())

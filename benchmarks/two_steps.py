r"""Two optimizer steps on the same batch, in one process: the second loss is below the first, and the memory that the
process takes stands beside what was estimated.

    python -m benchmarks.two_steps --config configs/switchall_1b.json --set train.device=cpu \
      --set batch.global_sequences=1 --set batch.micro_sequences=1 --set model.sequence_length=32 \
      --set schedule.warmup_steps=0 --set data.manifest=data/mine/manifest.json

The peak is that of the process's resident memory, before and after each part. What it had before the model was built
(Python, torch, DeepSpeed) is no part of the estimate and is told apart. Nothing is saved, so the memory that an
asynchronous checkpoint is copied to (12 bytes per parameter, in CPU memory) is not reserved.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from common.arguments import add_overrides
from common.errors import UserError
from common.resident import CLEAR, forget_peak, resident_bytes
from common.units import GIB
from pretrain import device as devices
from pretrain.config.loading import load_config
from pretrain.config.rules import check_ranks
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import open_sources
from pretrain.parallel.context import parallel_context
from pretrain.planning.memory import estimate, why_unknown
from pretrain.ranks import Ranks
from pretrain.trainer import RunSetup, build_trainer

T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.two_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="run configuration")
    add_overrides(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to this file")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.overrides)
        check_ranks(config, 1)
        config = config.replaced("checkpoint", asynchronous=False)
        found = measure(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    first, second = found["losses"]
    if not (math.isfinite(first) and second < first):
        print(f"error: the losses are {first} and {second}: the second is not below the first", file=sys.stderr)
        return 1
    return 0


def measure(config: Config) -> dict[str, Any]:
    """Trains the two steps and prints a line for each part. Raises UserError."""
    device = devices.start(Ranks.from_environment(), config.train)
    try:
        sources = open_sources(config)
        sources.check("size")
        expected = None if why_unknown(config) else estimate(config, 1, device.type)
        is_own = forget_peak()  # of the estimate
        before, peak = resident_bytes()
        print(f"before the model: {before / GIB:.2f} GiB", flush=True)
        if not is_own:
            print(
                f"warning: {CLEAR} cannot be written, so a peak below {peak / GIB:.2f} GiB, which the process has had "
                "before the model, cannot be told",
                flush=True,
            )
        setup = RunSetup(config, sources, parallel_context(config), device)
        trainer = told("model and optimizer", lambda: build_trainer(setup, None))
        given = trainer.read_input(Progress(0, 0))
        if given.error is not None:
            raise given.error
        losses, progress = [], Progress(0, 0)  # the same batch and the same learning rate twice
        for number in (1, 2):
            result = told(f"step {number}", lambda: trainer.launch(progress, given).read())
            losses.append(float(result.sums.loss))
            print(f"  loss {losses[-1]:.4f}, gradient norm {result.sums.grad_norm:.4f}", flush=True)
        trainer.close()
    finally:
        devices.stop()
    _, peak = resident_bytes()
    found = {"before": before, "peak": peak, "losses": losses, "estimate": None if expected is None else expected.total}
    print(f"peak {peak / GIB:.2f} GiB, {(peak - before) / GIB:.2f} of it since the model", flush=True)
    if expected is not None:
        parts = {"weights": expected.weights, "optimizer": expected.optimizer}
        parts |= {"gradients and update": expected.gradients.afterwards, "activations": expected.activations.peak}
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        ratio = (peak - before) / expected.total
        print(f"estimated {expected.total / GIB:.2f} GiB ({listed}); measured / estimated {ratio:.3f}", flush=True)
    return found


def told(what: str, make: Callable[[], T]) -> T:
    """Does it, and prints its time and the peak until then."""
    began = time.monotonic()
    result = make()
    print(f"{what}: {time.monotonic() - began:.1f} s, peak so far {resident_bytes()[1] / GIB:.2f} GiB", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())

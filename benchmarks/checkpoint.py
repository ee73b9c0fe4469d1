r"""What a checkpoint costs, measured: how long training stands still for it, written at once and behind the training.

    python -m benchmarks.checkpoint                                  # one process
    deepspeed --num_gpus 2 --module benchmarks.checkpoint            # ranks, each with its share

Builds an engine (fp32 master weights and Adam's moments, ZeRO 1, filled with noise), then saves in turns: at once,
behind. Every save is of the whole state, into a new folder on the disk of --folder. `stall` is the time in the call,
`commit` the time until the folder has its final name. The table shows medians of --repeats; --json has every save.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from model.language_model import build_model
from pretrain import device as devices
from pretrain.checkpoint import Retention
from pretrain.checkpoint.saver import Outcome, Saver
from pretrain.config.loading import parse_config
from pretrain.config.rules import choose_backends
from pretrain.data.progress import Progress
from pretrain.engine.build import build_engine
from pretrain.engine.zero_state import pieces
from pretrain.parallel.context import parallel_context
from pretrain.ranks import Ranks

CONFIG = {
    "model": {
        "d_model": 512,
        "num_layers": 2,
        "vocab_size": 8000,
        "sequence_length": 128,
        "attention": {"type": "switchhead", "num_heads": 4, "head_dim": 64, "num_experts": 4, "active_experts": 2},
        "feedforward": {"type": "sigma_moe", "num_experts": 64, "expert_size": 128, "active_experts": 4},
    },
    "train": {"precision": "fp32", "threads": 1},
    "batch": {"global_sequences": 8, "micro_sequences": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = parse_config(CONFIG)
    device = devices.start(Ranks.from_environment(), config.train)
    parallel = parallel_context(config)
    engine = build_engine(
        build_model(config.model, parallel, choose_backends(config, device.type), seed=0), config, parallel, device
    )
    for piece in pieces(engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=False):
        for tensor in piece.moments.values():
            tensor.normal_()  # zeros() would be one page of memory, read again and again
    savers = {kind: Saver(engine, parallel, device, asynchronous=kind == "behind") for kind in ("at once", "behind")}
    state_bytes = 12 * sum(p.numel() for p in engine.module.parameters())

    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        place = [temporary]
        dist.broadcast_object_list(place, src=0)
        outcomes: dict[str, list[Outcome]] = {kind: [] for kind in savers}
        files = 0
        for step in range(1, 2 * args.repeats + 1):
            kind = ("at once", "behind")[step % 2]
            os.sync()
            dist.barrier()
            savers[kind].save(
                Path(place[0]),
                Progress(step, 0),
                extra={},
                retention=Retention(keep_last=1),
                report=outcomes[kind].append,
            )
            savers[kind].finish()
            time.sleep(0.5)
        if dist.get_rank() == 0:
            newest = next(Path(place[0]).glob("step-*"))
            files = sum(file.stat().st_size for file in newest.iterdir())
        dist.barrier()
    if dist.get_rank() == 0:
        report(outcomes, state_bytes, files, args.json)
    devices.stop()


def report(outcomes: dict[str, list[Outcome]], state_bytes: int, files: int, target: Path | None) -> None:
    print(
        f"state {state_bytes:,} bytes on {dist.get_world_size()} ranks; files {files:,} ({files / state_bytes:.4f} x)"
    )
    stalls = {kind: statistics.median(o.stall_seconds for o in found) for kind, found in outcomes.items()}
    for kind, found in outcomes.items():
        commit = statistics.median(o.seconds for o in found)
        every = " ".join(f"{o.stall_seconds:.3f}" for o in found)
        print(f"{kind:8}  stall {stalls[kind]:.3f} s  commit {commit:.3f} s   (stalls: {every})")
    print(f"stall behind / at once: {stalls['behind'] / stalls['at once']:.3f}")
    if target is not None:
        rows = {
            kind: [{"stall_seconds": o.stall_seconds, "seconds": o.seconds} for o in found]
            for kind, found in outcomes.items()
        }
        target.write_text(
            json.dumps({"state_bytes": state_bytes, "file_bytes": files, "torch": torch.__version__, **rows})
        )


if __name__ == "__main__":
    main()

"""What a rank's tensors take in a real run, counted by the allocator, and what its process takes beside it.

A process with tests/allocations.c preloaded runs this module: it reads {"ranks": N, "config": {...}} and prints a
`Counted` for each rank, as a JSON list.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from common.resident import forget_peak, resident_bytes
from model.kernels.cpu import workers
from pretrain.config.loading import parse_config, to_json
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from tests.harness import run_ranks
from tests.pretrain.runs import one_step, trainer_of

SOURCE = Path(__file__).resolve().parents[2] / "allocations.c"


class Counted(NamedTuple):
    """Bytes of one rank; what was there before its trainer was built is no part."""

    resting: int
    """Of tensors, between steps; without what CPU kernels keep for themselves, which no estimate counts."""
    peak: int
    """Of tensors, at the highest point of a step."""
    resident: int
    """Of the process's resident memory, at the highest point of the same step."""


def counted(config: Config, num_ranks: int, library: Path) -> list[Counted]:
    """Trains three steps on gloo ranks and counts during the third. `library`: of `build`."""
    told = json.dumps({"ranks": num_ranks, "config": to_json(config)})
    # Of bf16, oneDNN keeps more for itself on processors with bf16 instructions (48 MB instead of 39 in one run), and a
    # program for each shape.
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    }
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=told, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Counted(*numbers) for numbers in json.loads(done.stdout.splitlines()[-1])]


def build(folder: Path, compiler: str) -> Path:
    """Compiles the counter."""
    library = folder / "allocations.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


def count(rank: int, config: Config) -> Counted:
    """Of this rank."""
    allocations = ctypes.CDLL(os.environ["LD_PRELOAD"])
    for function in (allocations.allocations_now, allocations.allocations_peak):
        function.restype = ctypes.c_size_t
    before, resident = allocations.allocations_now(), resident_bytes()[0]
    progress = Progress(0, 0)
    trainer = trainer_of(config)
    for _ in range(2):
        one_step(trainer, progress)
        progress = progress.after_step(config.batch.global_sequences, updated=True)
    gc.collect()
    kept = sum(buffer.nbytes for buffer in workers._local.__dict__.get("buffers", {}).values())
    resting = allocations.allocations_now() - kept
    allocations.allocations_forget_peak()
    forget_peak()
    one_step(trainer, progress)
    highest = allocations.allocations_peak()
    found = Counted(resting - before, highest - before, resident_bytes()[1] - resident)
    trainer.close()
    return found


def main() -> None:
    told: dict[str, Any] = json.load(sys.stdin)
    print(json.dumps(run_ranks(count, told["ranks"], parse_config(told["config"]))))


if __name__ == "__main__":
    main()

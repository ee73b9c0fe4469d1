"""The ranks of benchmarks/checkpoint.py: an engine whose state every method saves in turns.

Started by the benchmark through torch's launcher. Rank 0 writes what was measured to the file of --json.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.loop.loops import OwnState
from benchmarks.rounds import orders
from common.files import write_json
from model.language_model import build_model
from model.parallel.context import ParallelContext
from pretrain import device as devices
from pretrain.checkpoint import Retention
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.state import owned_state
from pretrain.config.loading import parse_config
from pretrain.config.rules import choose_backends
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine.build import build_engine
from pretrain.engine.zero_state import pieces
from pretrain.parallel.context import parallel_context
from pretrain.ranks import Ranks

CONFIG: dict[str, Any] = {
    "model": {
        "d_model": 512,
        "num_layers": 2,
        "vocab_size": 8000,
        "sequence_length": 128,
        "attention": {"type": "switchhead", "num_heads": 4, "head_dim": 64, "num_experts": 4, "active_experts": 2},
        "feedforward": {"type": "sigma_moe", "num_experts": 64, "expert_size": 128, "active_experts": 4},
    },
    "train": {"precision": "fp32", "threads": 1, "device": "cpu"},
    "batch": {"global_sequences": 8, "micro_sequences": 1},
}
MOST_STEPS = 50
"""Beside a save."""


class Method(Protocol):
    """A way to save the engine's state. Both calls are collective."""

    def save(self, folder: Path, step: int) -> None:
        """Returns when training may go on."""

    def finish(self) -> None:
        """Returns when the method says that all is written."""


class Ours:
    """pretrain.checkpoint: safetensors, flushed and hashed."""

    def __init__(self, engine: Any, parallel: ParallelContext, device: torch.device, *, behind: bool) -> None:
        self._saver = Saver(engine, parallel, device, asynchronous=behind)

    def save(self, folder: Path, step: int) -> None:
        self._saver.save(folder, Progress(step, 0), extra={}, retention=Retention(keep_last=1))

    def finish(self) -> None:
        self._saver.finish()


class Dcp:
    """torch.distributed.checkpoint as its documentation calls it, on the tensors that ours saves. It keeps its stager,
    so that memory for the copy is touched once, as ours is."""

    def __init__(self, engine: Any, parallel: ParallelContext, *, behind: bool) -> None:
        self._engine, self._parallel, self._behind = engine, parallel, behind
        self._group = dist.new_group(backend="gloo")
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._saving: Future[Any] | None = None

    def save(self, folder: Path, step: int) -> None:
        state, name = flat_state(self._engine, self._parallel), str(folder / f"step-{step}")
        if not self._behind:
            dcp.save(state, checkpoint_id=name, process_group=self._group)
            return
        saving = dcp.async_save(state, checkpoint_id=name, process_group=self._group, async_stager=self._stager)
        assert isinstance(saving, Future)
        self._saving = saving

    def finish(self) -> None:
        if self._saving is not None:
            self._saving.result()
            self._saving = None


class DeepSpeedOwn:
    """The engine's save_checkpoint, which has no other mode on a CPU."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def save(self, folder: Path, step: int) -> None:
        self._engine.save_checkpoint(str(folder), tag=f"step-{step}")

    def finish(self) -> None:
        """There is nothing behind."""


def flat_state(engine: Any, parallel: ParallelContext) -> dict[str, Tensor]:
    """What ours saves of this rank, each rectangle a tensor of its own, under a name that no other rank has."""
    return {
        f"{name}@{','.join(map(str, offsets))}": values
        for name, fragments in owned_state(engine, parallel).items()
        for offsets, values in fragments.chunks.items()
    }


def methods(engine: Any, parallel: ParallelContext, device: torch.device) -> dict[str, Method]:
    """All of them, by name."""
    return {
        "ours, at once": Ours(engine, parallel, device, behind=False),
        "ours, behind": Ours(engine, parallel, device, behind=True),
        "torch DCP, at once": Dcp(engine, parallel, behind=False),
        "torch DCP, behind": Dcp(engine, parallel, behind=True),
        "DeepSpeed's save_checkpoint": DeepSpeedOwn(engine),
    }


def engine_of(config: Config, parallel: ParallelContext, device: torch.device) -> Any:
    """With moments of noise."""
    model = build_model(config.model, parallel, choose_backends(config, device.type), seed=0)
    engine = build_engine(model, config, parallel, device)
    for piece in pieces(engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=False):
        for tensor in piece.moments.values():
            tensor.normal_().abs_()  # zeros() would be one page of memory, read again and again
    return engine


class Training:
    """Steps on one batch of random tokens."""

    def __init__(self, engine: Any, config: Config, parallel: ParallelContext) -> None:
        self._engine, self._own = engine, OwnState(engine.module)
        sequences, length = config.batch.micro_sequences, config.model.sequence_length
        self._batch = [torch.randint(0, config.model.vocab_size, (sequences, length)) for _ in range(2)]
        self._index = torch.arange(sequences)
        self._micro_steps = config.micro_steps(parallel.data_size)

    def __call__(self, steps: int) -> float:
        """Seconds of so many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            for _ in range(self._micro_steps):
                self._engine.backward(self._engine(*self._batch, self._index)[0])
                self._engine.step()
            self._own.end_step()
        return time.perf_counter() - began


class Measurement:
    """Saves by each method, each into its own folder, which is empty before."""

    def __init__(self, chosen: dict[str, Method], train: Callable[[int], float], folder: Path) -> None:
        self._methods, self._train, self._folder, self._step = chosen, train, folder, 0

    def alone(self, name: str) -> dict[str, float]:
        """Seconds of a save while nothing is trained: the call, until the method says that all is written, and what the
        system then still takes to bring it to the disk. And the bytes of its files."""
        folder, method = self._prepare(), self._methods[name]
        began = time.perf_counter()
        method.save(folder, self._step)
        stall = time.perf_counter() - began
        method.finish()
        commit = time.perf_counter() - began
        dist.barrier()
        flushing = time.perf_counter()
        os.sync()
        flush = time.perf_counter() - flushing
        files = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {**_longest({"stall": stall, "commit": commit, "flush": flush}), "files": files}

    def beside(self, name: str, steps: int) -> float:
        """Seconds from the call until `steps` more steps are done and all is written."""
        folder, method = self._prepare(), self._methods[name]
        began = time.perf_counter()
        method.save(folder, self._step)
        self._train(steps)
        method.finish()
        return _longest({"seconds": time.perf_counter() - began})["seconds"]

    def plain(self, steps: int) -> float:
        """Seconds of as many steps without a save."""
        dist.barrier()
        return _longest({"seconds": self._train(steps)})["seconds"]

    def _prepare(self) -> Path:
        self._step += 1
        folder = self._folder / "saves"
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        os.sync()
        dist.barrier()
        return folder


def _longest(seconds: dict[str, float]) -> dict[str, float]:
    """Of all ranks."""
    values = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(seconds, values.tolist(), strict=True))


def measured(measurement: Measurement, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Every save of every method, in turns after one of each that does not count. So many steps run beside a save that
    the slowest save of the first round would end within them."""
    step = statistics.median(measurement.plain(1) for _ in range(3))
    first = [measurement.alone(name) for name in names]
    slowest = max(one["commit"] + one["flush"] for one in first)
    steps = min(MOST_STEPS, math.ceil(_longest({"steps": 1.5 * slowest / step})["steps"]))
    saves: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for name in orders(list(names), repeats):
        one = measurement.alone(name)
        plain = measurement.plain(steps)
        saves[name].append({**one, "plain": plain, "beside": measurement.beside(name, steps)})
    return {"steps_beside": steps, "saves": saves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    config = parse_config(CONFIG)
    device = devices.start(Ranks.from_environment(), config.train)
    parallel = parallel_context(config)
    engine = engine_of(config, parallel, device)
    chosen, train = methods(engine, parallel, device), Training(engine, config, parallel)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        place = [temporary]
        dist.broadcast_object_list(place, src=0)
        found = measured(Measurement(chosen, train, Path(place[0])), list(chosen), args.repeats)
        dist.barrier()
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for p in engine.module.parameters())
        write_json(args.json, {"parameters": parameters, "state_bytes": 12 * parameters, **found})
    devices.stop()


if __name__ == "__main__":
    main()

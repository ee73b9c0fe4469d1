"""Recording the choices of routers while training, or replaying those of another run: `train.record_routing` and
`train.replay_routing`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from model.choices import Recorder, Replayer
from model.language_model import routing_statistics
from model.memory import layer_memories
from model.parallel.context import ParallelContext
from model.routing import RoutingStatistics
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.data.stages import Stage
from pretrain.data.training_data import TrainingData
from pretrain.data.windows import Batch
from pretrain.device import on_collective_device
from pretrain.parallel.agreement import agreed, from_first_rank
from pretrain.routing.record import KEY, Record, begin_record, description, write_step


@dataclass
class Flips:
    """Choices that a replay took from the record although the run itself would have chosen differently."""

    choices: int = 0
    """All that were compared."""
    flips: int = 0
    distance: float = 0.0
    """The difference between the logits of the two experts at the farthest flip: how far from a tie it was."""

    def with_more(self, other: Flips) -> Flips:
        return Flips(self.choices + other.choices, self.flips + other.flips, max(self.distance, other.distance))

    def values(self) -> dict[str, float | None]:
        """Keys of metrics.jsonl."""
        return {
            "routing_choices": self.choices,
            "routing_flips": self.flips,
            "routing_flip_distance": self.distance if math.isfinite(self.distance) else None,
        }

    def text(self) -> str:
        return (
            f"{self.choices:,} choices replayed, {self.flips:,} of them would have been different, the farthest "
            f"{self.distance:.2g} from a tie (difference of the logits)"
        )


class Tape(Protocol):
    """What a step calls before its first and after its last micro-step; both calls are collective and raise UserError
    or PeerFailed."""

    def before_step(self, step: int, batches: Sequence[Batch]) -> None: ...

    def after_step(self, step: int) -> Flips | None: ...

    def summary(self) -> str:
        """What happened since the start, the same on every rank."""


def open_tape(
    config: Config, data: TrainingData, module: nn.Module, parallel: ParallelContext, run_dir: Path, steps: range
) -> Tape | None:
    """For `steps`, counted from 1; None where nothing is recorded or replayed. Collective; raises UserError or
    PeerFailed."""
    sources, stage = data.sources, data.stream.stage
    if config.train.record_routing:
        folder, content = recording(config, sources, stage, run_dir)
        from_first_rank(lambda: begin_record(folder, content, steps.start - 1))
        return Recording(folder, module, parallel)
    if config.train.replay_routing is not None:
        record = agreed(lambda: open_record(config, sources, stage))
        agreed(lambda: record.check_steps(steps))
        return Replaying(record, config, module, parallel)
    return None


def recording(config: Config, sources: Sources, stage: Stage, run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Where a run in `stage` of its data writes what its routers choose, and how that is described."""
    return run_dir / "routing", description(config, sources.digest, stage)


def open_record(config: Config, sources: Sources, stage: Stage) -> Record:
    """The record to be replayed by a run in `stage` of its data. Raises UserError if there is none,
    or one of another model, batch or text."""
    assert config.train.replay_routing is not None
    record = Record(Path(os.path.expanduser(config.train.replay_routing)))  # pathlib raises for ~NAME of nobody
    record.check(description(config, sources.digest, stage))
    return record


class Recording:
    """Every rank writes what its routers chose, a file for each step."""

    def __init__(self, folder: Path, module: nn.Module, parallel: ParallelContext) -> None:
        self._folder, self._steps = folder, 0
        # Some routers run the same on all tensor-parallel ranks; then the first of these ranks writes.
        routers = {n: r for n, r in routing_statistics(module) if r.is_sharded or parallel.tensor_rank == 0}
        self._recorders: dict[str, Recorder] = {}
        for name, router in routers.items():
            router.choices = self._recorders[name] = Recorder()

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        for recorder in self._recorders.values():
            recorder.pieces = []

    def after_step(self, step: int) -> Flips | None:
        pieces = {name: recorder.pieces for name, recorder in self._recorders.items()}
        agreed(lambda: write_step(self._folder, step, dist.get_rank(), pieces) if pieces else None)
        self._steps += 1
        return None

    def summary(self) -> str:
        return f"the choices of {self._steps} steps were recorded in {self._folder}"


class Replaying:
    """Every rank reads the record of each step, and takes from it what its routers choose."""

    def __init__(self, record: Record, config: Config, module: nn.Module, parallel: ParallelContext) -> None:
        self._record, self._total = record, Flips()
        self._sequence_length = config.model.sequence_length
        self._parallel = parallel
        self._memories = [memory for _, memory in layer_memories(module)]
        self._routers: dict[str, RoutingStatistics] = dict(routing_statistics(module))
        self._replayers = {name: Replayer() for name in self._routers}
        for name, router in self._routers.items():
            router.choices = self._replayers[name]

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        positions = torch.cat([batch.sequence_index for batch in batches]).cpu()
        loaded = agreed(lambda: self._load(step, positions))
        for name, replayer in self._replayers.items():
            replayer.clear()
            replayer.recorded = loaded[name].to(batches[0].tokens.device)

    def _load(self, step: int, positions: Tensor) -> dict[str, Tensor]:
        kept = [m.kept.shape[1] for m in self._memories if m.kept is not None]
        lengths = {self._sequence_length, self._sequence_length + max(kept, default=0) * self._parallel.token_shards}
        found = self._record.load(step, self._replayers, lengths)
        for name, replay in found.items():
            if not torch.equal(replay.positions[positions % len(replay.positions)], positions):
                raise UserError(
                    f"{KEY}: step {step} of {self._record.folder} read other sequences (router {name}); a run that "
                    f"skipped data is no record for one that did not"
                )
        return {name: replay.choices for name, replay in found.items()}

    def after_step(self, step: int) -> Flips | None:
        """The flips of all ranks; each choice is counted once."""
        counted = [
            self._replayers[name]
            for name, router in self._routers.items()
            if router.is_sharded or self._parallel.tensor_rank == 0
        ]
        parts = [part.cpu() for replayer in counted for part in replayer.flips]
        own = torch.stack(parts) if parts else torch.zeros(1, 2, dtype=torch.float64)
        choices = sum(replayer.num_choices for replayer in counted)
        sums = on_collective_device(torch.tensor([choices, float(own[:, 0].sum())], dtype=torch.float64))
        distance = on_collective_device(own[:, 1].max())
        dist.all_reduce(sums)
        dist.all_reduce(distance, dist.ReduceOp.MAX)
        found = Flips(int(sums[0]), int(sums[1]), float(distance))
        self._total = self._total.with_more(found)
        return found

    def summary(self) -> str:
        return f"{self._total.text()}; record {self._record.folder}"

"""Whether the disk has room for a run's checkpoints, checked before it starts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.folders import free_bytes
from common.tables import counted
from common.units import GIB
from model.config import ModelConfig
from pretrain.checkpoint import list_checkpoints
from pretrain.config.schema import Config
from pretrain.parallel.layout import state_bytes
from pretrain.report.model_text import parameter_count
from pretrain.report.startup import DerivedValue


@dataclass(frozen=True, kw_only=True)
class CheckpointSpace:
    """What a run's checkpoints take, bytes."""

    parameters: int
    per_parameter: int
    memory: int
    """Of all streams, Transformer-XL's."""
    saved: int
    """Checkpoints that this start and those before it save, one or more."""
    kept: int
    """Those of them that are kept at its end."""
    there: int
    """Checkpoints in the run folder already, which count towards `kept`."""
    free: int
    folder: Path

    @property
    def size(self) -> int:
        """Of one checkpoint."""
        return self.per_parameter * self.parameters + self.memory

    @property
    def wanted(self) -> int:
        """Bytes still to be written: the kept checkpoints, and one that is written before an older one is removed,
        where any is."""
        return max(1, min(self.saved, self.kept + 1) - self.there) * self.size

    @property
    def least(self) -> int:
        """With fewer free bytes the run cannot replace its first checkpoint by a second one, or cannot save at all."""
        return max(1, min(self.saved, 2) - self.there) * self.size

    def row(self) -> DerivedValue:
        memory = " + memory" if self.memory else ""
        meanwhile = "with one being written " if self.saved > self.kept else ""
        return DerivedValue(
            "checkpoints",
            f"{self.kept} of {self.size / GIB:,.2f} GiB",
            f"{self.per_parameter} x parameters{memory}; keep_last, keep_best and keep_every_steps; "
            f"{meanwhile}{self.wanted / GIB:,.2f} GiB more, {self.free / GIB:,.1f} GiB are free",
        )

    def check(self) -> None:
        """Raises UserError if there is no room for one checkpoint and, if there is to be another, that one."""
        if self.free < self.least:
            raise UserError(
                f"--run-dir: the disk of {self.folder} has no room for checkpoints of {self.size:,} bytes: "
                f"{self.least:,} bytes are needed, {self.free:,} are free; make room or choose another --run-dir"
            )

    def warning(self) -> str:
        """What will not fit later; empty if everything does."""
        if self.free >= self.wanted:
            return ""
        meanwhile = " and one being written" if self.saved > self.kept else ""
        return (
            f"the disk of {self.folder} has no room for the {counted(self.kept, 'checkpoint')} that the run keeps"
            f"{meanwhile}: {self.wanted:,} bytes are needed, {self.free:,} are free; make room, or lower "
            "checkpoint.keep_last, keep_best or raise keep_every_steps"
        )


def checkpoint_space(config: Config, run_dir: Path) -> CheckpointSpace:
    """Counts parameters on the meta device, and the checkpoints that are there."""
    saving, model = config.checkpoint, config.model
    every = 1 if saving.every_minutes else saving.every_steps  # by time the run may save after any step
    saved = -(-config.train.last_step // every)
    apart = saving.keep_every_steps // math.gcd(saving.keep_every_steps, every)
    forever = max(0, saved - saving.keep_last) // apart if apart else 0  # beside the last ones
    return CheckpointSpace(
        parameters=_parameters(model),
        per_parameter=state_bytes(config),
        memory=_memory_bytes(config),
        saved=saved,
        kept=min(saved, saving.keep_last + saving.keep_best + forever),
        there=len(list_checkpoints(run_dir / "checkpoints")),
        free=free_bytes(run_dir.absolute()),
        folder=run_dir,
    )


@functools.lru_cache(maxsize=4)
def _parameters(model: ModelConfig) -> int:
    return parameter_count(model).total


def _memory_bytes(config: Config) -> int:
    """Bytes of Transformer-XL's memory: every layer keeps its inputs of the last tokens of every stream."""
    model, width = config.model, 4 if config.train.precision == "fp32" else 2
    return config.batch.global_sequences * model.num_layers * model.memory_length * model.d_model * width

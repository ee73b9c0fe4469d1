"""Whether the disk has room for a run's checkpoints, checked before it starts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.folders import free_bytes
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

    size: int
    """Bytes of one checkpoint: `per_parameter`, and the memory of all streams."""
    per_parameter: int
    kept: int
    """Checkpoints that the run keeps at its end, one or more: no more than it saves."""
    there: int
    """Checkpoints in the run folder already, which count towards `kept`."""
    free: int
    folder: Path

    @property
    def wanted(self) -> int:
        """Bytes still to be written: the kept checkpoints, and one that is written before an older one is removed."""
        return max(1, self.kept + 1 - self.there) * self.size

    @property
    def least(self) -> int:
        """With fewer free bytes the run cannot replace its first checkpoint by a second one, or cannot save at all."""
        return max(1, 2 - self.there) * self.size

    def row(self) -> DerivedValue:
        memory = " + memory" if self.size % self.per_parameter else ""
        return DerivedValue(
            "checkpoints",
            f"{self.kept} of {self.size / GIB:,.2f} GiB",
            f"{self.per_parameter} x parameters{memory}; keep_last, keep_best and keep_every_steps; with one being "
            f"written {self.wanted / GIB:,.2f} GiB more, {self.free / GIB:,.1f} GiB are free",
        )

    def check(self) -> None:
        """Raises UserError if there is no room for one checkpoint and another that is being written."""
        if self.free < self.least:
            raise UserError(
                f"--run-dir: the disk of {self.folder} has no room for checkpoints of {self.size:,} bytes: "
                f"{self.least:,} bytes are needed, {self.free:,} are free; make room or choose another --run-dir"
            )

    def warning(self) -> str:
        """What will not fit later; empty if everything does."""
        if self.free >= self.wanted:
            return ""
        return (
            f"the disk of {self.folder} has no room for the {self.kept} checkpoints that the run keeps and one being "
            f"written: {self.wanted:,} bytes are needed, {self.free:,} are free; make room, or lower "
            "checkpoint.keep_last, keep_best or raise keep_every_steps"
        )


def checkpoint_space(config: Config, run_dir: Path) -> CheckpointSpace:
    """Counts parameters on the meta device, and the checkpoints that are there."""
    saving, model = config.checkpoint, config.model
    # By time the run may save after any step.
    saved = config.train.steps if saving.every_minutes else -(-config.train.steps // saving.every_steps)
    forever = config.train.steps // saving.keep_every_steps if saving.keep_every_steps else 0
    per_parameter = state_bytes(config)
    return CheckpointSpace(
        size=per_parameter * _parameters(model) + _memory_bytes(config),
        per_parameter=per_parameter,
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

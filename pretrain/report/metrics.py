"""One step as a line of metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from common.strict_json import finite
from pretrain.config.schedule import learning_rate
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.training_data import TrainingData
from pretrain.device import memory_bytes
from pretrain.engine.details import Details
from pretrain.engine.step_sums import StepSums
from pretrain.report.router_load import load_summary
from pretrain.routing.tape import Flips


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gives, the same on every rank."""

    sums: StepSums
    seconds: float
    """From before its batches were read to the end of its last kernel, on this rank."""
    data_wait_seconds: float
    """How long its batches were waited for."""
    flips: Flips | None = None
    """With train.replay_routing."""
    loss_scale: float | None = None
    """With fp16: the scale that the next step's loss is multiplied with."""
    scale_can_fall: bool = False
    """With fp16: whether this step's was above the smallest, so that an overflow is a part of the search for one."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """How long each phase took since the end of the step before, on this rank."""
    details: Details | None = None
    """Every monitor.details_every_steps."""


def step_values(
    config: Config,
    data: TrainingData,
    result: StepResult,
    progress: Progress,
    device: torch.device,
) -> dict[str, float | None]:
    """The line of the step that led to `progress`. None stands for a loss that is not a number, and for the norm of a
    skipped update."""
    sums, consumed = result.sums, progress.consumed_sequences
    values: dict[str, float | None] = {
        "step": progress.step,
        "loss": finite(sums.loss),
        "auxiliary_loss": finite(sums.auxiliary_loss),
        "grad_norm": sums.grad_norm,
        "lr": learning_rate(config, progress.step - 1),
        "tokens": progress.tokens(config.model.sequence_length),
        "tokens_per_second": config.batch.global_sequences * config.model.sequence_length / result.seconds,
        "step_seconds": result.seconds,
        "data_wait_seconds": result.data_wait_seconds,
        "epoch": data.stream.epoch(consumed),
        **memory_bytes(device),
        **load_summary(sums.load, config.model),
    }
    names = [source.name for source in data.sources.sources]
    if len(names) > 1:
        epochs = data.stream.source_epochs(consumed)
        values |= {f"epoch/{name}": epoch for name, epoch in zip(names, epochs, strict=True)}
    if sums.negative_entropy is not None:
        values["routing_negative_entropy"] = finite(sums.negative_entropy)
    if result.flips is not None:
        values |= result.flips.values()
    if result.loss_scale is not None:
        values["loss_scale"] = result.loss_scale
    return values

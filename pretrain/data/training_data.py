"""What a rank reads: batches for training, ahead of the step, and windows for validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.parallel.context import ParallelContext
from pretrain.config.schema import Config
from pretrain.data.prefetch import Prefetcher
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.windows import TrainingStream, Windows


@dataclass(frozen=True)
class TrainingData:
    """The data of one rank, from one start point on."""

    sources: Sources
    stream: TrainingStream
    prefetcher: Prefetcher
    validation: Windows | None
    """The held-out split; None if nothing is validated."""


def open_training_data(
    config: Config,
    sources: Sources,
    parallel: ParallelContext,
    device: torch.device,
    progress: Progress,
) -> TrainingData:
    """`progress`: of the start point, which says what of the data order is never read, and its stages."""
    sources.patience.begin()
    stream = TrainingStream(
        sources.reader("train", config),
        config,
        data_rank=parallel.data_rank,
        data_size=parallel.data_size,
        skipped=progress.skipped_ranges,
        stage=progress.stages[-1] if progress.stages else None,
    )
    return TrainingData(
        sources,
        stream,
        Prefetcher(stream, device, global_sequences=config.batch.global_sequences),
        sources.reader(config.evaluate.split, config) if config.evaluate.sequences else None,
    )

"""Held-out validation: mean cross-entropy over the first windows of the validation split, the same in every layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.parallel.context import ParallelContext
from pretrain.config import Config
from pretrain.data import WindowReader


def evaluation_windows(reader: WindowReader, config: Config) -> int:
    """Windows that are evaluated: evaluate.sequences, or all if the split is smaller."""
    return min(config.evaluate.sequences, reader.num_windows)


@torch.no_grad()
def evaluate(
    engine: Any, reader: WindowReader, config: Config, parallel: ParallelContext, device: torch.device
) -> dict[str, float]:
    """Collective. Windows are dealt to ranks in blocks of micro_sequences; a rank with none left computes a window
    that does not count, because under ZeRO 3 every forward pass is collective."""
    total, micro = evaluation_windows(reader, config), config.batch.micro_sequences
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    engine.eval()
    for first in range(0, total, micro * parallel.data_size):
        windows = first + parallel.data_rank * micro + np.arange(micro)
        counted = torch.from_numpy(windows < total).to(device)
        tokens, targets = reader.read(np.minimum(windows, total - 1))
        index = torch.zeros(micro, dtype=torch.int64, device=device)  # seeds dropout, which is off
        _, sequence_loss = engine(tokens.to(device), targets.to(device), index)
        sums += torch.stack([(sequence_loss * counted).sum().double(), counted.sum().double()])
    engine.train()
    if parallel.data_size > 1:
        dist.all_reduce(sums, group=parallel.data_group)
    loss = float(sums[0] / sums[1])
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(sums[1]) * reader.sequence_length}


def unigram_perplexity(reader: WindowReader, windows: int) -> float:
    """Perplexity of the same targets under their own token frequencies: the best any context-free model could do."""
    counts = np.zeros(0, dtype=np.int64)
    for window in range(windows):
        _, targets = reader.read(np.array([window]))
        seen = np.bincount(targets.numpy().ravel())
        counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
        counts[: len(seen)] += seen
    probability = counts[counts > 0] / counts.sum()
    return float(np.exp(-(probability * np.log(probability)).sum()))

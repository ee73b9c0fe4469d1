"""Held-out validation: mean cross-entropy over windows of the validation split, the same in every layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.memory import layer_memories, separate_streams
from model.parallel.context import ParallelContext
from pretrain.agreement import agreed
from pretrain.config import Config
from pretrain.data import WindowReader


def evaluation_windows(reader: WindowReader, config: Config) -> np.ndarray:
    """Indices [steps, streams] int64 of the windows that are evaluated, evaluate.sequences of them (or all, if the
    split has fewer). Streams begin evenly spread, because a split holds its sources one after the other, and read on
    from there: with memory evaluate.streams of them, without each window is a stream of its own."""
    count = min(config.evaluate.sequences, reader.num_windows)
    streams = min(config.evaluate.streams, count) if config.model.memory_length else count
    starts = np.arange(streams) * reader.num_windows // streams
    return starts[None, :] + np.arange(count // streams)[:, None]


@torch.no_grad()
def evaluate(
    engine: Any, reader: WindowReader, config: Config, parallel: ParallelContext, device: torch.device
) -> dict[str, float]:
    """Collective. Streams are dealt to ranks in blocks of micro_sequences; a rank with none left computes a copy of the
    last stream that does not count, because under ZeRO 3 every forward pass is collective."""
    windows, micro = evaluation_windows(reader, config), config.batch.micro_sequences
    steps, total = windows.shape
    firsts = range(0, total, micro * parallel.data_size)
    places = [first + parallel.data_rank * micro + np.arange(micro) for first in firsts]
    streams, num_streams = torch.from_numpy(np.concatenate(places)), len(firsts) * micro * parallel.data_size
    # Read before the first collective forward: a damaged shard is then one rank's message, not everybody's hang.
    batches = agreed(
        lambda: [
            [reader.read(windows[step, np.minimum(place, total - 1)]) for place in places] for step in range(steps)
        ]
    )
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    engine.eval()
    with separate_streams(engine.module, streams.to(device), num_streams):
        for step in batches:
            for place, (tokens, targets) in zip(places, step, strict=True):
                counted = torch.from_numpy(place < total).to(device)
                index = torch.from_numpy(place).to(device)  # names the stream; dropout, which it also seeds, is off
                _, sequence_loss = engine(tokens.to(device), targets.to(device), index)
                sums += torch.stack([(sequence_loss * counted).sum().double(), counted.sum().double()])
            for _, memory in layer_memories(engine.module):
                memory.advance()
    engine.train()
    if parallel.data_size > 1:
        dist.all_reduce(sums, group=parallel.data_group)
    loss = float(sums[0] / sums[1])
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(sums[1]) * reader.sequence_length}
    if reader.tokens_are_bytes:
        values["bits_per_byte"] = loss / math.log(2)
    return values


def unigram_perplexity(reader: WindowReader, windows: np.ndarray) -> float:
    """Perplexity of the same targets under their own token frequencies: the best any context-free model could do."""
    counts = np.zeros(0, dtype=np.int64)
    for window in windows.ravel():
        _, targets = reader.read(np.array([window]))
        seen = np.bincount(targets.numpy().ravel())
        counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
        counts[: len(seen)] += seen
    probability = counts[counts > 0] / counts.sum()
    return float(np.exp(-(probability * np.log(probability)).sum()))

"""Held-out validation: mean cross-entropy over windows of the held-out split, the same in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from model.memory import layer_memories, separate_streams
from model.parallel.context import ParallelContext
from pretrain.config.schema import Config
from pretrain.data.windows import Batch, Windows
from pretrain.engine.micro_steps import Executor
from pretrain.parallel.agreement import agreed


def evaluation_windows(reader: Windows, config: Config) -> np.ndarray:
    """Indices [steps, streams] int64 of the windows that are evaluated, evaluate.sequences of them (or all, if the
    split has fewer); -1 where a stream has ended. With memory there are evaluate.streams streams, without each window
    is a stream of its own. Spread, streams begin evenly over the split, because a split holds its sources one after the
    other, and read on from there; their lengths differ by one at most. From the start, they are cut from the first
    windows and all of one length, in which the published runs evaluated models without memory too."""
    settings, has_memory = config.evaluate, config.model.memory_length > 0
    count = min(settings.sequences, reader.num_windows)
    # A stream of one window would never use the memory.
    streams = max(1, min(settings.streams, count // 2))
    if settings.placement == "start":
        count -= count % streams
        chosen = np.arange(count)
        return chosen.reshape(streams, -1).T if has_memory else chosen[None]
    streams = streams if has_memory else count
    edges = np.arange(streams + 1) * count // streams
    lengths = np.diff(edges)
    starts = edges[:-1] + np.arange(streams) * (reader.num_windows - count) // streams
    step = np.arange(lengths.max())[:, None]
    return np.where(step < lengths, starts + step, -1)


@torch.no_grad()
def evaluate(
    module: nn.Module,
    executor: Executor,
    reader: Windows,
    config: Config,
    parallel: ParallelContext,
    device: torch.device,
    *,
    before_batch: Callable[[], bool] = lambda: True,
) -> dict[str, float] | None:
    """Collective. Streams are dealt to ranks in blocks of micro_sequences; where a stream has ended or a rank has none
    left, a window is computed that does not count, because under ZeRO 3 every forward pass is collective.
    `before_batch`, collective too, says whether to go on; if not, the result is None."""
    windows, micro = evaluation_windows(reader, config), config.batch.micro_sequences
    steps, total = windows.shape
    firsts = range(0, total, micro * parallel.data_size)
    places = [first + parallel.data_rank * micro + np.arange(micro) for first in firsts]
    streams, num_streams = torch.from_numpy(np.concatenate(places)), len(firsts) * micro * parallel.data_size
    padded = np.pad(windows, ((0, 0), (0, num_streams - total)), constant_values=-1)

    # Read before the first collective forward: a damaged shard is then one rank's message, not everybody's hang.
    def read(windows: np.ndarray, place: np.ndarray) -> Batch:
        documents = reader.documents(windows) if config.data.document_mask else None
        # The index names the stream; dropout, which it also seeds, is off.
        return Batch(*reader.read(windows), torch.from_numpy(place), documents)

    batches = agreed(
        lambda: [[read(np.maximum(padded[step, place], 0), place) for place in places] for step in range(steps)]
    )
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    at_once = 4 * parallel.pipeline_size  # few enough to stop soon, many enough to fill the pipeline
    with separate_streams(module, streams.to(device), num_streams):
        for step, step_batches in enumerate(batches):
            losses: list[torch.Tensor] = []
            for first in range(0, len(step_batches), at_once):
                if not before_batch():
                    return None
                losses += executor.evaluate([batch.to(device) for batch in step_batches[first : first + at_once]])
            for place, sequence_loss in zip(places, losses, strict=True):
                counted = torch.from_numpy(padded[step, place] >= 0).to(device) & parallel.is_last_stage
                sums += torch.stack([(sequence_loss * counted).sum().double(), counted.sum().double()])
            for _, memory in layer_memories(module):
                memory.advance()
    for group in (parallel.data_group, parallel.pipeline_group):
        if group is not None:
            dist.all_reduce(sums, group=group)
    loss = float(sums[0] / sums[1])
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(sums[1]) * reader.sequence_length}
    if reader.tokens_are_bytes:
        values["bits_per_byte"] = loss / math.log(2)
    return values


def unigram_perplexity(reader: Windows, windows: np.ndarray) -> float:
    """Perplexity of the same targets under their own token frequencies: the best any context-free model could do."""
    counts = np.zeros(0, dtype=np.int64)
    for window in windows[windows >= 0]:
        _, targets = reader.read(np.array([window]))
        seen = np.bincount(targets.numpy().ravel())
        counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
        counts[: len(seen)] += seen
    probability = counts[counts > 0] / counts.sum()
    return float(np.exp(-(probability * np.log(probability)).sum()))

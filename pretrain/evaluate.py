"""Held-out validation: mean cross-entropy over windows of the held-out split, the same in every layout."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from common.errors import UserError
from common.progress_bar import phase_progress
from common.strict_json import finite, without_nan
from model.memory import layer_memories, separate_streams
from model.parallel.context import ParallelContext
from pretrain.config.data_rules import source_names
from pretrain.config.schema import Config
from pretrain.data.windows import Batch, Windows
from pretrain.engine.micro_steps import Evaluator
from pretrain.parallel.agreement import agreed
from pretrain.report.monitor import Monitor
from pretrain.saved_model.tokenizer import Tokenizer
from pretrain.trainer import HeldOutText, Trainer

READ_AT_ONCE = 1 << 22
"""Tokens of a rank that are read, and agreed on, before they are computed: 64 MiB, and most validations in one go."""


def evaluation_windows(reader: Windows, config: Config) -> np.ndarray:
    """Indices [steps, streams] int64 of the windows that are evaluated, evaluate.sequences of them (or all, if the
    split has fewer); -1 where a stream has ended. With memory there are evaluate.streams streams; without memory each
    window is a stream of its own. Placement spread: streams begin evenly over the split, because a split holds its
    sources one after the other, and read on from there; their lengths differ by one at most. Placement start: streams
    of equal length are cut from the first windows, as in the published runs, for models without memory too."""
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


def _deal(windows: np.ndarray, micro: int, parallel: ParallelContext) -> tuple[np.ndarray, list[np.ndarray]]:
    """Deals streams to ranks in blocks of `micro`; every rank gets the same number of blocks. -> windows
    [steps, num_streams] int64, with -1 for those that are computed but not counted; and of each of this rank's
    micro-batches the streams [micro] int64, which are columns of them."""
    total = windows.shape[1]
    firsts = range(0, total, micro * parallel.data_size)
    num_streams = len(firsts) * micro * parallel.data_size
    blocks = [first + parallel.data_rank * micro + np.arange(micro) for first in firsts]
    return np.pad(windows, ((0, 0), (0, num_streams - total)), constant_values=-1), blocks


def _batches(reader: Windows, config: Config, windows: np.ndarray, blocks: list[np.ndarray]) -> Iterator[Batch]:
    """This rank's micro-batches of `_deal`, of every step in turn. Collective: they are read before a forward pass,
    which is collective too, so that a damaged shard is one rank's message, not everybody's hang."""

    wanted = [(np.maximum(row[block], 0), block) for row in windows for block in blocks]
    at_once = max(1, READ_AT_ONCE // (config.batch.micro_sequences * reader.sequence_length))

    def read(first: int) -> list[Batch]:
        found = []
        for own, block in wanted[first : first + at_once]:
            documents = reader.documents(own) if config.data.document_mask else None
            # The index names the stream; dropout, which it also seeds, is off.
            found.append(Batch(*reader.read(own), torch.from_numpy(block), documents))
        return found

    for first in range(0, len(wanted), at_once):
        yield from agreed(partial(read, first))


@torch.no_grad()
def evaluate(
    executor: Evaluator,
    reader: Windows,
    config: Config,
    parallel: ParallelContext,
    device: torch.device,
    *,
    before_batch: Callable[[int, int], bool] = lambda done, total: True,
) -> dict[str, float] | None:
    """Loss, perplexity, number of tokens and, for tokens that are bytes, bits per byte; of a mixture also loss/NAME and
    tokens/NAME of every source that has a window. Collective. A rank whose stream has ended, or that has none left,
    computes a window that does not count, because under ZeRO 3 every forward pass is collective. `before_batch`, which
    is collective too, hears how many micro-batches of this rank are done, and of how many, and says whether to go on;
    if not, the result is None."""
    windows, blocks = _deal(evaluation_windows(reader, config), config.batch.micro_sequences, parallel)
    batches = _batches(reader, config, windows, blocks)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    names = source_names(config) if len(reader.sizes) > 1 else []
    # Sums of their own: the total adds up as that of one data set does, bit for bit.
    source_sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    sources = np.searchsorted(np.cumsum(reader.sizes), windows, side="right")
    at_once = 4 * parallel.pipeline_size  # few enough to stop soon, many enough to fill the pipeline
    streams = torch.from_numpy(np.concatenate(blocks)).to(device)
    with separate_streams(executor.module, streams, windows.shape[1]):
        for step, (row, row_sources) in enumerate(zip(windows, sources, strict=True)):
            losses: list[torch.Tensor] = []
            for first in range(0, len(blocks), at_once):
                if not before_batch(step * len(blocks) + first, len(windows) * len(blocks)):
                    return None
                some = itertools.islice(batches, len(blocks[first : first + at_once]))
                losses += executor.evaluate([batch.to(device) for batch in some])
            for block, sequence_loss in zip(blocks, losses, strict=True):
                counted = torch.from_numpy(row[block] >= 0).to(device) & parallel.is_last_stage
                sums += torch.stack([(sequence_loss * counted).sum().double(), counted.sum().double()])
                if names:
                    of_block = torch.from_numpy(row_sources[block]).to(device)
                    source_sums += _sums_by_source(sequence_loss, counted, of_block, len(names))
            for _, memory in layer_memories(executor.module):
                memory.advance()
    for group in (parallel.data_group, parallel.pipeline_group):
        if group is not None:
            dist.all_reduce(sums, group=group)
            if names:
                dist.all_reduce(source_sums, group=group)
    loss = float(sums[0] / sums[1])
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(sums[1]) * reader.sequence_length}
    if reader.tokens_are_bytes:
        values["bits_per_byte"] = loss / math.log(2)
    for name, (loss_sum, count) in zip(names, source_sums.tolist(), strict=True):
        if count:
            values |= {f"loss/{name}": loss_sum / count, f"tokens/{name}": count * reader.sequence_length}
    return values


def _sums_by_source(
    sequence_loss: torch.Tensor, counted: torch.Tensor, source: torch.Tensor, num_sources: int
) -> torch.Tensor:
    """Losses [B], whether each counts [B] bool, and its source [B] int64 -> [num_sources, 2] fp64: sum of the losses of
    each source, and their number."""
    chosen = counted & (source == torch.arange(num_sources, device=source.device)[:, None])
    # No product with zeros: a loss that is not finite stays with its source.
    losses = torch.where(chosen, sequence_loss.double(), 0.0)
    return torch.stack([losses.sum(1), chosen.sum(1).double()], 1)


def validate(
    trainer: Trainer, monitor: Monitor | None, step: int, *, is_last: bool, stopping: Callable[[], bool]
) -> float | None:
    """Validates on the held-out split, with evaluate.ema the moving average of the weights too. Also says the bits per
    byte of the text, and after the last step the unigram perplexity of the same tokens. Collective; before every batch
    it calls `stopping`, which is collective too. Returns the loss of the weights on every rank, or None: without a
    validation split, after a request to stop, or if the loss is not finite."""
    reader, config, phases = trainer.data.validation, trainer.setup.config, trainer.setup.phases
    if reader is None:
        return None

    phases.enter("validation")
    setup = trainer.setup

    def evaluated(what: str) -> dict[str, float] | None:
        with phase_progress(what, "batches", enabled=monitor is not None) as progress:

            def goes_on(done: int, total: int) -> bool:
                phases.enter("validation")  # every batch is a sign of life
                progress(done, total)
                return not stopping()

            return evaluate(trainer.executor, reader, config, setup.parallel, setup.device, before_batch=goes_on)

    values = evaluated(f"validation after step {step}")
    if values is not None and config.evaluate.ema and trainer.average is not None:
        with trainer.average.in_place_of_weights():
            averaged = evaluated(f"validation of the moving average after step {step}")
        values = None if averaged is None else values | _of_average(averaged)
    if values is None:
        return None
    text = trainer.held_out_text
    if text is None and (is_last or not reader.tokens_are_bytes):
        text = trainer.held_out_text = _held_out_text(trainer, reader, reads=monitor is not None)
    if monitor is not None:
        if text is not None and not reader.tokens_are_bytes:
            values |= _bits_per_byte(values, text.bytes)
        if text is not None and is_last:
            values["unigram_perplexity"] = text.unigram_perplexity
        monitor.validation(step, without_nan(values), split=config.evaluate.split)
        if is_last and math.isfinite(values["loss"]):
            print(_last_line(values, config.evaluate.split), flush=True)
    return finite(values["loss"])


def _held_out_text(trainer: Trainer, reader: Windows, *, reads: bool) -> HeldOutText:
    """What the validations of this start predict, on the one rank that `reads` all windows again; nothing known on the
    others. Collective, because that one may fail."""
    windows = evaluation_windows(reader, trainer.setup.config)
    counts = agreed(lambda: target_counts(reader, windows) if reads else np.zeros(0, np.int64))
    size = None
    with contextlib.suppress(UserError):  # without its tokenizer nobody knows the text
        size = Tokenizer(trainer.setup.sources.sources[0].manifest).bytes_of(counts) if reads else None
    return HeldOutText(unigram_perplexity(counts) if reads else math.nan, size)


def _bits_per_byte(values: dict[str, float], size: int | None) -> dict[str, float]:
    """Of the losses of a validation, those of the moving average too, on a text of `size` bytes."""
    if not size:
        return {}
    losses = {name: values[f"{name}loss"] for name in ("", "ema_") if f"{name}loss" in values}
    return {f"{name}bits_per_byte": bits_per_byte(loss, values["tokens"], size) for name, loss in losses.items()}


def bits_per_byte(loss: float, tokens: float, size: int) -> float:
    """Of a mean loss in nats per token, on a text of so many tokens and bytes."""
    return loss * tokens / math.log(2) / size


def _of_average(values: dict[str, float]) -> dict[str, float]:
    """The values of a validation of the moving average, under their own names."""
    return {f"ema_{key}": value for key, value in values.items() if key.partition("/")[0] != "tokens"}


def _last_line(values: dict[str, float], split: str) -> str:
    below = 100 * (1 - values["perplexity"] / values["unigram_perplexity"])
    bits = f" ({values['bits_per_byte']:.4f} bits per byte)" if "bits_per_byte" in values else ""
    return (
        f"{split} perplexity {values['perplexity']:.2f}{bits}; unigram perplexity of the same "
        f"{values['tokens']:,.0f} tokens {values['unigram_perplexity']:.2f} "
        f"({abs(below):.1f}% {'below' if below >= 0 else 'above'})"
    )


def unigram_perplexity(counts: np.ndarray) -> float:
    """Perplexity of targets that were counted, [ids], under their own frequencies: the best any context-free model
    could do."""
    probability = counts[counts > 0] / counts.sum()
    return float(np.exp(-(probability * np.log(probability)).sum()))


def target_counts(reader: Windows, windows: np.ndarray) -> np.ndarray:
    """How often each id is a target of these windows (-1: none): int64, as long as the highest id needs."""
    counts = np.zeros(0, dtype=np.int64)
    for window in windows[windows >= 0]:
        _, targets = reader.read(np.array([window]))
        seen = np.bincount(targets.numpy().ravel())
        counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
        counts[: len(seen)] += seen
    return counts

"""Windows of tokens for training and validation, by position in the run.

A window is sequence_length + 1 consecutive tokens of a split; window w starts at token w x sequence_length, so that
every token is a target exactly once per epoch, except the first of a split and fewer than sequence_length at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_prep.shards.format import Manifest
from data_prep.shards.reader import MAX_OPEN_SHARDS, Hold, SplitReader, Stamp
from pretrain.config.data_rules import source_names, whole_weights
from pretrain.config.schema import Config
from pretrain.data.order import window_order
from pretrain.data.patience import Patience
from pretrain.data.progress import Range, data_positions
from pretrain.data.stages import Stage, first_stage


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on its device."""

    tokens: Tensor
    """[B, T] int64 inputs."""
    targets: Tensor
    """[B, T] int64: tokens shifted by one."""
    sequence_index: Tensor
    """[B] int64: position of each sequence in the run."""
    documents: Tensor | None = None
    """With data.document_mask, [B, T] int64: which document of its window each input belongs to, from 0."""

    def model_inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the language model."""
        inputs = (self.tokens, self.targets, self.sequence_index)
        return inputs if self.documents is None else (*inputs, self.documents)

    def to(self, device: torch.device) -> Batch:
        """This batch on `device`; the copy is asynchronous from pinned memory."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """A copy in pinned memory."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        documents = None if self.documents is None else function(self.documents)
        return Batch(function(self.tokens), function(self.targets), function(self.sequence_index), documents)


def num_windows(manifest: Manifest, split: str, sequence_length: int, *, max_tokens: int | None = None) -> int:
    """Number of windows of sequence_length + 1 tokens in a split; neighbours share one token. With `max_tokens`, only
    windows whose inputs are among the first max_tokens tokens count."""
    windows = max(0, (manifest.num_tokens(split) - 1) // sequence_length)
    return windows if max_tokens is None else min(windows, max_tokens // sequence_length)


class Windows(Protocol):
    """Windows by index, from one data set or several."""

    sequence_length: int
    num_windows: int
    tokens_are_bytes: bool
    sizes: tuple[int, ...]
    """Windows of each source; the first source has the lowest indices."""

    def read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """`windows` [B] -> inputs and targets, both [B, T] int64 on the CPU."""

    def documents(self, windows: np.ndarray) -> Tensor:
        """`windows` [B] -> [B, T] int64: which document of its window each input belongs to, from 0."""


class WindowReader:
    """Reads windows of one split by index. Use from one thread at a time."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        sequence_length: int,
        *,
        hold: Hold | None = None,
        max_tokens: int | None = None,
        max_open_shards: int = MAX_OPEN_SHARDS,
    ) -> None:
        """`hold`: see SplitReader; without it shards are hashed when they are first read."""
        self.num_windows = num_windows(manifest, split, sequence_length, max_tokens=max_tokens)
        self.sizes: tuple[int, ...] = (self.num_windows,)
        self.sequence_length = sequence_length
        self.tokens_are_bytes = manifest.tokenizer.tokens_are_bytes
        self._split = SplitReader(
            manifest, split, verify_on_first_read=hold is None, hold=hold, max_open_shards=max_open_shards
        )
        self.patience = Patience()
        """Makes every read; this one raises each error as it is."""

    def trust(self, hashed: Mapping[str, Stamp]) -> None:
        """See SplitReader."""
        self._split.trust(hashed)

    def read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """`windows` [B] -> inputs and targets, both [B, T] int64 on the CPU."""
        T = self.sequence_length
        rows = self.patience(lambda: self._split.read_rows(np.asarray(windows, np.int64) * T, T + 1))
        # Widened once for each of the two: copies of int64 rows would move twice as many bytes.
        return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))

    def documents(self, windows: np.ndarray) -> Tensor:
        T = self.sequence_length
        starts = np.asarray(windows, np.int64) * T
        return torch.from_numpy(self.patience(lambda: self._split.document_index(starts, T)))


class MixedReader:
    """The windows of several data sets, one after the other."""

    def __init__(self, readers: Sequence[WindowReader]) -> None:
        self._readers = readers
        self.sequence_length = readers[0].sequence_length
        self.tokens_are_bytes = readers[0].tokens_are_bytes
        self.sizes = tuple(reader.num_windows for reader in readers)
        self.num_windows = sum(self.sizes)
        self._first = np.cumsum((0, *self.sizes))

    def read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens = torch.empty((len(windows), self.sequence_length), dtype=torch.int64)
        targets = torch.empty_like(tokens)
        for rows, reader, own in self._by_source(windows):
            tokens[rows], targets[rows] = reader.read(own)
        return tokens, targets

    def documents(self, windows: np.ndarray) -> Tensor:
        index = torch.empty((len(windows), self.sequence_length), dtype=torch.int64)
        for rows, reader, own in self._by_source(windows):
            index[rows] = reader.documents(own)
        return index

    def _by_source(self, windows: np.ndarray) -> Iterator[tuple[np.ndarray, WindowReader, np.ndarray]]:
        """Rows of each source, its reader, and its own windows."""
        source = np.searchsorted(self._first, windows, side="right") - 1
        for s in np.unique(source):
            rows = np.flatnonzero(source == s)
            yield rows, self._readers[s], windows[rows] - self._first[s]


ORDER_POSITIONS = 4096
"""Number of positions whose windows are computed at once: in calls of 32 a position costs 200 times as much."""


class TrainingStream:
    """The global batches of a run, cut for one data-parallel rank.

    A step that starts after c consumed sequences takes positions c .. c + G - 1, G = global_sequences. Micro-step m
    takes m S .. (m + 1) S - 1 of them, S = micro_sequences x DP, and rank d the d-th block of micro_sequences.
    The order of windows depends on (manifest, seed, position) alone: a keyed shuffle per epoch. With several sources, a
    schedule of the weights decides which one a position reads, and each has epochs of its own; `stage` says from which
    position on, and where each source stood there (see stages.py; None: the run's first). With data.order streams,
    as with memory, the split is instead cut into G contiguous streams of W windows; a step takes the next window of
    each, so position n is window (n // G) mod W of stream n mod G. Every W steps all streams begin again, with empty
    memory. The last windows of the split, fewer than G, have no place in a stream. In a later stage, such as one of
    longer windows, streams go on after as many windows as were read before it, rounded up to whole steps. A run that
    goes on with another G, which memory forbids, reads on at its position in the streams that it had: `stage.streams`
    of them, the G of this order from then on.

    Positions in `skipped` are left out: "c consumed sequences" counts the others. In streams these ranges are whole
    steps, and memory is empty after a range, because it held text from before the range.
    """

    def __init__(
        self,
        reader: Windows,
        config: Config,
        *,
        data_rank: int,
        data_size: int,
        skipped: tuple[Range, ...] = (),
        stage: Stage | None = None,
    ) -> None:
        self._reader = reader
        self._skipped = skipped
        self._seed = config.train.seed
        self._global = config.batch.global_sequences
        self._micro = config.batch.micro_sequences
        self._rank, self._size = data_rank, data_size
        self.stage = stage or _configured(config)
        assert len(self.stage.mixed) == len(reader.sizes)
        self._shuffle = {"block_windows": config.data.shuffle_block_windows, "blocks": config.data.shuffle_blocks}
        self._document_mask = config.data.document_mask
        self._parts: dict[int, np.ndarray] = {}
        self._streams = self.stage.streams or self._global
        self._chunks = reader.num_windows // self._streams if config.reads_streams else 0
        self._begun = -(-sum(source.read for source in self.stage.mixed) // self._streams)
        """Windows of each stream that were read before the stage."""
        self.micro_steps = config.micro_steps(data_size)

    def own_positions(self, consumed: int, micro_step: int) -> np.ndarray:
        """Positions in the run [micro_sequences] int64 of this rank's sequences."""
        first = consumed + (micro_step * self._size + self._rank) * self._micro
        return data_positions(np.arange(first, first + self._micro, dtype=np.int64), self._skipped)

    def range_of(self, consumed: int, sequences: int) -> Range:
        """The positions that `sequences` sequences after `consumed` others span; in streams those of whole steps."""
        first, last = data_positions(np.array([consumed, consumed + sequences - 1]), self._skipped).tolist()
        unit, begin = self._streams if self._chunks else 1, self.stage.first
        return begin + (first - begin) // unit * unit, begin + ((last - begin) // unit + 1) * unit

    def read_in_stage(self, consumed: int) -> int:
        """How many of the first `consumed` sequences, more than were read before the stage, it has read."""
        first = self.stage.first
        left_out = sum(max(0, min(end, first) - begin) for begin, end in self._skipped)
        return consumed - (first - left_out)

    def batch(self, consumed: int, micro_step: int) -> Batch:
        """This rank's micro-batch `micro_step` (from 0) of the step that starts after `consumed` sequences,
        on the CPU. Raises DataError if a shard does not match its sha256."""
        positions = self.own_positions(consumed, micro_step)
        windows = self.windows(positions)
        tokens, targets = self._reader.read(windows)
        documents = self._reader.documents(windows) if self._document_mask else None
        return Batch(tokens, targets, torch.from_numpy(positions), documents)

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """Window of each position of the run; both [n] int64, positions rising, none before the stage."""
        assert positions[0] >= self.stage.first
        parts, places = np.divmod(positions, ORDER_POSITIONS)
        return np.concatenate([self._order_part(part)[places[parts == part]] for part in np.unique(parts).tolist()])

    def _order_part(self, part: int) -> np.ndarray:
        """Windows of ORDER_POSITIONS positions in a row; the last two parts that were asked for are kept."""
        if part not in self._parts:
            if len(self._parts) == 2:
                del self._parts[next(iter(self._parts))]
            self._parts[part] = self._order(np.arange(part * ORDER_POSITIONS, (part + 1) * ORDER_POSITIONS))
        return self._parts[part]

    def _order(self, positions: np.ndarray) -> np.ndarray:
        if self._chunks:
            step, stream = np.divmod(positions - self.stage.first, self._streams)
            return stream * self._chunks + (self._begun + step) % self._chunks
        # Nobody asks for the positions of earlier stages, which may share the first block with the stage's own.
        sources, turns = self.stage.schedule.sources(np.maximum(positions - self.stage.first, 0))
        windows, first = np.empty_like(positions), 0
        for index, (source, size) in enumerate(zip(self.stage.mixed, self._reader.sizes, strict=True)):
            chosen = sources == index
            seed = self._seed if source.shuffle is None else f"{self._seed}/source {source.shuffle}"
            windows[chosen] = first + window_order(source.read + turns[chosen], size, seed=seed, **self._shuffle)
            first += size
        return windows

    def streams(self) -> Tensor:
        """The streams [n] int64 that this rank reads in every step, by micro-step."""
        own = np.concatenate([self.own_positions(0, m) for m in range(self.micro_steps)])
        return torch.from_numpy(own % self._global)

    def begins(self, consumed: int) -> bool:
        """Whether the step after `consumed` sequences reads the first window of every stream, or one after a gap."""
        if not self._chunks:
            return False
        before, first = data_positions(np.array([max(0, consumed - 1), consumed]), self._skipped).tolist()
        step = self._begun + (first - self.stage.first) // self._streams
        return step % self._chunks == 0 or first != before + 1

    def epoch(self, consumed: int) -> float:
        """Passes over the training split after `consumed` sequences, skipped ones included; with several sources, over
        all windows together, of those that are read now; in streams over the windows that have a place in one."""
        position = self._position(consumed)
        if self._chunks:
            read = self._begun * self._streams + position - self.stage.first
            return read / (self._chunks * self._streams)
        return sum(self.stage.counts(position)) / self._reader.num_windows

    def _position(self, consumed: int) -> int:
        return int(data_positions(np.array([consumed]), self._skipped)[0])

    def source_epochs(self, consumed: int) -> list[float]:
        """Passes over each source after `consumed` sequences."""
        if self._chunks:
            return [self.epoch(consumed)]
        counts = self.stage.counts(self._position(consumed))
        return [n / size for n, size in zip(counts, self._reader.sizes, strict=True)]


def _configured(config: Config) -> Stage:
    """The stage of a run that begins with this configuration."""
    names = source_names(config) or [config.data.manifest]
    weights = whole_weights([source.weight for source in config.data.sources]) or [1]
    return first_stage(names, [""] * len(names), weights)

"""Windows of tokens for training and validation, by position in the run.

A window is sequence_length + 1 consecutive tokens of a split; window w starts at token w x sequence_length, so that
every token is a target exactly once per epoch (the first of a split never).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.shard_format import Manifest
from data_prep.shard_reader import SplitReader
from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.order import window_order
from pretrain.paths import find_input


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on its device."""

    tokens: Tensor
    """[B, T] int64 inputs."""
    targets: Tensor
    """[B, T] int64: tokens shifted by one."""
    sequence_index: Tensor
    """[B] int64: position of each sequence in the run."""


def open_manifest(config: Config) -> Manifest:
    """Loads the manifest and checks what needs no shard to be read: the splits are there and fit the model."""
    path = find_input(config.data.manifest)
    if not path.exists():
        name = (path.parent if path.suffix == ".json" else path).name
        raise UserError(
            f"data.manifest: there is no {path}; prepare the data first, e.g. python -m data_prep run --config "
            f"configs/data/{name}.json"
        )
    manifest = Manifest.load(path)
    vocab_size = manifest.tokenizer.vocab_size
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} rows cannot hold the tokenizer's {vocab_size} pieces; set it "
            f"to {vocab_size} or more"
        )
    streams = config.batch.global_sequences
    if config.model.memory_length and num_windows(manifest, "train", config.model.sequence_length) < streams:
        raise UserError(
            f"batch.global_sequences: {streams} streams with memory need a window each, but the train split of {path} "
            f"holds {num_windows(manifest, 'train', config.model.sequence_length)} windows of model.sequence_length = "
            f"{config.model.sequence_length}; prepare more text or lower one of the two"
        )
    for split in ("train", "validation") if config.evaluate.sequences else ("train",):
        if num_windows(manifest, split, config.model.sequence_length) < 1:
            raise UserError(
                f"data.manifest: the {split} split of {path} holds {manifest.num_tokens(split)} tokens, fewer than one "
                f"window of model.sequence_length + 1 = {config.model.sequence_length + 1}; prepare more text or "
                f"shorten the model's sequences" + ("" if split == "train" else ", or set evaluate.sequences to 0")
            )
    return manifest


def num_windows(manifest: Manifest, split: str, sequence_length: int) -> int:
    """Windows of sequence_length + 1 tokens in a split; neighbours share one token."""
    return max(0, (manifest.num_tokens(split) - 1) // sequence_length)


class WindowReader:
    """Reads windows of one split by index."""

    def __init__(self, manifest: Manifest, split: str, sequence_length: int, *, verify_on_first_read: bool) -> None:
        self.num_windows = num_windows(manifest, split, sequence_length)
        self.sequence_length = sequence_length
        self.tokens_are_bytes = manifest.tokenizer.kind == "bytes"
        self._split = SplitReader(manifest, split, verify_on_first_read=verify_on_first_read)

    def read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """`windows` [B] -> inputs and targets, both [B, T] int64 on the CPU."""
        T = self.sequence_length
        rows = np.stack([self._split.read(int(w) * T, int(w) * T + T + 1) for w in windows])
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class TrainingStream:
    """The global batches of a run, cut for one data-parallel rank.

    A step that starts after c consumed sequences takes positions c .. c + G - 1, G = global_sequences. Micro-step m
    takes m S .. (m + 1) S - 1 of them, S = micro_sequences x DP, and rank d the d-th block of micro_sequences.
    The order of windows depends on (manifest, seed, position) alone: a keyed shuffle per epoch. With Transformer-XL
    memory the split is instead cut into G contiguous streams of W windows; a step takes the next window of each, so
    position n is window (n // G) mod W of stream n mod G. Every W steps all streams begin again, with empty memory.
    """

    def __init__(self, reader: WindowReader, config: Config, *, data_rank: int, data_size: int) -> None:
        self._reader = reader
        self._seed = config.train.seed
        self._global = config.batch.global_sequences
        self._micro = config.batch.micro_sequences
        self._rank, self._size = data_rank, data_size
        self._chunks = reader.num_windows // self._global if config.model.memory_length else 0
        self.micro_steps = self._global // (self._micro * data_size)

    def positions(self, consumed: int, micro_step: int) -> np.ndarray:
        """Positions in the run [micro_sequences] int64 of this rank's sequences."""
        first = consumed + (micro_step * self._size + self._rank) * self._micro
        return np.arange(first, first + self._micro, dtype=np.int64)

    def batch(self, consumed: int, micro_step: int, device: torch.device) -> Batch:
        """This rank's micro-batch `micro_step` (from 0) of the step that starts after `consumed` sequences.
        Raises DataError if a shard does not match its sha256."""
        positions = self.positions(consumed, micro_step)
        tokens, targets = self._reader.read(self.windows(positions))
        index = torch.from_numpy(positions)
        return Batch(tokens.to(device), targets.to(device), index.to(device))

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """Window of each position of the run; both [n] int64."""
        if not self._chunks:
            return window_order(positions, self._reader.num_windows, seed=self._seed)
        step, stream = np.divmod(positions, self._global)
        return stream * self._chunks + step % self._chunks

    def streams(self) -> Tensor:
        """The streams [n] int64 that this rank reads in every step, by micro-step."""
        return torch.from_numpy(np.concatenate([self.positions(0, m) for m in range(self.micro_steps)]))

    def begins(self, consumed: int) -> bool:
        """Whether the step after `consumed` sequences reads the first window of every stream."""
        return self._chunks > 0 and consumed // self._global % self._chunks == 0

    def epoch(self, consumed: int) -> float:
        """Passes over the training split after `consumed` sequences."""
        return consumed / (self._chunks * self._global or self._reader.num_windows)

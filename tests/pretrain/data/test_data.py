"""Data order, windows and schedule: pure functions of the position."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import DataError, UserError
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from pretrain.config.schema import Config
from pretrain.data.order import permute, window_order
from pretrain.data.sources import Sources, open_sources
from pretrain.data.windows import TrainingStream, WindowReader, num_windows
from tests.pretrain.runs import small_config


def test_the_limit_of_tokens_is_of_training_alone(prepared: Path) -> None:
    config, whole = small_config(prepared, "data.max_tokens=160"), small_config(prepared)
    sources = Sources.load(config)
    assert sources.reader("train", config).num_windows == 10
    held_out = sources.reader("validation", config).num_windows
    assert held_out == sources.reader("validation", whole).num_windows > 10


def test_each_stream_needs_a_window(prepared: Path) -> None:
    for windows, is_enough in ((8, True), (7, False)):
        config = small_config(prepared, "model.position.type=xl", f"data.max_tokens={16 * windows}")
        with contextlib.nullcontext() if is_enough else pytest.raises(UserError, match="8 streams with memory need"):
            open_sources(config)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permutation_is_a_bijection(size: int) -> None:
    image = permute(np.arange(size), size, key="7/0")
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_depends_on_its_key_and_mixes() -> None:
    size = 10_000
    image, other = permute(np.arange(size), size, key="0/0"), permute(np.arange(size), size, key="0/1")
    assert (image == other).mean() < 0.01
    assert (image == np.arange(size)).mean() < 0.01
    # Neighbours land apart: mean distance of random pairs is size / 3.
    assert np.abs(np.diff(image)).mean() == pytest.approx(size / 3, rel=0.05)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05


def test_a_space_of_ten_billion_windows_needs_no_memory() -> None:
    size = 10**10 + 7
    image = permute(np.arange(512) + 10**9, size, key="1/0")
    assert image.min() >= 0 and image.max() < size and len(set(image.tolist())) == 512


def test_every_epoch_visits_every_window_once() -> None:
    order = window_order(np.arange(35), 7, seed=3)
    epochs = order.reshape(5, 7)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(7))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_a_window_needs_the_token_behind_its_inputs() -> None:
    """Of a split that sequence_length divides the last tokens are no window: nothing follows the last of them."""

    def of(tokens: int) -> Any:
        """What a manifest is asked."""
        return SimpleNamespace(num_tokens=lambda split: tokens)

    assert [num_windows(of(n), "train", 16) for n in (0, 16, 17, 32, 33, 48)] == [0, 0, 1, 1, 2, 2]
    assert [num_windows(of(100), "train", 16, max_tokens=n) for n in (15, 16, 32, 96, 999)] == [0, 1, 2, 6, 6]


def stream_of(prepared: Path, rank: int, size: int, micro: int) -> TrainingStream:
    config = small_config(prepared, f"batch.micro_sequences={micro}")
    reader = WindowReader(Manifest.load(prepared), "train", 16)
    return TrainingStream(reader, config, data_rank=rank, data_size=size)


def global_batch(prepared: Path, step: int, size: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    streams = [stream_of(prepared, rank, size, micro) for rank in range(size)]
    batches = [s.batch(8 * step, m) for m in range(streams[0].micro_steps) for s in streams]
    return torch.cat([b.tokens for b in batches]), torch.cat([b.sequence_index for b in batches])


def test_the_global_batch_is_the_same_for_every_split(prepared: Path) -> None:
    for step in (0, 3, 1000):
        tokens, index = global_batch(prepared, step, 1, 8)
        assert index.tolist() == list(range(8 * step, 8 * step + 8))
        for size, micro in ((1, 2), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)):
            other_tokens, other_index = global_batch(prepared, step, size, micro)
            assert torch.equal(other_tokens, tokens) and torch.equal(other_index, index), (size, micro)


def test_micro_step_and_rank_take_the_documented_block(prepared: Path) -> None:
    stream = stream_of(prepared, rank=1, size=2, micro=2)
    assert stream.own_positions(consumed=40, micro_step=1).tolist() == [46, 47]
    assert stream.own_positions(consumed=41, micro_step=0).tolist() == [43, 44]


def test_positions_that_are_left_out_cost_nothing(prepared: Path) -> None:
    """As many as here would take years, were the order of each block of them computed."""
    config, end = small_config(prepared), 10**12
    reader = WindowReader(Manifest.load(prepared), "train", 16)
    stream = TrainingStream(reader, config, data_rank=0, data_size=1, skipped=((2, end),))
    positions = stream.own_positions(0, 0)
    assert positions.tolist() == [0, 1, end, end + 1]
    expected = window_order(positions, reader.num_windows, seed=config.train.seed)
    assert stream.windows(positions).tolist() == expected.tolist()


def test_windows_are_the_tokens_of_the_split_and_targets_are_shifted(prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    with SplitReader(manifest, "train", verify_on_first_read=True) as split:
        everything = split.read(0, split.num_tokens)
    reader = WindowReader(manifest, "train", 16)
    assert reader.num_windows == (len(everything) - 1) // 16
    windows = np.random.default_rng(0).integers(0, reader.num_windows, 50)
    windows = np.append(windows, [0, reader.num_windows - 1])
    tokens, targets = reader.read(windows)
    assert tokens.dtype == targets.dtype == torch.int64
    for row, window in enumerate(windows):
        assert tokens[row].tolist() == everything[window * 16 : window * 16 + 16].tolist()
        assert targets[row].tolist() == everything[window * 16 + 1 : window * 16 + 17].tolist()


def test_another_seed_is_another_order_and_an_epoch_is_complete(prepared: Path) -> None:
    reader = WindowReader(Manifest.load(prepared), "train", 16)
    n = reader.num_windows
    order = window_order(np.arange(n), n, seed=0)
    assert sorted(order.tolist()) == list(range(n))
    assert (order != window_order(np.arange(n), n, seed=1)).mean() > 0.99


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def refusal(folder: Path, *overrides: str) -> str:
    config = small_config(folder, *overrides)
    with pytest.raises((UserError, DataError)) as error:
        open_sources(config).check(config.data.verify)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_damaged_data_is_refused_before_training(copy: Path) -> None:
    shard = sorted(copy.glob("train-*.tar"))[1]
    content = shard.read_bytes()
    shard.unlink()
    assert shard.name in refusal(copy) and "missing" in refusal(copy)
    shard.write_bytes(content[:-512])
    assert shard.name in refusal(copy) and "bytes" in refusal(copy)
    shard.write_bytes(content)
    index = next(copy.glob("train-*.idx.safetensors"))
    original = index.read_bytes()
    index.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert index.name in refusal(copy)
    index.write_bytes(original)
    tokenizer = copy / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"x")
    assert "tokenizer.model" in refusal(copy)


def test_an_altered_shard_is_found_at_first_read_or_at_start(copy: Path) -> None:
    shard = sorted(copy.glob("train-*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert shard.name in refusal(copy, "data.verify=full")
    config = small_config(copy)
    sources = open_sources(config)
    sources.check("size")  # passes: sizes and indices are right
    reader = sources.reader("train", config)
    with pytest.raises(DataError, match=shard.name):
        reader.read(np.array([0]))


def test_data_that_does_not_fit_the_model(copy: Path) -> None:
    assert "model.vocab_size" in refusal(copy, "model.vocab_size=300") and "400" in refusal(
        copy, "model.vocab_size=300"
    )
    assert "model.sequence_length" in refusal(copy, "model.sequence_length=100000")
    assert "data_prep run" in refusal(copy / "nowhere")


class _Steps(torch.utils.data.Dataset[torch.Tensor]):
    """Inputs of the steps from `first` on, a batch each, of one rank: read in whatever process asks for one."""

    def __init__(self, config: Config, *, first: int, count: int, rank: int, size: int) -> None:
        self.config, self.first, self.count, self.rank, self.size = config, first, count, rank, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> torch.Tensor:
        reader = Sources.load(self.config).reader("train", self.config)
        stream = TrainingStream(reader, self.config, data_rank=self.rank, data_size=self.size)
        consumed = (self.first + step) * self.config.batch.global_sequences
        parts = [stream.batch(consumed, m).tokens for m in range(stream.micro_steps)]
        return torch.stack(parts)  # [micro-steps, micro_sequences, T]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_worker_processes_and_changed_worlds_read_the_same_sequence(prepared: Path, workers: int) -> None:
    """Three steps on 1 rank, two on 2 and two on 4, read by as many worker processes: the order of one process."""
    config = small_config(prepared, "batch.global_sequences=8", "batch.micro_sequences=2")
    reader = Sources.load(config).reader("train", config)
    alone = TrainingStream(reader, config, data_rank=0, data_size=1)
    expected = reader.read(alone.windows(np.arange(7 * 8)))[0].view(7, 8, -1)
    read = []
    for first, count, size in ((0, 3, 1), (3, 2, 2), (5, 2, 4)):
        ranks = [_Steps(config, first=first, count=count, rank=rank, size=size) for rank in range(size)]
        loaders = [
            torch.utils.data.DataLoader(
                r, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
            )
            for r in ranks
        ]
        for of_ranks in zip(*loaders, strict=True):
            read.append(torch.stack(of_ranks, dim=1).reshape(8, -1))  # micro-step by micro-step, rank by rank
    assert torch.equal(torch.stack(read), expected)

"""Transformer-XL data: contiguous streams in training, parallel streams with memory in validation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.shard_format import Manifest
from model.language_model import build_model
from pretrain.config import Config
from pretrain.data import TrainingStream, WindowReader
from pretrain.engine import GradientNorm, parallel_context
from pretrain.errors import UserError
from pretrain.evaluate import evaluate, evaluation_windows
from pretrain.resilience.phases import Phases
from pretrain.sources import open_sources
from pretrain.whole import WholeRun
from tests.harness import run_ranks
from tests.pretrain.runs import small_config

XL = ("model.position.type=xl",)


def reader_of(config: Config, split: str) -> WindowReader:
    manifest = Manifest.load(config.data.manifest)
    return WindowReader(manifest, split, config.model.sequence_length, verify_on_first_read=False)


def test_a_stream_is_contiguous_text_and_begins_again_with_the_others(prepared: Path) -> None:
    config = small_config(prepared, *XL, "batch.micro_sequences=2")
    reader, G, T = reader_of(config, "train"), 8, 16
    ranks = [TrainingStream(reader, config, data_rank=rank, data_size=2) for rank in (0, 1)]
    chunks = reader.num_windows // G
    texts: dict[int, list[torch.Tensor]] = {s: [] for s in range(G)}
    for step in range(3):
        for stream in ranks:
            for micro_step in range(stream.micro_steps):
                batch = stream.batch(step * G, micro_step, torch.device("cpu"))
                for index, tokens, targets in zip(batch.sequence_index, batch.tokens, batch.targets, strict=True):
                    texts[int(index) % G].append(tokens)
                    assert torch.equal(tokens[1:], targets[:-1])
    whole = torch.cat([reader.read(np.array([w]))[0][0] for w in range(reader.num_windows)])
    for s, parts in texts.items():
        assert torch.equal(torch.cat(parts), whole[s * chunks * T : s * chunks * T + 3 * T])
    assert sorted(torch.cat([stream.streams() for stream in ranks]).tolist()) == list(range(G))
    begins = [step for step in range(2 * chunks + 1) if ranks[0].begins(step * G)]
    assert begins == [0, chunks, 2 * chunks]
    epoch = ranks[0].windows(np.arange(chunks * G))
    assert sorted(epoch.tolist()) == list(range(chunks * G)), "every window once an epoch"
    assert np.array_equal(ranks[0].windows(np.arange(G) + chunks * G), ranks[0].windows(np.arange(G)))
    assert ranks[0].epoch(chunks * G) == 1.0


def test_other_models_are_shuffled_as_before_and_never_begin(prepared: Path) -> None:
    config = small_config(prepared, "model.position.type=xl", "model.position.memory_chunks=0")
    stream = TrainingStream(reader_of(config, "train"), config, data_rank=0, data_size=1)
    assert not stream.begins(0)
    windows = stream.windows(np.arange(64))
    assert len(set(windows.tolist())) == 64 and (np.diff(windows) != 1).any()


def test_too_few_windows_for_the_streams_is_refused(prepared: Path) -> None:
    config = small_config(prepared, *XL, "batch.global_sequences=100000", "batch.micro_sequences=10")
    with pytest.raises(UserError, match=r"batch\.global_sequences: 100000 streams with memory need a window each"):
        open_sources(config)


def test_validation_windows_are_parallel_streams_with_memory_and_single_windows_without(prepared: Path) -> None:
    config = small_config(prepared, *XL, "evaluate.sequences=20", "evaluate.streams=6")
    reader = reader_of(config, "validation")
    windows = evaluation_windows(reader, config)
    assert windows.shape == (4, 6) and (windows[:3] >= 0).all() and (windows[3] >= 0).sum() == 2
    assert len(set(windows[windows >= 0].tolist())) == 20 and windows.max() < reader.num_windows
    assert (np.diff(windows[:3], axis=0) == 1).all()
    alone = evaluation_windows(reader, small_config(prepared, "evaluate.sequences=20"))
    assert alone.tolist() == [[i * reader.num_windows // 20 for i in range(20)]]
    everything = evaluation_windows(reader, small_config(prepared, *XL, "evaluate.sequences=1000000"))
    assert sorted(everything[everything >= 0].tolist()) == list(range(reader.num_windows))
    assert evaluation_windows(reader, small_config(prepared, *XL, "evaluate.sequences=100")).shape == (2, 50)


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_with_memory_equals_one_long_sequence(prepared: Path, ranks: int) -> None:
    """2 streams of 4 and 3 chunks with 3 chunks of memory, also where a block of streams is not full: the mean
    cross-entropy of sequences four times as long, but for the last chunk of the first."""
    keys = ("evaluate.sequences=7", "evaluate.streams=2", "batch.global_sequences=12")
    configs = [
        small_config(prepared, *XL, "model.position.memory_chunks=3", *keys, f"batch.micro_sequences={micro}")
        for micro in (1, 2, 3)
    ]
    reader = reader_of(configs[0], "validation")
    long = small_config(prepared, *XL, "model.position.memory_chunks=0", "model.sequence_length=64", *keys)
    windows = evaluation_windows(reader, configs[0])
    network, losses = build_model(long.model, seed=0).eval(), []
    for column in windows.T:
        tokens, targets = (t.reshape(1, -1) for t in reader.read(column[column >= 0]))
        losses.append(torch.nn.functional.cross_entropy(network.logits(tokens)[0][0], targets[0], reduction="sum"))
    expected = float(sum(losses)) / (7 * 16)
    for results in run_ranks(validation_losses, ranks, configs):
        for values in results:
            assert values["loss"] == pytest.approx(expected, rel=1e-6)
            assert values["tokens"] == 7 * 16


def validation_losses(rank: int, configs: list[Config]) -> list[dict[str, float]]:
    """On every rank: `evaluate` of an untrained model, seed 0."""
    found = []
    for config in configs:
        network, parallel = build_model(config.model, seed=0), parallel_context(config)
        engine = _Engine(network)
        run = WholeRun(engine, GradientNorm(engine, 0.0, parallel), Phases())
        reader = reader_of(config, "validation")
        found.append(evaluate(network, run, reader, config, parallel, torch.device("cpu")))
    return found


class _Engine(SimpleNamespace):
    """What an evaluation uses of a DeepSpeed engine."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module=module, eval=module.eval, train=module.train)

    def __call__(self, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module(*batch)

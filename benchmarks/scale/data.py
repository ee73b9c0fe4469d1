"""Which windows every rank reads: the real data order over a corpus that is never read, and a manifest of its size."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.scale.figures import Figure
from data_prep.shards.format import MANIFEST_FILE, Manifest, manifest_digest
from pretrain.config.schema import Config
from pretrain.data.windows import TrainingStream

TOKENS_OF_SHARD = 100_000_000


class UnreadWindows:
    """Windows of a corpus that nobody reads."""

    tokens_are_bytes = False

    def __init__(self, num_windows: int, sequence_length: int) -> None:
        self.num_windows, self.sequence_length = num_windows, sequence_length
        self.sizes: tuple[int, ...] = (num_windows,)

    def read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing is read here")

    def documents(self, windows: np.ndarray) -> Tensor:
        raise AssertionError("nothing is read here")


def figures(ranks: int, config: Config, *, steps: int, shards: int) -> list[Figure]:
    """`config` fits `ranks` data-parallel ranks. Checks that the ranks together read every position once, and every
    window at most once."""
    T, G = config.model.sequence_length, config.batch.global_sequences
    reader = UnreadWindows(shards * TOKENS_OF_SHARD // T, T)
    assert steps * G <= reader.num_windows, "more than an epoch"
    positions: list[np.ndarray] = []
    windows: list[np.ndarray] = []
    shards_of_rank, seconds = [], 0.0
    for rank in range(ranks):
        started = time.process_time()
        stream = TrainingStream(reader, config, data_rank=rank, data_size=ranks)
        own = [stream.own_positions(step * G, m) for step in range(steps) for m in range(stream.micro_steps)]
        read = [stream.windows(part) for part in own]
        seconds += time.process_time() - started
        positions += own
        windows += read
        shards_of_rank.append(len(np.unique(np.concatenate(read) * T // TOKENS_OF_SHARD)))
    assert np.array_equal(np.sort(np.concatenate(positions)), np.arange(steps * G)), "not every position once"
    assert len(np.unique(np.concatenate(windows))) == steps * G, "a window was read twice"

    return [
        Figure("sequences of a step", G, "sequences"),
        Figure("  tokens", G * T, "tokens"),
        Figure(f"order of {steps} steps: CPU of a rank and step", 1e3 * seconds / ranks / steps, "ms"),
        Figure(f"shards that a rank reads in {steps} steps, of {shards:,}", float(np.mean(shards_of_rank)), "shards"),
        *_manifest(shards),
    ]


def _manifest(shards: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST_FILE
        path.write_text(json.dumps(manifest_tree(shards)))
        seconds = {}
        for follow_links in (True, False):
            started = time.process_time()
            Manifest.load(path, follow_links=follow_links)
            seconds[follow_links] = time.process_time() - started
        size = path.stat().st_size
    return [
        Figure("manifest, read by every rank", size, "bytes"),
        Figure("  CPU of a rank to read it", 1e3 * seconds[False], "ms"),
        Figure("  and to follow every name, before", 1e3 * seconds[True], "ms"),
    ]


def manifest_tree(shards: int) -> dict[str, object]:
    """A manifest of `shards` training shards and one of validation, whose files are nowhere."""

    def entry(split: str, number: int) -> dict[str, object]:
        name = f"{split}-{number:05d}"
        return {
            "file": f"{name}.tar",
            "bytes": 2 * TOKENS_OF_SHARD,
            "sha256": f"{number:064x}",
            "tokens": TOKENS_OF_SHARD,
            "documents": TOKENS_OF_SHARD // 500,
            "index_file": f"{name}.idx.safetensors",
            "index_bytes": 8 * TOKENS_OF_SHARD // 500,
            "index_sha256": f"{number:064x}",
        }

    splits = {"train": [entry("train", n) for n in range(shards)], "validation": [entry("validation", 0)]}
    totals = {
        split: {
            "documents": len(entries) * (TOKENS_OF_SHARD // 500),
            "tokens": len(entries) * TOKENS_OF_SHARD,
            "text_bytes": 4 * len(entries) * TOKENS_OF_SHARD,
        }
        for split, entries in splits.items()
    }
    body: dict[str, object] = {
        "format_version": 1,
        "dtype": "uint16",
        "tokenizer": {
            "kind": "sentencepiece",
            "file": "tokenizer.model",
            "sha256": "0" * 64,
            "vocab_size": 32000,
            "eos_id": 2,
        },
        "splits": splits,
        "totals": totals,
        "provenance": {"inputs": [], "config": {}, "versions": {}},
    }
    return {**body, "digest": manifest_digest(body)}
